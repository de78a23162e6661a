"""The exponential average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """An exponential average of every tensor of floating-point numbers in a model's state.

    A buffer that is not persistent is neither averaged nor saved.

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
        shadow: The average, by name in the model's state. What other processes move is as of the
            last ``collect``.
    """

    def __init__(
        self, model: nn.Module, decay: float, ramp: bool, processes: int = 1, rank: int = 0
    ) -> None:
        self.model = model
        self.decay = decay
        self.ramp = ramp
        self.shadow = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self._rank = rank
        self._owners = _shared_out(self.shadow, processes) if processes > 1 else {}

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
        state = self.model.state_dict()
        if other := sorted(state.keys() ^ self.shadow.keys()):
            raise TypeError(
                f"{other[0]} came or went in a forward, where nothing trains, averages or saves "
                f"it: make parameters in __init__, and buffers there or with persistent=False"
            )
        pairs = [
            (local(self.shadow[name]), local(tensor))
            for name, tensor in state.items()
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
        state = self.model.state_dict()
        # All buffers, not those of the state alone: a forward may change any, or set another.
        buffers = [(module, dict(module._buffers)) for module in self.model.modules()]
        tensors = [z.detach() for z in (*self.model.parameters(), *self.model.buffers())]
        own = [(tensor, tensor.clone()) for tensor in tensors]
        for name, tensor in state.items():
            tensor.copy_(self.shadow[name])
        try:
            yield
        finally:
            for module, its in buffers:
                module._buffers.update(its)
            for tensor, old in own:
                tensor.copy_(old)


def by_names_of_state(model: nn.Module, average: dict[str, Tensor]) -> dict[str, Tensor]:
    """A saved average by the names of the model's state.

    Averages of before held buffers that are not persistent, and of tied weights the first alone.
    """
    state = model.state_dict(keep_vars=True)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {name: z for name, z in average.items() if name in state or name not in named}
    first = {id(tensor): name for name, tensor in named.items()}
    for name, tensor in state.items():
        if name not in found and (other := first.get(id(tensor))) in average:
            found[name] = average[other]
    return found


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
