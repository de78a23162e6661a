"""Linear attention with feature fixation (Linear Video Transformer, arXiv 2210.08164), for images.

Half of the channels of K and V come from the eight neighbors ("neighborhood association"). With
q = ReLU(Q) + 1 / sqrt(d_head) and k likewise, a gate g = sigmoid(W [q; k; V] + b), which all heads
share, scales the features: O = (g q) ((g k)^T V) / ((g q) sum_j (g k)_j^T + eps) per head.
Cost per sample: 4 d^2 n + 3 n d d_head + 2 n d d_head + n d; two gates cost the 3 twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.contract import AttentionContext, heads_of_width
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.linear_attention import LinearAttention, LinearConfig
from attnzoo.layers.streaming import State
from attnzoo.ops.precision import in_wide_range
from attnzoo.registry import register_attention

# Where each sixteenth of the channels comes from: rows down, columns to the right.
NEIGHBORS = ((1, 0), (-1, 0), (0, 1), (0, -1), (-1, -1), (1, 1), (-1, 1), (1, -1))


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
        query, key, value = self.qkv(x).chunk(3, -1)
        if self.config.shift:
            key, value = shifted(key, grid), shifted(value, grid)
        heads = (self.num_heads, self.dim // self.num_heads)
        query, key, by_head = (in_wide_range(z).unflatten(-1, heads) for z in (query, key, value))
        query, key = (F.relu(z) + heads[1] ** -0.5 for z in (query, key))
        gate = self.gate(torch.cat((query, key, by_head), -1).to(value.dtype)).sigmoid()
        first, last = (gate, gate) if self.config.share_gate else gate.chunk(2, -1)
        return (first * query).flatten(-2), (last * key).flatten(-2), value

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


def shifted(z: Tensor, grid: tuple[int, int]) -> Tensor:
    """Takes half of the channels from the neighbors, a sixteenth from each.

    Beyond the border the four straight neighbors are zero and the four diagonal ones the token
    itself, as in the released code.

    Args:
        z: (b, h * w, c).
        grid: (h, w).

    Returns:
        (b, h * w, c).
    """
    height, width = grid
    image = z.unflatten(1, grid)
    fold = z.shape[-1] // 16
    parts = []
    for own, (down, right) in zip(image.split(fold, -1), NEIGHBORS, strict=False) if fold else ():
        pad = (0, 0, max(-right, 0), max(right, 0), max(-down, 0), max(down, 0))
        rows = slice(max(down, 0), max(height + min(down, 0), 0))
        columns = slice(max(right, 0), max(width + min(right, 0), 0))
        near = F.pad(own[:, rows, columns], pad)
        if down and right:
            row = torch.arange(height, device=z.device)[:, None, None] + down
            column = torch.arange(width, device=z.device)[:, None] + right
            is_inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            near = torch.where(is_inside, near, own)
        parts.append(near)
    return torch.cat((*parts, image[..., 8 * fold :]), -1).flatten(1, 2)
