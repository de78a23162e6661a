"""Latents of a VAE: encoded on the fly or read from the cache that recipes/encode.py writes.

FOLDER/manifest.json                 VAE, crop, classes, source, shards with size and SHA-256; last
FOLDER/latents-000000.safetensors    mean and logvar (n, 2, c, h, w), as is and mirrored; label (n)

A draw of the posterior takes its noise from the caller, so a step's latents depend on its seed
alone, whichever way they come.
"""

from __future__ import annotations

import bisect
import hashlib
import inspect
import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recipes.lab.data.checks import DataError
from recipes.lab.data.datasets import ImageDataset, canonical_data
from recipes.lab.files import read_json, sha256

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

MANIFEST, PLAN = "manifest.json", "plan.json"
DEFAULT_RESOLUTION = 256


def load_vae(place: str, device: str | torch.device = "cpu") -> AutoencoderKL:
    """Loads a VAE from a local folder or the hub, from safetensors only.

    Raises:
        DataError: There is none, its weights are pickles or do not fit its config, or its config
            has a field that would change what a latent means and is not known here.
    """
    # Here, because it brings all of diffusers' models along.
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    source = canonical_vae(place)
    is_local = os.path.isdir(source)
    if not is_local and (os.path.isabs(source) or place[:1] in ".~" or place.count("/") > 1):
        # The hub would be asked, for minutes, for what cannot be there.
        raise DataError(f"there is no VAE's folder {place!r}; give one, or a hub id")
    options: Any = {"local_files_only": is_local}
    try:
        _check_index(Path(source))
        known = inspect.signature(AutoencoderKL.__init__).parameters
        _check_config(place, AutoencoderKL.load_config(source, **options), known)
        options |= {"use_safetensors": True, "output_loading_info": True}
        vae, loaded = AutoencoderKL.from_pretrained(source, **options)  # type: ignore[misc]
    except DataError:
        raise
    except Exception as error:
        # Diffusers lets through whatever a damaged config or the hub's client raises.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"no VAE with safetensors weights at {place!r} ({reason}); give a folder that "
            f"AutoencoderKL.save_pretrained wrote, or a hub id such as stabilityai/sd-vae-ft-ema"
        ) from error
    # Diffusers fills what is missing with random numbers.
    unfit = [name for kind in loaded.values() for name in kind]
    if unfit:
        raise DataError(
            f"the weights of the VAE at {place!r} do not fit its config.json: {len(unfit)} are "
            f"missing, unexpected or of another shape ({', '.join(map(str, unfit[:3]))})"
        )
    if vae.config["in_channels"] != vae.config["out_channels"]:
        raise DataError(
            f"the VAE at {place!r} takes {vae.config['in_channels']} channels and gives "
            f"{vae.config['out_channels']}, so its images cannot be compared"
        )
    _normalizer(vae_settings(vae))
    vae.to(device)
    return vae.eval().requires_grad_(False)


def canonical_vae(place: str) -> str:
    """A hub id as it is, or a folder's absolute path without links."""
    folder = os.path.expanduser(place)
    return os.path.realpath(folder) if place and os.path.isdir(folder) else place


def canonical_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings with one spelling of "data" and "vae", good from any working directory.

    And of "compile", which was true or false before.
    """
    spelled = dict(given)
    if isinstance(spelled.get("compile"), bool):
        spelled["compile"] = "on" if spelled["compile"] else "off"
    for name, canonical in (("data", canonical_data), ("vae", canonical_vae)):
        if isinstance(spelled.get(name), str):
            spelled[name] = canonical(spelled[name])
    return spelled


def _check_index(folder: Path) -> None:
    # Diffusers prefers an index to the file beside it, and reads pickles that one names.
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if not index.exists():
        return
    listed = read_json(index, "index")
    files = listed.get("weight_map") if isinstance(listed, dict) else None
    names = files.values() if isinstance(files, dict) else [""]
    if any(Path(str(name)).name != name or Path(name).suffix != ".safetensors" for name in names):
        raise DataError(f"{str(index)!r} names other than safetensors files beside it")


def _check_config(place: str, config: Any, known: Mapping[str, Any]) -> None:
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise DataError(f"the VAE at {place!r} is a {kind}, and only AutoencoderKL is read here")
    unknown = [
        name
        for name, value in config.items()
        if name not in known and not name.startswith("_") and value is not None
    ]
    if unknown:
        raise DataError(
            f"the config of the VAE at {place!r} has {', '.join(sorted(unknown))}, which is not "
            f"known here and may change what its latents mean"
        )


def vae_settings(vae: AutoencoderKL) -> dict[str, Any]:
    """The part of ``vae_facts`` that the config holds."""
    config = vae.config
    facts = {
        "scaling_factor": float(config["scaling_factor"]),
        "shift_factor": float(config.get("shift_factor") or 0.0),
        "channels": int(config["latent_channels"]),
        "factor": 2 ** (len(config["block_out_channels"]) - 1),
    }
    # Written only where a VAE has them, so that facts noted before they were known still agree.
    for name in ("latents_mean", "latents_std"):
        if config.get(name) is not None:
            facts[name] = [float(value) for value in config[name]]
    return facts


def vae_facts(vae: AutoencoderKL) -> dict[str, Any]:
    """What the latents of a VAE from ``load_vae`` have to be read with.

    Returns:
        "sha256" of the weights, "scaling_factor", "shift_factor", "channels", "factor" (image
        pixels per latent pixel); "latents_mean" and "latents_std" where the VAE has them; and
        "place", a hub id or the absolute path of a folder, which may differ between two that
        agree.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    place = str(vae.config.get("_name_or_path") or "")
    return {"sha256": digest.hexdigest(), **vae_settings(vae), "place": canonical_vae(place)}


