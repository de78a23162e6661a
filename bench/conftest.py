"""The suite as a pytest plugin: options, one test per case, and the accounts of every case.

pytest-benchmark leaves a test that fails or is skipped out of its JSON; here every requested case
ends in ``benchmarks`` or, with a reason, in ``cells_not_measured``. What would measure everything
and store nothing is refused before it starts.
"""

from __future__ import annotations

import collections
import dataclasses
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
from bench.cases import PROFILES, Case
from bench.checks import check_key
from bench.isolate import Outcome, run_isolated
from bench.options import SuiteOptions, options_from
from bench.timing import replay_clock
from recipes.lab.console import USER_ERROR, UserError, printable
from recipes.lab.files import CannotWrite, require_writable, write_json
from recipes.lab.imports import import_all, origins


@dataclasses.dataclass
class Books:
    """What the plugin knows of a run.

    Attributes:
        options: The command line.
        requested: Names of the tests by node id.
        missed: State and reason of those that were not measured.
        peaks: What the machine can do at best, measured before the first case.
        checked: What was found equal to its reference, by ``check_key``.
        spent: Seconds of every case by kind.
        begin: When the run began, by the monotonic clock.
        unwritten: Files that the system refused, in words.
    """

    options: SuiteOptions
    requested: dict[str, str] = dataclasses.field(default_factory=dict)
    missed: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    peaks: dict[str, float] = dataclasses.field(default_factory=dict)
    checked: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    spent: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    begin: float = dataclasses.field(default_factory=time.monotonic)
    unwritten: list[str] = dataclasses.field(default_factory=list)

    def shared(self) -> worker.Conditions:
        """What every case's process needs to know."""
        given = self.options
        return worker.Conditions(given.threads, given.imports, self.peaks, given.quality,
                                 self.checked)  # fmt: skip


