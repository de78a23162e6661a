"""Comparisons: the plan, cells that fail, the report, and what a few seeds can say."""

import json
import re
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch

from recipes import cells as cells_module
from recipes import compare as compare_module
from recipes import results
from recipes.cells import OK, Cell, read_result
from recipes.checkpoint import Run
from recipes.console import UserError
from recipes.grid import CLAIMS, PRESETS, paper_rows, parse_data, parse_variant, plan_cells
from recipes.palette import color_of, marker_of
from recipes.report import summarise
from recipes.train import Settings
from recipes.verdicts import NO_DIFFERENCE, compare_variants, summary_sentence

TINY = ["--data", "digits", "--seeds", "1", "--steps", "3", "--batch-size", "8", "--samples", "12",
        "--sampling-steps", "2", "--cfg", "1.0", "--patch-size", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two tiny cells, one of which crashes in the middle of its training."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "zoo_of_mine.py").write_text(
        textwrap.dedent(
            """
            import os
            import attnzoo

            @attnzoo.register_attention("crashing")
            class Crashing(attnzoo.Attention):
                calls = 0

                def forward(self, x, grid):
                    Crashing.calls += self.training
                    if Crashing.calls > 8:
                        os.kill(os.getpid(), 9)
                    return x
            """
        )
    )
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(folder))
    patch.chdir(folder)
    patch.setenv("OMP_NUM_THREADS", "1")
    out = folder / "out"
    arguments = ["--attn", "softmax,crashing", "--import", "zoo_of_mine", *TINY, "--out", str(out)]
    status = compare_module.main(arguments)
    yield out, status, arguments
    import attnzoo.registry

    attnzoo.registry._REGISTRY.pop("crashing", None)
    patch.undo()


class TestCells:
    def test_one_that_is_killed_stops_no_other(self, compared):
        out, status, _ = compared
        assert status == 1
        frame = pd.read_csv(out / "cells.csv").set_index("variant")
        assert frame.state.to_dict() == {"softmax": OK, "crashing": "crashed"}
        assert "killed by signal 9" in frame.error["crashing"]
        assert np.isfinite(frame["FID[smallcnn]"]["softmax"])
        assert frame.macs["softmax"] > 0 and frame.forward_seconds["softmax"] > 0

    def test_the_report_shows_the_failure_and_the_rest(self, compared):
        out, _, _ = compared
        page = (out / "report.html").read_text()
        assert "1 of 2 cells are done" in page and "killed by signal 9" in page
        assert "FID[smallcnn]" in page and "Learning curves" in page and "samples of soft" in page
        # One file that needs no other: every picture is inside, nothing is fetched.
        sources = re.findall(r'src="([^"]{0,30})', page)
        assert len(sources) >= 4
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        assert "http" not in page and "<script" not in page

    def test_what_is_done_is_not_done_again(self, compared, monkeypatch, capsys):
        _, _, arguments = compared
        started = []
        monkeypatch.setattr(
            cells_module, "_in_own_process",
            lambda folder, *_: started.append(folder.name) or {"state": "error", "error": "no"},
        )  # fmt: skip
        assert compare_module.main(arguments) == 1
        assert len(started) == 1 and started[0].startswith("digits-easy-native-crashing")
        assert "1 done, 1 to run" in capsys.readouterr().out

    def test_no_cell_starts_when_time_is_up(self, compared, monkeypatch):
        _, _, arguments = compared
        monkeypatch.setattr(cells_module, "_in_own_process", None)
        assert compare_module.main([*arguments, "--time-budget", "0"]) == 1

    def test_a_cell_goes_on_where_it_was_stopped(self, tmp_path, monkeypatch):
        cell = tiny_cell()
        folder = cell.prepare(tmp_path)
        seen = []
        own = cells_module.train

        def stopping(settings, run, **options):
            seen.append(options["resume"])
            if len(seen) == 1:
                return own(settings, run, should_stop=lambda step: step == 2, **options)
            return own(settings, run, **options)

        monkeypatch.setattr(cells_module, "train", stopping)
        monkeypatch.setattr(
            cells_module, "evaluate", lambda run, **_: {"results": {}, "real_floor": {}}
        )
        assert cells_module.run_cell(folder)["state"] == "interrupted"
        result = cells_module.run_cell(folder)
        assert result["state"] == OK and seen == [False, True]
        assert [step for step, _ in result["curve"]] == [1, 2, 3]
        assert read_result(folder) == json.loads(json.dumps(result))

    def test_a_wrong_option_is_an_error_of_its_cell_alone(self, tmp_path):
        folder = tiny_cell(attn_options={"nonsense": 1}).prepare(tmp_path)
        result = cells_module.run_cell(folder)
        assert result["state"] == "error" and "no option 'nonsense'" in result["error"]

    def test_mechanisms_of_one_seed_see_the_same_data_and_noise(self, tmp_path):
        """Paired: only the model differs between two cells of a seed."""
        from recipes.train import Trainer

        plan = plan_cells(
            [parse_variant("softmax"), parse_variant("dydila")], [("digits", None)], seeds=2,
            protocol="controlled", size="tiny", patch_size=4, steps=5, batch_size=4, cfgs=[1.0],
            samples=10, sampling_steps=2,
        )  # fmt: skip
        batches = [Trainer(cell.settings)._batch() for cell in plan]
        for one, other in zip(batches[0], batches[1], strict=True):
            assert torch.equal(one, other)
        assert not torch.equal(batches[0][3], batches[2][3])


