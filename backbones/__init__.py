"""The backbone that every mechanism of the zoo plugs into."""

from backbones.dit import DiT
from backbones.lora import lora_targets
from backbones.pattern import Pattern, parse_pattern
from backbones.pipelines import FlowScheduler, PixelDecoder
from backbones.presets import build_backbone, list_presets
from backbones.recorded import (
    RecordedForward,
    compile_blocks,
    record,
    refuse_waits,
    why_not_recorded,
)

__all__ = [
    "DiT",
    "FlowScheduler",
    "Pattern",
    "PixelDecoder",
    "RecordedForward",
    "build_backbone",
    "compile_blocks",
    "list_presets",
    "lora_targets",
    "parse_pattern",
    "record",
    "refuse_waits",
    "why_not_recorded",
]
