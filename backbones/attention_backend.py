"""diffusers' ``set_attention_backend`` for a backbone: which package computes the softmax."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from torch import nn

from attnzoo.contract import Attention, nearest
from attnzoo.errors import InvalidValue, Unavailable
from attnzoo.ops.softmax import why_unavailable

# diffusers' word -> ours, of ``impl``.
BACKENDS = {"native": "torch", "flash": "flash", "xformers": "xformers"}


def set_backend(model: nn.Module, backend: str) -> None:
    """Lets every softmax-like mechanism of ``model`` compute its softmax by ``backend``.

    Others are left as they are, since a mixture may have both. It is how things are computed and
    not what is saved.

    Args:
        model: With mechanisms of the zoo.
        backend: One of ``BACKENDS``.

    Raises:
        InvalidValue: There is no such backend, or no mechanism of the model has a softmax.
        Unavailable: The package is missing or does not run on the model's device and dtype.
    """
    impl: Any = BACKENDS.get(str(backend).lower())
    if impl is None:
        raise InvalidValue(
            f"attention backend {backend!r} is none of {', '.join(BACKENDS)}"
            f"{nearest(str(backend), BACKENDS)} Mechanisms of the zoo have no other"
        )
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    chosen = [layer for layer in layers if _is_softmax_like(layer)]
    if not chosen:
        names = ", ".join(sorted({repr(layer.name) for layer in layers}))
        raise InvalidValue(
            f"attention {names} has no softmax that backend {backend!r} could compute; "
            f"its implementation is chosen by the option impl, where it has one"
        )
    weight = next(chosen[0].parameters())
    if reason := why_unavailable(impl, weight.device, weight.dtype):
        raise Unavailable(f"attention backend {backend!r} cannot run here: {reason}")
    for part in _parts(chosen):
        vars(part).setdefault("_config_before", part.config)
        part.config = dataclasses.replace(part.config, impl=impl)


def reset_backend(model: nn.Module) -> None:
    """Undoes ``set_backend``."""
    for module in model.modules():
        if "_config_before" in vars(module):
            module.config = vars(module).pop("_config_before")


def _is_softmax_like(layer: Attention) -> bool:
    hint = typing.get_type_hints(type(layer.config)).get("impl")
    return set(BACKENDS.values()) <= set(typing.get_args(hint))


def _parts(layers: list[Attention]) -> Iterator[Any]:
    """The layers, and what of them has an ``impl`` of its own."""
    for layer in layers:
        for module in layer.modules():
            if dataclasses.is_dataclass(getattr(module, "config", None)) and hasattr(
                module.config, "impl"
            ):
                yield module
