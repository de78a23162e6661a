"""The battery that takes minutes: make test-slow."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recipes.lab.console import INTERRUPTED, USER_ERROR
from recipes.lab.training.checkpoint import Run
from tests.recipes import reliability

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPT = [str(ROOT / "recipes" / "train.py"), "--attn", "sana", "--batch-size", "4"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the children have: two threads on two busy cores make a run ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    process = start(tmp_path / "run", *reliability.TORCHRUN)
    wait_for_log(tmp_path / "run", process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode  # torchrun flattens 75
    run = Run(tmp_path / "run")
    assert run.newest_checkpoint(warn=pytest.fail)[0] == run.read_log()[-1]["step"], printed
    assert '"preempted"' in run.status_file.read_text()


def test_workers_that_outlive_torchrun_keep_the_folder(tmp_path):
    launcher = start(tmp_path / "run", *reliability.TORCHRUN)
    wait_for_log(tmp_path / "run", launcher)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    workers = [int(child) for child in children]
    assert len(workers) == 2
    launcher.kill()
    try:
        launcher.wait()
        second = start(tmp_path / "run", "-u")
        printed, _ = second.communicate(timeout=300)
        assert second.returncode == USER_ERROR
        assert f"being written to by process {workers[0]} on" in printed.decode()
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        time.sleep(0.1)
    assert '"preempted"' in Run(tmp_path / "run").status_file.read_text()


def test_accelerate_launch_runs_the_same_script(tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command = [sys.executable, *launcher, *SCRIPT, "--steps", "2", "--out", str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    assert len(Run(tmp_path / "run").read_log()) == 2