def tiny_cell(**settings):
    settings = Settings(attn="sana", steps=3, batch_size=8, sample_every=3, **settings)
    return Cell(label="sana", settings=settings, cfgs=(1.0,), samples=12, sampling_steps=2)


class TestSubmitit:
    @pytest.mark.slow
    def test_cells_run_through_its_local_executor(self, tmp_path, monkeypatch):
        pytest.importorskip("submitit")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        arguments = ["--attn", "sana,sana:nonsense=1", *TINY, "--engine", "submitit"]
        assert compare_module.main([*arguments, "--out", str(tmp_path)]) == 1
        states = pd.read_csv(tmp_path / "cells.csv").set_index("variant").state
        assert states.to_dict() == {"sana": OK, "sana:nonsense=1": "error"}


class TestThePlan:
    def test_a_dry_run_prints_cost_and_runs_nothing(self, tmp_path, capsys):
        out = tmp_path / "out"
        assert (
            compare_module.main(["--attn", "softmax", *TINY, "--dry-run", "--out", str(out)]) == 0
        )
        text = capsys.readouterr().out
        assert "MMACs" in text and "1 cells" in text and "minutes" in text
        assert not out.exists()

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], "either --attn"),
            (["--attn", "softmax", "--preset", "table4"], "either --attn"),
            (["--attn", "softmx"], "did you mean 'softmax'"),
            (["--attn", "sana,sana"], "sana is given twice"),
            (["--attn", "sana:conv"], "NAME:OPTION=VALUE"),
            (["--attn", "sana", "--data", "digit"], "digits"),
            (["--attn", "sana", "--data", "digits", "--resolutions", "9"], "never enlarged"),
            (["--attn", "sana", "--data", "digits@big"], "NAME@PIXELS"),
            (["--attn", "sana", "--import", "no_such_module"], "no_such_module"),
        ],
    )
    def test_bad_input_is_one_clear_line(self, arguments, words, tmp_path):
        with pytest.raises(UserError) as caught:
            compare_module.main([*arguments, "--dry-run", "--out", str(tmp_path)])
        assert words in str(caught.value) and "\n" not in str(caught.value)

    def test_presets_name_rows_of_the_paper_and_claims_name_presets(self):
        for name in ("table4", "table5", "table6", "table1-S"):
            rows = paper_rows(PRESETS[name].variants)
            assert len(rows) == len(PRESETS[name].variants), name
            assert rows.fid.notna().all()
        ladder = paper_rows(PRESETS["table4"].variants)
        assert ladder.fid.tolist() == [28.00, 28.20, 27.87, 27.46, 26.20, 24.48]
        known = {variant.label for variant in PRESETS["results"].variants}
        assert {claim.better for claim in CLAIMS} | {claim.worse for claim in CLAIMS} <= known

    def test_data_and_variants_are_read(self):
        assert parse_data("shapes/long-range") == ("shapes", "long-range")
        assert parse_data("folder/long-range") == ("folder/long-range", "easy")
        variant = parse_variant("dydila:lambda_init=0.1:conv=none:qkv_bias=true")
        assert variant.attn == "dydila"
        assert variant.options == {"lambda_init": 0.1, "conv": "none", "qkv_bias": True}

    def test_other_settings_are_another_cell(self):
        assert tiny_cell().name == tiny_cell().name
        assert tiny_cell(seed=1).name != tiny_cell().name
        assert tiny_cell(learning_rate=1e-4).name != tiny_cell().name


def table(**values):
    return pd.concat(
        pd.DataFrame({"variant": name, "seed": range(len(v)), "FID[smallcnn]": v, "IS[x]": v})
        for name, v in values.items()
    )


