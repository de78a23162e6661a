"""Trains the shared backbone with one attention of the zoo.

    python recipes/train.py --attn sana

With no other flag it trains on handwritten digits on a CPU for a few minutes. Every random draw
depends on (seed, step) alone, so every mechanism sees the same images, times, noise and label
drops, and a resumed run equals one that was never interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import platform
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

import attnzoo
from backbones import DiT, build_backbone
from recipes.checkpoint import Run, load_optimizer
from recipes.console import (
    DONE,
    INTERRUPTED,
    NON_FINITE,
    UserError,
    parse_options,
    run_script,
    user_errors,
    whole,
)
from recipes.data import DATASETS, ImageDataset, batch_indices, load_dataset
from recipes.diffusion import DIFFUSION_PRESETS, generator_for, sample
from recipes.pictures import save_grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a run computes; saved as the run's config.json."""

    attn: str = "dydila"
    attn_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    size: str = "tiny"
    protocol: str = "controlled"
    data: str = "digits"
    level: str = "easy"
    resolution: int | None = None  # None takes the data's own
    patch_size: int | None = None  # None takes 2 up to 16 px, 4 above
    preset: str = "tiny"
    steps: int = 1500
    batch_size: int = 64
    seed: int = 0
    strict: bool = False
    precision: str = "fp32"
    learning_rate: float = 3e-3
    adam_beta2: float = 0.95
    decay: str = "linear"  # of the learning rate, to 0 at the last step; or "constant"
    gradient_clip: float | None = 1.0  # None logs the norm without clipping
    ema_decay: float = 0.999
    ema_ramp: bool = True  # averages over fewer steps at the start
    label_dropout: float = 0.1
    checkpoint_every: int = 500
    sample_every: int = 500


# What a preset changes: "tiny" is for a CPU, "dit" is the recipe of DiT and of the paper.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "flow": {},
    "dit": {
        "steps": 400_000,
        "batch_size": 256,
        "learning_rate": 1e-4,
        "adam_beta2": 0.999,
        "decay": "constant",
        "gradient_clip": None,
        "ema_decay": 0.9999,
        "ema_ramp": False,
        "precision": "bf16",
        "checkpoint_every": 5000,
        "sample_every": 5000,
    },
}


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    given = vars(_parser().parse_args(arguments))
    out, resume, overwrite = given.pop("out"), given.pop("resume"), given.pop("overwrite")
    if "set" in given:
        given["attn_options"] = parse_options(given.pop("set"))
    if resume:
        run = Run.open(out or default_folder(given))
        settings = _resumed_settings(run, given)
    else:
        settings = Settings(**({**PRESETS[given.get("preset", "tiny")]} | given))
        run = Run(out or default_folder(given))
    return train(settings, run, resume=resume, overwrite=overwrite)


def default_folder(given: dict[str, Any]) -> Path:
    """Where a run goes if the caller does not say."""
    data = Path(given.get("data", Settings.data)).name
    return Path("runs") / f"{data}-{given.get('attn', Settings.attn).replace('/', '-')}"


def _parser() -> argparse.ArgumentParser:
    # A flag that is not given must not appear, so that a resumed run can tell what was asked for.
    parser = argparse.ArgumentParser(
        prog="python recipes/train.py",
        description="Train the shared backbone with one attention of the zoo.",
        argument_default=argparse.SUPPRESS,
    )
    flag = parser.add_argument
    flag("--attn", help=f"one of {', '.join(attnzoo.list_attention())}, or a model of the paper")
    flag(
        "--set", action="append", metavar="OPTION=VALUE", help="an option of the mechanism; repeat"
    )
    flag("--size", help="tiny, S, B or L")
    flag("--protocol", help="controlled (same depth and feed-forward for all) or paper")
    flag("--data", help=f"{', '.join(DATASETS)}, or a folder with one sub-folder per class")
    flag("--level", help="of shapes: easy, medium, hard or long-range")
    flag("--resolution", type=whole(1), help="side of the images in pixels")
    flag("--patch-size", type=whole(1), help="side of a patch in pixels")
    flag("--preset", choices=list(PRESETS), help="training recipe")
    flag("--steps", type=whole(1), help="optimiser steps")
    flag("--batch-size", type=whole(1), help="images per step")
    flag("--seed", type=whole(0), help="of everything that is random")
    flag("--learning-rate", type=float, help="at the start")
    flag("--precision", choices=["fp32", "bf16"], help="of the matrix products")
    flag("--checkpoint-every", type=whole(1), help="steps between checkpoints")
    flag("--sample-every", type=whole(1), help="steps between sample grids")
    flag("--strict", action="store_true", help="stop at the first unreadable image")
    flag("--out", default=None, help="folder of the run (default: runs/DATA-ATTN)")
    flag("--resume", action="store_true", default=False, help="continue the run in --out")
    flag("--overwrite", action="store_true", default=False, help="replace the run in --out")
    return parser


