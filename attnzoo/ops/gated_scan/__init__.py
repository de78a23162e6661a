"""Gated linear attention (GLA, arXiv 2312.06635): a recurrence with one decay per key channel.

S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t and o_t = q_t S_t.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from torch import Tensor, compiler, dtype, float16, float32, stack

from attnzoo.ops.dispatch import MACS, Impl, choose
from attnzoo.ops.gated_scan.reference import gated_linear_attention as _recurrence
from attnzoo.ops.gated_scan.torch import gated_linear_block

__all__ = [
    "DIRECTIONS",
    "Direction",
    "counted_as_recurrence",
    "gated_linear_attention",
    "gated_linear_attention_macs",
    "gated_linear_block",
    "is_counted",
    "mean_of_scans",
    "mean_of_scans_by_kernels",
    "scan",
    "takes_kernels",
    "tokens_by_kernels",
    "unscan",
]

Direction = Literal["forward", "backward", "columns-forward", "columns-backward"]
# What the options of the mechanisms call several scans together.
DIRECTIONS: dict[str, tuple[Direction, ...]] = {
    "forward": ("forward",),
    "backward": ("backward",),
    "columns-forward": ("columns-forward",),
    "columns-backward": ("columns-backward",),
    "both": ("forward", "backward"),
    "four": ("forward", "backward", "columns-forward", "columns-backward"),
}

MOST_CHANNELS = 128  # of a head, in the kernels

_is_counting: ContextVar[bool] = ContextVar("_is_counting", default=False)


def gated_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor, impl: Impl = "auto"
) -> Tensor:
    """Causal linear attention whose state decays by exp(log_gate) per key channel.

    Time and memory are linear in n.

    Args:
        query: (b, h, n, dk), scaled by the caller.
        key: (b, h, n, dk).
        value: (b, h, n, dv).
        log_gate: (b, h, n, dk), not positive.
        impl: "torch" is exact for any gates and never looks at the data. "auto" looks at the gates
            and takes the fastest form that is exact for them, but is "torch" while compiling and
            everywhere but on a CPU: on the meta device there is nothing to look at, and a GPU
            would have to be waited for. There it takes "triton", kernels that are exact for any
            gates, for float32 and bfloat16 and up to 128 channels a head. "fla" is
            flash-linear-attention's kernel, on a GPU.

    Returns:
        (b, h, n, dv), in the dtype of ``query``; the state stays in float32 or better.

    Raises:
        Unavailable: The library cannot be imported, or not run on these tensors.
    """
    if is_counted():
        return (query * log_gate.exp()) @ (key.transpose(-2, -1) @ value)
    chosen = _choose(impl, query, query.dtype, *_sizes(query, value))
    if chosen == "triton":
        from attnzoo.ops.gated_scan.triton import gated_scans

        by_token = (z.transpose(1, 2) for z in (query, key, value, log_gate))
        grid = query.shape[2], 1
        out = gated_scans(*by_token, grid=grid, directions=("forward",))
        return out.transpose(1, 2).to(query.dtype)
    if chosen == "reference":
        return _recurrence(query, key, value, log_gate)
    if chosen == "fla":
        from attnzoo.ops.gated_scan import fla

        return fla.gated_linear_attention(query, key, value, log_gate)
    form: Impl = "auto" if impl == "auto" else "torch"
    return gated_linear_block(query, key, value, log_gate, None, form)[0].to(query.dtype)


def gated_linear_attention_macs(tokens: int, key_dim: int, value_dim: int) -> int:
    """Multiply-accumulates of one head of one scan, as the recurrence does them.

    k_t^T v_t and q_t S_t take key_dim * value_dim each. The chunkwise forms trade the recurrence
    for products inside each chunk and do more: 64 (key_dim + value_dim) per token on top.
    """
    return 2 * tokens * key_dim * value_dim


def unserved(key_dim: int, value_dim: int, head_tokens: int) -> str | None:
    """What the Triton kernels do not serve; ``head_tokens`` are an image's tokens times heads."""
    for name, channels in (("keys", key_dim), ("values", value_dim)):
        if channels > MOST_CHANNELS:
            return f"{name} of {channels} channels a head, more than {MOST_CHANNELS}"
    if head_tokens * max(key_dim, value_dim) >= 2**31:
        return "images of 2^31 numbers"
    return None


def _choose(impl: Impl, x: Tensor, dtype: dtype, *sizes: int) -> Impl:
    # float16 is computed in float32. Autocast would lower other operands, the kernels do not.
    dtype = float32 if dtype == float16 else dtype
    return choose("gated_linear_attention", impl, x, dtype, functools.partial(unserved, *sizes))


def _sizes(query: Tensor, value: Tensor) -> tuple[int, int, int]:
    return query.shape[-1], value.shape[-1], query.shape[1] * query.shape[2]