class TestWhatSeedsCanSay:
    def test_a_difference_within_the_spread_is_none(self):
        frame = table(a=[1.0, 2.0, 3.0], b=[1.2, 1.9, 3.1])
        found = compare_variants(frame, "a", "b", "FID[smallcnn]")
        assert found.kind == "same" and NO_DIFFERENCE in found.words

    def test_pairing_finds_what_the_spread_between_seeds_would_hide(self):
        frame = table(a=[1.0, 20.0, 300.0], b=[1.5, 20.51, 300.49])
        found = compare_variants(frame, "a", "b", "FID[smallcnn]")
        assert found.kind == "better" and found.gain == pytest.approx(0.5)
        assert compare_variants(frame, "b", "a", "FID[smallcnn]").kind == "worse"
        assert compare_variants(frame, "b", "a", "IS[x]").kind == "better"

    def test_the_interval_is_students(self):
        frame = table(a=[0.0, 0.0, 0.0], b=[1.0, 2.0, 3.0])
        found = compare_variants(frame, "a", "b", "FID[smallcnn]")
        assert found.margin == pytest.approx(4.302653 * 1 / 3**0.5, rel=1e-5)
        assert found.kind == "same"  # 2 ± 2.48

    def test_one_seed_says_nothing(self):
        found = compare_variants(table(a=[1.0], b=[5.0]), "a", "b", "FID[smallcnn]")
        assert found.kind == "unknown" and "nothing can be said" in found.words
        assert compare_variants(table(a=[1.0]), "a", "c", "FID[smallcnn]").kind == "unknown"

    def test_the_sentence_names_the_best_and_the_ties(self):
        frame = table(a=[1.0, 2.0, 3.0], b=[1.1, 1.9, 3.1], c=[9.0, 10.0, 11.0])
        text = summary_sentence(frame, "FID[smallcnn]")
        assert "a has the best mean (2)" in text
        assert "better than c beyond the spread" in text
        assert f"{NO_DIFFERENCE} from b" in text

    def test_means_and_spreads(self):
        frame = table(a=[1.0, 2.0, 3.0]).assign(data="d", level="", resolution=8, cfg=1.0)
        row = summarise(frame).set_index("metric").loc["FID[smallcnn]"]
        assert (row["mean"], row["std"], row["seeds"]) == (2.0, 1.0, 3)


class TestTheResultsPage:
    def test_claims_are_judged_from_the_tables_alone(self, tmp_path):
        frame = table(dydila=[1.0, 1.1, 1.2], sana=[2.0, 2.15, 2.2], softmax=[1.9, 2.3, 2.1])
        frame = frame.drop(columns="IS[x]").assign(
            data="digits", level="", resolution=8, cfg=4.0, state=OK, protocol="controlled",
            steps=5, batch_size=4, macs=1e6, cell=lambda f: f.variant + f.seed.astype(str),
        )  # fmt: skip
        frame.to_csv(tmp_path / "cells.csv", index=False)
        (tmp_path / "command.txt").write_text("python recipes/compare.py --attn x")
        page = results.results_page([tmp_path])
        first = page.split("### ")[1]
        assert first.startswith("dydila before sana (Table 1)")
        assert "**Holds** where a difference can be seen (1 for dydila, 0 for sana" in first
        assert "better (+1.02 ±" in first and "digits 8 px, guidance 4" in first
        assert "**Cannot tell**" in page.split("### ")[2]  # Sana before softmax
        assert "python recipes/compare.py --attn x" in page and "24.48" in page

    def test_verdicts_add_up_to_a_conclusion(self):
        claim = CLAIMS[0]
        words = {
            "Holds": ["better", "same"],
            "Cannot tell": ["same", "same"],
            "the opposite does": ["worse", "same"],
            "Mixed": ["better", "worse"],
            "Not measured": ["unknown"],
        }
        for wanted, kinds in words.items():
            assert wanted in results.conclusion(claim, kinds)
        equal = next(claim for claim in CLAIMS if claim.equal)
        assert "No difference seen" in results.conclusion(equal, ["same"])
        assert "A difference is seen" in results.conclusion(equal, ["same", "worse"])

    def test_a_folder_without_a_comparison_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"holds no comparison.*compare\.py"):
            results.results_page([tmp_path])


class TestPalette:
    def test_one_colour_per_mechanism_under_every_name(self):
        assert color_of("sana") == color_of("Sana") == color_of("Sana-S/2") == "#0072B2"
        assert color_of("dydila") == color_of("DyDi-LiT") == color_of("+reparameterization")
        assert color_of("a-name-of-mine") == color_of("a-name-of-mine")
        assert re.fullmatch(r"#[0-9A-F]{6}", color_of("a-name-of-mine"))
        assert marker_of("DiT") == marker_of("softmax") != marker_of("sana")

    def test_the_zoo_has_colours_of_its_own(self):
        from attnzoo import list_attention

        names = list_attention()
        assert len({color_of(name) for name in names}) == len(names)
        pairs = {(color_of(name), marker_of(name)) for name in names}
        assert len(pairs) == len(names)


def test_reports_of_nothing_are_possible(tmp_path):
    from recipes.report import write_report

    cell = tiny_cell()
    states = write_report(tmp_path, [cell], [parse_variant("sana")], title="nothing")
    assert states == {cell.name: "not run"}
    assert "0 of 1 cells are done" in (tmp_path / "report.html").read_text()
    assert not Run(tmp_path / "cells" / cell.name / "run").config_file.exists()
