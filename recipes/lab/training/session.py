"""One call that trains: what is looked at first, what is written, and then the loop.

Everything that can refuse a run is asked before anything of its folder changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from backbones.pattern import file_name
from recipes.lab.console import DONE, Progress, UserError, argument
from recipes.lab.data.latents import canonical_settings
from recipes.lab.distributed import on_main
from recipes.lab.files import check_unlocked, refuse_links, write_json
from recipes.lab.imports import import_remembered
from recipes.lab.training.banner import banner, memory_of
from recipes.lab.training.checkpoint import TRACKER_FOLDERS, Run
from recipes.lab.training.conversion import Source
from recipes.lab.training.description import data_changes, describe, differences
from recipes.lab.training.distillation import write_teacher
from recipes.lab.training.loop import Loop
from recipes.lab.training.memory import check_memory, step_bytes
from recipes.lab.training.run_files import read_lines
from recipes.lab.training.settings import Settings, resumed_settings
from recipes.lab.training.state import load_checkpoint, save_checkpoint
from recipes.lab.training.status import claimed, noted_checkpoint
from recipes.lab.training.trainer import Trainer

_OF_DATA = ("data", "level", "class_count", "class_seed", "vae", "resolution")


def train(
    settings: Settings,
    run: Run,
    *,
    resume: bool = False,
    overwrite: bool = False,
    should_stop: Callable[[int], bool] = lambda step: False,
    trackers: Sequence[str] = (),
    imports: Sequence[str] = (),
    allowed: Collection[str] = (),
    ignore_memory: bool = False,
) -> int:
    """Trains until ``settings.steps`` and leaves everything in the run's folder.

    Args:
        settings: What to compute.
        run: Where it goes.
        resume: Whether to continue from the newest checkpoint.
        overwrite: Whether to replace a run that is there.
        should_stop: Asked after every step, in every process; True saves and stops, as Ctrl-C
            does.
        trackers: Names of Accelerate's trackers to log to, besides the run's log.
        imports: Files or modules of mechanisms, imported already; a resumed run imports what it
            remembers.
        allowed: "data" lets a resumed run go on with data that has changed.
        ignore_memory: Whether to go on where a step will not fit into the memory.

    Returns:
        0 when done, 75 when interrupted and saved, 3 after too many non-finite steps.

    Raises:
        UserError: The settings or the folder cannot be used; nothing in it has changed.
        attnzoo.UsageError: A mechanism or one of its options cannot be used; likewise.
    """
    _check_trackers(trackers)
    if resume:
        config = run.config()
        import_remembered(run.folder, config.get("imports", {}), imports)
        saved = config["settings"]
        for name in ("cuda_graph", "compile"):  # a run of before their "auto" goes on as it began
            if getattr(settings, name) == "auto" and not isinstance(saved.get(name), str):
                before = canonical_settings(saved).get(name, "off")
                settings = dataclasses.replace(settings, **{name: before})
    trainer = Trainer(settings, trackers, run.folder)
    accelerator = trainer.accelerator
    progress = Progress(str(run.folder), settings.steps, accelerator.is_main_process)
    if settings.sharded and not trainer.is_sharded:
        progress.say("--sharded: one process has nothing to shard, so this run is trained whole")
    needed = step_bytes(trainer)

    def plan() -> _Plan:
        planned = _look(trainer, run, resume, overwrite, allowed, progress.say)
        if trackers:
            for name in TRACKER_FOLDERS:
                refuse_links(run.folder, run.folder / name)
        if not planned.is_done(settings):
            progress.say(banner(trainer, run, needed))
            if not ignore_memory:
                check_memory(*memory_of(trainer, needed), settings)
        return planned

    planned = on_main(accelerator, plan)
    if planned.is_done(settings):

        def finish() -> None:
            run.sweep()
            if run.held_file.exists():
                with claimed(run):
                    run.cut_log(planned.step)
            progress.say(_already_done(run, planned.step))

        on_main(accelerator, finish)
        return DONE
    if planned.checkpoint is not None:
        load_checkpoint(trainer, planned.step, planned.checkpoint)
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(claimed(run))
            if _files(run) != planned.files:
                raise UserError(f"{run.folder} has changed while it was read; try again")
            run.sweep()
            if not resume:
                run.create(planned.config, overwrite)
                return
            run.cut_log(planned.step)
            if planned.config != run.config():
                run.write_config(planned.config)
            for line in planned.said:
                progress.say(line)

        on_main(accelerator, begin)
        return Loop(trainer, run, should_stop, resume, progress).run_to_end()


def start_from(
    source: Source, settings: Settings, run: Run, overwrite: bool, ignore_memory: bool = False
) -> list[str]:
    """Makes a run of step 0 that has a trained model's weights; ``train`` goes on from there.

    Args:
        source: The trained model.
        settings: Of ``converted_settings``.
        run: Where it goes.
        overwrite: Whether to replace a run that is there.
        ignore_memory: Whether to go on where a step will not fit into the memory.

    Returns:
        What was taken, what is new and what was dropped, a line each; conversion.json lists it.

    Raises:
        UserError: The settings or the folder cannot be used; nothing in it has changed.
    """
    run.check_links()
    run.check_new(overwrite)
    trainer = Trainer(settings, folder=run.folder, source=source.model)
    inherited = trainer.inherited
    assert inherited is not None
    if not ignore_memory:
        check_memory(*memory_of(trainer, step_bytes(trainer)), settings)
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(claimed(run))
            run.sweep()
            run.create(describe(trainer), overwrite)
            if settings.distil:
                write_teacher(run.folder, source.model, source.content)
            listed = {name: getattr(inherited, name) for name in ("taken", "new", "dropped")}
            write_json(run.folder / "conversion.json", {**(settings.start or {}), **listed})

        on_main(trainer.accelerator, begin)
        problem = save_checkpoint(trainer, run)
    trainer.batches.close()
    if problem is not None:
        raise UserError(f"no checkpoint could be written ({problem}); make room for {run.folder}")
    return inherited.lines() if trainer.accelerator.is_main_process else []


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a run will begin with, found out without changing anything."""

    step: int
    checkpoint: Path | None
    config: dict[str, Any]
    said: list[str]
    files: list[str]

    def is_done(self, settings: Settings) -> bool:
        return self.checkpoint is not None and self.step >= settings.steps