def deciding(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``vae_facts`` that has to agree."""
    return {name: value for name, value in facts.items() if name != "place"}


def differing_facts(facts: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """Names of what has to agree between two VAEs and does not; where they lie may differ."""
    names = sorted(deciding({**facts, **others}))
    return [name for name in names if facts.get(name) != others.get(name)]


def open_vae(
    facts: Mapping[str, Any], vae: str | None = None, device: str | torch.device = "cpu"
) -> AutoencoderKL:
    """Loads the VAE that latents were made with, and makes sure that it is the one.

    Args:
        facts: See ``vae_facts``.
        vae: Folder or hub id; None takes the one that ``facts`` names.
        device: Where to put it.

    Raises:
        DataError: It is not there, or it is another; the message says what to pass.
    """
    wanted = f"the latents are of the VAE with SHA-256 {str(facts.get('sha256'))[:16]}..."
    place = vae or str(facts.get("place") or "")
    if not place:
        raise DataError(f"{wanted}, whose place was not noted: pass it with --vae FOLDER_OR_ID")
    try:
        opened = load_vae(place, device)
    except DataError as error:
        raise DataError(f"{wanted}: pass it with --vae FOLDER_OR_ID; {error}") from error
    differing = differing_facts(facts, vae_facts(opened))
    if differing:
        named = f" from {facts['place']!r}" if facts.get("place") else ""
        raise DataError(
            f"{wanted}{named}, and the VAE at {place!r} is another ({', '.join(differing)} "
            f"differ): pass the right one with --vae FOLDER_OR_ID"
        )
    return opened


def _normalizer(facts: Mapping[str, Any]) -> tuple[Any, Any]:
    """Offset and scale: what a model sees is ``(latent - offset) * scale``.

    Floats, or (c, 1, 1) tensors where the VAE has a mean and deviation of each channel, which
    are used as diffusers' pipeline of SDXL does.

    Raises:
        DataError: The numbers cannot be used, or there are two offsets.
    """
    scaling, shift = facts["scaling_factor"], facts["shift_factor"]
    mean, deviation = facts.get("latents_mean"), facts.get("latents_std")
    if not (math.isfinite(scaling) and scaling > 0 and math.isfinite(shift)):
        raise DataError(
            f"the VAE's scaling_factor {scaling} and shift_factor {shift} cannot be used: give a "
            f"positive and a finite number"
        )
    if mean is None and deviation is None:
        return shift, scaling
    channels = facts["channels"]
    if not len(mean or ()) == len(deviation or ()) == channels:
        raise DataError(
            f"the VAE's latents_mean and latents_std must both have {channels} numbers, one for "
            f"each channel"
        )
    if shift:
        raise DataError("the VAE has both shift_factor and latents_mean: remove one of them")
    offset, scale = torch.tensor(mean), scaling / torch.tensor(deviation)
    if not (offset.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
        raise DataError("the VAE's latents_mean and latents_std cannot be used: not finite, or 0")
    return offset[:, None, None], scale[:, None, None]


@torch.no_grad()
def moments(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the posterior, each (b, c, h, w) float32 on the CPU.

    Raises:
        DataError: The VAE gives numbers that are not finite.
    """
    with torch.autocast(vae.device.type, enabled=False):
        posterior = vae.encode(images.to(vae.device), return_dict=False)[0]
    mean, logvar = posterior.mean.float().cpu(), posterior.logvar.float().cpu()
    if not (mean.isfinite().all() and logvar.isfinite().all()):
        raise DataError(
            f"the VAE {str(vae.config.get('_name_or_path'))!r} gives latents that are not finite: "
            f"its weights are damaged or overflow"
        )
    return mean, logvar


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Undoes what training saw: latents of about unit scale become images.

    Args:
        vae: Of the latents; see ``open_vae``.
        latents: (b, c, h, w), on any device.

    Returns:
        (b, 3, H, W) float32 on the VAE's device, nominally in [-1, 1].
    """
    offset, scale = _normalizer(vae_settings(vae))
    latents = latents.to(vae.device).float()
    if isinstance(offset, Tensor):
        offset, scale = offset.to(vae.device), scale.to(vae.device)
    with torch.autocast(vae.device.type, enabled=False):
        images = vae.decode((latents / scale + offset).to(vae.dtype), return_dict=False)[0]
    return images.float()


class LatentDataset(ImageDataset):
    """Labeled latents of about unit scale; ``resolution`` and ``channels`` are the latents'.

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
        offset, scale = _normalizer(self.facts)
        return (latents - offset) * scale, labels

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means as they are, of unmirrored images; see ``ImageDataset.batch``."""
        flipped = torch.zeros(len(indices), dtype=torch.bool)
        shape = (len(indices), self.channels, self.resolution, self.resolution)
        return self.draw(indices, flipped, torch.zeros(shape))


def check_fit(vae: AutoencoderKL, images: str, channels: int, resolution: int) -> None:
    """Refuses images that a VAE cannot take.

    Raises:
        DataError: They have other channels, or a side that is no multiple of its factor.
    """
    wanted, factor = vae.config["in_channels"], vae_settings(vae)["factor"]
    if channels != wanted:
        raise DataError(
            f"the VAE takes {wanted} channels, but {images} has {channels}; use a folder of images"
        )
    if resolution % factor:
        raise DataError(f"resolution {resolution} is no multiple of the VAE's factor {factor}")


class EncodedDataset(LatentDataset):
    """Encodes images whenever they are asked for.

    Args:
        images: A data set of RGB images.
        vae: The encoder.

    Raises:
        DataError: The images do not fit the VAE.
    """

    def __init__(self, images: ImageDataset, vae: AutoencoderKL) -> None:
        check_fit(vae, images.name, images.channels, images.resolution)
        self.facts = vae_facts(vae)
        self.images, self.vae = images, vae
        for name in ("name", "class_names", "infinite", "horizontal_flip"):
            setattr(self, name, getattr(images, name))
        self.channels, self.latent_factor = self.facts["channels"], self.facts["factor"]
        self.resolution = images.resolution // self.latent_factor

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, Any]:
        images = self.images.identity()
        digest = encoded_identity(images["sha256"], self.facts, self.resolution)
        return images | {"kind": f"encoded {images['kind']}", "sha256": digest}

    def moments(self, indices: Tensor, flipped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images, labels = self.images.batch(indices)
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        return *moments(self.vae, images), labels


def encoded_identity(images: str, facts: Mapping[str, Any], resolution: int) -> str:
    """SHA-256 of images, given by theirs, of what their VAE makes of them, and of the side."""
    return _digest([images, deciding(facts), resolution])


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class CachedDataset(LatentDataset):
    """Reads the cache of ``recipes/encode.py``; a shard is verified when first touched.

    Args:
        folder: The cache.

    Attributes:
        source: What was encoded: "folder" (absolute path), "sha256" (of the ``identity`` of its
            images), "resolution", "class_count" and "class_seed"; None in caches made before it
            was noted.

    Raises:
        DataError: The cache is unfinished or damaged.
    """

    source: dict[str, Any] | None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._read_manifest(read_json(folder / MANIFEST, "manifest"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"the latents in {str(folder)!r} are damaged or unfinished ({reason}): "
                f"run recipes/encode.py again, it redoes what is missing"
            ) from error
        self._ends = list(itertools.accumulate(shard["count"] for shard in self.shards))
        self._open: dict[int, Any] = {}

    def _read_manifest(self, manifest: dict[str, Any]) -> None:
        """Takes over what the manifest says, which may come from elsewhere, once it is sound."""
        _check_form(manifest, _MANIFEST, "the manifest")
        self.name, self.facts = manifest["name"], manifest["vae"]
        self.class_names = tuple(manifest["class_names"])
        self.channels, self.latent_factor = self.facts["channels"], self.facts["factor"]
        self.image_resolution = manifest["resolution"]
        for value in (self.channels, self.latent_factor, self.image_resolution):
            if value < 1:
                raise ValueError(f"resolution, channels or factor is {value}")
        _normalizer(self.facts)
        self.resolution = self.image_resolution // self.latent_factor
        if not self.class_names or self.resolution * self.latent_factor != self.image_resolution:
            raise ValueError("no classes, or a resolution that is no multiple of the factor")
        self.source = manifest.get("source")
        self.shards: list[dict[str, Any]] = manifest["shards"]
        # Two sides of mean and log-variance in at least two bytes each, and a label of eight.
        smallest = 8 * self.channels * self.resolution**2 + 8
        for name, count, size in ((s["file"], s["count"], s["bytes"]) for s in self.shards):
            if Path(name).name != name or "\0" in name:
                raise ValueError(f"{name!r} lies outside")
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"{name} is missing or has another size")
            if not 0 <= count * smallest <= size:
                raise ValueError(f"{name} cannot hold {count} images")
        if len({shard["file"] for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard is listed twice")
        if not sum(shard["count"] for shard in self.shards):
            raise ValueError("it lists no images")

    def __len__(self) -> int:
        return self._ends[-1]

    def identity(self) -> dict[str, Any]:
        shards = [[shard["count"], shard["sha256"]] for shard in self.shards]
        digest = _digest([shards, deciding(self.facts), self.class_names])
        return self._identity("latents", digest)

    def moments(self, indices: Tensor, flipped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._check_range(indices)
        means, logvars, labels = [], [], []
        for index, side in zip(indices.tolist(), flipped.long().tolist(), strict=True):
            number = bisect.bisect_right(self._ends, index)
            row = index - (self._ends[number - 1] if number else 0)
            shard = self._shard(number)
            for name, rows in (("mean", means), ("logvar", logvars)):
                rows.append(shard.get_slice(name)[row : row + 1, side : side + 1][0])
            labels.append(shard.get_slice("label")[row : row + 1])
        mean, logvar = torch.cat(means).float(), torch.cat(logvars).float()
        if not (mean.isfinite().all() and logvar.isfinite().all()):
            raise DataError(
                f"the latents in {str(self.folder)!r} hold numbers that are not finite: encode "
                f"into another folder with --dtype fp32"
            )
        return mean, logvar, torch.cat(labels)

    def _shard(self, number: int) -> Any:
        if number in self._open:
            return self._open[number]
        shard = self.shards[number]
        path = self.folder / shard["file"]
        try:
            is_whole = sha256(path) == shard["sha256"]
            opened = safe_open(path, framework="pt") if is_whole else None
            if opened is not None:
                self._check_tensors(opened, shard["count"])
        except (OSError, ValueError, SafetensorError) as error:
            raise DataError(
                f"latent shard {str(path)!r} cannot be read ({error}): delete it and run "
                f"recipes/encode.py again"
            ) from error
        if opened is None:
            raise DataError(
                f"latent shard {str(path)!r} is damaged (SHA-256 differs from the "
                f"manifest): run recipes/encode.py again, it makes damaged shards anew"
            )
        self._open[number] = opened
        return opened

    def _check_tensors(self, opened: Any, count: int) -> None:
        side = (count, 2, self.channels, self.resolution, self.resolution)
        for name, shape in (("mean", side), ("logvar", side), ("label", (count,))):
            found = tuple(opened.get_slice(name).get_shape())
            if found != shape:
                raise ValueError(f"{name} is {found}, not {shape}")
        labels = opened.get_tensor("label")
        if labels.dtype != torch.int64 or not ((labels >= 0) & (labels < self.num_classes)).all():
            raise ValueError(f"its labels are not from 0 to {self.num_classes - 1}")


# What a manifest must hold: types, lists of one type, and entries by name, "?" if they may lack.
_NUMBER = (int, float)
_MANIFEST = {
    "name": str,
    "vae": {
        "sha256": str,
        "scaling_factor": _NUMBER,
        "shift_factor": _NUMBER,
        "channels": int,
        "factor": int,
        "latents_mean?": [_NUMBER],
        "latents_std?": [_NUMBER],
    },
    "class_names": [str],
    "resolution": int,
    "source?": {"folder": str, "sha256": str},
    "shards": [{"file": str, "count": int, "bytes": int, "sha256": str}],
}


def _check_form(value: Any, form: Any, what: str) -> None:
    kind = type(form) if isinstance(form, dict | list) else form
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{what} is {str(value)[:50]!r}")
    if isinstance(form, list):
        for entry in value:
            _check_form(entry, form[0], f"an entry of {what}")
    elif isinstance(form, dict):
        for name, part in form.items():
            key = name.removesuffix("?")
            if key == name or value.get(key) is not None:
                _check_form(value[key], part, key)


def is_latent_folder(data: str) -> bool:
    """Whether ``data`` is a folder that recipes/encode.py has written to."""
    return os.path.isfile(os.path.join(os.path.expanduser(data), PLAN))
