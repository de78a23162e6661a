"""Images per second of recipes as a user starts them, by other ways and by an older checkout."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import Unavailable
from backbones import compile_blocks
from bench.checks import WrongStep, relative_error
from bench.isolate import one_line
from bench.machine import quiet
from bench.timing import interleave
from bench.whole_models.cases import Case, Setup, build_model
from bench.whole_models.measures import stopwatch
from recipes.lab.diffusion import DIFFUSION_PRESETS, Recorder, sample

# Of a recipe, by way: --cuda-graph and --compile.
WAYS = {"compiled": ("on", "on"), "recorded": ("on", "off"), "eager": ("off", "off")}
BEFORE = "before"  # by the recipes of an older checkout, which knew no such flags
GPUS = {"one GPU": 1, "two GPUs": 2}
# Recipes whose images per second are compared by way, E2, E3 and E11: of which mechanisms.
RECIPES = {
    ("train", ("softmax", "dydila")): tuple(WAYS),
    ("sample", ("softmax", "dydila")): tuple(WAYS),
    ("train on GPUs", ("dydila",)): tuple(GPUS),
}
_STEPS = 60  # of a training, of which the first third does not count


def rehearse_recipe(recipe: str, mechanism: str, way: str, setup: Setup) -> None:
    """Runs a recipe shortly, so that compilers' caches on disk have what it takes."""
    from torch._inductor import config

    quiet()
    config.compile_threads = 1
    measure_recipe(recipe, mechanism, way, dataclasses.replace(setup, seconds=0.0), short=True)


def measure_recipe(
    recipe: str, mechanism: str, way: str, setup: Setup, short: bool = False
) -> dict[str, Any]:
    """Images per second of a recipe as a user starts it, DiT-S in bfloat16.

    Args:
        recipe: "train", of 256 tokens; "sample", likewise, with guidance; or "train on GPUs", of
            4096 tokens and as many images for each GPU.
        mechanism: The attention.
        way: Of ``WAYS``, or of ``GPUS``; or ``BEFORE``.
        setup: Where.
        short: Too few steps for a figure.
    """
    steps = 4 if short else _STEPS
    row: dict[str, Any] = {"recipe": recipe, "mechanism": mechanism, "way": way}
    if way == BEFORE:
        row["commit"] = setup.before_commit
    if recipe == "sample" and way == BEFORE:
        found = _sampling_before(mechanism, setup, rounds=1 if short else 3)
        row["float32_images_per_second"] = found["float32"]  # without the autocast that ours have
        speed = found["bfloat16"]
    elif recipe == "sample":
        speed = _sampling(mechanism, way, setup)
    elif recipe == "train":
        graph, compiled = WAYS.get(way, ("", ""))
        options = ["--resolution", "64"]
        if way != BEFORE:
            options += ["--cuda-graph", graph, "--compile", compiled]
        folder = setup.before if way == BEFORE else None
        speed = _training(mechanism, 64, options, steps, folder=folder)
    else:
        # One alone has nothing beside it.
        if (there := torch.cuda.device_count()) < (most := max(GPUS.values())):
            raise Unavailable(
                f"needs {most} GPUs, and there {'is' if there == 1 else 'are'} {there}"
            )
        options = ["--resolution", "128", "--patch-size", "2"]
        speed = _training(mechanism, 16 * GPUS[way], options, steps, GPUS[way])
    return row | {"images_per_second": speed}


def _training(
    mechanism: str,
    batch: int,
    options: Sequence[str],
    steps: int,
    processes: int = 1,
    folder: Path | None = None,
) -> float:
    root = folder or Path(__file__).parents[2]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    never = [f"--{what}-every={2 * steps}" for what in ("checkpoint", "sample", "diagnose")]
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, *(launcher if processes > 1 else ()),
            str(root / "recipes" / "train.py"), "--attn", mechanism,
            "--size", "S", "--data", "shapes", "--precision", "bf16", "--steps", str(steps),
            "--batch-size", str(batch), "--out", f"{out}/run", *never, *options,
        ]  # fmt: skip
        _started(command, root)
        lines = Path(out, "run", "log.jsonl").read_text("utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines][steps // 3 :]
    return batch / statistics.median(seconds)


def _started(command: Sequence[str], root: Path) -> str:
    """What a program prints that imports the packages of a tree."""
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment)
    if ended.returncode:
        program = next(Path(word).name for word in command if word.endswith(".py"))
        said = one_line(RuntimeError(ended.stderr[-300:]))
        raise WrongStep(f"{program} ended with {ended.returncode}: {said}")
    return ended.stdout


def _sampling_before(
    mechanism: str, setup: Setup, rounds: int, **changed: Any
) -> dict[str, float]:
    assert setup.before is not None
    asked = {"mechanism": mechanism, "size": "S", "resolution": 256, "images": 16, "steps": 20,
             "rounds": rounds, "device": setup.device} | changed  # fmt: skip
    script = Path(__file__).with_name("before.py")
    command = [sys.executable, str(script), str(setup.before), json.dumps(asked)]
    return json.loads(_started(command, setup.before).splitlines()[-1])


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
    rounds = interleave({way: lambda: draw(recorder)}, stopwatch(setup.device), 5, setup.seconds)
    return images / statistics.median(rounds[way])
