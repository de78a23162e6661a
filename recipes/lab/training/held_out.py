"""Held-out loss: the training objective on images that the run has never seen.

Every image meets the same times and the same noise whatever the model, its seed and its step: one
time in each of ``TIMES`` equal parts of the time axis, all drawn from the image's index alone.
So two models are compared image by image, without sampling and without an evaluator, and the
stratified times leave little noise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from recipes.lab.console import UserError
from recipes.lab.data.datasets import ImageDataset, Part, divided, entry_of, kind_of, load_dataset
from recipes.lab.diffusion import Diffusion, generator_for
from recipes.lab.distributed import of_all
from recipes.lab.training.build import load_training_data
from recipes.lab.training.settings import Settings

IMAGES = Settings.held_out_images
TIMES = 8  # a multiple of 4, for the quarters
FEWEST = 10
_SEED = 0x48454C44  # of the times and the noise; no setting, so that all runs share them
_AT_ONCE = 64  # images; fixed, so that the sums do not depend on who computes them

MODEL_NAME = "held_out_loss_model"  # in a log, where the others are the average's
NAMES = ("held_out_loss", *(f"held_out_loss_quarter_{q + 1}" for q in range(4)))


def can_hold_out(settings: Settings) -> bool:
    """Whether a run of these settings leaves images out: by itself, or in a test split."""
    has_split = "test" in entry_of(kind_of(settings.data)).splits and settings.vae is None
    return bool(settings.hold_out) or has_split


def open_held_out(settings: Settings, vae: Any = None) -> ImageDataset:
    """The images that a run leaves out, as its model sees them: pixels or latents.

    They do not depend on the run's seed.

    Args:
        settings: Of the run.
        vae: What encodes images on the fly; None is of pixels or cached latents.

    Raises:
        UserError: There are none; the message says what to do.
        DataError: The data cannot be read.
    """
    if settings.hold_out:
        dataset = load_training_data(settings, vae)
        return Part(dataset, divided(len(dataset), settings.hold_out)[1])
    if not can_hold_out(settings) or vae is not None:
        raise UserError(
            f"the run has seen every image of {settings.data!r}: train with --hold-out 0.1 to "
            f"leave some out"
        )
    asked = {name: getattr(settings, name) for name in ("data", "resolution", "level")}
    return load_dataset(**asked, split="test")


def check_enough(dataset: ImageDataset) -> None:
    """Raises UserError where held-out images are too few for a loss."""
    if len(dataset) < FEWEST:
        raise UserError(
            f"{len(dataset)} held-out images of {dataset.name} are too few for a loss, which "
            f"needs {FEWEST}: give more images, or a larger --hold-out"
        )


def missing_classes(dataset: ImageDataset, most: int = IMAGES) -> list[str]:
    """Classes of which none of the first images is, by name; a loss says nothing of them.

    Args:
        dataset: Of held-out images; one that does not know its labels misses none.
        most: Images that are measured.
    """
    labels = dataset.known_labels
    present = None if labels is None else {*labels[:most].tolist()}
    return [
        name
        for label, name in enumerate(dataset.class_names)
        if present is not None and label not in present
    ]


def missing_line(dataset: ImageDataset, most: int = IMAGES) -> str | None:
    """``missing_classes`` in a line, or None where there is none."""
    if not (missing := missing_classes(dataset, most)):
        return None
    return (
        f"no held-out image is of {len(missing)} of the {len(dataset.class_names)} classes "
        f"({', '.join(missing[:5])}), so the held-out loss says nothing of them; --hold-out takes "
        f"a larger share"
    )


def held_out_losses(
    model: nn.Module,
    diffusion: Diffusion,
    dataset: ImageDataset,
    images: int = IMAGES,
    accelerator: Accelerator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The loss of a model on held-out images, by image and part of the time axis.

    Args:
        model: In eval mode, on ``device``.
        diffusion: What it predicts.
        dataset: Of images that it has not seen.
        images: How many; fewer where the data has fewer.
        accelerator: Of the processes that share the images; None computes all here.
        device: Where to compute.

    Returns:
        (n, ``TIMES``) float64: the mean squared error of each image in each part of the time
        axis, from t = 0 on; equal in every process.

    Raises:
        UserError: There are fewer than ``FEWEST`` images.
    """
    check_enough(dataset)
    count = min(images, len(dataset))
    rank, world = (
        (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    )

    def mine() -> list[tuple[int, Tensor]]:
        return [
            (start, _losses(model, diffusion, dataset, range(start, min(start + _AT_ONCE, count)),
                            device))
            for start in list(range(0, count, _AT_ONCE))[rank::world]
        ]  # fmt: skip

    found = mine() if accelerator is None else of_all(accelerator, mine)
    return torch.cat([losses for _, losses in sorted(found, key=lambda part: part[0])])


@torch.no_grad()
def _losses(
    model: nn.Module,
    diffusion: Diffusion,
    dataset: ImageDataset,
    indices: range,
    device: torch.device | str,
) -> Tensor:
    """(len(indices), TIMES) float64."""
    pixels, labels = dataset.batch(torch.arange(indices.start, indices.stop))
    pixels, labels = pixels.to(device), labels.to(device)
    # (images, TIMES) of times, and noise of each.
    draws = [generator_for(_SEED, index) for index in indices]
    places = torch.stack([torch.rand(TIMES, generator=draw) for draw in draws])
    places = (torch.arange(TIMES) + places) / TIMES
    noises = torch.stack([torch.randn(TIMES, *pixels.shape[1:], generator=draw) for draw in draws])
    columns = []
    for part in range(TIMES):
        losses = diffusion.training_losses(
            model,
            pixels,
            labels,
            timesteps=diffusion.timesteps_at(places[:, part]).to(device),
            noise=noises[:, part].to(device),
        )
        columns.append(losses["mse"].double().cpu())
    return torch.stack(columns, dim=1)


def held_out_numbers(losses: Tensor) -> dict[str, float]:
    """The mean over images and times, then over each quarter of the time axis.

    Args:
        losses: See ``held_out_losses``.
    """
    quarters = losses.unflatten(1, (4, -1)).mean(dim=(0, 2))
    return dict(zip(NAMES, [losses.mean().item(), *quarters.tolist()], strict=True))


def paired_by_image(first: Tensor, second: Tensor) -> tuple[float, float]:
    """The mean difference of two models on the same images, and its own standard error.

    Args:
        first: (n, TIMES), of one model, or (n, 1) of its means by image.
        second: The same images' of another.
    """
    differences = (first - second).mean(dim=1)
    return differences.mean().item(), differences.std().item() / len(differences) ** 0.5


def images_needed(first: Tensor, second: Tensor, share: float = 0.1) -> float:
    """How many images make the error of a paired difference a share of that difference.

    Args:
        first: (n, TIMES), of one model, or (n, 1) of its means by image.
        second: The same images' of another.
        share: Of the difference's size, that one standard error may take.

    Returns:
        A number of images, at least 1; infinite where the two do not differ.
    """
    mean, error = paired_by_image(first, second)
    if mean == 0:
        return math.inf
    return max(1.0, len(first) * (error / (share * mean)) ** 2)
