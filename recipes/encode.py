"""Encodes a folder of images into latents, once, for training without the VAE.

    python recipes/encode.py imagenet latents --vae stabilityai/sd-vae-ft-ema
    python recipes/encode.py imagenet sub-in --vae vae-folder --class-count 100
    python recipes/train.py --preset dit --data latents

Every image is cached as mean and log-variance of its posterior, as it is and mirrored, so that
training draws afresh at each visit. Interrupted, it goes on where it stopped; run again, it makes
anew the shards whose images have changed; several processes (torchrun, accelerate launch) share
the shards.
"""

from __future__ import annotations

from pathlib import Path

from recipes.lab.console import Parser, run_script, whole


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser("encode", __doc__)
    flag = parser.add_argument
    flag("images", type=Path, metavar="IMAGES",
         help="folder with one sub-folder per class, or with train/")  # fmt: skip
    flag("latents", type=Path, metavar="LATENTS", help="folder to write")
    flag = parser.add_argument_group("what is encoded").add_argument
    flag("--vae", required=True, help="folder or hub id of an AutoencoderKL")
    flag("--resolution", type=whole(8), default=256, help="of the images")
    flag("--class-count", type=whole(1), help="draw that many classes; 100 makes Sub-IN")
    flag("--class-seed", type=whole(0), default=0, help="of that draw")
    flag("--skip-bad", type=whole(0), default=0, help="unreadable images to leave out at most")
    flag = parser.add_argument_group("how").add_argument
    flag("--dtype", choices=["fp16", "fp32"], default="fp16", help="of the latents on disk")
    flag("--batch-size", type=whole(1), default=32, help="images per call of the VAE")
    flag("--shard-size", type=whole(1), default=1024, help="images per file")
    given = parser.parse_args(arguments)
    from recipes.lab.data.encoding import encode  # --help does not wait for torch

    return encode(**vars(given))


if __name__ == "__main__":
    run_script(main)
