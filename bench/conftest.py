"""The suite as a pytest plugin: options, one test per case, and the accounts of every case.

pytest-benchmark leaves a test that fails or is skipped out of its JSON; here every requested case
ends in ``benchmarks`` or, with a reason, in ``cells_not_measured``. What would measure everything
and store nothing is refused before it starts.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import attnzoo
from attnzoo.errors import UsageError
from bench import machine, summary
from bench.cases import PROFILES, Case
from bench.isolate import Outcome, run_isolated
from bench.options import SuiteRun, options_from
from bench.results import frame, machines_differ
from bench.timing import replay_clock
from recipes.lab.console import USER_ERROR, UserError, printable
from recipes.lab.files import require_writable, write_json
from recipes.lab.imports import import_all, origins

_BOOKS = pytest.StashKey[SuiteRun]()
# One goal compares many layers.
GOAL_TIMEOUT = 1200.0
# Kinds of cases whose time nobody asks for.
_UNTIMED = ("count", "goal", "quality")
# Options of pytest-benchmark that ask for its own table, and those that speak of a clock and of
# calls that are not its own here.
_SHOWING = {"columns", "sort", "group-by", "name", "time-unit", "compare", "histogram", "verbose"}
_IDLE = {"min-time", "max-time", "precision", "confidence", "timer", "calibration-precision",
         "warmup", "warmup-iterations", "disable-gc", "cprofile", "cprofile-loops",
         "cprofile-top", "cprofile-dump"}  # fmt: skip
_SEVERAL = "; several by comma, all of the profile by default"
# Name, default and help of the flags that take text.
_TEXTS = (
    ("mechanisms", "", f"sana, sana:impl=reference or sana*3+softmax{_SEVERAL}"),
    ("resolutions", "", f"pixels of a latent model{_SEVERAL}"),
    ("widths", "", f"of the tokens{_SEVERAL}"),
    ("dtypes", "", f"float32, bfloat16, float16{_SEVERAL}"),
    ("goals", "", f"names such as G4, or none, with --full{_SEVERAL}"),
    ("threads", "1", "of torch; 1 (default) times by CPU time"),
    ("memory-cap", "8GiB", "of one case, such as 300MiB"),
    ("time-budget", "", "seconds; what is not measured by then is listed as such. The most "
     "important cases come first (default: no limit)"),
    ("quality", None, "results of recipes/compare.py"),
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attnzoo", "attnzoo's benchmark suite")
    add = group.addoption
    add("--quick", action="store_true", help="the default: under 4 minutes on 2 cores")
    slow = "all, and the goals: estimated at 8 minutes on an H200, 4 hours on a CPU"
    add("--full", action="store_true", help=slow)
    add("--device", default="cpu", choices=("cpu", "cuda"))
    for name, default, text in _TEXTS:
        add(f"--{name}", default=default, help=text)
    add("--case-timeout", "--cell-timeout", default="180", help="seconds of one case")
    add("--import", dest="imports", action="append", default=[], metavar="FILE|MODULE",
        help="file or module that registers mechanisms of your own; repeat")  # fmt: skip


def _asked(config: pytest.Config) -> set[str]:
    """pytest-benchmark's options that somebody has written, without their prefix."""
    written = [*config.getini("addopts"), *shlex.split(os.environ.get("PYTEST_ADDOPTS", "")),
               *map(str, config.invocation_params.args)]  # fmt: skip
    names = (text.partition("=")[0] for text in written)
    return {n.removeprefix("--benchmark-") for n in names if n.startswith("--benchmark-")}


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
    kinds = ("group", "name", "func", "fullname", "fullfunc", "param")
    groupings = given.benchmark_group_by.split(",")
    unknown = [g for g in groupings if g not in kinds and not g.startswith("param:")]
    idle = sorted(_asked(config) & _IDLE)
    has_pygal = importlib.util.find_spec("pygal") is not None
    for is_wrong, message in (
        (is_distributed or getattr(given, "tx", None),
         "the suite measures one case at a time, each in a process of its own, since two would "
         "disturb each other: leave -n, --dist and --tx out"),
        (given.benchmark_disable and not given.benchmark_enable,
         "--benchmark-disable stores nothing of what is measured: leave it out, or list the "
         "cases with --collect-only"),
        (given.benchmark_skip and not given.benchmark_only,
         "--benchmark-skip skips every case of the suite: leave it out"),
        (given.setuponly or getattr(given, "setupplan", False),
         "--setup-only and --setup-plan measure nothing: leave them out"),
        (idle,
         f"--benchmark-{''.join(idle[:1])} has no effect here, since every case times its own "
         f"rounds in a process of its own: leave it out; --benchmark-min-rounds works"),
        (given.benchmark_histogram and not has_pygal,
         "--benchmark-histogram needs pygal, which is not installed: pip install "
         "'pytest-benchmark[histogram]', or draw the JSON with python bench/plot.py"),
        (unknown,
         f"--benchmark-group-by {''.join(unknown[:1])!r} is unknown; choose of "
         f"{', '.join(kinds)} and param:NAME"),
    ):  # fmt: skip
        if is_wrong:
            raise pytest.UsageError(message)


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark asks for the machine's description
def pytest_configure(config: pytest.Config) -> None:
    _refuse_what_stores_nothing(config)
    given, asked = dict(vars(config.option)), _asked(config)
    chosen = [profile for profile in PROFILES if given[profile]]
    if len(chosen) > 1:
        raise pytest.UsageError("--quick and --full exclude each other; choose one")
    given |= {"profile": (chosen or ["quick"])[0], "imports": tuple(given["imports"])}
    given["min_rounds"] = given["benchmark_min_rounds"] if "min-rounds" in asked else 0
    try:
        import_all(given["imports"])
        books = config.stash[_BOOKS] = options_from(**given)
        # Written here, whole or not at all.
        path, config.option.benchmark_json = config.option.benchmark_json, None
        if path and not config.option.collectonly:
            books.json = require_writable(Path(path).absolute())
        storage = given["benchmark_storage"].removeprefix("file://")
        if (given["benchmark_save"] or given["benchmark_autosave"]) and "+http" not in storage:
            require_writable(Path(storage) / "trial")
    except (UserError, UsageError) as error:
        raise pytest.UsageError(printable(" ".join(str(error).split()))) from error
    if not config.option.benchmark_columns:
        config.option.benchmark_columns = ["median", "iqr", "ops", "rounds"]
    # Whoever ends the run politely gets what was measured until then, as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _session(config: pytest.Config) -> Any:
    """pytest-benchmark's session."""
    return config._benchmarksession  # pyright: ignore[reportAttributeAccessIssue]


