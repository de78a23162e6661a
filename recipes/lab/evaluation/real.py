"""The real images that a run is measured with: one place decides which they are.

A run of pixels is measured with what it was trained on, chosen by the same settings; a run of
latents with the folder that was encoded. Either is refused if it has changed since; ``--real``
names another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.lab.console import UserError
from recipes.lab.data.checks import DataError
from recipes.lab.data.datasets import (
    ImageDataset,
    Part,
    Request,
    divided,
    entry_of,
    kind_of,
    load_dataset,
)
from recipes.lab.data.images import find_images, training_folder
from recipes.lab.data.latents import CachedDataset, encoded_identity, is_latent_folder
from recipes.lab.diffusion import to_uint8
from recipes.lab.training.checkpoint import Run

HELD_OUT = 0.2  # of a folder, which has no test split, where the run leaves out none
# Far beyond any training run, so that these pictures of the infinite stream are new.
FRESH = 2**40


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealImages(Request):
    """Which real images a run is measured with.

    Attributes:
        identity: SHA-256 that the images must have, see ``ImageDataset.identity``; None knows
            none.
        encoded_by: Facts of the VAE and side of its latents, where the identity is of the
            images together with them.
        class_names: Classes that the images must have; None knows none.
        held_out: Share of the images to compare with, where there is no test split.
    """

    identity: str | None = None
    encoded_by: tuple[Mapping[str, Any], int] | None = None
    class_names: tuple[str, ...] | None = None
    held_out: float = HELD_OUT

    @property
    def kind(self) -> str:
        """Of the data set; see ``kind_of``."""
        return kind_of(self.data)

    def open(self) -> tuple[ImageDataset, ImageDataset]:
        """Real images to train an evaluator on, and others to compare with.

        They do not depend on a run's seed, so that every run is measured with one rule. The
        second part of a folder, which has no test split, is what the run has left out, or a fixed
        fifth of it that the run has seen and the evaluator has not.

        Raises:
            UserError: They are missing, too few, or others than the run was trained on.
        """
        asked = {field.name: getattr(self, field.name) for field in dataclasses.fields(Request)}
        train = load_dataset(**asked)
        if self.class_names is not None and train.class_names != self.class_names:
            differing = sorted({*train.class_names} ^ {*self.class_names}) or ["their order"]
            raise UserError(
                f"the classes of {self.data!r} are not the run's {len(self.class_names)}: "
                f"{', '.join(differing[:5])} differ; pass --real FOLDER with a sub-folder for each"
            )
        found = None if self.identity is None else train.identity()["sha256"]
        if found is not None and self.encoded_by is not None:
            found = encoded_identity(found, *self.encoded_by)
        if found != self.identity:
            raise UserError(
                f"the images of {self.data!r} have changed since the run was trained on them: "
                f"restore them, or pass --real FOLDER to measure with what is there now"
            )
        if "test" in entry_of(self.kind).splits:
            return train, load_dataset(**asked | {"split": "test"})
        if len(train) < 2:
            raise UserError(
                f"{self.data!r} has one image, and one is compared with others: give at least 2"
            )
        kept, left_out = divided(len(train), self.held_out)
        return Part(train, kept), Part(train, left_out)


def real_images(
    run: Run, config: Mapping[str, Any], real: str | Path | None = None
) -> tuple[RealImages | None, str]:
    """Which real images a run is measured with.

    Args:
        run: A trained run.
        config: See ``recipes.lab.training.checkpoint.Run.config``.
        real: Folder to take instead of what the run remembers.

    Returns:
        The images, or None and the reason why there are none.
    """
    settings, data = config["settings"], config["data"]
    latent = data.get("latent")
    names = tuple(data["class_names"])
    choice = {
        "resolution": data["resolution"] * (latent["factor"] if latent else 1),
        "strict": bool(settings.get("strict", False)),
        "class_count": settings.get("class_count"),
        "class_seed": settings.get("class_seed", 0),
        "class_names": names,
    }
    if real is not None:
        return _given(str(real), choice), ""
    choice["held_out"] = settings.get("hold_out") or HELD_OUT
    if latent is None or settings.get("vae"):  # its own images, encoded on the fly or as they are
        identity = data.get("identity") or {}
        is_of_images = latent is None or identity.get("kind", "").startswith("encoded ")
        images = RealImages(
            data=settings["data"],
            level=settings["level"],
            identity=identity.get("sha256") if is_of_images else None,
            encoded_by=(latent, data["resolution"]) if latent else None,
            **choice,
        )
        return images, ""
    source = data.get("source") or _source_of(settings["data"])
    if not isinstance(source, Mapping) or not isinstance(source.get("folder"), str):
        return None, f"the latents {run.folder} was trained on do not say what was encoded"
    if not Path(source["folder"]).is_dir():
        return None, f"the folder {source['folder']!r} that {run.folder}'s latents are of is gone"
    choice |= {
        "class_count": source.get("class_count"),
        "class_seed": source.get("class_seed") or 0,
        "strict": False,
    }
    return RealImages(data=source["folder"], identity=source.get("sha256"), **choice), ""


def _given(real: str, choice: dict[str, Any]) -> RealImages:
    folder = Path(real).expanduser()
    if not folder.is_dir():
        raise UserError(f"--real {real!r} is no folder; give one with a sub-folder per class")
    if is_latent_folder(real):
        raise UserError(f"--real {real!r} holds latents; give the folder of images")
    # Either all classes that the run's were drawn from, or just those.
    if find_images(training_folder(folder)).classes == choice["class_names"]:
        choice = choice | {"class_count": None}
    # The whole path, because a known name such as digits would win over a folder.
    return RealImages(data=str(folder.resolve()), **choice)


def _source_of(data: str) -> Mapping[str, Any] | None:
    # Runs of before the source was noted, whose latents may have been encoded since.
    if not is_latent_folder(data):
        return None
    try:
        return CachedDataset(Path(data).expanduser()).source
    except DataError:
        return None


def fresh_images(train: ImageDataset, count: int) -> tuple[Tensor, Tensor]:
    """Up to ``count`` real images (n, h, w, c) uint8 with labels, new ones if there are."""
    if train.infinite:
        chosen = torch.arange(FRESH, FRESH + count)
    else:
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:count]
    images, labels = train.batch(chosen)
    return to_uint8(images), labels
