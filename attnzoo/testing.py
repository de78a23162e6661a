"""The contract, as checks: every registered mechanism passes each of ``CHECKS``.

For a mechanism of your own::

    @pytest.mark.parametrize("check", attnzoo.testing.CHECKS, ids=lambda check: check.__name__)
    def test_contract(check):
        check("mine")
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnzoo.contract import Attention
from attnzoo.counting import count_macs
from attnzoo.registry import build_attention, get_attention

GRIDS = ((1, 1), (1, 7), (8, 8), (7, 13), (16, 24))
DIM = 48


def build_scrambled(name: str, dim: int = DIM, seed: int = 0, **options: Any) -> Attention:
    """Builds a mechanism in eval mode with every parameter moved off its start value.

    Zero-initialized parts and ties between equal scalars would hide errors.
    """
    torch.manual_seed(seed)
    layer = build_attention(name, dim, layer_index=1, depth=3, **options).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * (parameter.std(correction=0) + 0.1))
        for module in layer.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.get_buffer("running_mean").normal_(std=0.1)
                module.get_buffer("running_var").uniform_(0.5, 2.0)
    return layer


def reference_of(layer: Attention) -> Attention | None:
    """The same weights computed by ``impl="reference"``, or None if there is only one way."""
    if not hasattr(layer.config, "impl"):
        return None
    reference = copy.deepcopy(layer)
    for module in reference.modules():  # parts have settings of their own
        config: Any = getattr(module, "config", None)
        if dataclasses.is_dataclass(config) and hasattr(config, "impl"):
            replaced: Any = dataclasses.replace(config, **{"impl": "reference"})  # pyright: ignore
            module.config = replaced
    return reference


def tokens(grid: tuple[int, int], batch: int = 2, dim: int = DIM, seed: int = 1) -> Tensor:
    """Standard normal tokens, (batch, h * w, dim)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, grid[0] * grid[1], dim, generator=generator)


