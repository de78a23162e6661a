"""The scan of Mamba-2 by PyTorch's operators: products inside chunks, a state between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.precision import in_float32

_CHUNK = 64


@in_float32
def ssd_block(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``ssd_scan`` of tokens that follow others.

    Args:
        x: See there; also for ``log_decay``, ``b`` and ``c``.
        state: What the tokens before left, (batch, heads, s, d); None if there are none.

    Returns:
        The outputs, (batch, n, heads, d), and the state that is left, both in float32 or better.
    """
    # A compiler unrolls the loop over chunks, so n must be a constant for it, as in gated_scan.
    n = len(range(x.shape[1]))
    size = min(n, _CHUNK)
    pad = -n % size  # tokens of zeros at the end, which decay nothing
    b, c = (F.pad(z, (0, 0, 0, pad)).unflatten(1, (-1, size)).unsqueeze(2) for z in (b, c))
    x = F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, size)).transpose(2, 3)
    gates = F.pad(log_decay, (0, 0, 0, pad)).unflatten(1, (-1, size)).transpose(2, 3)
    # From here on: b, c (batch, chunks, 1, size, s), x (batch, chunks, heads, size, d) and gates
    # (batch, chunks, heads, size).
    decays = _decays(gates)
    since_start = gates.cumsum(-1).exp().unsqueeze(-1)
    out = (c @ b.transpose(-2, -1) * decays) @ x
    updates = b.transpose(-2, -1) @ (x * decays[..., -1, :].unsqueeze(-1))
    states = []
    state = torch.zeros_like(updates[:, 0]) if state is None else state
    totals = since_start[..., -1:, :].unbind(1)
    for update, total in zip(updates.unbind(1), totals, strict=True):
        states.append(state)
        state = total * state + update
    del updates, update  # as many numbers as all states
    out = out + c @ torch.stack(states, dim=1) * since_start
    return out.transpose(2, 3).flatten(1, 2).narrow(1, 0, n), state


def _decays(gates: Tensor) -> Tensor:
    """exp(sum of gates after j up to i) at (i, j), 0 for j > i: (..., size) -> (..., size, size).

    Each sum is made of its own terms: a difference of running sums would forget, after one strong
    decay, how much weak ones add up to.
    """
    size = gates.shape[-1]
    is_later = torch.ones(size, size, dtype=torch.bool, device=gates.device).tril(-1)
    sums = torch.where(is_later, gates.unsqueeze(-1), 0).cumsum(-2)
    # Before the exponential, whose gradient would be 0 times infinity there.
    return sums.masked_fill_(is_later.T, -torch.inf).exp_()
