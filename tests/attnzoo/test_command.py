"""The command ``attnzoo``: what it prints, and what a careless line gets."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys

import pytest

import attnzoo
from attnzoo.command import COMMANDS, doctor, figures, main, recommend, show, units
from attnzoo.command.advice import Choice, Measured, advise, of_whole_models
from attnzoo.command.figures import Figures, Quality, Row, Source
from attnzoo.command.listing import summary
from attnzoo.registry import _REGISTRY


def said(capsys, *arguments, status=0):
    """What a command prints on the stream that its status asks for."""
    assert main(list(arguments)) == status
    streams = capsys.readouterr()
    assert not (streams.out if status else streams.err)
    return streams.err if status else streams.out


def row(mechanism, tokens, over, seconds=1.0, peak=2**20, size="S", source=0, mode="forward"):
    return Row(
        source, mechanism, size, mode, tokens, 4, 1000, seconds, "compiled", 9.0, over, peak
    )  # fmt: skip


def small(*rows, quality=(), device="h100"):
    source = Source(device, "a card", "2030-01-02", "abc", {"torch": "2"}, "x.json")
    return Figures([source], list(rows), list(quality))


@pytest.fixture
def ship(monkeypatch):
    """Puts figures in place of those that ship."""
    return lambda found: monkeypatch.setattr(recommend, "shipped", lambda: found)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0 and f"attnzoo {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("lisst", "did you mean 'list'"),
        ("list --tabel", "unrecognized arguments: --tabel"),
        ("show dydilla", "did you mean 'dydila'"),
        ("show", "required: name"),
        ("show mean --import nowhere.py", "there is no file 'nowhere.py'"),
        ("count --attn dydill", "did you mean 'dydila'"),
        ("count --attn sana --size XL", "unknown size 'XL'; did you mean 'L'"),
        ("count --attn sana --resolution 100", "choose a multiple, such as 96 or 112"),
        ("count --attn sana --resolution -16", "does not divide"),
        ("count --attn sana*0", "needs a count"),
        ("count --attn sana --protocol fair", "unknown protocol 'fair'"),
        ("count", "required: --attn"),
        ("recommend --resolution 1000", "the nearest that does is 992"),
        ("recommend --resolution -1", "must be from 1"),
        ("recommend --resolution big", "'big' is not an integer"),
        ("recommend --memory lots", "write it like 8GiB"),
        ("recommend --memory=-8GiB", "write it like 8GiB"),
        ("recommend --memory 8", "as in 8GiB"),
        ("recommend --size XL", "there are of L, S"),
        ("recommend --device a100", "no figures of device 'a100', forward; there are of h100"),
        ("recommend --resolution 16384", "too far from what was measured"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    line = said(capsys, *arguments.split(), status=2)
    assert line.startswith("error: ") and line.count("\n") == 1 and message in line


def test_a_bug_shows_its_traceback(monkeypatch):
    monkeypatch.setattr(show, "options", lambda cls: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["show", "sana"])


def test_the_command_needs_no_diffusers_until_it_counts():
    code = """
import sys
sys.modules["diffusers"] = None
from attnzoo.command import main
for arguments in (["--help"], ["list"], ["show", "sana"], ["recommend"]):
    assert main(arguments) == 0, arguments
assert "backbones" not in sys.modules and "torch._dynamo" not in sys.modules
assert main(["count", "--attn", "sana"]) == 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: attnzoo count needs the backbone")


def test_recommend_offers_the_devices_that_it_has_figures_of():
    offered = re.search(r"whose figures: (.*)", recommend._parser().format_help())
    devices = {source.device for source in figures.shipped().sources}
    assert offered and set(re.findall(r"h\d+|cpu", offered[1])) == devices


def test_without_a_command_the_zoo_is_listed(capsys):
    assert said(capsys) == said(capsys, "list")
    assert said(capsys, "--table") == said(capsys, "list", "--table")
    assert said(capsys, "--version") == f"attnzoo {attnzoo.__version__}\n"


@pytest.mark.parametrize("name", ["dydila", "local", "softmax", "gated"])
def test_show_has_every_option_with_its_reason(name, capsys):
    text = said(capsys, "show", name)
    cls = attnzoo.get_attention(name)
    for field in dataclasses.fields(cls.Config):
        assert f"\n  {field.name} = {field.default!r}\n" in text
    assert "https://arxiv.org/abs/" in text and "Cost per sample" in text
    assert "\n  reference  runs\n" in text and f"docs/mechanisms/{name}.md" in text


