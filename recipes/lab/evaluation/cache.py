"""Tensors that are costly to make and depend on nothing but their key: made once, kept as a file.

A key names data by digest, never machine, path or version of torch, so that a folder of such files
can be carried to another machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def key_digest(**parts: Any) -> str:
    """Sixteen hexadecimal digits that another value of any part would change."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def kept(file: Path, make: Callable[[], Tensors]) -> Tensors:
    """The tensors of a file; the first process that asks makes them, the others wait for it.

    Args:
        file: Where they are kept; a damaged file is made anew.
        make: What gives them.
    """
    found = _read(file)
    if found is not None:
        return found
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.with_name(".lock")):
        found = _read(file)
        if found is None:
            found = {name: z.detach().cpu().contiguous() for name, z in make().items()}
            temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
            save_file(found, temporary, metadata={"sha256": _digest(found)})
            os.replace(temporary, file)
    return found


def _read(file: Path) -> Tensors | None:
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            wanted = (stored.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        print(f"{file} cannot be read and is made anew: {error}", file=sys.stderr)
        return None
    # Evaluators of an earlier version carry no digest.
    if wanted is not None and wanted != _digest(found):
        print(f"{file} is damaged and is made anew", file=sys.stderr)
        return None
    return found


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Exclusive among processes, and released by the system should this one die."""
    with file.open("a") as handle:
        # Without locks each process makes its own, and the files are the same.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
