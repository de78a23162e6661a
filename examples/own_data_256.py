"""Your own images at 256 px: encode them, train on the latents, sample, evaluate.

    python examples/own_data_256.py IMAGES --vae VAE --out cats --steps 100000

IMAGES has one sub-folder per class; VAE is the folder or hub id of a diffusers ``AutoencoderKL``
such as stabilityai/sd-vae-ft-ema. Each step is a recipe with flags of its own and is printed as
the command that does the same. The whole may be interrupted and started again: what is done is
not done twice.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

from recipes import encode, evaluate, sample, train
from recipes.lab.console import DONE, run_script


def main(arguments: list[str]) -> int:
    """Runs all steps; returns the exit status of the first that does not succeed."""
    parser = argparse.ArgumentParser(description="Train on your own images with a VAE.")
    parser.add_argument("images", type=Path, help="folder with one sub-folder per class")
    parser.add_argument("--vae", required=True, help="folder or hub id of an AutoencoderKL")
    parser.add_argument("--out", type=Path, default=Path("own-data"), help="folder to write")
    parser.add_argument("--attn", default="dydila")
    parser.add_argument("--size", default="S", help="tiny, S, B or L")
    parser.add_argument("--resolution", default="256", help="of the images, in pixels")
    parser.add_argument("--steps", default="100000")
    parser.add_argument("--batch-size", default="64", help="images per optimizer step")
    parser.add_argument("--samples", default="5000", help="images to measure")
    parser.add_argument("--cfg", default="1.5", help="guidance scale")
    given = parser.parse_args(arguments)
    latents, run = str(given.out / "latents"), str(given.out / "run")
    images, vae = str(given.images), ["--vae", given.vae]

    todo: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (encode.main, [images, latents, *vae, "--resolution", given.resolution]),
        (train.main, ["--preset", "dit", "--data", latents, "--attn", given.attn,
                      "--size", given.size, "--steps", given.steps,
                      "--batch-size", given.batch_size, "--out", run]),
        (sample.main, [run, *vae, "--cfg", given.cfg, "--per-class", "4"]),
        (evaluate.main, [run, *vae, "--real", images, "--cfg", given.cfg,
                         "--samples", given.samples]),
    ]  # fmt: skip
    for step, flags in todo:
        script = f"recipes/{step.__module__.rpartition('.')[2]}.py"
        print(f"$ python {script} {shlex.join(flags)}", flush=True)
        if (status := step(flags)) != DONE:
            return status
    return DONE


if __name__ == "__main__":
    run_script(main)
