"""Writes the cache of latents that ``latents.CachedDataset`` reads.

Interrupted, it goes on where it stopped; run again, it makes anew the shards whose images have
changed; several processes share the shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recipes.lab.console import DATA_BUDGET, DONE, UserError, printable, progress_bar
from recipes.lab.data.images import (
    MAX_PIXELS,
    BadImage,
    FileDigest,
    FoundImages,
    digest_file,
    digest_images,
    find_images,
    portable,
    portable_bytes,
    read_images,
    training_folder,
)
from recipes.lab.data.latents import (
    DEFAULT_RESOLUTION,
    MANIFEST,
    PLAN,
    check_fit,
    deciding,
    differing_facts,
    load_vae,
    moments,
    vae_facts,
)
from recipes.lab.distributed import make_accelerator, on_main
from recipes.lab.files import (
    TEMPORARY,
    CannotWrite,
    locked,
    read_json,
    save_tensors,
    sha256,
    sync,
    whole_file,
    write_json,
)

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_LOCK = ".lock"
_ENCODING = ("vae", "resolution", "crop", "dtype")  # of a plan, what a shard remembers too
_IMAGES = "images (their names or classes)"
# Root mean square of what a type rounds away, in deviations of the latents: far below what
# training could notice, far above what a VAE of usual size loses in fp16 (about 1e-4).
_MAX_ROUNDING = 1e-2


def encode(
    images: Path,
    latents: Path,
    *,
    vae: str,
    resolution: int = DEFAULT_RESOLUTION,
    class_count: int | None = None,
    class_seed: int = 0,
    dtype: str = "fp16",
    batch_size: int = 32,
    shard_size: int = 1024,
    skip_bad: int = 0,
) -> int:
    """Writes the cache, or what of it is missing or out of date; see encode.py's flags.

    Returns:
        0 when whole, 4 when more images are unreadable than ``skip_bad``.

    Raises:
        UserError: Images, VAE or folder cannot be used, the folder holds other latents, another
            process writes to it, or the latents do not fit ``dtype``.
    """
    accelerator = make_accelerator(is_patient=True)
    if not os.path.isdir(images):
        raise UserError(f"{str(images)!r} is no folder; give one with a sub-folder per class")
    _check_target(latents)
    if resolution**2 > MAX_PIXELS:
        raise UserError(f"resolution {resolution} is too large: {math.isqrt(MAX_PIXELS)} at most")
    root = training_folder(images)
    found = find_images(root, class_count, class_seed)
    found.check_classes(root, (label for _, label in found.images))
    encoder = load_vae(vae, accelerator.device)
    check_fit(encoder, "a picture", 3, resolution)
    names = [portable(path.relative_to(root)) for path, _ in found.images]
    listing = "\n".join(
        f"{label}\t{name}" for name, (_, label) in zip(names, found.images, strict=True)
    )
    plan = {
        "name": images.resolve().name,
        "source": {
            "folder": str(images.resolve()),
            "resolution": resolution,
            "class_count": class_count,
            "class_seed": class_seed,
        },
        "vae": vae_facts(encoder),
        "resolution": resolution,
        "crop": "halved, bicubic, centre (ADM)",
        "class_names": list(found.classes),
        "class_count": class_count,
        "class_seed": class_seed,
        "images": len(found.images),
        "images_sha256": hashlib.sha256(portable_bytes(listing)).hexdigest(),
        "dtype": dtype,
        "shard_size": shard_size,
    }
    with contextlib.ExitStack() as stack:

        def begin() -> dict[str, str]:
            for line in found.notes + found.doubtful:
                _say(printable(line))
            stack.enter_context(locked(latents / _LOCK, warn=_say))
            labels = [label for _, label in found.images]
            entries = [list(entry) for entry in zip(names, labels, strict=True)]
            return _begin(latents, plan, entries)

        digests = on_main(accelerator, begin)
        count = -(-len(names) // shard_size)
        mine = range(accelerator.process_index, count, accelerator.num_processes)
        for number in progress_bar(mine, unit="shard", shown=accelerator.is_main_process):
            rows = slice(number * shard_size, (number + 1) * shard_size)
            shard = _Shard(latents, number, names[rows], found.images[rows])
            if not shard.is_current(digests):
                shard.write(encoder, plan, batch_size)
        accelerator.wait_for_everyone()
        return on_main(accelerator, lambda: _finish(latents, plan, count, root, found, skip_bad))


def _say(line: str) -> None:
    # Not in the middle of a bar.
    from tqdm.auto import tqdm

    tqdm.write(line)


def _check_target(latents: Path) -> None:
    if os.path.isfile(latents / PLAN):
        return
    try:
        # Another process may be writing its plan at this moment.
        if any(name != _LOCK and not name.startswith(TEMPORARY) for name in os.listdir(latents)):
            raise UserError(f"{str(latents)!r} holds other files; choose another folder")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"cannot write to {str(latents)!r}: {error.strerror}; choose another folder"
        ) from error


def _begin(latents: Path, plan: dict[str, Any], entries: list[list[Any]]) -> dict[str, str]:
    """Notes what is being made; a folder that holds something else is refused.

    Args:
        latents: The folder.
        plan: What is being made.
        entries: Name and label of every image.

    Returns:
        The SHA-256 of every shard that the manifest lists, by name.
    """
    _check_target(latents)
    file, manifest = latents / PLAN, latents / MANIFEST
    if file.exists():
        before = read_json(file, "plan", "choose another folder, or delete this one")
        changed = _changed(before if isinstance(before, dict) else {}, plan)
        if changed:
            raise UserError(
                f"{str(latents)!r} holds latents made otherwise ({', '.join(changed)} differ); "
                f"choose another folder, or delete it"
            )
    _refuse_others(latents, plan, entries)
    for path in latents.glob(f"{TEMPORARY}*"):  # of processes that were killed
        _remove(path)
    write_json(file, plan)
    with contextlib.suppress(UserError, KeyError, TypeError):  # shards are then judged alone
        shards = read_json(manifest)["shards"]
        return {str(shard["file"]): str(shard["sha256"]) for shard in shards}
    return {}


def _changed(before: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    changed = []
    for name, value in plan.items():
        if name in ("name", "source"):  # the same images may have been moved
            continue
        old = before.get(name)
        if name == "vae" and isinstance(old, dict):
            changed += ["vae"] if differing_facts(old, value) else []
        elif json.dumps(old) != json.dumps(value):
            changed.append(_IMAGES if name == "images_sha256" else name)
    return changed


def _refuse_others(latents: Path, plan: Mapping[str, Any], entries: list[list[Any]]) -> None:
    """Refuses shards of another plan, as where two unfinished folders were laid together."""
    size = plan["shard_size"]
    for number, start in enumerate(range(0, len(entries), size)):
        path = latents / _shard_name(number)
        try:
            with safe_open(path, framework="pt") as file:
                made, mean = _made(file), file.get_slice("mean")
            kind, (count, *_, side) = mean.get_dtype(), mean.get_shape()
            listed = [entry[:2] for entry in made["contents"]]
        except (OSError, SafetensorError, TypeError, ValueError):
            continue  # missing, or made again
        # A shard of before it was noted shows no more of how it was made.
        found = dict(plan) | {"dtype": {"F16": "fp16", "F32": "fp32"}.get(kind, kind)}
        if count:
            found["resolution"] = side * plan["vae"]["factor"]
        found |= made["encoding"]
        changed = _changed(found, {name: plan[name] for name in _ENCODING})
        if listed != entries[start : start + size]:
            changed.append(_IMAGES)
        if changed:
            raise UserError(
                f"{str(path)!r} was made otherwise than {str(latents / PLAN)!r} says "
                f"({', '.join(changed)} differ): move it away, and it is made again, or choose "
                f"another folder"
            )


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CannotWrite(path, error) from error


def _shard_name(number: int) -> str:
    return f"latents-{number:06d}.safetensors"


class _Shard:
    """One file of latents, which remembers what every image of it held.

    Args:
        latents: The folder.
        number: From 0.
        names: Of the images, relative to their folder.
        images: Their paths and labels.
    """

    def __init__(
        self, latents: Path, number: int, names: list[str], images: list[tuple[Path, int]]
    ) -> None:
        self.path = latents / _shard_name(number)
        self.names, self.images = names, images
        self.contents = [
            [name, label, *digest_file(path)]
            for name, (path, label) in zip(names, images, strict=True)
        ]

    def is_current(self, digests: Mapping[str, str]) -> bool:
        """Whether the file is there, whole, and made of what the images hold now."""
        if not os.path.lexists(self.path):
            return False
        listed = digests.get(self.path.name)
        try:
            if listed is not None and sha256(self.path) != listed:
                reason = "is damaged"
            elif _read_made(self.path)["contents"] != self.contents:
                reason = "is of images that have changed"
            else:
                return True
        except (OSError, SafetensorError, ValueError) as error:
            reason = f"cannot be used ({' '.join(str(error).split())})"
        _say(printable(f"{str(self.path)!r} {reason} and is made again"))
        return False

    def write(self, encoder: Any, plan: Mapping[str, Any], batch_size: int) -> None:
        """Encodes the images.

        Raises:
            UserError: The latents do not fit ``dtype``, or the VAE does not work.
            CannotWrite: The system refuses.
        """
        dtype = plan["dtype"]
        pixels: list[Tensor] = []
        labels: list[int] = []
        bad: dict[str, str] = {}
        parts: dict[str, list[Tensor]] = {"mean": [], "logvar": []}
        images = read_images([file for file, _ in self.images], plan["resolution"])
        for name, (_, label), image in zip(self.names, self.images, images, strict=True):
            if isinstance(image, BadImage):
                bad[name] = str(image)
            else:
                pixels.append(image[0])
                labels.append(label)
            if pixels and (len(pixels) == batch_size or name == self.names[-1]):
                seen = torch.stack(pixels).float() * (2 / 255) - 1
                both = zip(moments(encoder, seen), moments(encoder, seen.flip(-1)), strict=True)
                for part, pair in zip(parts.values(), both, strict=True):
                    part.append(torch.stack(pair, dim=1))
                pixels.clear()
        exact = {
            name: torch.cat(part) if part else torch.empty(0, 2, 1, 1, 1)
            for name, part in parts.items()
        }
        tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in exact.items()}
        if labels and dtype != "fp32":
            _check_rounding(self.path.name, exact, tensors, dtype)
        tensors["label"] = torch.tensor(labels, dtype=torch.int64)
        # One key only: safetensors writes several in an order of chance.
        encoding = {name: plan[name] for name in _ENCODING} | {"vae": deciding(plan["vae"])}
        facts = {"bad": bad, "contents": self.contents, "encoding": encoding}
        made = {"made": json.dumps(facts)}
        # A manifest would vouch for the shard that is about to go.
        _remove(self.path.parent / MANIFEST)
        with whole_file(self.path) as temporary:
            save_tensors(tensors, temporary, made)
        sync(self.path.parent)


def _read_made(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return _made(file)


def _made(file: Any) -> dict[str, Any]:
    try:
        made = json.loads((file.metadata() or {})["made"])
        encoding = dict(made.get("encoding", {}))
        return {"bad": dict(made["bad"]), "contents": list(made["contents"]), "encoding": encoding}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError("it does not say which images it was made of") from error


def _check_rounding(
    name: str, exact: Mapping[str, Tensor], stored: Mapping[str, Tensor], dtype: str
) -> None:
    """Refuses latents of which the type on disk loses what training would notice."""
    spread = exact["mean"].var(dim=(0, 1, 3, 4)) + exact["logvar"].exp().mean(dim=(0, 1, 3, 4))
    error = (stored["mean"].float() - exact["mean"]).square().mean(dim=(0, 1, 3, 4))
    if not (error <= _MAX_ROUNDING**2 * spread).all() or not stored["logvar"].isfinite().all():
        raise UserError(
            f"the latents of {name} do not fit {dtype} (values up to "
            f"{exact['mean'].abs().max():.3g}): pass --dtype fp32 and another folder"
        )


def _finish(
    latents: Path, plan: dict[str, Any], count: int, root: Path, found: FoundImages, skip_bad: int
) -> int:
    shards: list[dict[str, Any]] = []
    contents: list[tuple[str, int, FileDigest]] = []
    bad = {portable(path.relative_to(root)): reason for path, reason in found.skipped}
    labels: set[int] = set()
    for path in (latents / _shard_name(number) for number in range(count)):
        try:
            with safe_open(path, framework="pt") as file:
                label = file.get_tensor("label").tolist()
            made = _read_made(path)
            facts = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{str(path)!r} cannot be read ({error}); run again") from error
        shards.append({"file": path.name, "count": len(label), **facts})
        bad |= made["bad"]
        labels.update(label)
        contents += [(name, number, FileDigest(*rest)) for name, number, *rest in made["contents"]]
    for name, reason in list(bad.items())[:5]:
        print(f"left out {name!r}: {printable(reason)}")
    if len(bad) > skip_bad:
        listed = plan["images"] + len(found.skipped)
        print(
            f"error: {len(bad)} of {listed} images cannot be read, {skip_bad} may be: "
            f"repair them and run again, or go on with --skip-bad {len(bad)}"
        )
        return DATA_BUDGET
    found.check_classes(root, labels)
    total = sum(shard["count"] for shard in shards)
    source = {**plan["source"], "sha256": digest_images(contents)[0]}
    manifest = {**plan, "source": source, "count": total, "bad": bad, "shards": shards}
    write_json(latents / MANIFEST, manifest)
    print(printable(f"{total} images of {len(plan['class_names'])} classes: {latents}"))
    return DONE
