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
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.contract import Attention, AttentionContext
from attnzoo.errors import InvalidValue
from attnzoo.layers.depthwise_conv import ConvKind, DepthwiseConv
from attnzoo.layers.differential_maps import (
    Normalizer,
    Side,
    fold_side,
    naive_map,
    naive_read,
    read_side,
)
from attnzoo.layers.key_position import KeyPosition
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.measure_kernel import GammaForm, gamma_start, measure_kernel, shaped_gamma
from attnzoo.layers.router import Router, as_numbers
from attnzoo.ops.dispatch import choose, require_triton
from attnzoo.ops.linear_core import linear_attention_macs
from attnzoo.ops.precision import autocast_operands, in_wide_range, operand_dtype
from attnzoo.ops.routed_linear import Route, RouterGradient, balance_loss
from attnzoo.ops.streaming import State, StreamConfig, linear_parts, stream
from attnzoo.ops.token_difference import Weights, dynamic_differential_attention, unserved
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    """Options of DyDiLA; the defaults are the paper's small model where the paper speaks."""

    n_projectors: int = 3  # n_P: 3, 5, 7 for S, B, L
    n_kernel_factors: int = 9  # n_F: 9, 15, 21 for S, B, L
    n_differential_factors: int = 9  # n_D: 9, 15, 21 for S, B, L
    # Where routed projections go: "redundancy" adds Q', K' (the method), where there is a
    # difference that reads them; "replace" makes Q, K routed themselves (Table 4, row 4); "none"
    # has none.
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
    gamma_form: GammaForm = "raw"  # A6; clamp keeps gamma >= 1
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
    # "triton": fused kernels (docs/gpu.md); "auto" takes them on a GPU for options they serve.
    impl: Literal["auto", "naive", "torch", "triton"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "n_projectors", "n_kernel_factors", "n_differential_factors")
        self.at_least(0, "eps", "relu_offset", "gamma_jitter", "balance_coefficient")
        if self.stream is not None and (self.differential, self.map_router) == ("map", "image"):
            raise InvalidValue(
                "map_router='image' averages all queries before it reads one; "
                "set stream=None or map_router='token'"
            )
        if not 0 < self.gamma_init < math.inf:
            raise InvalidValue(f"gamma_init must be positive and finite, got {self.gamma_init}")
        if self.gamma_form == "raw" and self.gamma_jitter >= self.gamma_init:
            raise InvalidValue(
                f"gamma_jitter={self.gamma_jitter} must be below gamma_init={self.gamma_init}, so "
                f"that every power starts positive; or set gamma_form='softplus'"
            )
        if self.differential != "none" and self.projection != "redundancy":
            raise InvalidValue(
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


@register_attention("dydila")
class DyDiLA(Attention):
    """Dynamic differential linear attention, token-wise by default."""

    Config = Config
    config: Config
    projection: Literal["redundancy", "replace", "none"]
    projector_routers: Any
    kernel_routers: Any
    differential_routers: Any
    paper = "DyDi-LiT, 2601.13683"
    complexity = "O(n d d_head)"

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        if config.impl == "triton":
            require_triton()
            if reason := self._unserved():
                raise InvalidValue(f"impl='triton' does not serve {reason}; set impl='auto'")
        dim, gradient = self.dim, config.router_gradient
        # Nothing but the difference reads Q' and K'.
        is_unread = (config.projection, config.differential) == ("redundancy", "none")
        self.projection = "none" if is_unread else config.projection
        makes_shared_qk = config.projection != "replace"
        self.shared = xavier_linear(dim, (3 if makes_shared_qk else 1) * dim, config.qkv_bias)
        self.proj = xavier_linear(dim, dim, bias=True)

        if self.projection != "none":
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
            start = gamma_start(config.gamma_init, config.gamma_form)
            self.gamma = nn.Parameter(start + spread.repeat(sets, 1))
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

    def _lambda_start(self) -> float:
        if self.config.lambda_init == "increasing":
            # Differential Transformer's schedule, which the paper's Table 6 mimics.
            return 0.8 - 0.6 * math.exp(-0.3 * self.context.layer_index)
        return self.config.lambda_init

    def _unserved(self) -> str | None:
        """The first option that the fused kernels do not serve, or None."""
        served: dict[str, tuple[Any, ...]] = {
            "projection": ("redundancy",), "kernel": ("routed",), "differential": ("token",),
            "router_gradient": ("ste", "none"), "normalizer": ("base",), "norm_scope": ("token",),
            "relu_offset": (0,), "softplus_scale": (False,), "key_position": (None,),
            "balance_coefficient": (0,),
        }  # fmt: skip
        for name, values in served.items():
            if (value := getattr(self.config, name)) not in values:
                return f"{name}={value!r}"
        config = self.config
        most = max(config.n_projectors, config.n_kernel_factors, config.n_differential_factors)
        return unserved(self.dim, self.num_heads, most)

    def implementation(self, x: Tensor) -> str:
        """What ``forward`` computes these tokens with; "triton" are the fused kernels."""
        if self.config.impl != "auto":
            return self.config.impl
        return choose("token_difference", "auto", x, operand_dtype(x), self._unserved)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        self.check_tokens(x, grid)
        if (block := self.config.block(self.training)) is not None:
            return self._stream(x, grid, block)
        impl = self.implementation(x)
        if impl == "triton":
            return self._fused(x, grid)
        routes: dict[str, Route] = {}
        if impl == "naive":
            query, key, value = self._sides(x, grid, routes)
            out = naive_read(query, key, self._heads(value), *self._normalizer())
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
        out = rearrange(out, "b h n d -> b n (h d)").to(value.dtype)
        if local is not None:
            out = out + local.to(out.dtype)
        if self.training and self.config.balance_coefficient:
            losses = [balance_loss(r) for r in routes.values() if r.logits is not None]
            if losses:
                self.auxiliary_loss = self.config.balance_coefficient * torch.stack(losses).mean()
        return self.proj(out)

    def _fused(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        config, sides = self.config, ("query", "key")
        x, weight = autocast_operands(x, self.shared.weight)
        bias = None if self.shared.bias is None else self.shared.bias.to(x.dtype)
        query, key, value = F.linear(x, weight, bias).split(self.dim, dim=-1)

        def cast(*weights: Tensor) -> list[Tensor]:
            return [z.to(x.dtype) for z in weights]

        weights = Weights(
            cast(*(self.projector_routers[z].weight for z in sides)),
            cast(*(self.projectors[z] for z in sides)),
            cast(*(router.weight for router in self.kernel_routers.values())),
            shaped_gamma(self.gamma, config.gamma_form).expand(4, -1),
            cast(*(self.differential_routers[z].weight for z in sides)),
            self._lambdas().expand(2, -1),
        )  # fmt: skip
        out = dynamic_differential_attention(
            x, query, key, value, weights, config.eps, config.router_gradient == "ste",
            self.num_heads, impl="triton",
        )  # fmt: skip
        return self.proj(out if self.conv is None else self.conv(value, grid, out))

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
            return rearrange(out, "b h n d -> b n (h d)").to(operand_dtype(tokens))

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
        """Everything the queries read of these tokens."""
        side = self._side(x, key, "key", routes, offset)
        return fold_side(side, self._heads(value), queries)

    def _read(
        self, x: Tensor, query: Tensor | None, state: State, keys: int, routes: dict[str, Route]
    ) -> Tensor:
        side = self._side(x, query, "query", routes)
        return read_side(side, state, keys, *self._normalizer())

    def _normalizer(self) -> tuple[Normalizer, float]:
        return self.config.normalizer, self.config.eps

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
        if self.projection != "none":
            router, is_naive = self.projector_routers[name], config.impl == "naive"
            routed, routes[f"projector.{name}"] = router.project(
                x, self.projectors[name], is_naive
            )
            pair.append(routed)
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

    def _kernel(self, z: Tensor, name: str, routes: dict[str, Route]) -> Tensor:
        """The measure kernel of Eq. 5, with the token's own power (Eq. 6)."""
        config, is_naive = self.config, self.config.impl == "naive"
        if config.kernel == "relu":
            return F.relu(in_wide_range(z))
        if config.kernel == "fixed":
            gamma = torch.full((1,), config.gamma_init, device=z.device)
        else:
            row = 0 if config.share_gamma else list(self.kernel_routers).index(name)
            gammas = shaped_gamma(self.gamma[row], config.gamma_form)
            gamma, routes[f"kernel.{name}"] = self.kernel_routers[name].pick(
                z, scalars=gammas, is_naive=is_naive
            )
        scale = F.softplus(self.scale) if config.softplus_scale else None
        heads = 1 if config.norm_scope == "token" else self.num_heads
        return measure_kernel(z, gamma, heads, config.relu_offset, scale, is_naive)

    def _factor(self, pair: list[Tensor], z: str, routes: dict[str, Route]) -> Tensor:
        """The lambda that each token chose (Eq. 7), (b, n, 1) or (b, 1, 1)."""
        if z == "map" and self.config.map_router == "image":
            pair = [side.mean(1, keepdim=True) for side in pair]
        lambdas = self._lambdas()[-1 if z == "key" else 0]
        factor, routes[f"differential.{z}"] = self.differential_routers[z].pick(
            *pair, scalars=lambdas, is_naive=self.config.impl == "naive"
        )
        return factor

    def _lambdas(self) -> Tensor:
        return self.lambda_.clamp_min(0) if self.config.lambda_clamp else self.lambda_

    def _heads(self, z: Tensor) -> Tensor:
        return rearrange(z, "b n (h d) -> b h n d", h=self.num_heads)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``."""
        self.check_tokens(x, grid)
        query, key, _ = self._sides(x, grid, {})
        return naive_map(query, key, *self._normalizer())

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
        self.check_tokens(x, grid)
        routes: dict[str, Route] = {}
        # Logits are kept only where a gradient may want them.
        with torch.enable_grad():
            self._sides(x, grid, routes)
        said: dict[str, Any] = {}
        if self.config.kernel == "routed":
            said["gamma"] = shaped_gamma(self.gamma, self.config.gamma_form)
        if self.config.differential != "none":
            said["lambda"] = self._lambdas()
        for name, routed in routes.items():
            kind, z = name.split(".")
            said[name] = getattr(self, f"{kind}_routers")[z].describe(routed)
        return as_numbers(said)

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
        projections = 4 if self.projection in ("replace", "none") else 6
        routed_tokens = 2 if self.projection != "none" else 0
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


@register_attention("dydila-map")
class MapWiseDyDiLA(DyDiLA):
    """Dynamic differential linear attention that subtracts attention maps (Eq. 10)."""

    Config = MapConfig
    config: MapConfig
