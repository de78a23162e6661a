"""The suite as a pytest plugin: options, one test per case, and the accounts of every case.

pytest-benchmark leaves a test that fails or is skipped out of its JSON; here every requested case
ends in ``benchmarks`` or, with a reason, in ``cells_not_measured``. What would measure everything
and store nothing is refused before it starts.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

import attnzoo
from attnzoo.errors import UsageError
from bench import machine, worker
from bench.cells import PROFILES, Cell
from bench.checks import check_key
from bench.goals import GOALS
from bench.isolate import Outcome, run_isolated
from bench.settings import BenchSettings, settings_from
from bench.timing import replay_clock
from recipes.lab.console import USER_ERROR, UserError, printable
from recipes.lab.files import CannotWrite, check_writable, write_json
from recipes.lab.imports import import_all, origins

_SETTINGS = pytest.StashKey[BenchSettings]()
_REQUESTED = pytest.StashKey[dict[str, str]]()
_MISSED = pytest.StashKey[dict[str, tuple[str, str]]]()
_PEAKS = pytest.StashKey[dict[str, float]]()
_CHECKED = pytest.StashKey[dict[str, dict[str, Any]]]()
_SPENT = pytest.StashKey[dict[str, list[float]]]()
_BEGIN = pytest.StashKey[float]()
_UNWRITTEN = pytest.StashKey[list[str]]()
# One goal compares many layers.
GOAL_TIMEOUT = 1200.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attnzoo", "attnzoo's benchmark suite")
    profiles = {
        "quick": "the default: under 4 minutes on 2 cores",
        "full": "all, and the goals: estimated at 8 minutes on an H200, 4 hours on a CPU",
    }
    for profile, text in profiles.items():
        group.addoption(f"--{profile}", action="store_true", help=text)
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    lists = "; several by comma, all of the profile by default"
    group.addoption("--mechanisms", default="", help=f"sana or sana:impl=naive{lists}")
    group.addoption("--resolutions", default="", help=f"pixels of a latent model{lists}")
    group.addoption("--widths", default="", help=f"of the tokens{lists}")
    group.addoption("--dtypes", default="", help=f"float32, bfloat16, float16{lists}")
    group.addoption("--goals", default="", help=f"names such as G4, or none, with --full{lists}")
    group.addoption("--threads", default="1", help="of torch; 1 (default) times by CPU time")
    group.addoption("--memory-cap", default="8GiB", help="of one cell, such as 300MiB")
    group.addoption("--cell-timeout", default="180", help="seconds of one cell")
    group.addoption(
        "--time-budget", default="",
        help="seconds; what is not measured by then is listed as such. The most important "
        "cells come first (default: no limit)",
    )  # fmt: skip
    group.addoption("--quality", default=None, help="results of recipes/compare.py")
    group.addoption(
        "--import", dest="imports", action="append", default=[], metavar="FILE|MODULE",
        help="file or module that registers mechanisms of your own; repeat",
    )  # fmt: skip


def _refuse_what_stores_nothing(config: pytest.Config) -> None:
    """Raises UsageError for options of pytest and its plugins with which nothing is measured."""
    given = config.option
    if not hasattr(given, "imports"):
        raise pytest.UsageError("the suite runs by itself: name no other folder beside bench/")
    if not hasattr(given, "benchmark_json"):
        raise pytest.UsageError("the suite needs pytest-benchmark: leave -p no:benchmark out")
    if given.collectonly:
        return
    is_distributed = getattr(given, "dist", "no") != "no" or hasattr(config, "workerinput")
    if is_distributed or getattr(given, "tx", None):
        raise pytest.UsageError(
            "the suite measures one case at a time, each in a process of its own, since two would "
            "disturb each other: leave -n, --dist and --tx out"
        )
    if given.benchmark_disable and not given.benchmark_enable:
        raise pytest.UsageError(
            "--benchmark-disable stores nothing of what is measured: leave it out, or list the "
            "cases with --collect-only"
        )
    if given.benchmark_skip and not given.benchmark_only:
        raise pytest.UsageError("--benchmark-skip skips every case of the suite: leave it out")
    if given.setuponly or getattr(given, "setupplan", False):
        raise pytest.UsageError("--setup-only and --setup-plan measure nothing: leave them out")
    kinds = ("group", "name", "func", "fullname", "fullfunc", "param")
    for grouping in given.benchmark_group_by.split(","):
        if grouping not in kinds and not grouping.startswith("param:"):
            raise pytest.UsageError(
                f"--benchmark-group-by {grouping!r} is unknown; choose of {', '.join(kinds)} and "
                f"param:NAME"
            )


@pytest.hookimpl(trylast=True)  # after pytest-benchmark, whose session writes the results
def pytest_configure(config: pytest.Config) -> None:
    _refuse_what_stores_nothing(config)
    option = config.getoption
    chosen = [profile for profile in PROFILES if option(f"--{profile}")]
    if len(chosen) > 1:
        raise pytest.UsageError("--quick and --full exclude each other; choose one")
    imports: tuple[str, ...] = tuple(option("imports") or ())
    try:
        import_all(imports)
        settings = settings_from(
            tuple(GOALS),
            profile=(chosen or ["quick"])[0],
            device=option("--device"),
            mechanisms=option("--mechanisms"),
            resolutions=option("--resolutions"),
            widths=option("--widths"),
            dtypes=option("--dtypes"),
            goals=option("--goals"),
            threads=option("--threads"),
            memory_cap=option("--memory-cap"),
            cell_timeout=option("--cell-timeout"),
            time_budget=option("--time-budget"),
            quality=option("--quality"),
            imports=imports,
        )
        if not config.option.collectonly:
            _prepare_writing(config)
    except (UserError, UsageError) as error:
        raise pytest.UsageError(printable(" ".join(str(error).split()))) from error
    given = [str(argument) for argument in config.invocation_params.args]
    if not any(argument.startswith("--benchmark-columns") for argument in given):
        config.option.benchmark_columns = ["median", "iqr", "ops", "rounds"]
    config.stash[_SETTINGS] = settings
    config.stash[_REQUESTED] = {}
    config.stash[_MISSED] = {}
    config.stash[_PEAKS] = {}
    config.stash[_CHECKED] = {}
    config.stash[_SPENT] = {}
    config.stash[_BEGIN] = time.monotonic()
    config.stash[_UNWRITTEN] = []
    # Whoever ends the run politely gets what was measured until then, as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _prepare_writing(config: pytest.Config) -> None:
    """Checks the outputs of pytest-benchmark, and has them written whole or not at all."""
    session: Any = config._benchmarksession  # type: ignore[attr-defined]

    def reported(write: Callable[..., None]) -> Callable[..., None]:
        def guarded(*arguments: Any) -> None:
            try:
                write(*arguments)
            except (OSError, ValueError) as error:
                config.stash[_UNWRITTEN].append(str(error))

        return guarded

    def save_json(content: dict[str, Any]) -> None:
        write_json(session.json, content, indent=4)
        session.logger.info(f"Wrote benchmark data in: {session.json}", purple=True)

    if session.json:
        session.json = check_writable(Path(session.json).absolute())
        session.save_json = reported(save_json)
    if (session.save or session.autosave) and hasattr(session.storage, "path"):
        check_writable(Path(session.storage.path) / "trial")
        session.storage.save = reported(session.storage.save)


def pytest_keyboard_interrupt() -> None:
    """Lets nobody interrupt the writing of the results."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" not in metafunc.fixturenames:
        return
    settings = metafunc.config.stash[_SETTINGS]
    takes = metafunc.module.takes  # type: ignore[union-attr]
    wanted = [cell for cell in settings.cells() if takes(cell)]
    fields = list(Cell().params())
    metafunc.parametrize(
        [*fields, "cell_id"],
        [pytest.param(*cell.params().values(), cell.id, id=cell.id) for cell in wanted],
    )