def pytest_keyboard_interrupt() -> None:
    """Lets nobody interrupt the writing of the results."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = metafunc.config.stash[_BOOKS].cases.values()
    wanted = [case for case in cases if case.test == metafunc.function.__name__]
    metafunc.parametrize(
        [*Case().params(), "case_id"],
        [pytest.param(*case.params().values(), case.id, id=case.id) for case in wanted],
    )


@pytest.fixture
def case(request, case_id, kind, mechanism, resolution, width, dtype, mode) -> Case:
    """The case of this test; its parameters are there for --benchmark-group-by=param:width."""
    return request.config.stash[_BOOKS].cases[case_id]


@pytest.fixture
def run(request: pytest.FixtureRequest, case: Case, benchmark: Any) -> Any:
    """Runs a function of ``bench.worker`` on the case in its own process and keeps the books."""
    books = request.config.stash[_BOOKS]
    benchmark.group = f"{case.kind} {case.mode}, {case.resolution}px d{case.width} {case.dtype}"
    if case.kind in _UNTIMED:
        benchmark.group = case.kind

    def start(function: Callable[..., dict[str, Any]]) -> dict[str, Any]:
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
            books.conditions.checked[case.check_key] = record["check"]
        record["cell_seconds"] = time.monotonic() - begin
        replay_clock.replay(benchmark, record.pop("rounds"))
        names = ("id", "label", "tokens", "device", "compiled", *case.params())
        benchmark.extra_info.update({name: getattr(case, name) for name in names})
        record |= {"options": dict(case.options), "batch": 1, "commit": books.commit}
        benchmark.extra_info.update(record)
        return record

    return start


def _within_budget(books: SuiteRun, case: Case, function: Any) -> Outcome:
    is_count, left = case.kind == "count", float("inf")
    if not is_count:
        _measure_peaks(books)
    timeout = max(books.case_timeout, GOAL_TIMEOUT if case.kind == "goal" else 0)
    if books.time_budget:
        left = max(0.0, books.begin + books.time_budget - time.monotonic())
    if left:
        outcome = run_isolated(
            function, case, books.conditions, memory=books.memory_cap,
            timeout=min(timeout, left), device="cpu" if is_count else case.device,
            is_shared=is_count,
        )  # fmt: skip
        if outcome.state != "timeout" or left >= timeout:
            return outcome
    text = f"the run's time budget of {books.time_budget:g} s was spent; raise --time-budget"
    return Outcome("timeout", text)


def _measure_peaks(books: SuiteRun) -> None:
    """Adds to the conditions, once, what the machine can do at best."""
    peaks, device = books.conditions.peaks, books.request.device
    if not peaks:
        dtypes = tuple(sorted({case.dtype for case in books.cases.values()}))
        # On a GPU with the cases' own cap, so that it is one of their processes.
        memory = books.memory_cap if device == "cuda" else 2**33
        outcome = run_isolated(machine.measure_peaks, device, dtypes, books.conditions.threads,
                               memory=memory, timeout=120, device=device)  # fmt: skip
        # Without a peak the shares are left out; the cases say themselves what is wrong.
        peaks |= outcome.result or {"none": 0.0}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A test that takes no case of this request is left with one test without parameters.
    empty = [item for item in items if not _case_id(item)]
    if empty:
        items[:] = [item for item in items if item not in empty]
        config.hook.pytest_deselected(items=empty)
    # The table's order, not that of the tests, which pytest takes up one by one.
    position = {name: i for i, name in enumerate(config.stash[_BOOKS].cases)}
    items.sort(key=lambda item: position[_case_id(item)])
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=replay_clock))


def _case_id(item: Any) -> str:
    if not hasattr(item, "callspec") or "case_id" not in item.callspec.params:
        raise pytest.UsageError("the suite runs by itself: name no other folder beside bench/")
    found = item.callspec.params["case_id"]
    return found if isinstance(found, str) else ""


def pytest_collection_finish(session: pytest.Session) -> None:
    requested = {item.nodeid: item.name for item in session.items}
    session.config.stash[_BOOKS].requested.update(requested)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    report = yield
    if not report.passed:
        text = " ".join(str(call.excinfo.value).split()) if call.excinfo else report.outcome
        item.config.stash[_BOOKS].missed.setdefault(item.nodeid, ("error", text[:300]))
    return report


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    books = config.stash[_BOOKS]
    machine_info["attnzoo"] = {
        "versions": machine.versions(),
        "profile": books.request.profile,
        "device": books.request.device,
        "threads": books.conditions.threads,
        "memory_cap": books.memory_cap,
        "peaks": books.conditions.peaks,
        "imports": origins(attnzoo.list_attention()),
    }


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, machine_info: Any, compared_benchmark: dict[str, Any]
) -> None:
    """Stores the other run; pytest-benchmark would warn of the clock rate of the moment."""
    config.stash[_BOOKS].compared.append(dict(compared_benchmark))
    compared_benchmark["machine_info"] = machine_info


def pytest_benchmark_group_stats(benchmarks: list[dict[str, Any]]) -> None:
    """Leaves out of pytest-benchmark's table how long counting took."""
    benchmarks[:] = [entry for entry in benchmarks if entry["group"] not in _UNTIMED]


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Adds the accounts, whose keys are those of files from before a case was called one."""
    session: Any = config.pluginmanager.get_plugin("session")
    stop = session and (session.shouldfail or session.shouldstop)
    ended = ("interrupted", "the run ended before this case" + (f": {stop}" if stop else ""))
    measured, books = {b["name"] for b in output_json["benchmarks"]}, config.stash[_BOOKS]
    output_json["cells_requested"] = sorted(books.requested.values())
    output_json["cells_not_measured"] = [
        dict(zip(("name", "state", "reason"), (name, *books.missed.get(node, ended)), strict=True))
        for node, name in books.requested.items()
        if name not in measured
    ]


def _report(config: pytest.Config) -> dict[str, Any]:
    """What --benchmark-json holds."""
    hook, results = config.hook, _session(config)
    output: dict[str, Any] = hook.pytest_benchmark_generate_json(
        config=config, benchmarks=results.benchmarks, include_data=True,
        machine_info=results.get_machine_info(),
        commit_info=hook.pytest_benchmark_generate_commit_info(config=config),
    )  # fmt: skip
    hook.pytest_benchmark_update_json(
        config=config, benchmarks=results.benchmarks, output_json=output
    )
    return output


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Any:
    """Writes --benchmark-json with the accounts, also if no case was measured."""
    books = session.config.stash[_BOOKS]
    try:
        yield  # pytest-benchmark writes --benchmark-save
        if books.json and books.requested:
            write_json(books.json, _report(session.config), indent=4)
    except OSError as error:
        books.unwritten.append(str(error))
        session.exitstatus = USER_ERROR


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark raises where its --benchmark-compare-fail does
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    books, session = config.stash[_BOOKS], _session(config)
    if not books.requested or config.option.collectonly:
        return
    report, is_quiet = _report(config), session.quiet
    session.quiet = is_quiet or not _asked(config) & _SHOWING
    for title, lines in (
        ("time and memory", _tables(report)),
        ("cases", _accounts(books, report)),
    ):
        found = [] if is_quiet and title != "cases" else list(lines)
        if found:
            terminalreporter.section(title)
        for text in found:
            terminalreporter.line(printable(text))


def _tables(report: dict[str, Any]) -> Iterator[str]:
    """What every mechanism takes, by size."""
    cases = frame(report)
    timed, is_raced = set(), True
    for title, rows in summary.sizes(cases):
        timed |= set(rows["resolution"])
        is_raced = is_raced and rows["is_raced"].all()
        yield title
        for mode, fastest, smallest, _ in summary.winners(rows):
            yield f"{mode}: fastest {fastest}, least memory {smallest}"
        yield f"{summary.aligned(summary.table(rows))}\n"
    others: Any = cases[~cases["resolution"].isin(timed)]
    for title, rows in summary.counts(others):
        yield f"{title}\n{summary.aligned(rows)}\n"
    if not is_raced:
        yield "~: timed in two processes, not in turn with softmax"


def _accounts(books: SuiteRun, report: dict[str, Any]) -> Iterator[str]:
    """What was asked for and what became of it."""
    for text in books.unwritten:
        yield f"error: {text}; nothing of this run is stored there"
    counts = collections.Counter(state for state, _ in books.missed.values())
    parts = [f"{number} {state}" for state, number in sorted(counts.items())]
    done = len(report["cells_requested"]) - len(report["cells_not_measured"])
    yield f"{len(books.requested)} requested, {done} measured {', '.join(parts)}"
    for node, (state, reason) in books.missed.items():
        yield f"  {books.requested[node]}: {state}, {reason}"
    infos = [entry["extra_info"] for entry in report["benchmarks"]]
    for info in infos:
        if best := info.get("ratio_to_best"):
            yield (
                f"  {info['label']} {info['mode']} at {info['resolution']} px takes "
                f"{best['median']:.2f} x the time of the best peer ({info['best_peer']}), "
                f"quartiles {best['q1']:.2f} to {best['q3']:.2f}"
            )
    missing = [reason for info in infos for reason in info.get("peers_missing", {}).items()]
    for peer, why in dict.fromkeys(missing):
        yield f"  {peer} does not run here: {why}"
    for other in books.compared:
        if differs := machines_differ(other, report):
            yield f"no fair comparison, the machines differ: {differs}"
    if books.json and not books.unwritten:
        yield f"written to {books.json}; python bench/plot.py draws it"
