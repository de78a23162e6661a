"""``python -m backbones``: the presets as a table."""

from __future__ import annotations

import argparse

from attnzoo.console import printing
from backbones.presets import preset_table


def main() -> None:
    """Prints the presets that ``build_backbone`` takes."""
    parser = argparse.ArgumentParser(prog="python -m backbones", description=main.__doc__)
    parser.add_argument(
        "--matched",
        action="store_true",
        help="add the depths at which the true cost is nearest to DiT's at 256 px (seconds)",
    )
    print(preset_table(parser.parse_args().matched))


if __name__ == "__main__":
    printing(main)
