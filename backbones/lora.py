"""Where LoRA goes, by one name for all mechanisms, whatever they call their projections."""

from __future__ import annotations

from torch import nn

from attnzoo import InvalidValue
from attnzoo.contract import Attention

PARTS = ("attention", "feed-forward", "both")


def lora_targets(model: nn.Module, part: str = "attention") -> list[str]:
    """Names for the ``target_modules`` of a ``peft.LoraConfig``: linear layers inside blocks.

    Args:
        model: A ``DiT``, or a part of one.
        part: "attention": all projections of every mechanism, whatever they are called;
            "feed-forward": those of the feed-forwards that are linear layers; or "both".

    Raises:
        InvalidValue: There is no such part, or nothing of it is a linear layer.
    """
    if part not in PARTS:
        raise InvalidValue(f"part={part!r} is none of {', '.join(PARTS)}")
    layers = {name for name, module in model.named_modules() if isinstance(module, Attention)}

    def is_wanted(name: str) -> bool:
        is_attention = any(name.startswith(f"{layer}.") for layer in layers)
        is_feedforward = ".feedforward." in f".{name}"
        return (is_attention and part != "feed-forward") or (
            is_feedforward and part != "attention"
        )

    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_wanted(name)
    ]
    if not found:
        raise InvalidValue(f"no {part} of this {type(model).__name__} has a linear layer")
    return found
