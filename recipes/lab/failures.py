"""Which process of a launch has failed first, and with what.

The others then lose the connection to it, in words of the network's. A process notes its failure
where all can read it before it ends, so that one speaks, of the cause, and all know it.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

_KEY = "recipes/first-failure"
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
UNHEARD = (
    "another process has ended without a word, as where the system kills it for its memory; the "
    "same command goes on where it can"
)


def are_noted() -> bool:
    """Whether the processes of this launch, if there are several, know one another by now."""
    return _store() is not None


def is_echo(error: BaseException) -> bool:
    """Whether an error says no more than that another process is gone."""
    if not (are_noted() and isinstance(error, RuntimeError)):
        return False
    text = str(error)
    of_network = "gloo" in text or isinstance(error, sys.modules["torch"].distributed.DistError)
    return of_network and any(words in text for words in _LOST)


def note(error: BaseException, status: int) -> bool:
    """Notes how this process ends; whether no other has failed before it."""
    if is_echo(error):
        return False
    store = _store()
    if store is None:
        return True
    rank = sys.modules["torch"].distributed.get_rank()
    mine = f"{status} process {rank}: {described(error)}".encode("utf-8", "backslashreplace")
    try:
        return store.compare_set(_KEY, "", mine.decode()) == mine
    except RuntimeError:  # the process that keeps the notes is gone
        return True


def first() -> tuple[int, str] | None:
    """Exit status and words of the process that has failed first, if it has noted them."""
    with contextlib.suppress(RuntimeError):
        store = _store()
        if store is not None and store.check([_KEY]):
            status, _, words = store.get(_KEY).decode().partition(" ")
            return int(status), words
    return None


def described(error: BaseException) -> str:
    """An error's kind and words; where it is an echo, those of the first failure."""
    if not is_echo(error):
        return f"{type(error).__name__}: {error}"
    found = first()
    return found[1] if found else UNHEARD


def _store() -> Any:
    """What all processes of a launch can read, or None before they know one another."""
    torch = sys.modules.get("torch")  # --help must not import it
    if torch is None or not torch.distributed.is_initialized():
        return None
    return torch.distributed.distributed_c10d._get_default_store()
