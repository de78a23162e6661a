"""The count of fvcore, with a handle for each operator that it skips, rounds or invents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnzoo.counting.formulas import fused_attention, grouped_product
from attnzoo.counting.result import Grid
from attnzoo.counting.subject import Runnable, grid_of, shadow_of
from attnzoo.errors import InvalidValue, Unavailable
from attnzoo.ops.dispatch import MACS
from attnzoo.ops.gated_scan import counted_as_recurrence


def fvcore_macs(
    model: nn.Module,
    *unnamed: Any,
    resolution: int | tuple[int, int] | None = None,
    grid: Grid | None = None,
) -> int:
    """Counts by fvcore, which traces a run of the model on CPU.

    Args:
        model: See ``count_macs``; with weights.
        *unnamed: See ``count_macs``.
        resolution: See ``count_macs``.
        grid: See ``count_macs``.

    Returns:
        Multiply-accumulates of one forward of one sample.

    Raises:
        InvalidType: See ``count_macs``.
        InvalidValue: An argument does not fit, or the model is on the meta device.
        Unavailable: fvcore is missing.
    """
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError as error:
        raise Unavailable("fvcore_macs needs fvcore: pip install 'attnzoo[bench]'") from error
    grid = grid_of(model, resolution, grid, *unnamed)
    if any(p.is_meta for p in model.parameters()):
        raise InvalidValue(
            "fvcore traces a run, and a model on the meta device has no weights to run with; "
            "build it on CPU, or use measure_macs"
        )
    runnable = Runnable(shadow_of(model, "cpu"), grid).eval()
    with counted_as_recurrence(), torch.no_grad():
        analysis = FlopCountAnalysis(runnable, runnable.inputs("cpu"))
        analysis.set_op_handle(**_handles())
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
        return int(analysis.total())


def _handles() -> dict[str, Any]:
    def handle(formula: Callable[..., int], factors: int = 2) -> Callable[..., int]:
        # Shapes stand in as meta tensors, so that both tools share their formulas.
        return lambda inputs, outputs: formula(*map(_stand_in, inputs[:factors]))

    handles: dict[str, Any] = {
        "aten::scaled_dot_product_attention": handle(fused_attention, 3),
        "aten::_scaled_dot_product_flash_attention_for_cpu": handle(fused_attention, 3),
        "attnzoo::routed_linear": handle(MACS["routed_linear"]),
        "attnzoo::selective_scan": handle(MACS["selective_scan"], 3),
        "attnzoo::neighborhood": _neighborhood,
        "aten::_grouped_mm": handle(grouped_product),
        "aten::baddbmm": handle(lambda _, left, right: left.numel() * right.shape[-1], 3),
        "aten::einsum": _einsum,
    }
    norms = ("batch_norm", "layer_norm", "group_norm", "instance_norm")
    resampling = ("adaptive_avg_pool2d", "upsample_bilinear2d", "upsample_nearest2d")
    return handles | {f"aten::{name}": lambda *_: 0 for name in (*norms, *resampling)}


def _stand_in(value: Any) -> torch.Tensor:
    return torch.empty(value.type().sizes(), device="meta")


def _neighborhood(inputs: list[Any], outputs: list[Any]) -> int:
    tensors, options = inputs[:3], inputs[3:]
    return MACS["neighborhood"](*map(_stand_in, tensors), *(z.toIValue() for z in options))


def _einsum(inputs: list[Any], outputs: list[Any]) -> int:
    # fvcore's own handle rounds to four digits.
    with FlopCounterMode(display=False) as counter:
        torch.einsum(inputs[0].toIValue(), *map(_stand_in, inputs[1].node().inputs()))
    return counter.get_total_flops() // 2
