"""Runs a file of tests in a process in which Triton interprets kernels, which a start decides."""

import os
import subprocess
import sys


def run_interpreted(file):
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "ATTNZOO_TRITON": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