@pytest.fixture
def cell(request, cell_id, kind, mechanism, resolution, width, dtype, mode) -> Cell:
    """The cell of this test; its parameters are there for --benchmark-group-by=param:width."""
    return next(c for c in request.config.stash[_SETTINGS].cells() if c.id == cell_id)


@pytest.fixture
def run(request: pytest.FixtureRequest, cell: Cell, benchmark: Any) -> Any:
    """Runs a function of ``bench.worker`` on the cell in its own process and keeps the books."""
    settings = request.config.stash[_SETTINGS]
    benchmark.group = f"{cell.kind} {cell.mode}, {cell.resolution}px d{cell.width} {cell.dtype}"
    if cell.kind in ("count", "goal", "quality"):
        benchmark.group = cell.kind

    def start(function: Any) -> dict[str, Any]:
        begin = time.monotonic()
        outcome = _within_budget(request.config, settings, cell, function)
        if outcome.state != "measured":
            _miss(request, outcome)
        record: dict[str, Any] = dict(outcome.result)
        if record.get("check") and cell.kind != "goal":
            request.config.stash[_CHECKED][check_key(cell)] = record["check"]
        record["cell_seconds"] = time.monotonic() - begin
        kind = f"{cell.kind}{', compiled' if cell.compiled else ''}"
        request.config.stash[_SPENT].setdefault(kind, []).append(record["cell_seconds"])
        replay_clock.replay(benchmark, record.pop("rounds"))
        benchmark.extra_info.update(_identity(cell), **record, commit=settings.commit)
        return record

    return start


