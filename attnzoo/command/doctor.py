"""``attnzoo doctor``: what runs on this machine, and why the rest does not.

Everything is called once on a few tokens: a package that imports may still have no kernel for
this device.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import typing
import warnings
from typing import Any

import torch

import attnzoo
from attnzoo.command import Parser
from attnzoo.command.units import memory
from attnzoo.ops import softmax
from attnzoo.ops.gated_scan import fla
from attnzoo.ops.optional import failure, load
from attnzoo.ops.selective_scan import mamba

# What each way to compute is for, by a mechanism that takes it.
LIBRARIES = {
    "flash": ("softmax", "flash-attn 2 or 4, softmax of long rows in half precision"),
    "xformers": ("softmax", "memory-efficient softmax attention"),
    "fla": ("gated", "flash-linear-attention, gated linear attention and delta rules"),
    "mamba": ("dis", "mamba-ssm, the scans of dis, zigma and diffussm"),
    "natten": ("local", "NATTEN, attention to neighborhoods"),
    "flex": ("local", "PyTorch's FlexAttention, the same, compiled by Triton"),
    "triton": ("dydila", "our kernels for GPUs, without which PyTorch's operators run"),
}
VARIABLES = ("ATTNZOO_TRITON", "ATTNZOO_NATIVE", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "CC")


def main(arguments: list[str]) -> None:
    """Prints the report."""
    parser = Parser("attnzoo doctor", description=__doc__)
    parser.parse_args(arguments)
    device, dtype = here()
    print(f"attnzoo {attnzoo.__version__} on Python {platform.python_version()}, "
          f"{platform.system()} {platform.machine()}")  # fmt: skip
    for what, said in build().items():
        print(f"  {what:9} {said}")
    print(f"\nevery implementation, called once on {device} with {dtype}:")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _explain("torch", "PyTorch's own operators", why_not("softmax", "torch"))
        _explain("native", "our kernels in C for CPUs, powers and few tokens", _why_no_native())
        for impl, (mechanism, what) in LIBRARIES.items():
            _explain(impl, what, why_not(mechanism, impl))
    print("\nfor some commands only:")
    for package, what in (
        ("diffusers", "the backbone, attnzoo count"),
        ("fvcore", "attnzoo count --check"),
    ):
        _explain(package, what, failure(lambda package=package: load(package)))
    print(f"  versions: {', '.join(version_of(name) for name in ('einops', 'triton'))}")
    if given := [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]:
        print(f"  environment: {' '.join(given)}")


def build() -> dict[str, str]:
    """How torch was built, and the devices that it sees."""
    toolkit = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
    if torch.version.hip:
        toolkit = f"for ROCm {torch.version.hip}"
    found = {"torch": f"{torch.__version__}, built {toolkit}, {torch.get_num_threads()} threads"}
    if not torch.cuda.is_available():
        why = "torch sees none; check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
        if torch.version.cuda is None and torch.version.hip is None:
            why = "none for this build of torch; for NVIDIA's see https://pytorch.org"
        return found | {"GPU": why}
    for index in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(index)
        capability = f"compute capability {seen.major}.{seen.minor}"
        found[f"GPU {index}"] = f"{seen.name}, {memory(seen.total_memory)}, {capability}"
    return found


def here() -> tuple[str, torch.dtype]:
    """The device to try on, and the type of its models."""
    is_gpu = torch.cuda.is_available()
    return ("cuda", torch.bfloat16) if is_gpu else ("cpu", torch.float32)


def why_not(mechanism: str, impl: str | None) -> str | None:
    """Calls one layer once; None if an implementation of it works here, or else the reason.

    Args:
        mechanism: A registered one.
        impl: Of its option of that name; None for a mechanism that has none.
    """
    device, dtype = here()
    options: dict[str, Any] = {} if impl is None else {"impl": impl}

    def call() -> None:
        layer = attnzoo.build_attention(mechanism, 64, **options).to(device, dtype).eval()
        with torch.no_grad():
            layer(torch.zeros(1, 64, 64, device=device, dtype=dtype), (8, 8))

    return failure(call)


def backends() -> None:
    """Prints, in short, which implementations run here, and what the others lack."""
    device, dtype = here()
    print(f"softmax backends on {device} with {dtype}:")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for impl in typing.get_args(softmax.SoftmaxImpl):
            _report(impl, softmax.why_unavailable(impl, device, dtype))
        print("other backends:")
        _report("fla", fla.why_unavailable(device))
        _report("mamba", mamba.why_unavailable(device))
        _report("triton", _why_no_triton(device))


def version_of(package: str) -> str:
    """A package with its version, or that there is none."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"
    except Exception:  # an installation may be broken in any way
        return f"{package} of unknown version"


def _report(impl: str, reason: str | None) -> None:
    print(f"  {impl:9} {'runs' if reason is None else reason}")


def in_short(reason: str | None) -> str:
    """Whether something runs, or else why not, without what else could be chosen."""
    if reason is None:
        return "runs"
    said = re.split(r"[;,] (?:or )?(?:leave|choose) impl=", reason)[0]
    return said + ")" * (said.count("(") - said.count(")"))


def _explain(impl: str, what: str, reason: str | None) -> None:
    print(f"  {impl:9}  {what}: {'runs' if reason is None else 'NO'}")
    if reason is not None:
        print(f"  {'':9}  {in_short(reason)}")


def _why_no_triton(device: str) -> str | None:
    try:
        load("triton")
    except ImportError as error:
        return f"{error} (pip install 'attnzoo[triton]')"
    return None if device == "cuda" else "needs a GPU"


def _why_no_native() -> str | None:
    if os.environ.get("ATTNZOO_NATIVE") == "0":
        return "is switched off by ATTNZOO_NATIVE=0"
    from attnzoo.ops.native_build import library

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if library() is not None:
            return None
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler[0]) is None:
        return f"needs a C compiler, and there is no {compiler[0]!r}; install gcc or clang"
    return " ".join(str(said[0].message).split()) if said else "could not be built"
