"""Times the training steps of some cases; ``bench.scaling`` starts it, alone or under torchrun.

The trainer is that of ``recipes/train.py``, steps are taken as its loop takes them, and the log is
written. The loop's pictures and the checkpoint of its end are left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from bench.checks import WrongStep
from bench.isolate import one_line
from bench.machine import free, quiet
from bench.scaling.cases import Case, read_plan
from bench.timing import spread
from recipes.lab.imports import import_all
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.state import save_checkpoint
from recipes.lab.training.trainer import Trainer


def measure(case: Case, latents: Path, run: Run) -> dict[str, Any]:
    """Trains a case for its steps; every process calls it.

    Args:
        case: The case.
        latents: What it trains on.
        run: Where its log goes, and its checkpoint.

    Returns:
        What the report has of it, as this process saw it.

    Raises:
        WrongStep: A step was not finite.
    """
    is_gpu = torch.cuda.is_available()
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    trainer = Trainer(case.settings(latents))
    try:
        making, waits = _watched(trainer)
        trainer.record()
        seconds: list[float] = []
        entry: dict[str, Any] = {}
        for number in range(case.steps):
            start = time.perf_counter()
            entry, _ = trainer.train_step(ahead=number + 1 < case.steps)
            if entry["loss"] is None:
                raise WrongStep(f"step {number + 1} was not finite: {entry['skipped']}")
            if trainer.accelerator.is_main_process:
                run.append_log({**entry, "seconds": time.perf_counter() - start})
            seconds.append(time.perf_counter() - start)
            if not number:
                begun = time.perf_counter() - began
        timed = seconds[case.steps // 3 :]
        is_recorded = trainer.recorded is not None and not trainer.why_eager
        treatment = "recorded" if is_recorded and is_gpu else "launched"
        return {
            **dataclasses.asdict(case),
            "images": case.images,
            "treatment": treatment + ", compiled" * trainer.compiling.is_on,
            "notes": [*([trainer.why_eager] if trainer.why_eager else []), *trainer.notes],
            "seconds": spread(timed),
            "images_per_second": case.images * case.gpus / statistics.median(timed),
            "making_a_batch": making,
            "waiting_for_a_batch": statistics.median(waits[case.steps // 3 :]),
            "until_the_second_step": begun,
            "loss": entry["loss"],
            "peak_memory": torch.cuda.max_memory_allocated() if is_gpu else 0,
            "checkpoint": _saved(trainer, run) if case.saves else None,
        }
    finally:
        trainer.batches.close()


def _watched(trainer: Trainer) -> tuple[float, list[float]]:
    """The median seconds that making a batch takes; and a list to which waits for one come."""
    making, waits = [], []
    for step in range(4):  # the first one opens the files
        start = time.perf_counter()
        trainer.batches.at(step)
        making.append(time.perf_counter() - start)
    take = trainer.batches.take

    def timed(step: int) -> Any:
        start = time.perf_counter()
        batch = take(step)
        waits.append(time.perf_counter() - start)
        return batch

    trainer.batches.take = timed
    return statistics.median(making[1:]), waits


def _saved(trainer: Trainer, run: Run) -> dict[str, float]:
    start = time.perf_counter()
    problem = save_checkpoint(trainer, run)
    if problem is not None:
        raise OSError(f"the checkpoint could not be written: {problem}")
    taken = time.perf_counter() - start
    size = sum(file.stat().st_size for file in run.checkpoints.rglob("*") if file.is_file())
    return {"seconds": taken, "bytes": size}


def main(folder: Path, imported_from: str, *imports: str) -> NoReturn:
    """Measures the cases that ``folder`` lists; the first process writes a line for each."""
    rank = int(os.environ.get("RANK", 0))
    (folder / f"process-{rank}").write_text(str(os.getpid()))
    quiet()
    try:
        os.chdir(imported_from)
        import_all(imports)
        for number, case in enumerate(read_plan(folder)):
            run = Run(folder / f"run-{number}")
            if rank == 0:
                run.make()
            row = measure(case, folder.parent / f"latents-{case.tokens}", run)
            if rank == 0:
                with (folder / "rows.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if "torch._dynamo" in sys.modules:  # it takes seconds to import
                torch.compiler.reset()
            free()
    except Exception as error:  # of a mechanism, a compiler or the network, anything
        words = folder / f"words-{rank}"
        words.write_text(one_line(error))
        words.rename(folder / f"error-{rank}")  # which is read as soon as it is there
        # The others may wait for this one forever; who started them ends them.
        os._exit(1)
    # Gloo's threads can abort an interpreter that shuts down, and NCCL can wait for its graphs.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
