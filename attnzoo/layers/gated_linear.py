"""The gated linear attention layer of GLA (arXiv 2312.06635), scanning an image in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.contract import LEAST_DIVISOR
from attnzoo.errors import InvalidValue
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.streaming import StreamConfig, stream_scans
from attnzoo.ops.dispatch import Impl, has_numbers_elsewhere, is_bare
from attnzoo.ops.gated_norm import gated_norm
from attnzoo.ops.gated_scan import (
    Direction,
    gated_linear_attention,
    gated_linear_attention_macs,
    gated_linear_block,
    mean_of_scans,
    mean_of_scans_by_kernels,
    scan,
    takes_kernels,
    tokens_by_kernels,
)
from attnzoo.ops.precision import in_float32, operand_dtype

GATE_RANK = 16  # of the forget gate's projection; GLA and DiG


@dataclass(frozen=True, kw_only=True)
class GatedLinearConfig(StreamConfig):
    """Options that every mechanism with this layer has; defaults are those of GLA's library."""

    expand_k: float = 0.5  # width of queries and keys over dim
    expand_v: float = 1.0  # width of values and output gate over dim
    gate_normalizer: float = 16.0  # divides the log gate: a larger one remembers longer
    impl: Literal["auto", "reference", "torch", "triton", "fla"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(LEAST_DIVISOR, "gate_normalizer")
        for name in ("expand_k", "expand_v"):
            if getattr(self, name) <= 0:
                raise InvalidValue(f"{name} must be positive, got {getattr(self, name)}")


class GatedLinear(nn.Module):
    """Projections, forget gate, scans, and the gated norm of their mean.

    All directions share the projections, the gates and the norm, and run as one batch, or by
    kernels that read the tokens once for both directions of an order.

    Args:
        dim: Width of the tokens.
        num_heads: Number of heads.
        config: The options.
        norm_eps: Of the RMSNorm of each head's output.

    Raises:
        InvalidValue: The heads do not divide the expanded widths.
    """

    def __init__(
        self, dim: int, num_heads: int, config: GatedLinearConfig, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.config = config
        self.norm_eps = norm_eps
        key_dim = _expand(dim, "expand_k", config.expand_k, num_heads)
        value_dim = _expand(dim, "expand_v", config.expand_v, num_heads)
        self.head_dims = key_dim // num_heads, value_dim // num_heads
        self.query = _linear(dim, key_dim)
        self.key = _linear(dim, key_dim)
        self.value = _linear(dim, value_dim)
        self.forget_gate = nn.Sequential(
            _linear(dim, GATE_RANK), _linear(GATE_RANK, key_dim, bias=True)
        )
        self.output_gate = _linear(dim, value_dim)
        self.norm = nn.RMSNorm(value_dim // num_heads, eps=norm_eps)
        self.proj = _linear(value_dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int], directions: Sequence[Direction]) -> Tensor:
        """(b, height * width, dim) -> (b, height * width, dim)."""
        if (block := self.config.block(self.training)) is not None:
            return stream_scans(x, grid, block, directions, self._advance, self._finish)
        if self._takes_kernels(x):
            return self._by_kernels(x, grid, directions)
        mixed = self._scans(x, self._heads(self.value(x)), grid, directions)
        return self._finish(x, mixed)

    def _advance(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """A scan's outputs of tokens in its order, (b, n, h, dv), and the state that is left."""
        value, config = self._heads(self.value(x)), self.config
        operands = _operands(*self._gate_query_key(x), value, config.gate_normalizer)
        by_head = (z.transpose(1, 2) for z in operands)
        out, state = gated_linear_block(*by_head, state=state, impl=config.impl)
        return out.transpose(1, 2), state

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Tokens and their mean of the scans, (b, n, h, dv) -> (b, n, dim)."""
        return self._gated(self._heads(self.output_gate(x)), mixed)

    def _gated(self, gate: Tensor, mixed: Tensor) -> Tensor:
        impl = "auto" if self.config.impl == "fla" else self.config.impl
        return self.proj(gated_norm(mixed, gate, self.norm.weight, self.norm_eps, impl=impl))

    def _takes_kernels(self, x: Tensor) -> bool:
        """Whether kernels run, which read rows with any spacing.

        So one product projects; a CPU pays for the spacing more than for products.
        """
        options = *self.head_dims, x.shape[1] * self.num_heads, self.config.impl
        return takes_kernels(x, operand_dtype(x), *options)

    def _by_kernels(
        self, x: Tensor, grid: tuple[int, int], directions: Sequence[Direction]
    ) -> Tensor:
        normalizer, impl = self.config.gate_normalizer, self.config.impl
        layers: list[Any] = [self.query, self.key, self.value, self.output_gate, *self.forget_gate]
        # Else an adapter or a hook is there; a counter is to see the product alone.
        are_bare = all(is_bare(layer, of_all=False) for layer in layers)
        if not are_bare or any(has_numbers_elsewhere(layer.weight) for layer in layers):
            logit, query, key = self._gate_query_key(x)
            value = self._heads(self.value(x))
            mixed = mean_of_scans_by_kernels(
                query, key, value, logit, normalizer, grid, directions, impl
            )
            assert mixed is not None
            return self._finish(x, mixed)
        *joined, raised = layers
        packed = F.linear(x, torch.cat([layer.weight for layer in joined]))
        if packed.dtype == torch.float16:  # which overflows
            packed = packed.float()
        out = tokens_by_kernels(
            packed, raised.weight, raised.bias, self.norm.weight, self.num_heads, self.norm_eps,
            normalizer, grid, directions,
        )  # fmt: skip
        return self.proj(out.to(operand_dtype(x)))

    def attention_map(
        self, x: Tensor, grid: tuple[int, int], directions: Sequence[Direction]
    ) -> Tensor:
        """q_i diag(decay from j to i) k_j, mean over the directions: (b, heads, n, n)."""
        # The scan is linear in the values: those of the identity give its matrix.
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        values = identity[None, :, None].expand(x.shape[0], -1, self.num_heads, -1)
        weights = self._scans(x, values, grid, directions, impl="reference")
        return rearrange(weights, "b n h m -> b h n m").to(x.dtype)

    def _scans(
        self,
        x: Tensor,
        value: Tensor,
        grid: tuple[int, int],
        directions: Sequence[Direction],
        impl: Impl | None = None,
    ) -> Tensor:
        """Mean of the scans' outputs, (b, n, h, dv), in float32 or better."""
        impl, normalizer = impl or self.config.impl, self.config.gate_normalizer
        gate_logit, query, key = self._gate_query_key(x)
        return _mean_of_scans(
            # In half precision a slow gate would round to none and a long sum overflow.
            gate_logit.to(torch.promote_types(x.dtype, torch.float32)),
            query,
            key,
            value,
            normalizer,
            grid,
            directions,
            impl,
            query.dtype,
        )

    def _gate_query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate_logit, query, key = (f(x) for f in (self.forget_gate, self.query, self.key))
        return self._heads(gate_logit), self._heads(query), self._heads(key)

    def _heads(self, z: Tensor) -> Tensor:
        return rearrange(z, "b n (h d) -> b n h d", h=self.num_heads)

    def macs_parts(self, grid: tuple[int, int], directions: int) -> dict[str, int]:
        """Multiply-accumulates per sample; the core as the recurrence does it."""
        n = grid[0] * grid[1]
        layers = [module for module in self.modules() if isinstance(module, nn.Linear)]
        core = gated_linear_attention_macs(n, *self.head_dims)
        return {
            "projections": n * sum(layer.weight.numel() for layer in layers),
            "core": directions * self.num_heads * core,
        }


@in_float32
def _mean_of_scans(
    gate_logit: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_normalizer: float,
    grid: tuple[int, int],
    directions: Sequence[Direction],
    impl: Impl,
    dtype: torch.dtype,
) -> Tensor:
    operands = [
        rearrange(
            torch.cat([scan(z, grid, direction) for direction in directions]),
            "b n h d -> b h n d",
        )
        for z in _operands(gate_logit, query, key, value, gate_normalizer)
    ]
    query, key, value, log_gate = operands
    if impl == "fla":  # its kernels sum half precision in float32 themselves
        query, key, value = (z.to(dtype) for z in (query, key, value))
    out = gated_linear_attention(query, key, value, log_gate, impl).to(log_gate.dtype)
    return mean_of_scans(rearrange(out, "b h n d -> b n h d"), grid, directions)


@in_float32
def _operands(
    gate_logit: Tensor, query: Tensor, key: Tensor, value: Tensor, gate_normalizer: float
) -> tuple[Tensor, ...]:
    """What ``gated_linear_attention`` takes, as (b, n, h, d), of which its order is b h n d."""
    log_gate = F.logsigmoid(gate_logit) / gate_normalizer
    return query * query.shape[-1] ** -0.5, key, value, log_gate


def _expand(dim: int, name: str, ratio: float, num_heads: int) -> int:
    width = round(dim * ratio)
    if abs(width - dim * ratio) > 1e-6 or width < 1 or width % num_heads:
        raise InvalidValue(
            f"{name}={ratio} times dim={dim} gives {dim * ratio:g} channels, which do not divide "
            f"into num_heads={num_heads} heads; change one of the three"
        )
    return width


def _linear(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    layer = xavier_linear(in_features, out_features, bias)
    with torch.no_grad():
        layer.weight.mul_(2**-2.5)  # the gain of GLA and DiG
    return layer
