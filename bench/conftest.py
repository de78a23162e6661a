"""The suite as a pytest plugin: options, one test per case, and the accounts of every case.

pytest-benchmark leaves a test that fails or is skipped out of its JSON; here every requested case
ends in ``benchmarks`` or, with a reason, in ``cells_not_measured``. What would measure everything
and store nothing is refused before it starts.
"""

from __future__ import annotations

import collections
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import attnzoo
from attnzoo.errors import UsageError
from bench import machine
from bench.cases import PROFILES, Case
from bench.isolate import Outcome, run_isolated
from bench.options import SuiteRun, options_from
from bench.timing import replay_clock
from recipes.lab.console import USER_ERROR, UserError, printable
from recipes.lab.files import require_writable, write_json
from recipes.lab.imports import import_all, origins

_BOOKS = pytest.StashKey[SuiteRun]()
# One goal compares many layers.
GOAL_TIMEOUT = 1200.0
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
        (unknown,
         f"--benchmark-group-by {''.join(unknown[:1])!r} is unknown; choose of "
         f"{', '.join(kinds)} and param:NAME"),
    ):  # fmt: skip
        if is_wrong:
            raise pytest.UsageError(message)


@pytest.hookimpl(trylast=True)  # after pytest-benchmark, whose session saves results of its own
def pytest_configure(config: pytest.Config) -> None:
    _refuse_what_stores_nothing(config)
    given = dict(vars(config.option))
    chosen = [profile for profile in PROFILES if given[profile]]
    if len(chosen) > 1:
        raise pytest.UsageError("--quick and --full exclude each other; choose one")
    given |= {"profile": (chosen or ["quick"])[0], "imports": tuple(given["imports"])}
    try:
        import_all(given["imports"])
        books = config.stash[_BOOKS] = options_from(**given)
        session = _session(config)
        if session.json and not config.option.collectonly:
            books.json = require_writable(Path(session.json).absolute())
        session.json = None  # written here, whole or not at all
        if (session.save or session.autosave) and hasattr(session.storage, "path"):
            require_writable(Path(session.storage.path) / "trial")
    except (UserError, UsageError) as error:
        raise pytest.UsageError(printable(" ".join(str(error).split()))) from error
    arguments = map(str, config.invocation_params.args)
    if not any(argument.startswith("--benchmark-columns") for argument in arguments):
        session.columns = ["median", "iqr", "ops", "rounds"]
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
    if case.kind in ("count", "goal", "quality"):
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


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Any:
    """Writes --benchmark-json with the accounts, also if no case was measured."""
    config = session.config
    books, hook, results = config.stash[_BOOKS], config.hook, _session(config)
    try:
        yield  # pytest-benchmark writes --benchmark-save
        if books.json and books.requested:
            output: dict[str, Any] = hook.pytest_benchmark_generate_json(
                config=config, benchmarks=results.benchmarks, include_data=True,
                machine_info=results.get_machine_info(),
                commit_info=hook.pytest_benchmark_generate_commit_info(config=config),
            )  # fmt: skip
            hook.pytest_benchmark_update_json(
                config=config, benchmarks=results.benchmarks, output_json=output
            )
            write_json(books.json, output, indent=4)
    except OSError as error:
        books.unwritten.append(str(error))
        session.exitstatus = USER_ERROR


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    books, benchmarks = config.stash[_BOOKS], _session(config).benchmarks
    if not books.requested or config.option.collectonly:
        return
    counts = collections.Counter(state for state, _ in books.missed.values())
    parts = [f"{number} {state}" for state, number in sorted(counts.items())]
    done = len({entry.name for entry in benchmarks} & set(books.requested.values()))
    lines = [f"error: {text}; nothing of this run is stored there" for text in books.unwritten]
    lines.append(f"{len(books.requested)} requested, {done} measured {', '.join(parts)}")
    lines += [f"  {books.requested[node]}: {state}, {reason}"
              for node, (state, reason) in books.missed.items()]  # fmt: skip
    infos = [entry.extra_info for entry in benchmarks]
    lines += [
        f"  {info['label']} {info['mode']} at {info['resolution']} px takes {best['median']:.2f} "
        f"x the time of the best peer ({info['best_peer']}), quartiles {best['q1']:.2f} to "
        f"{best['q3']:.2f}"
        for info in infos
        if (best := info.get("ratio_to_best"))
    ]
    missing = [reason for info in infos for reason in info.get("peers_missing", {}).items()]
    lines += [f"  {peer} does not run here: {why}" for peer, why in dict.fromkeys(missing)]
    terminalreporter.section("cases")
    for text in lines:
        terminalreporter.line(printable(text))