def test_show_reads_comments_beside_and_above_options():
    text = show.options(attnzoo.get_attention("dydila"))
    assert "n_P: 3, 5, 7 for S, B, L" in text and "added to the normalizer" in text
    assert "\"redundancy\" adds Q', K' (the method)" in text
    assert "takes float, or 'increasing'" in text


def test_show_counts_what_the_layer_counts():
    table = show.cost("sana")
    total = attnzoo.build_attention("sana", 384).macs((64, 64))
    assert f"{total / 1e6:,.2f}" in table.splitlines()[-1]


OF_NUMBERS = """
import attnzoo, enum, torch
from dataclasses import dataclass, field
Kind = enum.Enum("Kind", {"FAST": "fast", "TWO": 2})
@dataclass(frozen=True, kw_only=True)
class Config(attnzoo.AttentionConfig):
    width: int
    sizes: tuple[int, ...] = field(default_factory=lambda: (1, 2))
    kind: Kind | None = Kind.FAST
    kinds: tuple[Kind, ...] = (Kind.FAST, Kind.TWO)
@attnzoo.register_attention("needy")
class Needy(attnzoo.Attention):
    Config = Config
    def forward(self, x, grid):
        return x
@attnzoo.register_attention("of-numbers")
class OfNumbers(attnzoo.Attention):
    def __init__(self, context, config):
        super().__init__(context, config)
        parts = [attnzoo.build_attention(z, self.dim) for z in ("sana", "softmax")]
        self.parts = torch.nn.ModuleList(parts)
    def forward(self, x, grid):
        largest = x.abs().max().item()
        return sum(part(x, grid) for part in self.parts) * min(largest, 1.0)
"""


@pytest.fixture
def of_numbers(tmp_path):
    (tmp_path / "mine.py").write_text(OF_NUMBERS)
    yield str(tmp_path / "mine.py")
    for name in ("needy", "of-numbers"):
        _REGISTRY.pop(name, None)


def test_count_takes_a_mechanism_of_your_own_made_of_others(of_numbers, monkeypatch, capsys):
    mixture, *small = "of-numbers*3+softmax", "--size", "tiny", "--import", of_numbers
    small += ["--resolution", "64"]
    monkeypatch.setattr("sys.argv", ["backbones", mixture, *small])
    importlib.import_module("backbones.__main__").main()
    blocks = capsys.readouterr().out
    text = said(capsys, "count", "--attn", mixture, *small, "--check")
    assert "for want of a closed form: of-numbers" in text and "all three agree" in text
    numbers = {line.split()[0]: line.split()[1:] for line in blocks.splitlines()}
    assert numbers["blocks.0"][0] == "of-numbers" and numbers["blocks.3"][0] == "softmax"


def test_show_says_what_an_option_is_that_has_no_plain_default(of_numbers, capsys):
    text = said(capsys, "show", "needy", "--import", of_numbers)
    assert "  width, to be given\n" in text and "  sizes = (1, 2)\n" in text
    assert "  kind = 'fast'\n      takes 'fast', 'TWO'\n" in text
    assert "  kinds = ('fast', 2)\n" in text
    assert f"attnzoo count --attn needy --import {of_numbers} measures it" in text


def test_show_takes_a_mechanism_of_your_own(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import attnzoo, torch.nn as nn\n"
        "@attnzoo.register_attention('mean-shown')\n"
        "class Mean(attnzoo.Attention):\n"
        '    """Every token sees the mean."""\n'
        "    def forward(self, x, grid):\n"
        "        return x.mean(1, keepdim=True).expand_as(x)\n"
    )
    try:
        text = said(capsys, "show", "mean-shown", "--import", str(tmp_path / "mine.py"))
    finally:
        _REGISTRY.pop("mean-shown", None)
    assert "Every token sees the mean" in text and "registered by" in text
    assert "no closed form" in text and "auto       runs" in text and "docs/" not in text
    assert summary(type("Untold", (attnzoo.Attention,), {})) == ""  # not its parent's
    assert "\nfrom " not in text and "grows as" not in text


