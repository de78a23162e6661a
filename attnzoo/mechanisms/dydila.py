"""Dynamic differential linear attention (DyDiLA, arXiv 2601.13683).

Every token is projected a second time by a projector it chooses (Q', K', Eqs. 1-2), every one of
Q, K, Q', K' is sharpened by a power it chooses (Eqs. 5-6), and Q', K' are subtracted, scaled by a
factor the token chooses (Eqs. 7-8), before linear attention; a depthwise convolution of V is added
(Eq. 9). "dydila-map" subtracts whole attention maps instead (Eq. 10).

Cost per sample: 6 d^2 n + 2 n d d_head + routers (2 n_P + 4 n_F + 4 n_D) d n + convolution;
map-wise doubles the core. docs/fidelity.md gives the evidence for what the paper leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.contract import AttentionContext, removed_in
from attnzoo.errors import InvalidValue
from attnzoo.layers.depthwise_conv import ConvKind, DepthwiseConv
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.linear_attention import (
    Features,
    LinearAttention,
    LinearConfig,
    Normalizer,
    linear_parts,
)
from attnzoo.layers.router import Router, as_numbers
from attnzoo.layers.token_difference import (
    fused_forward,
    map_forward,
    serves_maps,
    unserved_option,
)
from attnzoo.ops.dispatch import Impl, is_few, linear
from attnzoo.ops.power_map import power_map
from attnzoo.ops.routed_linear import Route, balance_loss, decide, gated, pick, routed_linear
from attnzoo.ops.token_difference.native import focused_difference
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(LinearConfig):
    """Options of DyDiLA; the defaults are the paper's small model where the paper speaks."""

    n_projectors: int = 3  # n_P: 3, 5, 7 for S, B, L
    n_kernel_factors: int = 9  # n_F: 9, 15, 21 for S, B, L
    n_differential_factors: int = 9  # n_D: 9, 15, 21 for S, B, L
    # "redundancy" adds Q', K' (the method), where there is a difference that reads them; "replace"
    # makes Q, K routed themselves (Table 4, row 4).
    projection: Literal["redundancy", "replace", "none"] = "redundancy"
    kernel: Literal["routed", "fixed", "relu"] = "routed"  # "fixed": one constant power, Eq. 5
    differential: Literal["token", "map", "none"] = "token"
    router_gradient: Literal["ste", "none"] = "ste"  # A1; a hard argmax gives routers no gradient
    balance_coefficient: float = 0.0  # A2; the paper has no load balancing
    normalizer: Normalizer = "base"  # A3; Eq. 8 has none, Eq. 4 has
    eps: float = 1e-6
    gamma_init: float = 3.0
    gamma_jitter: float = 0.0  # A1; a spread of the start values breaks the routers' tie
    gamma_form: Literal["raw", "clamp"] = "raw"  # A6; "clamp" keeps gamma >= 1
    lambda_init: float | Literal["increasing"] = 0.01  # "increasing": 0.2 to 0.8 over depth
    map_router: Literal["token", "image"] = "token"  # A9; one lambda per query or per image
    conv: ConvKind = "acnet"  # A11
    qkv_bias: bool = False  # A12

    removed = removed_in(
        "0.2.0", key_position=None, lambda_clamp=False, norm_scope="token", relu_offset=0.0,
        share_gamma=True, share_lambda=True, softplus_scale=False,
        values={"conv": ("acnet-plain",), "gamma_form": ("softplus",),
                "router_gradient": ("gumbel", "softgate")},
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "n_projectors", "n_kernel_factors", "n_differential_factors")
        self.at_least(0, "gamma_jitter", "balance_coefficient")
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
                f"that every power starts positive; or set gamma_form='clamp'"
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


_PLAIN: dict = {"projection": "none", "kernel": "relu", "differential": "none", "conv": "none"}

# The ablation steps of the paper's Table 4, in its order: options of "dydila".
ABLATION_STEPS: dict[str, dict[str, Any]] = {
    "sana": _PLAIN,
    "+focused kernel": _PLAIN | {"kernel": "fixed"},
    "+dynamic measure kernel": _PLAIN | {"kernel": "routed"},
    "+dynamic projection module": _PLAIN | {"kernel": "routed", "projection": "replace"},
    "+token differential operator": {"conv": "none"},
    "+reparameterization": {},
}


