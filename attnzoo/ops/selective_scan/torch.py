"""The selective scan by PyTorch's operators, chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch
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
        state: What the tokens before left, (batch, d, s); None if there are none.

    Returns:
        The outputs, (batch, n, d), and the state that is left, both in float32 or better.
    """
    return _run(x, dt, a, b, c, state, [])


def _run(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None,
    starts: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """The outputs and the last state; puts the state before each chunk into ``starts``."""
    y = torch.empty_like(x)
    state = x.new_zeros(x.shape[0], *a.shape) if state is None else state
    buffers = _buffers(x, a, 2)
    for span in _spans(x.shape[1]):
        starts.append(state)
        x_, dt_, b_, c_ = (z[:, span].transpose(0, 1) for z in (x, dt, b, c))
        states, _ = _states(x_, dt_, a, b_, state, *buffers)
        y[:, span] = (states @ c_.unsqueeze(-1)).squeeze(-1).transpose(0, 1)
        state = states[-1].clone()
    return y, state


def _buffers(x: Tensor, a: Tensor, count: int) -> list[Tensor]:
    """What a chunk's tensors are written into: fresh memory costs more than the numbers do."""
    shape = min(_CHUNK, x.shape[1]), x.shape[0], *a.shape
    return [x.new_empty(shape) for _ in range(count)]


def _spans(n: int) -> list[slice]:
    return [slice(start, min(n, start + _CHUNK)) for start in range(0, n, _CHUNK)]


def _states(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, state: Tensor, states: Tensor, decays: Tensor
) -> tuple[Tensor, Tensor]:
    """States after each token of a chunk and the decays before them, both (n, batch, d, s).

    Args:
        x: (n, batch, d), like ``dt``.
        dt: See there.
        a: (d, s).
        b: (n, batch, s).
        state: Before the chunk.
        states: Room for the first result.
        decays: Room for the second.
    """
    decays, states = decays[: x.shape[0]], states[: x.shape[0]]
    torch.mul(dt.unsqueeze(-1), a, out=decays).exp_()
    torch.mul((dt * x).unsqueeze(-1), b.unsqueeze(-2), out=states)
    for now, decay in zip(states.unbind(), decays.unbind(), strict=True):
        state = now.addcmul_(decay, state)
    return states, decays


# One node for compilers, which would unroll the loop, and for counters.
@custom_op("selective_scan")
def _scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs, and the state before each chunk, (chunks, batch, d, s)."""
    starts: list[Tensor] = []
    y, _ = _run(x, dt, a, b, c, None, starts)
    return y, torch.stack(starts)


@_scan.register_fake
def _(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    chunks = -(-x.shape[1] // _CHUNK)
    return torch.empty_like(x), x.new_empty(chunks, x.shape[0], *a.shape)


@_scan.register_inference
def _(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return _run(x, dt, a, b, c, None, [])


@custom_op("selective_scan_backward")
def _backward(
    grad: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``dt``, ``a``, ``b`` and ``c``."""
    grads = tuple(map(torch.empty_like, (x, dt, a, b, c)))
    grad_x, grad_dt, grad_a, grad_b, grad_c = grads
    grad_a.zero_()
    later = torch.zeros_like(starts[0])  # gradient of the state that the chunk leaves
    *buffers, buffer = _buffers(x, a, 3)
    for index, span in reversed(list(enumerate(_spans(x.shape[1])))):
        x_, dt_, b_, c_, g_ = (z[:, span].transpose(0, 1) for z in (x, dt, b, c, grad))
        states, decays = _states(x_, dt_, a, b_, starts[index], *buffers)
        grad_c[:, span] = (g_.unsqueeze(-2) @ states).squeeze(-2).transpose(0, 1)
        slopes = buffer[: x_.shape[0]]  # of the states
        torch.mul(g_.unsqueeze(-1), c_.unsqueeze(-2), out=slopes)
        for now, decay in zip(slopes.unbind()[::-1], decays.unbind()[::-1], strict=True):
            later = now.add_(later) * decay
        taken = (slopes @ b_.unsqueeze(-1)).squeeze(-1)  # of dt x
        grad_b[:, span] = ((dt_ * x_).unsqueeze(-2) @ slopes).squeeze(-2).transpose(0, 1)
        slopes.mul_(decays)  # of the exponents dt A, from here on
        slopes[1:].mul_(states[:-1])
        slopes[0].mul_(starts[index])
        grad_x[:, span] = (taken * dt_).transpose(0, 1)
        grad_dt[:, span] = (
            torch.mul(slopes, a, out=states).sum(-1).addcmul_(taken, x_).transpose(0, 1)
        )
        grad_a += slopes.mul_(dt_.unsqueeze(-1)).sum((0, 1))
    return grads


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(map(torch.empty_like, (x, dt, a, b, c)))  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, ...]:
    return _backward(grad, *ctx.saved_tensors)


_scan.register_autograd(_gradients, setup_context=_setup)
