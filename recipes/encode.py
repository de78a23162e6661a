"""Encodes a folder of images into latents, once, for training without the VAE.

    python recipes/encode.py imagenet latents --vae stabilityai/sd-vae-ft-ema
    python recipes/encode.py imagenet sub-in --vae vae-folder --class-count 100
    python recipes/train.py --preset dit --data latents

Every image is kept as mean and log-variance of its posterior, as it is and mirrored, so that
training draws afresh at each visit. Interrupted, it goes on where it stopped; several processes
(torchrun, accelerate launch) share the shards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from recipes.lab.console import DATA_BUDGET, DONE, UserError, run_script, user_errors, whole
from recipes.lab.data.images import (
    BadImage,
    digest_file,
    digest_images,
    find_images,
    read_image,
    training_folder,
)
from recipes.lab.data.latents import (
    DEFAULT_RESOLUTION,
    MANIFEST,
    differing_facts,
    load_vae,
    moments,
    vae_facts,
)
from recipes.lab.files import sha256, sync, write_text
from recipes.lab.training.distributed import make_accelerator, on_main

_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python recipes/encode.py",
        description="Encode a folder of images into latents for training.",
    )
    flag = parser.add_argument
    flag("images", metavar="IMAGES", help="folder with one sub-folder per class, or with train/")
    flag("latents", metavar="LATENTS", help="folder to write")
    flag("--vae", required=True, help="folder or hub id of an AutoencoderKL")
    flag("--resolution", type=whole(8), default=DEFAULT_RESOLUTION, help="of the images")
    flag("--class-count", type=whole(1), help="draw that many classes; 100 makes Sub-IN")
    flag("--class-seed", type=whole(0), default=0, help="of that draw")
    flag("--dtype", choices=list(_DTYPES), default="fp16", help="of the latents on disk")
    flag("--batch-size", type=whole(1), default=32, help="images per call of the VAE")
    flag("--shard-size", type=whole(1), default=1024, help="images per file")
    flag("--skip-bad", type=whole(0), default=0, help="unreadable images to leave out at most")
    given = parser.parse_args(arguments)
    return encode(
        Path(given.images),
        Path(given.latents),
        vae=given.vae,
        resolution=given.resolution,
        class_count=given.class_count,
        class_seed=given.class_seed,
        dtype=given.dtype,
        batch_size=given.batch_size,
        shard_size=given.shard_size,
        skip_bad=given.skip_bad,
    )


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
    """Writes the cache, or what of it is missing; see ``main`` for the arguments.

    Returns:
        0 when whole, 4 when more images are unreadable than ``skip_bad``.

    Raises:
        UserError: Images, VAE or folder cannot be used, or the folder holds other latents.
    """
    accelerator = make_accelerator()
    if not images.is_dir():
        raise UserError(f"{str(images)!r} is no folder; give one with a sub-folder per class")
    with user_errors():
        encoder = load_vae(vae, accelerator.device)
        root = training_folder(images)
        names, found, refused = find_images(root, class_count, class_seed)
    facts = vae_facts(encoder)
    if resolution % facts["factor"]:
        raise UserError(f"resolution {resolution} is no multiple of the VAE's {facts['factor']}")
    listing = "\n".join(f"{label}\t{path.relative_to(root)}" for path, label in found)
    plan = {
        "name": images.resolve().name,
        "source": {
            "folder": str(images.resolve()),
            "resolution": resolution,
            "class_count": class_count,
            "class_seed": class_seed,
        },
        "vae": facts,
        "resolution": resolution,
        "crop": "halved, bicubic, centre (ADM)",
        "class_names": list(names),
        "class_count": class_count,
        "class_seed": class_seed,
        "images": len(found),
        "images_sha256": hashlib.sha256(os.fsencode(listing)).hexdigest(),
        "dtype": dtype,
        "shard_size": shard_size,
    }
    on_main(accelerator, lambda: _begin(latents, plan))
    chunks = [found[start : start + shard_size] for start in range(0, len(found), shard_size)]
    mine = range(accelerator.process_index, len(chunks), accelerator.num_processes)
    for number in tqdm(mine, unit="shard", disable=not accelerator.is_main_process):
        path = latents / _shard_name(number)
        if not path.exists():
            _write_shard(path, chunks[number], root, encoder, resolution, dtype, batch_size)
    accelerator.wait_for_everyone()
    return on_main(
        accelerator, lambda: _finish(latents, plan, len(chunks), root, found, refused, skip_bad)
    )


def _shard_name(number: int) -> str:
    return f"latents-{number:06d}.safetensors"


def _begin(latents: Path, plan: dict[str, Any]) -> None:
    """Notes what is being made; a folder that holds something else is refused."""
    file = latents / "plan.json"
    try:
        if file.exists():
            before = json.loads(file.read_text())
            changed = [
                name
                for name in plan
                if name != "source"
                and json.dumps(before.get(name)) != json.dumps(plan[name])
                and not (name == "vae" and not differing_facts(before["vae"], plan["vae"]))
            ]
            if changed:
                raise UserError(
                    f"{latents} holds latents made otherwise ({', '.join(changed)} differ); "
                    f"choose another folder, or delete it"
                )
        elif latents.exists() and any(latents.iterdir()):
            raise UserError(f"{latents} holds other files; choose another folder")
        latents.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(plan, indent=2) + "\n")
        _remove_damaged(latents)
    except OSError as error:
        raise UserError(f"cannot write to {latents}: {error.strerror}") from error


def _remove_damaged(latents: Path) -> None:
    """Removes shards that are no longer what the manifest says; they are made again."""
    manifest = latents / MANIFEST
    if not manifest.exists():
        return
    with user_errors():
        shards = json.loads(manifest.read_text())["shards"]
    for shard in shards:
        path = latents / Path(shard["file"]).name
        if path.exists() and sha256(path) != shard["sha256"]:
            print(f"{path} is damaged and made again")
            path.unlink()


def _write_shard(
    path: Path,
    chunk: list[tuple[Path, int]],
    root: Path,
    encoder: Any,
    resolution: int,
    dtype: str,
    batch_size: int,
) -> None:
    pixels: list[Tensor] = []
    labels: list[int] = []
    bad: dict[str, str] = {}
    for file, label in chunk:
        try:
            pixels.append(read_image(file, resolution)[0])
            labels.append(label)
        except BadImage as error:
            bad[str(file.relative_to(root))] = str(error)
    tensors = {"label": torch.tensor(labels, dtype=torch.int64)}
    sides: dict[str, list[Tensor]] = {"mean": [], "logvar": []}
    for start in range(0, len(pixels), batch_size):
        images = torch.stack(pixels[start : start + batch_size]).float() * (2 / 255) - 1
        both = [moments(encoder, images), moments(encoder, images.flip(-1))]
        for name, pair in zip(sides, zip(*both, strict=True), strict=True):
            sides[name].append(torch.stack(pair, dim=1).to(_DTYPES[dtype]))
    for name, parts in sides.items():
        tensors[name] = torch.cat(parts) if parts else torch.empty(0, 2, 1, 1, 1)
    temporary = path.with_name(f".tmp-{path.name}")
    save_file(tensors, temporary, metadata={"bad": json.dumps(bad)})
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def _finish(
    latents: Path,
    plan: dict[str, Any],
    count: int,
    root: Path,
    found: list[tuple[Path, int]],
    refused: list[tuple[Path, str]],
    skip_bad: int,
) -> int:
    shards, bad = [], {str(path): reason for path, reason in refused}
    for number in range(count):
        path = latents / _shard_name(number)
        try:
            with safe_open(path, framework="pt") as file:
                images = len(file.get_tensor("label"))
                bad |= json.loads((file.metadata() or {}).get("bad", "{}"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it and run again") from error
        shards.append(
            {
                "file": path.name,
                "count": images,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
        )
    for name, reason in list(bad.items())[:5]:
        print(f"left out {name!r}: {reason}")
    if len(bad) > skip_bad:
        print(
            f"error: {len(bad)} of {plan['images']} images cannot be read, {skip_bad} may be: "
            f"repair them and delete the shards, or go on with --skip-bad {len(bad)}"
        )
        return DATA_BUDGET
    total = sum(shard["count"] for shard in shards)
    contents = ((str(path.relative_to(root)), label, digest_file(path)) for path, label in found)
    plan["source"]["sha256"] = digest_images(contents)[0]
    manifest = {**plan, "count": total, "bad": bad, "shards": shards}
    write_text(latents / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    print(f"{total} images of {len(plan['class_names'])} classes: {latents}")
    return DONE


if __name__ == "__main__":
    run_script(main)