@register_attention("dydila")
class DyDiLA(LinearAttention):
    """Linear attention with routed projections and kernels, and differences of tokens."""

    Config = Config
    shared: nn.Linear
    projection: Literal["redundancy", "replace", "none"]
    projector_routers: Any
    kernel_routers: Any
    differential_routers: Any
    paper = "DyDi-LiT, 2601.13683"
    plot_style = ("#D55E00", "D")
    core = "token_difference"
    joined = *LinearAttention.joined, "measured", "factor", "finish"
    tensors_crossed = 8.0  # also the routed queries and keys

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        dim = self.dim
        self.normalizer = config.normalizer
        # Nothing but the difference reads Q' and K'.
        is_unread = (config.projection, config.differential) == ("redundancy", "none")
        self.projection = "none" if is_unread else config.projection
        parts = 1 if config.projection == "replace" else 3
        self.shared = xavier_linear(dim, parts * dim, config.qkv_bias)
        self.proj = xavier_linear(dim, dim, bias=True)
        if self.projection != "none":
            self.projectors = nn.ParameterDict()
            self.projector_routers = nn.ModuleDict()
            for z in ("query", "key"):
                weight = torch.empty(config.n_projectors, dim, dim)
                for projector in weight:
                    nn.init.xavier_uniform_(projector)
                self.projectors[z] = nn.Parameter(weight)
                self.projector_routers[z] = Router(dim, config.n_projectors)
        # What the kernel is applied to; a prime marks the redundancy.
        sides = ["query", "key"]
        if config.differential != "none":
            sides += ["query_prime", "key_prime"]
        if config.kernel == "routed":
            spread = torch.linspace(-1, 1, config.n_kernel_factors) * config.gamma_jitter
            self.gamma = nn.Parameter(config.gamma_init + spread[None])
            self.kernel_routers = nn.ModuleDict(
                {z: Router(dim, config.n_kernel_factors) for z in sides}
            )
        if config.differential != "none":
            start = config.lambda_init
            if start == "increasing":
                # Differential Transformer's schedule, which the paper's Table 6 mimics.
                start = 0.8 - 0.6 * math.exp(-0.3 * context.layer_index)
            start = torch.full((1, config.n_differential_factors), float(start))
            self.lambda_ = nn.Parameter(start)
            sides = ["query", "key"] if config.differential == "token" else ["map"]
            self.differential_routers = nn.ModuleDict(
                {z: Router(2 * dim, config.n_differential_factors) for z in sides}
            )
        if config.conv != "none":
            self.conv = DepthwiseConv(dim, config.conv)

    def unserved_option(self) -> str | None:
        """See ``LinearAttention``."""
        return unserved_option(self)

    def fused(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``LinearAttention``."""
        return fused_forward(self, x, grid)

    def attend(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Mapping[str, Route]]:
        """See ``LinearAttention.attend``."""
        if self.config.differential == "map" and serves_maps(self, x):
            return map_forward(self, x, grid), {}
        out, routes = super().attend(x, grid)
        if self.training and self.config.balance_coefficient:
            losses = [balance_loss(r) for r in routes.values() if r.logits is not None]
            if losses:
                self.auxiliary_loss = self.config.balance_coefficient * torch.stack(losses).mean()
        return out, routes

    def project(self, x: Tensor, grid: tuple[int, int]) -> Sequence[Tensor | None]:
        """See ``LinearAttention``; routed projections may replace Q and K."""
        *pair, value = linear_parts(self.shared, x, self.dim)
        return [*(pair or (None, None)), value]

    def project_query(self, x: Tensor) -> Tensor | None:
        """See ``project``."""
        if self.projection == "replace":
            return None
        return linear_parts(self.shared, x, self.dim, slice(1))[0]

    def project_key_value(self, x: Tensor) -> Sequence[Tensor | None]:
        """See ``project``."""
        if self.projection == "replace":
            return None, linear(self.shared, x)
        return linear_parts(self.shared, x, self.dim, slice(1, None))

    def queries(
        self, query: Tensor | None, x: Tensor, grid: tuple[int, int], span: slice = slice(None)
    ) -> Features:
        """See ``LinearAttention``."""
        return self._routed_features(query, x, "query")

    def keys(
        self, key: Tensor | None, x: Tensor, grid: tuple[int, int], span: slice = slice(None)
    ) -> Features:
        """Keys, from the tokens to what the core multiplies."""
        return self._routed_features(key, x, "key")

    def _routed_features(self, shared: Tensor | None, x: Tensor, side: str) -> Features:
        config, routes, gradient = self.config, {}, self.config.router_gradient
        # The fused kernels report no decisions; the parts they stand for do.
        impl: Impl = "auto" if config.impl == "triton" else config.impl
        pair = [] if shared is None else [shared]
        if self.projection != "none":
            routed = decide(self.projector_routers[side].weight, [x], gradient)
            pair.append(routed_linear(x, self.projectors[side], routed.index, impl=impl))
            pair[-1] = gated(pair[-1], routed, gradient, impl=impl)
            routes[f"projector.{side}"] = routed
        is_token, has_sums = config.differential == "token", config.normalizer in ("base", "diff")
        factor, weights = None, []
        if is_token and config.kernel == "routed":
            weights = [self.kernel_routers[z].weight for z in (side, f"{side}_prime")]
            weights += [self.differential_routers[side].weight, self.gammas(), self.lambda_]
        if weights and is_few("focused_difference", impl, *pair, *weights):
            *pair, chosen = focused_difference([*pair, *weights])
            names = f"kernel.{side}", f"kernel.{side}_prime", f"differential.{side}"
            routes |= dict(zip(names, map(Route, chosen, (None,) * 3), strict=True))
        else:
            for i, z in enumerate(pair):
                name = side if i == 0 else f"{side}_prime"
                pair[i], decided = self.measured(z, name, impl)
                routes |= {f"kernel.{name}": decided} if decided else {}
            if is_token or (config.differential == "map" and side == "query"):
                kind = side if is_token else "map"
                factor, decided = self.factor(pair, kind, impl)
                routes[f"differential.{kind}"] = decided
                if is_token:  # the token differential operator, Eq. 8
                    factor = factor.to(pair[0].dtype)
                    pair[1] = torch.addcmul(pair[0], factor, pair[1], value=-1)
        terms = norms = [z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in pair]
        if is_token:
            terms, norms = terms[1:], terms[:1] if config.normalizer == "base" else terms[1:]
        factor = None if is_token or factor is None else factor.unsqueeze(1)
        return Features(terms, norms if has_sums else [], factor, routes)

    def factor(self, pair: Sequence[Tensor], kind: str, impl: Impl) -> tuple[Tensor, Route]:
        """The factor of a difference that a pair of features chooses, (b, n or 1, 1) (Eq. 7)."""
        if kind == "map" and self.config.map_router == "image":
            pair = [z.mean(1, keepdim=True) for z in pair]
        router, gradient = self.differential_routers[kind].weight, self.config.router_gradient
        return pick(router, pair, self.lambda_[0], gradient, self._picking(impl))

    def _picking(self, impl: Impl) -> Impl:
        """How to take decisions: a balance loss wants logits that have a gradient."""
        is_balanced = self.training and self.config.balance_coefficient
        return "torch" if is_balanced and impl == "auto" else impl

    def measured(self, z: Tensor, name: str, impl: Impl) -> tuple[Tensor, Route | None]:
        """The measure kernel of Eq. 5, with the token's own power (Eq. 6), and the choices."""
        # Beyond float16's range a gradient of what comes next may be, and be small again.
        z, chosen = z.float() if z.dtype is torch.float16 else z, None
        if self.config.kernel == "relu":
            return F.relu(z), None
        if self.config.kernel == "fixed":
            power = self.config.gamma_init
            gamma = torch.full((1,), power, dtype=torch.float32, device=z.device)
        else:
            router, gradient = self.kernel_routers[name].weight, self.config.router_gradient
            gammas = self.gammas()[0]
            gamma, chosen = pick(router, [z], gammas, gradient, self._picking(impl))
        return power_map(z, gamma, impl=impl), chosen

    def gammas(self) -> Tensor:
        """The powers as they are used, (1, n_F)."""
        return self.gamma.clamp_min(1.0) if self.config.gamma_form == "clamp" else self.gamma

    def routes(self, x: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Every token's decisions, by router: "projector.query" and so on, each (batch, n)."""
        return {name: routed.index for name, routed in self.decisions(x, grid).items()}

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
        # Logits are stored only where a gradient may want them.
        with torch.enable_grad():
            routes = self.decisions(x, grid)
        found: dict[str, Any] = {}
        if self.config.kernel == "routed":
            found["gamma"] = self.gammas()
        if self.config.differential != "none":
            found["lambda"] = self.lambda_
        for name, routed in routes.items():
            kind, z = name.split(".")
            found[name] = getattr(self, f"{kind}_routers")[z].describe(routed)
        return as_numbers(found)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        n, parts = grid[0] * grid[1], super().macs_parts(grid)
        is_map = self.config.differential == "map"
        projections = self.shared.weight.numel() + self.dim**2
        if self.projection != "none":  # one of its projectors meets a token
            projections += 2 * self.dim**2
        routers = (router for router in self.modules() if isinstance(router, Router))
        routing = n * sum(router.weight.numel() for router in routers)
        if is_map and self.config.map_router == "image":
            routing -= (n - 1) * self.differential_routers["map"].weight.numel()
        core = parts["core"] * (2 if is_map else 1)
        return parts | {"projections": projections * n, "routing": routing, "core": core}


@register_attention("dydila-map")
class MapWiseDyDiLA(DyDiLA):
    """DyDiLA with differences of attention maps (Eq. 10)."""

    Config = MapConfig
    plot_style = ("#CC79A7", "^")
