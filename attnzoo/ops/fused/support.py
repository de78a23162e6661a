"""Where the kernels run, and how they become operators of PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Of one router; with more, its matrix leaves no shared memory for the tokens.
MOST_CHOICES = 64


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # an import that was blocked on purpose
        return False


def require_triton() -> None:
    """Raises RuntimeError, naming the extra, where Triton cannot be imported."""
    if not _is_installed():
        raise RuntimeError(
            "impl='triton' needs Triton, which is not installed; pip install 'attnzoo[triton]', "
            "or leave impl='auto'"
        )


@functools.cache
def _try_kernels() -> bool:
    is_old = torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0)
    if os.environ.get("ATTNZOO_TRITON") == "0" or is_old or not _is_installed():
        return False
    try:  # being installed is not enough: Triton needs a C compiler and a driver that it knows
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"Triton is installed but cannot run ({reason}), so that torch's operators take over; "
            "set ATTNZOO_TRITON=0 to be spared this warning",
            stacklevel=2,
        )
        return False
    return True


def _kernels_work() -> bool:
    return _try_kernels()


# As torch.compiler.assume_constant_result does, but that imports the compiler and so Triton, and
# with a broken Triton nothing of the package would be importable.
_kernels_work._dynamo_marked_constant = True  # type: ignore[attr-defined]


def runs_on(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the kernels take this tensor unasked: on a GPU, and of a type that they know.

    Args:
        x: The tensor.
        dtype: What it will be cast to; by default it stays what it is.
    """
    known = (dtype or x.dtype) in (torch.float32, torch.bfloat16)
    return x.is_cuda and known and _kernels_work()


def kernels() -> Any:
    """The package of the kernels, which imports Triton; raises as ``require_triton`` does."""
    require_triton()
    from attnzoo.ops import kernels

    return kernels


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; this makes it that of the first tensor."""

    @functools.wraps(function)
    def guarded(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *args, **kwargs)

    return guarded


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function the custom operator ``attnzoo::NAME``."""

    def register(function: Callable[..., Any]) -> Any:
        guarded = on_its_device(function)
        return torch.library.custom_op(f"attnzoo::{name}", guarded, mutates_args=())

    return register