def _within_budget(
    config: pytest.Config, settings: BenchSettings, cell: Cell, function: Any
) -> Outcome:
    is_count = cell.kind == "count"
    peaks = {} if is_count else _peaks(config, settings)
    timeout = settings.cell_timeout
    if cell.kind == "goal":
        timeout = max(timeout, GOAL_TIMEOUT)
    left = float("inf")
    if settings.time_budget:
        left = config.stash[_BEGIN] + settings.time_budget - time.monotonic()
    spent = Outcome(
        "timeout",
        f"the run's time budget of {settings.time_budget:g} s was spent; raise --time-budget",
    )
    if left <= 0:
        return spent
    outcome = run_isolated(
        function, cell, settings.shared(peaks, config.stash[_CHECKED]),
        memory=settings.memory_cap, timeout=min(timeout, left),
        device="cpu" if is_count else cell.device, is_shared=is_count,
    )  # fmt: skip
    return spent if outcome.state == "timeout" and left < timeout else outcome


def _identity(cell: Cell) -> dict[str, Any]:
    return {
        "id": cell.id,
        "kind": cell.kind,
        "mechanism": cell.mechanism,
        "label": cell.label,
        "options": dict(cell.options),
        "resolution": cell.resolution,
        "tokens": cell.tokens,
        "width": cell.width,
        "batch": cell.batch,
        "dtype": cell.dtype,
        "device": cell.device,
        "mode": cell.mode,
        "compiled": cell.compiled,
    }


def _peaks(config: pytest.Config, settings: BenchSettings) -> dict[str, float]:
    """What the machine can do at best, measured once, before the first cell."""
    if not config.stash[_PEAKS]:
        dtypes = tuple(sorted({cell.dtype for cell in settings.cells()}))
        # On a GPU with the cells' own cap, so that it is one of their processes.
        memory = settings.memory_cap if settings.device == "cuda" else 2**33
        outcome = run_isolated(
            worker.peaks, settings.shared({}, {}), settings.device, dtypes,
            memory=memory, timeout=120, device=settings.device,
        )  # fmt: skip
        # Without a peak the shares are left out; the cells say themselves what is wrong.
        config.stash[_PEAKS] = outcome.result or {"none": 0.0}
    return config.stash[_PEAKS]


def _miss(request: pytest.FixtureRequest, outcome: Outcome) -> None:
    request.config.stash[_MISSED][request.node.nodeid] = (outcome.state, outcome.reason)
    message = f"{outcome.state}: {outcome.reason}"
    if outcome.state == "error":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A module that takes no cell of this request is left with one test without parameters.
    empty = [item for item in items if "run" in item.fixturenames and not _cell_id(item)]  # type: ignore[attr-defined]
    if empty:
        items[:] = [item for item in items if item not in empty]
        config.hook.pytest_deselected(items=empty)
    # The table's order, not that of the files, which pytest takes up one by one.
    place = {cell.id: i for i, cell in enumerate(config.stash[_SETTINGS].cells())}
    items.sort(key=lambda item: place.get(_cell_id(item) or "", -1))
    for item in items:
        if _cell_id(item):
            item.add_marker(pytest.mark.benchmark(timer=replay_clock))