def test_count_agrees_with_the_library(capsys):
    import torch

    from attnzoo.counting import count_macs
    from backbones import build_backbone

    text = said(capsys, "count", "--attn", "sana*3+softmax", "--size", "tiny", "--check")
    with torch.device("meta"):
        macs = count_macs(build_backbone("sana*3+softmax", "tiny"), resolution=256)
    for way in ("closed form", "meta device", "fvcore"):
        assert any(
            line.startswith(way) and f"{macs.total:,}" in line for line in text.splitlines()
        )
    assert "all three agree" in text and f"parameters {macs.parameters:,}" in text
    pixels = said(capsys, "count", "--attn", "sana", "--size", "tiny", "--latent", "1",
                  "--patch", "4", "--resolution", "64")  # fmt: skip
    assert "64 px = 16 x 16 tokens (latent factor 1, patch 4)" in pixels


def test_count_check_needs_fvcore(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore", None)
    line = said(capsys, "count", "--attn", "sana", "--check", status=2)
    assert "pip install 'attnzoo[bench]'" in line and line.count("\n") == 1


def test_doctor_calls_what_it_speaks_of(capsys, monkeypatch):
    asked = []

    def why_not(mechanism, impl):
        asked.append(impl)
        return (
            "impl='flash' cannot run: broken; or choose impl='torch'" if impl == "flash" else None
        )

    monkeypatch.setattr(doctor, "why_not", why_not)
    text = said(capsys, "doctor")
    assert {"torch", *doctor.LIBRARIES} <= set(asked)
    assert "in half precision: NO\n             impl='flash' cannot run: broken\n" in text
    assert "natten     NATTEN" in text and "built for" in text


def test_doctor_says_why_there_are_no_kernels_in_c(monkeypatch):
    from attnzoo.ops import native_build

    monkeypatch.setenv("ATTNZOO_NATIVE", "0")
    assert "ATTNZOO_NATIVE=0" in doctor._why_no_native()
    monkeypatch.delenv("ATTNZOO_NATIVE")
    monkeypatch.setattr(native_build, "library", lambda: None)
    monkeypatch.setenv("CC", "no-such-compiler -O3")
    assert "no 'no-such-compiler'" in doctor._why_no_native()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30), ("8 GB", 8 * 10**9), ("8g", 8 * 2**30), (" 0.5 gib ", 2**29),
        ("300MiB", 300 * 2**20), ("1 TB", 10**12), ("1024", 1024), ("12 B", 12),
    ],
)  # fmt: skip
def test_amounts_of_memory(text, size):
    assert units.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "8iB", "8 GiB GiB", "1e3", "9" * 400 + "g"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(attnzoo.InvalidValue, match="write it like"):
        units.parse_bytes(text)


