"""Processes of their own: what they inherit, how they end, and what they say of it."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from bench import isolate
from bench.isolate import run_isolated

ROOT = Path(__file__).parents[2]
LIMITS = {"memory": 2**33, "timeout": 60}

# A torch that is built for CUDA, and a process in which asking CUDA itself ends everything.
WATCHED = """
import torch

def watch(module, name):
    def called(*_, **__):
        raise SystemExit(f"{name} was called")
    setattr(module, name, called)

watch(torch._C, "_cuda_getDeviceCount")
for name in ("_lazy_init", "init", "current_device"):
    watch(torch.cuda, name)
torch.cuda._is_compiled = lambda: True
torch.cuda._device_count_nvml = lambda: 1
"""


def importing(modules, path="", **environment):
    code = WATCHED + "".join(f"import {name}\n" for name in modules)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(path), isolate.ASK_NVML: "0"} | environment,
    )  # fmt: skip


def test_what_is_imported_before_a_fork_never_asks_for_cuda(tmp_path):
    done = importing(["bench.worker"])
    assert done.returncode == 0, done.stderr
    # A library that asks when it is imported, and finds a GPU without starting CUDA.
    asking = "import torch\nif torch.cuda.is_available() and torch.cuda.device_count():\n"
    (tmp_path / "triton.py").write_text(asking + "    raise ImportError('no kernels here')\n")
    assert "_cuda_getDeviceCount was called" in importing(["triton"], tmp_path).stderr
    variable = {isolate.ASK_NVML: "1"}
    assert "no kernels here" in importing(["triton"], tmp_path, **variable).stderr
    done = importing(["bench.preload"], tmp_path, **variable)
    assert done.returncode == 0, done.stderr
    assert run_isolated(variable_of, isolate.ASK_NVML, **LIMITS).result == "1"


def variable_of(name):
    return os.environ.get(name)


def process_id():
    return os.getpid()


def last_words(text, status):
    print(text, file=sys.stderr, flush=True)
    os._exit(status)


def unpicklable():
    return lambda: None


def end_of_file():
    raise EOFError("nothing to read")


def test_only_shared_calls_share_a_process():
    own = {run_isolated(process_id, **LIMITS).result for _ in range(2)}
    shared = {run_isolated(process_id, is_shared=True, **LIMITS).result for _ in range(2)}
    assert len(own) == 2 and len(shared) == 1 and not own & shared
    isolate.end_all()


def test_a_process_ends_with_its_reason():
    died = run_isolated(last_words, "Fatal: no such kernel", 3, **LIMITS)
    assert (died.state, died.reason) == (
        "error", "the process died with exit status 3: Fatal: no such kernel",
    )  # fmt: skip
    raised = run_isolated(end_of_file, **LIMITS)
    assert (raised.state, raised.reason) == ("error", "EOFError: nothing to read")
    lost = run_isolated(unpicklable, **LIMITS)
    assert lost.state == "error" and "lambda" in lost.reason
    silent = run_isolated(os._exit, 5, **LIMITS)
    assert silent.reason.endswith("exit status 5: it said nothing")


def test_without_a_gpu_a_cell_says_so():
    if torch.cuda.is_available():
        return
    outcome = run_isolated(process_id, device="cuda", **LIMITS)
    assert outcome.state == "unsupported" and "no CUDA device is visible" in outcome.reason
    isolate.end_all()
