"""The tests of kernels again, under Triton's interpreter where there is no GPU.

It must be asked for before Triton is first imported. One process serves all files: loading the
libraries and the first graph of torch.compile take as long as many tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attnzoo.interpreted import CAN_RUN, HAS_TRITON

FOLDER = Path(__file__).parent


@pytest.mark.skipif(not HAS_TRITON or CAN_RUN, reason="runs in the files themselves, or nowhere")
def test_kernels_in_a_process_of_their_own():
    # So that "auto" takes the kernels as it does on a GPU.
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "ATTNZOO_TRITON": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    files = [*sorted(FOLDER.glob("test_triton*.py")), FOLDER / "test_replays.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=native"]
    result = subprocess.run([*command, *files], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
