"""A plugin for runs of the suite that do not ask what this machine can do at best.

Measuring it takes longer than all else in a run of few cases.
"""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    from bench import conftest

    config.stash[conftest._BOOKS].conditions.peaks.update(float32=50.0, copy=10.0)
