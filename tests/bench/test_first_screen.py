"""Figures that ship are those that are committed; the first screen says what they say."""

import json

import pytest

from attnzoo.command.figures import Figures, Quality, Row, Source, dumps, faster_from, loads
from bench import first_screen, shipped
from recipes.lab.console import UserError


def row(mechanism, tokens, over, size="S", mode="forward", peak=2**20):
    return Row(0, mechanism, size, mode, tokens, 4, 1000, over, "compiled", None, over, peak)


def small(*quality, rows=None):
    source = Source("h100", "a card", "2030-01-02", "abc", {"torch": "2"}, "x.json")
    rows = rows or [
        row(name, tokens, over, mode=mode)
        for mode in ("forward", "train")
        for name, tokens, over in (
            ("softmax", 256, 1.0), ("softmax", 1024, 1.0), ("sana", 256, 1.2), ("sana", 1024, 0.6),
            ("lit", 1024, 0.8), ("dydila", 256, 2.0), ("dydila", 1024, 1.5),
        )
    ]  # fmt: skip
    return Figures([source], rows, list(quality))


def near(name, mean, tokens=1024, seeds=3, spread=0.01):
    return Quality(name, tokens, "loss", True, mean, spread, seeds, "emoji, 128 px")


def cells(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_faster_from_wants_every_resolution_of_softmax():
    """Between two of them a curve may bend where nobody looked."""
    rows = small().of("h100", "S", "forward")
    assert faster_from(rows).keys() == {"sana", "dydila"}
    third = [row("softmax", 4096, 1.0), row("sana", 4096, 0.5)]
    assert faster_from([*rows, *third]).keys() == {"sana"}


def test_what_ships_is_what_is_committed():
    said = "run python -m bench.shipped, and commit what it writes"
    assert shipped.TARGET.read_text("utf-8") == dumps(shipped.committed()), said


def case(mechanism, seconds, over=None, missing=()):
    found = None
    if over is not None:
        found = {"median": over, "ours": "compiled", "softmax": "compiled"}
        found |= dict.fromkeys(missing, "eager")
    return {
        "mechanism": mechanism, "size": "tiny", "mode": "forward", "tokens": 256, "batch": 2,
        "resolution": 256, "seconds": {name: {"median": z} for name, z in seconds.items()},
        "over_softmax": {}, "over_fastest": found, "peak_memory": 5, "missing": {},
    }  # fmt: skip


def written(path, date, *cases):
    report = {
        "cases": cases, "layers": [], "launches": [], "missed": [], "versions": {"torch": "2"},
        "device_name": "NVIDIA H100 80GB HBM3", "commit": path.stem, "datetime": date,
        "device": "cuda",
    }  # fmt: skip
    path.write_text(json.dumps(report))
    return path


def test_the_newest_case_counts_that_ran_as_users_run_it(tmp_path):
    old = written(
        tmp_path / "old.json", "2030-01-01T00:00",
        case("softmax", {"eager": 9.0, "compiled": 2.0}),
        case("sana", {"eager": 9.0, "compiled": 1.0}, 0.5), case("lit", {"compiled": 1.0}, 0.7),
        case("gated", {"recorded": 2.0, "compiled": 1.0}, 0.8),
    )  # fmt: skip
    hasty = case("gated", {"recorded": 1.9}, 1.2)
    hasty["missing"] = {"compiled": "was not compiled in time"}
    new = written(
        tmp_path / "new.json", "2030-02-01T00:00",
        case("softmax", {"eager": 9.0, "compiled": 4.0}),
        case("sana", {"eager": 8.0}, 0.9, ("ours", "softmax")),
        case("lit", {"compiled": 1.5}, 0.1, ("softmax",)), hasty,
    )  # fmt: skip
    found = shipped.collected([new, old], [])
    assert loads(dumps(found)) == found
    assert [(s.commit, s.device) for s in found.sources] == [("old", "h100"), ("new", "h100")]
    said = {r.mechanism: (r.seconds, r.over_softmax, r.source, r.eager) for r in found.rows}
    assert said["softmax"] == (4.0, 1.0, 1, 9.0) and said["sana"] == (1.0, 0.5, 0, 9.0)
    assert said["lit"] == (1.0, 0.7, 0, None)  # beside an eager softmax anything looks fast
    assert said["gated"] == (1.0, 0.8, 0, None)
    alone = written(
        tmp_path / "alone.json", "2030-03-01T00:00", case("lit", {"compiled": 1.0}, 0.7)
    )
    # A device of which nobody knows softmax's time.
    alone.write_text(alone.read_text().replace("H100", "H200"))
    assert shipped.collected([new, old, alone], []) == found
    with pytest.raises(UserError, match="no JSON"):
        shipped.collected([], [])


def test_the_studies_come_before_digits(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    row = "resolution,{},sana,emoji,64,256,{},10,8,{},run-{},{},{},H100,2.11," + 11 * ","
    rows = [
        row.format(protocol, seed, images, seed, state, loss)
        for protocol, seed, images, state, loss in (
            ("depth", 0, 512, "ok", 0.2), ("depth", 1, 512, "ok", 0.4), ("time", 0, 512, "ok", 9),
            ("depth", 2, 512, "failed", ""),
            ("depth", 3, 1024, "ok", 9),  # on other images
        )
    ]  # fmt: skip
    # A variant of which a run did not train has no mean.
    rows += [rows[seed].replace(",sana,", ",lit,").replace("run-", "lit-") for seed in (0, 1)]
    rows[-1] = rows[-1].replace(",0.4,", ",4.0,")
    columns = (
        "study,protocol,variant,data,px,tokens,seed,steps,batch,held_out,run,state,loss,device,"
        "torch,curve,error,loss_model,q1,q2,q3,q4,train_loss,macs,step_seconds,wall_seconds,"
        "elsewhere,model"
    )
    larger = [f"{line},384x12" for line in rows]
    rows = [f"{line},192x6" for line in rows]
    (tmp_path / "table.csv").write_text("\n".join([columns, *rows, ""]))
    (found,) = shipped.studied_quality(tmp_path.glob("*.csv"))
    assert (found.mean, found.spread, found.seeds, found.tokens) == (0.3, 0.1, 2, 256)
    assert found.setting == "emoji, 64 px"
    (tmp_path / "s.csv").write_text("\n".join([columns, *larger, ""]))
    settings = [q.setting for q in shipped.studied_quality(tmp_path.glob("*.csv"))]
    assert settings == ["emoji, 64 px", "emoji, 64 px, 384x12"]
    longer = [line.replace(",10,8,", ",20,8,") for line in rows]
    slower = [f"{line},0.001" for line in rows]
    for titles, other in ((columns, longer), (f"{columns},learning_rate", slower)):
        (tmp_path / "z.csv").write_text("\n".join([titles, *other, ""]))
        with pytest.raises(UserError, match=r"z\.csv has emoji at 64 px at another scale"):
            shipped.studied_quality(tmp_path.glob("*.csv"))
    digits = shipped.digits_quality()
    assert {"softmax", "sana", "conv"} <= {q.mechanism for q in digits}
    assert {(q.tokens, q.setting) for q in digits} == {(4, "digits, 8 px")}
    with pytest.raises(UserError, match=r"no table of python -m bench\.zoo"):
        shipped.digits_quality(tmp_path / "other.csv")


def test_a_comparison_that_decides_comes_before_a_nearer_one():
    few = [near("softmax", 0.5, seeds=1), near("sana", 0.6, seeds=1)]
    decided = [near(name, 0.5, tokens=64) for name in ("softmax", "sana", "conv")]
    assert small(*few, *decided).quality_near(1024) == decided
    assert small(*few, *decided[:2]).quality_near(1024) == few  # of two there is no choice
    nearer = [near(name, 0.5) for name in ("softmax", "lit", "sana")]
    assert small(*decided, *nearer).quality_near(1024) == nearer
    cut = near("dydila", 0.3, tokens=64, seeds=2)
    assert small(*decided, cut).quality_near(1024) == decided  # of seeds that softmax has, too


def test_the_table_answers_by_resolution():
    quality = [near("softmax", 0.5), near("sana", 0.6), near("lit", 0.505), near("dydila", 0.4)]
    text = first_screen.table(small(*quality), "h100")
    _, fastest, least, best, safe = cells(text, "256 px")
    assert fastest == "softmax: nothing measured is faster, measured on H100"
    assert least.startswith("softmax, 1.00 x memory") and safe.startswith("softmax")
    assert best == "dydila, 2.00 x time, small scale"
    _, fastest, least, best, safe = cells(text, "512 px")
    assert fastest == "sana, 0.60 x time, measured on H100"
    assert "(as softmax)" in least and "1.50 x time" in best
    # Sana is faster, and worse by more than its seeds differ; LiT is not.
    assert safe == "lit, 0.80 x time; no worse at small scale"
    line = next(z for z in text.splitlines() if z.startswith("- A sampling step of size S"))
    assert "`sana` from 307 px" in line and "at 512 px also with `lit`" in line
    assert "not up to 512 px with `dydila`" in line


@pytest.mark.parametrize(
    "quality",
    [(), [near("sana", 0.1), near("softmax", 0.5, seeds=2)], [near("softmax", 0.5, tokens=16)]],
)
def test_without_evidence_softmax_is_the_safe_choice(quality):
    text = first_screen.table(small(*quality), "h100")
    assert cells(text, "512 px")[-1] == "softmax; quality not measured here"
    if not quality:
        assert cells(text, "512 px")[-2] == "not measured"


def test_a_difference_that_two_runs_have_too_is_no_win():
    rows = [row("softmax", 256, 1.0), row("sana", 256, 0.97)]
    text = first_screen.table(small(rows=rows), "h100")
    assert cells(text, "256 px")[1].startswith("softmax and sana alike (0.97 x time)")
    equal = [near("softmax", 0.5, tokens=256), near("sana", 0.5, tokens=256)]
    text = first_screen.table(small(*equal, rows=rows), "h100")
    assert cells(text, "256 px")[-1] == "softmax; nothing faster is as good"


def test_page_and_picture_are_written_between_the_marks(tmp_path, capsys):
    quality = [near("softmax", 0.5), near("sana", 0.6), near("dydila", 0.4)]
    file, page = tmp_path / "figures.json", tmp_path / "pages" / "page.md"
    file.write_text(dumps(small(*quality)))
    page.parent.mkdir()
    page.write_text("a\n<!-- first screen -->\nold\n<!-- /first screen -->\nb\n")
    flags = ["--figures", str(file), "--out", str(tmp_path / "plots")]
    assert first_screen.main([*flags, "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("a\n") and text.endswith("\nb\n") and "old" not in text
    assert "](../plots/first-screen.png)" in text and "(commits abc; 2030-01-02)" in text
    assert (tmp_path / "plots" / "first-screen.png").stat().st_size > 10_000
    assert first_screen.main(flags) == 0 and "| 512 px" in capsys.readouterr().out
    page.write_text("no marks")
    for arguments, message in (
        ([*flags, "--into", str(page)], "needs one line <!-- first screen -->"),
        ([*flags, "--device", "cpu"], "no whole models of softmax on cpu"),
        (["--figures", str(page)], "is no JSON of python -m bench.shipped"),
    ):
        with pytest.raises(UserError, match=message):
            first_screen.main(arguments)
    file.write_text(dumps(small()))
    with pytest.raises(UserError, match="nothing to draw"):
        first_screen.main(flags)
