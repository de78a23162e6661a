"""Where tests of kernels run: on a GPU, or in a process in which Triton interprets them."""

import importlib.util
import os
import subprocess
import sys

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # a start decides it
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
CAN_RUN = HAS_TRITON and (DEVICE == "cuda" or IS_INTERPRETED)


def run_interpreted(file):
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "ATTNZOO_TRITON": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
