"""What diffusers' ``DiTPipeline`` needs beside a DiT where it has no part of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DecoderOutput

__all__ = ["FlowScheduler", "PixelDecoder", "SchedulerMixin"]  # diffusers looks for the last


class PixelDecoder(ModelMixin, ConfigMixin):
    """Stands for the VAE of a model that makes pixels: gives them as they are.

    Args:
        scaling_factor: What the pipeline divides by; pixels are scaled by nothing.
    """

    config: Any

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0) -> None:
        super().__init__()
        # diffusers saves no model without a weight, and asks its device and dtype.
        self.unused = nn.Parameter(torch.zeros(()), requires_grad=False)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """(b, c, h, w) -> ``.sample``, the same."""
        # Here, because it brings all of diffusers' models along.
        from diffusers.models.autoencoders.vae import DecoderOutput

        return DecoderOutput(sample=z) if return_dict else (z,)


class FlowScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler's steps for rectified flow, as a pipeline of diffusion models calls a scheduler.

    Times are even from 1 down, none of them 0: the grid of the recipes' sampler "euler-flow".
    """

    def set_timesteps(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Sets that many times."""
        even = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        on: Any = device  # None is taken, whatever the annotation says
        super().set_timesteps(sigmas=even, device=on)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is: flow has nothing to scale."""
        return sample
