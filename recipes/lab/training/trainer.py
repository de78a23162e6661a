"""The state of a training run between two steps, and what one step does to it."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import attnzoo
from attnzoo.layers.shared_norm import share_batch_statistics
from backbones import DiT
from backbones.cast_once import CastWeights
from backbones.recorded import why_not_recorded
from recipes.lab.compiling import Compiling
from recipes.lab.console import UserError
from recipes.lab.data.checks import DataError
from recipes.lab.data.datasets import ImageDataset
from recipes.lab.data.latents import LatentDataset, decode, is_latent_folder, open_vae
from recipes.lab.diffusion import DIFFUSION_PRESETS, generator_for, sample
from recipes.lab.diffusion.schedule import forward_process
from recipes.lab.distributed import SUMS, differing_buffers, make_accelerator, shard
from recipes.lab.drawing.pictures import save_grid
from recipes.lab.files import refuse_links
from recipes.lab.training.batches import Batch, Batches
from recipes.lab.training.buckets import GradientBuckets
from recipes.lab.training.build import build_model, check_division, open_data
from recipes.lab.training.conversion import inherit
from recipes.lab.training.distillation import Distillation, make_objective
from recipes.lab.training.ema import WeightAverage
from recipes.lab.training.guard import look_inside, quartile_entry, quartile_sums, uncompiled
from recipes.lab.training.held_out import (
    MODEL_NAME,
    check_enough,
    held_out_losses,
    held_out_numbers,
    missing_line,
    open_held_out,
)
from recipes.lab.training.optimizer import make_optimizer
from recipes.lab.training.recorded import Numbers, RecordedStep
from recipes.lab.training.settings import Settings


class Trainer:
    """The state of a run between two steps.

    Args:
        settings: What to compute.
        trackers: Names of Accelerate's trackers.
        folder: Of the run: where trackers write, and a teacher lies.
        source: A trained model whose weights a new run begins with, and which may be its teacher.

    Attributes:
        inherited: What became of its tensors.

    Raises:
        UserError: The data cannot be used, or the settings do not fit it or each other.
        attnzoo.UsageError: The mechanism or one of its options is not one of the zoo's.
    """

    def __init__(
        self,
        settings: Settings,
        trackers: Sequence[str] = (),
        folder: Path | None = None,
        source: DiT | None = None,
    ) -> None:
        self.settings = settings
        self.accelerator = make_accelerator(
            settings.precision, log_with=list(trackers) or None, project_dir=folder
        )
        check_division(settings, self.accelerator.num_processes)
        self.dataset, self.vae = open_data(settings, self.accelerator.device)
        self._held_out: ImageDataset | None = None
        self.held_out_line: str | None = None  # on what its loss says nothing of
        if settings.held_out_every is not None:
            # Refused now, not after hours.
            encoder = None if is_latent_folder(settings.data) else self.vae
            self._held_out = open_held_out(settings, encoder)
            check_enough(self._held_out)
            self.held_out_line = missing_line(self._held_out, settings.held_out_images)
        self._undecodable: str | None = None  # why previews show latents
        self.diffusion = DIFFUSION_PRESETS[settings.preset]
        if self.accelerator.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as DiT
        torch.manual_seed(settings.seed)
        self.model = build_model(settings, self.dataset)
        self.inherited = None if source is None else inherit(source, self.model)
        self.model.to(self.accelerator.device).train()
        self.objective = make_objective(settings, self.diffusion, self.model, folder, source)
        if self.accelerator.num_processes > 1:
            share_batch_statistics(self.model)
        if settings.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.notes: list[str] = []  # what there is to say, once
        self.is_sharded = settings.sharded and self.accelerator.num_processes > 1
        self.casts: CastWeights | None = None
        self.compiling = Compiling(
            self.model,
            "off" if "features" in (settings.distil or {}) else settings.compile,
            settings.steps,
            self.notes.append,
            # Gathering weights is a break in the graph.
            fullgraph=not self.is_sharded,
        )
        if self.is_sharded:
            shard(self.model, self.accelerator, SUMS[settings.gradient_sums])
        else:
            # Without DDP, see GradientBuckets.
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self.buckets: GradientBuckets | None = None
        if self.accelerator.num_processes > 1 and not self.is_sharded:
            self.buckets = GradientBuckets(
                self.model, settings.bucket_mb, SUMS[settings.gradient_sums]
            )
        self.optimizer = make_optimizer(self.model, settings)
        self.average = WeightAverage(
            self.model,
            settings.ema_decay,
            settings.ema_ramp,
            1 if self.is_sharded else self.accelerator.num_processes,
            self.accelerator.process_index,
        )
        self.batches = Batches(
            settings,
            self.dataset,
            self.diffusion,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.accelerator.device,
        )
        self.step = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._are_compared = False
        self._names: list[str] = []  # of a step's numbers, those that depend on the model
        self._inputs: dict[str, Tensor] = {}  # of its last micro-step
        self._queued: deque[tuple[float, Numbers]] = deque()
        self.recorded: RecordedStep | None = None
        self.why_eager = "" if settings.cuda_graph == "off" else self._why_not_recorded()
        if settings.cuda_graph != "off" and self.why_eager is None:
            self.decide_on_device()
        elif settings.cuda_graph == "on":
            raise self._not_possible()

    def _not_possible(self) -> UserError:
        return UserError(f"--cuda-graph on is not possible: {self.why_eager}; use auto or off")

    def _why_not_recorded(self) -> str | None:
        if self.is_sharded:
            return "--sharded gathers weights by calls of the host"
        return why_not_recorded(self.model)

    def decide_on_device(self) -> None:
        """Lets steps be taken by a ``RecordedStep``: the optimizer is replaced by its kind."""
        self.optimizer = make_optimizer(self.model, self.settings, fused=True, capturable=True)
        schedule = forward_process(self.diffusion.num_train_timesteps)
        sources: list[object] = [schedule]
        if isinstance(self.objective, Distillation):
            sources += self.objective.teacher.modules()
        # Else the two would hold one another, and the GPU's memory would wait for the collector.
        gradients: Any = weakref.WeakMethod(self._gradients)
        self.recorded = RecordedStep(
            self.model, self.optimizer, self.average,
            lambda batch, wants_stop: gradients()(batch, wants_stop), sources,
        )  # fmt: skip

    def record(self) -> None:
        """Records the step where that is possible; otherwise ``why_eager`` says why not.

        Raises:
            UserError: It is not, and has been asked for.
        """
        is_lowered = self.accelerator.mixed_precision != "no"
        if self.casts is None and is_lowered and not self.is_sharded:
            self.casts = self._cast_weights()
        if self.recorded is None or self.recorded.is_tried:
            return
        # Not by the thread, which would go on to the next batch, perhaps on the GPU.
        batch = self.batches.at(self.step)
        reason = self.recorded.record(batch)
        if reason is not None and self.compiling.gives_up(reason):
            reason = self.recorded.record(batch)
        if reason is not None:
            self.why_eager = f"the step of {self.settings.attn!r} cannot be recorded ({reason})"
            if self.settings.cuda_graph == "on":
                raise self._not_possible()

    @property
    def is_ahead(self) -> bool:
        """Whether the device has been given a step after ``step`` already."""
        return bool(self._queued)

    def train_step(
        self, wants_stop: bool = False, ahead: bool = False
    ) -> tuple[dict[str, Any], bool]:
        """Takes one optimizer step, or skips it where loss or gradient are not finite.

        Args:
            wants_stop: Whether this process has been told to stop.
            ahead: Whether the state after this step is of no interest, so that a recorded one may
                be queued behind it before its numbers are there.

        Returns:
            What there is to log about it, the same in every process, and whether any process
            wants to stop.
        """
        self.record()
        while len(self._queued) < (2 if ahead and self.recorded else 1):
            self._queued.append(self._launched(wants_stop))
        return self._finished(*self._queued.popleft())

    def _cast_weights(self) -> CastWeights:
        """Finds what autocast casts, by one forward that leaves no trace."""
        before = [(tensor, tensor.clone()) for tensor in self.model.buffers()]
        # Two images: uncompiled, more might take more memory than a step does.
        batch = [tensor[:2].to(self.accelerator.device) for tensor in self.batches.at(self.step)]
        images, labels, timesteps, noise = batch

        def call() -> None:
            with self.accelerator.autocast():
                self.objective.training_losses(
                    self.model, images, labels, timesteps=timesteps, noise=noise
                )

        try:
            casts = CastWeights(self.model, call)
        finally:
            attnzoo.auxiliary_loss(self.model)
            for tensor, old in before:
                tensor.copy_(old)
        if self.buckets:
            self.buckets.follow(casts)
        return casts

    def _launched(self, wants_stop: bool) -> tuple[float, Numbers]:
        """Begins a step; the rate of learning, and what waits for its numbers."""
        settings, device = self.settings, self.accelerator.device
        index = self.step + len(self._queued)
        batch = self._batch()
        rate = settings.rate_at(index)
        if self.recorded is not None:
            self._seed(index, 0)
            share = self.average.share(index + 1)
            return rate, self.recorded(batch, rate=rate, share=share, wants_stop=wants_stop)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = [tensor.to(device, non_blocking=device.type == "cuda") for tensor in batch]
        before = [(tensor, tensor.clone()) for tensor in self.model.buffers()]
        told = torch.zeros((), device=device).fill_(wants_stop)

        def restore() -> None:
            for tensor, old in before:  # batch-norm statistics have already seen the batch
                tensor.copy_(old)

        # The only wait for the GPU in a step: all of its numbers in one copy.
        numbers = self.compiling.attempt(lambda: self._gradients(batch, told).tolist(), restore)
        if _are_finite(numbers):
            self.optimizer.step()
            self.average.move(self.average.share(index + 1))
        else:
            restore()
        return rate, lambda: numbers

    def _finished(self, rate: float, numbers: Numbers) -> tuple[dict[str, Any], bool]:
        """Waits for a step; what ``train_step`` returns."""
        *values, stop, norm = numbers()
        self.step += 1
        named = dict(zip(self._names, values, strict=False))
        if not _are_finite([*values, norm]):
            self.skipped += 1
            self.skipped_in_a_row += 1
            reason = f"loss {named['loss']}, gradient norm {norm}"
            skip = {"step": self.step, "loss": None, "skipped": reason}
            return {**skip, "skipped_in_all": self.skipped}, stop > 0
        self.skipped_in_a_row = 0
        self._compare_buffers()
        entry = {"step": self.step, **named, "gradient_norm": norm}
        entry |= {"learning_rate": rate, **quartile_entry(values[len(self._names) :])}
        if self.skipped:
            entry["skipped_in_all"] = self.skipped
        if self.step % self.settings.diagnose_every == 0:
            said = look_inside(self.model, self._inputs, is_compiled=self.compiling.is_on)
            if self.is_sharded:
                self.model.reshard()  # type: ignore[operator]
            if said:
                entry["blocks"] = said
        every = self.settings.held_out_every
        if every and (self.step % every == 0 or self.step == self.settings.steps):
            entry |= self.held_out()
        return entry, stop > 0

    def _compare_buffers(self) -> None:
        """After the first step of a call that counts, says what no checkpoint could hold."""
        if self._are_compared or self.accelerator.num_processes == 1:
            return
        self._are_compared = True
        if names := differing_buffers(self.model):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.notes.append(
                f"not alike in all processes: buffer {names[0]!r}{more}; a checkpoint holds the "
                f"first process': average what moves it, see docs/write-a-mechanism.md"
            )

    def held_out(self) -> dict[str, float]:
        """The held-out loss of the average, by quarter of the time axis too, and of the model."""
        was_training = self.model.training
        self.model.eval()
        try:
            with uncompiled() if self.compiling.is_on else contextlib.nullcontext():
                entry = {MODEL_NAME: self._held_out_losses().mean().item()}
                with self.average.applied():
                    return held_out_numbers(self._held_out_losses()) | entry
        finally:
            self.model.train(was_training)

    def _held_out_losses(self) -> Tensor:
        assert self._held_out is not None
        losses = held_out_losses(
            self.model,
            self.diffusion,
            self._held_out,
            self.settings.held_out_images,
            # Gathering weights takes all processes at once.
            accelerator=None if self.is_sharded else self.accelerator,
            device=self.accelerator.device,
        )
        if self.is_sharded:  # as the average finds and leaves it
            self.model.reshard()  # type: ignore[operator]
        return losses

    def _gradients(self, batch: Sequence[Tensor], wants_stop: Tensor) -> Tensor:
        """Leaves the gradients of a step, averaged and clipped; asks the device for no value.

        Args:
            batch: This process' share, on the device.
            wants_stop: Whether to stop, 0 or 1.

        Returns:
            (n,): the means of ``_names``, the loss first; its eight sums and counts by time; how
            many processes want to stop; the norm of the gradient.
        """
        settings, processes = self.settings, self.accelerator.num_processes
        share = [tensor.chunk(settings.accumulate) for tensor in batch]
        self.optimizer.zero_grad()
        if self.casts:
            self.casts.refresh()
        means: dict[str, Tensor] = {}
        by_time = torch.zeros(8, device=wants_stop.device)
        # FSDP2 averages gradients, and buckets add them up.
        parts_of_mean = settings.accumulate * (processes if self.buckets else 1)
        self._inputs = {}

        def model(**arguments: Any) -> Any:
            self._inputs.update(arguments)
            return self.model(**arguments)

        for index, (images, labels, timesteps, noise) in enumerate(zip(*share, strict=True)):
            if self.recorded is None:
                self._seed(self.step, index)
            is_last = index == settings.accumulate - 1
            if self.is_sharded:
                self.model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
            with self.casts.in_place() if self.casts else contextlib.nullcontext():
                with self.accelerator.autocast():
                    losses = self.objective.training_losses(
                        model,  # type: ignore[arg-type]
                        images,
                        labels,
                        timesteps=timesteps,
                        noise=noise,
                    )
                parts = {name: value.mean() for name, value in losses.items()}
                auxiliary = attnzoo.auxiliary_loss(self.model)
                if auxiliary is not None:
                    parts["auxiliary"] = auxiliary
                total = parts["loss"] if auxiliary is None else parts["loss"] + auxiliary
                if self.buckets and is_last:
                    self.buckets.begin()
                (total / parts_of_mean).backward()
            if self.casts and not (self.buckets and is_last):
                self.casts.hand_over()
            for name, value in parts.items():
                share_of_mean = value.detach() / settings.accumulate
                means[name] = means[name] + share_of_mean if name in means else share_of_mean
            by_time += quartile_sums(losses["mse"], timesteps, self._last_time())
        # Every process sees the same numbers and decides alike.
        values: Any = torch.stack([*means.values()]) / processes
        values = torch.cat([values, by_time, wants_stop.reshape(1)])
        if self.buckets:
            values, norm = self.buckets.finish(values)
        else:
            if self.is_sharded:
                values = self.accelerator.reduce(values, "sum")
            trained = [p for p in self.model.parameters() if p.requires_grad]
            for parameter in trained:
                if parameter.grad is None:  # counts as 0, as in buckets
                    parameter.grad = torch.zeros_like(parameter)
            gradients: Any = [p.grad for p in trained]
            norm = nn.utils.get_total_norm(gradients)
        if settings.gradient_clip is not None:  # else gradients would be multiplied by 1
            parameters = self.model.parameters()
            nn.utils.clip_grads_with_norm_(parameters, settings.gradient_clip, norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self._names = [*means]
        return torch.cat([values, norm.reshape(1).float()])

    def _seed(self, step: int, micro_step: int) -> None:
        """For noise inside a mechanism; all else comes from the step's own generator."""
        key = (self.settings.seed, step, self.accelerator.process_index, micro_step)
        torch.manual_seed(generator_for(*key).initial_seed())

    def _last_time(self) -> float:
        is_flow = self.diffusion.prediction == "flow"
        return 1.0 if is_flow else float(self.diffusion.num_train_timesteps)

    def _batch(self) -> Batch:
        return self.batches.take(self.step + len(self._queued))

    def sample_grid(self, path: Path) -> str | None:
        """Draws two images of each of the first ten classes, always from the same noise.

        Latents are decoded where their VAE can be loaded; otherwise their first channel is shown.

        Args:
            path: PNG to write, in the run's samples.

        Returns:
            What to say about the picture: the first time, why it shows latents.

        Raises:
            CannotWrite: The system refuses.
        """
        classes = min(10, self.dataset.num_classes)
        labels = torch.arange(classes).repeat(2)
        with self.average.applied():
            if not (self.accelerator.is_main_process or self.is_sharded):
                return None
            images = sample(
                self.model,
                self.diffusion,
                labels=labels,
                indices=torch.arange(len(labels)),
                seed=self.settings.seed,
                num_classes=self.dataset.num_classes,
                shape=(self.dataset.channels, self.dataset.resolution, self.dataset.resolution),
                sampler=self.diffusion.default_sampler,
                device=self.accelerator.device,
            )
            if self.is_sharded:
                self.model.reshard()  # type: ignore[operator]
        said = None
        if self.accelerator.is_main_process:
            said = self._find_vae()
            if self.vae is not None:
                images = decode(self.vae, images)
            refuse_links(path.parent.parent, path.parent)
            save_grid(images.cpu(), path, columns=classes)
        return said

    def _find_vae(self) -> str | None:
        """Loads the VAE of cached latents, once; what it says is why that is impossible."""
        dataset = self.dataset
        is_known = self.vae is not None or self._undecodable is not None
        if not isinstance(dataset, LatentDataset) or is_known:
            return None
        try:
            self.vae = open_vae(dataset.facts, None, self.accelerator.device)
        except DataError as error:
            self._undecodable = str(error)
            return f"sample grids show the first latent channel, not images: {error}"
        return None


def _are_finite(numbers: Sequence[float]) -> bool:
    """Whether a step counts: by its loss, the first of its numbers, and its norm, the last."""
    return math.isfinite(numbers[0]) and math.isfinite(numbers[-1])
