"""A linear layer whose bias has its gradient added up by a kernel, on a GPU outside a compiler."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class BiasedLinear(torch.autograd.Function):
    """A linear layer, and its tokens for others.

    PyTorch's sum for its bias took as long as a product of the backward, and so does adding up
    what several give the tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return F.linear(x, weight, bias), x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, beside: Tensor | None) -> tuple[Any, ...]:
        from attnzoo.ops.triton_common import column_sum

        if grad is None:
            return beside, None, None
        (x, weight), (has_x, has_weight, has_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows, is_differentiated = grad.reshape(-1, grad.shape[-1]), torch.is_grad_enabled()
        of_x = of_weight = of_bias = None
        if has_x and (beside is None or is_differentiated):
            of_x = (rows @ weight).view(x.shape)
            of_x = of_x if beside is None else of_x + beside
        elif has_x and beside is not None:
            of_x = beside.contiguous()
            of_x.view(-1, x.shape[-1]).addmm_(rows, weight)
        if has_weight:
            of_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        if has_bias:
            of_bias = rows.sum(0) if is_differentiated else column_sum(rows, grad.dtype)
        return of_x, of_weight, of_bias
