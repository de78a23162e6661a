"""Guard rails of training: steps not finite, spikes, loss by time, the insides of mechanisms."""

from __future__ import annotations

import contextlib
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_WINDOW = 100
_SETTLED = 20  # a median of fewer steps says nothing
WATCHED = {"loss": 5.0, "gradient_norm": 10.0}  # a spike is so many times the running median
_DIAGNOSED_SAMPLES = 4


class SpikeWatch:
    """Names the quantities of a step that stand far above their running median.

    Args:
        past: Log entries of the steps before.
    """

    def __init__(self, past: Iterable[Mapping[str, Any]] = ()) -> None:
        self._values: dict[str, deque[float]] = {name: deque(maxlen=_WINDOW) for name in WATCHED}
        for entry in past:
            self._remember(entry)

    def _remember(self, entry: Mapping[str, Any]) -> None:
        for name, values in self._values.items():
            if entry.get(name) is not None:
                values.append(entry[name])

    def look(self, entry: Mapping[str, Any]) -> list[str]:
        """The names that spike in ``entry``, which then belongs to the past."""
        spikes = [
            name
            for name, values in self._values.items()
            if entry.get(name) is not None
            and len(values) >= _SETTLED
            and entry[name] > WATCHED[name] * statistics.median(values)
        ]
        self._remember(entry)
        return spikes


def quartile_sums(losses: Tensor, timesteps: Tensor, last: float) -> Tensor:
    """Sums and counts of a loss by quarter of the time axis.

    Args:
        losses: (b,).
        timesteps: (b,), in [0, last).
        last: End of the time axis.

    Returns:
        (8,): four sums, four counts.
    """
    quarter = (timesteps.float() * (4 / last)).long().clamp(0, 3)
    sums = losses.new_zeros(8)
    # On a GPU index_add_ adds in whatever order.
    sums.index_put_((quarter,), losses.detach(), accumulate=True)
    sums.index_put_((quarter + 4,), torch.ones_like(losses), accumulate=True)
    return sums


def quartile_entry(values: Sequence[float]) -> dict[str, float]:
    """What ``quartile_sums`` says, as log entries; a quarter without a sample is left out."""
    return {
        f"mse_quarter_{index + 1}": values[index] / values[index + 4]
        for index in range(4)
        if values[index + 4]
    }


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """What is compiled runs as it is written, inside the with-statement."""
    return torch.compiler.set_stance("force_eager")


@torch.no_grad()
def look_inside(
    model: nn.Module, inputs: Mapping[str, Any], is_compiled: bool = False
) -> dict[str, Any]:
    """What the mechanisms say about themselves on a few samples.

    A mechanism speaks through a method ``diagnostics(x, grid)``, which returns numbers and lists
    of numbers by name. The model runs once in eval mode, so that no statistic changes.

    Args:
        model: With ``blocks`` that have an ``attention``.
        inputs: Its keyword arguments; tensors of any batch size.
        is_compiled: Whether there is something compiled, which does not call hooks.

    Returns:
        Their answers, by block number; empty if no mechanism has anything to say.
    """
    speakers = {
        str(index): block.attention
        for index, block in enumerate(model.blocks)  # type: ignore[arg-type]
        if hasattr(block.attention, "diagnostics")
    }
    if not speakers:
        return {}
    answers: dict[str, Any] = {}

    def listen(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            answers[name] = module.diagnostics(*arguments)  # type: ignore[operator]

        return hook

    handles = [module.register_forward_pre_hook(listen(name)) for name, module in speakers.items()]
    was_training = model.training
    model.eval()
    try:
        few = {
            name: value[:_DIAGNOSED_SAMPLES] if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        with uncompiled() if is_compiled else contextlib.nullcontext():
            model(**few)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return answers
