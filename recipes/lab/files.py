"""The one place that writes files: whole or not at all, in UTF-8, never through a link.

Every writer makes a temporary file of its own beside the target, so that two processes may write
the same file at the same time and the last one wins. A link at the target is replaced, not
followed. What the system refuses (a full disk, no permission) is a ``CannotWrite``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from recipes.lab.console import UserError

TEMPORARY = ".tmp-"  # what the names of unfinished files and folders begin with


class CannotWrite(UserError, OSError):
    """The system refuses to write; the message names the file and the reason.

    Attributes:
        errno: The system's number of the reason.
        strerror: The system's words for it.
    """

    def __init__(self, path: Path, error: Exception) -> None:
        text = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        super().__init__(f"cannot write {str(path)!r}: {text}")
        # safetensors and PIL wrap the system's error into text of their own.
        is_full = "os error 28" in text or "No space left" in text
        number = error.errno if isinstance(error, OSError) else None
        self.errno = number or (errno.ENOSPC if is_full else errno.EIO)
        self.strerror = text

    def __str__(self) -> str:
        return str(self.args[0])


def _beside(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives the name of a temporary file to be written; it becomes ``path`` at the end.

    The temporary name has the suffix of ``path``, since many writers go by it. If the statement
    inside fails, nothing is left and an older file stays as it was.

    Args:
        path: The file to write; missing folders are made.

    Raises:
        CannotWrite: The system refuses.
    """
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(path, error) from error
    except Exception as error:
        if "os error" in str(error):  # safetensors' own class for what the system refuses
            raise CannotWrite(path, error) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def opened_whole(path: Path) -> Iterator[IO[bytes]]:
    """The same as an open binary file, for writers that take one."""
    with whole_file(path) as temporary, open(temporary, "xb") as file:
        yield file
        file.flush()


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all.

    Raises:
        CannotWrite: The system refuses.
    """
    with opened_whole(path) as file:
        file.write(content)


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file that others may read if they may read the files beside it."""
    from safetensors.torch import save_file  # imports torch, which --help can do without

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, dict(metadata))
    share(path, mode)


def share(path: Path, mode: int) -> None:
    """Gives a safetensors file, which safetensors leaves to its owner alone, the usual mode."""
    with contextlib.suppress(OSError):  # of file systems without modes
        path.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """The same of text, in UTF-8 whatever the locale; what no encoding knows is escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """The same of JSON; infinities and NaNs are refused, numpy's numbers are taken.

    Raises:
        CannotWrite: The system refuses.
        ValueError: The content holds a number that JSON does not have.
    """
    separators = None if indent else (",", ":")
    text = json.dumps(
        content, indent=indent, separators=separators, allow_nan=False, default=_plain
    )
    write_text(path, text + "\n")


def _plain(value: Any) -> Any:
    # A scalar of numpy or torch, without importing either.
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def require_writable(path: Path) -> Path:
    """Returns ``path`` if a file can be written there; missing folders are made.

    Asked before long work whose result goes there.

    Raises:
        CannotWrite: The system refuses, or a folder of that name is there.
    """
    if path.is_dir():
        raise CannotWrite(path, IsADirectoryError(errno.EISDIR, "it is a folder"))
    trial = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise CannotWrite(path, error) from error
    return path


def read_json(path: Path, what: str = "file", remedy: str = "") -> Any:
    """Reads JSON in UTF-8.

    Args:
        path: To read.
        what: It is, for messages.
        remedy: What helps where it cannot be read, likewise.

    Raises:
        UserError: It is missing, unreadable or damaged; the message names it.
    """
    remedy = remedy and f"; {remedy}"
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{what} {str(path)!r} cannot be read: {error.strerror}{remedy}"
        ) from error
    except ValueError as error:
        raise UserError(f"{what} {str(path)!r} is damaged: {error}{remedy}") from error
    except RecursionError as error:
        raise UserError(f"{what} {str(path)!r} is nested too deeply{remedy}") from error


def refuse_links(root: Path, path: Path) -> Path:
    """Returns ``path`` if nothing between ``root`` and it, itself included, is a link.

    ``root`` may be a link: the user has named it. What lies inside may have come from elsewhere.

    Raises:
        UserError: Something on the way is a link, which would lead writing out of ``root``.
    """
    place = root
    for part in path.relative_to(root).parts:
        place = place / part
        if place.is_symlink():
            raise UserError(
                f"{str(place)!r} is a link, and nothing in {str(root)!r} is written or deleted "
                f"through one; remove the link"
            )
    return path


@contextlib.contextmanager
def locked(
    file: Path, *, wait: bool = False, warn: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Holds a lock on a file inside the with-statement; it goes with the process.

    Where the file system knows no locks, there is none, and ``warn`` says so.

    Args:
        file: Made if missing; holds the owner's process number and host.
        wait: Whether to wait for another holder instead of refusing.
        warn: Told once if there can be no lock.

    Raises:
        UserError: Another process holds it.
        CannotWrite: The file cannot be made, or is a link.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, flags, 0o666)
    except OSError as error:
        raise CannotWrite(file, error) from error
    with open(descriptor, "r+", encoding="utf-8", errors="replace") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise _held(file, handle.read(200)) from None
        except OSError as error:
            if warn:
                warn(f"{file.parent} is not locked: {error.strerror}")
        # The text is a courtesy, and a full disk has no room: what waits in a buffer would fail
        # again when the file is closed.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        yield


def check_unlocked(file: Path) -> None:
    """Leaves no trace, unlike ``locked``.

    Raises:
        UserError: Another process holds the lock.
    """
    if os.path.isdir(file):  # who would lock it says so
        return
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    with open(descriptor, encoding="utf-8", errors="replace") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(file, handle.read(200)) from None
        except OSError:
            return


def _held(file: Path, holder: str) -> UserError:
    return UserError(
        f"{str(file.parent)!r} is being written to by {holder.strip() or 'another process'}; wait "
        f"for it, stop it, or choose another folder"
    )


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
        return digest.hexdigest()
