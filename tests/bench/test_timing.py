"""What lies between the two events of a round."""

import pytest
import torch

from bench.timing import between_events


def test_a_call_keeps_the_device_busy_before_the_first_event(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 6.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    seconds = between_events(lambda: happened.append("call"), repeats=2)
    assert happened == ["call", "event", "call", "call", "event"]
    assert seconds == pytest.approx(3e-3)
