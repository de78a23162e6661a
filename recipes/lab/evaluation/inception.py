"""The Inception network of published FID values, from a weights file on this machine.

It is the network that TensorFlow's 2015 graph holds (1008 classes, average pools that leave out
the padding), with the parameter names of ``pt_inception-2015-12-05-6726825d.pth``, the file that
pytorch-fid and torch-fidelity publish. Images go through TensorFlow 1's bilinear resize; spatial
features are the first 7 channels of the 1x1 branch of Mixed_6d, in (h, w, c) order as in ADM's
stored statistics; the Inception Score's predictions have no bias.

Sources: Szegedy et al. 2016 (1512.00567); openai/guided-diffusion evaluations/evaluator.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.lab.console import UserError
from recipes.lab.evaluation.features import Features, with_weights

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
_OTHER_NAME = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's, of one content
SHA256_PREFIX = "6726825d"  # torch.hub's convention: the name ends in the content's hash
SIDE = 299
CLASSES = 1008


class _Conv(nn.Module):
    def __init__(self, before: int, after: int, **shape: int | tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, bias=False, **shape)  # type: ignore[arg-type]
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _A(nn.Module):
    def __init__(self, before: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(before, 64, kernel_size=1)
        self.branch5x5_1 = _Conv(before, 48, kernel_size=1)
        self.branch5x5_2 = _Conv(48, 64, kernel_size=5, padding=2)
        self.branch3x3dbl_1 = _Conv(before, 64, kernel_size=1)
        self.branch3x3dbl_2 = _Conv(64, 96, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, kernel_size=3, padding=1)
        self.branch_pool = _Conv(before, pool, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], 1)


class _B(nn.Module):
    def __init__(self, before: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(before, 384, kernel_size=3, stride=2)
        self.branch3x3dbl_1 = _Conv(before, 64, kernel_size=1)
        self.branch3x3dbl_2 = _Conv(64, 96, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class _C(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        row, column = (
            {"kernel_size": (1, 7), "padding": (0, 3)},
            {"kernel_size": (7, 1), "padding": (3, 0)},
        )
        self.branch1x1 = _Conv(768, 192, kernel_size=1)
        self.branch7x7_1 = _Conv(768, width, kernel_size=1)
        self.branch7x7_2 = _Conv(width, width, **row)
        self.branch7x7_3 = _Conv(width, 192, **column)
        self.branch7x7dbl_1 = _Conv(768, width, kernel_size=1)
        self.branch7x7dbl_2 = _Conv(width, width, **column)
        self.branch7x7dbl_3 = _Conv(width, width, **row)
        self.branch7x7dbl_4 = _Conv(width, width, **column)
        self.branch7x7dbl_5 = _Conv(width, 192, **row)
        self.branch_pool = _Conv(768, 192, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class _D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(768, 192, kernel_size=1)
        self.branch3x3_2 = _Conv(192, 320, kernel_size=3, stride=2)
        self.branch7x7x3_1 = _Conv(768, 192, kernel_size=1)
        self.branch7x7x3_2 = _Conv(192, 192, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, kernel_size=(7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, stride=2)], 1)


class _E(nn.Module):
    def __init__(self, before: int, pool_is_max: bool) -> None:
        super().__init__()
        self.pool_is_max = pool_is_max  # in the last block alone; an oddity of the 2015 graph
        self.branch1x1 = _Conv(before, 320, kernel_size=1)
        self.branch3x3_1 = _Conv(before, 384, kernel_size=1)
        self.branch3x3_2a = _Conv(384, 384, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3_2b = _Conv(384, 384, kernel_size=(3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Conv(before, 448, kernel_size=1)
        self.branch3x3dbl_2 = _Conv(448, 384, kernel_size=3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Conv(384, 384, kernel_size=(3, 1), padding=(1, 0))
        self.branch_pool = _Conv(before, 192, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.pool_is_max else _average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class Inception(nn.Module):
    """The network as an extractor; see ``recipes.lab.evaluation.features.Extractor``."""

    name = "inception"
    knows_classes = False  # its classes are ImageNet's, in an order of their own

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, kernel_size=3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        self.Mixed_6a = _B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d = _C(128), _C(160), _C(160)
        self.Mixed_6e, self.Mixed_7a = _C(192), _D()
        self.Mixed_7b, self.Mixed_7c = _E(1280, False), _E(2048, True)
        self.fc = nn.Linear(2048, CLASSES)
        self.digest = ""

    def forward(self, images: Tensor) -> Features:
        """(n, 3, 299, 299), scaled as in ``__call__`` -> features."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6c(self.Mixed_6b(x))
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1)  # (n, 17, 17, 7)
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
        return Features(pool, spatial.flatten(1), pool @ self.fc.weight.T)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """(n, h, w, 1 or 3) uint8 -> 2048 pool features, 2023 spatial ones, 1008 logits."""
        device, parts = self.fc.weight.device, []
        for batch in images.split(32):
            x = batch.permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1).to(device)
            # TensorFloat-32 would let features depend on the device that looks.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                found = self.forward((tf1_resize(x, SIDE) - 128) / 128)
            parts.append(Features(*(z.double().cpu() for z in found)))
        return Features.concatenate(parts)


def tf1_resize(images: Tensor, side: int) -> Tensor:
    """TensorFlow 1's bilinear resize: corners at 0, no antialiasing.

    Args:
        images: (n, c, h, w).
        side: Of the result, in pixels.
    """
    for dim in (2, 3):
        old = images.shape[dim]
        place = torch.arange(side, device=images.device, dtype=torch.float32) * (old / side)
        low = place.floor().long()
        share = (place - low).view([-1 if d == dim else 1 for d in range(4)])
        high = (low + 1).clamp_max(old - 1)
        before, after = images.index_select(dim, low), images.index_select(dim, high)
        images = before + (after - before) * share
    return images


def load_inception(file: Path | None = None, check_hash: bool = True) -> Inception:
    """The network with the weights of a local file; nothing is ever downloaded.

    Args:
        file: None looks for ``FILE_NAME``, or torch-fidelity's, in torch's hub folder.
        check_hash: Whether the content must be the published one.

    Raises:
        UserError: The file is missing, is another one, or does not fit.
    """
    home = os.environ.get("TORCH_HOME", os.path.join("~", ".cache", "torch"))
    hub = Path(home).expanduser() / "hub" / "checkpoints"
    other = hub / _OTHER_NAME
    place = file or (other if other.is_file() else hub / FILE_NAME)
    if not place.is_file():
        raise UserError(
            f"Inception's weights are not at {place}; put {FILE_NAME} (SHA-256 begins with "
            f"{SHA256_PREFIX}) there or name it with --inception-weights: nothing is downloaded"
        )
    prefix = SHA256_PREFIX if check_hash else None
    return with_weights(Inception(), place, FILE_NAME, prefix, "fetch the file again")
