"""Steps of sampling as one launch each: model, guidance and update, recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from backbones.cast_once import cast_once
from backbones.recorded import captured, why_not_recorded
from recipes.lab.console import UserError

MODES = ("auto", "on", "off")
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # noisy, time and labels -> prediction


def solver_weights(scheduler: Any) -> Tensor:
    """What each step of a deterministic solver makes its next sample of.

    The solvers' updates are linear with weights that depend on the times alone, so a step on unit
    vectors shows them: nothing of a solver is written a second time.

    Args:
        scheduler: A fresh one of diffusers that looks back one step at most; it is used up.

    Returns:
        (steps, 4), the weights of sample and prediction one step before, and of this step's.
    """
    rows, unit = [], torch.eye(2 * len(scheduler.timesteps) + 2)
    for step, time in enumerate(scheduler.timesteps):
        sample, prediction = unit[2 * step + 2 : 2 * step + 4]
        following = scheduler.step(prediction, time, sample, return_dict=False)[0]
        rows.append(following[2 * step : 2 * step + 4])
    return torch.stack(rows)


class Steps:
    """All steps of a deterministic sampler as the same work on the same memory.

    They run on any device; ``record`` makes one launch of each on a GPU.

    Args:
        model: What is recorded is its weights as they are then.
        predict: The guided model.
        scheduler: See ``solver_weights``.
        batch: Images at once.
        shape: (c, h, w) of an image.
        null_label: Class of what fills an incomplete batch.
        device: Of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        predict: Predict,
        scheduler: Any,
        batch: int,
        shape: tuple[int, int, int],
        null_label: int,
        device: torch.device,
    ) -> None:
        self._model, self._predict = model, predict
        self._null_label, self._device = null_label, device
        self._times = scheduler.timesteps.to(device)
        self._weights = solver_weights(scheduler).to(device)
        # Sample and prediction of the step before, and of this one.
        self._parts = torch.zeros(4, batch, *shape, device=device)
        self._labels = torch.full((batch,), null_label, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._read: list[Any] = []

    @torch.no_grad()
    def record(self) -> None:
        """Records a step.

        Raises:
            RuntimeError: Something in it waits for the host, or the memory does not suffice.
        """
        with torch.cuda.device(self._device), cast_once(self._model, self._try) as weights:
            self._graph, _ = captured(self._advance, warm_up=self._try)
        # What modules cache for the last size or type is read at its address from now on.
        self._read = [weights, [dict(vars(module)) for module in self._model.modules()]]

    @torch.no_grad()
    def __call__(self, noise: Tensor, labels: Tensor, tick: Callable[[], Any]) -> Tensor:
        """Samples of up to ``batch`` images.

        Args:
            noise: (n, c, h, w).
            labels: (n,) int64.
            tick: Called after each step was launched.

        Returns:
            (n, c, h, w) float32.
        """
        count = len(noise)
        self._parts.zero_()  # a weight of 0 does not remove what is not finite
        self._parts[2, :count] = noise
        self._labels.fill_(self._null_label)
        self._labels[:count] = labels
        self._step.zero_()
        launch = self._graph.replay if self._graph is not None else self._advance
        for _ in range(len(self._times)):
            launch()
            tick()
        return self._parts[2, :count].clone()

    def _try(self) -> None:
        self._step.zero_()
        self._advance()

    def _advance(self) -> None:
        self._parts[3] = self._predict(self._parts[2], self._times[self._step], self._labels)
        weights = self._weights[self._step].view(4, 1, 1, 1, 1)
        following = (weights * self._parts).sum(0)
        self._parts[:2] = self._parts[2:]
        self._parts[2] = following
        self._step += 1


class Recorder:
    """Records the steps of a model's samples, and keeps the last recording for the next call.

    Args:
        mode: "auto" launches eagerly what cannot be recorded, "on" refuses it, "off" records
            nothing.
        say: In "auto", gets in one line why steps are launched eagerly, once; None says nothing.
        retry: Told why a recording failed, says whether it is worth another try.

    Raises:
        UserError: There is no such mode.
    """

    def __init__(
        self,
        mode: str = "auto",
        say: Callable[[str], None] | None = None,
        retry: Callable[[str], bool] | None = None,
    ) -> None:
        if mode not in MODES:
            raise UserError(f"--cuda-graph {mode!r} is none of {', '.join(MODES)}")
        self.mode, self._say, self._retry = mode, say, retry
        self._said: str | None = None
        self._key: Hashable = None
        self._steps: Steps | None = None

    def check(self, model: nn.Module, device: torch.device, sampler: str) -> bool:
        """Whether the steps of this sampler are to be recorded.

        Raises:
            UserError: They have to be and cannot.
        """
        if self.mode == "off":
            return False
        reason = why_not_recorded(model, device)
        if reason is None and sampler == "ddpm":
            reason = "sampler 'ddpm' draws noise on the host in every step"
        if reason is not None:
            self._give_up(reason)
        return reason is None

    def __call__(self, key: Hashable, make: Callable[[], Steps]) -> Steps | None:
        """Recorded steps, or None where they cannot be.

        Args:
            key: Of what they compute; equal keys share a recording.
            make: Gives steps that are not recorded yet.

        Raises:
            UserError: They have to be recorded and cannot.
        """
        if key != self._key:
            self._steps = None  # frees its memory first
            self._key = key
            try:
                self._steps = self._recorded(make)
            except RuntimeError as error:
                self._give_up(" ".join(str(error).split())[:200])
        return self._steps

    def _recorded(self, make: Callable[[], Steps]) -> Steps:
        steps = make()
        try:
            steps.record()
        except RuntimeError as error:
            if self._retry is None or not self._retry(str(error)):
                raise
            steps.record()
        return steps

    def _give_up(self, reason: str) -> None:
        if self.mode == "on":
            raise UserError(f"--cuda-graph on is not possible: {reason}; use auto or off")
        if self._say is not None and reason != self._said:
            self._say(f"steps are launched eagerly: {reason}")
        self._said = reason
