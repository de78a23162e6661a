"""The one place that decides what runs: nothing else asks for devices, types or Triton.

Variables of the environment: ATTNZOO_TRITON=0 and ATTNZOO_NATIVE=0 keep "auto" from the kernels
in Triton and in C.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from attnzoo.errors import InvalidValue, Unavailable
from attnzoo.ops.precision import operand_dtype

Impl = Literal["auto", "reference", "torch", "native", "triton", "fla", "flash", "xformers"]
Declaration = TypeVar("Declaration", bound=Callable[..., Any])

# Implementations of each operator. "auto" takes the first that fits, and none behind "torch".
TABLE: dict[str, tuple[str, ...]] = {
    "power_map": ("native", "triton", "torch", "reference"),
    "gated": ("torch", "reference"),
    "routed_scalar": ("torch", "reference"),
    "routed_linear": ("triton", "torch", "reference"),
    "token_difference": ("triton", "torch", "reference"),
    "linear_attention": ("torch", "reference"),
    "depthwise_conv": ("triton", "torch", "reference"),
    "gated_linear_attention": ("torch", "reference", "fla"),
    "softmax_attention": ("torch", "reference", "flash", "xformers"),
}
# What ``impl`` was called before; goes once configurations translate these themselves.
_RENAMED = {"naive": "reference", "sdpa": "torch", "safe": "torch"}
_LAZY = ("triton", "fla", "flash", "xformers")  # need packages that may be missing
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # float16 overflows where float32 does not


def operator(declaration: Declaration) -> Declaration:
    """Makes a declaration call the function of its name in ``reference.py``, ``torch.py``, ...

    ``choose`` looks at the first operand. Where the module that declares has a function
    ``unserved`` of the operands, it says what the kernels do not serve of them.
    """
    name, package = declaration.__name__, declaration.__module__
    loaded = {impl: _load(package, impl, name) for impl in TABLE[name] if impl not in _LAZY}

    @functools.wraps(declaration)
    def run(*operands: Any, impl: str = "auto", **options: Any) -> Any:
        limits = declaration.__globals__.get("unserved")
        unserved = None if limits is None else functools.partial(limits, *operands)
        chosen = choose(name, impl, operands[0], None, unserved)
        implementation = loaded.get(chosen) or _load(package, chosen, name)
        return implementation(*operands, **options)

    return cast(Declaration, run)


def choose(
    name: str,
    impl: str,
    x: Any,
    dtype: torch.dtype | None = None,
    unserved: Callable[[], str | None] | None = None,
) -> str:
    """The implementation of an operator for a tensor.

    Args:
        name: One of ``TABLE``.
        impl: What was asked for; "auto" asks for whatever fits best.
        x: The tensor.
        dtype: What it will be cast to; by default what autocast makes of it.
        unserved: Says what the kernels do not serve of the operands or options, or None.

    Raises:
        InvalidValue: There is no such implementation.
        Unavailable: It cannot run here; the message says why, for each that cannot.
    """
    impl, offered = _RENAMED.get(impl, impl), TABLE[name]
    if impl == "auto":
        for candidate in offered:
            if candidate == "torch" or not _why_not(candidate, x, dtype, unserved, False):
                return candidate
    if impl not in offered:
        raise InvalidValue(f"impl={impl!r} of {name} is not one of {('auto', *offered)}")
    if reason := _why_not(impl, x, dtype, unserved, True):
        others = [f"{o!r} {_why_not(o, x, dtype, unserved, True) or 'fits'}" for o in offered]
        raise Unavailable(
            f"impl={impl!r} {reason}; leave impl='auto', or choose: {', '.join(others)}"
        )
    return impl


def _why_not(
    impl: str,
    x: Tensor,
    dtype: torch.dtype | None,
    unserved: Callable[[], str | None] | None,
    is_asked: bool,
) -> str | None:
    """Why an implementation does not fit, or, unless it was asked for, should not be taken.

    Libraries say themselves, when they are called, what they lack.
    """
    if impl == "native":
        if x.device.type != "cpu":
            return f"runs on a CPU, not on {x.device.type!r}"
        if x.dtype not in _KERNEL_DTYPES:
            return f"takes float32 or bfloat16, not {x.dtype}"
        return None if _native_works() else "has no C compiler, or ATTNZOO_NATIVE=0 is set"
    if impl != "triton":
        return None
    if not x.is_cuda and not (is_asked and is_interpreted()):
        if is_asked and not _is_installed():
            return _MISSING
        return f"runs on a GPU, not on {x.device.type!r}"
    if unserved is not None and (limit := unserved()):
        return f"does not serve {limit}"
    dtype = dtype or operand_dtype(x)
    if dtype not in _KERNEL_DTYPES and not (is_asked and dtype == torch.float16):
        return f"takes float32 or bfloat16, not {dtype}"
    if is_asked:
        return None if _is_installed() else _MISSING
    return None if _triton_works() else "cannot run here"


_MISSING = "needs Triton, which is not installed (pip install 'attnzoo[triton]')"


def can_look(x: Tensor) -> bool:
    """Whether looking at numbers costs no waiting for a device and breaks no graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def is_interpreted() -> bool:
    """Whether Triton's kernels run in Python, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # an import that was blocked on purpose
        return False


def require_triton() -> None:
    """Raises Unavailable, naming the extra, where Triton cannot be imported."""
    if not _is_installed():
        raise Unavailable(f"impl='triton' {_MISSING}; or leave impl='auto'")


@functools.cache
def _try_triton() -> bool:
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


@functools.cache
def _try_native() -> bool:
    if os.environ.get("ATTNZOO_NATIVE") == "0":
        return False
    from attnzoo.ops.power_map.build import library

    return library() is not None


def _triton_works() -> bool:
    return _try_triton()


def _native_works() -> bool:
    return _try_native()


def _load(package: str, impl: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"{package}.{impl}"), name)


# As torch.compiler.assume_constant_result does, but that imports the compiler and so Triton, and
# with a broken Triton nothing of the package would be importable.
for _constant in (_triton_works, _native_works, _load, is_interpreted, _is_installed):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
