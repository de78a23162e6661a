"""From a trained softmax model to one of another attention: what it begins with.

LiT's recipe (arXiv 2501.12976): load every parameter of the trained model except those of the
attention that changes, and train on, for a fifth of its steps, with the trained model as teacher.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backbones import DiT, parse_pattern
from backbones.diffusers_dit import diffusers_folder, load_diffusers
from recipes.lab.console import UserError
from recipes.lab.diffusion import DIFFUSION_PRESETS
from recipes.lab.sampling import read_checkpoint, restored_model
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.distillation import teacher_bytes
from recipes.lab.training.settings import PRESETS, Settings, resumed_settings

SHARE_OF_STEPS = 0.2  # LiT's claim
# What a model's frame is, which a conversion keeps, beside what settings say.
_FRAME = (
    "dim", "depth", "feedforward", "feedforward_ratio", "position", "norm_eps", "frequency_shift",
)  # fmt: skip
_FIXED = ("size", "protocol", "preset", "patch_size")
_OF_ATTENTION = re.compile(r"blocks\.(\d+)\.attention\.")


class Source(NamedTuple):
    """A trained model.

    Attributes:
        name: Of its folder.
        model: In eval mode, on the CPU.
        settings: Of its run; of a model of diffusers those of the recipe for latents.
        step: Of its checkpoint; None for a model of diffusers.
        digest: SHA-256 of its weights as ``distillation.teacher_bytes`` writes them.
        content: Those bytes.
    """

    name: str
    model: DiT
    settings: Settings
    step: int | None
    digest: str
    content: bytes


def open_source(folder: str, weights: str, imports: Sequence[str]) -> Source:
    """Opens a run of softmax attention, or the folder of a diffusers DiT.

    Raises:
        UserError: There is no such run, it has no checkpoint, or its attention is another.
        attnzoo.UsageError: A DiT of diffusers cannot be loaded.
    """
    if diffusers_folder(folder) is not None:
        model = load_diffusers(folder)
        settings = Settings(
            **PRESETS["dit"],
            preset="dit",
            attn="softmax",
            attn_options=dict(model.config.attn_options or {}),
            patch_size=model.config.patch_size,
        )
        return _source(folder, model, settings, None)
    run = Run.open(folder)
    config = run.config()
    settings, _ = resumed_settings(config["settings"], {}, where=str(run.config_file))
    checkpoint = read_checkpoint(run, weights)
    model = restored_model(run, config, checkpoint, imports)
    if model.config.attn != "softmax":
        raise UserError(
            f"{folder} has attention {model.config.attn!r}: a conversion begins with a run of "
            f"softmax"
        )
    return _source(folder, model, settings, checkpoint.step)


def _source(name: str, model: DiT, settings: Settings, step: int | None) -> Source:
    content, digest = teacher_bytes(model)
    return Source(name, model, settings, step, digest, content)


def converted_settings(
    source: Source,
    given: Mapping[str, Any],
    distil: Mapping[str, float],
) -> Settings:
    """The settings of the run that a conversion begins.

    Args:
        source: The trained model.
        given: What the caller asks for, by name, "attn" among it.
        distil: Terms of the teacher and their weights; none trains without it.

    Raises:
        UserError: Something of the frame is asked for, the attention is what is there already, or
            a term does not fit the model.
    """
    given, config = dict(given), source.model.config
    pattern = parse_pattern(given["attn"])
    if pattern.text == "softmax" and source.step is not None:
        raise UserError(
            f"{source.name} has attention 'softmax' already: name another with --attn, or train "
            f"it on with recipes/train.py"
        )
    if source.step is None and "data" not in given:
        raise UserError(f"{source.name} is no run and names no data: give it with --data")
    for name in _FIXED:
        before = getattr(source.settings, name)
        if given.get(name, before) != before:
            raise UserError(
                f"--{name.replace('_', '-')} {given[name]} is not {source.name}'s ({before}): a "
                f"conversion changes the attention and keeps width, depth, patches and what is "
                f"predicted"
            )
    learns = DIFFUSION_PRESETS[source.settings.preset].learn_sigma
    if config.learn_sigma != learns:
        raise UserError(
            f"{source.name} has learn_sigma={config.learn_sigma}, and the recipe "
            f"{source.settings.preset!r} trains with {learns}"
        )
    if "variance" in distil and not learns:
        raise UserError(
            f"--distil variance needs a model that learns its variance, and {source.name} does "
            f"not (learn_sigma is False): leave it out"
        )
    options = given.pop("attn_options", {})
    if "softmax" in pattern.names:  # whose blocks stay as they are
        own = dict(config.attn_options or {})
        own |= options.get("softmax", {}) if pattern.is_mixture else options
        options = {**options, "softmax": own} if pattern.is_mixture else own
        if pattern.is_mixture and not own:
            del options["softmax"]
    first: Any = source.model.blocks[0]
    heads: Any = first.attention.num_heads
    if "softmax" not in pattern.names:
        heads = None  # each mechanism's own: LiT's are few
    elif pattern.is_mixture:
        heads = {"softmax": heads}
    defaults = {"steps": max(1, round(SHARE_OF_STEPS * source.settings.steps))}
    start = {"source": source.name, "step": source.step, "sha256": source.digest}
    return dataclasses.replace(
        source.settings,
        **{
            **defaults,
            **given,
            "attn": pattern.text,
            "attn_options": options,
            "start": start,
            "backbone": {**{name: config[name] for name in _FRAME}, "num_heads": heads},
            "distil": dict(distil) or None,
        },
    )


class Inheritance(NamedTuple):
    """What became of a trained model's tensors, by name.

    Attributes:
        taken: Those that the new model has from it.
        new: Those of the new model that begin anew.
        dropped: Those that the new model has no place for.
        sizes: Numbers in each.
    """

    taken: list[str]
    new: list[str]
    dropped: list[str]
    sizes: dict[str, int]

    def lines(self) -> list[str]:
        """A line for each kind."""
        found = []
        for kind in ("taken", "new", "dropped"):
            names = getattr(self, kind)
            blocks = sorted({int(m[1]) for name in names if (m := _OF_ATTENTION.match(name))})
            where = f", attention of blocks {', '.join(map(str, blocks))}" if blocks else ""
            rest = any(not _OF_ATTENTION.match(name) for name in names)
            what = ", all but attention" if rest else ""
            count = f"{self.sizes[kind] / 1e6:.3g} M numbers"
            found.append(f"{kind}: {len(names)} tensors, {count}{what}{where}")
        return found


@torch.no_grad()
def inherit(source: DiT, target: DiT) -> Inheritance:
    """Gives a new model every tensor of a trained one, except those of attention that changes.

    Raises:
        UserError: Something else than attention is of another shape.
    """
    theirs, ours = source.state_dict(), target.state_dict()
    names = [[block.attention.name for block in model.blocks] for model in (source, target)]

    def stays(name: str) -> bool:
        match = _OF_ATTENTION.match(name)
        return match is None or names[0][int(match[1])] == names[1][int(match[1])]

    taken = [name for name in ours if stays(name) and name in theirs]
    for name in taken:
        if ours[name].shape != theirs[name].shape:
            raise UserError(
                f"{name!r} is {_shape(theirs[name])} in the trained model and "
                f"{_shape(ours[name])} in the new one: give data of as many classes and "
                f"channels, and change no option of what stays"
            )
        ours[name].copy_(theirs[name])
    new = [name for name in ours if name not in taken]
    dropped = [name for name in theirs if name not in taken]
    sizes = {
        kind: sum(tensors[name].numel() for name in group)
        for kind, group, tensors in (
            ("taken", taken, ours), ("new", new, ours), ("dropped", dropped, theirs)
        )
    }  # fmt: skip
    return Inheritance(taken, new, dropped, sizes)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def check_out(source: str, out: Path) -> None:
    """Raises UserError where a conversion would write into what it begins with."""
    if out.resolve() == Path(source).resolve():
        raise UserError(f"--out {out} is the trained model itself; choose another folder")
