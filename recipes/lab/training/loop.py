"""The loop over the steps of a run: what is written and said on the way, and how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from recipes.lab import failures
from recipes.lab.console import DONE, INTERRUPTED, NON_FINITE, Progress, UserError, argument
from recipes.lab.files import CannotWrite
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.guard import SpikeWatch
from recipes.lab.training.state import NotFinite, save_checkpoint
from recipes.lab.training.status import Status, memory_mb
from recipes.lab.training.trainer import Trainer

_FAILED_SAVES = 3
_DIVERGED = 10  # skipped steps in a row at the end that make a run one that failed
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Loop:
    """The steps of one ``train``, and what is written and said on the way."""

    def __init__(
        self,
        trainer: Trainer,
        run: Run,
        should_stop: Callable[[int], bool],
        resumed: bool,
        progress: Progress,
    ) -> None:
        self.trainer = trainer
        self.run = run
        self.should_stop = should_stop
        self.resumed = resumed
        self.progress = progress
        self.is_main = trainer.accelerator.is_main_process
        settings = trainer.settings
        self.status = Status(run, settings.steps, settings.batch_size)
        self.spikes = SpikeWatch(run.read_log() if self.is_main and resumed else ())
        self.saved = trainer.step if resumed and trainer.step else None
        self.failed_saves = 0
        self.log_failed = False
        self.entry: dict[str, Any] = {}

    def run_to_end(self) -> int:
        """Trains; returns the exit status, which status.json tells too."""
        trainer, settings, say = self.trainer, self.trainer.settings, self.progress.say
        self._greet()
        if trainer.accelerator.trackers or trainer.accelerator.log_with:
            config = {k: str(v) for k, v in dataclasses.asdict(settings).items()}
            trainer.accelerator.init_trackers("attnzoo", config)
        received: list[int] = []
        self.progress.start(trainer.step)
        try:
            with _on_signals(lambda number, _: received.append(number)):
                trainer.record()
                if trainer.why_eager:
                    say(f"steps are launched eagerly: {trainer.why_eager}")
                status, state, reason = self._steps(received)
        except BaseException as error:
            self._note("failed", failures.described(error))
            raise
        finally:
            trainer.batches.close()
            self.progress.close()
            waiting = self.run.keep_waiting_log() if self.is_main else None
            if waiting:
                say(waiting)
        # Not end_training, which also ends the process group.
        for tracker in trainer.accelerator.trackers:
            tracker.finish()
        self._note(state, reason)
        say(reason)
        trainer.accelerator.wait_for_everyone()
        return status

    def _steps(self, received: list[int]) -> tuple[int, str, str]:
        trainer, settings, run = self.trainer, self.trainer.settings, self.run
        self._note("running", "")
        stopping = False
        while trainer.step < settings.steps:
            started = time.perf_counter()
            wants_stop = bool(received) or self.progress.is_deserted
            ahead = not (stopping or self._is_looked_at(trainer.step + 1))
            self.entry, is_told = trainer.train_step(wants_stop, ahead)
            while trainer.notes:
                self.progress.say(trainer.notes.pop(0))
            self._record(time.perf_counter() - started)
            if trainer.skipped_in_a_row >= settings.skip_limit:
                return self._failed(f"not finite {trainer.skipped_in_a_row} times in a row, last")
            stopping = self.should_stop(trainer.step) or is_told or stopping
            if trainer.is_ahead:  # the step that the device has begun comes first
                continue
            is_last = trainer.step == settings.steps
            if is_last and self._has_diverged():
                times = "not finite in any step" if trainer.skipped == trainer.step else (
                    f"not finite in the last {trainer.skipped_in_a_row} steps"
                )  # fmt: skip
                return self._failed(f"{times}, last")
            is_due = trainer.step % settings.checkpoint_every == 0
            # A state that gives nothing but skipped steps is no progress to be saved.
            if stopping or is_last or (is_due and not trainer.skipped_in_a_row):
                try:
                    self._save(must=stopping or is_last)
                except NotFinite as error:
                    return self._failed(f"the state is not finite ({error})")
            if is_last or trainer.step % settings.sample_every == 0:
                self._draw()
            if stopping and not is_last:
                return INTERRUPTED, "preempted", self._stopped(received)
        reason = (
            f"done: samples in {run.samples}; more with\n"
            f"  python recipes/sample.py {argument(run.folder)} --cfg 2.0"
        )
        return DONE, "done", reason

    def _is_looked_at(self, step: int) -> bool:
        """Whether the state after ``step`` is saved, drawn or diagnosed."""
        settings = self.trainer.settings
        every = (settings.checkpoint_every, settings.sample_every, settings.diagnose_every)
        every += (settings.held_out_every or settings.steps,)
        return step >= settings.steps or any(step % number == 0 for number in every)

    def _has_diverged(self) -> bool:
        trainer = self.trainer
        return trainer.skipped_in_a_row >= _DIVERGED or trainer.skipped == trainer.step

    def _failed(self, what: str) -> tuple[int, str, str]:
        where = f" at step {self.trainer.step}"
        if "skipped" in self.entry:
            where += f": {self.entry['skipped']}"
        kept = (
            f"the checkpoint of step {self.saved} is whole"
            if self.saved is not None
            else "there is no checkpoint"
        )
        return NON_FINITE, "failed", f"stopped, {what}{where}; {kept}"

    def _stopped(self, received: list[int]) -> str:
        causes = sorted({signal.Signals(number).name for number in received})
        if self.progress.is_deserted:
            causes.append("a closed output")
        return (
            f"stopped after step {self.trainer.step} and saved"
            f"{' on ' + ', '.join(causes) if causes else ''}; go on with\n"
            f"  python recipes/train.py --resume --out {argument(self.run.folder)}"
        )

    def _draw(self) -> None:
        step = self.trainer.step
        try:
            said = self.trainer.sample_grid(self.run.samples / f"step-{step:08d}.png")
        except CannotWrite as error:
            said = f"no sample grid of step {step}: {error.strerror}"
        if said:
            self.progress.say(said)

    def _greet(self) -> None:
        trainer, settings, say = self.trainer, self.trainer.settings, self.progress.say
        processes = trainer.accelerator.num_processes
        if self.resumed:
            say(f"{self.run.folder} is there: going on after step {trainer.step}")
        # accelerate launch --cpu starts one process whatever number it is asked for.
        if processes > 1 or settings.accumulate > 1:
            share = settings.batch_size // processes // settings.accumulate
            say(f"{processes} processes, {settings.accumulate} micro-steps of {share} images each")

    def _record(self, seconds: float) -> None:
        if not self.is_main:
            return
        entry, step = self.entry, self.trainer.step
        if "skipped" in entry:
            self.progress.say(f"step {step} skipped, not finite: {entry['skipped']}")
        spikes = self.spikes.look(entry)
        if spikes:
            entry["spikes"] = spikes
        try:
            self.run.append_log({**entry, "seconds": seconds})
            self.log_failed = False
        except OSError as error:
            if not self.log_failed:
                self.progress.say(
                    f"the log waits in memory, it cannot be written: {error.strerror}"
                )
            self.log_failed = True
        numbers = {name: value for name, value in entry.items() if isinstance(value, int | float)}
        self.trainer.accelerator.log({**numbers, "seconds": seconds}, step=step)
        self.status.update(step, seconds, entry, self.saved)
        rate = (self.status.rate or 0.0) * self.trainer.settings.batch_size
        loss = "skipped" if entry["loss"] is None else f"{entry['loss']:.4f}"
        self.progress.advance(f"loss {loss}, {rate:.0f} img/s, {memory_mb():.0f} MB")

    def _save(self, must: bool) -> None:
        trainer = self.trainer
        problem = save_checkpoint(trainer, self.run, evict=not trainer.skipped_in_a_row)
        if problem is None:
            self.saved, self.failed_saves = trainer.step, 0
            return
        self.failed_saves += 1
        kept = "there is no other" if self.saved is None else f"that of step {self.saved} is whole"
        text = (
            f"no checkpoint of step {trainer.step} ({problem}); {kept}: make room for "
            f"{self.run.folder}"
        )
        if must or self.failed_saves >= _FAILED_SAVES:
            raise UserError(text)
        self.progress.say(f"{text}; training goes on")

    def _note(self, state: str, reason: str) -> None:
        if self.is_main:
            # A run that is done needs no reason, and advice has no place in a status.
            first_line = "" if state == "done" else reason.split("\n")[0]
            first_line = first_line.removesuffix("; go on with")
            self.status.write(state, self.trainer.step, self.entry, self.saved, first_line)


@contextlib.contextmanager
def _on_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Lets Ctrl-C, a closed terminal and a scheduler's signals finish the step."""
    # nohup has SIGHUP ignored, and means it.
    numbers = [
        number
        for number in _SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    ]
    try:
        previous = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not in the main thread, where signals cannot be caught
        yield
        return
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
