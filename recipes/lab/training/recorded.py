"""A training step whose decisions are taken on the device, recorded as one CUDA graph.

Launched one by one, the kernels of a small model take the host longer than they take the GPU: a
step of DiT-S on 256 tokens 70 to 300 ms of which the GPU works 24 to 46. Recorded, forward, loss,
backward, clipping, AdamW and the average are one launch. Nothing in it waits for the host, so a
step that is not finite is skipped on the device: weights, moments, counts, average and statistics
stay as they were. Its numbers reach the host while the next step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backbones.recorded import captured
from recipes.lab.training.ema import WeightAverage

Numbers = Callable[[], list[float]]


class RecordedStep:
    """A training step over buffers that stay where they are.

    It runs on any device, and is recorded by ``record`` on a GPU. Recorded or not, the numbers
    are the same.

    Args:
        model: What is trained.
        optimizer: AdamW with ``fused`` and ``capturable``: it takes its rate, and whether to skip
            the step, from tensors.
        average: Of the weights.
        gradients: Leaves the gradients of a batch, clipped, and gives the step's numbers, (n,),
            the loss first and the norm of the gradient last. The second argument says whether to
            stop, a tensor.
        sources: What else holds tensors that a step reads, besides the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        average: WeightAverage,
        gradients: Callable[[Sequence[Tensor], Tensor], Tensor],
        sources: Sequence[object] = (),
    ) -> None:
        self.model, self.optimizer, self.average = model, optimizer, average
        self.gradients = gradients
        self.sources = sources
        self._held: list[dict[str, Any]] = []
        optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
        self.device = next(model.parameters()).device
        self._rate, self._share, self._is_idle, self._wants_stop = torch.zeros(
            4, device=self.device
        ).unbind()
        for group in optimizer.param_groups:
            group["lr"] = self._rate
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._numbers = torch.empty(0)
        self.is_tried = self.device.type != "cuda"

    def step_on_device(self, batch: Sequence[Tensor]) -> Tensor:
        """Takes one step, or leaves everything as it is where loss or gradient are not finite.

        Args:
            batch: On the device.

        Returns:
            The step's numbers, (n,), on the device.
        """
        before = [(tensor, tensor.clone()) for tensor in self.model.buffers()]
        numbers = self.gradients(batch, self._wants_stop)
        is_finite = torch.isfinite(numbers[0]) & torch.isfinite(numbers[-1])
        is_skipped = torch.logical_or(self._is_idle, ~is_finite)
        # What a GradScaler tells a fused optimizer: then moments and counts stay, too.
        self.optimizer.found_inf = is_skipped.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        with torch.no_grad():
            for tensor, old in before:  # batch-norm statistics have already seen the batch
                tensor.copy_(torch.where(is_skipped, old, tensor))
            self.average.move(self._share * ~is_skipped)
        return numbers

    def record(self, batch: Sequence[Tensor]) -> str | None:
        """Records the step for batches of this shape; the state stays as it was.

        Args:
            batch: Any, on any device.

        Returns:
            None, or why it could not be recorded; then steps are launched eagerly.
        """
        self.is_tried = True
        self._inputs = [tensor.to(self.device).clone() for tensor in batch]
        before = [(tensor, tensor.clone()) for tensor in self.model.buffers()]
        self._is_idle.fill_(1.0)
        try:
            with torch.cuda.device(self.device):
                graph, self._numbers = captured(lambda: self.step_on_device(self._inputs))
            # What they cache for the last size or device is read at its address from now on.
            self._held = [dict(vars(s)) for s in (*self.model.modules(), *self.sources)]
            self._graph = graph
        except RuntimeError as error:
            for tensor, old in before:  # a forward that broke off has updated some statistics
                tensor.copy_(old)
            self.optimizer.zero_grad()
            return " ".join(str(error).split())[:200]
        finally:
            self._is_idle.zero_()
        return None

    def __call__(
        self, batch: Sequence[Tensor], *, rate: float, share: float, wants_stop: bool
    ) -> Numbers:
        """Queues one step.

        Args:
            batch: On any device; one of another shape than the recorded is launched eagerly.
            rate: Of learning.
            share: How far the average moves towards the weights.
            wants_stop: Whether this process has been told to stop.

        Returns:
            What waits for the step and gives its numbers.
        """
        self._rate.fill_(rate)
        self._share.fill_(share)
        self._wants_stop.fill_(wants_stop)
        is_recorded = self._graph is not None and all(
            one.shape == other.shape for one, other in zip(batch, self._inputs, strict=True)
        )
        if not is_recorded:
            is_gpu = self.device.type == "cuda"
            return arriving(
                self.step_on_device([t.to(self.device, non_blocking=is_gpu) for t in batch])
            )
        assert self._graph is not None
        for buffer, tensor in zip(self._inputs, batch, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return arriving(self._numbers)


def arriving(numbers: Tensor) -> Numbers:
    """Begins to copy numbers to the host.

    Returns:
        What waits for them and gives them.
    """
    if numbers.device.type != "cuda":
        return numbers.tolist
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return host.tolist()

    return read
