"""Images from a run: the checkpoint that is read once, its model, and the VAE behind it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

import attnzoo
from attnzoo.contract import check_option
from attnzoo.errors import UsageError
from backbones import DiT
from backbones.pattern import dotted, names_in
from recipes.lab.compiling import Compiling
from recipes.lab.console import UserError, warn
from recipes.lab.data.latents import decode, open_vae
from recipes.lab.diffusion import DIFFUSION_PRESETS, Recorder, Sampling, sample
from recipes.lab.drawing.pictures import check_grid, save_grid
from recipes.lab.files import refuse_links, require_writable
from recipes.lab.imports import import_remembered
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.ema import by_names_of_state

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_ON_GPUS = ("triton", "flash", "fla", "xformers")  # implementations that no CPU runs
_DECODED_AT_ONCE = 8  # at 256 px a VAE's decoder takes gigabytes for more
_TRIES = 3  # a training run may delete a checkpoint while it is being read


class Checkpoint(NamedTuple):
    """A run's weights as they were read, whatever becomes of the files afterwards.

    Attributes:
        step: Of the training.
        weights: "ema" or "model".
        digest: SHA-256 of the weights' files.
        config: Of the model.
        tensors: Weights and buffers by name.
    """

    step: int
    weights: str
    digest: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read_checkpoint(run: Run, weights: str = "ema") -> Checkpoint:
    """Reads the newest whole checkpoint into memory: what its manifest lists, and nothing else.

    Raises:
        UserError: There is no whole checkpoint.
    """
    for _ in range(_TRIES):
        found = run.newest_checkpoint(warn=warn)
        if found is None:
            # Training goes on from nothing only where there was nothing.
            remedy = (
                "; train it anew with --overwrite"
                if run.checkpoint_names()
                else " yet; train it further"
            )
            raise UserError(f"{run.folder} holds no whole checkpoint{remedy}")
        step, folder = found
        try:
            return _read_listed(step, folder, weights)
        except FileNotFoundError:
            continue  # a newer one has taken its place
    raise UserError(f"the checkpoints of {run.folder} change faster than they are read; try again")


def _read_listed(step: int, folder: Path, weights: str) -> Checkpoint:
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    prefix = f"{weights}/"
    digest, config, tensors = hashlib.sha256(), None, {}
    for name in sorted(files):
        if not name.startswith(prefix):
            continue
        content = (folder / name).read_bytes()
        # Not the files that were looked at a moment ago: those that are used.
        if hashlib.sha256(content).hexdigest() != files[name][1]:
            raise UserError(f"{folder / name} has changed while it was read; try again")
        if name == f"{prefix}config.json":
            config = _model_config(folder / name, content)
        elif name.endswith(".safetensors"):
            digest.update(content)
            try:
                tensors |= load_tensors(content)
            except SafetensorError as error:
                raise UserError(f"{folder / name} is no safetensors file: {error}") from error
    if config is None or not tensors:
        raise UserError(f"{folder} lists no model under {prefix}; sample an older checkpoint")
    return Checkpoint(step, weights, digest.hexdigest(), config, tensors)


def _model_config(file: Path, content: bytes) -> dict[str, Any]:
    """The model's options, refused by name where diffusers would ignore or break on one."""
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is damaged: it is no object")
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    known = typing.get_type_hints(DiT.__init__)
    del known["return"]
    for name, value in options.items():
        if name not in known:
            raise UserError(
                f"{file} has the option {name!r}, which this version of the model does not know"
            )
        try:
            check_option(name, value, known[name])
        except UsageError as error:
            raise UserError(
                f"{file}: {name!r} is {value!r}, which is of the wrong type"
            ) from error
    return options


