"""DDPM's schedule, which losses and samplers share."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler


def beta_options(num_train_timesteps: int) -> dict[str, Any]:
    scale = 1000 / num_train_timesteps
    return {
        "num_train_timesteps": num_train_timesteps,
        "beta_schedule": "linear",
        "beta_start": scale * 1e-4,
        "beta_end": scale * 2e-2,
    }


@lru_cache(maxsize=8)
def forward_process(num_train_timesteps: int) -> DDPMScheduler:
    # Lazy, because diffusers takes longer to import than torch does.
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(**beta_options(num_train_timesteps))
