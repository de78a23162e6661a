"""Where a number comes from: versions, commit, the code that decides it; and whole files."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import attnzoo

DECIDING = (
    "quality/metrics",
    "quality/features",
    "quality/reference",
    "quality/scores",
    "quality/shape_judge",
    "shards",
)


def provenance() -> dict[str, Any]:
    """Versions and the commit of this code; "unknown" where git cannot say."""
    packages = ("torch", "diffusers", "accelerate", "numpy", "scipy")
    return {
        "versions": {"python": platform.python_version(), "attnzoo": attnzoo.__version__}
        | {name: metadata.version(name) for name in packages},
        "commit": _commit(),
    }


@functools.cache
def _commit() -> str:
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"],
            cwd=here, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


@functools.cache
def code_digest(*modules: str) -> str:
    """SHA-256 of the code of these modules of recipes, or of all that decide a number."""
    digest = hashlib.sha256()
    for name in modules or DECIDING:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()


def write_json(file: Path, content: Any) -> None:
    """Writes a file that appears whole or not at all; infinities and NaNs are refused."""
    text = json.dumps(content, indent=2, allow_nan=False, default=_plain) + "\n"
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    temporary.write_text(text)
    os.replace(temporary, file)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
