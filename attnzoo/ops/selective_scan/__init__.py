"""The selective scan of Mamba (arXiv 2312.00752): a recurrence whose steps depend on the tokens.

H_t = exp(dt_t A) H_{t-1} + (dt_t x_t) B_t^T and y_t = H_t C_t, a state for each channel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.ops.dispatch import MACS, Impl, operator
from attnzoo.ops.selective_scan.torch import selective_block

__all__ = ["selective_block", "selective_scan", "selective_scan_macs"]


@operator
def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """Scans tokens in their order; time and memory are linear in n.

    The state is in float32 or better whatever autocast says.

    Args:
        x: (batch, n, d).
        dt: Step sizes, (batch, n, d), not negative.
        a: Rates, (d, s), not positive.
        b: What the state takes in, (batch, n, s).
        c: What is read of the state, (batch, n, s).
        impl: "torch" stores the state of every 64th token and computes the others again in the
            backward. "triton" is this package's kernels, which store that of every 16th; "mamba"
            is mamba_ssm's, on a GPU.

    Returns:
        (batch, n, d), in the dtype of ``x``.

    Raises:
        Unavailable: The library cannot be imported, or not run on these tensors.
    """
    ...


def selective_scan_macs(tokens: int, channels: int, state_dim: int) -> int:
    """Multiply-accumulates of one scan: (dt x) B^T and H C; decays are element-wise."""
    return 2 * tokens * channels * state_dim


def _macs(x: Tensor, _: Tensor, a: Tensor, *__: Any, **___: Any) -> int:
    return selective_scan_macs(x.shape[0] * x.shape[1], *a.shape)


MACS |= {
    "selective_scan": _macs,
    "selective_scan_kernels": _macs,
    "selective_scan_kernels_backward": lambda _, __, *operands, **___: 2 * _macs(*operands),
    "selective_scan_backward": lambda _, *operands, **__: 2 * _macs(*operands),
}
