"""From the packed projection of tokens to their gated scans, normed and gated.

The gradient of the projection is one tensor again: parts that came apart would be copied together.
"""

# pyright: basic

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.gated_norm import triton as norms
from attnzoo.ops.gated_scan import triton as scans
from attnzoo.ops.triton_common import _rows, launched

_SCHEMA = (
    "Tensor packed, Tensor weight, Tensor bias, Tensor norm, int heads, float eps, "
    "float normalizer, int height, int width, int directions"
)


def _parts(packed: Tensor, weight: Tensor, norm: Tensor, heads: int) -> list[Tensor]:
    """Queries, keys, values and output gates, (b, n, h, d), and what gives the forget gates."""
    (keys, rank), values = weight.shape, heads * norm.numel()
    *parts, reduced = packed.split([keys, keys, values, values, rank], -1)
    widths = [z.shape[-1] // heads for z in parts]
    # ``unflatten`` gives a single token a spacing that is not that of images.
    heads_of = [
        z.as_strided((*z.shape[:2], heads, d), (*z.stride()[:2], d, 1))
        for z, d in zip(parts, widths, strict=True)
    ]
    return [*heads_of, reduced]


@launched("gated_tokens", f"({_SCHEMA}, bool save) -> (Tensor, Tensor, Tensor, Tensor)")
def _forward(
    packed: Tensor, weight: Tensor, bias: Tensor, norm: Tensor, heads: int, eps: float,
    normalizer: float, height: int, width: int, directions: int, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The result; logits of the forget gates, the mean of the scans if saved, and their states."""
    packed, _ = _rows(packed)
    query, key, value, gate, reduced = _parts(packed, weight, norm, heads)
    logit, mixed = packed.new_empty(query.shape), _mixed(value, save)
    out = packed.new_empty(*packed.shape[:2], heads * norm.numel())
    options = normalizer, query.shape[-1] ** -0.5, height, width, directions
    low = scans.Low(reduced, weight.contiguous(), bias.contiguous())
    last = scans.Norm(gate, norm.contiguous(), eps, out)
    operands, kept = (query, key, value, logit), mixed if save else None
    states = scans.put_outputs(operands, options, kept, save, low, last)
    return out, logit, mixed, states


def _mixed(value: Tensor, save: bool) -> Tensor:
    return value.new_empty(value.shape if save else (0,))


@launched(
    "gated_tokens_backward",
    f"(Tensor grad, Tensor logit, Tensor mixed, Tensor states, {_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, logit: Tensor, mixed: Tensor, states: Tensor, packed: Tensor, weight: Tensor,
    bias: Tensor, norm: Tensor, heads: int, eps: float, normalizer: float, height: int,
    width: int, directions: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of the projection, of the forget gates' weight and bias, and of the norm's weight."""
    packed, _ = _rows(packed)
    query, key, value, gate, reduced = _parts(packed, weight, norm, heads)
    grads = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    of_query, of_key, of_value, of_gate, of_reduced = _parts(grads, weight, norm, heads)
    of_mixed, of_norm = norms.put_gradients(grad, mixed, gate, norm, eps, of_gate)
    of_logit = torch.empty(logit.shape, dtype=logit.dtype, device=logit.device)
    options = normalizer, query.shape[-1] ** -0.5, height, width, directions
    of_bias = scans.put_gradients(
        of_mixed, (query, key, value, logit), states, options,
        (of_query, of_key, of_logit, of_value), has_sum=True,
    )  # fmt: skip
    assert of_bias is not None
    of_logit, reduced = of_logit.view(-1, len(weight)), reduced.flatten(0, 1)
    torch.mm(of_logit, weight, out=of_reduced.flatten(0, 1))
    return grads, of_logit.t() @ reduced, of_bias.flatten().to(bias.dtype), of_norm


@_forward.register_fake
def _(packed: Tensor, weight: Tensor, bias: Any, norm: Tensor, heads: int, *options: Any) -> Any:
    query, _, value, *_ = _parts(packed, weight, norm, heads)
    logit, states = packed.new_empty(query.shape), scans.kept(query, value, *options[-2:])
    mixed = _mixed(value, options[-1])
    return packed.new_empty(value.flatten(2).shape), logit, mixed, states


@_backward.register_fake
def _(grad: Tensor, logit: Any, mixed: Any, states: Any, *operands: Any) -> Any:
    return tuple(z.new_empty(z.shape) for z in operands[:4])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    operands, ctx.options = inputs[:4], inputs[4:-1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *operands)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    return *_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 7


_forward.register_autograd(_gradients, setup_context=_setup)


def gated_tokens(
    packed: Tensor, weight: Tensor, bias: Tensor, norm: Tensor, heads: int, eps: float,
    normalizer: float, grid: tuple[int, int], directions: Any,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.gated_scan.tokens_by_kernels``."""
    operands = packed, weight.to(packed.dtype), bias.to(packed.dtype), norm
    save = torch.is_grad_enabled() and any(z.requires_grad for z in operands)
    options = heads, eps, normalizer, *grid, scans.bits_of(directions)
    return _forward(*operands, *options, save)[0]
