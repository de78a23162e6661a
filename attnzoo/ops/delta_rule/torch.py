"""The gated delta rule by PyTorch's operators: chunks with one triangular system each.

With A_t the decay since the chunk's start and S the state that enters it, the corrections
u_t = b_t (v_t - A_t S^T k_t - sum_(s<t) A_t/A_s (k_t k_s) u_s) are a unit lower triangular system
in u. Its solution is W - Y S, of which W and Y are found for all chunks at once, before any S.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.gated_scan import is_counted_as_recurrence
from attnzoo.ops.precision import in_float32

_CHUNK = 64


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor
) -> Tensor:
    """See ``attnzoo.ops.delta_rule``."""
    if not torch.compiler.is_compiling() and is_counted_as_recurrence():
        state = key.transpose(-2, -1) @ value  # as many products as the recurrence has
        return (query * strength.unsqueeze(-1)) @ state + (key * log_decay.unsqueeze(-1)) @ state
    out, _ = gated_delta_block(query, key, value, log_decay, strength, None)
    return out.to(query.dtype)


@in_float32
def gated_delta_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    strength: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``gated_delta_rule`` of tokens that follow others.

    Args:
        query: See there; also for ``key``, ``value``, ``log_decay`` and ``strength``.
        state: What the tokens before left, (b, h, dk, dv); None if there are none.

    Returns:
        The outputs, (b, h, n, dv), and the state that is left, both in float32 or better.
    """
    # As in gated_scan: a compiler must take n as a constant, for the loop over chunks.
    n, size = len(range(query.shape[2])), 1
    while size < min(n, _CHUNK):
        size *= 2
    # A token of strength 0 writes nothing, and without a decay the state passes by.
    pad = -n % size
    query, key, value = (
        F.pad(z.narrow(2, 0, n), (0, 0, 0, pad)).unflatten(2, (-1, size))
        for z in (query, key, value)
    )  # (b, h, chunks, size, d)
    log_decay, strength = (
        F.pad(z.narrow(2, 0, n), (0, pad)).unflatten(2, (-1, size)) for z in (log_decay, strength)
    )
    strength = strength.unsqueeze(-1)

    # Entry (t, s) is the sum of the decays after s up to t. Summed and not subtracted, because
    # after a strong decay a difference of sums would have forgotten the weak ones; masked before
    # the exponential, because infinity times 0 in its gradient is NaN.
    is_later = torch.ones(size, size, dtype=torch.bool, device=query.device).tril(-1)
    between = log_decay.unsqueeze(-1).expand(*log_decay.shape, size)
    between = between.masked_fill(~is_later, 0).cumsum(-2)
    decay = between.masked_fill(is_later.mT, -torch.inf).exp()
    since = log_decay.cumsum(-1).exp().unsqueeze(-1)
    until = between[..., -1, :].exp().unsqueeze(-1)
    total = log_decay.sum(-1).exp()[..., None, None]

    scores = (query @ key.mT) * decay
    system = (strength * (key @ key.mT) * decay).tril(-1)
    right = strength * torch.cat([value, since * key], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, erased = solved.split([value.shape[-1], key.shape[-1]], -1)

    # What chunks hand on.
    kept = (until * key).mT
    if state is None:
        state = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    states, corrections = [], []
    for z, y, k, a in zip(*(z.unbind(2) for z in (written, erased, kept, total)), strict=True):
        states.append(state)
        corrections.append(z - y @ state)
        state = a * state + k @ corrections[-1]
    out = scores @ torch.stack(corrections, 2) + (since * query) @ torch.stack(states, 2)
    return out.flatten(2, 3)[:, :, :n], state
