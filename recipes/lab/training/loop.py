"""The loop over the steps of a run: what is written and said on the way, and how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.auto import tqdm

from recipes.lab.console import DONE, INTERRUPTED, NON_FINITE, UserError, user_errors
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.guard import SpikeWatch
from recipes.lab.training.status import Status, memory_mb
from recipes.lab.training.trainer import Trainer

_FAILED_SAVES = 3
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Loop:
    """The steps of one ``train``, and what is written and said on the way."""

    def __init__(
        self, trainer: Trainer, run: Run, should_stop: Callable[[int], bool], resumed: bool
    ) -> None:
        self.trainer = trainer
        self.run = run
        self.should_stop = should_stop
        self.resumed = resumed
        self.is_main = trainer.accelerator.is_main_process
        settings = trainer.settings
        self.status = Status(run, settings.steps, settings.batch_size)
        self.spikes = SpikeWatch(run.read_log() if self.is_main and resumed else ())
        self.saved = trainer.step if resumed and trainer.step else None
        self.failed_saves = 0
        self.log_failed = False
        self.entry: dict[str, Any] = {}

    def say(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)

    def run_to_end(self) -> int:
        """Trains; returns the exit status, which status.json tells too."""
        trainer, settings = self.trainer, self.trainer.settings
        self._greet()
        if trainer.accelerator.trackers or trainer.accelerator.log_with:
            config = {k: str(v) for k, v in dataclasses.asdict(settings).items()}
            trainer.accelerator.init_trackers("attnzoo", config)
        received: list[int] = []
        bar = tqdm(
            total=settings.steps,
            initial=trainer.step,
            desc=str(self.run.folder),
            unit="step",
            disable=not self.is_main,
        )
        try:
            with _on_signals(lambda number, _: received.append(number)), bar:
                status, state, reason = self._steps(bar, received)
        except BaseException as error:
            self._note("failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            trainer.batches.close()
        # Not end_training, which also ends the process group.
        for tracker in trainer.accelerator.trackers:
            tracker.finish()
        self._note(state, reason)
        if self.is_main:
            tqdm.write(reason)
        trainer.accelerator.wait_for_everyone()
        return status

    def _steps(self, bar: tqdm, received: list[int]) -> tuple[int, str, str]:
        trainer, settings, run = self.trainer, self.trainer.settings, self.run
        self._note("running", "")
        while trainer.step < settings.steps:
            started = time.perf_counter()
            with user_errors():  # a file of the data may have become unreadable
                self.entry, stopping = trainer.train_step(wants_stop=bool(received))
            self._record(time.perf_counter() - started, bar)
            if trainer.skipped_in_a_row >= settings.skip_limit:
                reason = (
                    f"stopped, not finite {trainer.skipped_in_a_row} times in a row, last at step "
                    f"{trainer.step}: {self.entry['skipped']}; the checkpoint of step "
                    f"{self.saved} is whole"
                )
                return NON_FINITE, "failed", reason
            stopping = self.should_stop(trainer.step) or stopping
            is_last = trainer.step == settings.steps
            if stopping or is_last or trainer.step % settings.checkpoint_every == 0:
                self._save(must=stopping or is_last)
            if is_last or trainer.step % settings.sample_every == 0:
                try:
                    trainer.sample_grid(run.samples / f"step-{trainer.step:08d}.png")
                except OSError as error:
                    self.say(f"no sample grid of step {trainer.step}: {error.strerror}")
            if stopping and not is_last:
                names = sorted({signal.Signals(number).name for number in received})
                reason = (
                    f"stopped after step {trainer.step} and saved"
                    f"{' on ' + ', '.join(names) if names else ''}; go on with\n"
                    f"  python recipes/train.py --resume --out {run.folder}"
                )
                return INTERRUPTED, "preempted", reason
        reason = (
            f"done: samples in {run.samples}; more with\n"
            f"  python recipes/sample.py {run.folder} --classes 0,1,2 --cfg 2.0"
        )
        return DONE, "done", reason

    def _greet(self) -> None:
        trainer, settings = self.trainer, self.trainer.settings
        processes = trainer.accelerator.num_processes
        if self.resumed:
            self.say(f"{self.run.folder} is there: going on after step {trainer.step}")
        # accelerate launch --cpu starts one process whatever number it is asked for.
        if processes > 1 or settings.accumulate > 1:
            share = settings.batch_size // processes // settings.accumulate
            self.say(
                f"{processes} processes, {settings.accumulate} micro-steps of {share} images each"
            )

    def _record(self, seconds: float, bar: tqdm) -> None:
        if not self.is_main:
            return
        entry, step = self.entry, self.trainer.step
        if "skipped" in entry:
            self.say(f"step {step} skipped, not finite: {entry['skipped']}")
        spikes = self.spikes.look(entry)
        if spikes:
            entry["spikes"] = spikes
        try:
            self.run.append_log({**entry, "seconds": seconds})
            self.log_failed = False
        except OSError as error:
            if not self.log_failed:
                self.say(f"the log waits in memory, it cannot be written: {error.strerror}")
            self.log_failed = True
        numbers = {name: value for name, value in entry.items() if isinstance(value, int | float)}
        self.trainer.accelerator.log({**numbers, "seconds": seconds}, step=step)
        self.status.update(step, seconds, entry, self.saved)
        rate = (self.status.rate or 0.0) * self.trainer.settings.batch_size
        loss = "skipped" if entry["loss"] is None else f"{entry['loss']:.4f}"
        bar.set_postfix_str(f"loss {loss}, {rate:.0f} img/s, {memory_mb():.0f} MB", refresh=False)
        bar.update()

    def _save(self, must: bool) -> None:
        trainer = self.trainer
        problem = trainer.save(self.run)
        if problem is None:
            self.saved, self.failed_saves = trainer.step, 0
            return
        self.failed_saves += 1
        text = (
            f"no checkpoint of step {trainer.step} ({problem}); the newest whole one is of step "
            f"{self.saved}: make room for {self.run.folder}"
        )
        if must or self.failed_saves >= _FAILED_SAVES:
            raise UserError(text)
        self.say(f"{text}; training goes on")

    def _note(self, state: str, reason: str) -> None:
        if self.is_main:
            # A run that is done needs no reason, and advice has no place in a status.
            first_line = "" if state == "done" else reason.split("\n")[0]
            first_line = first_line.removesuffix("; go on with")
            self.status.write(state, self.trainer.step, self.entry, self.saved, first_line)


@contextlib.contextmanager
def _on_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Lets Ctrl-C and a scheduler's signals finish the step instead of tearing it."""
    try:
        previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    except ValueError:  # not in the main thread, where signals cannot be caught
        yield
        return
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
