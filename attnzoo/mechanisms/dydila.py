"""Dynamic differential linear attention (DyDiLA, arXiv 2601.13683).

Every token is projected a second time by a projector it chooses (Q', K', Eqs. 1-2), every one of
Q, K, Q', K' is sharpened by a power it chooses (Eqs. 5-6), and Q', K' are subtracted, scaled by a
factor the token chooses (Eqs. 7-8), before linear attention; a depthwise convolution of V is added
(Eq. 9). "dydila-map" subtracts whole attention maps instead (Eq. 10).

Cost per sample: 6 d^2 n + 2 n d d_head + routers (2 n_P + 4 n_F + 4 n_D) d n + convolution;
map-wise doubles the core. What the paper leaves open is an option; docs/fidelity.md gives the
evidence for each default and the setting of the literal reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.contract import Attention, AttentionConfig, AttentionContext
from attnzoo.layers.depthwise_conv import ConvKind, DepthwiseConv
from attnzoo.layers.key_position import KeyPosition
from attnzoo.layers.linear import xavier_linear
from attnzoo.ops import fused
from attnzoo.ops.focused import naive_power_map, power_map
from attnzoo.ops.linear import fold, key_sum, linear_attention_macs, quotient, read
from attnzoo.ops.precision import autocast_operands, in_float32
from attnzoo.ops.routing import (
    Route,
    RouterGradient,
    balance_loss,
    gated,
    naive_gated,
    naive_routed_projection,
    naive_routed_scalar,
    route,
    routed_projection,
    routed_scalar,
    router_logits,
)
from attnzoo.ops.streaming import State, linear_parts, stream
from attnzoo.registry import register_attention

Normalizer = Literal["base", "diff", "mean", "none"]


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    """Options of DyDiLA; the defaults are the paper's small model where the paper speaks."""

    n_projectors: int = 3  # n_P: 3, 5, 7 for S, B, L
    n_kernel_factors: int = 9  # n_F: 9, 15, 21 for S, B, L
    n_differential_factors: int = 9  # n_D: 9, 15, 21 for S, B, L
    # Where routed projections go: "redundancy" adds Q', K' (the method); "replace" makes Q, K
    # routed themselves (Table 4, row 4); "none" has none.
    projection: Literal["redundancy", "replace", "none"] = "redundancy"
    kernel: Literal["routed", "fixed", "relu"] = "routed"  # "fixed": one constant power, Eq. 5
    differential: Literal["token", "map", "none"] = "token"
    router_gradient: RouterGradient = "ste"  # A1; a hard argmax gives routers no gradient
    balance_coefficient: float = 0.0  # A2; the paper has no load balancing
    normalizer: Normalizer = "base"  # A3; Eq. 8 has none, Eq. 4 has
    eps: float = 1e-6
    norm_scope: Literal["token", "head"] = "token"  # A5; Eq. 5 writes the whole token
    relu_offset: float = 0.0  # A6; FLatten adds 1e-6
    gamma_init: float = 3.0
    gamma_jitter: float = 0.0  # A1; a spread of the start values breaks the routers' tie
    gamma_form: Literal["raw", "clamp", "softplus"] = "raw"  # A6; clamp keeps gamma >= 1
    share_gamma: bool = True  # A7; one set for Q, K, Q', K'
    share_lambda: bool = True  # A7; one set for queries and keys
    lambda_init: float | Literal["increasing"] = 0.01  # "increasing": 0.2 to 0.8 over depth
    lambda_clamp: bool = False  # A8; keeps lambda >= 0
    map_router: Literal["token", "image"] = "token"  # A9; one lambda per query or per image
    softplus_scale: bool = False  # A10; FLatten's learned scale per channel
    # A10; grid (height, width) of FLatten's learned position, added to K; it fixes the grid.
    key_position: tuple[int, int] | None = None
    conv: ConvKind = "acnet"  # A11
    qkv_bias: bool = False  # A12
    # "triton": fused kernels for a GPU (docs/gpu.md), for the options that they serve.
    impl: Literal["auto", "naive", "triton"] = "auto"
    stream: int | None = None  # tokens per block in eval mode without gradients; ops/streaming.py

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "n_projectors", "n_kernel_factors", "n_differential_factors")
        self.at_least(0, "eps", "relu_offset", "gamma_jitter", "balance_coefficient")
        if self.stream is not None:
            self.at_least(1, "stream")
            if self.differential == "map" and self.map_router == "image":
                raise ValueError(
                    "map_router='image' averages all queries before it reads one; "
                    "set stream=None or map_router='token'"
                )
        if self.gamma_init <= 0:
            raise ValueError(f"gamma_init must be positive, got {self.gamma_init}")
        if self.differential != "none" and self.projection != "redundancy":
            raise ValueError(
                f"differential={self.differential!r} subtracts Q' and K', which "
                f"projection={self.projection!r} does not make; set projection='redundancy' or "
                f"differential='none'"
            )


