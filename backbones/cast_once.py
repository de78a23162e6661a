"""Weights held in the type that autocast would cast them to in every call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class _Casts(TorchFunctionMode):
    """Notes which weights are used in no way but by casting them, as autocast does."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._uses = {id(weight): (weight, set[torch.dtype | None]()) for weight in weights}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # A function that a mechanism compiles itself is traced through here; its operands are no
        # weights.
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if getattr(function, "__name__", "") != "__get__":  # of a property
            for z in tree_leaves((args, kwargs)):
                if id(z) in self._uses:
                    self._uses[id(z)][1].add(_cast_by(function, z, args, kwargs))
        return function(*args, **kwargs)

    def found(self) -> list[tuple[Tensor, torch.dtype]]:
        """Weights that are only cast, each to one type, and that type."""
        return [
            (weight, dtype)
            for weight, uses in self._uses.values()
            for dtype in uses
            if len(uses) == 1 and dtype and dtype != weight.dtype
        ]


def _cast_by(function: Any, weight: Tensor, args: Any, kwargs: Any) -> torch.dtype | None:
    """The type that a call casts a weight to, if that is all that it does with it."""
    if function is Tensor.to:
        wanted = args[1] if len(args) == 2 else kwargs.get("dtype")
        return wanted if isinstance(wanted, torch.dtype) else None
    kind = weight.device.type
    if function in (F.linear, F.conv2d) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


@contextlib.contextmanager
def cast_once(model: nn.Module, call: Callable[[], Any]) -> Iterator[list[Tensor]]:
    """Holds weights in the type that autocast casts them to, inside the with-statement.

    Autocast casts every weight in every call, which is a launch for each: in a recording of a
    small model a good part of the time. The numbers stay the same.

    Args:
        model: Afterwards as it was; compiled or not.
        call: Calls the model.

    Yields:
        The cast weights; they have to live as long as a recording that reads them.
    """
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    written = torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()
    with written, _Casts(model.parameters()) as casts:
        call()
    cast = {id(weight): nn.Parameter(weight.detach().to(dtype), weight.requires_grad)
            for weight, dtype in casts.found()}  # fmt: skip
    places = [
        (module._parameters, name, weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if id(weight) in cast
    ]
    # Others in their places, not other data in them: until 2.12 PyTorch took what it had compiled
    # for the old type (pytorch issue 163064).
    for parameters, name, weight in places:
        parameters[name] = cast[id(weight)]
    try:
        yield list(cast.values())
    finally:
        for parameters, name, weight in places:
            parameters[name] = weight
