"""The selective scan by PyTorch's operators, chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.dispatch import custom_op
from attnzoo.ops.precision import in_float32

_CHUNK = 64


@in_float32
def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """See ``attnzoo.ops.selective_scan``."""
    return _scan(x, dt, a, b, c)[0]


@in_float32
def selective_block(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``selective_scan`` of tokens that follow others, without a gradient.

    Args:
        x: See there; also for ``dt``, ``a``, ``b`` and ``c``.
        state: What the tokens before left, (batch, s, d); None if there are none.

    Returns:
        The outputs, (batch, n, d), and the state that is left, both in float32 or better.
    """
    return _run(x, dt, a.T.contiguous(), b, c, state)[:2]


def _run(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    chunks: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, the last state, and the state before each chunk, (chunks, batch, s, d).

    ``a`` is (s, d); ``chunks`` is how many are computed at a time.
    """
    images, most = _at_a_time(x, a)
    if images < x.shape[0]:
        parts = [z.split(images) for z in (x, dt, b, c)]
        before = [None] * len(parts[0]) if state is None else state.split(images)
        done = [
            _run(x, dt, a, b, c, h, chunks) for x, dt, b, c, h in zip(*parts, before, strict=True)
        ]
        outs, lasts, befores = map(list, zip(*done, strict=True))
        return torch.cat(outs), torch.cat(lasts), torch.cat(befores, dim=1)
    y, starts = torch.empty_like(x), []
    state = x.new_zeros(x.shape[0], *a.shape) if state is None else state
    spans = _spans(x.shape[1], chunks or most)
    room = _room(x, a, spans[0], 2)
    for span in spans:
        x_, dt_, b_, c_ = (_lines(z, span) for z in (x, dt, b, c))
        before = [state]
        if (count := _count(span)) > 1:
            local, _ = _states(x_, dt_, a, b_, torch.zeros_like(room[0][0][: x_.shape[1]]), room)
            whole = (dt_.sum(0).unsqueeze(-2) * a).exp()
            for end, decay in zip(local[-1].chunk(count), whole.chunk(count), strict=True):
                before.append(decay * before[-1] + end)
            before.pop()
        starts += before
        states, _ = _states(x_, dt_, a, b_, torch.cat(before), room)
        y[:, span] = _tokens((c_.unsqueeze(-2) @ states).squeeze(-2), x[:, span])
        state = states[-1].chunk(count)[-1].clone()
    return y, state, torch.stack(starts)


def _at_a_time(x: Tensor, a: Tensor) -> tuple[int, int]:
    """Images and chunks to work on: a CPU wants its cache, an accelerator few large kernels."""
    numbers = _CHUNK * a.numel()  # of one image's chunk
    if x.device.type == "cpu":
        return max(1, (1 << 19) // numbers), 1
    return max(1, x.shape[0]), max(1, (1 << 26) // (numbers * max(1, x.shape[0])))


def _spans(n: int, chunks: int) -> list[slice]:
    size = _CHUNK * chunks
    return [slice(start, min(n, start + size)) for start in range(0, n, size)]


def _count(span: slice) -> int:
    return -(-(span.stop - span.start) // _CHUNK)


def _room(x: Tensor, a: Tensor, span: slice, count: int) -> list[Tensor]:
    """What states are written into: fresh memory costs more than the numbers do."""
    shape = _lines(x, span).shape[:2]
    return [x.new_empty(*shape, *a.shape) for _ in range(count)]


def _lines(z: Tensor, span: slice) -> Tensor:
    """The chunks of a span side by side, (tokens of a chunk, chunks * batch, d)."""
    z = z[:, span]
    if z.shape[1] > _CHUNK:  # steps of zero at the end change nothing
        z = F.pad(z, (0, 0, 0, -z.shape[1] % _CHUNK))
    size = min(z.shape[1], _CHUNK)
    z = z.unflatten(1, (z.shape[1] // size, size))
    return z.permute(2, 1, 0, 3).flatten(1, 2)


def _tokens(z: Tensor, like: Tensor) -> Tensor:
    """Inverse of ``_lines``."""
    batch, n, width = like.shape
    chunks = _count(slice(0, n))
    return z.view(z.shape[0], chunks, batch, width).permute(2, 1, 0, 3).flatten(1, 2)[:, :n]


def _states(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, state: Tensor, room: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """States after each token and the decays before them, both (n, batch, s, d), in ``room``.

    Args:
        x: (n, batch, d).
        dt: (n, batch, d).
        a: (s, d): states have channels last, of which there are many.
        b: (n, batch, s).
        state: Before the tokens, (batch, s, d).
        room: Two tensors, or more.
    """
    n, batch = x.shape[:2]
    states, decays = (z[:n, :batch] for z in room[:2])
    torch.mul(dt.unsqueeze(-2), a, out=decays).exp_()
    torch.mul((dt * x).unsqueeze(-2), b.unsqueeze(-1), out=states)
    for now, decay in zip(states.unbind(), decays.unbind(), strict=True):
        state = now.addcmul_(decay, state)
    return states, decays


# One node for compilers, which would unroll the loop, and for counters.
@custom_op("selective_scan")
def _scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs, and the state before each chunk, (chunks, batch, s, d)."""
    y, _, starts = _run(x, dt, a.T.contiguous(), b, c)
    return y, starts


@_scan.register_fake
def _(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    chunks = -(-x.shape[1] // _CHUNK)
    return torch.empty_like(x), x.new_empty(chunks, x.shape[0], *a.T.shape)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _differentiate(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    starts: Tensor,
    chunks: int | None = None,
) -> Gradients:
    """Gradients of ``x``, ``dt``, ``a``, ``b`` and ``c``; ``a`` and ``chunks`` as of ``_run``."""
    images, most = _at_a_time(x, a)
    if images < x.shape[0]:
        parts = [z.split(images) for z in (grad, x, dt, b, c)]
        done = [
            _differentiate(g, x, dt, a, b, c, h, chunks)
            for g, x, dt, b, c, h in zip(*parts, starts.split(images, dim=1), strict=True)
        ]
        grads = [torch.cat(z) for z in zip(*done, strict=True)]
        grads[2] = torch.stack([z[2] for z in done]).sum(0)
        return tuple(grads)  # type: ignore[return-value]
    grads = grad_x, grad_dt, grad_a, grad_b, grad_c = tuple(
        map(torch.empty_like, (x, dt, a, b, c))
    )
    grad_a.zero_()
    later = torch.zeros_like(starts[0])  # gradient of the state that the span leaves
    spans = _spans(x.shape[1], chunks or most)
    *room, slope_room = _room(x, a, spans[0], 3)
    for span in reversed(spans):
        x_, dt_, b_, c_, g_ = (_lines(z, span) for z in (x, dt, b, c, grad))
        first, count = span.start // _CHUNK, _count(span)
        before = starts[first : first + count].flatten(0, 1)
        states, decays = _states(x_, dt_, a, b_, before, room)
        slopes = slope_room[: x_.shape[0], : x_.shape[1]]  # of the states
        after = [later]
        if count > 1:
            torch.mul(g_.unsqueeze(-2), c_.unsqueeze(-1), out=slopes)
            local = _descend(slopes, decays, torch.zeros_like(before)).chunk(count)
            whole = (dt_.sum(0).unsqueeze(-2) * a).exp().chunk(count)
            for start, decay in zip(local[:0:-1], whole[:0:-1], strict=True):
                after.insert(0, torch.addcmul(start, decay, after[0]))
        torch.mul(g_.unsqueeze(-2), c_.unsqueeze(-1), out=slopes)
        later = _descend(slopes, decays, torch.cat(after)).chunk(count)[0]
        like, taken = x[:, span], (b_.unsqueeze(-2) @ slopes).squeeze(-2)  # gradient of dt x
        grad_c[:, span] = _tokens((states @ g_.unsqueeze(-1)).squeeze(-1), c[:, span])
        grad_b[:, span] = _tokens((slopes @ (dt_ * x_).unsqueeze(-1)).squeeze(-1), b[:, span])
        slopes.mul_(decays)  # of the exponents dt A, from here on
        slopes[1:].mul_(states[:-1])
        slopes[0].mul_(before)
        grad_x[:, span] = _tokens(taken * dt_, like)
        rates = torch.mul(slopes, a, out=states).sum(-2)
        grad_dt[:, span] = _tokens(rates.addcmul_(taken, x_), like)
        grad_a += slopes.mul_(dt_.unsqueeze(-2)).sum((0, 1))
    return grads  # type: ignore[return-value]


def _descend(slopes: Tensor, decays: Tensor, later: Tensor) -> Tensor:
    """Adds what later tokens want of each state; returns what they want of the one before."""
    room = torch.empty_like(later)
    for now, decay in zip(slopes.unbind()[::-1], decays.unbind()[::-1], strict=True):
        later = torch.mul(now.add_(later), decay, out=room)
    return later


@custom_op("selective_scan_backward")
def _backward(
    grad: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor
) -> Gradients:
    grads = _differentiate(grad, x, dt, a.T.contiguous(), b, c, starts)
    return *grads[:2], grads[2].T.contiguous(), *grads[3:]


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor
) -> Gradients:
    return tuple(map(torch.empty_like, (x, dt, a, b, c)))  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, ...]:
    return _backward(grad, *ctx.saved_tensors)


_scan.register_autograd(_gradients, setup_context=_setup)
