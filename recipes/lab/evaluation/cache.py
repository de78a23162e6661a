"""Tensors that are costly to make and depend on their key alone: made once, cached in a file.

A key names data by digest, never machine, path or version of torch, so that a folder of such files
can be carried to another machine.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from recipes.lab.console import printable
from recipes.lab.files import locked, save_tensors, whole_file

Tensors = dict[str, Tensor]


def key_digest(**parts: Any) -> str:
    """Sixteen hexadecimal digits that another value of any part would change."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def cached(file: Path, make: Callable[[], Tensors]) -> Tensors:
    """The tensors of a file; the first process that asks makes them, the others wait for it.

    Args:
        file: Where they are cached; a damaged file is made anew.
        make: What gives them.

    Raises:
        CannotWrite: They have to be made, and the file cannot be written.
    """
    found = _read(file)
    if found is not None:
        return found
    with locked(file.with_name(".lock"), wait=True):
        found = _read(file)
        if found is None:
            found = {name: z.detach().cpu().contiguous() for name, z in make().items()}
            with whole_file(file) as temporary:
                save_tensors(found, temporary, {"sha256": _digest(found)})
    return found


def _read(file: Path) -> Tensors | None:
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            wanted = (stored.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        line = f"{file} cannot be read and is made anew: {error}"
        print(printable(line), file=sys.stderr)
        return None
    # Evaluators of an earlier version carry no digest.
    if wanted is not None and wanted != _digest(found):
        print(printable(f"{file} is damaged and is made anew"), file=sys.stderr)
        return None
    return found


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