def restored_model(
    run: Run, config: Mapping[str, Any], checkpoint: Checkpoint, imports: Sequence[str]
) -> DiT:
    """The model of a checkpoint that was read, in eval mode on the CPU."""
    import_remembered(run.folder, config.get("imports", {}), imports)
    for attn in names_in(checkpoint.config.get("attn", config["settings"]["attn"])):
        if attn not in attnzoo.list_attention():
            raise UserError(
                f"{run.folder} was trained with attention {attn!r}, which is not registered: pass "
                f"the file or module that registers it with --import FILE|MODULE"
            )
    with torch.random.fork_rng(devices=[]):  # initial weights, which are then replaced
        model: Any = DiT.from_config(checkpoint.config)
    data = config["data"]
    has = model.config.in_channels, model.config.num_classes
    wants = data["channels"], len(data["class_names"])
    if has != wants:
        raise UserError(
            f"the model in {run.folder} has {has[0]} channels and {has[1]} classes, its "
            f"configuration says {wants[0]} and {wants[1]}: they are of different runs"
        )
    saved = by_names_of_state(model, checkpoint.tensors)
    shapes, stored = (
        {name: tensor.shape for name, tensor in tensors.items()}
        for tensors in (model.state_dict(), saved)
    )
    if differing := sorted({name for name, _ in shapes.items() ^ stored.items()}):
        raise UserError(
            f"the weights of step {checkpoint.step} in {run.folder} do not fit their config: "
            f"{len(differing)} tensors are missing, unexpected or of another shape, "
            f"{differing[0]!r} for one"
        )
    model.load_state_dict(saved)
    return model.eval().requires_grad_(False)


