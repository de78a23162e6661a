"""Many images of a run, generated shard by shard: resumable, the same on any number of processes.

Image i of a sample has its own noise and a label that depends on i alone, and a shard always holds
the same images, so that neither an interruption nor the number of processes changes a pixel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recipes.lab.console import UserError, progress_bar
from recipes.lab.diffusion import to_uint8
from recipes.lab.evaluation.archives import read_npz, save_npz
from recipes.lab.evaluation.cache import key_digest
from recipes.lab.files import refuse_links
from recipes.lab.sampling import Checkpoint, RunSampler, read_checkpoint
from recipes.lab.training.checkpoint import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What decides the images of a sample.

    Attributes:
        samples: Number of images.
        cfg: Guidance scale.
        cfg_channels: Leading channels that are guided; None guides all.
        steps: Model evaluations per image.
        sampler: None takes the one that suits the run.
        seed: Of noise and labels.
        weights: "ema" or "model".
        labels: "balanced" (equal numbers of each class, shuffled) or "random" (drawn).
        shard_size: Images per file.
        batch_size: Images per model call.
        precision: Of the model's matrix products, "fp32" or "bf16".
    """

    samples: int = 1000
    cfg: float = 1.0
    cfg_channels: int | None = None
    steps: int = 20
    sampler: str | None = None
    seed: int = 0
    weights: str = "ema"
    labels: str = "balanced"
    shard_size: int = 250
    batch_size: int = 64
    precision: str = "fp32"

    def sampling(self) -> dict[str, Any]:
        """The part that ``recipes.lab.diffusion.sample`` takes for every scale and seed."""
        names = ("cfg_channels", "steps", "sampler", "batch_size", "precision")
        return {name: getattr(self, name) for name in names}

    def shards(self) -> list[range]:
        """The indices of each shard's images; no images are one empty shard."""
        starts = range(0, max(1, self.samples), self.shard_size)
        return [range(start, min(start + self.shard_size, self.samples)) for start in starts]


class Images(NamedTuple):
    """Images with the classes that were asked for.

    Attributes:
        pixels: (n, h, w, c) uint8.
        labels: (n,) int64.
        finite: (n,) bool; False marks an image with a NaN or infinity, whose pixels are black.
    """

    pixels: Tensor
    labels: Tensor
    finite: Tensor

    @classmethod
    def all_finite(cls, pixels: Tensor, labels: Tensor) -> Images:
        """Images that were pixels from the start."""
        return cls(pixels, labels, torch.ones(len(labels), dtype=torch.bool))


def sample_labels(plan: Plan, num_classes: int) -> Tensor:
    """The class of each image, (samples,) int64; shuffled, as the Inception Score needs it."""
    generator = torch.Generator().manual_seed(plan.seed)
    if plan.labels == "random":
        return torch.randint(num_classes, (plan.samples,), generator=generator)
    order = torch.randperm(plan.samples, generator=generator)
    return (torch.arange(plan.samples) % num_classes)[order]


def shard_folder(run: Run, plan: Plan, checkpoint: Checkpoint | None = None) -> Path:
    """Where the shards of a plan lie; another checkpoint (None: the newest) or plan has another.

    Raises:
        UserError: The run has no whole checkpoint, or the way there leads through a link.
    """
    if checkpoint is None:
        checkpoint = read_checkpoint(run, plan.weights)
    key = {**dataclasses.asdict(plan), "checkpoint": checkpoint.digest}
    if plan.precision == "fp32":  # as folders of before it could be chosen
        del key["precision"]
    tail = key_digest(**key)[:10]
    folder = run.evaluation / f"step-{checkpoint.step:08d}-cfg-{plan.cfg:g}-{tail}"
    return refuse_links(run.folder, folder)


def generate(
    run: Run,
    plan: Plan,
    *,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
    draw: RunSampler | None = None,
) -> Path:
    """Generates this process's share of the shards that are still missing, and names their folder.

    Args:
        run: A trained run.
        plan: What to generate.
        rank: Number of this process; it takes every ``world``-th shard.
        world: Number of processes.
        progress: Whether to show a bar.
        draw: What draws; None loads the run's newest checkpoint.

    Raises:
        CannotWrite: The system refuses.
    """
    draw = draw or RunSampler(run, plan.weights)
    folder = shard_folder(run, plan, draw.checkpoint)
    missing = [
        (number, shard)
        for number, shard in list(enumerate(plan.shards()))[rank::world]
        if _read_shard(folder, number, shard, draw.image_shape) is None
    ]
    labels = sample_labels(plan, len(draw.data["class_names"]))
    for number, shard in progress_bar(missing, desc=f"cfg {plan.cfg:g}", shown=progress):
        indices = torch.arange(shard.start, shard.stop)
        images = draw(labels[indices], indices, cfg=plan.cfg, seed=plan.seed, **plan.sampling())
        finite = images.isfinite().flatten(1).all(1)
        pixels = to_uint8(torch.where(finite[:, None, None, None], images, -1.0))
        save_npz(_shard_file(folder, number), pixels, labels=labels[indices], finite=finite)
    return folder


def read_shards(folder: Path, plan: Plan, numbers: Sequence[int] | None = None) -> Images:
    """Reads shards, all or some, in order.

    Raises:
        UserError: One is missing or damaged.
    """
    parts = []
    for number, shard in enumerate(plan.shards()):
        if numbers is not None and number not in numbers:
            continue
        found = _read_shard(folder, number, shard)
        if found is None:
            raise UserError(
                f"{_shard_file(folder, number)} is missing or damaged; evaluate the run again"
            )
        parts.append(found)
    return Images(*map(torch.cat, zip(*parts, strict=True)))


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npz"


def _read_shard(
    folder: Path, number: int, shard: range, image_shape: tuple[int, int, int] | None = None
) -> Images | None:
    """The images of a shard, or None where it is missing or not what it should be."""
    file = _shard_file(folder, number)
    if not file.is_file():
        return None
    try:
        stored = read_npz(file, ("arr_0", "labels", "finite"))
        found = pixels, labels, finite = [stored[name] for name in ("arr_0", "labels", "finite")]
    except (UserError, KeyError):
        return None
    count = (len(shard),)
    is_right = (
        [array.dtype for array in found] == [np.uint8, np.int64, np.bool_]
        and pixels.ndim == 4
        and pixels.shape[:1] == labels.shape == finite.shape == count
        and image_shape in (None, (pixels.shape[3], *pixels.shape[1:3]))
    )
    if not is_right:
        return None
    return Images(*(torch.from_numpy(np.ascontiguousarray(array)) for array in found))
