"""The count of torch's ``FlopCounterMode``, from the operators that a run dispatches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attnzoo.contract import check_option
from attnzoo.counting.formulas import attention_part, formulas, products, routed_weights
from attnzoo.counting.result import Grid, Macs, sums
from attnzoo.counting.subject import (
    Runnable,
    block_of,
    grid_of,
    layers_of,
    names_of,
    shadow_of,
)
from attnzoo.errors import InvalidValue
from attnzoo.ops.gated_scan import counted_as_recurrence


def measure_macs(
    model: nn.Module,
    *unnamed: Any,
    resolution: int | tuple[int, int] | None = None,
    grid: Grid | None = None,
    run_backward: bool = False,
    device: Literal["meta", "cpu"] = "meta",
) -> Macs:
    """Counts by torch's ``FlopCounterMode``, from the operators that a forward dispatches.

    Parts of a mechanism are told apart by what is multiplied: convolutions are conv; products
    with a parameter are projections, or routing if "router" is in the parameter's name; products
    of two activations are core.

    Args:
        model: See ``count_macs``.
        *unnamed: See ``count_macs``.
        resolution: See ``count_macs``.
        grid: See ``count_macs``.
        run_backward: Whether autograd runs for ``backward``; otherwise it is inferred: a product
            costs its forward again for every factor that needs a gradient.
        device: "meta" computes nothing; "cpu" runs a copy of the model, for a mechanism that
            must look at numbers.

    Returns:
        The counts; ``measured`` names every mechanism.

    Raises:
        InvalidType: See ``count_macs``.
        InvalidValue: An argument does not fit, or the model cannot run on the meta device.
    """
    check_option("device", device, Literal["meta", "cpu"])
    return measure(model, grid_of(model, resolution, grid, *unnamed), run_backward, device)


def measure(
    model: nn.Module,
    grid: Grid,
    run_backward: bool = False,
    device: str = "meta",
    same: Mapping[str, str] = MappingProxyType({}),
) -> Macs:
    """See ``measure_macs``; blocks that are ``same`` as another take over its count."""
    shadow = shadow_of(model, device)
    for block in same:
        blocks, index = block.rsplit(".", 1)
        shadow.get_submodule(blocks)[int(index)] = _Skipped()  # type: ignore[operator]
    tally = _Tally(shadow)
    runnable = Runnable(shadow, grid).train(run_backward)
    inputs = runnable.inputs(device)
    counter = FlopCounterMode(display=False, custom_mapping=tally.mapping())
    ran_backward = 0
    try:
        with counter, counted_as_recurrence(), torch.enable_grad():
            out = runnable(*inputs)
            flops, tally.is_backward = counter.get_total_flops(), True
            if run_backward:
                out.sum().backward()
                ran_backward = (counter.get_total_flops() - flops) // 2
    except (RuntimeError, TypeError) as error:  # the second is numpy's, of no numbers
        if device != "meta":
            raise
        if any(p.is_meta for p in model.parameters()):
            raise InvalidValue(
                f"{type(model).__name__} cannot run on the meta device ({error}) and has no "
                f"weights to run with; build it on CPU"
            ) from error
        return measure(model, grid, run_backward, "cpu", same)
    counted = {name: same.get(name, name) for name in (*tally.forward, *same)}
    total = sum(p.numel() for p in model.parameters())
    unused = sum(sum(tally.inactive.get(name, {}).values()) for name in counted.values())
    backward = sum(tally.backward[name] for name in counted.values())
    return Macs(
        **sums({block: dict(tally.forward[name]) for block, name in counted.items()}),
        backward=ran_backward if run_backward else backward,
        parameters=total,
        active_parameters=total - unused,
        convention="full",
        grid=grid,
        measured=names_of(layers_of(model).values()),
    )


class _Tally:
    """Books every operator under the block and the part of the module that runs it.

    Attributes:
        forward: Multiply-accumulates by block and part.
        backward: What they imply for the backward, by block.
        inactive: Parameters that do not act on a token, by block and name.
        is_backward: Whether what runs is the backward, which is not booked.
    """

    def __init__(self, model: nn.Module) -> None:
        self.forward: dict[str, Counter[str]] = {}
        self.backward: Counter[str] = Counter()
        self.inactive: dict[str, dict[str, int]] = {}
        self.is_backward = False
        self._model = model
        self._parameters = {_storage(p): name for name, p in model.named_parameters()}
        self._stack = [""]

        def leave(*_: Any) -> None:  # what a forward hook returns would replace the output
            self._stack.pop()

        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._stack.append(name))
            module.register_forward_hook(leave)
            if unused := getattr(module, "inactive_parameters", 0):
                self.inactive.setdefault(block_of(model, name), {})[name] = unused

    def mapping(self) -> dict[Any, Callable[..., int]]:
        """For ``FlopCounterMode``: FLOPs by operator, two for a multiply-accumulate."""
        return {op: self._booked(op, formula) for op, formula in formulas().items()}

    def _booked(self, operator: Any, formula: Callable[..., int]) -> Callable[..., int]:
        def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            macs = formula(*args, **kwargs, out_val=out_val)
            if not self.is_backward:
                self._book(operator, args, macs)
            return 2 * macs

        count._get_raw = True  # type: ignore[attr-defined] # tensors, not their shapes
        return count

    def _book(self, operator: Any, args: tuple[Any, ...], macs: int) -> None:
        path, named = self._stack[-1], getattr(self._model, "PARTS", {})
        block = block_of(self._model, path)
        part = next((named[component] for component in path.split(".") if component in named), "")
        for share, multiplied in products(operator, args, macs):
            touched = [name for z in multiplied if (name := self._name(z))]
            place = part or attention_part(operator, touched)
            self.forward.setdefault(block, Counter())[place] += share
            self.backward[block] += share * sum(factor.requires_grad for factor in multiplied)
        for weight in routed_weights(operator, args):
            unused = weight.numel() - weight[0].numel()
            self.inactive.setdefault(block, {})[self._name(weight) or ""] = unused

    def _name(self, tensor: Tensor) -> str | None:
        return self._parameters.get(_storage(tensor))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Skipped(nn.Module):
    """Stands where a block was that has been counted already."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x
