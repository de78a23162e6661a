"""What several processes must give alike: a run after ``kill -9``, latents, metrics.

All starts are those of a user, on a small model, most of them side by side.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from attnzoo.errors import Unavailable
from bench.checks import WrongStep
from bench.isolate import one_line
from bench.launch import ROOT, end, last_words
from bench.scaling.launch import start
from recipes.lab.files import read_json
from recipes.lab.training.checkpoint import Run

# Steps, and steps between checkpoints: on a GPU a step of the small model takes milliseconds.
LENGTHS = {"cuda": (400, 100), "cpu": (10, 2)}
SECONDS = 150.0  # of one start
_DYING = 45.0  # that torchrun may take to notice
MECHANISM = "dydila"
CHECKS = ("kill", "encode", "evaluate")


class Checks:
    """Runs the checks of so many processes.

    Args:
        processes: Of every start but those of one.
        devices: GPUs that they see; None is a CPU.
        folder: For everything that they write.
        deadline: By ``time.monotonic``.
    """

    def __init__(
        self, processes: int, devices: Sequence[int] | None, folder: Path, deadline: float
    ) -> None:
        self.processes, self.devices, self.folder = processes, devices, folder
        self.deadline = deadline
        self.steps, self.every = LENGTHS["cpu" if devices is None else "cuda"]
        folder.mkdir(parents=True)

    def run(
        self, wanted: Sequence[str] = CHECKS
    ) -> Iterator[tuple[str, dict[str, Any] | None, str]]:
        """Each check as it ends: its row, or None and why it could not be made."""
        with ThreadPoolExecutor(4) as pool:
            whole = pool.submit(self._train, self.folder / "whole")
            makers: dict[str, Callable[[Future[Run]], dict[str, Any]]] = {
                "kill": self.killed, "encode": self.encoded, "evaluate": self.evaluated,
            }  # fmt: skip
            names = {pool.submit(makers[name], whole): name for name in wanted}
            for future in as_completed(names):
                yield names[future], *_outcome(future)

    def killed(self, whole: Future[Run]) -> dict[str, Any]:
        """Kills one process during training, resumes, and compares with ``whole``."""
        folder = self.folder / "killed"
        process = self._start(self._training(folder), self.processes, "killed")
        try:
            run, rank = Run(folder), self.processes - 1
            while not run.checkpoint_names():
                if process.poll() is not None or time.monotonic() > self.deadline:
                    raise WrongStep(f"no checkpoint came: {self._said('killed')}")
                time.sleep(0.005)
            os.kill(_process_of(process.pid, rank, self.processes), signal.SIGKILL)
            begun, by_itself = time.monotonic(), True
            try:
                process.wait(max(1.0, min(_DYING, self.deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                by_itself = False
        finally:
            end(process)
        noticed, step = time.monotonic() - begun, len(run.read_log())
        if step >= self.steps:
            raise WrongStep("training was done before the process was killed")
        before, reference = run.read_log(), whole.result()
        found = run.newest_checkpoint(lambda line: None)
        begun = time.monotonic()
        self._train(folder, "resumed")
        losses = [entry["loss"] for entry in reference.read_log()]
        equal, tensors, largest = _differences(reference, run)
        return {
            "check": "kill", "mechanism": MECHANISM, "processes": self.processes,
            "equal": equal == tensors, "tensors": tensors, "largest_difference": largest,
            "killed": rank, "at_step": step, "resumed_from": found[0] if found else 0,
            # Whether two uninterrupted runs would be equal, as far as these two were.
            "equal_before": [entry["loss"] for entry in before] == losses[:step],
            "seconds_to_end": noticed, "ended_by_itself": by_itself,
            "seconds_to_resume": time.monotonic() - begun,
        }  # fmt: skip

    def encoded(self, _: Future[Run]) -> dict[str, Any]:
        """Encodes a folder by one process and by all."""
        images, vae = self.folder / "images", self.folder / "vae"
        _make_images(images)
        _make_vae(vae)
        manifests = self._twice(lambda out: [
            "encode", str(images), str(out / "latents"), "--vae", str(vae), "--resolution", "32",
            "--shard-size", "4", "--batch-size", "4",
        ], "encode", "latents/manifest.json")  # fmt: skip
        one, many = manifests
        return {
            "check": "encode", "processes": self.processes, "equal": one == many,
            "shards": len(one["shards"]), "images": one["count"],
        }  # fmt: skip

    def evaluated(self, whole: Future[Run]) -> dict[str, Any]:
        """Evaluates a run by one process and by all."""
        trained = whole.result().folder

        def arguments(out: Path) -> list[str]:
            shutil.copytree(trained, out / "run")
            cache = self.folder / "evaluators"  # trained by whoever comes first
            return ["evaluate", str(out / "run"), "--samples", "64", "--shard-size", "4",
                    "--steps", "4", "--held-out", "64", "--cache", str(cache)]  # fmt: skip

        one, many = self._twice(arguments, "evaluate", "run/metrics.json")
        if (one["processes"], many["processes"]) != (1, self.processes):
            raise WrongStep(f"{many['processes']} of {self.processes} processes evaluated")
        parts = ("results", "real_floor", "held_out", "evaluator", "reference")
        for result in (one, many):
            for scores in result["results"].values():
                scores.pop("seconds", None)
        scores = [scores for result in one["results"].values() for scores in result.values()]
        return {
            "check": "evaluate", "mechanism": MECHANISM, "processes": self.processes,
            "equal": all(one[part] == many[part] for part in parts), "metrics": len(scores),
            "differing": [part for part in parts if one[part] != many[part]],
        }  # fmt: skip

    def _twice(
        self, arguments: Callable[[Path], list[str]], name: str, file: str
    ) -> list[dict[str, Any]]:
        """Starts a recipe in one process and in all, side by side; what both wrote."""
        begun = []
        for count in (1, self.processes):
            out = self.folder / f"{name}-{count}"
            out.mkdir()
            recipe, *rest = arguments(out)
            script = [str(ROOT / "recipes" / f"{recipe}.py"), *rest]
            begun.append((out, self._start(script, count, out.name)))
        try:
            for out, process in begun:
                self._wait(process, out.name)
        finally:
            for _, process in begun:
                end(process)
        return [read_json(out / file) for out, _ in begun]

    def _train(self, folder: Path, name: str = "whole") -> Run:
        process = self._start(self._training(folder), self.processes, name)
        try:
            self._wait(process, name)
        finally:
            end(process)
        return Run(folder)

    def _training(self, folder: Path) -> list[str]:
        per = max(2, 16 // self.processes)
        options = {
            "out": folder, "attn": MECHANISM, "steps": self.steps, "size": "tiny",
            "checkpoint-every": self.every, "sample-every": 10**6, "diagnose-every": 10**6,
            "batch-size": per * self.processes,
            "bucket-mb": 1,  # several, of a small model
        }  # fmt: skip
        return [str(ROOT / "recipes" / "train.py"), *(f"--{k}={v}" for k, v in options.items())]

    def _start(self, script: list[str], processes: int, name: str) -> subprocess.Popen[bytes]:
        devices = None if self.devices is None else self.devices[:processes]
        return start(script, processes, devices, self.folder / f"{name}.txt")

    def _wait(self, process: subprocess.Popen[bytes], name: str) -> None:
        try:
            process.wait(max(1.0, min(SECONDS, self.deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            raise WrongStep(f"{name} took too long: {self._said(name)}") from None
        if process.returncode:
            raise WrongStep(f"{name} ended with {process.returncode}: {self._said(name)}")

    def _said(self, name: str) -> str:
        return last_words(self.folder / f"{name}.txt")


def _outcome(future: Future[dict[str, Any]]) -> tuple[dict[str, Any] | None, str]:
    try:
        return future.result(), ""
    except Exception as error:  # of a recipe or of the network, anything
        return None, one_line(error)


def _process_of(launcher: int, rank: int, processes: int) -> int:
    """The process of a rank that a launcher has started; the launcher, where it is the only one.

    Raises:
        Unavailable: This system does not say.
    """
    if processes == 1:
        return launcher
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        for child in children:
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    raise Unavailable("which process to kill is found by /proc, and this system has none")


def _differences(one: Run, other: Run) -> tuple[int, int, float]:
    """Of the newest checkpoints: tensors that are equal, all tensors, the largest difference."""
    folders = [run.newest_checkpoint(lambda line: None) for run in (one, other)]
    if None in folders or folders[0][0] != folders[1][0]:  # type: ignore[index]
        raise WrongStep(f"the runs end with other checkpoints: {folders}")
    equal, tensors, largest = 0, 0, 0.0
    for file in sorted(folders[0][1].rglob("*.safetensors")):  # type: ignore[index]
        ours = load_file(file)
        theirs = load_file(folders[1][1] / file.relative_to(folders[0][1]))  # type: ignore[index]
        for name in ours.keys() | theirs.keys():
            tensors += 1
            if torch.equal(ours[name], theirs[name]):
                equal += 1
            else:
                gap = (ours[name].double() - theirs[name].double()).abs().max().item()
                largest = max(largest, gap)
    return equal, tensors, largest


def _make_images(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(64):
        path = folder / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def _make_vae(folder: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    blocks: Any = {"block_out_channels": (8, 16),
                   "down_block_types": ("DownEncoderBlock2D",) * 2,
                   "up_block_types": ("UpDecoderBlock2D",) * 2}  # fmt: skip
    AutoencoderKL(norm_num_groups=4, sample_size=32, **blocks).save_pretrained(folder)
