"""A run as a pipeline folder of diffusers, with a model card.

FOLDER/model_index.json    what diffusers reads first: ``DiTPipeline`` and its parts
FOLDER/transformer/        the model, and the files of mechanisms that are not the zoo's
FOLDER/scheduler/  vae/    of the run; a model of pixels has a decoder that gives them as they are
FOLDER/README.md           the model card
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import attnzoo
from backbones import FlowScheduler, PixelDecoder
from backbones.carried import INDEX, carry
from backbones.pattern import names_in
from recipes.lab.console import UserError
from recipes.lab.data.latents import open_vae
from recipes.lab.diffusion import DIFFUSION_PRESETS
from recipes.lab.evaluation.evaluate import table
from recipes.lab.files import (
    TEMPORARY,
    CannotWrite,
    read_json,
    require_writable,
    share,
    write_text,
)
from recipes.lab.sampling import Checkpoint, read_checkpoint, restored_model
from recipes.lab.training.checkpoint import Run, apart

WEIGHTS = {"average": "ema", "model": "model"}
MOST_CLASSES = 1000  # DiTPipeline calls the null class so
_INDEX = "model_index.json"


def export(
    run: Run,
    out: Path,
    *,
    weights: str = "average",
    vae: str | None = None,
    imports: Sequence[str] = (),
    overwrite: bool = False,
    repository: str | None = None,
) -> Path:
    """Writes a run's newest checkpoint as a pipeline folder, whole or not at all.

    Args:
        run: A trained run.
        out: The folder to make.
        weights: "average" (EMA) or "model".
        vae: Folder or hub id of the VAE; None takes the one the run remembers.
        imports: What the caller has imported already.
        overwrite: Whether to replace an earlier export.
        repository: For the card, where it will be on the hub; None leaves the folder's name.

    Returns:
        The folder.

    Raises:
        UserError: There is no checkpoint, the folder is taken, or something of the run has no
            place in a ``DiTPipeline``.
        attnzoo.InvalidValue: A mechanism's code cannot be carried along.
    """
    _check_free(out, overwrite)
    out = out.resolve()  # "." has no name to write beside
    config = run.config()
    data = config["data"]
    if len(data["class_names"]) > MOST_CLASSES:
        raise UserError(
            f"{run.folder} has {len(data['class_names'])} classes, and diffusers' DiTPipeline "
            f"takes label {MOST_CLASSES} for the null class: it serves {MOST_CLASSES} at most"
        )
    checkpoint = read_checkpoint(run, WEIGHTS[weights])
    model = restored_model(run, config, checkpoint, imports)
    model.register_state_dict_post_hook(lambda _, state, *rest: state.update(apart(state)))
    names = names_in(model.config.attn)
    require_writable(out.with_name(out.name + _INDEX))
    temporary = out.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{out.name}")
    try:
        pipe = _pipeline(model, _scheduler(config), _decoder(run, data, vae), data["class_names"])
        pipe.save_pretrained(temporary)
        for file in temporary.rglob("*.safetensors"):
            share(file, (temporary / _INDEX).stat().st_mode)
        packages = carry(names, temporary / "transformer")
        card = _card(run, config, checkpoint, weights, packages, repository or out.name)
        write_text(temporary / "README.md", card)
        old = out.with_name(f"{temporary.name}-old")
        if out.exists():
            os.replace(out, old)
        os.replace(temporary, out)
        shutil.rmtree(old, ignore_errors=True)
        _sweep(out)
    except (OSError, SafetensorError) as error:  # its own class for what the system refuses
        raise CannotWrite(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def push(folder: Path, repository: str) -> str:
    """Uploads an exported folder to the hub; returns its address.

    Raises:
        UserError: The name is none, nobody is logged in, or the hub is out of reach.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.whoami()  # says at once that nobody is logged in
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=str(folder)))
    except Exception as error:  # the hub's client raises what its own libraries raise
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise UserError(
            f"cannot push to {repository} ({reason}); the folder is whole: once online and logged "
            f"in (hf auth login), run hf upload {repository} {folder}"
        ) from error


