"""What a run costs: multiply-accumulates by count, seconds by a short measurement."""

from __future__ import annotations

import math
import statistics
import timeit
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from attnzoo.counting import Macs, count_macs
from backbones import DiT
from recipes.lab.console import one_line, progress_bar
from recipes.lab.training.build import build_model
from recipes.lab.training.held_out import IMAGES, TIMES, can_hold_out
from recipes.lab.training.settings import Settings
from recipes.studies.comparison.plan import facts_of
from recipes.studies.comparison.planned import PlannedRun

REPEATS = 5


def counted(settings: Settings, dataset: Any) -> tuple[DiT, Macs]:
    """The model of a run, and its multiply-accumulates; see ``cost_of``.

    Raises:
        attnzoo.InvalidValue: A mechanism states another cost than it has.
    """
    model = build_model(settings, dataset)
    return model, count_macs(model, resolution=dataset.resolution * dataset.latent_factor)


def cost_of(settings: Settings, dataset: Any, repeats: int = REPEATS) -> dict[str, Any]:
    """Cost of one image in the model that the settings describe.

    Args:
        settings: Of a run.
        dataset: What it trains on, or what is known of it (``plan.DataFacts``).
        repeats: Measurements of which the median is taken, after one that is not.

    Returns:
        "macs" of a forward, "training_macs" of forward and backward, "parameters", "depth", and
        the seconds per image "forward_seconds" and "training_seconds" of a micro-step in the
        run's precision, not compiled, on the device that would train it, whatever else that
        device is doing; None where its memory does not suffice.
    """
    model, macs = counted(settings, dataset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # pyright: ignore[reportArgumentType]
    batch = settings.batch_size // settings.accumulate
    images = torch.randn(batch, dataset.channels, dataset.resolution, dataset.resolution)
    inputs = {
        "hidden_states": images.to(device),
        "timestep": torch.full((batch,), 500, device=device),
        "class_labels": (torch.arange(batch) % dataset.num_classes).to(device),
        "return_dict": False,
    }

    def predicted() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision != "fp32"):
            return model(**inputs)[0]

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            predicted()

    def training_step() -> None:
        model.train()
        predicted().float().square().mean().backward()

    def seconds(work: Callable[[], None]) -> float | None:
        try:
            return _median_seconds(work, device, repeats) / batch
        except torch.OutOfMemoryError:  # where compiled blocks had room, say
            return None

    return {
        "macs": macs.total,
        "training_macs": macs.training_step,
        "parameters": macs.parameters,
        "depth": len(model.blocks),
        "forward_seconds": seconds(forward),
        "training_seconds": seconds(training_step),
    }


def _median_seconds(work: Callable[[], None], device: torch.device, repeats: int) -> float:
    def finished() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return statistics.median(timeit.repeat(finished, number=1, repeat=repeats + 1)[1:])


def _held_out_forwards(settings: Settings) -> int:
    """Images times times of all held-out losses, on the way (of both weights) and at the end."""
    if not can_hold_out(settings):
        return 0
    every = settings.held_out_every
    points = 0 if every is None else settings.steps // every + bool(settings.steps % every)
    return TIMES * (2 * points * settings.held_out_images + IMAGES)


def dry_run(planned: Sequence[PlannedRun], jobs: int) -> str:
    """The plan as a table, with multiply-accumulates and seconds measured just now.

    The seconds count training, held-out losses and sampling of one run, not the evaluator, which
    is trained once per data set and resolution.
    """
    costs: dict[tuple[Any, ...], dict[str, Any]] = {}
    rows = []
    for one in progress_bar(planned, desc="measuring", unit="run", leave=False):
        settings = one.settings
        # Seed and level cost nothing.
        key = (one.label, settings.protocol, settings.data, settings.resolution)
        if key not in costs:
            costs[key] = cost_of(settings, facts_of(settings), repeats=1)
        cost = costs[key]
        trained = settings.steps * settings.batch_size
        forwards = one.samples * one.sampling_steps * sum(1 if c == 1 else 2 for c in one.cfgs)
        forwards += _held_out_forwards(settings)
        training, forward = cost["training_seconds"], cost["forward_seconds"]
        seconds = (training or math.nan) * trained + (forward or math.nan) * forwards
        rows.append(
            {
                "data": one_line(f"{settings.data}/{settings.level}"),
                "px": facts_of(settings).image_resolution,
                "protocol": settings.protocol,
                "variant": one_line(one.label),
                "depth": cost["depth"],
                "parameters": cost["parameters"],
                "MMACs": cost["macs"] / 1e6,
                "TMACs of the run": (cost["training_macs"] * trained + cost["macs"] * forwards)
                / 1e12,
                "minutes": seconds / 60,
            }
        )
    frame = pd.DataFrame(rows)
    grouped = frame.groupby(["data", "px", "protocol", "variant"], sort=False, dropna=False)
    shown = grouped.first()
    shown.insert(0, "seeds", grouped.size())
    total = frame.minutes.sum()
    return (
        f"{shown.reset_index().to_string(index=False, float_format=lambda v: f'{v:.3g}')}\n"
        f"{len(planned)} runs, {frame['TMACs of the run'].sum():.3g} TMACs, about "
        f"{total:.0f} minutes one after the other as this machine is loaded now"
        + (f", {total / jobs:.0f} with --jobs {jobs} if nothing is shared" if jobs > 1 else "")
    )
