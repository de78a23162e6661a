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

WATCHED = """
import torch

def watch(name):
    def called(*_, **__):
        raise SystemExit(f"torch.cuda.{name} was called")
    setattr(torch.cuda, name, called)

for name in ("is_available", "device_count", "_lazy_init", "init", "current_device"):
    watch(name)
"""


def importing(modules, path=""):
    code = WATCHED + "".join(f"import {name}\n" for name in modules)
    environment = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=environment,
    )  # fmt: skip


def test_what_is_imported_before_a_fork_never_asks_for_cuda(tmp_path):
    done = importing(["bench.worker"])
    assert done.returncode == 0, done.stderr
    # A library that asks when it is imported.
    asking = "import torch\nif torch.cuda.is_available() and torch.cuda.device_count():\n"
    (tmp_path / "triton.py").write_text(asking + "    raise ImportError('no kernels here')\n")
    assert "is_available was called" in importing(["triton"], tmp_path).stderr
    done = importing(["bench.preload"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "is_available was called" in importing(["bench.preload", "triton"], tmp_path).stderr


def test_the_server_imports_by_whether_there_is_a_gpu(monkeypatch):
    for is_there, module in ((False, "bench.worker"), (True, "bench.preload")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=is_there: answer)
        assert isolate.preloaded() == [module]


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