_BOOKS = pytest.StashKey[Books]()
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
    group.addoption("--mechanisms", default="", help=f"sana or sana:impl=reference{lists}")
    group.addoption("--resolutions", default="", help=f"pixels of a latent model{lists}")
    group.addoption("--widths", default="", help=f"of the tokens{lists}")
    group.addoption("--dtypes", default="", help=f"float32, bfloat16, float16{lists}")
    group.addoption("--goals", default="", help=f"names such as G4, or none, with --full{lists}")
    group.addoption("--threads", default="1", help="of torch; 1 (default) times by CPU time")
    group.addoption("--memory-cap", default="8GiB", help="of one case, such as 300MiB")
    group.addoption(
        "--case-timeout", "--cell-timeout", dest="case_timeout", default="180",
        help="seconds of one case",
    )  # fmt: skip
    group.addoption(
        "--time-budget", default="",
        help="seconds; what is not measured by then is listed as such. The most important "
        "cases come first (default: no limit)",
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
    imports = tuple(option("imports") or ())
    names = ("device", "mechanisms", "resolutions", "widths", "dtypes", "goals", "threads",
             "memory_cap", "case_timeout", "time_budget", "quality")  # fmt: skip
    try:
        import_all(imports)
        options = options_from(
            profile=(chosen or ["quick"])[0],
            imports=imports,
            **{name: option(name) for name in names},
        )
        books = config.stash[_BOOKS] = Books(options)
        if not config.option.collectonly:
            _prepare_writing(config, books)
    except (UserError, UsageError) as error:
        raise pytest.UsageError(printable(" ".join(str(error).split()))) from error
    given = [str(argument) for argument in config.invocation_params.args]
    if not any(argument.startswith("--benchmark-columns") for argument in given):
        config.option.benchmark_columns = ["median", "iqr", "ops", "rounds"]
    # Whoever ends the run politely gets what was measured until then, as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _session(config: pytest.Config) -> Any:
    """pytest-benchmark's session."""
    return config._benchmarksession  # pyright: ignore[reportAttributeAccessIssue]


def _prepare_writing(config: pytest.Config, books: Books) -> None:
    """Checks the outputs of pytest-benchmark, and has them written whole or not at all."""
    session = _session(config)

    def reported(write: Callable[..., None]) -> Callable[..., None]:
        def guarded(*arguments: Any) -> None:
            try:
                write(*arguments)
            except (OSError, ValueError) as error:
                books.unwritten.append(str(error))

        return guarded

    def save_json(content: dict[str, Any]) -> None:
        write_json(session.json, content, indent=4)
        session.logger.info(f"Wrote benchmark data in: {session.json}", purple=True)

    if session.json:
        session.json = require_writable(Path(session.json).absolute())
        session.save_json = reported(save_json)
    if (session.save or session.autosave) and hasattr(session.storage, "path"):
        require_writable(Path(session.storage.path) / "trial")
        session.storage.save = reported(session.storage.save)


def pytest_keyboard_interrupt() -> None:
    """Lets nobody interrupt the writing of the results."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    cases = metafunc.config.stash[_BOOKS].options.cases.values()
    wanted = [case for case in cases if case.test == metafunc.function.__name__]
    metafunc.parametrize(
        [*Case().params(), "case_id"],
        [pytest.param(*case.params().values(), case.id, id=case.id) for case in wanted],
    )


@pytest.fixture
def case(request, case_id, kind, mechanism, resolution, width, dtype, mode) -> Case:
    """The case of this test; its parameters are there for --benchmark-group-by=param:width."""
    return request.config.stash[_BOOKS].options.cases[case_id]


@pytest.fixture
def run(request: pytest.FixtureRequest, case: Case, benchmark: Any) -> Any:
    """Runs a function of ``bench.worker`` on the case in its own process and keeps the books."""
    books = request.config.stash[_BOOKS]
    benchmark.group = f"{case.kind} {case.mode}, {case.resolution}px d{case.width} {case.dtype}"
    if case.kind in ("count", "goal", "quality"):
        benchmark.group = case.kind

    def start(function: Any) -> dict[str, Any]:
        begin = time.monotonic()
        outcome = _within_budget(books, case, function)
        if outcome.state != "measured":
            books.missed[request.node.nodeid] = (outcome.state, outcome.reason)
            message = f"{outcome.state}: {outcome.reason}"
            if outcome.state == "error":
                pytest.fail(message, pytrace=False)
            pytest.skip(message)
        record: dict[str, Any] = dict(outcome.result)
        if record.get("check") and case.kind != "goal":
            books.checked[check_key(case)] = record["check"]
        record["cell_seconds"] = time.monotonic() - begin
        kind = f"{case.kind}{', compiled' if case.compiled else ''}"
        books.spent.setdefault(kind, []).append(record["cell_seconds"])
        replay_clock.replay(benchmark, record.pop("rounds"))
        benchmark.extra_info.update(_identity(case), **record, commit=books.options.commit)
        return record

    return start


def _within_budget(books: Books, case: Case, function: Any) -> Outcome:
    options, is_count = books.options, case.kind == "count"
    if not is_count and not books.peaks:
        books.peaks = _peaks(books)
    timeout, left = options.case_timeout, float("inf")
    if case.kind == "goal":
        timeout = max(timeout, GOAL_TIMEOUT)
    if options.time_budget:
        left = books.begin + options.time_budget - time.monotonic()
    spent = Outcome(
        "timeout",
        f"the run's time budget of {options.time_budget:g} s was spent; raise --time-budget",
    )
    if left <= 0:
        return spent
    outcome = run_isolated(
        function, case, books.shared(), memory=options.memory_cap, timeout=min(timeout, left),
        device="cpu" if is_count else case.device, is_shared=is_count,
    )  # fmt: skip
    return spent if outcome.state == "timeout" and left < timeout else outcome


def _peaks(books: Books) -> dict[str, float]:
    """What the machine can do at best."""
    options, device = books.options, books.options.request.device
    dtypes = tuple(sorted({case.dtype for case in options.cases.values()}))
    # On a GPU with the cases' own cap, so that it is one of their processes.
    memory = options.memory_cap if device == "cuda" else 2**33
    outcome = run_isolated(worker.peaks, books.shared(), device, dtypes, memory=memory,
                           timeout=120, device=device)  # fmt: skip
    # Without a peak the shares are left out; the cases say themselves what is wrong.
    return outcome.result or {"none": 0.0}


def _identity(case: Case) -> dict[str, Any]:
    names = ("id", "kind", "mechanism", "label", "resolution", "tokens", "width", "batch", "dtype",
             "device", "mode", "compiled")  # fmt: skip
    return {"options": dict(case.options)} | {name: getattr(case, name) for name in names}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A test that takes no case of this request is left with one test without parameters.
    empty = [item for item in items if not _case_id(item)]
    if empty:
        items[:] = [item for item in items if item not in empty]
        config.hook.pytest_deselected(items=empty)
    # The table's order, not that of the tests, which pytest takes up one by one.
    position = {name: i for i, name in enumerate(config.stash[_BOOKS].options.cases)}
    items.sort(key=lambda item: position.get(_case_id(item) or "", -1))
    for item in items:
        if _case_id(item):
            item.add_marker(pytest.mark.benchmark(timer=replay_clock))


def _case_id(item: pytest.Item) -> str | None:
    found = getattr(getattr(item, "callspec", None), "params", {}).get("case_id")
    return found if isinstance(found, str) else None


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        if _case_id(item):
            session.config.stash[_BOOKS].requested[item.nodeid] = item.name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    report = yield
    books = item.config.stash[_BOOKS]
    if item.nodeid in books.requested and not report.passed:
        text = " ".join(str(call.excinfo.value).split()) if call.excinfo else report.outcome
        books.missed.setdefault(item.nodeid, ("error", text[:300]))
    return report


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    books = config.stash[_BOOKS]
    machine_info["attnzoo"] = {
        "versions": machine.versions(),
        "profile": books.options.request.profile,
        "device": books.options.request.device,
        "threads": books.options.threads,
        "memory_cap": books.options.memory_cap,
        "peaks": books.peaks,
        "imports": origins(attnzoo.list_attention()),
    }


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json.update(_accounts(config, output_json["benchmarks"]))


def _accounts(config: pytest.Config, benchmarks: list[dict[str, Any]]) -> dict[str, Any]:
    session: Any = config.pluginmanager.get_plugin("session")
    stop = session and (session.shouldfail or session.shouldstop)
    ended = "the run ended before this case" + (f": {stop}" if stop else "")
    measured, books = {entry["name"] for entry in benchmarks}, config.stash[_BOOKS]
    absent = []
    for nodeid, name in books.requested.items():
        if name not in measured:
            state, reason = books.missed.get(nodeid, ("interrupted", ended))
            absent.append({"name": name, "state": state, "reason": reason})
    # The keys are those of files from before a case was called one.
    return {"cells_requested": sorted(books.requested.values()), "cells_not_measured": absent}


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the accounts even if no case was measured, where pytest-benchmark writes nothing."""
    books, benchmarks = session.config.stash[_BOOKS], _session(session.config)
    is_listing = not books.requested or session.config.option.collectonly
    if not is_listing and benchmarks.json and not benchmarks.benchmarks:
        empty = {
            "machine_info": {}, "commit_info": {}, "benchmarks": [], "version": "",
            "datetime": datetime.now(timezone.utc).isoformat(),
        }  # fmt: skip
        try:
            write_json(benchmarks.json, empty | _accounts(session.config, []))
        except CannotWrite as error:
            books.unwritten.append(str(error))
    if books.unwritten:
        session.exitstatus = USER_ERROR


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    books, benchmarks = config.stash[_BOOKS], _session(config).benchmarks
    if not books.requested or config.option.collectonly:
        return
    terminalreporter.section("cases")
    lines = [f"error: {text}; nothing of this run is stored there" for text in books.unwritten]
    counts = collections.Counter(state for state, _ in books.missed.values())
    parts = [f"{number} {state}" for state, number in sorted(counts.items())]
    done = len({entry.name for entry in benchmarks} & set(books.requested.values()))
    lines.append(f"{len(books.requested)} requested, {done} measured {', '.join(parts)}")
    for nodeid, (state, reason) in books.missed.items():
        lines.append(f"  {books.requested[nodeid]}: {state}, {reason}")
    for kind, seconds in books.spent.items():
        lines.append(f"  {len(seconds)} of kind {kind} took {sum(seconds):.0f} s, the longest "
                     f"{max(seconds):.1f} s")  # fmt: skip
    absent: dict[str, None] = {}
    for info in (entry.extra_info for entry in benchmarks):
        for peer, reason in info.get("peers_missing", {}).items():
            absent[f"  {peer} does not run here: {reason}"] = None
        if best := info.get("ratio_to_best"):
            lines.append(
                f"  {info['label']} {info['mode']} at {info['resolution']} px takes "
                f"{best['median']:.2f} x the time of the best peer ({info['best_peer']}), "
                f"quartiles {best['q1']:.2f} to {best['q3']:.2f}"
            )
    for text in [*lines, *absent]:
        terminalreporter.line(printable(text))
