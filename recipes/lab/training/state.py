"""What a checkpoint holds of a trainer, and what it may hold for a trainer to go on from it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from recipes.lab.console import UserError
from recipes.lab.distributed import gathered, on_main, placed_like
from recipes.lab.files import CannotWrite
from recipes.lab.training.checkpoint import Run, read_manifest
from recipes.lab.training.ema import by_names_of_state
from recipes.lab.training.trainer import Trainer

_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(trainer: Trainer, run: Run, evict: bool = True) -> str | None:
    """Writes a checkpoint.

    Args:
        trainer: Between two steps.
        run: Whose it is.
        evict: Whether older ones may be deleted.

    Returns:
        None, or why it could not be written; then nothing of it is left.

    Raises:
        NotFinite: There is a NaN or an infinity in the state; nothing is written.
    """
    weights = {name: gathered(tensor) for name, tensor in trainer.model.state_dict().items()}
    trainer.average.collect()
    average = {name: gathered(tensor) for name, tensor in trainer.average.shadow.items()}
    optimizer = {
        f"{name}/{key}": gathered(value)
        for name, parameter in trainer.model.named_parameters()
        for key, value in trainer.optimizer.state.get(parameter, {}).items()
    }
    config = trainer.model.to_json_string()
    parts = {
        f"model/{_WEIGHTS_FILE}": weights,
        f"ema/{_WEIGHTS_FILE}": average,
        "optimizer.safetensors": optimizer,
    }

    def write() -> tuple[str, str] | None:
        broken = _not_finite(parts)
        if broken is not None:
            return "not finite", broken
        try:
            run.save(
                trainer.step,
                parts,
                {"model/config.json": config, "ema/config.json": config},
                {
                    "skipped": trainer.skipped,
                    "skipped_in_a_row": trainer.skipped_in_a_row,
                    "processes": trainer.accelerator.num_processes,
                    "torch": torch.__version__,
                },
                trainer.settings.keep_every,
                evict,
            )
        except CannotWrite as error:
            return "not written", error.strerror or str(error)
        return None

    problem = on_main(trainer.accelerator, write)
    if problem is None:
        return None
    if problem[0] == "not finite":
        raise NotFinite(problem[1])
    return problem[1]


def load_checkpoint(trainer: Trainer, step: int, folder: Path) -> None:
    """Restores a checkpoint that ``Run.newest_checkpoint`` has found whole.

    Args:
        trainer: Of the same settings.
        step: After which it was saved.
        folder: Where it lies.

    Raises:
        UserError: It belongs to another model, or holds what cannot be.
    """
    file = folder / "model" / _WEIGHTS_FILE
    _fill(dict(trainer.model.state_dict()), file, _read(file))
    file = folder / "ema" / _WEIGHTS_FILE
    _fill(trainer.average.shadow, file, by_names_of_state(trainer.model, _read(file)))
    parameters = dict(trainer.model.named_parameters())
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _read(folder / "optimizer.safetensors").items():
        name, _, kind = key.rpartition("/")
        states.setdefault(name, {})[kind] = tensor
    for name, state in states.items():
        parameter = parameters.get(name)
        if parameter is None or not _is_state(state, parameter, step):
            found = ", ".join(
                f"{kind} {list(tensor.shape)} {tensor.dtype}" for kind, tensor in state.items()
            )
            raise UserError(
                f"{folder} is of another model, or damaged: its optimizer has {found} of {name!r}"
            )
        trainer.optimizer.state[parameter] = {
            # The count of steps stays where the optimizer made it: on the CPU, unless it is
            # recorded. A copy: what the file still backs would go with it.
            kind: placed_like(
                tensor, parameter if kind in _MOMENTS or trainer.recorded else torch.empty(())
            ).clone()
            for kind, tensor in state.items()
        }
    manifest = read_manifest(folder)
    trainer.skipped = manifest.get("skipped", 0)
    trainer.skipped_in_a_row = manifest.get("skipped_in_a_row", 0)
    trainer.step = step


class NotFinite(Exception):
    """The state of a run holds a NaN or an infinity; the message names where."""


def _not_finite(parts: dict[str, dict[str, Tensor]]) -> str | None:
    for file, tensors in parts.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return f"{name} of {file}"
    return None


def _is_state(state: dict[str, Tensor], parameter: Tensor, step: int) -> bool:
    """Whether tensors can be AdamW's state of a parameter after ``step``."""
    if state.keys() != {"step", *_MOMENTS}:
        return False
    count = float(state["step"]) if state["step"].ndim == 0 else -1.0
    return (
        count.is_integer()
        and 0 <= count <= step
        and all(
            state[kind].shape == parameter.shape and state[kind].dtype == parameter.dtype
            for kind in _MOMENTS
        )
    )


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of a checkpoint.

    Raises:
        UserError: It holds none, or a number that is not finite.
    """
    folder = next((p for p in file.parents if p.name.startswith("step-")), file.parent)
    advice = f"move {folder} away"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} is no safetensors file ({error}); {advice} to use the checkpoint before"
        ) from error
    broken = _not_finite({file.name: tensors})
    if broken is not None:
        raise UserError(
            f"{file} has numbers that are not finite ({broken}); {advice} to use the checkpoint "
            f"before"
        )
    return tensors


@torch.no_grad()
def _fill(targets: dict[str, Tensor], file: Path, saved: dict[str, Tensor]) -> None:
    """Copies the tensors that a file holds into those of the same names.

    Raises:
        UserError: Names, shapes or types differ.
    """
    differing = sorted(targets.keys() ^ saved.keys()) or [
        name
        for name, tensor in targets.items()
        if (tensor.shape, tensor.dtype) != (saved[name].shape, saved[name].dtype)
    ]
    if differing:
        shown = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        raise UserError(f"{file} is of another model: {len(differing)} tensors differ ({shown})")
    for name, tensor in targets.items():
        tensor.copy_(placed_like(saved[name], tensor))