def outputs_and_gradients(layer: Attention, x: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Output, gradient of the input and of every parameter, in float64, for a fixed cotangent."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = layer(x, grid)
    generator = torch.Generator().manual_seed(2)
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    found = {"output": out.detach(), "grad x": x.grad}
    found |= {f"grad {name}": p.grad for name, p in layer.named_parameters()}
    return {key: value.double() for key, value in found.items() if value is not None}


def deviations(layer: Attention, x: Tensor, grid: tuple[int, int]) -> dict[str, float]:
    """How far the layer is from its reference in float64, over the largest value of its kind.

    Returns:
        "output", "gradients" (largest), and "allowed output", "allowed gradients": four times what
        the float32 reference itself deviates from float64, and at least 64 float32 roundings.
    """
    reference = reference_of(layer)
    assert reference is not None
    exact = outputs_and_gradients(copy.deepcopy(reference).double(), x.double(), grid)
    own = outputs_and_gradients(reference, x, grid)
    fast = outputs_and_gradients(layer, x, grid)
    assert fast.keys() == exact.keys(), fast.keys() ^ exact.keys()
    result: dict[str, float] = {}
    for kind, keys in (("output", ["output"]), ("gradients", [k for k in exact if k != "output"])):
        scale = max(exact[key].abs().max().item() for key in keys) or 1.0
        result[kind] = max((fast[k] - exact[k]).abs().max().item() for k in keys) / scale
        slack = max((own[k] - exact[k]).abs().max().item() for k in keys) / scale
        result[f"allowed {kind}"] = max(4 * slack, 64 * torch.finfo(torch.float32).eps)
    return result


def check_shapes(name: str, **options: Any) -> None:
    """Tokens in, tokens of the same shape and dtype out, on every grid, for an empty batch too."""
    layer = build_scrambled(name, **options)
    for grid in GRIDS:
        for batch in (0, 1, 3):
            x = tokens(grid, batch)
            out = layer(x, grid)
            assert out.shape == x.shape, (grid, out.shape, x.shape)
            assert out.dtype == x.dtype, (grid, out.dtype, x.dtype)


def check_reference(name: str, **options: Any) -> None:
    """The fast path equals the reference: outputs, gradients of the input and of parameters."""
    layer = build_scrambled(name, **options)
    if reference_of(layer) is None:
        return
    for grid, batch in zip((*GRIDS, (1, 1)), (1, 3, 1, 3, 1, 3), strict=True):
        found = deviations(layer, tokens(grid, batch), grid)
        for kind in ("output", "gradients"):
            assert found[kind] <= found[f"allowed {kind}"], (grid, batch, found)


def check_batch_invariance(name: str, **options: Any) -> None:
    """An image's output does not depend on its neighbors, not even if one of them is NaN."""
    layer = build_scrambled(name, **options)
    grid = (7, 13)
    x = tokens(grid, batch=3)
    together = layer(x, grid)
    alone = torch.cat([layer(image[None], grid) for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    poisoned = x.clone()
    poisoned[0, 5] = float("nan")
    out = layer(poisoned, grid)
    torch.testing.assert_close(out[1:], together[1:], rtol=1e-5, atol=1e-5)
    assert out[0].isnan().any(), "a NaN in the input must show in the output"


def check_finite(name: str, **options: Any) -> None:
    """Zero, constant and dead tokens give finite outputs and gradients."""
    layer = build_scrambled(name, **options)
    grid = (8, 8)
    dead = tokens(grid)
    dead[:, ::3] = 0
    for x in (
        torch.zeros(2, 64, DIM),
        torch.ones(2, 64, DIM),
        -1e3 * dead.abs(),
        dead,
        1e-8 * dead,
    ):
        for key, value in outputs_and_gradients(layer, x, grid).items():
            assert value.isfinite().all(), key


def check_half_precision(name: str, **options: Any) -> None:
    """float16 and bfloat16, cast or under autocast: finite at 4096 tokens, near to float64."""
    layer = build_scrambled(name, **options)
    large = 8 * tokens((64, 64), batch=1)
    small, grid = tokens((8, 8)), (8, 8)
    exact = copy.deepcopy(layer).double()(small.double(), grid)
    for dtype, budget in ((torch.float16, 2e-2), (torch.bfloat16, 1e-1)):
        cast = copy.deepcopy(layer).to(dtype)
        with torch.no_grad():
            assert cast(large.to(dtype), (64, 64)).isfinite().all(), dtype
            error = (cast(small.to(dtype), grid).double() - exact).norm() / exact.norm()
            assert error < budget, (dtype, error)
            with torch.autocast("cpu", dtype):
                assert layer(large, (64, 64)).isfinite().all(), f"autocast {dtype}"
                error = (layer(small, grid).double() - exact).norm() / exact.norm()
            assert error < budget, (f"autocast {dtype}", error)


def check_macs(name: str, **options: Any) -> None:
    """The closed form, where there is one, is what runs, per part, and grows with the grid."""
    layer = build_scrambled(name, **options)
    if type(layer).macs_parts is Attention.macs_parts:
        return
    count_macs(layer, grid=(3, 5))  # refuses a difference
    parts = layer.macs_parts((8, 8))
    assert set(parts) <= {"projections", "core", "routing", "conv"}, parts
    assert layer.macs((8, 8)) == sum(parts.values()) < layer.macs((16, 24))


def check_attention_map(name: str, **options: Any) -> None:
    """The map, where there is one, is (batch, heads, n, n) and finite."""
    layer = build_scrambled(name, **options)
    if type(layer).attention_map is Attention.attention_map:
        return
    weights = layer.attention_map(tokens((4, 6)), (4, 6))
    assert weights.shape[0] == 2 and weights.shape[2] == 24, weights.shape
    assert weights.isfinite().all()


def check_bad_input(name: str, **options: Any) -> None:
    """Wrong grids, widths and options raise errors that name the value and the remedy."""
    layer = build_scrambled(name, **options)
    _raises(ValueError, "grid=3x5", layer, tokens((4, 4)), (3, 5))
    _raises(ValueError, str(DIM), layer, tokens((4, 4), dim=DIM + 1), (4, 4))
    _raises(ValueError, "num_heads=5", build_attention, name, DIM, num_heads=5)
    _raises(ValueError, "dim", build_attention, name, 0)
    known = [field.name for field in dataclasses.fields(get_attention(name).Config)]
    if known:
        typo = {known[0] + "z": 1}
        _raises(TypeError, repr(known[0]), lambda: build_attention(name, DIM, **typo))


def _raises(
    kind: type[Exception], fragment: str, call: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    try:
        call(*args, **kwargs)
    except kind as error:
        assert fragment in str(error), f"{error} does not name {fragment}"
    else:
        raise AssertionError(f"{call} did not raise {kind.__name__}")


CHECKS: tuple[Callable[..., None], ...] = (
    check_shapes,
    check_reference,
    check_batch_invariance,
    check_finite,
    check_half_precision,
    check_macs,
    check_attention_map,
    check_bad_input,
)
