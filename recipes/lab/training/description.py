"""What a run's config.json says beside its settings: its data, its code and where it computed."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import attnzoo
from attnzoo.contract import Attention
from attnzoo.ops import native_build as build
from recipes.lab.data.latents import LatentDataset, differing_facts
from recipes.lab.imports import origins
from recipes.lab.training.trainer import Trainer


def data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each difference between what a run's data was and what it is."""
    pairs = {name: (before.get(name), now[name]) for name in ("resolution", "channels")}
    pairs["class_names"] = before.get("class_names"), now["class_names"]
    lines = [
        f"{name}: {_short(old)} -> {_short(new)}"
        for name, (old, new) in pairs.items()
        if name in before and old != new
    ]
    if "latent" in before and (before["latent"] is None) != (now["latent"] is None):
        lines.append("latents of a VAE -> pixels" if before["latent"] else "pixels -> latents")
    elif before.get("latent"):
        differing = differing_facts(before["latent"], now["latent"])
        lines += [f"the VAE: {name} differs" for name in differing]
    old, new = before.get("identity"), now["identity"]
    if isinstance(old, dict):
        keys = [key for key in {**old, **new} if key != "class_names"]
        lines += [
            f"{'contents, SHA-256' if key == 'sha256' else key}: {_short(old.get(key))} -> "
            f"{_short(new.get(key))}"
            for key in keys
            if old.get(key) != new.get(key)
        ]
    return lines


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {before[name]} -> {value}"
        for name, value in now.items()
        if before.get(name) is not None and value is not None and before[name] != value
    ]


def describe(trainer: Trainer) -> dict[str, Any]:
    dataset = trainer.dataset
    names = {layer.name for layer in trainer.model.modules() if isinstance(layer, Attention)}
    return {
        "settings": dataclasses.asdict(trainer.settings),
        "data": {
            "resolution": dataset.resolution,
            "channels": dataset.channels,
            "class_names": _readable(dataset.class_names),
            # None, or the VAE whose latents the model sees.
            "latent": dataset.facts if isinstance(dataset, LatentDataset) else None,
            # None, or the folder of images that was encoded.
            "source": getattr(dataset, "source", None),
            "identity": {**dataset.identity(), "class_names": _readable(dataset.class_names)},
        },
        "imports": origins(sorted(names)),
        "environment": _environment(trainer),
        "versions": {
            "attnzoo": attnzoo.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _readable(names: Sequence[str]) -> list[str]:
    # Under an ASCII locale the names of folders come in as bytes in disguise.
    return [
        name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
        for name in names
    ]


def _environment(trainer: Trainer) -> dict[str, Any]:
    """What decides the bits of a run beside its settings; None where it does not matter."""
    device = trainer.accelerator.device
    is_gpu = device.type == "cuda"
    # Asked only by a mechanism that has a power map, when it has run once.
    was_asked = bool(build.library.cache_info().currsize)
    variables = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith("ATTNZOO_")
    }
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if is_gpu else device.type,
        "processor": platform.machine() if is_gpu else torch.backends.cpu.get_cpu_capability(),
        "processes": trainer.accelerator.num_processes,
        "threads": None if is_gpu else torch.get_num_threads(),
        "float32 products": torch.get_float32_matmul_precision(),
        "compiled power map": build.library() is not None if was_asked and not is_gpu else None,
        "variables": variables,
    }
