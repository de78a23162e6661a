"""Samples of any number: exact counts, any number of processes, kills and strangers' files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.lab.evaluation import shards
from recipes.lab.evaluation.archives import load_npz
from recipes.lab.evaluation.shards import Plan, generate, read_shards, sample_labels, shard_folder
from tests.recipes.test_checkpoint import Canary

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(trained, tmp_path):
    """The trained run, with a place of its own for samples."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(trained.config_file.read_text())
    (tmp_path / "run" / "checkpoints").symlink_to(trained.checkpoints.resolve())
    return type(trained)(tmp_path / "run")


def images_of(run, plan, world=1):
    for rank in range(world):
        folder = generate(run, plan, rank=rank, world=world)
    found = read_shards(folder, plan)
    for file in folder.glob("*.npz"):
        file.unlink()
    return found


@pytest.mark.parametrize("samples", [0, 1, 7, 50])
def test_exactly_n_images_whatever_processes_and_batches(samples, run):
    plan = Plan(samples=samples, steps=2, shard_size=4, batch_size=4)
    alone = images_of(run, plan)
    assert alone.pixels.shape == (samples, 8, 8, 1) and alone.finite.all()
    assert torch.equal(alone.labels, sample_labels(plan, 10))
    assert len(torch.unique(alone.pixels.flatten(1), dim=0)) == samples  # no image twice
    shared = images_of(run, plan, world=2)
    assert torch.equal(alone.pixels, shared.pixels) and torch.equal(alone.labels, shared.labels)
    single = images_of(run, Plan(samples=samples, steps=2, shard_size=4, batch_size=1))
    assert torch.equal(alone.labels, single.labels)
    assert ((alone.pixels.int() - single.pixels.int()).abs() <= 1).all()


def test_an_interruption_at_a_third_changes_nothing(run, monkeypatch):
    plan = Plan(samples=50, steps=2, shard_size=4)
    expected = images_of(run, plan)
    own, made = shards.save_npz, []

    def save(file, pixels, **arrays):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(file)
        own(file, pixels, **arrays)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "save_npz", save)
        generate(run, plan)
    before = {file: file.stat().st_mtime_ns for file in made}
    # Other processes go on where one stopped.
    for rank in (0, 1):
        folder = generate(run, plan, rank=rank, world=2)
    assert {file: file.stat().st_mtime_ns for file in made} == before
    assert torch.equal(read_shards(folder, plan).pixels, expected.pixels)


PROCESS = """
import json, sys, torch
torch.set_num_threads(1)
from recipes.lab.training.checkpoint import Run
from recipes.lab.evaluation.shards import Plan, generate
generate(Run(sys.argv[1]), Plan(**json.loads(sys.argv[2])), rank=int(sys.argv[3]), world=2)
"""


@pytest.mark.slow
def test_two_processes_killed_at_a_third_go_on(run):
    options = {"samples": 50, "steps": 60, "shard_size": 2, "batch_size": 2}
    plan = Plan(**options)

    def start():
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", PROCESS, str(run.folder), json.dumps(options)]
        return [subprocess.Popen([*command, str(rank)], env=environment) for rank in (0, 1)]

    folder = shard_folder(run, plan)
    processes = start()
    while len(list(folder.glob("shard-*.npz"))) < 8:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {file: file.stat().st_mtime_ns for file in folder.glob("shard-*.npz")}
    assert 8 <= len(before) < 25
    assert [process.wait(timeout=300) for process in start()] == [0, 0]
    assert {file: file.stat().st_mtime_ns for file in before} == before
    again = read_shards(folder, plan)
    assert len(again.pixels) == 50
    assert torch.equal(again.pixels, images_of(run, plan).pixels)


def test_a_shard_with_objects_is_made_again_and_not_executed(run, tmp_path):
    plan = Plan(samples=4, steps=2)
    expected = images_of(run, plan)
    victim = shard_folder(run, plan) / "shard-00000.npz"
    trace = tmp_path / "executed"
    evil = np.empty(4, dtype=object)
    evil[:] = [Canary(trace)] * 4
    np.savez(victim, arr_0=evil, labels=np.zeros(4), finite=np.ones(4))
    assert torch.equal(read_shards(generate(run, plan), plan).pixels, expected.pixels)
    np.savez(tmp_path / "reference.npz", arr_0=evil)
    with pytest.raises(shards.UserError, match=r"reference\.npz cannot be read"):
        load_npz(tmp_path / "reference.npz")
    assert not trace.exists()
