"""Small runs that several tests share."""

import os

import pytest

from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.lab.training.trainer import Trainer
from tests.commands import HEAVY, Commands

SMALL = {"batch_size": 16, "checkpoint_every": 10, "sample_every": 1000}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of 30 steps on digits."""
    run = Run(tmp_path_factory.mktemp("runs") / "trained")
    assert train(Settings(attn="dydila", steps=30, **SMALL), run) == 0
    return run


@pytest.fixture(scope="session")
def commands():
    """Starts recipes where the locale is not UTF-8, the worst for names and messages."""
    locale = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    started = Commands(HEAVY, {**os.environ, **locale, "OMP_NUM_THREADS": "1"})
    yield started
    started.close()


@pytest.fixture
def no_charts(monkeypatch):
    """A report's charts take the most of its time."""
    monkeypatch.setattr("recipes.studies.comparison.report.figures", lambda *_: iter(()))


@pytest.fixture
def no_pictures(monkeypatch):
    """Sample grids take the most of a short run's time."""
    monkeypatch.setattr(Trainer, "sample_grid", lambda self, path: None)
