"""Gated linear attention by PyTorch's operators, chunk by chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.dispatch import Impl, can_look
from attnzoo.ops.precision import in_float32

_CHUNK = 64
# exp(x) carries a relative error of |x| / 2^24: the two-factor form, whose exponents reach half of
# this, is left while that is small, long before it overflows.
_FACTOR_LIMIT = -60.0


@in_float32
def gated_linear_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor,
    state: Tensor | None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """``gated_linear_attention``, "auto" or "torch", of tokens that follow others.

    Args:
        query: See there; also for ``key``, ``value``, ``log_gate`` and ``impl``.
        state: What the tokens before left, (b, h, dk, dv); None if there are none.

    Returns:
        The outputs, (b, h, n, dv), and the state that is left, both in float32 or better.
    """
    # The loop over chunks is unrolled, so a compiler must take n as a constant: the range and the
    # narrow make it one. With a symbolic n it would spend minutes on the shapes of the chunks.
    n, size = len(range(query.shape[2])), 1
    while size < min(n, _CHUNK):
        size *= 2
    # Tokens of zeros at the end change no output before them.
    pad = -n % size
    query, key, value, log_gate = (
        F.pad(z.narrow(2, 0, n), (0, 0, 0, pad)).unflatten(2, (-1, size)).contiguous()
        for z in (query, key, value, log_gate)
    )  # (b, h, chunks, size, d)
    if impl == "auto" and can_look(query):
        is_mild = (log_gate.detach().sum(-2) > _FACTOR_LIMIT).all().item()
        form = _two_factors if is_mild else _doubling
    else:
        form = _doubling
    scores, query, key, total = form(query, key, log_gate)

    # What chunks hand on: S = diag(total) S + key^T v.
    updates = (key.transpose(-2, -1) @ value).unbind(2)
    state = torch.zeros_like(updates[0]) if state is None else state
    states = []
    for update, decay in zip(updates, total.unsqueeze(-1).unbind(2), strict=True):
        states.append(state)
        state = decay * state + update
    out = scores @ value + query @ torch.stack(states, dim=2)
    return out.flatten(2, 3)[:, :, :n], state


# Both forms below give, for chunks (..., size, dk): the weights inside each chunk, queries decayed
# since the chunk's start, keys decayed until its end, and the decay of the whole chunk.


def _two_factors(
    query: Tensor, key: Tensor, log_gate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp(G_i - G_j) as exp(G_i - c) exp(c - G_j), c half of the chunk's decay: one product."""
    cumulative = log_gate.cumsum(-2)
    last = cumulative[..., -1:, :]
    # No result depends on c. A gradient through it would only cancel, to rounding errors.
    center = last.detach() / 2
    factor = (cumulative - center).exp()
    query, key = query * factor, key / factor
    scores = (query @ key.transpose(-2, -1)).tril()
    return scores, query * center.exp(), key * (last - center).exp(), last.exp().squeeze(-2)


def _doubling(
    query: Tensor, key: Tensor, log_gate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks of 1, 2, 4, ... tokens joined pairwise: only ever multiplies by decays up to 1."""
    total = log_gate.exp().unsqueeze(-2)  # (..., blocks, 1, dk)
    query, key = query.unsqueeze(-2), key.unsqueeze(-2)  # (..., blocks, tokens, dk)
    scores = (query * key).sum(-1, keepdim=True)  # (..., blocks, tokens, tokens)
    query = query * total
    while query.shape[-3] > 1:
        tokens = query.shape[-2]
        (q0, q1), (k0, k1), (t0, t1), (s0, s1) = (
            z.unflatten(-3, (-1, 2)).unbind(-3) for z in (query, key, total, scores)
        )
        cross = q1 @ k0.transpose(-2, -1)
        scores = torch.cat([F.pad(s0, (0, tokens)), torch.cat([cross, s1], -1)], -2)
        query = torch.cat([q0, q1 * t0], -2)
        key = torch.cat([k0 * t1, k1], -2)
        total = t0 * t1
    return scores.squeeze(-3), query.squeeze(-3), key.squeeze(-3), total.flatten(-3)
