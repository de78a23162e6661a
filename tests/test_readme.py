"""The README's own commands and code run as they are printed, with fewer steps."""

import re
import shlex
from pathlib import Path

import pytest

from attnzoo import list_attention, registry
from bench import paper_table
from recipes import convert, evaluate, sample, train

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
SCRIPTS = {
    "train": train.main, "sample": sample.main, "evaluate": evaluate.main, "convert": convert.main,
}  # fmt: skip
SHORTER = ("train", "sample", "convert")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_commands_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [
        shlex.split(line, comments=True)
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("python recipes/") and "compare.py" not in line  # tests/test_roads.py
    ]
    assert len(commands) >= 6
    (tmp_path / "mean.py").write_text(own_mechanism())
    before = set(registry._REGISTRY)
    try:
        for _, script, *arguments in commands:
            name = Path(script).stem
            shorter = ["--steps", "2"] if name in SHORTER else []
            assert SCRIPTS[name]([*arguments, *shorter]) == 0, (name, arguments)
    finally:
        for name in set(registry._REGISTRY) - before:
            del registry._REGISTRY[name]
    assert (tmp_path / "runs/digits-sana/metrics.json").exists()


def own_mechanism():
    """The README's own mechanism, as a user would put it into mean.py."""
    (code,) = [code for code in blocks("python") if "register_attention" in code]
    return code


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[3][:30])
def test_code_runs(code):
    before = set(registry._REGISTRY)
    try:
        exec(compile(code, "README.md", "exec"), {})
    finally:
        for name in set(registry._REGISTRY) - before:
            del registry._REGISTRY[name]


def test_the_table_lists_the_whole_zoo():
    listed = re.findall(r"^\| `([a-z-]+)` \|", TEXT, flags=re.MULTILINE)
    assert sorted(listed) == list_attention()


def test_every_link_into_the_repository_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (Path(__file__).parents[1] / target).exists(), target


def test_the_gflops_table_is_what_its_command_prints(tmp_path):
    rows = paper_table.main(["--out", str(tmp_path)])
    assert paper_table.to_readme(rows).strip() in TEXT


def test_what_came_out_is_what_the_results_say():
    """Every tally of the README stands in the page of those runs, which a command wrote."""
    tallies = re.findall(r"\d+ for \w+, \d+ for \w+, \d+ cannot\s+tell", TEXT)
    results = (Path(__file__).parents[1] / "docs" / "results-345-runs.md").read_text()
    assert len(tallies) == 4
    for tally in tallies:
        assert " ".join(tally.split()) in results, tally
