"""A run's folder: its configuration, its log, and checkpoints that appear whole or not at all.

config.json                          what the run is
log.jsonl                            one line per step
log.held.jsonl                       lines that log.jsonl had no room for when the run ended
status.json                          where it stands, see recipes/lab/training/status.py
.lock                                held while a process trains
samples/step-00000100.png            sample grids on the way
teacher/  conversion.json            of a run that recipes/convert.py began: whom it learns from,
                                     and what it has of the trained model
evaluation/step-00000100-cfg-1-.../  generated images, see recipes/lab/evaluation/shards.py
metrics.json                         what these score, see recipes/lab/evaluation/evaluate.py
classifier.json                      how many of them a classifier accepts
checkpoints/step-00000100/           appears by one rename
    model/  ema/                     diffusers folders with safetensors
    optimizer.safetensors
    manifest.json                    step, size and SHA-256 of every file; written last

Nothing is a pickle. A file that is not synced before the rename can be empty after a power cut.
Nothing is written or deleted through a link: a folder may have come from elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from recipes.lab import files
from recipes.lab.console import UserError, argument
from recipes.lab.files import CannotWrite, read_json, refuse_links, save_tensors, sha256
from recipes.lab.training.run_files import (
    damage_of,
    is_configuration,
    listed_in,
    read_lines,
    read_manifest,
    step_of,
)
from recipes.lab.training.settings import RESTORE

KEPT_CHECKPOINTS = 2
_TEMPORARY = f"{files.TEMPORARY}*"
TRACKER_FOLDERS = ("attnzoo", "wandb", "trackio")
# What a run holds besides its configuration: of training, of evaluation, of trackers.
_MADE = (
    *("checkpoints", "samples", "log.jsonl", "log.held.jsonl", "status.json"),
    *("teacher", "conversion.json"),
    *("evaluation", "metrics.json", "classifier.json", "judge.json", *TRACKER_FOLDERS),
)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without shared memory, such as that of tied weights: safetensors refuses it."""
    places = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    return {
        name: tensor.clone() if places[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in tensors.items()
    }


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _on_disk(file: Path) -> list[Any]:
    """Waits until a file is on the disk; its size and digest, as a manifest lists them."""
    files.sync(file)
    return [file.stat().st_size, sha256(file)]


class Run:
    """The folder of one run.

    Args:
        folder: Where the run lives; made when first written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config_file = self.folder / "config.json"
        self.log_file = self.folder / "log.jsonl"
        self.held_file = self.folder / "log.held.jsonl"
        self.status_file = self.folder / "status.json"
        self.lock_file = self.folder / ".lock"
        self.checkpoints = self.folder / "checkpoints"
        self.samples = self.folder / "samples"
        self.evaluation = self.folder / "evaluation"
        self.metrics_file = self.folder / "metrics.json"
        self.classifier_file = self.folder / "classifier.json"
        self._unwritten: list[bytes] = []

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Opens an existing run.

        Raises:
            UserError: There is no run in the folder, or its configuration is damaged.
        """
        run = cls(folder)
        if not run.config_file.is_file():
            raise UserError(
                f"{folder} holds no run (no config.json); make one with "
                f"python recipes/train.py --out {argument(folder)}"
            )
        run.config()
        return run

    def make(self) -> None:
        """Makes the folder, unless it holds something else than a run.

        Raises:
            UserError: The folder holds files that are not a run's, or cannot be made.
        """
        self.check_new(overwrite=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _is_free(self) -> bool:
        """Whether the folder holds a run, or what a run left that died before it was one."""
        if self.config_file.exists() or self.config_file.is_symlink():
            return is_configuration(self._raw_config())
        return self.folder.is_dir() and all(
            path.name in (".lock", "status.json") or path.name.startswith(files.TEMPORARY)
            for path in self.folder.iterdir()
        )

    def _raw_config(self) -> Any:
        return read_json(self.config_file, "the configuration", RESTORE)

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"cannot write to {self.folder} ({error.strerror}); choose another --out")

    def check_links(self) -> None:
        """Looks whether anything that training writes or deletes is a link.

        Raises:
            UserError: It is, or a folder of the run cannot be read.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file, not a folder; choose another --out")
        for name in (*_MADE, ".lock", "config.json"):
            refuse_links(self.folder, self.folder / name)
        for path in [*self._checkpoint_folders(), *listed_in(self.samples)]:
            refuse_links(self.folder, path)

    def create(self, config: dict[str, Any], overwrite: bool) -> None:
        """Starts the run; an older one is removed with all that belonged to it.

        Files that no recipe makes stay. The caller holds the lock.

        Raises:
            UserError: The folder holds another run, and ``overwrite`` is not set, or it holds
                files that are not a run's, or cannot be written to.
        """
        self.check_new(overwrite)
        if self.config_file.exists():
            for name in _MADE:
                self._discard(self.folder / name)
        self.write_config(config)

    def check_new(self, overwrite: bool) -> None:
        """Looks whether a run can start here; changes nothing.

        Raises:
            UserError: As ``create``.
        """
        try:
            is_taken = self.config_file.exists()
            is_usable = not self.folder.exists() or self._is_free()
        except OSError as error:
            raise self._cannot_write(error) from error
        if not is_usable:
            raise UserError(f"{self.folder} holds files that are not a run; choose another --out")
        if is_taken and not overwrite:
            raise UserError(
                f"{self.folder} already holds a run; continue it with python recipes/train.py "
                f"--resume --out {argument(self.folder)}, replace it with --overwrite, or choose "
                f"another --out"
            )

    def _discard(self, path: Path) -> None:
        """Deletes a file or a folder of the run; of a link the link."""
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise CannotWrite(path, error) from error

    def write_config(self, config: dict[str, Any]) -> None:
        """Replaces the configuration.

        Raises:
            UserError: The folder cannot be written to.
        """
        try:
            files.write_json(self.config_file, config)
        except CannotWrite as error:
            raise self._cannot_write(error) from error

    def config(self) -> dict[str, Any]:
        """The configuration the run was started with; what versions before lacked is filled in.

        Raises:
            UserError: It is missing, damaged, or of something else than a run; it is named.
        """
        config = self._raw_config()
        if not is_configuration(config):
            raise UserError(
                f"{str(self.config_file)!r} is damaged, or not the configuration of a run: it has "
                f"no settings with an attn; {RESTORE}"
            )
        damage = damage_of(config)
        if damage is not None:
            raise UserError(
                f"the configuration {str(self.config_file)!r} is damaged: {damage}; {RESTORE}"
            )
        return config

    def append_log(self, entry: dict[str, Any]) -> None:
        """Appends one line to the log.

        Raises:
            OSError: The line could not be written; the next call tries again.
        """
        self._unwritten.append(json.dumps(entry).encode() + b"\n")
        self._write_waiting()

    def _write_waiting(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        descriptor = os.open(self.log_file, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
        with open(descriptor, "ab") as file:
            size = os.fstat(descriptor).st_size
            try:
                file.write(b"".join(self._unwritten))
                file.flush()
            except OSError:
                os.ftruncate(descriptor, size)  # half a line would spoil the next one
                raise
        self._unwritten = []

    def keep_waiting_log(self) -> str | None:
        """Writes the lines that have found no room yet: to the log, or else beside it.

        Returns:
            What became of them, if not all is as it should be.
        """
        if not self._unwritten:
            return None
        with contextlib.suppress(OSError):
            self._write_waiting()
            return None
        count = len(self._unwritten)
        try:
            files.write_bytes(self.held_file, b"".join(self._unwritten))
        except CannotWrite as error:
            return f"the last {count} lines of {self.log_file.name} are lost: {error.strerror}"
        return (
            f"the last {count} lines of {self.log_file.name} are in {self.held_file}; resuming "
            f"puts them back"
        )

    def read_log(self) -> list[dict[str, Any]]:
        """All whole lines of the log; a line cut off by a crash is left out.

        Raises:
            UserError: A line is damaged, or the log cannot be read; it is named.
        """
        return read_lines(self.log_file)

    def cut_log(self, step: int) -> None:
        """Drops what was logged after ``step``, which a resumed run logs again."""
        entries, held = self.read_log(), read_lines(self.held_file)
        kept = [entry for entry in [*entries, *held] if entry["step"] <= step]
        end = self.log_file.read_bytes()[-1:] if self.log_file.exists() else b""
        # A full disk has no room even for the same lines.
        if kept != entries or end not in (b"", b"\n"):
            text = "".join(json.dumps(entry) + "\n" for entry in kept)
            files.write_text(self.log_file, text)
        self._discard(self.held_file)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        state: Mapping[str, Any],
        keep_every: int | None = None,
        evict: bool = True,
    ) -> Path:
        """Writes a checkpoint under a temporary name, then renames it, then deletes older ones.

        Args:
            step: Its number.
            tensors: Contents of safetensors files, by path.
            texts: Contents of text files, by path.
            state: What else goes into the manifest.
            keep_every: Checkpoints at its multiples are not deleted; nor are the newest two.
            evict: Whether to delete older ones at all.

        Raises:
            UserError: A link stands in the way.
            OSError: It could not be written; nothing of it is left, older ones are untouched.
        """
        target = self.checkpoints / f"step-{step:08d}"
        temporary = self.checkpoints / f"{files.TEMPORARY}{target.name}"
        refuse_links(self.folder, target)
        self.sweep()
        try:
            self._check_space(tensors)
            written: dict[str, Future[list[Any]]] = {}
            # Beside the next file, which is smaller: a digest takes half as long as writing.
            with ThreadPoolExecutor(1) as aside:
                for name in sorted(tensors, key=lambda name: -_bytes_of(tensors[name])):
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    # diffusers wants to know what wrote the file.
                    save_tensors(apart(tensors[name]), temporary / name, {"format": "pt"})
                    written[name] = aside.submit(_on_disk, temporary / name)
                for name, text in texts.items():
                    files.write_text(temporary / name, text)
                    written[name] = aside.submit(_on_disk, temporary / name)
            listed = {name: written[name].result() for name in sorted(written)}
            for folder in (path for path in temporary.rglob("*") if path.is_dir()):
                files.sync(folder)
            files.write_json(temporary / "manifest.json", {"step": step, **state, "files": listed})
            files.sync(temporary)
            if target.exists():
                self._remove(target)
            os.replace(temporary, target)
            files.sync(self.checkpoints)
        except (OSError, SafetensorError) as error:
            raise CannotWrite(target, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if evict:
            # A folder of a later step is one that was passed over as broken: it counts for
            # nothing.
            whole = [folder for folder in self._checkpoint_folders() if step_of(folder) <= step]
            for old in whole[:-KEPT_CHECKPOINTS]:
                if keep_every is None or step_of(old) % keep_every:
                    self._remove(old)
        return target

    def sweep(self) -> None:
        """Removes what an interrupted save has left. The caller holds the lock."""
        # Others write here too: an evaluation beside the training has temporary files of its own.
        for folder, tails in (
            (self.checkpoints, ("",)),
            (self.samples, ("-step-*.png",)),
            (self.folder, ("-config.json", "-status.json", "-log.jsonl", "-log.held.jsonl")),
        ):
            if folder.is_symlink() and folder != self.folder:
                continue
            for leftover in (path for t in tails for path in folder.glob(f"{_TEMPORARY}{t}")):
                with contextlib.suppress(CannotWrite):
                    self._discard(leftover)

    def _check_space(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        needed = sum(map(_bytes_of, tensors.values()))
        free = shutil.disk_usage(self.checkpoints).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"No space left on device: it takes {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB "
                f"are free",
            )

    def _remove(self, folder: Path) -> None:
        # By a rename first, so that a crash never leaves half a checkpoint under a real name.
        doomed = folder.with_name(f"{files.TEMPORARY}old-{folder.name}")
        os.replace(folder, doomed)
        with contextlib.suppress(CannotWrite):
            self._discard(doomed)

    def newest_checkpoint(self, warn: Callable[[str], None]) -> tuple[int, Path] | None:
        """(step, folder) of the newest whole checkpoint; a broken one is named and passed over.

        Raises:
            UserError: The checkpoints, or a file of one, cannot be read, which says nothing about
                what they hold.
        """
        for folder in reversed(self._checkpoint_folders()):
            try:
                manifest = read_manifest(folder)
                for name, (size, digest) in manifest["files"].items():
                    path = folder / name
                    if ".." in Path(name).parts or Path(name).is_absolute():
                        raise ValueError(f"{name} lies outside")
                    if path.stat().st_size != size or sha256(path) != digest:
                        raise ValueError(f"{name} is damaged")
                return manifest["step"], folder
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
                warn(f"passing over {folder}: {error}")
            except OSError as error:
                raise UserError(
                    f"{folder} cannot be read ({error.strerror}), and may be whole; make it "
                    f"readable, or move it away to use the checkpoint before"
                ) from error
        return None

    def checkpoint_names(self) -> list[str]:
        """Names of the checkpoints' folders, oldest first, whole or broken."""
        return [folder.name for folder in self._checkpoint_folders()]

    def _checkpoint_folders(self) -> list[Path]:
        found = [path for path in listed_in(self.checkpoints) if step_of(path) >= 0]
        return sorted(found, key=step_of)
