"""A run's folder: its configuration, its log, and checkpoints that appear whole or not at all.

config.json                          what the run is
log.jsonl                            one line per step
samples/step-00000100.png            sample grids on the way
checkpoints/step-00000100/           appears by one rename
    model/  ema/                     diffusers folders with safetensors
    optimizer.safetensors
    manifest.json                    step, size and SHA-256 of every file; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from recipes.console import UserError

KEPT_CHECKPOINTS = 2


class Run:
    """The folder of one run.

    Args:
        folder: Where the run lives; made when first written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config_file = self.folder / "config.json"
        self.log_file = self.folder / "log.jsonl"
        self.checkpoints = self.folder / "checkpoints"
        self.samples = self.folder / "samples"

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Opens an existing run.

        Raises:
            UserError: There is no run in the folder.
        """
        run = cls(folder)
        if not run.config_file.is_file():
            raise UserError(
                f"{folder} holds no run (no config.json); make one with "
                f"python recipes/train.py --out {folder}"
            )
        return run

    def create(self, config: dict[str, Any], overwrite: bool) -> None:
        """Starts the run's folder.

        Raises:
            UserError: The folder holds another run, and ``overwrite`` is not set, or it holds
                files that are not a run's.
        """
        if self.config_file.exists():
            if not overwrite:
                raise UserError(
                    f"{self.folder} already holds a run; continue it with --resume, replace it "
                    f"with --overwrite, or choose another --out"
                )
            for made in (self.checkpoints, self.samples):
                shutil.rmtree(made, ignore_errors=True)
            self.log_file.unlink(missing_ok=True)
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder} holds files that are not a run; choose another --out")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_whole(self.config_file, json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}") from error

    def config(self) -> dict[str, Any]:
        """The configuration the run was started with."""
        return json.loads(self.config_file.read_text())

    def append_log(self, entry: dict[str, Any]) -> None:
        """Appends one line to the log."""
        with self.log_file.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """All whole lines of the log; a line cut off by a crash is left out."""
        if not self.log_file.exists():
            return []
        lines = self.log_file.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def cut_log(self, step: int) -> None:
        """Drops what was logged after ``step``, which a resumed run logs again."""
        kept = [json.dumps(entry) for entry in self.read_log() if entry["step"] <= step]
        _write_whole(self.log_file, "".join(line + "\n" for line in kept))

    def save(
        self, step: int, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Path:
        """Writes a checkpoint under a temporary name, then renames it; keeps the newest two."""
        target = self.checkpoints / f"step-{step:08d}"
        temporary = self.checkpoints / f".tmp-{target.name}"
        for leftover in self.checkpoints.glob(".tmp-*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary / "model")  # type: ignore[operator]
        ema.save_pretrained(temporary / "ema")  # type: ignore[operator]
        save_file(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {
            "step": step,
            "files": {
                str(path.relative_to(temporary)): [path.stat().st_size, _sha256(path)]
                for path in files
            },
        }
        for path in files:
            _sync(path)
        _write_whole(temporary / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        _sync(self.checkpoints)
        for old in self._checkpoint_folders()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
        return target

    def newest_checkpoint(self, warn: Callable[[str], None]) -> tuple[int, Path] | None:
        """(step, folder) of the newest whole checkpoint; a broken one is named and passed over."""
        for folder in reversed(self._checkpoint_folders()):
            try:
                manifest = json.loads((folder / "manifest.json").read_text())
                for name, (size, digest) in manifest["files"].items():
                    if (folder / name).stat().st_size != size or _sha256(folder / name) != digest:
                        raise ValueError(f"{name} is damaged")
                return manifest["step"], folder
            except (OSError, ValueError, KeyError) as error:
                warn(f"passing over {folder}: {error}")
        return None

    def _checkpoint_folders(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*"))


def load_optimizer(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Restores an optimiser's state from ``Run.save``."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(file).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{name}": tensor.contiguous()
        for index, entries in optimizer.state_dict()["state"].items()
        for name, tensor in entries.items()
    }


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
