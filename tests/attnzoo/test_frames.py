"""How much of the zoo one forward walks through: its files and Python frames.

Deep paths cost small models more than their arithmetic, and whoever reads one has to open each of
its files.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import attnzoo

ROOT = Path(attnzoo.__file__).parent
# By mechanism, the most files and frames of a forward on a CPU.
MOST = {"dydila": (8, 120), "sana": (5, 25)}


def frames(call):
    """How often each function of the package starts while ``call`` runs, by file and name."""
    found = Counter()

    def count(frame, event, _):
        if event == "call" and (path := Path(frame.f_code.co_filename)).is_relative_to(ROOT):
            found[str(path.relative_to(ROOT)), frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.parametrize("name", MOST)
def test_a_forward_keeps_to_its_files_and_frames(name):
    layer, x = attnzoo.build_attention(name, 96).eval(), torch.randn(1, 64, 96)
    with torch.no_grad():
        layer(x, (8, 8))  # what is looked up once is remembered
        found = frames(lambda: layer(x, (8, 8)))
    files = {file for file, _ in found}
    most_files, most_frames = MOST[name]
    assert len(files) <= most_files, sorted(files)
    assert found.total() <= most_frames, found.most_common()
