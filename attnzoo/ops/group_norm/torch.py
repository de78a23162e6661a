"""The group norm by PyTorch's, on a view of the tokens as an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.dispatch import is_transformed


def group_norm(
    x: Tensor, shift: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float,
    slope: float = 1.0,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.group_norm``."""
    image = (x + shift.to(x.dtype)).unsqueeze(1).permute(0, 3, 1, 2)  # channels-last, one row
    # vmap knows no channels-last, and a CPU's backward of it crashes where only the norm's own
    # parameters want gradients; a GPU lays it out anyway.
    is_trained = torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)
    image = image.contiguous() if is_trained or is_transformed() else image
    # Not the one of nn.functional, which refuses one channel of one token.
    out = torch.group_norm(image, groups, weight, bias, eps)
    out = F.leaky_relu(out, slope) if slope != 1 else out
    return out.permute(0, 2, 3, 1).flatten(1, 2)
