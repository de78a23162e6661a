"""What MALA and RALA share: ELU features, rope in the numerator, a convolution of V, a gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from attnzoo.contract import AttentionContext, heads_of_width
from attnzoo.layers.depthwise_conv import DepthwiseConv
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.linear_attention import LinearAttention, LinearConfig
from attnzoo.ops.dispatch import linear
from attnzoo.ops.linear_core import elu_plus_one
from attnzoo.ops.rotary_core import WIDEST, rotary_core


@dataclass(frozen=True, kw_only=True)
class GatedEluConfig(LinearConfig):
    """Options of mechanisms with ELU features and a linear gate."""

    rope: bool = True  # MALA and RALA; rows sum to 1 without it only
    conv: Literal["3x3", "5x5", "none"] = "5x5"  # MALA and RALA


class GatedEluAttention(LinearAttention):
    """Linear attention of ELU(Q) + 1 and ELU(K) + 1, whose output a linear map of x multiplies.

    Sources: MALA (arXiv 2507.00698) and RALA (arXiv 2411.07635), whose blocks differ in what
    weighs queries and keys only.

    Attributes:
        is_weighed: Whether keys are weighed by the mean query; a class that says so has the
            equations of ``attnzoo.ops.rotary_core``.
    """

    is_weighed: bool
    gate: nn.Linear
    core = "rotary_core"
    joined = *LinearAttention.joined, "finish"

    def __init__(self, context: AttentionContext, config: GatedEluConfig) -> None:
        super().__init__(context, config)
        self.is_rotated = config.rope
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=True)
        self.gate = xavier_linear(self.dim, self.dim, bias=True)
        if config.conv != "none":
            self.conv = DepthwiseConv(self.dim, config.conv)
        self.proj = xavier_linear(self.dim, self.dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 32, as Sana's, which is the sources' order of width."""
        return heads_of_width(dim, 32)

    def query_kernel(self, query: Tensor) -> Tensor:
        """ELU(Q) + 1, (b, n, dim)."""
        return elu_plus_one(query)

    def key_kernel(self, key: Tensor) -> Tensor:
        """ELU(K) + 1, (b, n, dim)."""
        return elu_plus_one(key)

    def unserved_option(self) -> str | None:
        """See ``LinearAttention.unserved_option``."""
        if not hasattr(self, "is_weighed"):
            return f"features as {type(self).__name__} makes them"
        width = self.dim // self.num_heads
        return f"heads of width {width}" if width > WIDEST else None

    def fused(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``LinearAttention.fused``."""
        local = (None, None) if self.conv is None else self.conv.kernel
        if local is None or self.key_position is not None:
            return self.attend(x, grid)[0]
        options = self.num_heads, grid, self.is_rotated, self.is_weighed, self.config.eps
        out = rotary_core(
            linear(self.qkv, x), linear(self.gate, x), *local, *options, impl="triton"
        )
        return linear(self.proj, out)

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """See ``LinearAttention.finish``: the gate, which has no activation."""
        return linear(self.proj, out * linear(self.gate, x))

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        parts = super().macs_parts(grid)
        return parts | {"projections": 5 * self.dim**2 * grid[0] * grid[1]}
