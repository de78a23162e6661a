"""``attnzoo count``: multiply-accumulates of a whole model, counted in up to three ways."""

from __future__ import annotations

import argparse
import importlib.util
import time

import torch

from attnzoo import import_mechanisms
from attnzoo.command import Parser, add_import_flag
from attnzoo.command.units import amount
from attnzoo.console import aligned
from attnzoo.counting import Macs, count_macs, fvcore_macs, measure_macs
from attnzoo.errors import InvalidValue, Unavailable
from backbones.dit import DiT
from backbones.presets import PROTOCOLS, SIZES, build_backbone


def main(arguments: list[str]) -> None:
    """Prints the count.

    Raises:
        UsageError: The command line asks for what cannot be built or counted.
    """
    given = _parser().parse_args(arguments)
    if given.check and importlib.util.find_spec("fvcore") is None:
        raise Unavailable(
            "--check counts with fvcore too, which is not installed: pip install "
            "'attnzoo[bench]', or leave --check out"
        )
    for source in given.imports:
        import_mechanisms(source)
    with torch.device(_device(given)):
        model = _build(given)
    macs = count_macs(model, resolution=given.resolution)
    config = model.config
    print(
        f"{given.attn}, size {given.size}, protocol {given.protocol}: {len(model.blocks)} blocks "
        f"of width {config['dim']}, feed-forward {config['feedforward']}\n"
        f"{given.resolution} px = {macs.grid[0]} x {macs.grid[1]} tokens (latent factor "
        f"{given.latent}, patch {config['patch_size']}), one sample\n"
    )
    print(table(macs))
    if macs.training_step is not None:
        print(f"\na training step {amount(macs.training_step)}MACs")
    print(f"parameters {macs.parameters:,}, {macs.active_parameters:,} of them act on a token")
    if macs.measured:
        print(f"measured, for want of a closed form: {', '.join(macs.measured)}")
    try:
        paper = count_macs(model, resolution=given.resolution, convention="paper")
        print(f"as arXiv 2601.13683 counts: {amount(paper.total)}MACs (docs/gflops.md says why)")
    except InvalidValue:
        print("arXiv 2601.13683 prints no figure of it, so there is none in its convention")
    if given.check:
        print(f"\n{checked(given, macs)}")


def table(macs: Macs) -> str:
    """The parts of a model and their sum."""
    rows = [["part", "MMACs", "share"]]
    for part, number in (*macs.parts.items(), ("all", macs.total)):
        rows.append([part, f"{number / 1e6:,.2f}", f"{number / max(1, macs.total):.1%}"])
    return aligned(rows)


def checked(given: argparse.Namespace, macs: Macs) -> str:
    """The closed form beside the meta device and fvcore's trace of a run.

    Raises:
        InvalidValue: They differ.
    """
    with torch.device(_device(given)):
        model = _build(given)
    ways = {"closed form": (macs.total, 0.0)}
    for name, count in (("meta device", measure_macs), ("fvcore", fvcore_macs)):
        if name == "fvcore":
            model = _build(given)
        start = time.perf_counter()
        found = count(model, resolution=given.resolution)
        total = found if isinstance(found, int) else found.total
        ways[name] = total, time.perf_counter() - start
    rows = [["counted by", "MACs", "seconds"]]
    rows += [[name, f"{total:,}", f"{spent:.1f}"] for name, (total, spent) in ways.items()]
    said = aligned(rows)
    if len({total for total, _ in ways.values()}) > 1:
        raise InvalidValue(f"the counts differ: {said}")
    return f"{said}\nall three agree"


def _device(given: argparse.Namespace) -> str:
    """Where to build what is not run: one's own mechanism may look at numbers."""
    return "cpu" if given.imports else "meta"


def _build(given: argparse.Namespace) -> DiT:
    overrides = {} if given.patch is None else {"patch_size": given.patch}
    return build_backbone(
        given.attn, given.size, given.protocol, given.resolution, given.latent, **overrides
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser("attnzoo count", description=__doc__)
    flag = parser.add_argument
    flag("--attn", required=True, help="mechanism, pattern such as 'sana*3+softmax', or model "
         "of the paper such as DyDi-LiT")  # fmt: skip
    flag("--size", default="S", help=f"{', '.join(SIZES)}; not of a name with a size (default: S)")
    flag("--protocol", default="paper", help=f"{', '.join(PROTOCOLS)} (default: paper)")
    flag("--resolution", type=int, default=256, help="pixels of a side (default: 256)")
    flag("--latent", type=int, default=8, help="pixels per latent pixel; 1 for a model of pixels "
         "(default: 8)")  # fmt: skip
    flag("--patch", type=int, default=None, help="latent pixels per token (default: 2)")
    flag("--check", action="store_true", help="count in three ways: the closed form, torch on "
         "the meta device, and fvcore, which runs the model once on the CPU")  # fmt: skip
    add_import_flag(parser)
    return parser
