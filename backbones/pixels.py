"""What stands for the VAE in a diffusers pipeline of a model that makes pixels."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor


class PixelDecoder(ModelMixin, ConfigMixin):
    """Gives pixels as they are, so that ``DiTPipeline`` serves models of pixels too.

    Args:
        scaling_factor: What the pipeline divides by; pixels are scaled by nothing.
    """

    config: Any

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0) -> None:
        super().__init__()

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """(b, c, h, w) -> ``.sample``, the same."""
        return DecoderOutput(sample=z) if return_dict else (z,)
