"""Draws images from a trained run.

    python recipes/sample.py runs/digits-sana --classes 0,1,2 --cfg 4.0 --steps 50

Image i of seed s starts from noise that depends on (s, i) alone, so it is the same whatever the
batch size.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from backbones import DiT
from recipes.lab.console import UserError, numbers, run_script, user_errors, whole
from recipes.lab.diffusion import DIFFUSION_PRESETS, SAMPLERS, sample
from recipes.lab.drawing.pictures import save_grid
from recipes.lab.training.checkpoint import Run


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    given = _parser().parse_args(arguments)
    run = Run.open(given.run)
    count = len(run.config()["data"]["class_names"])
    classes = given.classes if given.classes is not None else list(range(min(10, count)))
    images = sample_run(
        run,
        labels=torch.tensor(classes, dtype=torch.int64).repeat(given.per_class),
        cfg=given.cfg,
        steps=given.steps,
        seed=given.seed,
        batch_size=given.batch_size,
        sampler=given.sampler,
        weights=given.weights,
        progress=True,
    )
    out = (
        Path(given.out) if given.out else run.samples / f"cfg-{given.cfg:g}-seed-{given.seed}.png"
    )
    save_grid(images, out, columns=len(classes))
    print(f"{len(images)} images, one class per column: {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python recipes/sample.py", description="Draw images from a trained run."
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("--classes", type=numbers(int), help="class indices, such as 0,1,2")
    parser.add_argument("--per-class", type=whole(1), default=4, help="images of each class")
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance scale; 1 is without")
    parser.add_argument("--steps", type=whole(1), default=20, help="model evaluations")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the start noise")
    parser.add_argument("--batch-size", type=whole(1), default=64, help="images per model call")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: dpm++, or euler-flow")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema")
    parser.add_argument("--out", help="PNG to write")
    return parser


def load_run(run: Run, weights: str = "ema") -> tuple[DiT, dict[str, Any]]:
    """The model of a run's newest whole checkpoint, and the run's configuration.

    Raises:
        UserError: There is no whole checkpoint, or its files are not what they should be.
    """
    found = run.newest_checkpoint(warn=print)
    if found is None:
        raise UserError(f"{run.folder} holds no whole checkpoint yet; train it further")
    folder = found[1] / weights
    try:
        # Without the flag, diffusers falls back to a pickle that lies beside.
        return DiT.from_pretrained(folder, use_safetensors=True), run.config()
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder} holds no model in safetensors ({reason}); delete it") from error


class RunSampler:
    """Draws images from a run; loads its model once.

    Args:
        run: A trained run.
        weights: "ema" or "model".
        device: Where to compute; None takes the GPU if there is one.

    Raises:
        UserError: The run has no checkpoint.
    """

    def __init__(
        self, run: Run, weights: str = "ema", device: str | torch.device | None = None
    ) -> None:
        model, config = load_run(run, weights)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        self.diffusion = DIFFUSION_PRESETS[config["settings"]["preset"]]
        self.data = config["data"]

    def __call__(
        self,
        labels: Tensor,
        indices: Tensor | None = None,
        *,
        cfg: float = 1.0,
        cfg_channels: int | None = None,
        steps: int = 20,
        seed: int = 0,
        batch_size: int = 64,
        sampler: str | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draws one image per label; see ``recipes.lab.diffusion.sample``.

        Args:
            labels: (n,) int64.
            indices: (n,) int64, which image of the seed each is; None counts from 0.
            cfg: Guidance scale.
            cfg_channels: Leading channels to guide; None guides all.
            steps: Model evaluations.
            seed: Of the start noise.
            batch_size: Images per model call.
            sampler: None takes the one that suits the run.
            progress: Whether to show a bar.

        Returns:
            (n, c, h, w) on the CPU, nominally in [-1, 1].

        Raises:
            UserError: An argument is out of range.
        """
        data = self.data
        with user_errors():
            return sample(
                self.model,
                self.diffusion,
                labels=labels,
                indices=torch.arange(len(labels)) if indices is None else indices,
                seed=seed,
                num_classes=len(data["class_names"]),
                shape=(data["channels"], data["resolution"], data["resolution"]),
                cfg=cfg,
                cfg_channels=cfg_channels,
                sampler=sampler or self.default_sampler,
                steps=steps,
                batch_size=batch_size,
                device=self.device,
                progress=progress,
            ).cpu()

    @property
    def default_sampler(self) -> str:
        """The sampler that suits what the run predicts."""
        return "euler-flow" if self.diffusion.prediction == "flow" else "dpm++"


def sample_run(run: Run, *, labels: Tensor, weights: str = "ema", **options: Any) -> Tensor:
    """Draws one image per label from a run; ``options`` are those of ``RunSampler``'s call.

    Returns:
        (n, c, h, w), nominally in [-1, 1].

    Raises:
        UserError: The run has no checkpoint, or an argument is out of range.
    """
    return RunSampler(run, weights)(labels, **options)


if __name__ == "__main__":
    run_script(main)