def _cell_id(item: pytest.Item) -> str | None:
    found = getattr(getattr(item, "callspec", None), "params", {}).get("cell_id")
    return found if isinstance(found, str) else None


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        if _cell_id(item):
            session.config.stash[_REQUESTED][item.nodeid] = item.name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    report = yield
    missed = item.config.stash[_MISSED]
    if item.nodeid in item.config.stash[_REQUESTED] and not report.passed:
        text = " ".join(str(call.excinfo.value).split()) if call.excinfo else report.outcome
        missed.setdefault(item.nodeid, ("error", text[:300]))
    return report


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    settings = config.stash[_SETTINGS]
    machine_info["attnzoo"] = {
        "versions": machine.versions(),
        "profile": settings.profile,
        "device": settings.device,
        "threads": settings.threads,
        "memory_cap": settings.memory_cap,
        "peaks": config.stash[_PEAKS],
        "imports": origins(attnzoo.list_attention()),
    }


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json.update(_accounts(config, output_json["benchmarks"]))


def _accounts(config: pytest.Config, benchmarks: list[dict[str, Any]]) -> dict[str, Any]:
    session: Any = config.pluginmanager.get_plugin("session")
    stop = session and (session.shouldfail or session.shouldstop)
    ended = "the run ended before this case" + (f": {stop}" if stop else "")
    measured = {entry["name"] for entry in benchmarks}
    missed = config.stash[_MISSED]
    requested = config.stash[_REQUESTED]
    absent = []
    for nodeid, name in requested.items():
        if name not in measured:
            state, reason = missed.get(nodeid, ("interrupted", ended))
            absent.append({"name": name, "state": state, "reason": reason})
    return {"cells_requested": sorted(requested.values()), "cells_not_measured": absent}


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the accounts even if no cell was measured, where pytest-benchmark writes nothing."""
    config = session.config
    benchmarks: Any = config._benchmarksession  # type: ignore[attr-defined]
    if config.stash[_UNWRITTEN]:
        session.exitstatus = USER_ERROR
    if not config.stash[_REQUESTED] or config.option.collectonly:
        return
    if not benchmarks.json or benchmarks.benchmarks:
        return
    empty = {
        "machine_info": {}, "commit_info": {}, "benchmarks": [], "version": "",
        "datetime": datetime.now(timezone.utc).isoformat(),
    }  # fmt: skip
    try:
        write_json(benchmarks.json, empty | _accounts(config, []))
    except CannotWrite as error:
        config.stash[_UNWRITTEN].append(str(error))
        session.exitstatus = USER_ERROR


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    requested, missed = config.stash[_REQUESTED], config.stash[_MISSED]
    if not requested or config.option.collectonly:
        return
    terminalreporter.section("cases")

    def line(text: str) -> None:
        terminalreporter.line(printable(text))

    for text in config.stash[_UNWRITTEN]:
        line(f"error: {text}; nothing of this run is stored there")
    counts: dict[str, int] = {}
    for state, _ in missed.values():
        counts[state] = counts.get(state, 0) + 1
    parts = [f"{number} {state}" for state, number in sorted(counts.items())]
    measured = {entry.name for entry in config._benchmarksession.benchmarks}  # type: ignore[attr-defined]
    done = len(measured & set(requested.values()))
    line(f"{len(requested)} requested, {done} measured {', '.join(parts)}")
    for nodeid, (state, reason) in missed.items():
        line(f"  {requested[nodeid]}: {state}, {reason}")
    for kind, seconds in config.stash[_SPENT].items():
        line(
            f"  {len(seconds)} of kind {kind} took {sum(seconds):.0f} s, "
            f"the longest {max(seconds):.1f} s"
        )
    absent: dict[str, None] = {}
    for entry in config._benchmarksession.benchmarks:  # type: ignore[attr-defined]
        for peer, reason in entry.extra_info.get("peers_missing", {}).items():
            absent[f"  {peer} does not run here: {reason}"] = None
        best = entry.extra_info.get("ratio_to_best")
        if best:
            line(
                f"  {entry.extra_info['label']} {entry.extra_info['mode']} at "
                f"{entry.extra_info['resolution']} px takes {best['median']:.2f} x the time of "
                f"the best peer ({entry.extra_info['best_peer']}), quartiles "
                f"{best['q1']:.2f} to {best['q3']:.2f}"
            )
    for text in absent:
        line(text)
