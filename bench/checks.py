"""Correct before fast: the comparison with the reference that stands before each measurement."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from attnzoo import testing
from attnzoo.contract import Attention

# Tokens along one side of the small sibling: large enough for several chunks and all experts.
SIBLING_SIDE = 12
# Relative error of an output that half precision explains; the contract's own budgets.
HALF_PRECISION_BUDGET = {"bfloat16": 1e-1, "float16": 2e-2}


class WrongStep(Exception):
    """A treatment computes something else than the eager step."""


class WrongResult(Exception):
    """The fast path differs from its reference."""


def check_layer(
    mechanism: str, options: dict[str, Any], width: int, dtype: str, device: str, side: int
) -> dict[str, Any]:
    """Compares a mechanism's fast path with its reference on a small grid.

    Outputs are compared in norm, since a token that chooses another expert after rounding moves
    its whole row; and so is every gradient by itself, since a small one would hide among others.
    In float32 on a CPU ``attnzoo.testing.deviations`` comes first: output and all gradients
    against the reference in float64.

    Returns:
        What was found, for the record.

    Raises:
        WrongResult: It differs beyond what the precision explains.
    """
    side = min(side, SIBLING_SIDE)
    grid, layer = (side, side), testing.build_scrambled(mechanism, width, **options)
    layer = layer.to(device, getattr(torch, dtype))
    reference = testing.reference_of(layer)
    if reference is None:
        return {"sibling": f"{side}x{side}", "reference": "none"}
    x = testing.tokens(grid, batch=2, dim=width).to(device, getattr(torch, dtype))
    has_gradients = dtype == "float32" and device == "cpu"
    found = testing.deviations(layer, x, grid) if has_gradients else {}
    what = "inference" if has_gradients else "output"  # inference may take a path of its own
    with torch.no_grad():
        exact = copy.deepcopy(reference).double()(x.double(), grid)
        own = relative_error(reference(x, grid), exact)
        found[what] = relative_error(layer(x, grid), exact)
    found[f"allowed {what}"] = max(4 * own, HALF_PRECISION_BUDGET.get(dtype, 1e-4))
    if not has_gradients:
        least = 2 * HALF_PRECISION_BUDGET.get(dtype, 1e-4)
        found |= _gradients(layer, reference, x, grid, least)
    for kind in ("output", "gradients", "inference"):
        if kind in found and not found[kind] <= found[f"allowed {kind}"]:
            raise WrongResult(
                f"{mechanism} differs from its reference at {side}x{side} tokens of width "
                f"{width}: {kind} by {found[kind]:.1e}, allowed {found[f'allowed {kind}']:.1e}"
            )
    return {"sibling": f"{side}x{side}"} | {key: float(value) for key, value in found.items()}


def _gradients(
    layer: Attention, reference: Any, x: Tensor, grid: tuple[int, int], least: float
) -> dict[str, float]:
    """Of all gradients the one that is furthest off for what is allowed, ``least`` or more.

    Of one that the reference itself has wrong by a quarter, which is a router's of few tokens,
    nothing can be told: zeros would do.
    """
    exact, own, fast = (
        testing.outputs_and_gradients(model, z, grid)
        for model, z in (
            (copy.deepcopy(reference).double(), x.double()), (reference, x), (layer, x)
        )
    )  # fmt: skip
    pairs = [
        (relative_error(fast[key], exact[key]), max(4 * told, least))
        for key in exact
        if key != "output" and exact[key].norm() > 0
        and (told := relative_error(own[key], exact[key])) < 1 / 4
    ]  # fmt: skip
    nothing = float("inf"), least
    error, allowed = max(pairs, key=lambda pair: pair[0] / pair[1], default=nothing)
    return {"gradients": error, "allowed gradients": allowed}


def check_gradients(mechanism: str, options: dict[str, Any], width: int, device: str) -> float:
    """Compares output and all gradients on a device with the reference's in float64, in norm.

    Returns:
        The relative error in float32.

    Raises:
        WrongResult: It is more than float32 explains.
    """
    grid = (SIBLING_SIDE, SIBLING_SIDE)
    layer = testing.build_scrambled(mechanism, width, **options).to(device)
    reference: Any = testing.reference_of(layer)
    x = testing.tokens(grid, batch=2, dim=width).to(device)

    def everything(model: Attention, x: Tensor) -> Tensor:
        found = testing.outputs_and_gradients(model, x, grid)
        return torch.cat([found[name].double().flatten() for name in sorted(found)])

    exact = everything(copy.deepcopy(reference).double(), x.double())
    error, own = (relative_error(everything(z, x), exact) for z in (layer, reference))
    if not error <= max(4 * own, 1e-3):
        raise WrongResult(
            f"{mechanism}'s training step differs from its reference on {device} by {error:.1e}"
        )
    return error


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of ``exact``; infinite if something is not finite."""
    if not bool(found.isfinite().all()):
        return float("inf")
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def require_close(name: str, found: Tensor, exact: Tensor, allowed: float | None = None) -> float:
    """The relative error.

    Args:
        name: Of what is compared.
        found: The output.
        exact: What it should be.
        allowed: By default what the dtype of ``exact`` explains.

    Raises:
        WrongResult: It is larger than ``allowed``.
    """
    if allowed is None:
        dtype = str(exact.dtype).removeprefix("torch.")
        allowed = HALF_PRECISION_BUDGET.get(dtype, 1e-4)
    error = relative_error(found, exact)
    if not error <= allowed:
        raise WrongResult(f"{name} is off by {error:.1e}, allowed {allowed:.1e}")
    return error
