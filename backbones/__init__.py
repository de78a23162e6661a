"""The backbone that every mechanism of the zoo plugs into."""

from backbones.dit import DiT
from backbones.presets import build_backbone, list_presets

__all__ = ["DiT", "build_backbone", "list_presets"]