def _resumed_settings(run: Run, given: dict[str, Any]) -> Settings:
    saved = run.config()["settings"]
    changed = [
        f"{name}: {saved[name]!r} -> {value!r}"
        for name, value in given.items()
        if saved[name] != value
    ]
    if changed:
        raise UserError(
            f"--resume continues {run.folder} as it was started, but these differ: "
            f"{'; '.join(changed)}"
        )
    return Settings(**saved)


class Trainer:
    """The state of a run between two steps.

    Args:
        settings: What to compute.
        quiet: Whether to keep the progress bar away.

    Raises:
        ValueError: A setting is out of range or does not fit the others.
        TypeError: The mechanism does not have an option.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.dataset = load_dataset(
            settings.data,
            resolution=settings.resolution,
            level=settings.level,
            seed=settings.seed,
            strict=settings.strict,
        )
        self.diffusion = DIFFUSION_PRESETS[settings.preset]
        self.accelerator = Accelerator(
            mixed_precision="no" if settings.precision == "fp32" else settings.precision
        )
        torch.manual_seed(settings.seed)
        self.model = build_model(settings, self.dataset).to(self.accelerator.device).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, settings.adam_beta2),
            weight_decay=0.0,
        )
        self.ema = EMAModel(
            self._averaged(),
            decay=settings.ema_decay,
            min_decay=0.0 if settings.ema_ramp else settings.ema_decay,
        )
        self.step = 0

    def _averaged(self) -> list[Tensor]:
        # Batch-norm statistics are buffers: an average of the parameters alone would sample with
        # statistics that belong to other weights.
        return [*self.model.parameters(), *self.model.buffers()]

    @contextlib.contextmanager
    def averaged_model(self) -> Iterator[DiT]:
        """The model with its averaged weights, inside the with-statement."""
        self.ema.store(self._averaged())
        self.ema.copy_to(self._averaged())
        try:
            yield self.model
        finally:
            self.ema.restore(self._averaged())

    def train_step(self) -> dict[str, Any]:
        """Takes one optimiser step and returns what there is to log about it."""
        settings, device = self.settings, self.accelerator.device
        images, labels, timesteps, noise = (t.to(device) for t in self._batch())
        torch.manual_seed(settings.seed * 1_000_003 + self.step)  # noise inside a mechanism
        rate = settings.learning_rate
        if settings.decay == "linear":
            rate *= 1 - self.step / settings.steps
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.accelerator.autocast():
            losses = self.diffusion.training_losses(
                self.model, images, labels, timesteps=timesteps, noise=noise
            )
        loss = losses["loss"].mean()
        auxiliary = attnzoo.auxiliary_loss(self.model)
        self.optimizer.zero_grad()
        (loss if auxiliary is None else loss + auxiliary).backward()
        norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), settings.gradient_clip or math.inf
        )
        if not (loss.isfinite() and norm.isfinite()):
            raise FloatingPointError(
                f"step {self.step + 1}: loss {loss.item()}, gradient norm {norm.item()}"
            )
        self.optimizer.step()
        self.ema.step(self._averaged())
        self.step += 1
        entry = {name: value.mean().item() for name, value in losses.items()}
        if auxiliary is not None:
            entry["auxiliary"] = auxiliary.item()
        return {"step": self.step, **entry, "gradient_norm": norm.item(), "learning_rate": rate}

    def _batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        settings = self.settings
        indices = batch_indices(self.dataset, settings.seed, self.step, settings.batch_size)
        images, labels = self.dataset.batch(indices)
        generator = generator_for(settings.seed, self.step)
        batch = len(labels)
        if self.dataset.horizontal_flip:
            flipped = torch.rand(batch, generator=generator) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        dropped = torch.rand(batch, generator=generator) < settings.label_dropout
        labels = torch.where(dropped, self.dataset.num_classes, labels)
        timesteps = self.diffusion.sample_timesteps(batch, generator)
        return images, labels, timesteps, torch.randn(images.shape, generator=generator)

    def save(self, run: Run) -> None:
        """Writes a checkpoint."""
        with self.averaged_model() as averaged:
            ema = DiT.from_config(averaged.config)
            ema.load_state_dict(averaged.state_dict())
        run.save(self.step, self.model, ema, self.optimizer)

    def load(self, run: Run) -> None:
        """Restores the newest whole checkpoint.

        Raises:
            UserError: There is none.
        """
        found = run.newest_checkpoint(warn=tqdm.write)
        if found is None:
            raise UserError(
                f"{run.folder} holds no whole checkpoint; start again with --overwrite"
            )
        self.step, folder = found
        self.model.load_state_dict(DiT.from_pretrained(folder / "ema").state_dict())
        self.ema.shadow_params = [tensor.detach().clone() for tensor in self._averaged()]
        self.model.load_state_dict(DiT.from_pretrained(folder / "model").state_dict())
        load_optimizer(self.optimizer, folder / "optimizer.safetensors")
        self.ema.optimization_step = self.step
        run.cut_log(self.step)

    def sample_grid(self, path: Path) -> None:
        """Draws two images of each of the first ten classes, always from the same noise."""
        classes = min(10, self.dataset.num_classes)
        labels = torch.arange(classes).repeat(2)
        with self.averaged_model() as averaged:
            images = sample(
                averaged,
                self.diffusion,
                labels=labels,
                indices=torch.arange(len(labels)),
                seed=self.settings.seed,
                num_classes=self.dataset.num_classes,
                shape=(self.dataset.channels, self.dataset.resolution, self.dataset.resolution),
                sampler="euler-flow" if self.diffusion.prediction == "flow" else "dpm++",
                device=self.accelerator.device,
            )
        save_grid(images.cpu(), path, columns=classes)


def build_model(settings: Settings, dataset: ImageDataset) -> DiT:
    """The backbone that the settings describe, for images of ``dataset``."""
    patch_size = settings.patch_size or (2 if dataset.resolution <= 16 else 4)
    return build_backbone(
        settings.attn,
        settings.size,
        settings.protocol,
        dataset.resolution,
        latent_factor=1,
        patch_size=patch_size,
        in_channels=dataset.channels,
        num_classes=dataset.num_classes,
        learn_sigma=DIFFUSION_PRESETS[settings.preset].learn_sigma,
        attn_options=settings.attn_options,
    )


def train(
    settings: Settings,
    run: Run,
    *,
    resume: bool = False,
    overwrite: bool = False,
    should_stop: Callable[[int], bool] = lambda step: False,
) -> int:
    """Trains until ``settings.steps`` and leaves everything in the run's folder.

    Args:
        settings: What to compute.
        run: Where it goes.
        resume: Whether to continue from the newest checkpoint.
        overwrite: Whether to replace a run that is there.
        should_stop: Asked after every step; True saves and stops, as Ctrl-C does.

    Returns:
        0 when done, 75 when interrupted and saved, 3 on a non-finite loss.

    Raises:
        UserError: The settings or the folder cannot be used.
    """
    with user_errors():
        trainer = Trainer(settings)
    if resume:
        with user_errors():
            trainer.load(run)
    else:
        run.create(_describe(trainer), overwrite)
    interrupted: list[int] = []
    with _on_signals(lambda number, _: interrupted.append(number)):
        progress = tqdm(
            total=settings.steps, initial=trainer.step, desc=str(run.folder), unit="step"
        )
        while trainer.step < settings.steps:
            started = time.perf_counter()
            try:
                entry = trainer.train_step()
            except FloatingPointError as error:
                progress.close()
                tqdm.write(f"stopped, not finite: {error}; the checkpoints before are whole")
                return NON_FINITE
            entry["seconds"] = time.perf_counter() - started
            run.append_log(entry)
            progress.update()
            progress.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
            stopping = bool(interrupted) or should_stop(trainer.step)
            is_last = trainer.step == settings.steps
            if stopping or is_last or trainer.step % settings.checkpoint_every == 0:
                trainer.save(run)
            if is_last or trainer.step % settings.sample_every == 0:
                trainer.sample_grid(run.samples / f"step-{trainer.step:08d}.png")
            if stopping and not is_last:
                progress.close()
                tqdm.write(
                    f"stopped after step {trainer.step} and saved; go on with\n"
                    f"  python recipes/train.py --resume --out {run.folder}"
                )
                return INTERRUPTED
        progress.close()
    tqdm.write(
        f"done: samples in {run.samples}; more with\n"
        f"  python recipes/sample.py {run.folder} --classes 0,1,2 --cfg 2.0"
    )
    return DONE


def _describe(trainer: Trainer) -> dict[str, Any]:
    dataset = trainer.dataset
    return {
        "settings": dataclasses.asdict(trainer.settings),
        "data": {
            "resolution": dataset.resolution,
            "channels": dataset.channels,
            "class_names": list(dataset.class_names),
        },
        "versions": {
            "attnzoo": attnzoo.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


@contextlib.contextmanager
def _on_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Lets Ctrl-C and a scheduler's signals finish the step instead of tearing it."""
    try:
        previous = {
            number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # not in the main thread, where signals cannot be caught
        yield
        return
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


if __name__ == "__main__":
    run_script(main)
