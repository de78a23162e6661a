"""Linear attention with feature fixation (Linear Video Transformer, arXiv 2210.08164), for images.

Half of the channels of K and V come from the eight neighbors ("neighborhood association"). With
q = ReLU(Q) + 1 / sqrt(d_head) and k likewise, a gate g = sigmoid(W [q; k; V] + b), which all heads
share, scales the features: O = (g q) ((g k)^T V) / ((g q) sum_j (g k)_j^T + eps) per head.
Cost per sample: 4 d^2 n + 3 n d d_head + 2 n d d_head + n d; two gates cost the 3 twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.contract import AttentionContext, heads_of_width
from attnzoo.layers.linear import linear, xavier_linear
from attnzoo.layers.linear_attention import LinearAttention, LinearConfig
from attnzoo.layers.streaming import State
from attnzoo.ops.dispatch import is_transformed
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
        qkv = linear(self.qkv, x).unflatten(-1, (3, -1)).movedim(-2, 0)  # (3, b, n, dim)
        if self.config.shift:
            qkv = shifted(qkv, grid, first=1)
        both, value = qkv.split([2, 1])
        value, heads = value.squeeze(0), (self.num_heads, self.dim // self.num_heads)
        features, by_head = (in_wide_range(z).unflatten(-1, heads) for z in (both, value))
        features = F.relu(features) + heads[1] ** -0.5  # of queries and keys together
        joined = torch.cat((*features.unbind(), by_head), -1).to(value.dtype)
        gate = linear(self.gate, joined).sigmoid()
        gates = 1 if self.config.share_gate else 2
        features = gate.unflatten(-1, (gates, -1)).movedim(-2, 0) * features
        return *features.flatten(-2).unbind(), value

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


def shifted(z: Tensor, grid: tuple[int, int], first: int = 0) -> Tensor:
    """Takes half of the channels from the neighbors, a sixteenth from each.

    Beyond the border the four straight neighbors are zero and the four diagonal ones the token
    itself, as in the released code.

    Args:
        z: (parts, ..., h * w, c).
        grid: (h, w).
        first: Parts before it stay as they are.

    Returns:
        (parts, ..., h * w, c), contiguous.
    """
    image = z.unflatten(-2, grid)
    has_gradient = torch.is_grad_enabled() and z.requires_grad and not is_transformed()
    out = _Moved.apply(image, first) if has_gradient else _moved(image, first)
    return out.flatten(-3, -2)


class _Moved(torch.autograd.Function):
    """``_moved``; autograd would fill a tensor with zeros for each of its slices."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, first: int) -> Tensor:
        ctx.first = first
        return _moved(image, first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _moved(grad, ctx.first, is_adjoint=True), None


def _moved(image: Tensor, first: int, is_adjoint: bool = False) -> Tensor:
    """What ``shifted`` makes of (parts, ..., h, w, c), or the adjoint, for its gradient."""
    out = image.clone(memory_format=torch.contiguous_format)
    fold = image.shape[-1] // 16
    for place, (down, right) in enumerate(NEIGHBORS if fold else ()):
        channels = slice(place * fold, (place + 1) * fold)
        new, old = out[first:, ..., channels], image[first:, ..., channels]
        if is_adjoint:
            down, right = -down, -right
        inside = _overlap(image.shape[-3], down), _overlap(image.shape[-2], right)
        near = old[..., inside[0][1], inside[1][1], :]
        if not (down and right):
            new[..., inside[0][0], inside[1][0], :] = near
            border = new.select(-3, -(down > 0)) if down else new.select(-2, -(right > 0))
            border.zero_()
        elif is_adjoint:
            new[..., inside[0][1], inside[1][1], :] = 0  # those that went elsewhere
            new[..., inside[0][0], inside[1][0], :] += near
        else:
            new[..., inside[0][0], inside[1][0], :] = near
    return out


def _overlap(size: int, step: int) -> tuple[slice, slice]:
    """Places with a neighbor ``step`` further on, and those neighbors."""
    before, after = max(-step, 0), max(step, 0)
    return slice(before, size - after), slice(after, size - before)
