"""Triton's interpreter, without what it does again and again."""

import os
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session", autouse=True)
def language_is_patched_once():
    """Each call of a function in a kernel patches Triton's language anew: half of all the time.

    It is patched by the first call from each module, and stays so.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    own, done = interpreter._patch_lang, {}

    def patch(function):
        if function.__module__ not in done:
            done[function.__module__] = own(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch


@pytest.fixture
def small_convolutions(monkeypatch):
    """Tiles of few rows: the interpreter takes its time by steps, not by sizes."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from attnzoo.ops.depthwise_conv import triton as one
    from attnzoo.ops.depthwise_conv import triton_branches as three

    for name in ("STENCIL_BLOCK", "STENCIL_WEIGHT_BLOCK"):
        monkeypatch.setattr(one, name, (4, 8, 64, 4))
    monkeypatch.setattr(one, "WIDE_STENCIL_BLOCK", dict.fromkeys((3, 5, 7), (4, 4, 64, 1)))
    monkeypatch.setattr(one, "WIDE_STENCIL_WEIGHT_BLOCK", (4, 4, 64, 1))
    for name in ("MOMENTS_BLOCK", "SUMS_BLOCK", "GRADIENT_BLOCK", "MERGED_BLOCK"):
        monkeypatch.setattr(three, name, (4, 4, 64, 2))
    monkeypatch.setattr(three, "PARTS", 4)
