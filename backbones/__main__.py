"""``python -m backbones``: the presets as a table, or what the blocks of one model cost."""

from __future__ import annotations

import argparse

import torch

from attnzoo import import_mechanisms, source_of
from attnzoo.command import add_import_flag
from attnzoo.console import aligned, printing
from attnzoo.counting import count_macs
from attnzoo.errors import UsageError
from backbones.pattern import names_in
from backbones.presets import PROTOCOLS, SIZES, build_backbone, preset_table


def main() -> None:
    """Prints the presets that ``build_backbone`` takes, or the blocks of one model."""
    parser = argparse.ArgumentParser(prog="python -m backbones", description=main.__doc__)
    flag = parser.add_argument
    flag("attn", nargs="?", help="mechanism, pattern such as 'sana*3+softmax', or model")
    flag("--size", default="S", choices=SIZES, help="unless the model's name has one (default: S)")
    flag("--protocol", default="paper", choices=PROTOCOLS, help="of that model (default: paper)")
    flag("--resolution", type=int, default=256, help="of that model, pixels (default: 256)")
    flag(
        "--matched",
        action="store_true",
        help="add the depths at which the true cost is nearest to DiT's at 256 px (seconds)",
    )
    add_import_flag(parser)
    given = parser.parse_args()
    if given.attn is None:
        print(preset_table(given.matched))
        return
    try:
        for source in given.imports:
            import_mechanisms(source)
        print(block_table(given.attn, given.size, given.protocol, given.resolution))
    except UsageError as error:
        parser.error(str(error))


def block_table(attn: str, size: str, protocol: str, resolution: int) -> str:
    """Multiply-accumulates of every block of a model, and their sum, as a table to read.

    Raises:
        attnzoo.InvalidValue: See ``build_backbone``.
    """
    # One's own mechanism may look at numbers.
    with torch.device("cpu" if any(map(source_of, names_in(attn))) else "meta"):
        model = build_backbone(attn, size, protocol, resolution)
    macs = count_macs(model, resolution=resolution)
    names = {f"blocks.{index}": b.attention.name for index, b in enumerate(model.blocks)}
    rows = [["module", "attention", *macs.parts, "MMACs"]]
    for module, parts in [*macs.blocks.items(), ("all", macs.parts)]:
        numbers = [parts.get(part, 0) for part in macs.parts]
        shown = [f"{number / 1e6:.2f}" for number in (*numbers, sum(numbers))]
        rows.append([module, names.get(module, ""), *shown])
    return aligned(rows, left=len(rows[0]))


if __name__ == "__main__":
    printing(main)
