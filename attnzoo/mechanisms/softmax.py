"""Multi-head softmax attention, as in DiT (arXiv 2212.09748).

O = softmax(Q K^T / sqrt(d_head)) V per head, times sigmoid(X W^G) if there is a gate (Gated
attention, arXiv 2505.06708). Cost per sample: 4 d^2 n + 2 n^2 d; a gate adds d^2 n, or h d n.
``conv`` adds DWC(V) before the gate: the control for linear mechanisms that have one; "acnet"
adds 15 d n, "3x3" 9 d n, "5x5" 25 d n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from einops import rearrange
from torch import Tensor, nn

from attnzoo.contract import Attention, AttentionConfig, AttentionContext, heads_of_width
from attnzoo.layers.depthwise_conv import ConvKind, DepthwiseConv, fuse_conv
from attnzoo.layers.linear import query_key_value, xavier_linear
from attnzoo.ops.dispatch import Impl, linear
from attnzoo.ops.softmax import SoftmaxImpl, softmax_attention, softmax_macs
from attnzoo.ops.softmax.reference import softmax_map
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    """Options of softmax attention."""

    qkv_bias: bool = True  # DiT
    qk_norm: bool = False  # RMSNorm of each head's queries and keys; steadies large models
    # Sigmoid gate of the output before the last projection, one number a head or a channel: off
    # in DiT; "element" is the best of 2505.06708, and "head" nearly as good for no parameters.
    gate: Literal["none", "head", "element"] = "none"
    conv: ConvKind = "none"  # of V, as DyDiLA ("acnet") and MHLA ("3x3") have it; off in DiT
    impl: SoftmaxImpl = "auto"


@register_attention("softmax")
class SoftmaxAttention(Attention):
    """Multi-head softmax attention."""

    Config = Config
    config: Config
    paper = "DiT, 2212.09748"
    complexity = "O(n² d)"
    plot_style = ("#000000", "o")

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=config.qkv_bias)
        head_dim = self.dim // self.num_heads
        self.query_norm = nn.RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        widths = {"none": 0, "head": self.num_heads, "element": self.dim}
        self.gate: nn.Linear | None = None
        if width := widths[config.gate]:
            self.gate = xavier_linear(self.dim, width, bias=False)  # the paper's code
        self.conv = None if config.conv == "none" else DepthwiseConv(self.dim, config.conv)
        self.proj = xavier_linear(self.dim, self.dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 64, as every DiT has them."""
        return heads_of_width(dim, 64)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        query, key, value = self._query_key_value(x, grid)
        out = softmax_attention(query, key, value, impl=self.config.impl)
        if self.conv is not None:
            # Libraries of attention have no convolution.
            chosen = self.config.impl
            impl: Impl = chosen if chosen in ("reference", "torch") else "auto"
            tokens, added = (rearrange(z, "b h n d -> b n (h d)") for z in (value, out))
            out = self.conv(tokens, grid, added, impl=impl)
            out = rearrange(out, "b n (h d) -> b h n d", h=self.num_heads)
        if self.gate is not None:
            gate = rearrange(self.gate(x), "b n (h d) -> b h n d", h=self.num_heads)
            out = out * gate.sigmoid()
        return linear(self.proj, rearrange(out, "b h n d -> b n (h d)"))

    def _query_key_value(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        self.check_tokens(x, grid)
        query, key, value = query_key_value(self.qkv, x, self.num_heads)
        return self.query_norm(query), self.key_norm(key), value

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``; a gate and a convolution of V come after the map."""
        query, key, _ = self._query_key_value(x, grid)
        return softmax_map(query, key)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        n = grid[0] * grid[1]
        gate = 0 if self.gate is None else self.gate.weight.numel()
        return {
            "projections": (4 * self.dim**2 + gate) * n,
            "core": softmax_macs(n, n, self.dim, self.dim),
            "conv": 0 if self.conv is None else self.conv.macs(grid),
        }

    def fuse(self) -> dict[str, Any]:
        """See ``Attention.fuse``: the convolution's branches become one kernel."""
        return fuse_conv(self)
