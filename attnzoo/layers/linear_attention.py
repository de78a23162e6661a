"""The base of every kernelised mechanism: a mechanism gives its kernels, the rest follows.

O = phi_q(Q) (phi_k(K)^T V) / (phi_q(Q) sum_j phi_k(K_j)^T + eps) + branch(V) per head. From the
kernels follow the forward, the forward over blocks of tokens, the n x n reference, the attention
map and the count.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from attnzoo.contract import LEAST_DIVISOR, Attention, AttentionConfig, AttentionContext
from attnzoo.errors import InvalidType, InvalidValue
from attnzoo.layers.depthwise_conv import DepthwiseConv, ValueConv, fuse_conv
from attnzoo.layers.key_position import KeyPosition
from attnzoo.layers.streaming import (
    State,
    StreamConfig,
    convolve,
    first_pass,
    second_pass,
    spans_of,
    summed,
)
from attnzoo.ops.dispatch import (
    choose,
    choose_once,
    has_numbers_elsewhere,
    is_bare,
    is_few,
    linear,
    require_triton,
)
from attnzoo.ops.linear_core import (
    Activation,
    activated,
    fold,
    key_sum,
    linear_attention_macs,
    linear_tokens,
    quotient,
    slower,
    wide_read,
)
from attnzoo.ops.linear_core.native import linear_core
from attnzoo.ops.precision import in_float32, operand_dtype
from attnzoo.ops.rotary_core.rotary import rotated
from attnzoo.ops.routed_linear import Route

Normalizer = Literal["base", "diff", "mean", "none"]
_CORE = "attend", "activated", "queries", "keys", "fold", "attended"  # what ``fused`` replaces


class Features(NamedTuple):
    """Queries or keys as the core multiplies them, (b, h, n, d_head).

    Attributes:
        terms: One of every attention map; several maps are subtracted.
        norms: What normalizes each, if anything does.
        factor: The second map's, of queries of two maps, (b, 1, n or 1, 1).
        routes: Decisions that were taken on the way, by router.
    """

    terms: Sequence[Tensor]
    norms: Sequence[Tensor]
    factor: Tensor | None = None
    routes: Mapping[str, Route] = {}


@dataclass(frozen=True, kw_only=True)
class LinearConfig(StreamConfig):
    """Options of every kernelised mechanism."""

    eps: float = 1e-8  # added to the normalizer; Sana's
    # "triton": fused kernels (docs/gpu.md); "auto" takes them on a GPU for layers they serve.
    impl: Literal["auto", "reference", "torch", "triton"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(LEAST_DIVISOR, "eps")


class LinearAttention(Attention):
    """Kernelised attention with a convolution of the values added, if there is one.

    A mechanism defines ``qkv``, ``proj``, ``query_kernel`` and ``key_kernel``; it may set
    ``conv``, ``key_position`` and ``is_rotated``. One that makes its features otherwise overrides
    ``project``, ``queries`` and ``keys``; one that combines them otherwise ``fold``, ``attended``
    and ``weights``; one that gates its output ``finish``.

    Attributes:
        normalizer: How maps are normalized: by the sum over the keys ("base"), by the difference
            of two sums ("diff"), by the number of keys ("mean"), or not.
        divides_by_mean: Whether ``eps`` belongs to the mean over the keys and not to their sum.
        activation: The last step of both kernels, which a fused core applies as it loads.
        is_packed: Whether a fused core may read Q, K and V where ``qkv`` wrote them.
        is_rotated: Whether features carry rotary positions, where they are not summed.
        is_wide: Whether ``finish`` takes what was attended to in the features' type.
        core: The operator that ``fused`` computes.
        joined: What else ``fused`` replaces or knows in a mechanism of this package.
    """

    Config = LinearConfig
    config: Any
    qkv: nn.Module
    proj: nn.Module
    conv: DepthwiseConv | ValueConv | None
    key_position: KeyPosition | None
    normalizer: Normalizer
    divides_by_mean = False
    is_wide = False
    activation: Activation = "none"
    core: ClassVar[str] = "linear_tokens"
    complexity = "O(n d d_head)"
    joined: ClassVar[tuple[str, ...]] = (
        "project", "query_kernel", "key_kernel", "activation", "divides_by_mean",
    )  # fmt: skip
    _steps: ClassVar[tuple[str, ...]] = _CORE
    _is_altered = False  # outside this package, from what kernels compute

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        package = __name__.split(".")[0] + "."
        # Whoever writes ``fused`` knows the steps up to there.
        is_known = (z.__module__.startswith(package) or "fused" in vars(z) for z in cls.__mro__)
        known = next(itertools.compress(cls.__mro__, is_known))
        cls._steps = _CORE if known is LinearAttention else (*_CORE, *known.joined)
        cls._is_altered = any(
            getattr(cls, z, None) is not getattr(known, z, None) for z in cls._steps
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._steps:  # of this layer alone
            self._is_altered = True
        elif name not in ("normalizer", "is_rotated", "key_position"):
            return
        vars(self).pop("_chosen", None)

    def __init__(self, context: AttentionContext, config: AttentionConfig) -> None:
        super().__init__(context, config)
        if not isinstance(config, LinearConfig):
            raise InvalidType(
                f"Config of {type(self).__name__} must be LinearConfig or a subclass, whose "
                f"options the base reads, got {type(config).__name__}"
            )
        self.conv = None
        self.key_position = None
        self.normalizer = "base"
        self.is_packed = False
        self.is_rotated = False
        if getattr(config, "impl", None) == "triton":
            require_triton()
            if reason := self._unserved():
                raise InvalidValue(f"impl='triton' does not serve {reason}; set impl='auto'")

    def query_kernel(self, query: Tensor) -> Tensor:
        """phi_q of tokens, (b, n, dim) -> (b, n, dim), but for ``activation``."""
        raise NotImplementedError

    def key_kernel(self, key: Tensor) -> Tensor:
        """phi_k of tokens, (b, m, dim) -> (b, m, dim), but for ``activation``."""
        raise NotImplementedError

    def kernels(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """``query_kernel`` and ``key_kernel``; what they share need not be computed twice."""
        return self.query_kernel(query), self.key_kernel(key)

    def activated(self, z: Tensor) -> Tensor:
        """The ``activation`` of tokens."""
        return activated(z, self.activation)

    def unserved_option(self) -> str | None:
        """What the fused core does not serve of the layer, or None."""
        if self.is_rotated:
            return "rotary positions"
        return f"normalizer={self.normalizer!r}" if self.normalizer == "diff" else None

    def implementation(self, x: Tensor) -> str:
        """What ``forward`` computes these tokens with; "triton" are the fused kernels."""
        impl = self.config.impl
        if impl == "auto":
            return choose_once(self, self.core, x, self._why_not_fused)
        if impl == "triton":  # a class may have set what it does not serve since it was built
            return choose(self.core, impl, x, None, self._unserved)
        return impl

    def _unserved(self) -> str | None:
        if self._is_altered:
            return f"features as {type(self).__name__} makes them"
        return self.unserved_option()

    def _why_not_fused(self) -> str | None:
        is_slow = self.core == LinearAttention.core and slower(self.dim // self.num_heads)
        return self._unserved() or is_slow or None

    def project(self, x: Tensor, grid: tuple[int, int]) -> Sequence[Any]:
        """Q, K and V of all tokens, (b, n or m, dim)."""
        return linear(self.qkv, x).chunk(3, dim=-1)

    def project_together(self, x: Tensor, grid: tuple[int, int]) -> Sequence[Any]:
        """``project`` for kernels that read rows with any spacing."""
        return self.project(x, grid)

    def packed_map(self) -> tuple[Tensor, float, float] | None:
        """What ``scaled_power_map`` takes of packed queries and keys: scale, power and offset.

        The scale comes before its softplus. None where ``activation`` is all of the kernels.
        """
        return None

    def project_query(self, x: Tensor) -> Any:
        """Q of some tokens."""
        return linear_parts(self.qkv, x, self.dim, slice(1))[0]

    def project_key_value(self, x: Tensor) -> Sequence[Any]:
        """K and V of some tokens."""
        return linear_parts(self.qkv, x, self.dim, slice(1, None))

    def queries(
        self, query: Any, x: Tensor, grid: tuple[int, int], span: slice = slice(None)
    ) -> Features:
        """What the core multiplies, of Q and the tokens it was made from, a part of the grid."""
        return self._features(self.query_kernel(query), grid, span)

    def keys(
        self, key: Any, x: Tensor, grid: tuple[int, int], span: slice = slice(None)
    ) -> Features:
        """What the core multiplies, of K and the tokens it was made from, a part of the grid."""
        if self.key_position is not None:
            key = self.key_position(key, grid, span)
        return self._features(self.key_kernel(key), grid, span)

    def _features(self, z: Tensor, grid: tuple[int, int], span: slice) -> Features:
        features = self._by_head(self.activated(z))
        term = rotated(features, grid, span) if self.is_rotated else features
        return Features([term], [features] if self.normalizer in ("base", "diff") else [])

    def _by_head(self, z: Tensor) -> Tensor:
        """(b, n, dim) -> (b, heads, n, d_head); einops would cost small inputs another product."""
        return z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        is_grid = isinstance(grid, tuple) and [*map(type, grid)] == [int, int]
        if not is_grid or x.shape[1:] != (grid[0] * grid[1], self.dim) or min(grid) < 1:
            self.check_tokens(x, grid)
        if self.config.stream and (block := self.config.block(self.training)):
            return self._stream(x, grid, block)
        if self.implementation(x) == "triton":
            return self.fused(x, grid)
        return self.attend(x, grid)[0]

    def attend(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Mapping[str, Route]]:
        """The output of all tokens at once, and the decisions taken on the way."""
        query, key, value = self.project(x, grid)
        by_head = self._by_head(value)
        keys = self.keys(key, x, grid)
        routes = keys.routes
        if self.config.impl == "reference":
            local = None if self.conv is None else self.conv(value, grid, impl="reference")
            queries = self.queries(query, x, grid)
            out = reference_read(queries, keys, by_head, self, grid)
        elif self._is_few(keys, by_head):
            local = None if self.conv is None else self.conv(value, grid, impl=self.config.impl)
            queries = self.queries(query, x, grid)
            eps = self.config.eps * (x.shape[1] if self.divides_by_mean else 1)
            operands = queries.terms[0], queries.norms[0], keys.terms[0], keys.norms[0], by_head
            out = linear_core(*operands, eps)
        else:
            # What only the keys need is gone before the queries come.
            state = self.fold(keys, value, grid, queries=x.shape[1])
            del key, keys
            # Before the queries too: the backward goes the other way, and then this comes when
            # little else is stored any more.
            local = None if self.conv is None else self.conv(value, grid, impl=self.config.impl)
            queries = self.queries(query, x, grid)
            del query
            out = self.attended(queries, state, grid)
        out = out.transpose(1, 2).flatten(2)
        out = out if self.is_wide else out.to(value.dtype)
        if local is not None:
            out = out + local.to(out.dtype)
        return self.finish(out, x), {**routes, **queries.routes}

    def fused(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The output of all tokens at once, by Triton's kernels."""
        tokens, value = x.shape[1], None
        eps = self.config.eps * (tokens if self.divides_by_mean else 1)
        options = self.activation, self.normalizer == "base", eps
        is_mean = self.normalizer == "mean"  # of which a convolution is no part
        kernel = None if self.conv is None or is_mean else self.conv.kernel
        is_whole = self.conv is None or kernel is not None
        if is_whole and self._is_packed():
            qkv, mapped = linear(self.qkv, x), self.packed_map()
            if kernel is None and mapped is None:
                out = linear_tokens(qkv, None, None, self.num_heads, *options, impl="triton")
            else:
                from attnzoo.ops.linear_core.triton_packed import packed_tokens

                out = packed_tokens(qkv, self.num_heads, grid, *options, kernel, mapped)
        else:
            query, key, value = self.project_together(x, grid)
            if self.key_position is not None:
                key = self.key_position(key, grid, slice(None))
            operands = *self.kernels(query, key), value
            out = linear_tokens(*operands, self.num_heads, *options, impl="triton")
        if is_mean:
            out = out / tokens
        if self.conv is not None and value is not None:
            out = self.conv(value, grid, out, impl=self.config.impl)
        return self.finish(out, x)

    def _is_packed(self) -> bool:
        return self.is_packed and self.key_position is None

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """The layer's output, of what some tokens ``x`` attended to and their convolution."""
        return linear(self.proj, out)

    def _is_few(self, keys: Features, value: Tensor) -> bool:
        """Whether one call of C multiplies sooner than a few products start."""
        if self.normalizer != "base" or len(keys.terms) > 1:
            return False
        if not is_few("linear_core", self.config.impl, keys.terms[0], value):
            return False
        own, fold, attended = LinearAttention, self.fold, self.attended
        if getattr(fold, "__func__", None) is not own.fold:
            return False
        if getattr(attended, "__func__", None) is not own.attended:
            return False
        return value.numel() * value.shape[-1] <= 1 << 18

    def _stream(self, x: Tensor, grid: tuple[int, int], block: int) -> Tensor:
        spans = spans_of(grid, block, self.rows_together)
        cached, state = first_pass(x, spans, lambda span: self.encode(x, grid, span), self.merge)
        return second_pass(cached, spans, lambda span: self.decode(x, grid, span, cached, state))

    @property
    def rows_together(self) -> int:
        """Rows of the grid of which a block must hold a multiple."""
        return 1 if self.conv is None else max(1, self.conv.reach)

    def encode(self, x: Tensor, grid: tuple[int, int], span: slice) -> tuple[Tensor | None, State]:
        """What a block caches for its own and its neighbors' outputs, and its keys' state."""
        key, value = self.project_key_value(x[:, span])
        state = self.fold(self.keys(key, x[:, span], grid, span), value, grid, span)
        return (None if self.conv is None else value), state

    def decode(
        self, x: Tensor, grid: tuple[int, int], span: slice, cached: Tensor | None, state: State
    ) -> Tensor:
        """The output of a block, of what ``encode`` cached of all and the sum of all states."""
        queries = self.queries(self.project_query(x[:, span]), x[:, span], grid, span)
        out = self.read(queries, state, x, grid, span)
        if self.conv is not None and cached is not None:
            conv, impl = self.conv, self.config.impl
            out = out + convolve(cached, span, grid[1], conv, conv.reach, impl).to(out.dtype)
        return self.finish(out, x[:, span])

    def fold(
        self,
        keys: Features,
        value: Tensor,
        grid: tuple[int, int],
        span: slice = slice(None),
        queries: int | None = None,
    ) -> State:
        """The state of keys and their values, (b, m, dim), a part of the grid.

        It is for that many queries, or for any where several states are yet to be joined.
        """
        return fold_features(keys, self._by_head(value), queries)

    def merge(self, whole: State, part: State) -> State:
        """The state of both states' keys."""
        return summed(whole, part)

    def attended(
        self, queries: Features, state: State, grid: tuple[int, int], span: slice = slice(None)
    ) -> Tensor:
        """The output of a part of the grid, (b, h, n, d_head), of the state of all keys."""
        return read_features(queries, state, self, grid[0] * grid[1])

    def weights(self, queries: Features, keys: Features, grid: tuple[int, int]) -> Tensor:
        """The weight of every key in every query's output, (b, h, n, m), as it is written."""
        return reference_weights(queries, keys, self, grid[0] * grid[1])

    def read(
        self, queries: Features, state: State, x: Tensor, grid: tuple[int, int], span: slice
    ) -> Tensor:
        """The output of a block before the projection, of the state of all tokens ``x``."""
        out = self.attended(queries, state, grid, span)
        out = out.transpose(1, 2).flatten(2)
        return out if self.is_wide else out.to(operand_dtype(x))

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``."""
        self.check_tokens(x, grid)
        query, key, _ = self.project(x, grid)
        keys = self.keys(key, x, grid)
        return self.weights(self.queries(query, x, grid), keys, grid)

    def decisions(self, x: Tensor, grid: tuple[int, int]) -> dict[str, Route]:
        """What the features of all tokens decide on the way, by router."""
        self.check_tokens(x, grid)
        query, key, _ = self.project(x, grid)
        keys = self.keys(key, x, grid)
        return {**keys.routes, **self.queries(query, x, grid).routes}

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        n, head_dim = grid[0] * grid[1], self.dim // self.num_heads
        is_normalized = self.normalizer in ("base", "diff")
        core = linear_attention_macs(n, n, head_dim, head_dim, is_normalized)
        return {
            "projections": 4 * self.dim**2 * n,
            "core": self.num_heads * core,
            "conv": 0 if self.conv is None else self.conv.macs(grid),
        }

    def fuse(self) -> dict[str, Any]:
        """See ``Attention.fuse``: the convolution's branches become one kernel."""
        return fuse_conv(self)


