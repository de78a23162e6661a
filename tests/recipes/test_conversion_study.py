"""The study of conversions: its runs, its table, and that it goes on where it was stopped."""

import json
import shutil

import pytest

from attnzoo import InvalidValue, registry
from recipes.lab.console import UserError
from recipes.studies import conversion
from tests.recipes.test_convert import OWN


def test_it_measures_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(conversion, "_BATCHES", 1)
    arguments = ["--data", "digits", "--steps", "4", "--batch-size", "4", "--seeds", "1",
                 "--shares", "0.5", "--distil", "noise", "--out", str(tmp_path)]  # fmt: skip
    assert conversion.main(arguments) == 0
    first = json.loads((tmp_path / "conversion.json").read_text())
    assert [(row["run"], row["steps"]) for row in first] == [
        ("softmax, from scratch", 4), ("lit, from scratch", 4), ("lit, from scratch", 2),
        ("converted, noise", 2),
    ]  # fmt: skip
    table = (tmp_path / "conversion.md").read_text()
    assert table.strip() in capsys.readouterr().out and table.count("\n") == 6
    assert conversion.main(arguments) == 0
    assert json.loads((tmp_path / "conversion.json").read_text()) == first
    shutil.rmtree(tmp_path / "lit-2-noise-seed-0" / "checkpoints")  # killed before its first
    assert conversion.main(arguments) == 0
    assert json.loads((tmp_path / "conversion.json").read_text()) == first
    with pytest.raises(UserError, match="holds a run of other settings"):
        conversion.main([*arguments, "--batch-size", "8"])


def test_a_mechanism_of_ones_own_is_studied_and_an_unknown_one_refused_at_once(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(conversion, "_BATCHES", 1)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    (tmp_path / "mine.py").write_text(OWN)
    arguments = ["--steps", "2", "--batch-size", "4", "--seeds", "1", "--shares", "0.5",
                 "--distil", "noise", "--data", "digits", "--out", str(tmp_path / "out"),
                 "--attn", "convert-mean"]  # fmt: skip
    with pytest.raises(InvalidValue, match="unknown attention 'convert-mean'"):
        conversion.main(arguments)
    assert not (tmp_path / "out").exists()
    assert conversion.main([*arguments, "--import", str(tmp_path / "mine.py")]) == 0
    rows = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert ["convert-mean, from scratch", 1] in [[row["run"], row["steps"]] for row in rows]
