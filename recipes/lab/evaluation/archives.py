"""Arrays in .npz files, which may come from anywhere: read only if they are what they say."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.lab.console import UserError
from recipes.lab.files import opened_whole

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npz(file: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """The arrays of these names that an .npz holds.

    Headers are looked at before anything is allocated, and no object is ever unpickled.

    Args:
        file: Of ``numpy.savez``.
        names: Of the arrays; those that are not there are left out.

    Raises:
        UserError: The file cannot be read, or one of these arrays is not what its header says.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = set(archive.namelist())
            return {n: _array(archive, f"{n}.npy") for n in names if f"{n}.npy" in members}
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, MemoryError, NotImplementedError, RuntimeError, zlib.error,
            zipfile.BadZipFile) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file} cannot be read as an .npz: {reason}") from error


def _array(archive: zipfile.ZipFile, member: str) -> NDArray[Any]:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"{member} is of version {version}")
        shape, _, dtype = _HEADERS[version](stream)
        size = dtype.itemsize * math.prod(shape)
        held = archive.getinfo(member).file_size - stream.tell()
        if min(shape, default=0) < 0 or size != held:
            raise ValueError(f"{member} should hold {size} bytes by its header, and has {held}")
        if size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise ValueError(f"{member} takes {size / 1e9:.0f} GB, more than this machine has")
    with archive.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def save_npz(file: Path, pixels: Tensor, **arrays: Any) -> None:
    """Writes images under ADM's key ``arr_0``, (n, h, w, c) uint8; the file appears whole.

    Raises:
        CannotWrite: The system refuses.
    """
    others: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    with opened_whole(file) as handle:
        np.savez_compressed(handle, arr_0=pixels.numpy(), **others)


def load_npz(file: Path) -> tuple[Tensor | None, Tensor | None]:
    """Images (n, h, w, c) uint8 and labels of an ADM-style file, None for what it lacks.

    Raises:
        UserError: The file cannot be read, or its images or labels are not of that kind.
    """
    stored = read_npz(file, ("arr_0", "labels", "arr_1"))
    pixels = stored.get("arr_0")
    labels = stored.get("labels", stored.get("arr_1"))  # where ADM's sampler puts them
    if pixels is not None and (pixels.ndim != 4 or pixels.dtype != np.uint8):
        raise UserError(
            f"{file} holds arr_0 of shape {pixels.shape} and type {pixels.dtype}; "
            f"it must be (n, height, width, channels) uint8"
        )
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise UserError(
            f"{file} holds labels of shape {labels.shape} and type {labels.dtype}; they must be "
            f"(n,) integers"
        )
    return (
        None if pixels is None else torch.from_numpy(np.ascontiguousarray(pixels)),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
    )
