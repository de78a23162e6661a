"""Converts a trained softmax model into one of another attention, and trains it on.

    python recipes/convert.py runs/digits-softmax --attn lit --distil noise
    python recipes/convert.py runs/digits-softmax --attn 'sana*3+softmax'
    python recipes/convert.py DiT-XL-2-256 --attn lit --data latents --distil noise,variance

LiT's recipe (arXiv 2501.12976): the new model takes every weight but those of the attention that
changes, and trains on for a fifth of the steps, with the trained model as teacher where --distil
names a term. The model is a run, or the folder of a DiTTransformer2DModel of diffusers. The result
is an ordinary run: train.py resumes it exactly, sample.py and evaluate.py take it.
"""

from __future__ import annotations

import argparse

from recipes.lab.console import Parser, add_import_flag, log, run_script, spelled_out
from recipes.lab.training.flags import add_setting_flags, given_settings


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    given = vars(_parser().parse_args(spelled_out(arguments)))
    # --help does not wait for torch.
    from backbones.pattern import file_name
    from recipes.lab.imports import import_all
    from recipes.lab.training.checkpoint import Run
    from recipes.lab.training.conversion import check_out, converted_settings, open_source
    from recipes.lab.training.distillation import parse_terms
    from recipes.lab.training.session import default_folder, start_from, train

    folder, out, overwrite = given.pop("model"), given.pop("out"), given.pop("overwrite")
    weights, terms = given.pop("weights"), given.pop("distil")
    options = {name: given.pop(name) for name in ("imports", "ignore_memory")}
    import_all(options["imports"])
    given = {"attn": "lit"} | given_settings(given)
    source = open_source(folder, weights, options["imports"])
    settings = converted_settings(source, given, parse_terms(terms) if terms else {})
    name = default_folder({"data": settings.data, "attn": f"{file_name(settings.attn)}-converted"})
    run = Run(out or name)
    check_out(folder, run.folder)
    for line in start_from(source, settings, run, overwrite, options["ignore_memory"]):
        log.info(line)
    return train(settings, run, resume=True, **options)


def _parser() -> Parser:
    parser = Parser("convert", __doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("model", metavar="RUN", help="a run of softmax attention, or a folder "
                        "with a DiTTransformer2DModel of diffusers, which also needs --data; "
                        "what no flag says is as in that run, but for --attn lit")  # fmt: skip
    add_setting_flags(parser, defaults=False)
    group = parser.add_argument_group("conversion and output")
    flag = group.add_argument
    flag("--distil", default=None, metavar="TERM[=WEIGHT],...",
         help="learn from the trained model, too: noise=0.5, variance=0.05, "
         "features=0.5")  # fmt: skip
    flag("--weights", choices=["ema", "model"], default="ema", help="of the trained run")
    flag("--out", default=None, help="folder of the new run (default: runs/DATA-ATTN-converted)")
    flag("--overwrite", action="store_true", default=False, help="replace the run in --out")
    flag("--ignore-memory", action="store_true", default=False,
         help="go on where a step seems too large for the memory")  # fmt: skip
    add_import_flag(group)
    return parser


if __name__ == "__main__":
    run_script(main)
