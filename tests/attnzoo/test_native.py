"""The cache of the compiled power map: private, checked by content, and never in the way."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnzoo.ops import dispatch
from attnzoo.ops import native_build as build
from attnzoo.ops.native_build import library
from attnzoo.ops.power_map import native, power_map

pytestmark = pytest.mark.skipif(
    not dispatch._native_works(), reason="no C compiler, or ATTNZOO_NATIVE=0"
)


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_FLAGS", ["-shared", "-fPIC"])  # quick to build
    return tmp_path / "attnzoo"


def works(built) -> bool:
    z, gamma = torch.randn(3, 40), torch.full((3, 1), 2.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: built)
        exact = power_map(z, gamma, impl="reference")
        return built is not None and torch.allclose(power_map(z, gamma, impl="native"), exact)


def only_file(folder: Path) -> Path:
    [built] = folder.iterdir()
    return built


def no_compiler(monkeypatch) -> None:
    def run(*_, **__):
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", run)


def test_a_build_is_cached_for_its_user_alone(cache, monkeypatch):
    assert works(library.__wrapped__())
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(only_file(cache).stat().st_mode) == 0o600
    no_compiler(monkeypatch)
    assert works(library.__wrapped__())


DAMAGES = {
    "empty": lambda data: b"",
    "a byte": lambda data: b"\x7f",
    "truncated": lambda data: data[: len(data) // 2],
    "cut by its last byte": lambda data: data[:-1],
    "altered": lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    "longer": lambda data: data + b"\0",
    "another file": lambda data: b"no library at all",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_again_and_never_loaded(damage, cache):
    library.__wrapped__()
    built = only_file(cache)
    whole = built.read_bytes()
    built.write_bytes(DAMAGES[damage](whole))
    assert works(library.__wrapped__())
    assert len(only_file(cache).read_bytes()) == len(whole)


def test_a_library_that_shrinks_while_it_is_loaded_does_not_crash(cache):
    built = library.__wrapped__()
    os.truncate(only_file(cache), 0)
    assert works(built)


def test_the_library_of_another_build_is_not_taken_for_this_one(cache, monkeypatch):
    library.__wrapped__()
    first = only_file(cache)
    monkeypatch.setattr(build, "_FLAGS", ["-shared", "-fPIC", "-O1"])
    library.__wrapped__()
    [second] = set(cache.iterdir()) - {first}
    second.write_bytes(first.read_bytes())
    before = second.stat().st_ino
    assert works(library.__wrapped__()) and second.stat().st_ino != before


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o1777])
def test_a_folder_that_others_write_to_is_neither_read_nor_written(mode, cache, monkeypatch):
    library.__wrapped__()
    cache.chmod(mode)
    before = {path: path.stat().st_mtime_ns for path in [cache, *cache.iterdir()]}
    opened = []
    monkeypatch.setattr(build, "_read", lambda *_: opened.append(1))
    assert works(library.__wrapped__()) and not opened
    assert before == {path: path.stat().st_mtime_ns for path in [cache, *cache.iterdir()]}


def test_a_folder_of_another_user_is_not_used(cache, monkeypatch):
    library.__wrapped__()
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    monkeypatch.setattr(build, "_read", lambda *_: pytest.fail("read"))
    assert works(library.__wrapped__())


@pytest.mark.parametrize("kind", ["folder", "dangling", "file", "library", "pipe", "writable"])
def test_links_and_other_things_in_the_way_are_not_followed(kind, cache, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    if kind in ("folder", "dangling"):
        if kind == "folder":
            elsewhere.mkdir()
        cache.symlink_to(elsewhere)
    elif kind == "file":
        cache.write_text("")
    else:
        library.__wrapped__()
        built = only_file(cache)
        if kind == "writable":
            built.chmod(0o666)
        else:
            built.rename(elsewhere)
            os.mkfifo(built) if kind == "pipe" else built.symlink_to(elsewhere)
    assert works(library.__wrapped__())
    if kind in ("folder", "dangling"):
        assert not elsewhere.exists() or not list(elsewhere.iterdir())
    elif kind != "file":  # replaced, not written through
        assert only_file(cache).is_file() and not only_file(cache).is_symlink()
        assert stat.S_IMODE(only_file(cache).stat().st_mode) == 0o600


def test_a_relative_cache_is_not_code_of_the_working_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert works(library.__wrapped__())
    assert not (tmp_path / "here").exists()
    assert only_file(tmp_path / "home/.cache/attnzoo").suffix == ".so"


def in_a_process(code: str, **environment: str | None) -> subprocess.Popen:
    variables = {k: v for k, v in (os.environ | environment).items() if v is not None}
    variables["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen(
        [sys.executable, "-c", code], env=variables, stdout=-1, stderr=-1, text=True
    )


USE = (
    "import torch; from attnzoo.ops.dispatch import choose; "
    "from attnzoo.ops.power_map import power_map; "
    "x = torch.ones(2, 3); power_map(x, torch.ones(1)); print(choose('power_map', 'auto', x))"
)


def test_two_builders_at_once(cache):
    processes = [in_a_process(USE) for _ in range(2)]
    for process in processes:
        assert process.communicate(timeout=120) == ("native\n", "")
    assert only_file(cache).suffix == ".so"


def test_without_a_home_or_with_one_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for home in (None, "relative"):
        process = in_a_process(
            f"import os; os.chdir({str(tmp_path)!r}); {USE}", HOME=home, XDG_CACHE_HOME=None
        )
        assert process.communicate(timeout=120) == ("native\n", ""), home
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "No such file"),
        ("false", "exit status 1"),
        ("cc -no-such-option", "no-such-option"),
        ("'unbalanced", "No closing quotation"),
    ],
)
def test_a_failing_build_says_why_and_does_without(compiler, reason, cache, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(RuntimeWarning, match=f"{reason}.*ATTNZOO_NATIVE=0"):
        assert library.__wrapped__() is None


def test_a_failing_build_is_one_line(tmp_path):
    code = f"import tempfile; tempfile.tempdir = '/dev/null'; {USE}"  # nowhere to build
    process = in_a_process(code, XDG_CACHE_HOME=str(tmp_path))
    out, errors = process.communicate(timeout=120)
    assert out == "torch\n" and errors.count("\n") == 1 and "/dev/null" in errors


def test_unwanted_kernels_are_no_warning():
    process = in_a_process(USE, ATTNZOO_NATIVE="0")
    assert process.communicate(timeout=120) == ("torch\n", "")


def test_a_cache_that_cannot_be_written_to_costs_the_cache_alone(cache, monkeypatch):
    cache.mkdir(0o700)
    real = os.open

    def full(path, flags, *arguments, **options):
        if flags & os.O_CREAT and options.get("dir_fd") is not None:
            raise OSError(28, "No space left on device")
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", full)
    assert works(library.__wrapped__())
    assert not list(cache.iterdir())