def test_what_ships_answers_and_says_how_it_knows(capsys):
    found = figures.shipped()
    text = said(capsys, "recommend", "--resolution", "1024", "--memory", "8 GB")
    rows = {line.split()[0]: line for line in text.splitlines() if " measured [" in line}
    assert {"softmax", "sana", "dydila"} <= rows.keys()
    numbers = [int(number) for number in re.findall(r"^- \[(\d+)\]", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    # A file may have one mode of one size and device alone.
    kinds = {(found.sources[r.source].device, r.size, r.mode) for r in found.rows}
    others = [said(capsys, "recommend", "--resolution", "1024", "--device", device,
                   "--size", size, "--mode", mode)
              for device, size, mode in sorted(kinds)]  # fmt: skip
    every = "".join([text, *others])
    for source in found.sources:
        assert source.commit in every and source.date in every and source.device_name in every
    sana = next(r for r in found.of("h100", "S", "forward")
                if (r.mechanism, r.tokens) == ("sana", 4096))  # fmt: skip
    assert f" {sana.over_softmax:.2f} " in rows["sana"] and " 1.00 " in rows["softmax"]
    number = rows["sana"].split(" measured ")[1].strip()
    assert f"- {number} measured on {found.sources[sana.source]}" in text
    assert " 256 tokens, 3 seeds" in said(capsys, "recommend", "--resolution", "256")
    between = said(capsys, "recommend", "--resolution", "768")
    assert "interpolated" in between and "768 px was not measured" in between
    beyond = said(capsys, "recommend", "--resolution", "4096")
    assert "estimated" in beyond and "interpolated\n" not in beyond


def test_softmax_wins_where_it_does(ship, capsys):
    ship(small(row("softmax", 256, 1.0), row("sana", 256, 1.3), row("softmax", 4096, 1.0),
               row("sana", 4096, 0.5)))  # fmt: skip
    text = said(capsys, "recommend", "--resolution", "256")
    assert "- softmax: the fastest" in text and "Softmax wins in time" in text
    assert "Softmax wins" not in said(capsys, "recommend", "--resolution", "1024")


def test_times_of_two_runs_are_in_one_unit(ship, capsys):
    """A slower clock makes no mechanism slower: its ratio was measured beside its own softmax."""
    ship(small(row("softmax", 4096, 1.0, seconds=1.0), row("sana", 4096, 0.5, seconds=2.0)))
    assert "0.50" in said(capsys, "recommend")


def test_what_does_not_fit_is_left_out_or_the_batch_gets_smaller(ship, capsys):
    ship(small(row("softmax", 4096, 1.0, peak=2**30), row("sana", 4096, 0.5, peak=3 * 2**30)))
    text = said(capsys, "recommend", "--memory", "2GiB")
    assert "Do not fit into 2 GiB: sana (3 GiB)" in text and "batch of 4 with" in text
    assert "batch of 1 (of 2 nothing fits)" in said(capsys, "recommend", "--memory", "300MiB")
    assert "Nothing fits" in said(capsys, "recommend", "--memory", "300MiB", "--batch", "4")


def test_a_cpu_without_memory_figures(ship, capsys):
    ship(small(row("softmax", 256, 1.0, peak=0), row("sana", 256, 0.9, peak=0), device="cpu"))
    text = said(capsys, "recommend", "--resolution", "256", "--device", "CPU")
    assert "sana: the fastest; " in text and "least memory" not in text
    line = said(capsys, "recommend", "--resolution", "256", "--device", "cpu", "--memory", "8GiB",
                status=2)  # fmt: skip
    assert "it was not measured on cpu" in line


def test_quality_of_another_scale_is_told_and_does_not_count(ship, capsys):
    quality = [Quality(name, 16, "loss", True, value, 0.1, 3, "digits")
               for name, value in (("softmax", 0.5), ("slow", 0.1))]  # fmt: skip
    ship(small(row("softmax", 4096, 1.0), row("slow", 4096, 2.0), quality=quality))
    text = said(capsys, "recommend")
    assert "Beaten in everything that was compared: slow." in text
    assert "small scale only" in text and "the best is slow with 0.1000; softmax 0.5000" in text


def test_tokens_count_whatever_encodes_the_image(capsys):
    assert recommend.tokens_of(1024) == 4096
    assert recommend.tokens_of(1024, latent=32, patch=1) == 1024
    text = said(capsys, "recommend", "--latent", "32", "--patch", "1")
    assert "1024 px = 1,024 tokens" in text


def test_between_sizes_times_over_softmax_are_drawn():
    """Softmax's own time bends: a time on a straight line would say 8 where 4 is told."""
    rows = [Measured("softmax", n, t, None, 1.0, "compiled") for n, t in
            ((1, 1.0), (4, 2.0), (16, 32.0))]  # fmt: skip
    rows += [Measured("sana", n, t, None, 1.0, "compiled") for n, t in ((1, 2.0), (16, 64.0))]
    found = {c.label: c for c in of_whole_models(rows, 4, 1, {})[0]}
    assert found["sana"].seconds == pytest.approx(4.0)
    assert not found["sana"].is_measured and found["sana"].how == "interpolated"
    assert found["softmax"].is_measured


def test_what_shows_the_same_beats_nobody():
    found = [Choice("a", 1.0, 1.0, 5.0, True), Choice("b", 2.0, 2.0, 4.99999, True)]
    lines = advise(found, None, None, True)
    assert len(lines) == 2 and "Beaten in everything that was compared: b." in lines


def test_figures_come_back_as_they_were_written():
    found = small(row("sana", 256, 0.9), quality=[Quality("a", 1, "m", True, 1.0, 0.0, 2, "d")])
    again = figures.loads(figures.dumps(found))
    assert again == found and json.loads(figures.dumps(found))["rows"][0][1] == "mechanism"
