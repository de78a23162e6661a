"""No attention at all: a gated depthwise convolution (MambaOut, arXiv 2405.07992), as a control.

O = (GELU(X W^G) * DWConv(X W^V)) W^O with a K x K convolution of e d channels. What a mechanism
adds to it is what seeing farther is worth. Cost per sample: 3 e d^2 n + K^2 e d n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from attnzoo.contract import Attention, AttentionConfig, AttentionContext
from attnzoo.errors import InvalidValue
from attnzoo.layers.linear import xavier_linear
from attnzoo.ops.depthwise_conv import SERVED, depthwise_conv_macs, gated_depthwise_conv
from attnzoo.ops.dispatch import linear
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    """Options of the gated convolution."""

    kernel_size: int = 7  # K; MambaOut
    # e: 4/3 makes the projections 4 d^2, as every attention's are. MambaOut has 8/3, and no
    # feed-forward beside it.
    expansion: float = 4 / 3
    impl: Literal["auto", "reference", "torch", "triton"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "kernel_size")
        if self.kernel_size % 2 == 0:
            raise InvalidValue(
                f"kernel_size={self.kernel_size} has no middle; choose {self.kernel_size - 1} or "
                f"{self.kernel_size + 1}"
            )
        if self.expansion <= 0:
            raise InvalidValue(f"expansion must be positive, got {self.expansion}")
        if self.impl == "triton" and self.kernel_size not in SERVED:
            raise InvalidValue(
                f"impl='triton' does not serve kernel_size={self.kernel_size}; choose one of "
                f"{SERVED}, or set impl='auto'"
            )


@register_attention("conv")
class GatedConvolution(Attention):
    """No mixing but a gated depthwise convolution: the control."""

    Config = Config
    config: Config
    paper = "MambaOut, 2405.07992"
    complexity = "O(n kernel² d)"
    plot_style = ("#888888", "d")

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        # Whole vectors of eight, which products and the convolution take best.
        hidden = 8 * max(1, round(config.expansion * self.dim / 8))
        self.gate_value = xavier_linear(self.dim, 2 * hidden, bias=True)
        side = config.kernel_size
        self.conv = nn.Conv2d(hidden, hidden, side, padding=side // 2, groups=hidden)
        self.proj = xavier_linear(hidden, self.dim, bias=True)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        self.check_tokens(x, grid)
        both, weight, bias = linear(self.gate_value, x), self.conv.weight, self.conv.bias
        out = gated_depthwise_conv(both, grid, weight, bias, impl=self.config.impl)
        return linear(self.proj, out)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        n, hidden = grid[0] * grid[1], self.conv.out_channels
        return {
            "projections": 3 * self.dim * hidden * n,
            "conv": depthwise_conv_macs(self.conv.weight, grid),
        }
