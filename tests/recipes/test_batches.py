"""Batches made ahead by threads, as for a GPU: the same numbers, the same errors, no rest."""

import gc
import os
import signal
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backbones import DiT
from recipes.lab.console import INTERRUPTED, UserError
from recipes.lab.data import folder
from recipes.lab.training.batches import AHEAD, Batches
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.lab.training.trainer import Trainer
from tests.recipes.reliability import draw

pytestmark = pytest.mark.usefixtures("no_pictures")

SMALL = {"attn": "sana", "batch_size": 4, "steps": 8, "checkpoint_every": 1, "sample_every": 1000}


@pytest.fixture
def ahead(monkeypatch):
    """Uses the threads on a CPU too."""
    original = Batches.__init__

    def initialize(self, *arguments):
        original(self, *arguments)
        self.ahead = True

    monkeypatch.setattr(Batches, "__init__", initialize)


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of images that are read when they are asked for."""
    monkeypatch.setattr(folder, "CACHE_BYTES", 0)
    generator = np.random.default_rng(0)
    for number in range(16):
        draw(tmp_path / "images" / f"class-{number % 2}" / f"{number}.png", generator)
    return tmp_path / "images"


def log(run):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in run.read_log()]


def batch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize("data", ["digits", "shapes", "images"])
def test_threads_make_the_same_batches(data, ahead, images):
    options = {"data": str(images) if data == "images" else data, "accumulate": 2}
    batches = Trainer(Settings(**SMALL | options)).batches
    for step in (0, 1, 2, 5, 6, 3, 7):  # forwards, on after a gap, and back
        for one, other in zip(batches.take(step), batches.at(step), strict=True):
            assert torch.equal(one, other)
    assert not batches._begun  # nothing is made for after the last step
    batches.close()


def settle(batches):
    for batch in batches._begun.values():
        batch.result()


def test_one_thread_at_a_time_reads_from_the_data_set(ahead, monkeypatch):
    batches = Trainer(Settings(**SMALL)).batches
    read, readers, most = batches.dataset.batch, [], []

    def slow(indices):
        readers.append(1)
        most.append(len(readers))
        time.sleep(0.02)
        readers.pop()
        return read(indices)

    monkeypatch.setattr(batches.dataset, "batch", slow)
    batches.take(0)
    settle(batches)
    assert len(most) == AHEAD + 1 and max(most) == 1
    batches.close()


def test_a_run_with_threads_equals_one_without_and_resumes_exactly(ahead, tmp_path, monkeypatch):
    settings = Settings(**SMALL)
    parts = Run(tmp_path / "parts")
    assert train(settings, parts, should_stop=lambda step: step == 3) == INTERRUPTED
    assert train(settings, parts, resume=True) == 0
    monkeypatch.setattr(Batches, "take", Batches.at)
    assert train(settings, Run(tmp_path / "plain")) == 0
    assert log(parts) == log(Run(tmp_path / "plain"))
    one, other = (
        (run.newest_checkpoint(pytest.fail)[1] / "optimizer.safetensors").read_bytes()
        for run in (parts, Run(tmp_path / "plain"))
    )
    assert one == other
    assert not batch_threads()


def test_what_threads_cannot_read_stops_the_step_that_needs_it(ahead, images, tmp_path):
    run = Run(tmp_path / "run")
    settings = Settings(**SMALL, data=str(images), resolution=16)

    def tear(step):
        if step == 2:  # batches of the next steps are already made or being made
            for file in images.rglob("*.png"):
                file.write_bytes(b"")
        return False

    with pytest.raises(UserError, match=r"was readable when the run began"):
        train(settings, run, should_stop=tear)
    assert run.newest_checkpoint(pytest.fail)[0] == len(run.read_log()) in range(2, 3 + AHEAD)
    assert not batch_threads()


def test_a_signal_ends_the_threads(ahead, tmp_path):
    run = Run(tmp_path / "run")

    def send(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    assert train(Settings(**SMALL), run, should_stop=send) == INTERRUPTED
    assert run.newest_checkpoint(pytest.fail)[0] == 3
    assert not batch_threads()


def test_threads_hold_a_few_batches_only(ahead):
    batches = Trainer(Settings(**SMALL | {"steps": 1000})).batches

    def tensors():
        settle(batches)
        assert len(batches._begun) == AHEAD
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    batches.take(0)
    before = tensors()
    for step in range(1, 100):
        batches.take(step)
    assert tensors() <= before
    batches.close()


@pytest.mark.parametrize("place", ["cuda", "cuda:0"])
def test_for_a_gpu_threads_pin_what_they_make(place, monkeypatch):
    """Without a GPU: what is called, and where."""
    called = []

    def note(name, result):
        called.append((name, threading.current_thread().name.partition("_")[0]))
        return result

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: note("pin", tensor))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: note(str(device), None))
    of = Trainer(Settings(**SMALL)).batches
    batches = Batches(of.settings, of.dataset, of.diffusion, 0, 1, torch.device(place))
    for one, other in zip(batches.take(0), of.at(0), strict=True):
        assert torch.equal(one, other)
    batches.close()
    # Accelerate names no number where there is one process: the first GPU is the right one.
    chosen = {("cuda:0", "batches")} if place == "cuda:0" else set()
    assert {call for call in called if call[0] != "pin"} == chosen
    # Close drops batches that are not begun.
    assert called.count(("pin", "batches")) in range(4, 4 * AHEAD + 5, 4)


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: values that Python asks for."""

    ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.ASKS:
            self.seen.append(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    "options", [{}, {"preset": "dit", "precision": "fp32"}, {"accumulate": 2}]
)
def test_a_step_asks_for_values_once(options, monkeypatch):
    trainer = Trainer(Settings(**SMALL | {"data": "digits"} | options))
    batch = trainer._batch()
    monkeypatch.setattr(trainer, "_batch", lambda: batch)
    # Looks that only a CPU takes: at labels, and at the optimizer's count of steps.
    monkeypatch.setattr(DiT, "_check_condition", lambda self, *arguments: None)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    waits = Waits()
    to_list = torch.Tensor.tolist
    with monkeypatch.context() as patch, waits:
        patch.setattr(torch.Tensor, "tolist", lambda t: waits.seen.append("list") or to_list(t))
        trainer.train_step()
    assert waits.seen == ["list"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("graph", "times"), [("off", 1), ("on", 0)])
@pytest.mark.parametrize("attn", ["softmax", "sana", "dydila"])
def test_a_step_waits_for_the_gpu_once_and_not_where_recorded(attn, graph, times):
    """Of a recorded step only the reading of its numbers waits, by an event."""
    trainer = Trainer(Settings(**SMALL | {"attn": attn, "steps": 100, "cuda_graph": graph}))
    for _ in range(3):
        trainer.train_step()
    settle(trainer.batches)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in seen if "synchronizing" in str(warning.message)]) == times
