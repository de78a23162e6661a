"""Kernels in Triton's interpreter, in less time."""

import os

import pytest

from tests.attnzoo.quick_interpreter import quicken

if os.environ.get("TRITON_INTERPRET") == "1":
    quicken()


@pytest.fixture
def small_convolutions(monkeypatch):
    """Tiles of few rows: the interpreter takes its time by steps, not by sizes."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from attnzoo.ops.depthwise_conv import triton as one
    from attnzoo.ops.depthwise_conv import triton_branches as three

    for name in ("STENCIL_BLOCK", "STENCIL_WEIGHT_BLOCK"):
        monkeypatch.setattr(one, name, dict.fromkeys((3, 5, 7), (4, 4, 64, 2, 1, 1, 255)))
    for name in ("MOMENTS_BLOCK", "SUMS_BLOCK", "GRADIENT_BLOCK"):
        monkeypatch.setattr(three, name, (4, 4, 64, 2))
    monkeypatch.setattr(three, "PARTS", 4)