def takes_kernels(
    x: Tensor, dtype: dtype, key_dim: int, value_dim: int, head_tokens: int, impl: Impl = "auto"
) -> bool:
    """Whether ``mean_of_scans_by_kernels`` computes: asked before there are operands.

    Args:
        x: A tensor on their device.
        dtype: Of the operands.
        key_dim: Channels of a head's queries and keys.
        value_dim: Channels of a head's values.
        head_tokens: Tokens of an image times heads.
        impl: See ``gated_linear_attention``.

    Raises:
        Unavailable: "triton" was asked for and cannot run here.
    """
    if is_counted():
        return False
    return _choose(impl, x, dtype, key_dim, value_dim, head_tokens) == "triton"


def mean_of_scans_by_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_logit: Tensor,
    normalizer: float,
    grid: tuple[int, int],
    directions: Sequence[Direction],
    impl: Impl = "auto",
) -> Tensor | None:
    """The mean of ``gated_linear_attention`` over scans of an image, by the Triton kernels.

    Both directions of an order of the tokens are computed from one read of the operands.

    Args:
        query: (b, height * width, h, dk); scaled here by dk^-0.5.
        key: (b, height * width, h, dk).
        value: (b, height * width, h, dv).
        gate_logit: (b, height * width, h, dk); log_gate is logsigmoid(gate_logit) / normalizer.
        normalizer: See ``gate_logit``.
        grid: (height, width).
        directions: Without repetition.
        impl: See ``gated_linear_attention``.

    Returns:
        (b, height * width, h, dv) in the dtype of ``query``; None where ``impl`` means another
        implementation here.

    Raises:
        Unavailable: "triton" was asked for and cannot run here.
    """
    if not takes_kernels(query, query.dtype, *_sizes(query, value), impl):
        return None
    from attnzoo.ops.gated_scan.triton import gated_scans

    operands = query, key, value, gate_logit
    scale = query.shape[-1] ** -0.5
    return gated_scans(*operands, grid, directions, scale, normalizer).to(query.dtype)


def tokens_by_kernels(
    packed: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Tensor,
    heads: int,
    eps: float,
    normalizer: float,
    grid: tuple[int, int],
    directions: Sequence[Direction],
) -> Tensor:
    """Between the projections of a layer: ``mean_of_scans_by_kernels``, then ``gated_norm``.

    Where ``takes_kernels``. One gradient for the packed projection spares a pass that puts the
    parts together.

    Args:
        packed: (b, height * width, c), side by side queries, keys, values, output gates and what
            ``weight`` makes logits of the forget gates of; float32 or bfloat16.
        weight: (h * dk, rank).
        bias: (h * dk,).
        norm: (dv,), weight of the norm.
        heads: h.
        eps: Of the norm.
        normalizer: See ``mean_of_scans_by_kernels``.
        grid: (height, width).
        directions: Without repetition.

    Returns:
        (b, height * width, h * dv) in the dtype of ``packed``.
    """
    from attnzoo.ops.gated_scan.triton_tokens import gated_tokens

    return gated_tokens(packed, weight, bias, norm, heads, eps, normalizer, grid, directions)


def _token_macs(
    packed: Tensor, weight: Tensor, _: Any, norm: Tensor, heads: int, *options: Any, **__: Any
) -> int:
    scans = packed.shape[0] * heads * bin(options[4]).count("1")
    rows = packed.shape[0] * packed.shape[1]
    one = gated_linear_attention_macs(packed.shape[1], weight.shape[0] // heads, norm.shape[0])
    return scans * one + rows * weight.numel()


def _kernel_macs(query: Tensor, value: Tensor, directions: int) -> int:
    images, n, heads, dk = query.shape
    scans = images * heads * bin(directions).count("1")
    return scans * gated_linear_attention_macs(n, dk, value.shape[-1])


def _forward_macs(query: Tensor, _: Tensor, value: Tensor, *options: Any, **__: Any) -> int:
    return _kernel_macs(query, value, options[-2])


def _backward_macs(
    _: Tensor, query: Tensor, __: Tensor, value: Tensor, *options: Any, **___: Any
) -> int:
    return 2 * _kernel_macs(query, value, options[-1])


MACS |= {
    "gated_scans": _forward_macs,
    "gated_scans_backward": _backward_macs,
    "gated_tokens": _token_macs,
    "gated_tokens_backward": lambda *operands, **_: 2 * _token_macs(*operands[4:]),
}


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


def is_counted() -> bool:
    """Whether the code runs inside ``counted_as_recurrence``."""
    return not compiler.is_compiling() and _is_counting.get()


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


def mean_of_scans(out: Tensor, grid: tuple[int, int], directions: Sequence[Direction]) -> Tensor:
    """Mean of what scans gave, each in its order, one after the other in the batch."""
    # Not chunk, by whose division an export would fix the batch.
    parts = out.unflatten(0, (len(directions), out.shape[0] // len(directions))).unbind()
    outs = [unscan(z, grid, direction) for z, direction in zip(parts, directions, strict=True)]
    return stack(outs).mean(0) if len(outs) > 1 else outs[0]
