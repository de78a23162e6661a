"""Feature extractors: images in; pool, spatial and class features out.

An extractor is any callable of uint8 images (n, h, w, c) that gives ``Features``, with a ``name``
and a ``digest``. The default, ``smallcnn``, is a small network trained here on the real training
images with a fixed seed; ``inception.py`` beside is for comparison with published numbers. Only
Inception's numbers carry the bare names: ``FID``, against ``FID[smallcnn]``.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from recipes.lab.console import UserError, printable
from recipes.lab.data.datasets import ImageDataset, entry_of
from recipes.lab.data.order import batch_indices
from recipes.lab.diffusion import to_uint8
from recipes.lab.evaluation.cache import cached, key_digest
from recipes.lab.files import sha256

ARCHITECTURE = "smallcnn-1"  # part of the cache's key: change it with anything below
POOL_DIM = 64
SPATIAL_CHANNELS = 7  # as many as sFID takes of Inception
SPATIAL_SIDE = 3
BATCH_SIZE = 128
STATISTICS_IMAGES = 2048
UNKNOWN = "unknown"  # digest of an extractor that nobody vouches for
Network = TypeVar("Network", bound=nn.Module)


class Features(NamedTuple):
    """What an extractor sees in n images.

    Attributes:
        pool: (n, d), for FID, KID, precision, recall, density and coverage.
        spatial: (n, d'), for sFID and sKID.
        logits: (n, classes), for the Inception Score and class accuracy.
    """

    pool: Tensor
    spatial: Tensor
    logits: Tensor

    @classmethod
    def concatenate(cls, parts: list[Features]) -> Features:
        """The features of all parts in their order."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def select(self, rows: Tensor) -> Features:
        """The features of some images, by mask or index."""
        return Features(*(tensor[rows] for tensor in self))


class Extractor(Protocol):
    """What the evaluation asks of an extractor.

    Attributes:
        name: What the numbers are labeled with.
        digest: SHA-256 of whatever decides its output.
        knows_classes: Whether its classes are those of the data.
    """

    name: str
    digest: str
    knows_classes: bool

    def __call__(self, images: Tensor) -> Features:
        """(n, h, w, c) uint8 -> features on the CPU."""
        ...


@dataclasses.dataclass
class CustomExtractor:
    """Any callable as an extractor.

    Attributes:
        name: What the numbers are labeled with.
        function: (n, h, w, c) uint8 -> ``Features``.
        digest: Tells one version of the function from another; of an unknown one nothing is
            cached.
        knows_classes: Whether its logits are of the data's classes.
    """

    name: str
    function: Callable[[Tensor], Features]
    digest: str = UNKNOWN
    knows_classes: bool = False

    def __call__(self, images: Tensor) -> Features:
        return self.function(images)


def with_weights(
    model: Network, file: Path, name: str, sha256_prefix: str | None, advice: str
) -> Network:
    """A published network with the weights of a local file, in eval mode; notes their digest.

    Args:
        model: Takes the file's tensors by their names; has a ``digest``.
        file: That is there.
        name: Of the published file.
        sha256_prefix: What its content's hash begins with; None takes any content.
        advice: What to do about another file.

    Raises:
        UserError: The file is another one, or does not fit.
    """
    digest = sha256(file)
    if sha256_prefix is not None and not digest.startswith(sha256_prefix):
        raise UserError(
            f"{file} is not {name}: its SHA-256 begins with {digest[:8]}, not {sha256_prefix}; "
            f"{advice}"
        )
    try:
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever unpickling meets
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{file} does not hold this network's weights: {line}") from error
    model.digest = digest  # type: ignore[assignment]
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


class SmallCNN(nn.Module):
    """Three stages of convolutions and 64 features, for images of from 4 pixels.

    Attributes:
        accuracy: On real images that it was not trained on.
        digest: SHA-256 of the weights.
    """

    name = "smallcnn"
    knows_classes = True
    pool_mean: Tensor
    pool_std: Tensor
    spatial_mean: Tensor
    spatial_std: Tensor

    def __init__(self, channels: int, classes: int, resolution: int) -> None:
        super().__init__()
        first_stride = max(1, resolution // 12)  # leaves about twelve pixels to look at
        shapes = ((channels, 16, first_stride), (16, 32, 2), (32, POOL_DIM, 2))
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, width, 3, stride=stride, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
            for before, width, stride in shapes
        )
        self.head = nn.Linear(POOL_DIM, classes)
        spatial_dim = SPATIAL_CHANNELS * SPATIAL_SIDE**2
        for kind, dim in (("pool", POOL_DIM), ("spatial", spatial_dim)):
            self.register_buffer(f"{kind}_mean", torch.zeros(dim))
            self.register_buffer(f"{kind}_std", torch.ones(dim))
        self.accuracy, self.digest = 0.0, ""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, c, h, w) in [-1, 1] -> raw pool, raw spatial, logits."""
        x = self.stages[1](self.stages[0](images))
        # The first channels of a middle map, as sFID takes them; 3x3 whatever the resolution.
        spatial = nn.functional.adaptive_avg_pool2d(x[:, :SPATIAL_CHANNELS], SPATIAL_SIDE)
        pool = self.stages[2](x).mean((2, 3))
        return pool, spatial.flatten(1), self.head(pool)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:  # type: ignore[override]
        """(n, h, w, c) uint8 -> features standardized by the real images' statistics."""
        device, parts = self.head.weight.device, []
        for batch in images.split(256):
            # TensorFloat-32 would let features depend on the device that looks.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                pool, spatial, logits = self.forward(_scaled(batch).to(device))
            pool = (pool - self.pool_mean) / self.pool_std
            spatial = (spatial - self.spatial_mean) / self.spatial_std
            parts.append(Features(*(z.double().cpu() for z in (pool, spatial, logits))))
        return Features.concatenate(parts)


