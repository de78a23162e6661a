"""The scan of Mamba-2 (SSD, arXiv 2405.21060): one decay per head and token.

H_t = exp(g_t) H_{t-1} + B_t x_t^T and y_t = C_t^T H_t per head; all heads share B and C.
"""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.dispatch import Impl, choose
from attnzoo.ops.gated_scan import is_counted
from attnzoo.ops.ssd_scan.reference import ssd_scan as _recurrence
from attnzoo.ops.ssd_scan.torch import ssd_block

__all__ = ["ssd_block", "ssd_scan", "ssd_scan_macs"]


def ssd_scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, impl: Impl = "auto") -> Tensor:
    """Scans tokens in their order; time and memory are linear in n.

    The state is in float32 or better whatever autocast says.

    Args:
        x: (batch, n, heads, d), multiplied by the step sizes.
        log_decay: (batch, n, heads), not positive.
        b: What the state takes in, (batch, n, s).
        c: What is read of the state, (batch, n, s).
        impl: "torch" multiplies matrices inside chunks of 64 tokens. "fla" is
            flash-linear-attention's kernel of the same recurrence, on a GPU.

    Returns:
        (batch, n, heads, d), in the dtype of ``x``.

    Raises:
        Unavailable: The library cannot be imported, or not run on these tensors.
    """
    if is_counted():
        state = b.transpose(1, 2) @ (x * log_decay.unsqueeze(-1)).flatten(2)
        return (c @ state).view_as(x)
    chosen = choose("ssd_scan", impl, x)
    if chosen == "reference":
        return _recurrence(x, log_decay, b, c)
    if chosen == "fla":
        from attnzoo.ops.ssd_scan import fla

        return fla.ssd_scan(x, log_decay, b, c)
    return ssd_block(x, log_decay, b, c, None)[0].to(x.dtype)


def ssd_scan_macs(tokens: int, channels: int, state_dim: int) -> int:
    """Multiply-accumulates of one scan, as the recurrence does them: B x^T and C^T H.

    Products inside chunks of 64 tokens are 64 (channels + state_dim) a token on top.
    """
    return 2 * tokens * channels * state_dim
