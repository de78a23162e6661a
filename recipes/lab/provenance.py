"""Where a number comes from: versions, commit, the code that decides it."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import attnzoo

DECIDING = (
    "evaluation/metrics",
    "evaluation/features",
    "evaluation/real",
    "evaluation/reference",
    "evaluation/scores",
    "evaluation/shape_classifier",
    "evaluation/shards",
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