@dataclass(frozen=True, kw_only=True)
class MapConfig(Config):
    """Options of map-wise DyDiLA."""

    differential: Literal["token", "map", "none"] = "map"


_PLAIN: dict[str, Any] = {
    "projection": "none", "kernel": "relu", "differential": "none", "conv": "none",
}  # fmt: skip

# The rows of the paper's Table 4, in its order: options of "dydila".
LADDER: dict[str, dict[str, Any]] = {
    "sana": _PLAIN,
    "+focused kernel": _PLAIN | {"kernel": "fixed"},
    "+dynamic measure kernel": _PLAIN | {"kernel": "routed"},
    "+dynamic projection module": _PLAIN | {"kernel": "routed", "projection": "replace"},
    "+token differential operator": {"conv": "none"},
    "+reparameterization": {},
}


class Side(NamedTuple):
    """Queries or keys as the core multiplies them, (b, h, n, d_head).

    Attributes:
        terms: One of every attention map.
        norms: What normalises each, if anything does.
        factor: The second map's, of queries in "dydila-map".
    """

    terms: list[Tensor]
    norms: list[Tensor]
    factor: Tensor | None


class Router(nn.Module):
    """A bias-free linear router that chooses one of ``choices`` for every token."""

    def __init__(self, dim: int, choices: int, gradient: RouterGradient) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(choices, dim))
        nn.init.xavier_uniform_(self.weight)
        self.gradient: RouterGradient = gradient

    def forward(self, *parts: Tensor) -> Route:
        """Tokens, in parts that side by side are (..., dim) -> one decision per token."""
        weights = self.weight.split([part.shape[-1] for part in parts], dim=-1)
        logits = [router_logits(x, w) for x, w in zip(parts, weights, strict=True)]
        return route(sum(logits[1:], logits[0]), self.gradient, self.training)


