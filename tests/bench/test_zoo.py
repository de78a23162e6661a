"""The page of the whole zoo says what its table of runs says, and no more."""

import pandas as pd
import pytest

from attnzoo.counting import count_macs
from backbones import build_backbone
from bench import zoo
from recipes.lab.console import UserError

PAGE = zoo.DOCS / "zoo.md"


def runs(*rows):
    """Of (variant, seed, loss), a loss of None being that of a run that did not finish."""
    return pd.DataFrame([
        {"data": "digits", "variant": variant, "seed": seed, "state": "ok" if loss else "not run",
         "loss": loss or float("nan"), "px": 8, "tokens": 4, "accepted": 100.0,
         "parameters": 1e6, "macs": 2e6}
        for variant, seed, loss in rows
    ])  # fmt: skip


def test_the_page_has_the_tables_of_its_csv(tmp_path):
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text("utf-8"), "utf-8")
    zoo.main(["--into", str(copy)])
    assert copy.read_text("utf-8") == PAGE.read_text("utf-8"), "run python -m bench.zoo --into"
    assert zoo.TABLE.stat().st_size < 60_000


def test_the_csv_is_of_the_models_that_it_names():
    """A comparison's patches are of 4 px: digits of 8 px are four tokens."""
    of_data = zoo.read().query("variant == 'softmax' and seed == 0").set_index("data")
    for data, channels in (("digits", 1), ("shapes", 3)):
        row = of_data.loc[data]
        side = int(row["px"])
        model = build_backbone(
            "softmax", "tiny", "controlled", side, latent_factor=1, patch_size=4,
            in_channels=channels, num_classes=10, learn_sigma=False,
        )  # fmt: skip
        counted = count_macs(model, resolution=side)
        assert (row["tokens"], row["macs"]) == (counted.grid[0] * counted.grid[1], counted.total)


def test_what_holds_is_what_holm_leaves():
    better = [("softmax", s, 1 + s / 10) for s in range(5)]
    better += [("sana", s, 0.9 + s / 10 + 1e-3 * (s % 2)) for s in range(5)]
    noise = [("lit", s, 1 + s / 10 + (-1) ** s * 0.2) for s in range(4)] + [("lit", 4, None)]
    text = zoo.table(runs(*better, *noise))
    assert "After Holm's correction over these `sana` holds." in text
    assert "leaves out 0: none." in text and "Missing: seed 4 of `lit`." in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| mechanism", "| sana", "| lit", "| softmax"]
    assert rows[2][1] == "0, 1, 2, 3" and rows[2][6].startswith("+0.00 ± ")


def test_one_seed_decides_nothing():
    text = zoo.table(runs(("softmax", 0, 1.0), ("sana", 0, 0.5), ("lit", 0, None)))
    assert "nothing is decided" in text and "p (Holm)" not in text
    assert "| sana | 0 | 0.5000 | 100 | 1.00 | 2.0 | -50.00 |" in text
    assert "| lit | none |  |  |  |  |  |" in text


def test_folders_of_a_comparison_make_the_csv(tmp_path, capsys):
    folder = tmp_path / "compared"
    folder.mkdir()
    (folder / "runs.csv").write_text(
        "data,variant,state,resolution,seed,cfg,count,parameters,macs,held_out_loss[ema],"
        "class_accuracy[smallcnn]\n"
        "digits,softmax,ok,8,0,1.0,200,10,20,0.12345678,0.825\n"
        "digits,softmax,ok,8,0,4.0,200,10,20,0.12345678,1\n"
        "digits,softmax,interrupted,8,1,,,,,,\n"
    )
    to = tmp_path / "zoo.csv"
    zoo.main([str(folder), "--table", str(to)])
    assert "Missing: seed 1 of all." in capsys.readouterr().out
    assert to.read_text().splitlines()[1:] == [
        "digits,softmax,ok,8,4,0,0.123457,165,10,20",
        "digits,softmax,interrupted,8,4,1,,,,",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--against", "sanna"], "the table has no 'sanna'; it has agent, "),
        (["--table", "nothing.csv"], "'nothing.csv' cannot be read"),
        (["--table", "other.csv"], r"no table of python -m bench\.zoo"),
        (["--into", "nothing.md"], "needs one line <!-- zoo digits -->"),
        (["nowhere", "--table", "x.csv"], "runs.csv' cannot be read"),
    ],
)
def test_mistakes_are_one_line(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=said):
        zoo.main(arguments)


def test_a_run_that_is_there_twice_is_refused_before_the_table_is_written(tmp_path):
    found = runs(("softmax", 0, 0.1), ("sana", 0, 0.2)).assign(
        resolution=8, cfg=1.0, count=100, **{zoo._LOSS: 0.1, zoo._ACCURACY: 1.0}
    )
    found.to_csv(tmp_path / "runs.csv", index=False)
    out = tmp_path / "zoo.csv"
    with pytest.raises(UserError, match="two runs of softmax with seed 0"):
        zoo.main([str(tmp_path), str(tmp_path), "--table", str(out)])
    assert not out.exists()
