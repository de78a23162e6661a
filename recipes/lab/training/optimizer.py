"""What moves the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recipes.lab.training.settings import Settings


def make_optimizer(model: nn.Module, settings: Settings, **options: Any) -> torch.optim.AdamW:
    """AdamW over all parameters; its weight decay is of matrices and kernels only.

    Args:
        model: What is trained.
        settings: Rate, betas and weight decay.
        options: Further ones of AdamW.
    """
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if settings.weight_decay:
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        decay = {"weight_decay": settings.weight_decay}
        groups = [{"params": decayed, **decay}, {"params": others}]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(0.9, settings.adam_beta2),
        weight_decay=0.0,
        **options,
    )
