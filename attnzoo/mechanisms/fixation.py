"""Linear attention with feature fixation (Linear Video Transformer, arXiv 2210.08164), for images.

Half of the channels of K and V come from the eight neighbors ("neighborhood association"). With
q = ReLU(Q) + 1 / sqrt(d_head) and k likewise, a gate g = sigmoid(W [q; k; V] + b), which all heads
share, scales the features: O = (g q) ((g k)^T V) / ((g q) sum_j (g k)_j^T + eps) per head.
Cost per sample: 4 d^2 n + 3 n d d_head + 2 n d d_head + n d; two gates cost the 3 twice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from attnzoo.contract import AttentionContext, heads_of_width
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.linear_attention import LinearAttention, LinearConfig
from attnzoo.layers.streaming import State
from attnzoo.ops.dispatch import is_bare, linear
from attnzoo.ops.fixation_core import fixation_core, fixed, unserved
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(LinearConfig):
    """Options of linear attention with feature fixation."""

    share_gate: bool = True  # one gate of queries and keys; the released settings have both
    shift: bool = True  # the neighbors' channels; the paper's ablation
    eps: float = 1e-6  # the released code


@register_attention("fixation")
class FixationAttention(LinearAttention):
    """ReLU linear attention with gated features and the neighbors' channels in keys and values."""

    Config = Config
    config: Config
    paper = "Linear Video Transformer, 2210.08164"
    plot_style = ("#7F7F7F", "v")
    tensors_crossed = 10.0  # shifted keys and values, the gate, gated queries and keys

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        head_dim = self.dim // self.num_heads
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=True)
        gates = 1 if config.share_gate else 2
        self.gate = xavier_linear(3 * head_dim, gates * head_dim, bias=True)
        self.proj = xavier_linear(self.dim, self.dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 64, as the vision transformers that the paper starts from."""
        return heads_of_width(dim, 64)

    def project(self, x: Tensor, grid: tuple[int, int]) -> Sequence[Tensor]:
        """The gated features of queries and keys, and the shifted values, (b, n, dim) each."""
        gate = functools.partial(linear, self.gate)
        return fixed(linear(self.qkv, x), gate, self.num_heads, grid, self.config.shift)

    def fused(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``LinearAttention.fused``."""
        weight, bias = self.gate.weight, self.gate.bias
        is_more = self.conv is not None or self.key_position is not None
        if is_more or not is_bare(self.gate) or unserved(x, weight):
            return super().fused(x, grid)
        options = self.num_heads, grid, self.config.shift, self.config.eps
        out = fixation_core(linear(self.qkv, x), weight, bias, *options, impl="triton")
        return self.finish(out, x)

    def query_kernel(self, query: Tensor) -> Tensor:
        """The features, which ``project`` makes: a gate sees query, key and value together."""
        return query

    def key_kernel(self, key: Tensor) -> Tensor:
        """Likewise."""
        return key

    def encode(self, x: Tensor, grid: tuple[int, int], span: slice) -> tuple[Tensor | None, State]:
        """See ``LinearAttention.encode``."""
        _, key, value = self._project_part(x, grid, span)
        return None, self.fold(self.keys(key, x[:, span], grid, span), value, grid, span)

    def decode(
        self, x: Tensor, grid: tuple[int, int], span: slice, cached: Tensor | None, state: State
    ) -> Tensor:
        """See ``LinearAttention.decode``."""
        query, _, _ = self._project_part(x, grid, span)
        queries = self.queries(query, x[:, span], grid, span)
        return self.finish(self.read(queries, state, x, grid, span), x[:, span])

    def _project_part(self, x: Tensor, grid: tuple[int, int], span: slice) -> Sequence[Tensor]:
        """``project`` of some rows, which look at one more above and below."""
        first = max(0, span.start - grid[1])
        near = x[:, first : span.stop + grid[1]]
        parts = self.project(near, (near.shape[1] // grid[1], grid[1]))
        return [z.narrow(1, span.start - first, span.stop - span.start) for z in parts]

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        n, parts = grid[0] * grid[1], super().macs_parts(grid)
        gates = n * self.num_heads * self.gate.weight.numel()
        return parts | {"projections": parts["projections"] + gates}
