"""Weights that diffusers and accelerate keep elsewhere until a module is called.

Operators read the weights of convolutions, norms and routers without calling these modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from attnzoo import InvalidValue
from attnzoo.contract import Attention
from backbones.feedforward import FeedForward


def read_without_call(model: nn.Module) -> dict[str, nn.Module]:
    """Modules inside blocks, or one, that hold weights and may not be called, by name."""
    called = nn.Linear, nn.LayerNorm, Attention, FeedForward
    return {
        name: module
        for name, module in model.named_modules()
        if {"attention", "feedforward"} & {*name.split(".")}
        if not isinstance(module, called) and any(True for _ in module.parameters(recurse=False))
    }


def check_group_offload(model: nn.Module, offload_type: object) -> None:
    """Raises InvalidValue where weights would not be there when they are read."""
    names = [*read_without_call(model)]
    if getattr(offload_type, "value", offload_type) == "leaf_level" and names:
        raise InvalidValue(
            f"offload_type='leaf_level' loads weights when their module is called, and those of "
            f"{names[0]} are read without; take offload_type='block_level', num_blocks_per_group=1"
        )


def check_loaded(blocks: Iterable[nn.Module]) -> None:
    """Raises InvalidValue where weights that are read are elsewhere: kernels would crash."""
    for block in blocks:
        hook: Any = getattr(block, "_hf_hook", None)
        if any(getattr(z, "place_submodules", False) for z in getattr(hook, "hooks", [hook])):
            continue  # it loads the whole block
        for name, module in read_without_call(block).items():
            if any(p.is_meta for p in module.parameters(recurse=False)):
                raise InvalidValue(
                    f"the weights of {name} in a block are offloaded until it is called, and they "
                    f"are read without; take pipeline.enable_model_cpu_offload(), or "
                    f"accelerate.cpu_offload(model, device, preload_module_classes=['Block'])"
                )
