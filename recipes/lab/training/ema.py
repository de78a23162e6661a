"""The exponential average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """An exponential average of every parameter and every floating-point buffer.

    diffusers' ``EMAModel`` copies buffers, and torch's ``AveragedModel`` refuses sharded weights.
    Batch-norm statistics have to be averaged with the weights they belong to.

    Processes that hold equal weights can share out the work: each moves a part of the average,
    and ``collect`` brings the parts together. It costs a step no communication, and changes no
    bit.

    Args:
        model: Its weights are where the average starts.
        decay: Of the average, for each step.
        ramp: Whether to average over fewer steps at the start: (1 + s) / (10 + s) at step s.
        processes: That share out the work; their weights are equal at every step.
        rank: Which of them this one is.

    Attributes:
        shadow: The average, by name. What other processes move is as of the last ``collect``.
    """

    def __init__(
        self, model: nn.Module, decay: float, ramp: bool, processes: int = 1, rank: int = 0
    ) -> None:
        self.model = model
        self.decay = decay
        self.ramp = ramp
        self.shadow = {name: tensor.detach().clone() for name, tensor in self._tensors()}
        self._rank = rank
        self._owners = _shared_out(self.shadow, processes) if processes > 1 else {}

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.model.named_parameters(), *self.model.named_buffers()]

    def share(self, step: int) -> float:
        """How far the average moves towards the weights after ``step``, from 1."""
        return 1 - (min(self.decay, step / (9 + step)) if self.ramp else self.decay)

    @torch.no_grad()
    def move(self, share: float | Tensor) -> None:
        """Moves the average towards the weights.

        Args:
            share: Of the way, from ``share``; a tensor on the device of the weights can be
                another in each replay of a recorded step. 0 leaves the average as it is.
        """
        pairs = [
            (local(self.shadow[name]), local(tensor.detach()))
            for name, tensor in self._tensors()
            if self._owners.get(name, self._rank) == self._rank
        ]
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        shadows, tensors = ([pair[side] for pair in averaged] for side in (0, 1))
        if isinstance(share, Tensor):  # lerp takes one for each element only
            differences = torch._foreach_sub(tensors, shadows)  # type: ignore
            torch._foreach_mul_(differences, share)  # type: ignore
            torch._foreach_add_(shadows, differences)  # type: ignore
        else:
            torch._foreach_lerp_(shadows, tensors, share)  # type: ignore[attr-defined]
        for shadow, tensor in pairs:
            if not shadow.is_floating_point():
                shadow.copy_(tensor)

    def collect(self) -> None:
        """Makes ``shadow`` whole; every process has to call it."""
        for name, owner in self._owners.items():
            dist.broadcast(self.shadow[name], owner)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the with-statement.

        Every process has to enter it.
        """
        self.collect()
        own = {name: tensor.detach().clone() for name, tensor in self._tensors()}
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self._tensors():
            tensor.copy_(values[name])


def _shared_out(tensors: dict[str, Tensor], processes: int) -> dict[str, int]:
    """A process for each tensor, of about as many numbers for each process."""
    owners, loads = {}, [0] * processes
    for name in sorted(tensors, key=lambda name: -tensors[name].numel()):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += tensors[name].numel()
    return owners


def local(tensor: Tensor) -> Tensor:
    """This process' shard: averaging is elementwise, and mixes poorly with whole tensors."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
