"""A run's folder: its configuration, its log, and checkpoints that appear whole or not at all.

config.json                          what the run is
log.jsonl                            one line per step
status.json                          where it stands, see recipes/lab/training/status.py
.lock                                held while a process trains
samples/step-00000100.png            sample grids on the way
checkpoints/step-00000100/           appears by one rename
    model/  ema/                     diffusers folders with safetensors
    optimizer.safetensors
    manifest.json                    step, size and SHA-256 of every file; written last

Nothing is a pickle. A file that is not synced before the rename can be empty after a power cut.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from recipes.lab.console import UserError
from recipes.lab.files import sha256, sync, write_text

KEPT_CHECKPOINTS = 2
# What may lie in a folder that a run died in before its configuration was written.
_TRACES = frozenset({".lock", "config.json.tmp", "status.json", "status.json.tmp"})


class Run:
    """The folder of one run.

    Args:
        folder: Where the run lives; made when first written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config_file = self.folder / "config.json"
        self.log_file = self.folder / "log.jsonl"
        self.status_file = self.folder / "status.json"
        self.lock_file = self.folder / ".lock"
        self.checkpoints = self.folder / "checkpoints"
        self.samples = self.folder / "samples"
        self._unwritten = b""

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

    def make(self) -> None:
        """Makes the folder, unless it holds something else than a run.

        Raises:
            UserError: The folder holds files that are not a run's, or cannot be made.
        """
        try:
            if self.folder.exists() and not self.config_file.exists():
                is_free = self.folder.is_dir() and all(
                    path.name in _TRACES for path in self.folder.iterdir()
                )
                if not is_free:
                    raise UserError(
                        f"{self.folder} holds files that are not a run; choose another --out"
                    )
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder} ({error.strerror}); choose another --out"
            ) from error

    def create(self, config: dict[str, Any], overwrite: bool) -> None:
        """Starts the run.

        Raises:
            UserError: The folder holds another run, and ``overwrite`` is not set, or it holds
                files that are not a run's, or cannot be written to.
        """
        self.make()
        if self.config_file.exists():
            if not overwrite:
                raise UserError(
                    f"{self.folder} already holds a run; continue it with --resume, replace it "
                    f"with --overwrite, or choose another --out"
                )
            for made in (self.checkpoints, self.samples):
                shutil.rmtree(made, ignore_errors=True)
            self.log_file.unlink(missing_ok=True)
        self.write_config(config)

    def write_config(self, config: dict[str, Any]) -> None:
        """Replaces the configuration.

        Raises:
            UserError: The folder cannot be written to.
        """
        try:
            write_text(self.config_file, json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder} ({error.strerror}); choose another --out"
            ) from error

    def config(self) -> dict[str, Any]:
        """The configuration the run was started with."""
        return json.loads(self.config_file.read_text())

    def append_log(self, entry: dict[str, Any]) -> None:
        """Appends one line to the log.

        Raises:
            OSError: The line could not be written; the next call tries again.
        """
        self._unwritten += json.dumps(entry).encode() + b"\n"
        with self.log_file.open("ab") as file:
            size = file.tell()
            try:
                file.write(self._unwritten)
                file.flush()
            except OSError:
                os.ftruncate(file.fileno(), size)  # half a line would spoil the next one
                raise
        self._unwritten = b""

    def read_log(self) -> list[dict[str, Any]]:
        """All whole lines of the log; a line cut off by a crash is left out."""
        if not self.log_file.exists():
            return []
        lines = self.log_file.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def cut_log(self, step: int) -> None:
        """Drops what was logged after ``step``, which a resumed run logs again."""
        kept = [json.dumps(entry) for entry in self.read_log() if entry["step"] <= step]
        write_text(self.log_file, "".join(line + "\n" for line in kept))

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        state: Mapping[str, Any],
        keep_every: int | None = None,
    ) -> Path:
        """Writes a checkpoint under a temporary name, then renames it, then deletes older ones.

        Args:
            step: Its number.
            tensors: Contents of safetensors files, by path.
            texts: Contents of text files, by path.
            state: What else goes into the manifest.
            keep_every: Checkpoints at its multiples are not deleted; nor are the newest two.

        Raises:
            OSError: It could not be written; nothing of it is left, older ones are untouched.
        """
        target = self.checkpoints / f"step-{step:08d}"
        temporary = self.checkpoints / f".tmp-{target.name}"
        self.sweep()
        try:
            self._check_space(tensors)
            for name, contents in tensors.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                # diffusers wants to know what wrote the file.
                save_file(dict(contents), temporary / name, metadata={"format": "pt"})
            for name, text in texts.items():
                (temporary / name).write_text(text)
            files = {
                name: [(temporary / name).stat().st_size, sha256(temporary / name)]
                for name in sorted([*tensors, *texts])
            }
            for path in (*(temporary / name for name in files), *_folders(temporary)):
                sync(path)
            manifest = {"step": step, **state, "files": files}
            write_text(temporary / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            if target.exists():
                self._remove(target)
            os.replace(temporary, target)
            sync(self.checkpoints)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise _as_os_error(error) from error
        # A folder of a later step is one that was passed over as broken: it counts for nothing.
        whole = [folder for folder in self._checkpoint_folders() if _step(folder) <= step]
        for old in whole[:-KEPT_CHECKPOINTS]:
            if keep_every is None or _step(old) % keep_every:
                self._remove(old)
        return target

    def sweep(self) -> None:
        """Removes what an interrupted save has left."""
        for leftover in self.checkpoints.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _check_space(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        needed = sum(
            t.numel() * t.element_size() for part in tensors.values() for t in part.values()
        )
        free = shutil.disk_usage(self.checkpoints).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"No space left on device: it takes {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB "
                f"are free",
            )

    def _remove(self, folder: Path) -> None:
        # By a rename first, so that a crash never leaves half a checkpoint under a real name.
        doomed = folder.with_name(f".tmp-old-{folder.name}")
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def newest_checkpoint(self, warn: Callable[[str], None]) -> tuple[int, Path] | None:
        """(step, folder) of the newest whole checkpoint; a broken one is named and passed over."""
        for folder in reversed(self._checkpoint_folders()):
            try:
                manifest = json.loads((folder / "manifest.json").read_text())
                for name, (size, digest) in manifest["files"].items():
                    path = folder / name
                    if ".." in Path(name).parts or Path(name).is_absolute():
                        raise ValueError(f"{name} lies outside")
                    if path.stat().st_size != size or sha256(path) != digest:
                        raise ValueError(f"{name} is damaged")
                return int(manifest["step"]), folder
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                warn(f"passing over {folder}: {error}")
        return None

    def has_checkpoints(self) -> bool:
        """Whether there is any checkpoint, whole or broken."""
        return bool(self._checkpoint_folders())

    def _checkpoint_folders(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-[0-9]*"), key=_step)


def _step(folder: Path) -> int:
    digits = folder.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def _folders(root: Path) -> list[Path]:
    return [root, *(path for path in root.rglob("*") if path.is_dir())]


def _as_os_error(error: Exception) -> OSError:
    if isinstance(error, OSError):
        return error
    # safetensors wraps the cause into its own text.
    return OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error))