def _look(
    trainer: Trainer,
    run: Run,
    resume: bool,
    overwrite: bool,
    allowed: Collection[str],
    warn: Callable[[str], None],
) -> _Plan:
    run.check_links()
    check_unlocked(run.lock_file)
    files = _files(run)
    if not resume:
        run.check_new(overwrite)
        return _Plan(0, None, describe(trainer), [], files)
    found = run.newest_checkpoint(warn=warn)
    if found is None and run.checkpoint_names():
        raise UserError(f"{run.folder} holds no whole checkpoint; start again with --overwrite")
    if found is None and trainer.settings.start is not None:
        raise UserError(
            f"{run.folder} was begun from {trainer.settings.start.get('source')} and holds no "
            f"checkpoint: convert again, with recipes/convert.py --overwrite"
        )
    if found is None and (noted := noted_checkpoint(run)) is not None:
        raise UserError(
            f"{run.folder} had a checkpoint of step {noted} and holds none: put its checkpoints "
            f"back, or start again with --overwrite"
        )
    step, folder = found or (0, None)
    for file in (run.log_file, run.held_file):  # named before anything changes, if damaged
        read_lines(file)
    config, said = _continued(trainer, run, step, allowed)
    return _Plan(step, folder, config, said, files)


def _files(run: Run) -> list[str]:
    """What would be otherwise if another process had written to the run meanwhile."""
    if not run.config_file.is_file():
        return []
    return [run.config_file.read_text(errors="replace"), *run.checkpoint_names()]


def _continued(
    trainer: Trainer, run: Run, step: int, allowed: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a run that goes on, and what to say about what has changed."""
    config, now = run.config(), describe(trainer)
    where = str(run.config_file)
    changed, said = [], []
    names = list(now["settings"])
    _, lines = resumed_settings(config["settings"], now["settings"], names, where)
    before = resumed_settings(config["settings"], {}, where=where)[0]
    if lines:
        changed += lines
        said.append(f"changed: {'; '.join(lines)}")
    data_lines = data_changes(config.get("data", {}), now["data"])
    is_other_data = any(
        getattr(before, name) != getattr(trainer.settings, name) for name in _OF_DATA
    )
    if data_lines and not (is_other_data or "data" in allowed):
        raise UserError(
            f"the data of {run.folder} is not what it began with ({'; '.join(data_lines)}): "
            f"restore it, allow the change with --allow-change data, or choose another --out"
        )
    if data_lines:
        changed += [f"data: {line}" for line in data_lines]
        said.append(f"the data has changed: {'; '.join(data_lines)}")
    if "identity" not in config.get("data", {}):
        said.append(
            f"{run.folder} does not say what its data held when it began; from now on it does"
        )
    differing = differences(config.get("environment", {}), now["environment"])
    if config.get("imports", {}) != now["imports"]:
        differing.append("the code of a mechanism of your own")
    if differing:
        changed += [f"environment: {line}" for line in differing]
        said.append(
            f"what follows is not bit for bit what an uninterrupted run gives, for it began with "
            f"another environment: {'; '.join(differing)}"
        )
    kept = {name: now[name] for name in ("settings", "data", "imports", "environment")}
    kept["settings"] = {**config["settings"], **now["settings"]} if lines else config["settings"]
    if not data_lines and "identity" in config.get("data", {}):
        kept["data"] = config["data"]
    changes = list(config.get("changes", []))
    if changed:
        changes.append({"step": step, "changes": changed})
    return {**config, **kept, **({"changes": changes} if changes else {})}, said


def _already_done(run: Run, step: int) -> str:
    return (
        f"{run.folder} is done, {step} steps: sample it with\n"
        f"  python recipes/sample.py {argument(run.folder)} --cfg 2.0\n"
        f"train it longer with --steps N --allow-change steps, or anew with --overwrite"
    )


def default_folder(given: Mapping[str, Any]) -> Path:
    """Where a run of these settings goes if the caller does not say."""
    data = Path(given.get("data", Settings.data)).name
    return Path("runs") / f"{data}-{file_name(given.get('attn', Settings.attn))}"


def _check_trackers(trackers: Sequence[str]) -> None:
    # Accelerate drops a tracker that is not installed without a word.
    for name in trackers:
        kind = LOGGER_TYPE_TO_CLASS.get(name)
        if kind is None:
            raise UserError(
                f"tracker {name!r} is unknown; Accelerate has {sorted(LOGGER_TYPE_TO_CLASS)}"
            )
        try:
            __import__("tensorboard" if name == "tensorboard" else name)
        except ImportError:
            raise UserError(f"tracker {name!r} is not installed: pip install {name}") from None
