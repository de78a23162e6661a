"""Feed-forward networks of the backbone, all called as ``feedforward(x, grid)``."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.contract import nearest
from attnzoo.errors import InvalidValue
from attnzoo.layers.linear import xavier_linear
from attnzoo.ops.depthwise_conv import depthwise_conv


class FeedForward(nn.Module):
    """What a block does to each token, or to its surroundings, after the attention."""

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates per sample: every token meets every weight once."""
        weights = (p.numel() for name, p in self.named_parameters() if name.endswith("weight"))
        return sum(weights) * grid[0] * grid[1]


class MLP(FeedForward):
    """Two linear layers around a tanh-approximated GELU (DiT, arXiv 2212.09748)."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.expand = xavier_linear(dim, int(dim * ratio), bias=True)
        self.contract = xavier_linear(int(dim * ratio), dim, bias=True)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        return self.contract(F.gelu(self.expand(x), approximate="tanh"))


class MixFFN(FeedForward):
    """Sana's Mix-FFN (GLUMBConv, arXiv 2410.10629): a gated 3x3 depthwise inverted bottleneck."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.expand = xavier_linear(dim, 2 * hidden, bias=True)
        self.conv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.contract = xavier_linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(b, h * w, dim) -> (b, h * w, dim)."""
        hidden = F.silu(self.expand(x))
        hidden = depthwise_conv(hidden, grid, self.conv.weight, self.conv.bias)
        value, gate = hidden.chunk(2, dim=-1)
        return self.contract(value * F.silu(gate))


class SwiGLU(FeedForward):
    """DiG's gated linear unit (arXiv 2405.18428): no biases, hidden width a multiple of 256."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = 256 * math.ceil(int(dim * ratio * 2 / 3) / 256)
        self.expand = xavier_linear(dim, 2 * hidden, bias=False)
        self.contract = xavier_linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        gate, value = self.expand(x).chunk(2, dim=-1)
        return self.contract(F.silu(gate) * value)


FEEDFORWARDS: dict[str, type[FeedForward]] = {"mlp": MLP, "mix-ffn": MixFFN, "swiglu": SwiGLU}


def build_feedforward(kind: str, dim: int, ratio: float) -> FeedForward:
    """Builds one of ``FEEDFORWARDS``.

    Args:
        kind: "mlp", "mix-ffn" or "swiglu".
        dim: Width of the tokens.
        ratio: Hidden width over ``dim``; "swiglu" takes two thirds of it, as is its custom.

    Raises:
        InvalidValue: Unknown kind, or a ratio that leaves no hidden width.
    """
    if kind not in FEEDFORWARDS:
        raise InvalidValue(
            f"unknown feedforward {kind!r}{nearest(kind, FEEDFORWARDS)} "
            f"Choose one of {', '.join(FEEDFORWARDS)}"
        )
    if int(dim * ratio) < 1:
        raise InvalidValue(f"feedforward_ratio={ratio} leaves no hidden width of dim={dim}")
    return FEEDFORWARDS[kind](dim, ratio)
