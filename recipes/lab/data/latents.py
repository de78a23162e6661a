"""Latents of a VAE: encoded on the fly or read from the cache that recipes/encode.py writes.

FOLDER/manifest.json                 VAE, crop, classes, shards with size and SHA-256; last
FOLDER/latents-000000.safetensors    mean and logvar (n, 2, c, h, w), as is and mirrored; label (n)

A draw of the posterior takes its noise from the caller, so a step's latents depend on its seed
alone, whichever way they come.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recipes.lab.data.datasets import DataError, ImageDataset
from recipes.lab.files import sha256

MANIFEST = "manifest.json"
DEFAULT_RESOLUTION = 256


def load_vae(place: str, device: str | torch.device = "cpu") -> AutoencoderKL:
    """Loads a VAE from a local folder or the hub, from safetensors only.

    Raises:
        DataError: There is none, or its weights are pickles.
    """
    try:
        vae = AutoencoderKL.from_pretrained(
            place, use_safetensors=True, local_files_only=Path(place).is_dir()
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"no VAE with safetensors weights at {place!r} ({reason}); give a folder that "
            f"AutoencoderKL.save_pretrained wrote, or a hub id such as stabilityai/sd-vae-ft-ema"
        ) from error
    vae.to(device)  # type: ignore[arg-type]
    return vae.eval().requires_grad_(False)


def vae_facts(vae: AutoencoderKL) -> dict[str, Any]:
    """What has to agree between a VAE and its latents: hash of the weights, scale, shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "sha256": digest.hexdigest(),
        "scaling_factor": float(vae.config["scaling_factor"]),
        "shift_factor": float(vae.config.get("shift_factor") or 0.0),
        "channels": int(vae.config["latent_channels"]),
        "factor": 2 ** (len(vae.config["block_out_channels"]) - 1),
    }


@torch.no_grad()
def moments(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the posterior, each (b, c, h, w) float32 on the CPU."""
    with torch.autocast(vae.device.type, enabled=False):
        posterior = vae.encode(images.to(vae.device), return_dict=False)[0]
    return posterior.mean.float().cpu(), posterior.logvar.float().cpu()


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents of about unit scale (b, c, h, w) -> images (b, 3, H, W), nominally in [-1, 1]."""
    facts = vae.config
    shifted = latents.to(vae.device) / facts["scaling_factor"] + (facts.get("shift_factor") or 0.0)
    return vae.decode(shifted, return_dict=False)[0]  # type: ignore[return-value]


class LatentDataset(ImageDataset):
    """Labelled latents of about unit scale; ``resolution`` and ``channels`` are the latents'.

    Attributes:
        facts: see ``vae_facts``.
    """

    horizontal_flip = True
    facts: dict[str, Any]

    def moments(self, indices: Tensor, flipped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-variance (b, c, h, w) of images, mirrored where ``flipped``, and labels."""
        raise NotImplementedError

    def draw(self, indices: Tensor, flipped: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of one training step.

        Args:
            indices: (b,) int64.
            flipped: (b,) bool.
            noise: (b, c, h, w), standard normal; the draw from the posterior.

        Returns:
            Latents (b, c, h, w) float32; labels (b,) int64.
        """
        mean, logvar, labels = self.moments(indices, flipped)
        latents = mean + torch.exp(0.5 * logvar) * noise
        return (latents - self.facts["shift_factor"]) * self.facts["scaling_factor"], labels

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means as they are, of unmirrored images; see ``ImageDataset.batch``."""
        flipped = torch.zeros(len(indices), dtype=torch.bool)
        shape = (len(indices), self.channels, self.resolution, self.resolution)
        return self.draw(indices, flipped, torch.zeros(shape))


class EncodedDataset(LatentDataset):
    """Encodes images whenever they are asked for.

    Args:
        images: A data set of RGB images.
        vae: The encoder.

    Raises:
        DataError: The images do not fit the VAE.
    """

    def __init__(self, images: ImageDataset, vae: AutoencoderKL) -> None:
        self.facts = vae_facts(vae)
        factor = self.facts["factor"]
        if images.channels != vae.config["in_channels"]:
            raise DataError(
                f"the VAE takes {vae.config['in_channels']} channels, but {images.name} has "
                f"{images.channels}; use a folder of images"
            )
        if images.resolution % factor:
            raise DataError(
                f"resolution {images.resolution} is no multiple of the VAE's factor {factor}"
            )
        self.images, self.vae = images, vae
        self.name, self.class_names = images.name, images.class_names
        self.infinite, self.horizontal_flip = images.infinite, images.horizontal_flip
        self.channels, self.latent_factor = self.facts["channels"], factor
        self.resolution = images.resolution // factor

    def __len__(self) -> int:
        return len(self.images)

    def moments(self, indices: Tensor, flipped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images, labels = self.images.batch(indices)
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        return *moments(self.vae, images), labels


class CachedDataset(LatentDataset):
    """Reads the cache of ``recipes/encode.py``; a shard is verified when first touched.

    Args:
        folder: The cache.

    Raises:
        DataError: The cache is unfinished or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            self.name = str(manifest["name"])
            self.facts = manifest["vae"]
            self.class_names = tuple(manifest["class_names"])
            self.shards: list[dict[str, Any]] = manifest["shards"]
            self.latent_factor, self.channels = self.facts["factor"], self.facts["channels"]
            self.image_resolution = int(manifest["resolution"])
            self.resolution = self.image_resolution // self.latent_factor
            counts = [int(shard["count"]) for shard in self.shards]
            for shard in self.shards:
                path = self._path(shard)
                if path.stat().st_size != shard["bytes"]:
                    raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"the latents in {str(folder)!r} are damaged or unfinished ({error}): "
                f"run recipes/encode.py again, it redoes what is missing"
            ) from error
        self._ends = list(itertools.accumulate(counts))
        self._open: dict[int, Any] = {}

    def _path(self, shard: dict[str, Any]) -> Path:
        if Path(shard["file"]).name != shard["file"]:
            raise ValueError(f"{shard['file']!r} lies outside")
        return self.folder / shard["file"]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def moments(self, indices: Tensor, flipped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._check_range(indices)
        means, logvars, labels = [], [], []
        for index, side in zip(indices.tolist(), flipped.long().tolist(), strict=True):
            number = bisect.bisect_right(self._ends, index)
            row = index - (self._ends[number - 1] if number else 0)
            shard = self._shard(number)
            means.append(shard.get_slice("mean")[row : row + 1, side : side + 1][0, 0])
            logvars.append(shard.get_slice("logvar")[row : row + 1, side : side + 1][0, 0])
            labels.append(shard.get_slice("label")[row : row + 1])
        return torch.stack(means).float(), torch.stack(logvars).float(), torch.cat(labels)

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            shard = self.shards[number]
            path = self._path(shard)
            try:
                if sha256(path) != shard["sha256"]:
                    raise DataError(
                        f"latent shard {str(path)!r} is damaged (SHA-256 differs from the "
                        f"manifest): run recipes/encode.py again, it makes damaged shards anew"
                    )
                self._open[number] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise DataError(
                    f"latent shard {str(path)!r} cannot be read ({error}): delete it and run "
                    f"recipes/encode.py again"
                ) from error
        return self._open[number]


def is_latent_folder(data: str) -> bool:
    """Whether ``data`` is a folder that recipes/encode.py has written to."""
    return (Path(data).expanduser() / "plan.json").is_file()