def fold_features(keys: Features, value: Tensor, queries: int | None) -> State:
    """Everything the queries read of keys and values: K^T V of each term, then the sums."""
    state: State = []
    for term in keys.terms:
        state.append(fold(term, value, queries))
    for term in keys.norms:
        state.append(key_sum(term))
    return state


def read_features(queries: Features, state: State, layer: LinearAttention, tokens: int) -> Tensor:
    """The output, (b, h, n, d_head), of what ``fold_features`` made of ``tokens`` keys."""
    read: list[Tensor] = []
    for query, factors in zip((*queries.terms, *queries.norms), state, strict=True):
        read.append(wide_read(query, factors))
    out = _combine(read, queries, layer, tokens)
    return out.to(queries.terms[0].dtype)


@in_float32
def reference_weights(
    queries: Features, keys: Features, layer: LinearAttention, tokens: int
) -> Tensor:
    """The weight of every key in every query's output, (b, h, n, m), as it is written."""
    terms = [
        torch.einsum("bhnd,bhmd->bhnm", query, key)
        for query, key in zip(queries.terms, keys.terms, strict=True)
    ]
    sums = [
        torch.einsum("bhnd,bhmd->bhnm", query, key).sum(-1, keepdim=True)
        for query, key in zip(queries.norms, keys.norms, strict=True)
    ]
    return _combine([*terms, *sums], queries, layer, tokens)


