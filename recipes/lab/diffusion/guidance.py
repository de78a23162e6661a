"""Images from noise, with classifier-free guidance.

The noise of a sampled image depends on ``(seed, index)`` alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recipes.lab.console import UserError, progress_bar
from recipes.lab.diffusion.objective import Diffusion, split_output
from recipes.lab.diffusion.randomness import generator_for
from recipes.lab.diffusion.recorded import Recorder, Steps

PRECISIONS = ("fp32", "bf16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are computed, whatever they are of.

    Attributes:
        cfg: Guidance scale; 1 runs the conditional pass only, 0 gives the unconditional model.
        cfg_channels: Guide only that many leading channels and leave the rest conditional. DiT's
            published figures guide 3 of 4 latent channels; None guides all.
        sampler: One of ``SAMPLERS`` that fits the prediction.
        steps: Number of solver steps; guidance doubles the work of each.
        batch_size: Images per model call, twice that under guidance.
        precision: "fp32", or "bf16" for the model under autocast.
    """

    cfg: float = 1.0
    cfg_channels: int | None = None
    sampler: str = "dpm++"
    steps: int = 20
    batch_size: int = 64
    precision: str = "fp32"

    def check(
        self,
        diffusion: Diffusion,
        num_classes: int,
        channels: int,
        labels: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> None:
        """Refuses what ``sample`` cannot do, without doing anything.

        Args:
            diffusion: What the model predicts.
            num_classes: Number of classes, and index of the null class.
            channels: Of an image.
            labels: As for ``sample``; None looks at none.
            indices: As for ``sample``; None stands for as many as there are labels.

        Raises:
            UserError: If cfg is not finite, a label is out of range, labels and indices are not
                integers of one length, cfg_channels or batch_size is out of range, the sampler or
                its number of steps does not fit, or there is no such precision.
        """
        if self.precision not in PRECISIONS:
            raise UserError(f"precision {self.precision!r} is none of {', '.join(PRECISIONS)}")
        if not math.isfinite(self.cfg):
            raise UserError(f"cfg must be finite, got {self.cfg}")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.cfg_channels is not None and not 1 <= self.cfg_channels <= channels:
            raise UserError(f"cfg_channels must lie in 1..{channels}, got {self.cfg_channels}")
        if labels is not None:
            _check_labels(labels, labels if indices is None else indices, num_classes)
        diffusion.check_sampler(self.sampler, self.steps)


@torch.no_grad()
def sample(
    model: nn.Module,
    diffusion: Diffusion,
    *,
    labels: Tensor,
    indices: Tensor,
    seed: int,
    num_classes: int,
    shape: tuple[int, int, int],
    device: str | torch.device = "cpu",
    recorder: Recorder | None = None,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """Generate one image per label.

    All noise of image i comes from ``generator_for(seed, indices[i])``, so an image depends
    neither on the batch size nor on its neighbors, up to rounding in the model. With guidance,
    ``uncond + cfg * (cond - uncond)`` replaces the prediction; a learned variance is always the
    conditional one.

    Args:
        model: As for ``Diffusion.training_losses``, already on ``device``. It runs in eval mode;
            the mode of each submodule is restored afterwards.
        diffusion: What the model predicts.
        labels: (n,) integers in 0..num_classes; ``num_classes`` is the null class.
        indices: (n,) integers, the global number of each image.
        seed: Seed of the whole sample.
        num_classes: Number of classes, and index of the null class.
        shape: (c, h, w) of an image.
        device: Where to compute.
        recorder: Records steps as a CUDA graph where it can; None launches them eagerly. Batches
            are then of equal size, at most ``batch_size``, and the last is filled up.
        progress: Whether to show a bar over solver steps.
        **options: See ``Sampling``.

    Returns:
        (n, c, h, w) float32 on ``device``, in the model's space and not clamped.

    Raises:
        UserError: If ``Sampling.check`` does.

    Source: Ho and Salimans 2022 (2207.12598) for guidance.
    """
    how = Sampling(**options)
    how.check(diffusion, num_classes, shape[0], labels, indices)
    sampler, steps, batch_size = how.sampler, how.steps, how.batch_size
    num_images = len(labels)
    if num_images == 0:
        return torch.empty(0, *shape, device=device)
    device = torch.device(device)
    guided_channels = how.cfg_channels or shape[0]
    guidance = _Guidance(model, diffusion, num_classes, how.cfg, guided_channels, how.precision)
    num_batches = math.ceil(num_images / batch_size)
    total = num_batches * steps
    bar = progress_bar(total=total, desc="sampling", unit="step", shown=progress)
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        recorded = None
        if recorder is not None and recorder.check(model, device, sampler):
            even = math.ceil(num_images / num_batches)

            def make() -> Steps:
                scheduler = diffusion.scheduler(sampler, steps)
                return Steps(
                    model, lambda *inputs: guidance.predict(*inputs)[0],
                    scheduler, even, shape, num_classes, device,
                )  # fmt: skip

            recorded = recorder((guidance, sampler, steps, even, shape), make)
            batch_size = even if recorded else batch_size
        batches = []
        for start in range(0, num_images, batch_size):
            chosen = slice(start, start + batch_size)
            generators = [generator_for(seed, index) for index in indices[chosen].tolist()]
            noise = torch.stack([torch.randn(shape, generator=one) for one in generators])
            inputs = noise.to(device), labels[chosen].to(device=device, dtype=torch.int64)
            if recorded is not None:
                batches.append(recorded(*inputs, bar.update))
                continue
            scheduler = diffusion.scheduler(sampler, steps)
            batches.append(_solve(guidance, *inputs, generators, scheduler, sampler, bar.update))
    finally:
        for module in was_training:
            module.training = True
        bar.close()
    return torch.cat(batches)


def to_uint8(images: Tensor) -> Tensor:
    """Quantize images as DiT's evaluation does, clamp(127.5 x + 128, 0, 255) rounded down.

    Args:
        images: (n, c, h, w), nominally in [-1, 1].

    Returns:
        (n, h, w, c) uint8, contiguous, on the same device.
    """
    levels = (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()  # (n, c, h, w) -> (n, h, w, c)


class _Guidance(NamedTuple):
    """A model with classifier-free guidance, called as (noisy, timestep, labels)."""

    model: nn.Module
    diffusion: Diffusion
    num_classes: int
    scale: float
    channels: int
    precision: str = "fp32"

    def _lowered(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        # Each weight is cast once a call anyway, and a recording must not hold a cache of them.
        return torch.autocast(device_type, torch.bfloat16, cache_enabled=False)

    def predict(self, noisy: Tensor, time: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        guided = self.scale != 1.0
        num_images, num_channels = noisy.shape[:2]
        if guided:
            noisy = torch.cat([noisy, noisy])  # (2b, c, h, w), conditional half first
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        parameter = next(self.model.parameters(), noisy)
        with self._lowered(noisy.device.type):
            output = self.model(
                hidden_states=noisy.to(parameter.dtype),
                timestep=time.expand(len(noisy)),
                class_labels=labels,
                return_dict=False,
            )[0].float()
        prediction, variance = split_output(output, num_channels, self.diffusion.learn_sigma)
        if guided:
            prediction, unconditional = prediction.chunk(2)
            variance = None if variance is None else variance[:num_images]
            conditional, rest = prediction.tensor_split([self.channels], dim=1)
            unconditional = unconditional[:, : self.channels]
            prediction = unconditional + self.scale * (conditional - unconditional)
            if rest.shape[1]:
                prediction = torch.cat([prediction, rest], dim=1)
        return prediction, variance


def _solve(
    guidance: _Guidance,
    noisy: Tensor,
    labels: Tensor,
    generators: list[torch.Generator],
    scheduler: Any,
    sampler: str,
    tick: Callable[[], Any],
) -> Tensor:
    """(b, c, h, w) -> (b, c, h, w), launched eagerly."""
    shown_times = scheduler.timesteps.to(noisy.device)  # at once: each copy waits for the GPU
    for time, shown_time in zip(scheduler.timesteps, shown_times, strict=True):
        prediction, variance = guidance.predict(noisy, shown_time, labels)
        options: dict[str, Any] = {"return_dict": False}
        if sampler == "ddpm":
            options["generator"] = generators
            if variance is not None:
                prediction = torch.cat([prediction, variance], dim=1)  # (b, 2c, h, w)
        noisy = scheduler.step(prediction, time, noisy, **options)[0]
        tick()
    return noisy


def _check_labels(labels: Tensor, indices: Tensor, num_classes: int) -> None:
    if labels.ndim != 1 or labels.shape != indices.shape:
        raise UserError(
            f"labels {tuple(labels.shape)} and indices {tuple(indices.shape)} "
            "must both have shape (n,)"
        )
    for name, values in (("labels", labels), ("indices", indices)):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise UserError(f"{name} must be integers, not {values.dtype}")
    outside = labels[(labels < 0) | (labels > num_classes)]
    if len(outside):
        raise UserError(
            f"labels must lie in 0..{num_classes} ({num_classes} is the null class), "
            f"got {outside[0].item()}"
        )
