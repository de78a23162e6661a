"""Images per second of recipes as a user starts them, by other ways and by an older checkout."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import Unavailable
from backbones import compile_blocks
from bench.checks import WrongStep, relative_error
from bench.launch import ROOT, end, last_words, start
from bench.machine import quiet
from bench.reports import TOO_SLOW
from bench.timing import interleave
from bench.whole_models.cases import Case, Setup, build_model
from bench.whole_models.measures import stopwatch
from bench.whole_models.older import BEFORE, sampling_speeds
from recipes.lab.diffusion import DIFFUSION_PRESETS, Recorder, sample

# Of a recipe, by way: --cuda-graph and --compile.
WAYS = {"compiled": ("on", "on"), "recorded": ("on", "off"), "eager": ("off", "off")}
GPUS = {"one GPU": 1, "two GPUs": 2}
# Recipes whose images per second are compared by way, E2, E3 and E11: of which mechanisms.
RECIPES = {
    ("train", ("softmax", "dydila")): tuple(WAYS),
    ("sample", ("softmax", "dydila")): tuple(WAYS),
    ("train on GPUs", ("dydila",)): tuple(GPUS),
}
# Seconds that one takes on an H100, with compilers' caches on disk, until one has been taken:
# of recipes, and of the part "before".
EXPECTED = {"train": 25.0, "sample": 25.0, "train on GPUs": 45.0, "before": 40.0}


@dataclasses.dataclass(frozen=True)
class Steps:
    """Which steps of a training count.

    Attributes:
        settling: The first ones, which do not.
        least: Fewest that do.
        seconds: Of those that do, after which no more than the fewest are waited for.
        most: After which training ends by itself.
    """

    settling: int = 10
    least: int = 20
    seconds: float = 3.0
    most: int = 400

    def counted(self, seconds: Sequence[float]) -> Sequence[float] | None:
        """Those that count, of all that have been taken; None as long as they do not suffice."""
        found = seconds[self.settling :]
        is_enough = len(found) >= self.least and sum(found) >= self.seconds
        return found if is_enough or len(seconds) >= self.most else None


def rehearse_recipe(recipe: str, mechanism: str, way: str, setup: Setup) -> None:
    """Runs a recipe shortly, so that compilers' caches on disk have what it takes."""
    from torch._inductor import config

    quiet()
    config.compile_threads = 1
    setup = dataclasses.replace(setup, seconds=0.0)
    measure_recipe(recipe, mechanism, way, setup, steps=Steps(0, 4, 0.0, most=4))


def measure_recipe(
    recipe: str, mechanism: str, way: str, setup: Setup,
    patience: float = 170.0, steps: Steps = Steps(),
) -> dict[str, Any]:  # fmt: skip
    """Images per second of a recipe as a user starts it, DiT-S in bfloat16.

    Args:
        recipe: "train", of 256 tokens; "sample", likewise, with guidance; or "train on GPUs", of
            4096 tokens and as many images for each GPU.
        mechanism: The attention.
        way: Of ``WAYS``, or of ``GPUS``; or ``BEFORE``.
        setup: Where.
        patience: Seconds that a training may take.
        steps: Which of them count; a few are too few for a figure.
    """
    row: dict[str, Any] = {"recipe": recipe, "mechanism": mechanism, "way": way}
    if way == BEFORE:
        row["commit"] = setup.before_commit
    if recipe == "sample" and way == BEFORE:
        found = sampling_speeds(mechanism, setup)
        row["float32_images_per_second"] = found["float32"]  # without the autocast that ours have
        return row | {"images_per_second": found["bfloat16"]}
    if recipe == "sample":
        return row | {"images_per_second": _sampling(mechanism, way, setup)}
    processes, root = GPUS.get(way, 1), ROOT
    if recipe == "train":
        batch, options = 64, ["--resolution", "64"]
        if way == BEFORE:
            assert setup.before is not None
            root = setup.before
        else:
            graph, compiled = WAYS[way]
            options += ["--cuda-graph", graph, "--compile", compiled]
    else:
        # One alone has nothing beside it.
        if (there := torch.cuda.device_count()) < (most := max(GPUS.values())):
            raise Unavailable(
                f"needs {most} GPUs, and there {'is' if there == 1 else 'are'} {there}"
            )
        batch, options = 16 * processes, ["--resolution", "128", "--patch-size", "2"]
    options = ["--attn", mechanism, "--batch-size", str(batch), *options]
    seconds = _training(options, processes, root, patience, steps)
    return row | {"images_per_second": batch / statistics.median(seconds), "steps": len(seconds)}


def _training(
    options: Sequence[str], processes: int, root: Path, patience: float, steps: Steps
) -> Sequence[float]:
    """Seconds of the steps that count; what follows them is cut off."""
    never = [f"--{what}-every={2 * steps.most}" for what in ("checkpoint", "sample", "diagnose")]
    with tempfile.TemporaryDirectory() as folder:
        run, output = Path(folder, "run"), Path(folder, "output.txt")
        script = [
            str(root / "recipes" / "train.py"), "--size", "S", "--data", "shapes",
            "--precision", "bf16", "--steps", str(steps.most), "--out", str(run), *never, *options,
        ]  # fmt: skip
        process, until = start(script, processes, output, root), time.monotonic() + patience
        try:
            while True:
                has_ended = process.poll() is not None
                if found := steps.counted(_seconds_of_steps(run)):
                    return found
                if has_ended:
                    said = last_words(output)
                    raise WrongStep(f"train.py ended with {process.returncode}: {said}")
                if time.monotonic() > until:
                    raise WrongStep(f"{TOO_SLOW} {patience:.0f} s: {last_words(output)}")
                time.sleep(0.1)
        finally:
            if processes == 1:
                process.kill()  # it would save and draw first
            end(process)


def _seconds_of_steps(run: Path) -> list[float]:
    log = run / "log.jsonl"
    lines = log.read_text("utf-8").split("\n")[:-1] if log.exists() else []
    return [json.loads(line)["seconds"] for line in lines]


def _sampling(mechanism: str, way: str, setup: Setup, images: int = 16) -> float:
    case = Case(mechanism, "S", 256, "forward")
    model, labels, side = build_model(case, setup.device), torch.arange(images), 2 * case.side
    model.requires_grad_(False)

    def draw(recorder: Recorder | None) -> Tensor:
        return sample(
            model, DIFFUSION_PRESETS["dit"], labels=labels, indices=labels, seed=0,
            num_classes=1000, shape=(4, side, side), device=setup.device, recorder=recorder,
            cfg=4.0, sampler="dpm++", steps=20, batch_size=images, precision="bf16",
        )  # fmt: skip

    wanted, recorder = draw(None), Recorder("off" if way == "eager" else "on")
    if way == "compiled":
        compile_blocks(model, backend=setup.backend)
    # Twenty steps later a rounding that sent a token to another expert is no longer small.
    if not (error := relative_error(draw(recorder), wanted)) <= 0.2:
        raise WrongStep(f"its images differ from the eager ones by {error:.1e}")
    rounds = interleave({way: lambda: draw(recorder)}, stopwatch(setup), 5, setup.seconds)
    return images / statistics.median(rounds[way])
