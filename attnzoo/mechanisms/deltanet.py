"""Gated DeltaNet (arXiv 2412.06464) over an image, in one or several directions.

Linear attention whose state forgets, and whose keys replace what it holds under them. Per head
and direction S_t = a_t S_(t-1) + b_t k_t (v_t - a_t S_(t-1)^T k_t)^T, o_t = q_t S_t / sqrt(d_k),
a_t = exp(-A softplus(x_t W_a + c)), b_t = sigmoid(x_t W_b); [q, k, v] = SiLU(conv(x W)), q and k
of norm 1; then out = (RMSNorm(mean of o) * SiLU(x W_g)) W_o. Cost per sample, conv 3x3:
(5 d^2 + 27 d) n + directions * (2 d heads n + 3 n d d_head).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.contract import Attention, AttentionContext, heads_of_width
from attnzoo.layers.depthwise_conv import DepthwiseConv
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.streaming import StreamConfig, stream_scans
from attnzoo.ops.delta_rule import (
    gated_delta_block,
    gated_delta_rule,
    gated_delta_rule_macs,
    unserved_heads,
)
from attnzoo.ops.dispatch import Impl, choose
from attnzoo.ops.gated_norm import gated_norm
from attnzoo.ops.gated_scan import DIRECTIONS, Direction, is_counted, mean_of_scans, scan
from attnzoo.ops.precision import in_float32, in_wide_range, operand_dtype
from attnzoo.registry import register_attention

_TAPS = 4  # of Gated DeltaNet's convolution along the scan
_EPS = 1e-5  # of the norm


@dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    """Options of Gated DeltaNet."""

    # The delta rule is causal; an image has no first pixel. Several directions are averaged.
    direction: Literal[
        "forward", "backward", "both", "columns-forward", "columns-backward", "four"
    ] = "both"
    # Gated DeltaNet's own, "causal", has 4 taps along the scan and sees no row above or below.
    conv: Literal["3x3", "causal", "none"] = "3x3"
    impl: Literal["auto", "reference", "torch", "triton", "fla"] = "auto"


@register_attention("deltanet")
class DeltaNet(Attention):
    """Linear attention whose state forgets and is corrected (gated delta rule), in any directions.

    Directions share all but their decays and strengths.
    """

    Config = Config
    config: Config
    paper = "Gated DeltaNet, 2412.06464"
    complexity = "O(n d d_head)"
    plot_style = ("#9467BD", "P")
    tensors_crossed = 7.0  # an output gate beside queries, keys and values

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        dim = self.dim
        self.directions = DIRECTIONS[config.direction]
        scans = len(self.directions), self.num_heads
        self.qkv = xavier_linear(dim, 3 * dim, bias=False)
        self.conv = DepthwiseConv(3 * dim, "3x3") if config.conv == "3x3" else None
        self.taps = None
        if config.conv == "causal":
            self.taps = nn.Conv1d(3 * dim, 3 * dim, _TAPS, groups=3 * dim, bias=False)
        self.gates = xavier_linear(dim, 2 * math.prod(scans), bias=False)
        # As Mamba-2: rates between 1 and 16, steps between 0.001 and 0.1.
        self.log_rate = nn.Parameter(torch.empty(scans).uniform_(1, 16).log())
        step = torch.exp(torch.empty(scans).uniform_(math.log(1e-3), math.log(0.1)))
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus inverted
        self.output_gate = xavier_linear(dim, dim, bias=False)
        self.norm = nn.RMSNorm(dim // self.num_heads, eps=_EPS)
        self.proj = xavier_linear(dim, dim, bias=False)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 64 channels: the state's size is that of the zoo's other scans."""
        return heads_of_width(dim, 64)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        self.check_tokens(x, grid)
        if (block := self.config.block(self.training)) is not None:
            steps = self._advance, self._finish, self._prepare
            return stream_scans(x, grid, block, self.directions, *steps)
        if self._takes_kernels(x):
            return self._finish(x, self._by_kernels(x, grid))
        return self._finish(x, self._scans(x, grid, self.config.impl))

    def _takes_kernels(self, x: Tensor) -> bool:
        if is_counted():
            return False
        width = self.dim // self.num_heads
        limits = functools.partial(unserved_heads, x.shape[1] * self.num_heads, width, width)
        impl, dtype = self.config.impl, operand_dtype(x)
        return choose("gated_delta_rule", impl, x, dtype, limits) == "triton"

    def _by_kernels(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``_scans`` from the projections as they are, in their dtype."""
        from attnzoo.ops.delta_rule.triton import delta_scans
        from attnzoo.ops.delta_rule.triton_gates import delta_gates

        decay, strength = delta_gates(self.gates(x), self.log_rate, self.step_bias)
        qkv = self.qkv(x) if self.conv is None else self.conv(self.qkv(x), grid)
        heads, scale = self.num_heads, (self.dim // self.num_heads) ** -0.5
        if self.taps is None:
            qkv = in_wide_range(qkv)
            of_layer = heads, grid, self.directions, scale
            return delta_scans(qkv, None, None, decay, strength, *of_layer)
        gathered = []  # of every direction in its order, as images of one column
        for index, direction in enumerate(self.directions):
            of_scan = [
                scan(z[:, :, index : index + 1], grid, direction) for z in (decay, strength)
            ]
            gathered.append([self._convolved(scan(qkv, grid, direction)), *of_scan])
        qkv, decay, strength = (torch.cat(z) for z in zip(*gathered, strict=True))
        of_column = heads, (x.shape[1], 1), ("forward",), scale
        out = delta_scans(in_wide_range(qkv), None, None, decay, strength, *of_column)
        return mean_of_scans(out, grid, self.directions)

    def _scans(
        self, x: Tensor, grid: tuple[int, int], impl: Impl, value: Tensor | None = None
    ) -> Tensor:
        """Mean of the scans' outputs, (b, n, h, dv), in float32 or better; of other values."""
        decay, strength = _gates(self.gates(x), self.log_rate, self.step_bias)
        qkv, of_conv = self.qkv(x), "reference" if impl == "reference" else "auto"
        if self.conv is not None:
            qkv = self.conv(qkv, grid, impl=of_conv)
        gathered = []
        for index, direction in enumerate(self.directions):
            parts = self._convolved(scan(qkv, grid, direction))
            query, key, own = _operands(parts, self.num_heads)
            values = own if value is None else scan(value, grid, direction)
            of_scan = [scan(z[:, :, index], grid, direction) for z in (decay, strength)]
            gathered.append([query, key, values, *of_scan])
        operands = [torch.cat(z).transpose(1, 2) for z in zip(*gathered, strict=True)]
        if impl == "fla":  # its kernels sum half precision in float32 themselves
            operands[:3] = [z.to(qkv.dtype) for z in operands[:3]]
        out = gated_delta_rule(*operands, impl=impl).to(decay.dtype)
        return mean_of_scans(out.transpose(1, 2), grid, self.directions)

    def _convolved(self, qkv: Tensor, before: Tensor | None = None) -> Tensor:
        """The convolution along a scan, if there is one, with the tokens ``before`` or zeros."""
        if self.taps is None:
            return qkv
        rows = F.pad(qkv, (0, 0, _TAPS - 1, 0)) if before is None else torch.cat([before, qkv], 1)
        return self.taps(rows.transpose(1, 2)).transpose(1, 2)

    def _prepare(
        self, image: Tensor, axis: int, start: int, size: int, direction: Direction
    ) -> Tensor:
        """Projections and gates of a block's rows or columns, (b, m, 3 d + 2 h)."""
        here = image.narrow(axis, start, size)
        decay, strength = _gates(self.gates(here.flatten(1, 2)), self.log_rate, self.step_bias)
        first = max(0, start - (self.conv is not None))
        last = min(image.shape[axis], start + size + (self.conv is not None))
        near = image.narrow(axis, first, last - first)
        qkv = self.qkv(near.flatten(1, 2))
        if self.conv is not None:
            qkv = self.conv(qkv, near.shape[1:3])
        qkv = qkv.unflatten(1, near.shape[1:3]).narrow(axis, start - first, size).flatten(1, 2)
        index = self.directions.index(direction)
        return torch.cat([qkv.to(decay.dtype), decay[:, :, index], strength[:, :, index]], -1)

    def _advance(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """A scan's outputs of what ``_prepare`` gave, (b, m, h, dv), and what it leaves behind."""
        qkv, *gates = x.split([3 * self.dim, self.num_heads, self.num_heads], -1)
        before, state = (None, None) if state is None else state
        dtype = self.norm.weight.dtype
        convolved = self._convolved(qkv.to(dtype), before).to(x.dtype)
        operands = (*_operands(convolved, self.num_heads), *gates)
        out, state = gated_delta_block(*(z.transpose(1, 2) for z in operands), state=state)
        last = qkv.to(dtype) if before is None else torch.cat([before, qkv.to(dtype)], 1)
        last = F.pad(last, (0, 0, max(0, _TAPS - 1 - last.shape[1]), 0))[:, 1 - _TAPS :]
        return out.transpose(1, 2), (last, state)

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Tokens and their mean of the scans, (b, n, h, dv) -> (b, n, dim)."""
        gate = self.output_gate(x).unflatten(-1, (self.num_heads, -1))
        impl = "auto" if self.config.impl == "fla" else self.config.impl
        return self.proj(gated_norm(mixed, gate, self.norm.weight, _EPS, impl=impl))

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``: before the norm, mean over directions; may be negative.

        The corrections belong to it: a token's weight already lacks what later keys replaced.
        """
        self.check_tokens(x, grid)
        # The rule is linear in the values: those of the identity give its matrix.
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        values = identity[None, :, None].expand(x.shape[0], -1, self.num_heads, -1)
        weights = self._scans(x, grid, "reference", values)
        return rearrange(weights, "b n h m -> b h n m").to(x.dtype)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``; the core is counted as the recurrence does it."""
        n, scans, head_dim = grid[0] * grid[1], len(self.directions), self.dim // self.num_heads
        core = gated_delta_rule_macs(n, head_dim, head_dim)
        along = 0 if self.taps is None else scans * n * self.taps.weight.numel()
        return {
            "projections": n * (5 * self.dim**2 + self.gates.weight.numel()),
            "core": scans * self.num_heads * core,
            "conv": along if self.conv is None else self.conv.macs(grid),
        }


@in_float32
def _gates(gates: Tensor, log_rate: Tensor, step_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Log decays and strengths, both (b, n, directions, h), in float32 or better."""
    step, strength = gates.unflatten(-1, (*log_rate.shape[:1], 2, -1)).unbind(-2)
    return -log_rate.exp() * F.softplus(step + step_bias), strength.sigmoid()


@in_float32
def _operands(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, (b, n, h, d), in float32 or better."""
    query, key, value = rearrange(F.silu(qkv), "b n (z h d) -> z b n h d", z=3, h=num_heads)
    return _unit(query) * query.shape[-1] ** -0.5, _unit(key), value


def _unit(z: Tensor) -> Tensor:
    # The 1e-6 is under the root, where a token of zeros has a gradient.
    return z * torch.rsqrt(z.square().sum(-1, keepdim=True) + 1e-6)
