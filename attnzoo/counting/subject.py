"""What is counted, an attention layer or a backbone: its grid, its blocks, a copy that runs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.contract import Attention, AttentionConfig, check_weights, sides_of
from attnzoo.counting.result import Grid
from attnzoo.errors import InvalidType, InvalidValue
from attnzoo.layers.streaming import StreamConfig

# Ways to compute the same that count otherwise, or that do not run on every device.
_REPLACED = (
    "reference", "triton", "flex", "flash", "xformers", "fla", "mamba", "natten",
)  # fmt: skip


def grid_of(model: Any, resolution: Any, grid: Any, *unnamed: Any) -> Grid:
    """(height, width) in tokens; raises for what cannot be counted, see ``count_macs``."""
    is_layer = isinstance(model, Attention)
    if not is_layer and not (hasattr(model, "macs_parts") and hasattr(model, "token_grid")):
        raise InvalidType(
            f"cannot count a {type(model).__name__}; pass an attnzoo.Attention layer, or a model "
            f"with macs_parts and token_grid such as backbones.DiT"
        )
    check_weights(model)
    ways = "grid=(height, width) in tokens"
    if not is_layer:
        ways = f"resolution=(height, width) in image pixels, or {ways}"
    if unnamed:
        raise InvalidType(f"say what {unnamed[0]!r} is: {ways}")
    if is_layer and resolution is not None:
        raise InvalidType(
            f"a layer knows no pixels: pass {ways} instead of resolution={resolution!r}"
        )
    if (resolution is None) == (grid is None):
        raise InvalidValue(f"give either {ways}; got resolution={resolution!r} and grid={grid!r}")
    if grid is not None:
        return sides_of("grid", grid)
    sides = sides_of(
        "resolution", (resolution, resolution) if isinstance(resolution, int) else resolution
    )
    backbone: Any = model
    factor = (backbone.config.provenance or {}).get("latent_factor", 8)
    if any(side % factor for side in sides):
        nearest_side = [max(1, round(side / factor)) * factor for side in sides]
        raise InvalidValue(
            f"resolution={sides[0]}x{sides[1]} does not divide into latent pixels of {factor}; "
            f"the nearest that does is {nearest_side[0]}x{nearest_side[1]}"
        )
    return backbone.token_grid(sides[0] // factor, sides[1] // factor)


def shadow_of(model: nn.Module, device: str) -> nn.Module:
    """A float32 copy on another device; the weights are not copied where it is "meta"."""

    def tensors() -> Iterator[Tensor]:
        for module in model.modules():
            # Results that a forward has left behind, such as an auxiliary loss, are not wanted.
            yield from (value for value in vars(module).values() if isinstance(value, Tensor))
        yield from model.parameters()
        yield from model.buffers()

    memo: dict[int, Any] = {}
    for tensor in tensors():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        new = tensor.detach().to(device, dtype, copy=device != "meta")
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = new
    shadow = copy.deepcopy(model, memo)
    module: Any
    for module in shadow.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False  # backward would count forward again
    for module in shadow.modules():  # parts of a layer have settings of their own
        config = getattr(module, "config", None)
        if isinstance(config, AttentionConfig):
            module.config = _counted(config)
    return shadow


def _counted(config: Any) -> Any:
    """The options of which the cost is stated: all tokens at once, by what runs everywhere."""
    if isinstance(config, StreamConfig) and config.stream is not None:
        config = dataclasses.replace(config, stream=None)
    is_replaced = getattr(config, "impl", None) in _REPLACED
    return dataclasses.replace(config, impl="auto") if is_replaced else config


class Runnable(nn.Module):
    """A layer or a model that is called on tensors of its own making, and on nothing else."""

    def __init__(self, model: nn.Module, grid: Grid) -> None:
        super().__init__()
        self.model = model
        self.grid = grid

    def forward(self, *inputs: Tensor) -> Tensor:
        if isinstance(self.model, Attention):
            return self.model.after_block(self.model(*inputs, self.grid), self.grid)
        return self.model(*inputs, return_dict=False)[0]

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        """One sample."""
        height, width = self.grid
        if isinstance(self.model, Attention):
            return (torch.zeros(1, height * width, self.model.dim, device=device),)
        config: Any = self.model.config
        patch = config.patch_size
        return (
            torch.zeros(1, config.in_channels, height * patch, width * patch, device=device),
            torch.zeros(1, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )


def block_of(model: nn.Module, path: str) -> str:
    """The block that a module belongs to: its first name, with its index if it is in a list."""
    if isinstance(model, Attention):
        return "attention"
    first, *rest = path.split(".")
    is_list = first and isinstance(model.get_submodule(first), nn.ModuleList)
    return f"{first}.{rest[0]}" if is_list and rest else first


def layers_of(model: nn.Module) -> dict[str, Attention]:
    """The attention layer of every block; what one is made of, such as others, is its part."""
    found: dict[str, Attention] = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            found.setdefault(block_of(model, name), module)
    return found


def names_of(layers: Iterable[Attention]) -> tuple[str, ...]:
    """What the mechanisms are called, each once."""
    return tuple(sorted({layer.name or type(layer).__name__ for layer in layers}))


def repeated_blocks(model: nn.Module, layers: Mapping[str, Attention]) -> dict[str, str]:
    """Blocks that are built exactly as an earlier one, and which one that is.

    Built alike means the same modules, attributes and shapes: a layer that keeps anything that
    depends on its position in the network differs.
    """
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    for block in layers:
        if not block.rpartition(".")[2].isdigit():
            continue
        built = tuple(
            (name, type(module), _attributes(module))
            for name, module in model.get_submodule(block).named_modules()
        )
        representative = first.setdefault(built, block)
        if representative != block:
            same[block] = representative
    return same


def _attributes(module: nn.Module) -> tuple[Any, ...]:
    own = [
        (name, repr(value))
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in ("context", "auxiliary_loss")
    ]
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    shapes = [(name, tensor.shape, tensor.requires_grad) for name, tensor in tensors]
    return (*own, *shapes)
