"""What every step of a run sees: images, labels, times and noise, made a few steps ahead."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from recipes.lab.data.datasets import ImageDataset, divided
from recipes.lab.data.latents import LatentDataset
from recipes.lab.data.order import batch_indices
from recipes.lab.diffusion import Diffusion, generator_for
from recipes.lab.training.settings import Settings

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
# Steps. One thread makes the noise of 64 images of 64 x 64 in 5 ms, in which a GPU could take a
# small model's step twice.
AHEAD = 4


class Batches:
    """One process' share of every step's global batch, a pure function of seed and step.

    For a GPU ``AHEAD`` threads make the next steps' batches while the current step runs; one at a
    time reads from the data set. What goes wrong there is raised when that step asks for it, so
    that the steps before it count.

    Args:
        settings: Of the run.
        dataset: Images or latents.
        diffusion: What draws the times.
        rank: Number of this process.
        world: Number of processes.
        device: Where the steps compute.

    Attributes:
        ahead: Whether threads are used. On a CPU they would take time from the step, of which a
            batch is a hundredth.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: ImageDataset,
        diffusion: Diffusion,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        self.settings, self.dataset, self.diffusion = settings, dataset, diffusion
        self.rank, self.world, self.device = rank, world, device
        share = settings.hold_out
        self.kept = divided(len(dataset), share)[0] if share else None
        self.ahead = device.type == "cuda"
        self._threads = ThreadPoolExecutor(AHEAD, "batches", self._choose_device)
        self._begun: dict[int, Future[Batch]] = {}
        self._reading = threading.Lock()

    def take(self, step: int) -> Batch:
        """The batch of ``step``; the next ones are then begun.

        Returns:
            Images, labels, times and noise, micro-step after micro-step, on the CPU: pinned where
            a GPU computes.

        Raises:
            DataError: A file of the data set has become unreadable.
        """
        if not self.ahead:
            return self.at(step)
        wanted = [step, *range(step + 1, min(step + 1 + AHEAD, self.settings.steps))]
        for other in self._begun.keys() - wanted:
            self._begun.pop(other).cancel()
        for one in wanted:
            if one not in self._begun:
                self._begun[one] = self._threads.submit(self.at, one)
        return self._begun.pop(step).result()

    def at(self, step: int) -> Batch:
        """Makes the batch of ``step``."""
        settings, dataset = self.settings, self.dataset
        indices = batch_indices(dataset, settings.seed, step, settings.batch_size, self.kept)
        generator = generator_for(settings.seed, step)
        batch = len(indices)
        flipped = torch.zeros(batch, dtype=torch.bool)
        if dataset.horizontal_flip:
            flipped = torch.rand(batch, generator=generator) < 0.5
        dropped = torch.rand(batch, generator=generator) < settings.label_dropout
        timesteps = self.diffusion.sample_timesteps(batch, generator)
        shape = (batch, dataset.channels, dataset.resolution, dataset.resolution)
        noise = torch.randn(shape, generator=generator)
        mine = self._positions()
        if isinstance(dataset, LatentDataset):
            posterior = torch.randn(shape, generator=generator)
            with self._reading:
                images, labels = dataset.draw(indices[mine], flipped[mine], posterior[mine])
        else:
            with self._reading:
                images, labels = dataset.batch(indices[mine])
            images = torch.where(flipped[mine, None, None, None], images.flip(-1), images)
        labels = torch.where(dropped[mine], dataset.num_classes, labels)
        made = images, labels, timesteps[mine], noise[mine]
        if self.device.type != "cuda":
            return made
        # The host waits for a copy from memory that is not pinned.
        return tuple(tensor.pin_memory() for tensor in made)  # type: ignore[return-value]

    def close(self) -> None:
        """Ends the threads, once they have made what they have begun."""
        self._threads.shutdown(cancel_futures=True)

    def _positions(self) -> Tensor:
        # Micro-step m holds the same images whatever the number of processes.
        grid = torch.arange(self.settings.batch_size)
        return grid.view(self.settings.accumulate, self.world, -1)[:, self.rank].flatten()

    def _choose_device(self) -> None:
        # A new thread is on the first GPU, whichever is this process'.
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)
