"""The pages in docs/ and beside them: links, navigation, and what they state about the code."""

import importlib
import itertools
import pkgutil
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
import yaml

from attnzoo.command.listing import table
from bench import results
from bench.scaling import figures as scaling_figures
from bench.thresholds import figures_of
from bench.whole_models import figures as whole_figures
from recipes import compare, convert, encode, evaluate, sample, train
from recipes.studies.comparison.summary import scaled_mean
from tests.markdown_pages import (
    ROOT,
    anchors,
    code_blocks,
    commands,
    pages,
    without_code,
    without_side_effects,
)

DOCS = ROOT / "docs"
ROOMS = ("attnzoo", "backbones", "recipes", "bench", "examples")
# Of the site alone: made of the files in the repository's root.
GENERATED = {"contributing.md", "changelog.md"}
SCRIPTS = {
    "train": train, "sample": sample, "evaluate": evaluate, "convert": convert,
    "encode": encode, "compare": compare,
}  # fmt: skip


def page(name):
    return (DOCS / name).read_text("utf-8")


def shown(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", pages(), ids=shown)
def test_every_link_leads_somewhere(path):
    text = without_code(path.read_text("utf-8"))
    links = re.findall(r"\]\((?!https?:)([^)\s]*)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.is_relative_to(ROOT) and file.exists(), link
        if anchor:
            assert anchors(file.read_text("utf-8")).count(anchor) == 1, link


@pytest.mark.parametrize("path", pages(), ids=shown)
def test_lists_begin_after_an_empty_line(path):
    """Without one Python-Markdown takes a list for a paragraph, unlike code hosts."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = ["", *text.splitlines()]
    item = re.compile(r"(?:[-*]|\d+\.) ")
    for before, line in itertools.pairwise(lines):
        if item.match(line):
            assert not before or before[0] == " " or item.match(before), line


def navigation():
    class Loader(yaml.SafeLoader):
        """Passes over what only mkdocs can build."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    site = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)

    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        return [leaf for part in (entry.values() if isinstance(entry, dict) else entry)
                for leaf in leaves(part)]  # fmt: skip

    return leaves(site["nav"]), site


def test_every_page_is_in_the_navigation_once():
    found, _ = navigation()
    written = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert sorted(found) == sorted(written | GENERATED)


def test_warnings_are_errors_and_the_site_is_ignored_by_git():
    _, site = navigation()
    assert site["strict"] is True
    assert set(site["validation"]["links"].values()) == {"warn"}
    ignored = (ROOT / ".gitignore").read_text().split()
    assert site["site_dir"].split("/")[0] + "/" in ignored
    assert "make docs\n" in (ROOT / ".ci" / "run").read_text()
    # --quiet would silence the warnings before they are counted.
    assert "-m mkdocs build\n" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("path", pages(), ids=shown)
def test_every_file_that_is_named_is_there(path):
    rooms = "|".join((*ROOMS, "tests", "docs"))
    named = re.findall(rf"`((?:{rooms})/[\w/.-]+\.\w+)`", path.read_text("utf-8"))
    if path.name == "CHANGELOG.md":  # which names what is gone
        return
    examples = {"docs/mechanisms/NAME.md", "docs/mechanisms/x.md", "attnzoo/mechanisms/x.py"}
    assert not [name for name in set(named) - examples if not (ROOT / name).exists()]


def test_spelling_is_american():
    """In code and pages; CONTRIBUTING.md names the other, and saved files have it in a key."""
    british = re.compile(
        r"(?<!agreement_)(?:(?:normal|initial|material|optim|minim)is(?:e|ing|ation)"
        r"|(?:colo|neighbo|behavio)ur|licen[c]e)"
    )
    rooms = [ROOT / room for room in (*ROOMS, "tests")]
    files = {*pages(), *(file for room in rooms for file in room.rglob("*.py"))}
    for path in sorted(files - {ROOT / "CONTRIBUTING.md"}):
        found = british.search(path.read_text("utf-8"))
        assert not found, (shown(path), found[0])


def test_every_flag_of_a_recipe_exists(capsys, monkeypatch):
    """In all shell blocks of all pages."""
    monkeypatch.setenv("COLUMNS", "200")
    used: dict[str, set[str]] = {}
    for path in pages():
        for words in commands(path.read_text("utf-8")):
            if words[:1] == ["python"] and words[1:2] and words[1].startswith("recipes/"):
                flags = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
                used.setdefault(Path(words[1]).stem, set()).update(flags)
    assert {"train", "sample", "evaluate", "encode", "compare", "convert"} <= set(used)
    for script, flags in used.items():
        with pytest.raises(SystemExit):
            importlib.import_module(f"recipes.{script}").main(["--help"])
        offered = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        assert flags <= offered, (script, flags - offered)


@pytest.mark.parametrize("name", ["recipes.md", "conversion.md"])
def test_the_first_commands_run_in_their_order(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = next(block for block in code_blocks(page(name), "sh") if "recipes/train.py" in block)
    ran = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len(ran) >= 2
    for python, script, *arguments in ran:
        assert python == "python"
        step = Path(script).stem
        shorter = [] if step == "evaluate" else ["--steps", "2"]
        assert SCRIPTS[step].main([*arguments, *shorter]) == 0, (step, arguments)
    if name == "recipes.md":
        assert (tmp_path / "runs/digits-sana/metrics.json").exists()


@pytest.mark.parametrize("name", ["api.md", "install.md", "mixtures.md"])
def test_code_runs(name):
    (code,) = code_blocks(page(name), "python")
    with without_side_effects():
        exec(compile(code, name, "exec"), {})


def test_the_mixtures_commands_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (first, *_) = commands(page("mixtures.md"))
    assert first[:2] == ["python", "recipes/train.py"]
    assert train.main([*first[2:], "--steps", "2"]) == 0
    assert (tmp_path / "runs" / "digits-sana-3-softmax").is_dir()


def test_the_overview_has_every_mechanism_in_one_family():
    text = page("mechanisms/index.md")
    rows = [line for line in text.splitlines() if line.startswith("| [`")]
    expected = []
    for row in table().splitlines()[2:]:
        name = row.split("`")[1]
        link = f"[`{name}`]({name.removesuffix('-map')}.md)"
        expected.append(row.replace(f"`{name}`", link, 1))
    assert sorted(rows) == sorted(expected)
    found, _ = navigation()
    assert all(
        found.count(f"mechanisms/{link}") == 1 for link in re.findall(r"\((\w+\.md)\)", text)
    )


def test_what_came_out_is_what_the_results_say():
    """Every tally stands in the page of those runs, which a command wrote."""
    tallies = re.findall(
        r"\d+ for \w+, \d+ for \w+, \d+ cannot\s+tell", page("read-the-results.md")
    )
    assert len(tallies) == 4
    for tally in tallies:
        assert " ".join(tally.split()) in page("results-345-runs.md"), tally


def test_what_recommend_names_is_what_it_says(capsys):
    from bench import recommend

    text = " ".join(page("read-the-results.md").split())
    said = re.search(r"It names Sana \(.*? ([\d.]+) times .*?\), focused \(([\d.]+)\) and "
                     r"compressed \(([\d.]+), in less memory\); at 1024 px it is Sana "
                     r"\(([\d.]+)\)",
                     text)  # fmt: skip
    assert said
    recommend.main([str(DOCS / "plots" / "gpu.json"), "--resolution", "2048"])
    answer = capsys.readouterr().out
    for name, ratio in zip(("sana", "focused", "compressed"), said.groups()[:3], strict=True):
        assert re.search(rf"- {name}: .* {ratio} x faster than softmax", answer), name
    recommend.main([str(DOCS / "plots" / "gpu.json"), "--resolution", "1024"])
    assert f"{said[4]} x faster than softmax" in capsys.readouterr().out


def test_every_missed_goal_has_its_reason():
    missed = set()
    for name in ("goals.json", "goals-gpu.json"):
        missed |= set(figures_of(results.read_report(DOCS / "plots" / name)))
    whole = [whole_figures.read_whole(path) for path in DOCS.glob("plots/whole-models*.json")]
    missed |= {figure for figure, _ in whole_figures.newest_figures(whole)}
    for path in DOCS.glob("plots/scaling*.json"):
        missed |= set(scaling_figures.figures(scaling_figures.read_scaling(path)))
    missed = {figure.goal for figure in missed if figure.verdict == "minimum missed"}
    part = page("goals.md").split("## What is missed")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in part.splitlines() if re.match(r"\| [A-Z]\d", line)]  # fmt: skip
    assert all(len(row) == 3 and all(row) for row in rows)
    named = [goal for row in rows for goal in row[0].split(", ")]
    assert sorted(named) == sorted(missed)


def test_what_was_not_measured_is_no_nan():
    for file in DOCS.glob("*.md"):
        assert "| nan |" not in file.read_text("utf-8"), file.name
    runs = pd.DataFrame({"variant": ["a", "b"], "forward_seconds": [0.002, None]})
    assert scaled_mean(runs, "forward_seconds", 1e3).to_dict() == {"a": "2", "b": ""}


def test_every_goal_that_is_named_is_one():
    known = (ROOT / "bench" / "thresholds.toml").read_text("utf-8")
    for name in ("goals.md", "performance.md", "gpu.md", "gpu-measurements.md"):
        for goal in set(re.findall(r"\b[GUE]\d+\b", page(name))):
            assert re.search(rf"^\[(\w+\.)?{goal}[.\]]", known, re.MULTILINE), (name, goal)


@pytest.mark.parametrize(
    ("file", "gpus", "count"),
    [
        ("scaling-four-h200-all.json", 4, 4),
        ("scaling-two-h200.json", 2, 2),
        ("scaling-two-h200-fsdp2.json", 2, 2),
    ],
)
def test_shares_of_linear_scaling_are_what_the_newest_files_say(file, gpus, count):
    """Of the rows by hand; the tables below them are written from the files."""
    report = scaling_figures.read_scaling(DOCS / "plots" / file)
    lines = page("gpu-measurements.md").split("## Several GPUs")[1].splitlines()
    first = next(i for i, line in enumerate(lines) if file in line)
    own = lines[first : first + count]
    rows = [[cell.strip(" *") for cell in line.split("|")] for line in own]
    for _, _, of, gradients, shares, images, *_ in rows:
        way = "fsdp2" if "FSDP2" in gradients else "overlapped"
        tokens = int(of.split()[-1].replace(",", ""))
        measured = {
            row["mechanism"]: (scaling_figures.share_of_linear(report, row), row)
            for row in report["training"]
            if (row["gpus"], row["tokens"], row["way"]) == (gpus, tokens, way)
        }
        order = ("softmax", "sana", "dydila", "sana*3+softmax")
        names = [name for name in order if name in measured]
        for name, share in zip(names, shares.split(", "), strict=True):
            digits = len(share) - 2
            assert float(share) == round(measured[name][0], digits), (tokens, way, name)
        rates = [round(measured[name][1]["images_per_second"]) for name in names]
        assert [int(rate) for rate in images.split(";")[0].split(", ")] == rates, (tokens, way)


def test_the_page_on_kernels_shows_the_code():
    path = None
    compared = 0
    pieces = re.split(r"^```python\n(.*?)^```", page("write-a-kernel.md"),
                      flags=re.DOTALL | re.MULTILINE)  # fmt: skip
    for text, code in zip(pieces[::2], pieces[1::2], strict=False):
        if named := re.findall(r"`([\w/]+\.py)`:$", text.strip(), re.MULTILINE):
            path = ROOT / named[-1]
        assert path is not None
        assert code.rstrip("\n") in path.read_text("utf-8"), (path, code[:60])
        compared += 1
    assert compared == 10


def test_what_the_page_on_kernels_runs_is_there():
    from attnzoo.ops import dispatch

    text = page("write-a-kernel.md")
    tests = [word for words in commands(text) for word in words if word.endswith(".py")]
    assert len(tests) == 2 and all((ROOT / name).exists() for name in tests)
    assert "def test_gated_norm(" in (ROOT / tests[0]).read_text("utf-8")
    assert "KERNELS = {" in (ROOT / tests[1]).read_text("utf-8")
    assert {"ATTNZOO_TRITON", "TRITON_INTERPRET"} <= set(re.findall(r"[A-Z_]{9,}", text))
    assert dispatch.TABLE["gated_norm"] == ("triton", "torch", "reference")


def test_every_folder_with_kernels_is_in_the_table_of_operators():
    table = page("gpu.md").split("<summary>Every operator")[1].split("</details>")[0]
    named = set(re.findall(r"`(\w+)`", table))
    folders = {path.parent for path in (ROOT / "attnzoo" / "ops").glob("*/triton.py")}
    assert len(folders) > 20
    for folder in folders:
        source = "".join(path.read_text("utf-8") for path in folder.glob("*.py"))
        known = re.findall(r"(?:^def |launched\(\")(\w+)", source, re.MULTILINE)
        assert named & set(known), folder


def test_how_many_training_steps_are_missing_is_what_the_table_lacks():
    text = page("gpu-measurements.md")
    table = text.split("**Size S: ")[1].split("**Size L")[0].strip().splitlines()[2:]
    head, _, *rows = ([cell.strip() for cell in line.split("|")] for line in table)
    lacking = [row for row in rows if not row[head.index("training step, 512 px")]]
    said = re.findall(r"training steps of 512 px of (\d+) mechanisms", text)
    assert said == [str(len(lacking))] * bool(lacking)


def test_the_install_page_names_every_extra_and_variable():
    text = page("install.md")
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    part = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    for extra in re.findall(r"^([\w-]+) = ", part, re.MULTILINE):
        assert f"`{extra}`" in text, extra
    dispatch = (ROOT / "attnzoo" / "ops" / "dispatch.py").read_text("utf-8")
    for variable in set(re.findall(r"\"(ATTNZOO_\w+)\"", dispatch)):
        assert f"`{variable}=" in text, variable
    (libraries,) = re.findall(r"^_LIBRARIES = \((.*)\)$", dispatch, re.MULTILINE)
    for library in re.findall(r"\w+", libraries):
        assert f'`impl="{library}"`' in text, library
    for message in re.findall(r"^\| `([^`]+)` \|", text.split("## If something")[1], re.MULTILINE):
        sources = dispatch + (ROOT / "Makefile").read_text("utf-8")
        assert message in sources, message


def test_the_citation_has_the_version():
    import attnzoo

    assert f"version = {{{attnzoo.__version__}}}" in page("cite.md")


def test_the_api_page_names_what_is_public():
    import attnzoo
    import backbones

    named = re.findall(r"^::: ([\w.]+)$", page("api.md"), re.MULTILINE)
    assert len(named) == len(set(named))
    public = {f"attnzoo.{name}" for name in attnzoo.__all__ if name != "mechanisms"}
    public |= {f"backbones.{name}" for name in backbones.__all__}
    assert public <= set(named)
    for name in named:
        assert pkgutil.resolve_name(name) is not None, name