@in_float32
def reference_read(
    queries: Features,
    keys: Features,
    value: Tensor,
    layer: LinearAttention,
    grid: tuple[int, int],
) -> Tensor:
    """What ``fold_features`` and ``read_features`` give, by the n x m weights."""
    return layer.weights(queries, keys, grid) @ value


def _combine(read: list[Tensor], queries: Features, layer: LinearAttention, tokens: int) -> Tensor:
    """Normalizes the one map, or both and subtracts the second times the queries' factor.

    DyDiLA, arXiv 2601.13683, Eqs. 8 and 10; ``read`` are the maps' products, then the sums.
    """
    maps = len(queries.terms)
    factor = None if queries.factor is None else queries.factor.to(read[0].dtype)
    eps = layer.config.eps * (tokens if layer.divides_by_mean else 1)
    if layer.normalizer == "diff":
        total, norm = read[0], read[maps]
        if factor is not None:
            total, norm = total - factor * read[1], norm - factor * read[maps + 1]
        # A differenced sum can come near 0 or below it, where the quotient explodes.
        return total / norm.clamp_min(max(eps, 1e-6))
    for i in range(maps):
        if layer.normalizer == "base":
            read[i] = quotient(read[i], read[maps + i] + eps)
        elif layer.normalizer == "mean":
            read[i] = read[i] / tokens
    return read[0] if factor is None else read[0] - factor * read[1]


def linear_parts(
    layer: nn.Module, x: Tensor, width: int | list[int], parts: slice = slice(None)
) -> list[Tensor]:
    """Outputs of a linear layer in parts of ``width``, or of these, without computing others.

    One product per part makes each a tensor of its own, which is freed by itself and is not a
    strided slice of a longer row: that costs a CPU more than the three products.
    """
    # An adapter or a hook has its own idea of the weight, and a quantized one may have no parts; a
    # counter is to see the parts alone.
    if not is_bare(layer, of_all=False):
        return list(layer(x).split(width, dim=-1)[parts])
    weight, bias = cast(nn.Linear, layer).weight, cast(nn.Linear, layer).bias
    if has_numbers_elsewhere(weight):
        return list(layer(x).split(width, dim=-1)[parts])
    operands = [itertools.repeat(x), weight.split(width)[parts]]
    if bias is not None:
        operands.append(bias.split(width)[parts])
    return list(map(nn.functional.linear, *operands))
