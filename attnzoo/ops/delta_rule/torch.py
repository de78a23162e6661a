"""The gated delta rule by PyTorch's operators: chunks with one triangular system each.

With A_t the decay since the chunk's start and S the state that enters it, the corrections
u_t = b_t (v_t - A_t S^T k_t - sum_(s<t) A_t/A_s (k_t k_s) u_s) are a unit lower triangular system
in u. Its solution is W - Y S, of which W and Y are found for all chunks at once, before any S.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnzoo.ops.dispatch import is_transformed
from attnzoo.ops.gated_scan import is_counted
from attnzoo.ops.precision import in_float32

_CHUNK = 64
_TOGETHER = 32  # chunks, which bound what is in memory at a time


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor
) -> Tensor:
    """See ``attnzoo.ops.delta_rule``."""
    if is_counted():
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
    if state is None:
        state = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    is_stored = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    is_stored = is_stored and not is_transformed()  # which takes no checkpoints
    left, outs = state, []
    for start in range(0, n, size * _TOGETHER):
        length = min(size * _TOGETHER, n - start)
        q, k, v, g, b = (
            z.narrow(2, start, length) for z in (query, key, value, log_decay, strength)
        )
        if is_stored:  # a dozen tensors as large as the operands: cheaper to compute them again
            found: Any = checkpoint(
                _chunks, q, k, v, g, b, left, size, use_reentrant=False, preserve_rng_state=False
            )
        else:
            found = _chunks(q, k, v, g, b, left, size)
        out, left = found
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2), left


def _chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    strength: Tensor,
    state: Tensor,
    size: int,
) -> tuple[Tensor, Tensor]:
    """``gated_delta_block`` by chunks of ``size`` tokens, all at once but for the state."""
    n, width = query.shape[2], value.shape[-1]
    # A token of strength 0 writes nothing, and without a decay the state passes by.
    if pad := -n % size:
        query, key, value = (F.pad(z, (0, 0, 0, pad)) for z in (query, key, value))
        log_decay, strength = (F.pad(z, (0, pad)) for z in (log_decay, strength))
    query, key, value, log_decay, strength = (
        z.unflatten(2, (-1, size)) for z in (query, key, value, log_decay, strength)
    )  # (b, h, chunks, size, ...)
    strength = strength.unsqueeze(-1)

    # Entry (t, s) is the sum of the decays after s up to t. Summed and not subtracted, because
    # after a strong decay a difference of sums would have forgotten the weak ones; masked before
    # the exponential, because infinity times 0 in its gradient is NaN.
    is_later = torch.ones(size, size, dtype=torch.bool, device=query.device).tril(-1)
    between = torch.where(is_later, log_decay.unsqueeze(-1), 0).cumsum(-2)
    until = between[..., -1, :].exp().unsqueeze(-1)
    decay = between.masked_fill(is_later.mT, -torch.inf).exp()
    del between
    since = log_decay.cumsum(-1).exp().unsqueeze(-1)
    total = log_decay.sum(-1).exp()[..., None, None]

    right = strength * torch.cat([value, since * key], -1)
    # Of the system only what is below the diagonal is read.
    system = strength * (key @ key.mT) * decay
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    del system, right
    written, erased = solved.split([width, key.shape[-1]], -1)

    # What a chunk makes of the state is a matrix times it, and what it adds: one product each.
    kept = (until * key).mT
    keeps = total * torch.eye(key.shape[-1], dtype=key.dtype, device=key.device) - kept @ erased
    pairs = ((kept @ written).flatten(0, 1), keeps.flatten(0, 1))
    states, left = [], state.flatten(0, 1)
    for added, keep in zip(*(z.unbind(1) for z in pairs), strict=True):
        states.append(left)
        left = torch.baddbmm(added, keep, left)
    entering = torch.stack(states, 1).unflatten(0, state.shape[:2])
    corrections = written - erased @ entering
    out = ((query @ key.mT) * decay) @ corrections + (since * query) @ entering
    return out.flatten(2, 3)[:, :, :n], left.unflatten(0, state.shape[:2])
