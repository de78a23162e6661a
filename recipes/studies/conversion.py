"""How soon a converted model is as good as one that was trained from scratch.

    python -m recipes.studies.conversion --data fashion-mnist --steps 600 --batch-size 32

For each seed a softmax model and ones of the target attention are trained, and the first is
converted for several shares of its steps, with and without it as teacher. Quality is the loss of
the averaged weights on held-out images, at the same times and noise for all. The same command goes
on where it was stopped; the table is written to OUT/conversion.md, its numbers to conversion.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from backbones import build_backbone
from backbones.pattern import file_name
from recipes.lab.console import DONE, UserError, add_import_flag, numbers, run_script, whole
from recipes.lab.diffusion import generator_for
from recipes.lab.evaluation.real import real_images
from recipes.lab.files import write_json, write_text
from recipes.lab.imports import import_all
from recipes.lab.pages import markdown_table
from recipes.lab.sampling import RunSampler
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.conversion import converted_settings, open_source
from recipes.lab.training.distillation import parse_terms
from recipes.lab.training.session import start_from, train
from recipes.lab.training.settings import Settings

_BATCHES, _BATCH = 16, 128


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    given = _parser().parse_args(arguments)
    import_all(given.imports)
    build_backbone(given.attn, "tiny", "controlled")  # what cannot be fails before softmax trains
    out, losses = Path(given.out), {}
    for seed in range(given.seeds):
        for name, run, steps in _runs(given, out, seed):
            losses.setdefault((name, steps), []).append(held_out_loss(run))
            write_json(out / "conversion.json", _rows(losses))
    table = _table(losses, given.steps)
    write_text(out / "conversion.md", table + "\n")
    print(table)
    return DONE


def _runs(given: argparse.Namespace, out: Path, seed: int) -> Iterator[tuple[str, Run, int]]:
    """Every run of a seed: what it is, the run and its steps."""
    common = {"data": given.data, "resolution": given.resolution, "seed": seed,
              "batch_size": given.batch_size, "sample_every": given.steps,
              "compile": "off"}  # fmt: skip  # which would take longer than such a run
    softmax = Run(out / f"softmax-seed-{seed}")
    _finish(softmax, Settings(attn="softmax", steps=given.steps, **common))
    yield "softmax, from scratch", softmax, given.steps
    source = open_source(str(softmax.folder), "ema", ())
    # With the heads that a conversion gives it.
    frame = converted_settings(source, {"attn": given.attn}, {})
    kept = {"attn": frame.attn, "attn_options": frame.attn_options, "backbone": frame.backbone}
    for share in (1.0, *given.shares):
        steps = max(1, round(share * given.steps))
        tail = "" if share == 1 else f"-{steps}-scratch"
        scratch = Run(out / f"{file_name(given.attn)}{tail}-seed-{seed}")
        _finish(scratch, Settings(steps=steps, **kept, **common))  # type: ignore[arg-type]
        yield f"{given.attn}, from scratch", scratch, steps
    for share in given.shares:
        for terms in given.distil:
            steps = max(1, round(share * given.steps))
            asked = {"attn": given.attn, "steps": steps, "sample_every": steps}
            settings = converted_settings(source, asked, parse_terms(terms) if terms else {})
            name = f"{file_name(given.attn)}-{steps}-{terms.replace('+', '-') or 'alone'}"
            run = Run(out / f"{name.replace(',', '-')}-seed-{seed}")
            if not run.checkpoint_names():  # also one that was killed before its first was whole
                start_from(source, settings, run, overwrite=run.config_file.exists())
            _finish(run, settings)
            yield f"converted, {terms or 'no teacher'}", run, steps


def _finish(run: Run, settings: Settings) -> None:
    resume = run.config_file.exists()
    if resume:
        before = Settings(**run.config()["settings"])
        if dataclasses.replace(before, start=None) != dataclasses.replace(settings, start=None):
            raise UserError(f"{run.folder} holds a run of other settings; choose another --out")
    if status := train(settings, run, resume=resume):
        raise UserError(f"{run.folder} ended with status {status}")


@torch.no_grad()
def held_out_loss(run: Run) -> float:
    """The mean squared error of a run's averaged weights on images that it was not trained on."""
    sampler = RunSampler(run)
    found, reason = real_images(run, run.config(), None)
    if found is None:
        raise UserError(reason)
    _, test = found.open()
    total = 0.0
    for number in range(_BATCHES):
        generator = generator_for(0, number)
        indices = torch.randint(len(test), (_BATCH,), generator=generator)
        images, labels = test.batch(indices)
        times = sampler.diffusion.sample_timesteps(_BATCH, generator)
        noise = torch.randn(images.shape, generator=generator)
        losses = sampler.diffusion.training_losses(
            sampler.model,
            *(z.to(sampler.device) for z in (images, labels)),
            timesteps=times.to(sampler.device),
            noise=noise.to(sampler.device),
        )
        total += losses["mse"].mean().item() / _BATCHES
    return total


def _rows(losses: Mapping[tuple[str, int], list[float]]) -> list[dict[str, Any]]:
    return [
        {"run": name, "steps": steps, "losses": of_seeds}
        for (name, steps), of_seeds in losses.items()
    ]


def _table(losses: Mapping[tuple[str, int], list[float]], steps: int) -> str:
    (scratch,) = (
        of_seeds
        for (name, taken), of_seeds in losses.items()
        if name.endswith("from scratch") and not name.startswith("softmax") and taken == steps
    )
    rows = []
    for (name, taken), of_seeds in losses.items():
        better = sum(one <= other for one, other in zip(of_seeds, scratch, strict=False))
        spread = statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0.0
        rows.append([
            name, taken, f"{100 * taken / steps:.0f} %",
            f"{statistics.fmean(of_seeds):.4f} ± {spread:.4f}",
            "" if of_seeds is scratch else f"{better} of {len(of_seeds)}",
        ])  # fmt: skip
    heading = ["run", "steps", "of scratch", "held-out loss", "seeds at least as good as scratch"]
    return markdown_table(heading, rows, padded=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.studies.conversion", description=(__doc__ or "").split("\n")[0]
    )
    flag = parser.add_argument
    flag("--attn", default="lit", help="what the softmax model becomes (default: lit)")
    flag("--data", default="fashion-mnist", help="as train.py takes it, with a test split")
    flag("--resolution", type=whole(1), help="of the images (default: their own)")
    flag("--steps", type=whole(1), default=600, help="of the models from scratch (default: 600)")
    flag("--shares", type=numbers(float), default=[0.1, 0.2, 0.4],
         help="of these steps, for conversions (default: 0.1,0.2,0.4)")  # fmt: skip
    flag("--distil", type=lambda text: text.split("/"), default=["", "noise", "noise,features"],
         help="sets of terms, separated by / (default: /noise/noise,features)")  # fmt: skip
    flag("--batch-size", type=whole(1), default=32, help="images per step (default: 32)")
    flag("--seeds", type=whole(1), default=3, help="number of seeds, from 0 (default: 3)")
    flag("--out", default="runs/conversion", help="folder of all runs and the table")
    add_import_flag(parser)
    return parser


if __name__ == "__main__":
    run_script(main)
