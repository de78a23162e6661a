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
        result = function(*args, **kwargs)
        is_fact = getattr(function, "__name__", "") == "__get__" and not isinstance(result, Tensor)
        if not is_fact:  # such as a shape
            for z in tree_leaves((args, kwargs)):
                if id(z) in self._uses:
                    self._uses[id(z)][1].add(_cast_by(function, z, args, kwargs))
        return result

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


class CastWeights:
    """A model's weights in the type that autocast would cast them to in every call.

    Autocast casts each weight by a launch of its own, and its gradient back by another: in a step
    of a small model a good part of the time. Copies that stand in the weights' places cost one
    launch for many. The numbers stay the same.

    Args:
        model: Compiled or not.
        call: Calls the model. Weights that it uses in no way but by casting them get a copy.

    Attributes:
        pairs: Weights and their copies.
        copies: The copies, by identity of the weight.
    """

    def __init__(self, model: nn.Module, call: Callable[[], Any]) -> None:
        is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
        with contextlib.ExitStack() as stack:
            if is_compiled:  # a stance is taken where it is named
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            casts = stack.enter_context(_Casts(model.parameters()))
            call()
        self.pairs = [
            (weight, nn.Parameter(weight.detach().to(dtype), weight.requires_grad))
            for weight, dtype in casts.found()
        ]
        self.copies = {id(weight): copy for weight, copy in self.pairs}
        self._places = [
            (module._parameters, name, weight, self.copies[id(weight)])
            for module in model.modules()
            for name, weight in module._parameters.items()
            if id(weight) in self.copies
        ]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[list[nn.Parameter]]:
        """Puts the copies, which it yields, into the model, inside the with-statement."""
        # Others in their places, not other data in them: until 2.12 PyTorch took what it had
        # compiled for the old type (pytorch issue 163064).
        for parameters, name, _, copy in self._places:
            parameters[name] = copy
        try:
            yield [copy for _, copy in self.pairs]
        finally:
            for parameters, name, weight, _ in self._places:
                parameters[name] = weight

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies what the weights are now; a gradient that the copies still have is dropped."""
        if self.pairs:
            weights, copies = zip(*self.pairs, strict=True)
            torch._foreach_copy_(copies, weights)  # type: ignore
        for _, copy in self.pairs:
            copy.grad = None

    @torch.no_grad()
    def hand_over(self, weights: Iterable[Tensor] | None = None) -> None:
        """Adds the copies' gradients to those of the weights, in the weights' own type.

        Args:
            weights: Of which; by default all.
        """
        pairs = self.pairs
        if weights is not None:
            pairs = [(w, self.copies[id(w)]) for w in weights if id(w) in self.copies]
        pairs = [pair for pair in pairs if pair[1].grad is not None]
        if not pairs:
            return
        given = [torch.empty_like(weight) for weight, _ in pairs]
        torch._foreach_copy_(given, [copy.grad for _, copy in pairs])  # type: ignore
        for (weight, copy), gradient in zip(pairs, given, strict=True):
            copy.grad = None
            if weight.grad is None:
                weight.grad = gradient
            else:
                weight.grad += gradient


@contextlib.contextmanager
def cast_once(model: nn.Module, call: Callable[[], Any]) -> Iterator[list[nn.Parameter]]:
    """Holds weights in the type that autocast casts them to, inside the with-statement.

    Args:
        model: Afterwards as it was.
        call: See ``CastWeights``.

    Yields:
        The cast weights; they have to live as long as a recording that reads them.
    """
    with CastWeights(model, call).in_place() as copies:
        yield copies
