"""Correct before fast: the comparison with the twin that stands before each measurement."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from attnzoo import testing
from attnzoo.contract import Attention
from bench.cells import Cell

# Tokens along one side of the small sibling: large enough for several chunks and all experts.
SIBLING_SIDE = 12
# Relative error of an output that half precision explains; the contract's own budgets.
HALF_PRECISION_BUDGET = {"bfloat16": 1e-1, "float16": 2e-2}


class WrongResult(Exception):
    """The fast path differs from its twin."""


def check_key(cell: Cell) -> str:
    """What ``check_layer`` depends on: cells that agree in it need one check between them."""
    side = min(cell.side, SIBLING_SIDE)
    place = "backbone" if cell.kind == "backbone" else "layer"  # whose heads and options differ
    return (
        f"{place} {cell.mechanism}{cell.options} d{cell.width} {cell.dtype} {cell.device} {side}"
    )


def check_layer(
    mechanism: str, options: dict[str, Any], width: int, dtype: str, device: str, side: int
) -> dict[str, Any]:
    """Compares a mechanism's fast path with its reference on a small grid.

    float32 on a CPU uses ``attnzoo.testing.deviations``: output and all gradients against the
    twin in float64, with the float32 twin's own deviation as the measure. Elsewhere outputs are
    compared in norm, since a token that chooses another expert after rounding moves its whole row.

    Returns:
        What was found, for the record.

    Raises:
        WrongResult: It differs beyond what the precision explains.
    """
    side = min(side, SIBLING_SIDE)
    layer = testing.build_scrambled(mechanism, width, **options)
    if testing.reference_of(layer) is None:
        return {"sibling": f"{side}x{side}", "twin": "none"}
    x = testing.tokens((side, side), batch=2, dim=width)
    if dtype == "float32" and device == "cpu":
        found = testing.deviations(layer, x, (side, side))
        # Inference may take a path of its own.
        found["inference"] = _inference_error(layer, x, (side, side))
        found["allowed inference"] = 1e-4
    else:
        found = _half_deviations(layer, x, (side, side), dtype, device)
    for kind in ("output", "gradients", "inference"):
        if kind in found and not found[kind] <= found[f"allowed {kind}"]:
            raise WrongResult(
                f"{mechanism} differs from its twin at {side}x{side} tokens of width {width}: "
                f"{kind} by {found[kind]:.1e}, allowed {found[f'allowed {kind}']:.1e}"
            )
    return {"sibling": f"{side}x{side}"} | {key: float(value) for key, value in found.items()}


def _half_deviations(
    layer: Attention, x: Tensor, grid: tuple[int, int], dtype: str, device: str
) -> dict[str, float]:
    kind = getattr(torch, dtype)
    fast = layer.to(device, kind)
    twin = testing.reference_of(fast)
    assert twin is not None
    x = x.to(device, kind)
    with torch.no_grad():
        exact = copy.deepcopy(twin).double()(x.double(), grid)
        own, found = twin(x, grid), fast(x, grid)
    reference = relative_error(own, exact)
    budget = HALF_PRECISION_BUDGET.get(dtype, 1e-4)
    return {
        "output": relative_error(found, exact),
        "allowed output": max(4 * reference, budget),
    }


def check_gradients(mechanism: str, options: dict[str, Any], width: int, device: str) -> float:
    """Compares output and all gradients on a device with the twin's in float64, in norm.

    Returns:
        The relative error in float32.

    Raises:
        WrongResult: It is more than float32 explains.
    """
    grid = (SIBLING_SIDE, SIBLING_SIDE)
    layer = testing.build_scrambled(mechanism, width, **options).to(device)
    twin = testing.reference_of(layer)
    assert twin is not None
    x = testing.tokens(grid, batch=2, dim=width).to(device)
    exact = testing.outputs_and_gradients(copy.deepcopy(twin).double(), x.double(), grid)
    found, own = (testing.outputs_and_gradients(z, x, grid) for z in (layer, twin))
    error, reference = (
        relative_error(torch.cat([z[key].double().flatten() for key in exact]),
                       torch.cat([exact[key].flatten() for key in exact]))
        for z in (found, own)
    )  # fmt: skip
    if not error <= max(4 * reference, 1e-3):
        raise WrongResult(
            f"{mechanism}'s training step differs from its twin on {device} by {error:.1e}"
        )
    return error


def _inference_error(layer: Attention, x: Tensor, grid: tuple[int, int]) -> float:
    twin = testing.reference_of(layer)
    assert twin is not None
    with torch.no_grad():
        return relative_error(layer(x, grid), twin.double()(x.double(), grid))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of ``exact``; infinite if something is not finite."""
    if not bool(found.isfinite().all()):
        return float("inf")
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def check_equal(name: str, found: Tensor, expected: Tensor) -> float:
    """Compares a peer's output with ours.

    Raises:
        WrongResult: They are not the same mathematics.
    """
    error = relative_error(found, expected)
    allowed = HALF_PRECISION_BUDGET.get(str(expected.dtype).removeprefix("torch."), 1e-4)
    if not error <= allowed:
        raise WrongResult(f"{name} differs from attnzoo by {error:.1e}, allowed {allowed:.1e}")
    return error
