"""Triton kernels behind ``attnzoo.ops.fused``, and the functions that launch them.

Importing this module needs Triton; nothing imports it unasked. Every kernel computes in float32
and runs under Triton's interpreter on a CPU. No launch waits for the device: sizes that depend on
the data (how many tokens chose an expert) stay there.
"""

from attnzoo.ops.kernels.convolution import stencil, stencil_weight_gradient
from attnzoo.ops.kernels.difference import difference_forward
from attnzoo.ops.kernels.difference_gradients import difference_backward
from attnzoo.ops.kernels.grouped import (
    grouped_product,
    grouped_weight_gradient,
    sort_by_expert,
    top1,
)
from attnzoo.ops.kernels.power_map import power_map_backward, power_map_forward

__all__ = [
    "difference_backward",
    "difference_forward",
    "grouped_product",
    "grouped_weight_gradient",
    "power_map_backward",
    "power_map_forward",
    "sort_by_expert",
    "stencil",
    "stencil_weight_gradient",
    "top1",
]