def _scaled(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def smallcnn_of(
    train: ImageDataset, test: ImageDataset, kind: str, *, cache: Path, progress: bool = False
) -> SmallCNN:
    """The extractor of a data set: loaded from the cache, or trained and put there.

    Args:
        train: What it is trained on.
        test: What its accuracy is measured on.
        kind: See ``RealImages``.
        cache: Folder of trained extractors.
        progress: Whether to say what takes the time.

    Returns:
        In eval mode. Its accuracy may lie below the data's ``accuracy_floor``: ask before using
        it.

    Raises:
        CannotWrite: It has to be trained, and cannot be put into the cache.
    """
    steps = entry_of(kind).classifier_steps
    key = key_digest(
        architecture=ARCHITECTURE,
        images=train.identity()["sha256"],
        pixels=_image_digest(train, 64),  # what reading makes of them: the first ones show it
        resolution=train.resolution,
        classes=train.num_classes,
        steps=steps,
    )
    # A folder's name may be anything, and is no part of what it holds.
    file = cache / f"{ARCHITECTURE}-{kind}-{train.resolution}-{key}.safetensors"
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def make() -> dict[str, Tensor]:
        if progress:
            line = f"training the evaluator ({steps} steps on real {train.name} images): {file}"
            print(printable(line))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            trained = SmallCNN(train.channels, train.num_classes, train.resolution).to(device)
            _fit(trained, train, steps)
        return trained.state_dict()

    model = SmallCNN(train.channels, train.num_classes, train.resolution)
    model.load_state_dict(cached(file, make))
    model = model.to(device).eval()
    model.digest = sha256(file)
    shown = min(len(test), 2000)

    def accuracy() -> dict[str, Tensor]:
        images, labels = test.batch(torch.arange(shown))
        return {"share": (model(to_uint8(images)).logits.argmax(1) == labels).double().mean()}

    tried = key_digest(evaluator=model.digest, images=_image_digest(test, shown))
    model.accuracy = cached(cache / f"accuracy-{tried}.safetensors", accuracy)["share"].item()
    return model


def _fit(model: SmallCNN, train: ImageDataset, steps: int) -> None:
    device = model.head.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        images, labels = train.batch(batch_indices(train, 0, step, BATCH_SIZE))
        images = _scaled(to_uint8(images)).to(device)
        logits = model.forward(images)[2]
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels.to(device), label_smoothing=0.05).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    images, _ = train.batch(batch_indices(train, 0, 0, STATISTICS_IMAGES))
    with torch.no_grad():
        found = [model.forward(z.to(device)) for z in _scaled(to_uint8(images)).split(256)]
    for kind, index in (("pool", 0), ("spatial", 1)):
        values = torch.cat([parts[index] for parts in found])
        std = values.std(0)
        getattr(model, f"{kind}_mean").copy_(values.mean(0))
        # A feature that hardly varies must not be blown up into the loudest one.
        getattr(model, f"{kind}_std").copy_(std + 1e-3 * values.std())


def _image_digest(dataset: ImageDataset, count: int) -> str:
    """SHA-256 of the first pixels and labels."""
    count = count if dataset.infinite else min(count, len(dataset))
    images, labels = dataset.batch(torch.arange(count))
    content = to_uint8(images).numpy().tobytes() + labels.numpy().tobytes()
    return hashlib.sha256(content).hexdigest()
