"""Fused operators for GPUs, written in Triton: custom operators with gradients.

They equal the eager operators of ``ops.routing``, ``ops.focused`` and ``ops.linear`` and wait for
nothing on the device, so that CUDA graphs and ``torch.compile`` take them. Importing this package
does not import Triton; calling an operator does. With ATTNZOO_TRITON=0 in the environment nothing
takes them unasked. Callers write ``fused.NAME``, so that a test can put something in its place.
"""

from attnzoo.ops.fused.attention import dynamic_differential_attention
from attnzoo.ops.fused.convolution import depthwise3x3
from attnzoo.ops.fused.difference import focused_difference
from attnzoo.ops.fused.power_map import relu_power_map
from attnzoo.ops.fused.products import (
    half_kernel_product,
    half_key_sums,
    half_matmul,
    half_read,
    has_half_sums,
)
from attnzoo.ops.fused.routing import (
    device_routed_projection,
    device_routed_projection_backward,
    grouped_projection,
    routed_pair,
)
from attnzoo.ops.fused.support import MOST_CHOICES, require_triton, runs_on

__all__ = [
    "MOST_CHOICES",
    "depthwise3x3",
    "device_routed_projection",
    "device_routed_projection_backward",
    "dynamic_differential_attention",
    "focused_difference",
    "grouped_projection",
    "half_kernel_product",
    "half_key_sums",
    "half_matmul",
    "half_read",
    "has_half_sums",
    "relu_power_map",
    "require_triton",
    "routed_pair",
    "runs_on",
]
