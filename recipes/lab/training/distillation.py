"""A teacher's part of the loss, and the teacher in a run's folder.

LiT (arXiv 2501.12976) distils a linear DiT from a softmax one by the predicted noise and the
variance of the reverse process. The teacher answers in eval mode, without gradient, what the
student is asked: the same noisy images, times and labels, dropped labels too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from attnzoo.errors import UsageError
from backbones import DiT
from recipes.lab.console import UserError
from recipes.lab.diffusion.objective import Diffusion, split_output
from recipes.lab.files import refuse_links, write_bytes, write_text
from recipes.lab.training.settings import Settings

# Weights of the terms: LiT's, and that of LinFusion (arXiv 2409.02097) for features.
TERMS = {"noise": 0.5, "variance": 0.05, "features": 0.5}
_WEIGHTS, _CONFIG = "diffusion_pytorch_model.safetensors", "config.json"


class Distillation:
    """A diffusion's losses with a teacher's terms.

    noise      mean squared difference of the predictions, whatever is predicted
    variance   the same of the learned variance, as the models state it: between -1 and 1
    features   the same of every block's output over the teacher's mean square, mean over blocks

    Args:
        diffusion: What is predicted on which schedule.
        student: What is trained; its blocks are looked into for "features".
        teacher: On the device of the student.
        weights: Of the terms, by name.
    """

    def __init__(
        self, diffusion: Diffusion, student: DiT, teacher: DiT, weights: Mapping[str, float]
    ) -> None:
        self.diffusion, self.student, self.weights = diffusion, student, dict(weights)
        self.teacher = teacher.eval().requires_grad_(False)

    def training_losses(
        self, model: Any, images: Tensor, labels: Tensor, *, timesteps: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """``Diffusion.training_losses``, with "distil_noise" and so on, each (b,), in the loss."""
        inputs: dict[str, Any] = {}
        outputs: list[Tensor] = []
        has_features = "features" in self.weights

        def watched(**given: Any) -> tuple[Tensor]:
            inputs.update(given)
            outputs.append(model(**given)[0])
            return (outputs[0],)

        with _outputs_of_blocks(self.student, has_features) as ours:
            losses = self.diffusion.training_losses(
                watched,  # type: ignore[arg-type]
                images,
                labels,
                timesteps=timesteps,
                noise=noise,
            )
        with torch.no_grad(), _outputs_of_blocks(self.teacher, has_features) as theirs:
            outputs.append(self.teacher(**inputs)[0])
        channels, learns = images.shape[1], self.diffusion.learn_sigma
        mine, wanted = (split_output(output.float(), channels, learns) for output in outputs)
        for name, weight in self.weights.items():
            if name == "features":
                pairs = list(zip(ours, theirs, strict=True))
                terms = [_square(a - b) / _square(b).clamp_min(1e-12) for a, b in pairs]
                term = torch.stack(terms).mean(0)
            else:
                one, other = mine[name == "variance"], wanted[name == "variance"]
                assert one is not None and other is not None
                term = _square(one - other)
            losses[f"distil_{name}"] = term
            losses["loss"] = losses["loss"] + weight * term
        return losses


def _square(values: Tensor) -> Tensor:
    return values.float().square().flatten(1).mean(1)


@contextlib.contextmanager
def _outputs_of_blocks(model: DiT, is_wanted: bool) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        found.append(output)

    handles = [block.register_forward_hook(hook) for block in model.blocks if is_wanted]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def parse_terms(text: str) -> dict[str, float]:
    """ "noise,variance=0.1" -> {"noise": 0.5, "variance": 0.1}; see ``TERMS``.

    Raises:
        UserError: A term is unknown or given twice, or a weight is no number above 0.
    """
    found: dict[str, float] = {}
    for item in text.split(","):
        name, equals, weight = item.strip().partition("=")
        if name not in TERMS:
            raise UserError(f"--distil {name!r} is none of {', '.join(TERMS)}")
        if name in found:
            raise UserError(f"--distil names {name} twice")
        try:
            found[name] = float(weight) if equals else TERMS[name]
        except ValueError:
            raise UserError(f"--distil {item.strip()!r} has no number as its weight") from None
        if not 0 < found[name] < float("inf"):
            raise UserError(f"--distil {item.strip()!r} needs a finite weight above 0")
    return found


def teacher_bytes(teacher: DiT) -> tuple[bytes, str]:
    """The file of a teacher's weights and its SHA-256, which the run's settings hold."""
    tensors = {name: tensor.contiguous() for name, tensor in teacher.state_dict().items()}
    content = save(tensors, metadata={"format": "pt"})
    return content, hashlib.sha256(content).hexdigest()


def write_teacher(folder: Any, teacher: DiT, content: bytes) -> None:
    """Puts a teacher into the folder of a run, as diffusers would save it.

    Raises:
        UserError: A link stands in the way, or the system refuses.
    """
    refuse_links(folder, folder / "teacher")
    write_bytes(folder / "teacher" / _WEIGHTS, content)
    write_text(folder / "teacher" / _CONFIG, teacher.to_json_string())


def read_teacher(folder: Any, digest: str) -> DiT:
    """The teacher in the folder of a run.

    Raises:
        UserError: It is missing, damaged, or another than the run began with.
    """
    try:
        content = (folder / "teacher" / _WEIGHTS).read_bytes()
        config = json.loads((folder / "teacher" / _CONFIG).read_bytes())
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError("its weights are not those that the run began with")
        with torch.random.fork_rng(devices=[]):
            model: Any = DiT.from_config(config)
        model.load_state_dict(load(content))
    except (OSError, ValueError, RuntimeError, SafetensorError, UsageError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the teacher in {folder / 'teacher'} cannot be used: {reason}; restore it, or "
            f"convert again with recipes/convert.py"
        ) from error
    return model


def make_objective(
    settings: Settings, diffusion: Diffusion, student: DiT, folder: Path | None, source: DiT | None
) -> Diffusion | Distillation:
    """What gives a run its losses: its diffusion, with a teacher where its settings have one.

    Args:
        settings: Of the run.
        diffusion: What is predicted on which schedule.
        student: What is trained, on its device.
        folder: Of the run, where the teacher lies.
        source: The teacher, where it need not be read.

    Raises:
        UserError: The teacher cannot be used, or not with these settings.
    """
    if settings.distil is None:
        return diffusion
    if "features" in settings.distil and settings.compile == "on":
        raise UserError("--distil features looks into blocks, which --compile on hides: drop one")
    if source is None:
        assert folder is not None and settings.start is not None
        source = read_teacher(folder, settings.start["sha256"])
    teacher: Any = source.to(next(student.parameters()).device)  # pyright: ignore
    return Distillation(diffusion, student, teacher, settings.distil)
