"""What a run is, said before it starts: device, data, tokens, cost, memory, rate of learning."""

from __future__ import annotations

from pathlib import Path

import torch

from attnzoo.counting import count_macs
from attnzoo.ops.optional import reason
from recipes.lab.console import UserError, one_line
from recipes.lab.data.datasets import kind_of
from recipes.lab.data.latents import is_latent_folder
from recipes.lab.distributed import neighbors
from recipes.lab.training.build import build_model
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.memory import free_bytes
from recipes.lab.training.settings import Settings
from recipes.lab.training.trainer import Trainer

# From here on pixels cost what hardly anybody means to pay: 1024 tokens, where latents have 64.
_LARGE = 128
_VAE_FACTOR, _VAE_PATCH = 8, 2  # of the usual VAE, and of DiT on its latents


def banner(trainer: Trainer, run: Run, needed: int) -> str:
    """Some lines about a run.

    Args:
        trainer: Before its first step.
        run: Where it goes.
        needed: Of ``step_bytes``.
    """
    settings, model, dataset = trainer.settings, trainer.model, trainer.dataset
    device = trainer.accelerator.device
    grid = model.token_grid(dataset.resolution, dataset.resolution)
    tokens = grid[0] * grid[1]
    try:
        whole = model
        if trainer.is_sharded:  # its forward takes all processes
            with torch.device("meta"):
                whole = build_model(settings, dataset)
        macs = f"{count_macs(whole, grid=grid).total / 1e9:.3g} G multiply-accumulates"
        why_not = None
    except Exception as error:  # a mechanism of one's own need not be countable to be trained
        macs, why_not = "multiply-accumulates not counted", reason(error)
    images = "endless" if dataset.infinite else str(len(dataset))
    side = dataset.resolution * dataset.latent_factor
    latents = f" as {dataset.resolution} px latents" if dataset.latent_factor > 1 else ""
    total, free = memory_of(trainer, needed)
    left = "" if free is None else f" of {free / 1e9:.1f} GB free"
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"{run.folder}: {settings.attn}, {parameters / 1e6:.1f} M parameters, {tokens} tokens "
        f"and {macs} per image",
        f"{on}, {dataset.name}: {images} images of {side} px{latents}, {dataset.num_classes} "
        f"classes; a step of {settings.batch_size} takes about {total / 1e9:.2g} GB{left}",
        _how(settings, None if dataset.infinite else len(dataset)),
    ]
    if why_not:
        lines.append(f"multiply-accumulates are not counted: {one_line(why_not)}")
    fewer = (side // _VAE_FACTOR // _VAE_PATCH) ** 2
    if dataset.latent_factor == 1 and side >= _LARGE and tokens > fewer:
        lines.append(
            f"it trains on pixels, {tokens} tokens per image; latents of a VAE would be about "
            f"{fewer}: encode them once with recipes/encode.py, or give --vae FOLDER_OR_ID"
        )
    if trainer.held_out_line:
        lines.append(trainer.held_out_line)
    return "\n".join(lines)


def _how(settings: Settings, images: int | None) -> str:
    seen = settings.steps * settings.batch_size
    epochs = "" if images is None else f" ({seen / images:.3g} epochs)"
    rises = f", rising over {settings.warmup_steps}" if settings.warmup_steps else ""
    falls = f", {settings.decay}" + (
        f" over the last {settings.decay_steps}" if settings.decay_steps else ""
    )
    decay = f", weight decay {settings.weight_decay:g}" if settings.weight_decay else ""
    return (
        f"{settings.steps} steps of {settings.batch_size} images{epochs} at a rate of "
        f"{settings.learning_rate:g}{rises}{falls}{decay}"
    )


def memory_of(trainer: Trainer, needed: int) -> tuple[int, int | None]:
    """Bytes that a step takes where it computes, of all processes there, and bytes that are free.

    Args:
        trainer: Before its first step.
        needed: Of ``step_bytes``.
    """
    device = trainer.accelerator.device
    shared = needed * (neighbors() if device.type == "cpu" else 1)
    return shared, free_bytes(device)


def refuse_pixels(settings: Settings) -> None:
    """Raises UserError where the recipe for latents would train on pixels unasked."""
    data = Path(settings.data).expanduser()
    is_images = (
        kind_of(settings.data) == "folder" and data.is_dir() and not is_latent_folder(str(data))
    )
    if settings.preset == "dit" and is_images and settings.vae is None:
        raise UserError(
            f"--preset dit is the recipe for latents, and {settings.data!r} holds images: give "
            f"their encoder with --vae FOLDER_OR_ID, encode them once with recipes/encode.py, or "
            f"train on pixels all the same with --pixels"
        )