def check_repository(name: str) -> str:
    """Returns the name of a repository of the hub.

    Raises:
        UserError: It is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--push {name!r} is no repository such as me/name: {reason}") from error
    if "/" not in name:
        raise UserError(f"--push {name!r} is no repository such as me/name: it lacks the owner")
    return name


def _check_free(out: Path, overwrite: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{str(out)!r} is no folder; choose another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / _INDEX).is_file():
        raise UserError(f"{str(out)!r} holds files that are no export; choose another --out")
    if not overwrite:
        raise UserError(f"{str(out)!r} holds a pipeline; pass --overwrite to replace it")


def _sweep(out: Path) -> None:
    """Removes what exports to the same folder have left that were killed."""
    name = re.compile(
        rf"{re.escape(TEMPORARY)}(\d{{1,7}})-[0-9a-f]{{8}}-{re.escape(out.name)}(-old)?"
    )
    for path in out.parent.iterdir():
        if match := name.fullmatch(path.name):
            try:
                os.kill(int(match[1]), 0)
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)
            except OSError:  # another's
                continue


def _scheduler(config: Mapping[str, Any]) -> Any:
    diffusion = DIFFUSION_PRESETS[config["settings"].get("preset", "tiny")]
    if diffusion.prediction == "flow":
        return FlowScheduler(num_train_timesteps=diffusion.num_train_timesteps)
    return diffusion.scheduler(diffusion.default_sampler, 20)


def _decoder(run: Run, data: Mapping[str, Any], vae: str | None) -> Any:
    facts = data.get("latent")
    if not facts:
        if vae is not None:
            raise UserError(f"{run.folder} was trained on pixels: drop --vae")
        return PixelDecoder()
    remembered = facts.get("place") or run.config()["settings"].get("vae") or ""
    opened = open_vae({**facts, "place": remembered}, vae)
    for name in ("shift_factor", "latents_mean", "latents_std"):
        if facts.get(name):
            raise UserError(
                f"the VAE of {run.folder} has {name}={facts[name]}, and diffusers' DiTPipeline "
                f"divides by scaling_factor only: sample this run with recipes/sample.py"
            )
    return opened


def _pipeline(model: Any, scheduler: Any, decoder: Any, class_names: Sequence[str]) -> Any:
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline

    pipe: Any = DiTPipeline(model, decoder, scheduler)
    pipe.register_to_config(id2label=dict(enumerate(class_names)))
    return pipe


def _card(
    run: Run,
    config: Mapping[str, Any],
    checkpoint: Checkpoint,
    weights: str,
    packages: Sequence[str],
    place: str,
) -> str:
    data, settings = config["data"], config["settings"]
    names = names_in(checkpoint.config["attn"])
    own = sorted(name for name in names if attnzoo.source_of(name))
    mechanisms = "\n".join(
        f"- `{name}`: {attnzoo.get_attention(name).paper or 'a mechanism of its own'}"
        for name in names
    )
    what = "latents of a VAE" if data.get("latent") else "pixels"
    side = data["resolution"] * (data.get("latent") or {}).get("factor", 1)
    # No folder of the author's machine is anybody's business.
    shown = {
        name: os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
        for name, value in settings.items()
    }
    options = json.dumps(checkpoint.config.get("attn_options") or {})
    trust = ", trust_remote_code=True" if own else ""
    parts = [
        _FRONT,
        f"# {Path(place).name}",
        f"A class-conditional diffusion transformer with attention "
        f"`{checkpoint.config['attn']}` (options {options}), trained with attnzoo on {what}; "
        f"images are {side} x {side}.",
        "## Use\n\n```\npip install attnzoo\n```\n\n```python\n"
        "import backbones  # attnzoo's, which lets diffusers know the model\n"
        "from diffusers import DiTPipeline\n"
        f'images = DiTPipeline.from_pretrained("{place}")([0, 1]).images\n```\n\n'
        "The model alone: "
        f'`backbones.DiT.from_pretrained("{place}", subfolder="transformer"{trust})`.',
    ]
    if own:
        listed = ", ".join(f"`{name}`" for name in own)
        parts.append(
            f"The code of {listed} is not attnzoo's. "
            + (f"Install {', '.join(packages)} first." if packages else "")
            + f" What lies in `transformer/` (see `{INDEX}`) is run only when you say so: "
            "read it, and import it before the pipeline is loaded, "
            '`attnzoo.import_mechanisms("FOLDER/transformer/FILE.py")`.'
        )
    classes = ", ".join(f"{i} {name}" for i, name in enumerate(data["class_names"][:20]))
    more = ", ..." if len(data["class_names"]) > 20 else ""
    identity = data.get("identity") or {}
    parts += [
        f"## Mechanism\n\n{mechanisms}",
        f"## Data\n\n{shown.get('data', '')}: {identity.get('images') or 'drawn without end'} "
        f"images, SHA-256 `{identity.get('sha256', 'unknown')}`. Classes: {classes}{more}.",
        f"## Training\n\nStep {checkpoint.step}; weights: {weights}. By `recipes/train.py` of "
        f"attnzoo's checkout with these settings:\n\n```json\n{json.dumps(shown, indent=2)}\n```",
        f"## Metrics\n\n{_metrics(run, checkpoint)}",
        "## Commands\n\n```\npython recipes/sample.py RUN --cfg 4\n"
        "python recipes/evaluate.py RUN\npython recipes/export.py RUN --out FOLDER\n```",
    ]
    return "\n\n".join(parts) + "\n"


_FRONT = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [diffusion-transformer, attention, attnzoo]
---"""


def _metrics(run: Run, checkpoint: Checkpoint) -> str:
    if not run.metrics_file.is_file():
        return "Not evaluated yet (`python recipes/evaluate.py RUN`)."
    result: Any = read_json(run.metrics_file, "the metrics", "evaluate the run again")
    try:
        step, text = result["sampling"].get("trained_steps"), table(result)
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{run.metrics_file} is damaged: evaluate the run again") from error
    note = "" if step in (None, checkpoint.step) else f" These are of step {step}."
    return f"By `recipes/evaluate.py`, whose docs say what they mean.{note}\n\n```\n{text}\n```"
