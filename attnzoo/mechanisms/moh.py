"""Mixture-of-head attention (MoH, arXiv 2410.11842), as in MoH-DiT.

Every token weighs the heads: the first ones are shared by all tokens, of the others it chooses its
top k. Gates: s softmax(W_1 x) for s shared heads, k softmax over the k largest of W_r x for routed
ones, the two groups scaled by 2 softmax(W_0 x); O = sum_i g_i H_i, H_i = softmax(Q_i K_i^T /
sqrt(d_head)) V_i W^O_i. All heads are computed, so nothing is saved over softmax attention.

Cost per sample: 4 d^2 n + 2 n^2 d + (heads + 2) d n for the routers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from attnzoo.contract import (
    Attention,
    AttentionConfig,
    AttentionContext,
    heads_of_width,
    removed_in,
)
from attnzoo.errors import InvalidValue
from attnzoo.layers.linear import query_key_value, xavier_linear
from attnzoo.ops.dispatch import linear
from attnzoo.ops.precision import in_float32
from attnzoo.ops.routed_linear import router_logits
from attnzoo.ops.softmax import SoftmaxImpl, softmax_attention, softmax_macs
from attnzoo.ops.softmax.reference import softmax_map
from attnzoo.registry import register_attention

# (shared, routed) heads of the 12 layers of MoH-DiT-S/2 (6 heads) and MoH-DiT-B/2 (12 heads); the
# number is the percentage of heads that a token uses. The last row uses every head.
SCHEDULES: dict[str, list[tuple[int, int]]] = {
    "S-90": [(3, 2)] * 8 + [(6, 0)] * 4,
    "S-75": [(2, 1)] * 2 + [(3, 1)] * 4 + [(3, 2)] * 4 + [(6, 0)] * 2,
    "B-90": [(6, 4)] * 5 + [(7, 4)] * 5 + [(12, 0)] * 2,
    "B-75": [(4, 2)] * 2 + [(6, 3)] * 8 + [(12, 0)] * 2,
}


def scheduled_heads(
    schedule: str, num_heads: int, layer_index: int = 0, depth: int = 12
) -> tuple[int, int]:
    """(shared, routed) heads of a layer.

    Another depth takes the row at the same relative height, another number of heads the same
    shares of it, rounded half up, with at least one shared and, where a row routes, at least one
    routed head as long as any is left.
    """
    rows = SCHEDULES[schedule]
    shared, routed = rows[(2 * layer_index + 1) * len(rows) // (2 * depth)]
    heads = rows[-1][0]
    share = max(1, (2 * shared * num_heads + heads) // (2 * heads))
    chosen = max(min(routed, 1), (2 * routed * num_heads + heads) // (2 * heads))
    return share, min(chosen, num_heads - share)


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    """Options of mixture-of-head attention."""

    # Heads by layer, after a released model; B-90 and B-75 are those of 12 heads.
    schedule: Literal["S-90", "S-75", "B-90", "B-75"] = "S-90"
    # Both together set every layer alike, instead of by the schedule.
    shared_heads: int | None = None  # heads that every token uses
    routed_heads: int | None = None  # heads that a token chooses among the others, its top k
    balance_coefficient: float = 0.01  # MoH-DiT
    impl: SoftmaxImpl = "auto"

    removed = removed_in("0.2.0", qkv_bias=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "balance_coefficient")
        if (self.shared_heads is None) != (self.routed_heads is None):
            raise InvalidValue(
                f"shared_heads={self.shared_heads} and routed_heads={self.routed_heads}: set "
                f"both, or neither to follow schedule={self.schedule!r}"
            )
        if self.shared_heads is not None:
            self.at_least(0, "shared_heads", "routed_heads")


@register_attention("moh")
class MixtureOfHeadAttention(Attention):
    """Softmax attention whose heads each token weighs, with a load-balancing loss.

    Attributes:
        shared_heads: Heads of this layer that every token uses.
        routed_heads: Heads that a token chooses among the others.
    """

    Config = Config
    config: Config
    paper = "MoH, 2410.11842"
    complexity = "O(n² d)"
    plot_style = ("#117733", "d")

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.shared_heads, self.routed_heads = self._split(context.layer_index)
        shared, routed, heads = self.shared_heads, self.routed_heads, self.num_heads
        if shared + routed > heads or (routed == 0 and shared != heads):
            raise InvalidValue(
                f"shared_heads={shared} and routed_heads={routed} do not divide the {heads} heads "
                f"(dim={self.dim}): choose shared_heads + routed_heads <= {heads} with "
                f"routed_heads >= 1, or shared_heads={heads} and routed_heads=0"
            )
        self._routing_layers = sum(self._split(index)[1] > 0 for index in range(context.depth))
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=True)
        self.proj = xavier_linear(self.dim, self.dim, bias=True)
        # Rows of the one router: W_1, W_r, W_0.
        self._rows = [shared, heads - shared, 2 if shared and routed else 0]
        router = torch.empty(sum(self._rows), self.dim)
        for rows in router.split(self._rows):
            if len(rows):
                nn.init.xavier_uniform_(rows)
        self.router = nn.Parameter(router)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 64, as every DiT has them."""
        return heads_of_width(dim, 64)

    def _split(self, layer_index: int) -> tuple[int, int]:
        shared, routed = self.config.shared_heads, self.config.routed_heads
        if shared is None or routed is None:
            depth = self.context.depth
            return scheduled_heads(self.config.schedule, self.num_heads, layer_index, depth)
        return shared, routed

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        query, key, value = self._query_key_value(x, grid)
        gates, balance = _gates(x, self.router, self._rows, self.routed_heads)
        if self.config.impl == "reference":
            out = _reference(query, key, value, gates)
        else:
            out = softmax_attention(query, key, value, impl=self.config.impl)
            out = out * gates.to(out.dtype)
        if self.training and self.routed_heads and self.config.balance_coefficient:
            # The sum over the layers that route is then the mean over them.
            self.auxiliary_loss = self.config.balance_coefficient * balance / self._routing_layers
        return linear(self.proj, rearrange(out, "b h n d -> b n (h d)"))

    def _query_key_value(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        self.check_tokens(x, grid)
        return query_key_value(self.qkv, x, self.num_heads)

    def gates(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Every token's weights of the heads, (batch, heads, n), shared heads first."""
        self.check_tokens(x, grid)
        return _gates(x, self.router, self._rows, self.routed_heads)[0].squeeze(-1)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``; a row sums to the gate of its head."""
        query, key, _ = self._query_key_value(x, grid)
        gates, _ = _gates(x, self.router, self._rows, self.routed_heads)
        return softmax_map(query, key) * gates.to(query.dtype)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        n = grid[0] * grid[1]
        return {
            "projections": 4 * self.dim**2 * n,
            "core": softmax_macs(n, n, self.dim, self.dim),
            "routing": sum(self._rows) * self.dim * n,
        }


@in_float32
def _reference(query: Tensor, key: Tensor, value: Tensor, gates: Tensor) -> Tensor:
    """Reference of the gated softmax attention that materializes the map."""
    return (softmax_map(query, key) * gates) @ value


@in_float32
def _gates(x: Tensor, router: Tensor, rows: list[int], top_k: int) -> tuple[Tensor, Tensor]:
    """Gates (b, heads, n, 1) and balancing loss, both in float32.

    ``rows`` are the router's rows for the shared heads, the routed heads and the two groups.
    """
    shared, routed, groups = router_logits(x, router).split(rows, dim=-1)
    gates = [shared.softmax(-1) * rows[0]]
    balance = x.new_zeros(())
    if top_k:
        chosen = torch.zeros_like(routed, dtype=torch.bool)
        chosen.scatter_(-1, routed.topk(top_k, dim=-1).indices, 1)
        gates.append(routed.masked_fill(~chosen, -torch.inf).softmax(-1) * top_k)
        # Mean probability and frequency of every routed head, over all tokens.
        probability = routed.softmax(-1).flatten(0, -2).mean(0)
        usage = chosen.to(routed.dtype).flatten(0, -2).mean(0)
        balance = (probability * usage).mean() * rows[1] ** 2
    if groups.shape[-1]:
        scale = groups.softmax(-1).split(1, dim=-1)
        gates = [2 * group * gate for group, gate in zip(scale, gates, strict=True)]
    return rearrange(torch.cat(gates, dim=-1), "b n h -> b h n 1"), balance
