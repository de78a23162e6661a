"""Images per second of an older checkout's sampling loop; ``bench.whole_models`` runs this file.

    python bench/whole_before.py FOLDER '{"mechanism": "sana", "size": "S", ...}'

It imports what FOLDER has, and nothing of the tree that it lies in.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch


def measure(
    mechanism: str, size: str, resolution: int, images: int, steps: int, rounds: int, device: str
) -> dict[str, float]:
    """Images per second with guidance, under autocast to bfloat16 and in float32.

    Args:
        mechanism: The attention.
        size: Of the backbone.
        resolution: Pixels along one side, of a latent model.
        images: Of a batch.
        steps: Of the sampler.
        rounds: Whose median counts.
        device: "cuda" or "cpu".
    """
    backbones = importlib.import_module("backbones")
    try:
        diffusion: Any = importlib.import_module("recipes.lab.diffusion")
    except ModuleNotFoundError:  # where it was before
        diffusion = importlib.import_module("recipes.diffusion")
    torch.manual_seed(0)
    model = backbones.build_backbone(mechanism, size, "controlled", resolution).to(device).eval()
    with torch.no_grad():  # zeroed gates would make every block the identity
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    labels, side = torch.arange(images), resolution // 8

    def draw() -> None:
        drawn = diffusion.sample(
            model, diffusion.DIFFUSION_PRESETS["dit"], labels=labels, indices=labels, seed=0,
            num_classes=1000, shape=(4, side, side), device=device, cfg=4.0, sampler="dpm++",
            steps=steps, batch_size=images,
        )  # fmt: skip
        if not drawn.cpu().isfinite().all():  # waits for the device, too
            raise SystemExit("its images are not finite")

    found = {}
    autocast = torch.autocast(device, torch.bfloat16)
    for name, casts in {"bfloat16": autocast, "float32": contextlib.nullcontext()}.items():
        seconds = []
        with casts:
            for _ in range(rounds + 1):
                start = time.perf_counter()
                draw()
                seconds.append(time.perf_counter() - start)
        found[name] = images / statistics.median(seconds[1:])
    return found


def main(folder: str, asked: str) -> None:
    """Prints what was found as JSON, in the last line."""
    sys.path[0] = folder  # instead of the folder that this file lies in
    own = importlib.import_module("backbones").__file__
    if not own or not Path(own).is_relative_to(Path(folder).resolve()):
        raise SystemExit(f"Python imports {own} instead of what {folder} has")
    print(json.dumps(measure(**json.loads(asked))))


if __name__ == "__main__":
    main(*sys.argv[1:])
