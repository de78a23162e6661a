"""From settings to what they describe: the data and the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from attnzoo import InvalidValue
from backbones import DiT, build_backbone
from recipes.lab.console import UserError
from recipes.lab.data.checks import DataError
from recipes.lab.data.datasets import ImageDataset, entry_of, kind_of, load_dataset
from recipes.lab.data.latents import (
    DEFAULT_RESOLUTION,
    CachedDataset,
    EncodedDataset,
    LatentDataset,
    is_latent_folder,
    load_vae,
    open_vae,
)
from recipes.lab.diffusion import DIFFUSION_PRESETS
from recipes.lab.training.settings import Settings


def open_data(settings: Settings, device: torch.device) -> tuple[ImageDataset, Any]:
    """What a run trains on, and the VAE whose latents it is, or None.

    Raises:
        DataError: It does not exist or does not fit.
        UserError: It cannot be held out as asked.
    """
    vae = None
    if settings.vae is None:
        dataset = load_training_data(settings)
    elif is_latent_folder(settings.data):
        dataset = load_training_data(settings)
        assert isinstance(dataset, LatentDataset)
        vae = open_vae(dataset.facts, settings.vae, device)
    else:
        vae = load_vae(settings.vae, device)
        dataset = load_training_data(settings, vae)
    if not settings.hold_out:
        return dataset, vae
    if not is_latent_folder(settings.data):
        kind = kind_of(settings.data)
        if "test" in entry_of(kind).splits:
            raise UserError(f"{kind} has held-out images of its own: drop --hold-out")
    if len(dataset) < 2:
        raise UserError(f"--hold-out leaves nothing of one image in {settings.data!r}")
    return dataset, vae


def check_division(settings: Settings, processes: int) -> None:
    """Raises UserError where so many processes cannot share a step's images."""
    parts = settings.accumulate * processes
    if settings.batch_size % parts:
        raise UserError(
            f"batch size {settings.batch_size} does not divide among {processes} processes with "
            f"{settings.accumulate} micro-steps each; choose a multiple of {parts}"
        )


def load_training_data(settings: Settings, vae: Any = None) -> ImageDataset:
    """What the settings train on: images, cached latents, or images that ``vae`` encodes.

    Raises:
        DataError: It does not exist or does not fit.
    """
    if is_latent_folder(settings.data):
        dataset = CachedDataset(Path(settings.data).expanduser())
        if settings.resolution not in (None, dataset.image_resolution):
            raise DataError(
                f"the latents in {settings.data} are of resolution {dataset.image_resolution}, "
                f"not {settings.resolution}; encode them anew, or drop --resolution"
            )
        if settings.class_count not in (None, dataset.num_classes):
            raise DataError(
                f"the latents in {settings.data} have {dataset.num_classes} classes; choose "
                f"classes when encoding, with recipes/encode.py --class-count"
            )
        return dataset
    resolution = settings.resolution
    if vae is not None and resolution is None:
        resolution = DEFAULT_RESOLUTION
    images = load_dataset(
        settings.data,
        resolution=resolution,
        level=settings.level,
        seed=settings.seed,
        strict=settings.strict,
        class_count=settings.class_count,
        class_seed=settings.class_seed,
    )
    return images if vae is None else EncodedDataset(images, vae)


def build_model(settings: Settings, dataset: ImageDataset) -> DiT:
    """The backbone that the settings describe, for images or latents of ``dataset``.

    Raises:
        UserError: No mechanism has this name.
        attnzoo.UsageError: An option cannot be used.
    """
    is_latent = dataset.latent_factor > 1
    chosen = {} if settings.feedforward is None else {"feedforward": settings.feedforward}
    patch_size = settings.patch_size or (2 if is_latent or dataset.resolution <= 16 else 4)
    try:
        return build_backbone(
            settings.attn,
            settings.size,
            settings.protocol,
            dataset.resolution * dataset.latent_factor,
            latent_factor=dataset.latent_factor,
            patch_size=patch_size,
            in_channels=dataset.channels,
            num_classes=dataset.num_classes,
            learn_sigma=DIFFUSION_PRESETS[settings.preset].learn_sigma,
            attn_options=settings.attn_options,
            **{**chosen, **(settings.backbone or {})},
        )
    except InvalidValue as error:
        if "unknown attention" in str(error):
            raise UserError(f"{error}; one of your own needs --import FILE|MODULE") from error
        raise
