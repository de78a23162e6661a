"""What a run costs: multiply-accumulates by count, seconds by a short measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from attnzoo.counting import count_macs
from recipes.lab.training.build import build_model
from recipes.lab.training.settings import Settings

REPEATS = 5


def cost_of(settings: Settings, dataset: Any, repeats: int = REPEATS) -> dict[str, Any]:
    """Cost of one image in the model that the settings describe.

    Args:
        settings: Of a run.
        dataset: What it trains on, or what is known of it (``grid.DataFacts``).
        repeats: Measurements of which the median is taken, after one that is not.

    Returns:
        "macs" of a forward, "training_macs" of forward and backward, "parameters", "depth", and
        the seconds per image "forward_seconds" and "training_seconds" at the run's batch size,
        on the device that would train it, whatever else that device is doing.
    """
    model = build_model(settings, dataset)
    macs = count_macs(model, resolution=dataset.resolution * dataset.latent_factor)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    batch = settings.batch_size
    images = torch.randn(batch, dataset.channels, dataset.resolution, dataset.resolution)
    inputs = {
        "hidden_states": images.to(device),
        "timestep": torch.full((batch,), 500, device=device),
        "class_labels": (torch.arange(batch) % dataset.num_classes).to(device),
        "return_dict": False,
    }

    def forward() -> None:
        with torch.no_grad():
            model.eval()(**inputs)

    def training_step() -> None:
        model.train()(**inputs)[0].square().mean().backward()

    return {
        "macs": macs.total,
        "training_macs": macs.training_step,
        "parameters": macs.parameters,
        "depth": model.config.depth,
        "forward_seconds": _median_seconds(forward, device, repeats) / batch,
        "training_seconds": _median_seconds(training_step, device, repeats) / batch,
    }


def _median_seconds(work: Callable[[], None], device: str, repeats: int) -> float:
    found = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])
