"""Agent attention (arXiv 2312.08874), the attention mediators of diffusion (arXiv 2408.05710).

A few agents A, the queries averaged over the cells of a sqrt(m) x sqrt(m) grid, first gather the
values and then hand them to the queries: V_A = softmax(A K^T / sqrt(d_head) + B_1) V and
O = softmax(Q A^T / sqrt(d_head) + B_2) V_A + DWC(V). The number of agents may change from call to
call, so that it can follow the denoising step: see ``agents``.

Cost per sample for m agents: 4 d^2 n + 4 n m d + 9 d n.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.contract import (
    Attention,
    AttentionContext,
    check_option,
    heads_of_width,
    removed_in,
)
from attnzoo.errors import InvalidValue
from attnzoo.layers.depthwise_conv import DepthwiseConv
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.linear_attention import linear_parts
from attnzoo.layers.streaming import (
    State,
    StreamConfig,
    convolve,
    first_pass,
    second_pass,
    softmax_fold,
    softmax_merge,
    spans_of,
)
from attnzoo.ops.agent_core import agent_core
from attnzoo.ops.depthwise_conv import to_image, to_tokens
from attnzoo.ops.dispatch import Impl, linear
from attnzoo.ops.precision import in_float32
from attnzoo.ops.softmax import (
    SoftmaxImpl,
    fused_attention,
    is_steep,
    reference,
    softmax_attention,
    softmax_macs,
)
from attnzoo.registry import register_attention


def _check_square(n_agents: int) -> None:
    check_option("n_agents", n_agents, int)
    side = math.isqrt(max(n_agents, 1))
    if n_agents < 1 or side**2 != n_agents:
        raise InvalidValue(
            f"n_agents={n_agents} must be a square number; choose {side**2} or {(side + 1) ** 2}"
        )


@dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    """Options of agent attention."""

    n_agents: int = 64  # the mediators' code; its examples train 4, 16 and 64
    # "learned": the sources' B_1, B_2, which fix the grid and the number of agents.
    bias: Literal["none", "learned"] = "none"
    bias_grid: tuple[int, ...] | None = None  # (height, width) that "learned" is made for
    conv: bool = True  # the 3x3 depthwise convolution of V
    impl: SoftmaxImpl = "auto"

    removed = removed_in("0.2.0", qkv_bias=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_square(self.n_agents)
        if self.bias == "none":
            if self.bias_grid is not None:
                raise InvalidValue(f"bias_grid={self.bias_grid} has no use; set bias='learned'")
            return
        side = math.isqrt(self.n_agents)
        grid = self.bias_grid
        if grid is None or len(grid) != 2 or min(grid) < side:
            raise InvalidValue(
                f"bias='learned' with n_agents={self.n_agents} needs the token grid, at least "
                f"{side}x{side}: set bias_grid=(height, width), got {grid}"
            )
        if self.impl in ("flash", "xformers"):
            raise InvalidValue(
                f"impl={self.impl!r} takes no bias; set impl='torch' or bias='none'"
            )


@register_attention("agent")
class AgentAttention(Attention):
    """Softmax attention through a few agents; their number can follow the denoising step.

    Attributes:
        n_agents: Agents of the next call; ``set_agents`` changes it.
    """

    Config = Config
    config: Config
    paper = "Agent attention, 2312.08874"
    complexity = "O(n agents d)"
    plot_style = ("#332288", "X")

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.n_agents = config.n_agents
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=True)  # the mediators' SiT
        self.proj = xavier_linear(self.dim, self.dim, bias=True)
        self.conv = DepthwiseConv(self.dim, "3x3") if config.conv else None
        if config.bias_grid is not None:
            height, width = config.bias_grid
            sizes = {"map": (7, 7), "row": (height, 1), "column": (1, width)}
            for stage in ("gather", "hand_out"):
                for part, size in sizes.items():
                    bias = torch.empty(self.num_heads, config.n_agents, *size)
                    nn.init.trunc_normal_(bias, std=0.02)
                    self.register_parameter(f"{stage}_{part}", nn.Parameter(bias))

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 64, as every DiT has them."""
        return heads_of_width(dim, 64)

    def set_agents(self, n_agents: int) -> None:
        """Sets the number of agents of the calls to come; ``config`` keeps the first one.

        Raises:
            InvalidType: It is no integer.
            InvalidValue: It is not a square, or learned biases fix another one.
        """
        _check_square(n_agents)
        if self.config.bias == "learned" and n_agents != self.config.n_agents:
            raise InvalidValue(
                f"bias='learned' fixes n_agents={self.config.n_agents}, got {n_agents}; "
                f"build the layer with bias='none' to change the number of agents"
            )
        self.n_agents = n_agents

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        if (block := self.config.block(self.training)) is not None:
            return self._stream(x, grid, block)
        gather, hand_out = self._biases(grid)
        if gather is None and self.config.impl in ("auto", "reference", "torch"):
            self.check_tokens(x, grid)
            local = (None, None)
            if self.conv is not None:
                local = self.conv.branches[0].weight, self.conv.branches[0].bias
            sizes = self.num_heads, grid, self._pooled_grid(grid)
            out = agent_core(linear(self.qkv, x), *local, *sizes, impl=self.config.impl)
            return linear(self.proj, out)
        query, agent, key, value, value_tokens = self._operands(x, grid)
        if self.config.impl == "reference":
            out = _reference(query, agent, key, value, gather, hand_out)
        else:
            gathered = self._attend(agent, key, value, gather)
            out = self._attend(query, agent, gathered, hand_out)
        out = rearrange(out, "b h n d -> b n (h d)")
        if self.conv is not None:
            out = out + self.conv(value_tokens, grid, impl=self._conv_impl).to(out.dtype)
        return linear(self.proj, out)

    def _stream(self, x: Tensor, grid: tuple[int, int], block: int) -> Tensor:
        self.check_tokens(x, grid)
        halo = 0 if self.conv is None else self.conv.reach
        spans = spans_of(grid, block, max(1, halo))
        gather, hand_out = self._biases(grid)
        # The mean of the queries is the query of the mean.
        pooled = to_tokens(F.adaptive_avg_pool2d(to_image(x, grid), self._pooled_grid(grid)))
        agent = self._heads(linear_parts(self.qkv, pooled, self.dim, slice(1))[0])

        def encode(span: slice) -> tuple[Tensor | None, State]:
            key, value = linear_parts(self.qkv, x[:, span], self.dim, slice(1, None))
            bias = None if gather is None else gather[..., span]
            state = softmax_fold(agent, self._heads(key), self._heads(value), bias)
            return (None if self.conv is None else value), state

        def decode(span: slice) -> Tensor:
            [query] = linear_parts(self.qkv, x[:, span], self.dim, slice(1))
            bias = None if hand_out is None else hand_out[:, span]
            out = self._attend(self._heads(query), agent, gathered, bias)
            out = rearrange(out, "b h n d -> b n (h d)")
            if self.conv is not None and cached is not None:
                local = convolve(cached, span, grid[1], self.conv, halo, self._conv_impl)
                out = out + local.to(out.dtype)
            return linear(self.proj, out)

        cached, [(_, total, weighted)] = first_pass(x, spans, encode, softmax_merge)
        gathered = (weighted / total).to(agent.dtype)
        return second_pass(cached, spans, decode)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return softmax_attention(query, key, value, impl=self.config.impl)
        if is_steep(query, key):
            return reference.softmax_attention(query, key, value, bias)
        return fused_attention(query, key, value, bias.to(query.dtype))

    @property
    def _conv_impl(self) -> Impl:
        # Libraries of attention have no convolution.
        impl = self.config.impl
        return impl if impl in ("reference", "torch") else "auto"

    def _pooled_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        side = math.isqrt(self.n_agents)
        return min(side, grid[0]), min(side, grid[1])

    def _operands(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """Q, A, K, V per head, and V as tokens."""
        self.check_tokens(x, grid)
        query, key, value = linear(self.qkv, x).chunk(3, dim=-1)
        agent = to_tokens(F.adaptive_avg_pool2d(to_image(query, grid), self._pooled_grid(grid)))
        return *map(self._heads, (query, agent, key, value)), value

    def _heads(self, z: Tensor) -> Tensor:
        return rearrange(z, "b n (h d) -> b h n d", h=self.num_heads)

    def _biases(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """B_1, (heads, m, n), and B_2, (heads, n, m), or None."""
        if self.config.bias == "none":
            return None, None
        if tuple(grid) != self.config.bias_grid:
            raise InvalidValue(
                f"bias='learned' was made for bias_grid={self.config.bias_grid}, got a grid of "
                f"{grid}; build the layer with that bias_grid, or with bias='none'"
            )
        gather, hand_out = (
            F.interpolate(getattr(self, f"{stage}_map"), size=grid, mode="bilinear")
            + getattr(self, f"{stage}_row")
            + getattr(self, f"{stage}_column")
            for stage in ("gather", "hand_out")
        )
        return gather.flatten(2), hand_out.flatten(2).transpose(1, 2)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``: the product of both stages' maps."""
        query, agent, key, _, _ = self._operands(x, grid)
        return _map(query, agent, key, *self._biases(grid))

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``; with the number of agents of the next call."""
        n, n_agents = grid[0] * grid[1], math.prod(self._pooled_grid(grid))
        return {
            "projections": 4 * self.dim**2 * n,
            "core": 2 * softmax_macs(n, n_agents, self.dim, self.dim),
            "conv": self.conv.macs(grid) if self.conv is not None else 0,
        }


@in_float32
def _reference(
    query: Tensor,
    agent: Tensor,
    key: Tensor,
    value: Tensor,
    gather: Tensor | None,
    hand_out: Tensor | None,
) -> Tensor:
    """Reference of the two stages that materializes the n x n map."""
    return _map(query, agent, key, gather, hand_out) @ value


@in_float32
def _map(
    query: Tensor, agent: Tensor, key: Tensor, gather: Tensor | None, hand_out: Tensor | None
) -> Tensor:
    weights = reference.softmax_map(agent, key, gather)
    return reference.softmax_map(query, agent, hand_out) @ weights


@contextmanager
def agents(model: nn.Module, n_agents: int) -> Iterator[None]:
    """Runs every agent attention of ``model`` with ``n_agents`` agents inside a ``with`` block.

    A sampler that spends more agents on some steps than on others wraps each call of the model.
    Weights do not depend on the number, so that it costs nothing to change.

    Raises:
        InvalidType: ``n_agents`` is no integer.
        InvalidValue: ``model`` has no agent attention, or a layer cannot take the number.
    """
    layers = [module for module in model.modules() if isinstance(module, AgentAttention)]
    if not layers:
        raise InvalidValue(
            f"{type(model).__name__} has no agent attention; build it with attn='agent'"
        )
    before = [layer.n_agents for layer in layers]
    try:
        for layer in layers:
            layer.set_agents(n_agents)
        yield
    finally:
        for layer, number in zip(layers, before, strict=True):
            layer.n_agents = number
