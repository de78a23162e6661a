"""The battery that takes minutes: make test-slow."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.checkpoint import Run
from recipes.console import INTERRUPTED
from tests.recipes import reliability

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPT = [str(ROOT / "recipes" / "train.py"), "--attn", "sana", "--batch-size", "4"]


def test_crashes_at_all_acts(tmp_path):
    result = reliability.crashes(tmp_path)
    assert result["failures"] == [] and result["survived"] == result["tried"] > 50


def test_twenty_kills(tmp_path):
    result = reliability.kills(tmp_path, 20)
    assert result["equal"] == result["runs"] and result["unloadable"] == 0


def test_memory_does_not_grow():
    assert reliability.memory() < 1


def test_compiling_changes_little():
    assert reliability.compiled() < 1e-3


def start(out, *launcher):
    return subprocess.Popen(
        [sys.executable, *launcher, *SCRIPT, "--steps", "100000", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_log(out, process):
    while not (out / "log.jsonl").exists():
        assert process.poll() is None, process.stdout.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_to_the_command_line(number, tmp_path):
    process = start(tmp_path / "run")
    wait_for_log(tmp_path / "run", process)
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == INTERRUPTED
    run = Run(tmp_path / "run")
    assert run.newest_checkpoint(warn=pytest.fail)[0] == run.read_log()[-1]["step"]


def test_a_signal_to_torchrun_saves_in_both_and_leaves_no_orphan(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start(tmp_path / "run", *launcher)
    wait_for_log(tmp_path / "run", process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode  # torchrun flattens 75
    run = Run(tmp_path / "run")
    assert run.newest_checkpoint(warn=pytest.fail)[0] == run.read_log()[-1]["step"], printed
    assert '"preempted"' in run.status_file.read_text()


def test_accelerate_launch_runs_the_same_script(tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command = [sys.executable, *launcher, *SCRIPT, "--steps", "2", "--out", str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    assert len(Run(tmp_path / "run").read_log()) == 2
