"""Softmax attention by flash-attn 4 where it is stronger than what PyTorch takes."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.dispatch import MACS, custom_op, flash_works

# One H100, bfloat16, heads of 64 and 128, forward: at 4,096 keys PyTorch's choice, cuDNN, takes
# 0.7 of flash-attn 4's time, at 16,384 it takes 1.1 times that.
_KEYS = 8192
_WIDTHS = (64, 128)


def is_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether "auto" takes flash-attn 4: installed, long rows, half precision, no gradient."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and min(query.shape[-2], key.shape[-2]) >= _KEYS
        and query.dtype in (torch.float16, torch.bfloat16)
        and width in _WIDTHS
        and value.shape[-1] == width
        and not (torch.is_grad_enabled() and any(z.requires_grad for z in (query, key, value)))
        and flash_works()
    )


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """See ``attnzoo.ops.softmax``; without a gradient."""
    return _flash_attention(*(z.transpose(1, 2) for z in (query, key, value))).transpose(1, 2)


@custom_op("flash_attention", device_types="cuda")
def _flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(b, n, h, d), (b, m, h, d), (b, m, h, d) -> (b, n, h, d)."""
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func(query, key, value)[0]


@_flash_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(query.shape)


def _macs(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    batch, n, heads, width = query.shape
    return 2 * batch * heads * n * key.shape[1] * width


MACS["flash_attention"] = _macs