def _usable(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise UserError(
            f"--device {str(name)!r} cannot be used: {reason}; take cpu, or cuda if there is one"
        ) from error
    return device


class RunSampler:
    """Draws images from a run; loads its model, and the VAE behind it, once.

    Args:
        run: A trained run.
        weights: "ema" or "model".
        device: Where to compute; None takes the GPU if there is one.
        vae: Folder or hub id of the VAE that decodes; None takes the one the run remembers.
        imports: What the caller has imported already.
        checkpoint: What to load; None reads the run's newest.
        cuda_graph: Whether to record sampling steps as a CUDA graph, see ``Recorder``.
        compile: Whether to compile the model's blocks, see ``Compiling``.
        calls: How often the model will be called in all, if more often than by one call.
        say: See ``Recorder``.

    Attributes:
        run: What it draws from.
        data: What the run's configuration says of its data.
        model: In eval mode.
        vae: What decodes, or None where the model makes pixels.
        checkpoint: What was loaded; its step and digest, not its tensors.
        image_shape: (channels, height, width) of what it draws.

    Raises:
        UserError: The run has no checkpoint, its mechanism or VAE is missing, or ``vae`` is
            given and the run has none.
    """

    def __init__(
        self,
        run: Run,
        weights: str = "ema",
        device: str | torch.device | None = None,
        *,
        vae: str | None = None,
        imports: Sequence[str] = (),
        checkpoint: Checkpoint | None = None,
        cuda_graph: str = "auto",
        compile: str = "auto",
        calls: int = 0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        config = run.config()
        self.run, self.data = run, config["data"]
        self.device = _usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._recorder = Recorder(cuda_graph, say, self._compiles_no_more)
        self.diffusion = DIFFUSION_PRESETS[config["settings"].get("preset", "tiny")]
        checkpoint = checkpoint or read_checkpoint(run, weights)
        for name, impl in dotted(checkpoint.config.get("attn_options") or {}).items():
            is_interpreted = impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
            is_bound = name.rpartition(".")[2] == "impl" and impl in _ON_GPUS
            if self.device.type == "cpu" and is_bound and not is_interpreted:
                raise UserError(
                    f"{run.folder} was trained with {name}={impl}, which needs a GPU, and there "
                    f"is none"
                )
        model: Any = restored_model(run, config, checkpoint, imports)
        if self.device.type == "cuda":
            model.fuse()  # on a CPU images stay what they have been to the last bit
        self.model: DiT = model.to(self.device)
        self._compile, self._calls, self._say = compile, calls, say or (lambda line: None)
        self._compiling: Compiling | None = None
        self.checkpoint = checkpoint._replace(tensors={})
        channels, side = self.data["channels"], self.data["resolution"]
        self.vae: Any = None
        if facts := self.data.get("latent"):
            # Runs of before the place was noted still have it among their settings.
            remembered = facts.get("place") or config["settings"].get("vae") or ""
            self.vae = open_vae({**facts, "place": remembered}, vae, self.device)
            channels = int(self.vae.config["out_channels"])
            side *= facts["factor"]
        elif vae is not None:
            raise UserError(f"{run.folder} was trained on pixels: drop --vae")
        self.image_shape = (channels, side, side)

    def check(self, labels: Tensor | None = None, **options: Any) -> None:
        """Raises UserError where a call with these arguments would, before any work is done."""
        options["sampler"] = options.get("sampler") or self.diffusion.default_sampler
        self._recorder.check(self.model, self.device, options["sampler"])
        data = self.data
        Sampling(**options).check(
            self.diffusion, len(data["class_names"]), data["channels"], labels
        )

    def __call__(
        self,
        labels: Tensor,
        indices: Tensor | None = None,
        *,
        seed: int = 0,
        sampler: str | None = None,
        **options: Any,
    ) -> Tensor:
        """Draws one image per label.

        Args:
            labels: (n,) int64.
            indices: (n,) int64, which image of the seed each is; None counts from 0.
            seed: Of the start noise.
            sampler: None takes the one that suits the run.
            options: Further ones of ``recipes.lab.diffusion.Sampling``, and ``progress``.

        Returns:
            (n, c, h, w) on the CPU, nominally in [-1, 1]: pixels, decoded where the run is of
            latents.

        Raises:
            UserError: An argument is out of range.
        """
        data = self.data
        indices = torch.arange(len(labels)) if indices is None else indices
        options |= {
            "seed": seed,
            "num_classes": len(data["class_names"]),
            "shape": (data["channels"], data["resolution"], data["resolution"]),
            "sampler": sampler or self.diffusion.default_sampler,
            "device": self.device,
        }
        if self._compiling is None:
            names = {field.name for field in dataclasses.fields(Sampling)} & options.keys()
            how = Sampling(**{name: options[name] for name in names})
            calls = how.steps * math.ceil(len(labels) / max(1, how.batch_size))
            calls = max(self._calls, calls)
            self._compiling = Compiling(self.model, self._compile, calls, self._say)
        drawn = self._compiling.attempt(
            lambda: sample(
                self.model, self.diffusion, labels=labels, indices=indices,
                recorder=self._recorder, **options,
            )
        )  # fmt: skip
        if self.vae is None:
            return drawn.cpu()
        parts = [decode(self.vae, part).cpu() for part in drawn.split(_DECODED_AT_ONCE)]
        # No images: split gives one empty part, which no VAE takes.
        return torch.cat(parts) if len(drawn) else torch.empty(0, *self.image_shape)

    def _compiles_no_more(self, reason: str) -> bool:
        return self._compiling is not None and self._compiling.gives_up(reason)


class NotFinite(UserError):
    """What a model has drawn holds NaNs or infinities."""


def sample_grid(
    draw: RunSampler,
    *,
    classes: Sequence[int] | None = None,
    per_class: int = 4,
    out: Path | None = None,
    cfg: float = 1.0,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> tuple[int, Path]:
    """Draws images and writes them as one picture, one class per column.

    Args:
        draw: Of a run.
        classes: Indices; None takes the first ten.
        per_class: Images of each.
        out: The picture; None names one in the run's samples.
        cfg: Guidance scale.
        seed: Of the start noise.
        progress: Whether to show a bar.
        options: Further ones of ``draw``.

    Returns:
        The number of images, and the picture's path.

    Raises:
        NotFinite: The images hold NaNs or infinities; nothing is written.
        UserError: An argument is out of range, or the picture cannot be written.
    """
    run, count = draw.run, len(draw.data["class_names"])
    if classes is None:
        classes = list(range(min(10, count)))
    if not classes:
        raise UserError("give at least one class, such as --classes 0,1,2")
    outside = [label for label in classes if not 0 <= label <= count]
    if outside:
        raise UserError(
            f"labels must lie in 0..{count} ({count} is the null class), got {outside[0]}"
        )
    if out is None:
        out = refuse_links(run.folder, run.samples / f"cfg-{cfg:g}-seed-{seed}.png")
    if out.suffix.lower() not in PICTURES:
        raise UserError(f"{str(out)!r} is no picture's name; let it end in {', '.join(PICTURES)}")
    labels = torch.tensor(classes, dtype=torch.int64).repeat(per_class)
    draw.check(labels, cfg=cfg, **options)
    check_grid(len(labels), len(classes), draw.image_shape[1], out)
    require_writable(out)
    images = draw(labels, cfg=cfg, seed=seed, progress=progress, **options)
    bad = int((~images.isfinite().flatten(1).all(1)).sum())
    if bad:
        guidance, less = (f"--cfg {cfg:g} is too strong, or ", "lower it, or ")
        if cfg in (0, 1):
            guidance = less = ""
        raise NotFinite(
            f"{bad} of {len(images)} images are not finite, and no picture is written: {guidance}"
            f"the model of step {draw.checkpoint.step} has diverged: {less}train it again with a "
            f"lower rate"
        )
    save_grid(images, out, columns=len(classes))
    return len(images), out