@register_attention("dydila")
class DyDiLA(Attention):
    """Dynamic differential linear attention, token-wise by default."""

    Config = Config
    config: Config
    paper = "DyDi-LiT, 2601.13683"
    complexity = "O(n d d_head)"

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        if config.impl == "triton":
            fused.require_triton()
            if reason := self._not_fused():
                raise ValueError(f"impl='triton' does not serve {reason}; set impl='auto'")
        dim, gradient = self.dim, config.router_gradient
        makes_shared_qk = config.projection != "replace"
        self.shared = xavier_linear(dim, (3 if makes_shared_qk else 1) * dim, config.qkv_bias)
        self.proj = xavier_linear(dim, dim, bias=True)

        if config.projection != "none":
            self.projectors = nn.ParameterDict()
            self.projector_routers = nn.ModuleDict()
            for z in ("query", "key"):
                weight = torch.empty(config.n_projectors, dim, dim)
                for projector in weight:
                    nn.init.xavier_uniform_(projector)
                self.projectors[z] = nn.Parameter(weight)
                self.projector_routers[z] = Router(dim, config.n_projectors, gradient)

        # What the kernel is applied to; a prime marks the redundancy.
        sides = ["query", "key"]
        if config.differential != "none":
            sides += ["query_prime", "key_prime"]
        if config.kernel == "routed":
            sets = 1 if config.share_gamma else len(sides)
            spread = torch.linspace(-1, 1, config.n_kernel_factors) * config.gamma_jitter
            self.gamma = nn.Parameter(self._gamma_start() + spread.repeat(sets, 1))
            self.kernel_routers = nn.ModuleDict(
                {z: Router(dim, config.n_kernel_factors, gradient) for z in sides}
            )
        if config.softplus_scale and config.kernel != "relu":
            self.scale = nn.Parameter(torch.zeros(dim))

        self.key_position = None
        if config.key_position is not None:
            self.key_position = KeyPosition(config.key_position, dim)

        if config.differential != "none":
            is_token_wise = config.differential == "token"
            sets = 1 if config.share_lambda or not is_token_wise else 2
            start = self._lambda_start()
            self.lambda_ = nn.Parameter(torch.full((sets, config.n_differential_factors), start))
            self.differential_routers = nn.ModuleDict(
                {
                    z: Router(2 * dim, config.n_differential_factors, gradient)
                    for z in (("query", "key") if is_token_wise else ("map",))
                }
            )
        self.conv = None if config.conv == "none" else DepthwiseConv(dim, config.conv)

    def _gamma_start(self) -> float:
        init = self.config.gamma_init
        return math.log(math.expm1(init)) if self.config.gamma_form == "softplus" else init

    def _lambda_start(self) -> float:
        if self.config.lambda_init == "increasing":
            # Differential Transformer's schedule, which the paper's Table 6 mimics.
            return 0.8 - 0.6 * math.exp(-0.3 * self.context.layer_index)
        return self.config.lambda_init

    def _not_fused(self) -> str | None:
        """The first option that the fused kernels do not serve, or None."""
        served: dict[str, tuple[Any, ...]] = {
            "projection": ("redundancy",), "kernel": ("routed",), "differential": ("token",),
            "router_gradient": ("ste", "none"), "normalizer": ("base",), "norm_scope": ("token",),
            "relu_offset": (0,), "softplus_scale": (False,), "key_position": (None,),
            "balance_coefficient": (0,), "stream": (None,),
        }  # fmt: skip
        for name, values in served.items():
            if (value := getattr(self.config, name)) not in values:
                return f"{name}={value!r}"
        return None if self.num_heads == 1 else f"num_heads={self.num_heads}"

    def _fused(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        config, sides = self.config, ("query", "key")
        x, weight = autocast_operands(x, self.shared.weight)
        bias = None if self.shared.bias is None else self.shared.bias.to(x.dtype)
        query, key, value = F.linear(x, weight, bias).split(self.dim, dim=-1)

        def cast(*weights: Tensor) -> list[Tensor]:
            return [z.to(x.dtype) for z in weights]

        gammas, lambdas = self.gamma, self.lambda_
        if config.gamma_form == "softplus":
            gammas = F.softplus(gammas)
        elif config.gamma_form == "clamp":
            gammas = gammas.clamp_min(1.0)
        if config.lambda_clamp:
            lambdas = lambdas.clamp_min(0)
        out = fused.dynamic_differential_attention(
            x, query, key, value,
            cast(*(self.projector_routers[z].weight for z in sides)),
            cast(*(self.projectors[z] for z in sides)),
            cast(*(router.weight for router in self.kernel_routers.values())),
            gammas.expand(4, -1),
            cast(*(self.differential_routers[z].weight for z in sides)),
            lambdas.expand(2, -1), config.eps, config.router_gradient == "ste",
        )  # fmt: skip
        if self.conv is not None:
            out = out + self.conv(value, grid).to(out.dtype)
        return self.proj(out)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        self.check_tokens(x, grid)
        if self.config.impl == "triton":
            return self._fused(x, grid)
        is_naive = self.config.impl == "naive"
        is_inference = not (is_naive or self.training or torch.is_grad_enabled())
        if self.config.stream is not None and is_inference:
            return self._stream(x, grid, self.config.stream)
        routes: dict[str, Route] = {}
        if is_naive:
            query, key, value = self._sides(x, grid, routes)
            out = _naive_attention(query, key, self._heads(value), self.config)
            local = None if self.conv is None else self.conv(value, grid)
        else:
            query, key, value = self._shared(x)
            # What only the keys need is gone before the queries come.
            state = self._fold(x, key, value, self._offset(grid), x.shape[1], routes)
            del key
            # Before the queries too: the backward goes the other way, and then this comes when
            # little else is kept any more.
            local = None if self.conv is None else self.conv(value, grid)
            out = self._read(x, query, state, x.shape[1], routes)
        out = rearrange(out, "b h n d -> b n (h d)")
        if local is not None:
            out = out + local.to(out.dtype)
        if self.training and self.config.balance_coefficient:
            losses = [balance_loss(r) for r in routes.values() if r.logits is not None]
            if losses:
                self.auxiliary_loss = self.config.balance_coefficient * torch.stack(losses).mean()
        return self.proj(out)

    def _stream(self, x: Tensor, grid: tuple[int, int], block: int) -> Tensor:
        dim, offset = self.dim, self._offset(grid)
        is_shared = self.config.projection != "replace"
        keys_and_values = slice(1, None) if is_shared else slice(None)

        def encode(tokens: Tensor, span: slice) -> tuple[Tensor, State]:
            *keys, value = linear_parts(self.shared, tokens, dim, keys_and_values)
            part = None if offset is None else offset[span]
            return value, self._fold(tokens, keys[0] if keys else None, value, part, None, {})

        def decode(tokens: Tensor, state: State) -> Tensor:
            [query] = linear_parts(self.shared, tokens, dim, slice(1)) if is_shared else [None]
            out = self._read(tokens, query, state, x.shape[1], {})
            return rearrange(out, "b h n d -> b n (h d)")

        halo = 0 if self.conv is None else self.conv.reach
        return stream(x, grid, block, encode, decode, self.proj, self.conv, halo)

    def _shared(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Q and K, unless the routed projections replace them, and V."""
        *pair, value = linear_parts(self.shared, x, self.dim)
        query, key = pair or (None, None)
        return query, key, value

    def _offset(self, grid: tuple[int, int]) -> Tensor | None:
        """The position that is added to the keys, (n, dim), or None."""
        if self.key_position is None:
            return None
        return self.key_position(self.key_position.offset.new_zeros(()), grid)

    def _sides(
        self, x: Tensor, grid: tuple[int, int], routes: dict[str, Route]
    ) -> tuple[Side, Side, Tensor]:
        query, key, value = self._shared(x)
        offset = self._offset(grid)
        key_side = self._side(x, key, "key", routes, offset)
        return self._side(x, query, "query", routes), key_side, value

    def _fold(
        self,
        x: Tensor,
        key: Tensor | None,
        value: Tensor,
        offset: Tensor | None,
        queries: int | None,
        routes: dict[str, Route],
    ) -> State:
        """Everything the queries read of these tokens: K^T V of each term, then its sums."""
        side, heads = self._side(x, key, "key", routes, offset), self._heads(value)
        state: State = [fold(term, heads, queries) for term in side.terms]
        return state + [key_sum(norm) for norm in side.norms]

    def _read(
        self, x: Tensor, query: Tensor | None, state: State, keys: int, routes: dict[str, Route]
    ) -> Tensor:
        return _attention(self._side(x, query, "query", routes), state, keys, self.config)

    def _side(
        self,
        x: Tensor,
        shared: Tensor | None,
        name: Literal["query", "key"],
        routes: dict[str, Route],
        offset: Tensor | None = None,
    ) -> Side:
        """Queries or keys, from the tokens to what the core multiplies."""
        config = self.config
        pair = [] if shared is None else [shared]
        if config.projection != "none":
            pair.append(self._routed_projection(x, name, routes))
        if offset is not None:
            pair[0] = pair[0] + offset
        for i, kind in enumerate([name, f"{name}_prime"][: len(pair)]):
            pair[i] = self._kernel(pair[i], kind, routes)
        needs_sums = config.normalizer in ("base", "diff")
        if config.differential == "token":
            # The token differential operator, Eq. 8.
            factor = self._factor(pair, name, routes).to(pair[0].dtype)
            difference = self._heads(torch.addcmul(pair[0], factor, pair[1], value=-1))
            norm = self._heads(pair[0]) if config.normalizer == "base" else difference
            return Side([difference], [norm] if needs_sums else [], None)
        terms = [self._heads(z) for z in pair]
        is_map = config.differential == "map" and name == "query"
        factor = self._factor(pair, "map", routes).unsqueeze(1) if is_map else None
        return Side(terms, terms if needs_sums else [], factor)

    def _routed_projection(self, x: Tensor, z: str, routes: dict[str, Route]) -> Tensor:
        routed = routes[f"projector.{z}"] = self.projector_routers[z](x)
        if self.config.impl == "naive":
            out = naive_routed_projection(x, self.projectors[z], routed.index)
            return naive_gated(out, routed, self.config.router_gradient)
        out = routed_projection(x, self.projectors[z], routed.index)
        return gated(out, routed, self.config.router_gradient)

    def _kernel(self, z: Tensor, name: str, routes: dict[str, Route]) -> Tensor:
        """The measure kernel of Eq. 5, with the token's own power (Eq. 6)."""
        config, activated = self.config, z  # the power map begins with ReLU
        if config.kernel == "relu":
            return F.relu(z)
        if config.relu_offset:
            activated = F.relu(z) + config.relu_offset
        if config.softplus_scale:
            activated = activated / F.softplus(self.scale)
        if config.kernel == "fixed":
            gamma = torch.full((1,), config.gamma_init, device=z.device)
        else:
            routed = routes[f"kernel.{name}"] = self.kernel_routers[name](z)
            row = 0 if config.share_gamma else list(self.kernel_routers).index(name)
            gammas = self.gamma[row]
            if config.gamma_form == "softplus":
                gammas = F.softplus(gammas)
            elif config.gamma_form == "clamp":
                gammas = gammas.clamp_min(1.0)
            gamma = self._chosen(routed, gammas)
        apply = naive_power_map if config.impl == "naive" else power_map
        if config.norm_scope == "token":
            return apply(activated, gamma)
        per_head = rearrange(activated, "b n (h d) -> b n h d", h=self.num_heads)
        return rearrange(apply(per_head, gamma.unsqueeze(-1)), "b n h d -> b n (h d)")

    def _factor(self, pair: list[Tensor], z: str, routes: dict[str, Route]) -> Tensor:
        """The lambda that each token chose (Eq. 7), (b, n, 1) or (b, 1, 1)."""
        if z == "map" and self.config.map_router == "image":
            pair = [side.mean(1, keepdim=True) for side in pair]
        routed = routes[f"differential.{z}"] = self.differential_routers[z](*pair)
        lambdas = self.lambda_[-1 if z == "key" else 0]
        if self.config.lambda_clamp:
            lambdas = lambdas.clamp_min(0)
        return self._chosen(routed, lambdas)

    def _chosen(self, routed: Route, scalars: Tensor) -> Tensor:
        choose = naive_routed_scalar if self.config.impl == "naive" else routed_scalar
        return choose(routed, scalars, self.config.router_gradient)

    def _heads(self, z: Tensor) -> Tensor:
        return rearrange(z, "b n (h d) -> b h n d", h=self.num_heads)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``."""
        self.check_tokens(x, grid)
        query, key, _ = self._sides(x, grid, {})
        return _naive_map(query, key, self.config)

    def routes(self, x: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Every token's decisions, by router: "projector.query" and so on, each (batch, n)."""
        self.check_tokens(x, grid)
        routes: dict[str, Route] = {}
        self._sides(x, grid, routes)
        return {name: routed.index for name, routed in routes.items()}

    def diagnostics(self, x: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
        """What a training log wants to know: learned factors, and how the routers choose.

        Args:
            x: Tokens, (batch, height * width, dim).
            grid: (height, width) in tokens.

        Returns:
            "gamma" and "lambda" as they are used, and for each router "usage", the share of
            tokens that each expert received, and "entropy", the mean of its softmax in nats
            (not with router_gradient="none", which makes no softmax).
        """
        said: dict[str, Any] = {}
        if self.config.kernel == "routed":
            gamma = self.gamma.detach()
            is_softplus = self.config.gamma_form == "softplus"
            said["gamma"] = (F.softplus(gamma) if is_softplus else gamma).tolist()
        if self.config.differential != "none":
            said["lambda"] = self.lambda_.detach().tolist()
        self.check_tokens(x, grid)
        routes: dict[str, Route] = {}
        # Logits are kept only where a gradient may want them.
        with torch.enable_grad():
            self._sides(x, grid, routes)
        for name, routed in routes.items():
            experts = getattr(self, f"{name.split('.')[0]}_routers")[name.split(".")[1]].weight
            usage = torch.bincount(routed.index.flatten(), minlength=len(experts))
            said[name] = {"usage": (usage / routed.index.numel()).tolist()}
            probability = routed.probability
            if probability is not None:
                entropy = torch.special.entr(probability.detach().float()).sum(-1)
                said[name]["entropy"] = entropy.mean().item()
        return said

    def fuse(self) -> dict[str, Any]:
        """See ``Attention.fuse``: the convolution's branches become one kernel."""
        if self.conv is None:
            return {}
        self.conv.fuse()
        changed = {"conv": "5x5" if self.config.conv == "5x5" else "3x3"}
        self.config = replace(self.config, **changed)
        return changed

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        n, config, head_dim = grid[0] * grid[1], self.config, self.dim // self.num_heads
        projections = 4 if config.projection in ("replace", "none") else 6
        routed_tokens = 2 if config.projection != "none" else 0
        kernels = {"routed": 2 if config.differential == "none" else 4}.get(config.kernel, 0)
        routing = routed_tokens * config.n_projectors + kernels * config.n_kernel_factors
        routing *= n
        if config.differential == "token":
            routing += 4 * config.n_differential_factors * n
        elif config.differential == "map":
            rows = 1 if config.map_router == "image" else n
            routing += 2 * config.n_differential_factors * rows
        cores = 2 if config.differential == "map" else 1
        is_normalized = config.normalizer in ("base", "diff")
        core = linear_attention_macs(n, n, head_dim, head_dim, is_normalized)
        return {
            "projections": projections * self.dim**2 * n,
            "routing": routing * self.dim,
            "core": cores * self.num_heads * core,
            "conv": self.conv.macs(grid) if self.conv is not None else 0,
        }


@in_float32
def _attention(query: Side, state: State, keys: int, config: Config) -> Tensor:
    products = [read(q, s) for q, s in zip(query.terms, state, strict=False)]
    sums = [read(q, s) for q, s in zip(query.norms, state[len(products) :], strict=True)]
    return _combine(products, sums, query.factor, keys, config)


@in_float32
def _naive_attention(query: Side, key: Side, value: Tensor, config: Config) -> Tensor:
    """Twin of ``DyDiLA._fold`` and ``_attention``: the n x n weights of Eqs. 8, 10, times V."""
    return _naive_map(query, key, config) @ value


@in_float32
def _naive_map(query: Side, key: Side, config: Config) -> Tensor:
    def products(queries: list[Tensor], keys: list[Tensor]) -> list[Tensor]:
        pairs = zip(queries, keys, strict=True)
        return [torch.einsum("bhnd,bhmd->bhnm", q, k) for q, k in pairs]

    sums = [weights.sum(-1, keepdim=True) for weights in products(query.norms, key.norms)]
    keys = key.terms[0].shape[-2]
    return _combine(products(query.terms, key.terms), sums, query.factor, keys, config)


def _combine(
    terms: list[Tensor],
    sums: list[Tensor],
    factor: Tensor | None,
    keys: int,
    config: Config,
) -> Tensor:
    """Normalises the one map, or both and subtracts the second times ``factor`` (Eq. 10)."""
    if config.normalizer == "diff":
        total, norm = terms[0], sums[0]
        if factor is not None:
            total, norm = total - factor * terms[1], norm - factor * sums[1]
        # A differenced sum can come near 0 or below it, where the quotient explodes.
        return total / norm.clamp_min(max(config.eps, 1e-6))
    if config.normalizer == "base":
        terms = [quotient(x, norm + config.eps) for x, norm in zip(terms, sums, strict=True)]
    elif config.normalizer == "mean":
        terms = [term / keys for term in terms]
    return terms[0] if factor is None else terms[0] - factor * terms[1]


@register_attention("dydila-map")
class MapWiseDyDiLA(DyDiLA):
    """Dynamic differential linear attention that subtracts attention maps (Eq. 10)."""

    Config = MapConfig
    config: MapConfig
