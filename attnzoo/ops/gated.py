"""Gated linear attention (GLA, arXiv 2312.06635): a recurrence with one decay per key channel.

S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t and o_t = q_t S_t, computed chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.fla import fla_gated_linear_attention
from attnzoo.ops.precision import in_float32

GatedImpl = Literal["auto", "safe", "naive", "fla"]
Direction = Literal["forward", "backward", "columns-forward", "columns-backward"]

_CHUNK = 64
# exp(x) carries a relative error of |x| / 2^24: the two-factor form, whose exponents reach half of
# this, is left while that is small, long before it overflows.
_FACTOR_LIMIT = -60.0
_is_counting: ContextVar[bool] = ContextVar("_is_counting", default=False)


def gated_linear_attention_macs(tokens: int, key_dim: int, value_dim: int) -> int:
    """Multiply-accumulates of one head of one scan, as the recurrence does them.

    k_t^T v_t and q_t S_t take key_dim * value_dim each. The chunkwise forms trade the recurrence
    for products inside each chunk and do more: 64 (key_dim + value_dim) per token on top.
    """
    return 2 * tokens * key_dim * value_dim


@contextmanager
def counted_as_recurrence() -> Iterator[None]:
    """Inside, ``gated_linear_attention`` multiplies as the recurrence does, whatever ``impl``.

    Linear attention without gates stands in: it multiplies as much, forward and backward, and is
    quick to trace where the recurrence takes one step per token. Its numbers mean nothing.
    """
    token = _is_counting.set(True)
    try:
        yield
    finally:
        _is_counting.reset(token)


def gated_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor, impl: GatedImpl = "auto"
) -> Tensor:
    """Causal linear attention whose state decays by exp(log_gate) per key channel.

    Time and memory are linear in n.

    Args:
        query: (b, h, n, dk), scaled by the caller.
        key: (b, h, n, dk).
        value: (b, h, n, dv).
        log_gate: (b, h, n, dk), not positive.
        impl: "auto" looks at the gates and takes the fastest form that is exact for them;
            "safe" is exact for any gates and never looks at the data; "naive" is the twin below;
            "fla" is flash-linear-attention's kernel, on a GPU.
            "auto" is "safe" while compiling and everywhere but on a CPU: on the meta device there
            is nothing to look at, and a GPU would have to be waited for.

    Returns:
        (b, h, n, dv), in the dtype of ``query``; the state is kept in float32 or better.
    """
    if not torch.compiler.is_compiling() and _is_counting.get():
        return (query * log_gate.exp()) @ (key.transpose(-2, -1) @ value)
    if impl == "naive":
        return naive_gated_linear_attention(query, key, value, log_gate)
    if impl == "fla":
        return fla_gated_linear_attention(query, key, value, log_gate)
    return gated_linear_block(query, key, value, log_gate, None, impl)[0].to(query.dtype)


@in_float32
def naive_gated_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor
) -> Tensor:
    """Twin of ``gated_linear_attention``: the recurrence, token by token."""
    state = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    outputs = []
    # Unbound once: a select per step would make the backward quadratic in n.
    tokens = [z.unbind(2) for z in (query, key, value, log_gate.exp())]
    for q, k, v, decay in zip(*tokens, strict=True):
        state = decay.unsqueeze(-1) * state + k.unsqueeze(-1) @ v.unsqueeze(-2)
        outputs.append(q.unsqueeze(-2) @ state)
    return torch.cat(outputs, dim=2)


def _can_look(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


@in_float32
def gated_linear_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor,
    state: Tensor | None,
    impl: GatedImpl = "auto",
) -> tuple[Tensor, Tensor]:
    """``gated_linear_attention``, "auto" or "safe", of tokens that follow others.

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
    if impl == "auto" and _can_look(query):
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
    centre = last.detach() / 2
    factor = (cumulative - centre).exp()
    query, key = query * factor, key / factor
    scores = (query @ key.transpose(-2, -1)).tril()
    return scores, query * centre.exp(), key * (last - centre).exp(), last.exp().squeeze(-2)


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


def scan(x: Tensor, grid: tuple[int, int], direction: Direction) -> Tensor:
    """Puts tokens in the order of a scan.

    Args:
        x: (b, height * width, ...), row by row.
        grid: (height, width).
        direction: "backward" is the reverse of "forward", which is row by row; "columns-..." goes
            column by column.

    Returns:
        (b, height * width, ...).
    """
    if direction.startswith("columns"):
        x = x.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    return x.flip(1) if direction.endswith("backward") else x


def unscan(x: Tensor, grid: tuple[int, int], direction: Direction) -> Tensor:
    """Inverse of ``scan``."""
    x = x.flip(1) if direction.endswith("backward") else x
    if direction.startswith("columns"):
        x = x.unflatten(1, grid[::-1]).transpose(1, 2).flatten(1, 2)
    return x
