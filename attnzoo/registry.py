"""Name -> mechanism: a plain dict behind a few functions."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from attnzoo.contract import Attention, AttentionContext, nearest
from attnzoo.errors import InvalidType, InvalidValue

_REGISTRY: dict[str, type[Attention]] = {}
_SOURCES: dict[str, str] = {}  # of mechanisms that import_mechanisms brought
Mechanism = TypeVar("Mechanism", bound=type[Attention])


def register_attention(name: str) -> Callable[[Mechanism], Mechanism]:
    """Class decorator that puts a mechanism into the zoo under ``name``.

    Raises:
        ValueError: The name is taken.
        TypeError: The class is not an ``Attention``.
    """

    def register(cls: Mechanism) -> Mechanism:
        if name in _REGISTRY:
            raise InvalidValue(f"attention {name!r} is already registered by {_REGISTRY[name]}")
        if not (isinstance(cls, type) and issubclass(cls, Attention)):
            raise InvalidType(f"{cls!r} must subclass attnzoo.Attention to be registered")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def list_attention() -> list[str]:
    """Sorted names of all registered mechanisms."""
    return sorted(_REGISTRY)


def get_attention(name: str) -> type[Attention]:
    """The class registered under ``name``; an unknown name is a ValueError that lists all."""
    if name not in _REGISTRY:
        raise InvalidValue(
            f"unknown attention {name!r}{nearest(name, _REGISTRY)} "
            f"Registered: {', '.join(list_attention())}"
        )
    return _REGISTRY[name]


def import_mechanisms(source: str) -> None:
    """Imports a Python file or a module for the mechanisms that it registers; once.

    Args:
        source: Path of a file that ends in .py, or the name of a module that can be imported
            from here or from the working folder.

    Raises:
        InvalidValue: There is no such file or module. What goes wrong inside it is raised as is.
    """
    before = set(_REGISTRY)
    try:
        source = _import(source)
    except BaseException:
        for name in set(_REGISTRY) - before:  # else a second try finds the names taken
            del _REGISTRY[name]
        raise
    _SOURCES.update(dict.fromkeys(set(_REGISTRY) - before, source))


def _import(source: str) -> str:
    if source.endswith(".py") or os.sep in source:
        path = Path(source).expanduser().resolve()
        _import_file(source, path)
        return str(path)
    _import_module(source)
    return source


def source_of(name: str) -> str | None:
    """The file or module that ``import_mechanisms`` found a mechanism in; None for the zoo's."""
    return _SOURCES.get(name)


def _import_file(source: str, path: Path) -> None:
    if not path.is_file():
        raise InvalidValue(f"there is no file {source!r} to import a mechanism from")
    name = f"attnzoo_{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidValue(f"{source!r} is no Python file: a mechanism's file ends in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with _on_path(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _import_module(name: str) -> None:
    with _on_path(Path.cwd()):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            # A module that the user's own module lacks is another mistake than this name.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise InvalidValue(
                f"there is no module {name!r} to import a mechanism from; "
                f"give a file such as {name}.py, or install the package"
            ) from error


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """The folder is importable, after everything installed, inside the with-statement only."""
    if str(folder) in sys.path:
        yield
        return
    sys.path.append(str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the module may have changed the path itself
            sys.path.remove(str(folder))


def build_attention(
    name: str,
    dim: int,
    num_heads: int | None = None,
    layer_index: int = 0,
    depth: int = 1,
    **options: Any,
) -> Attention:
    """Builds one attention layer.

    Args:
        name: A name of ``list_attention()``.
        dim: Width of the tokens.
        num_heads: Number of heads; None takes the mechanism's own default.
        layer_index: Position of the block in its network, from 0.
        depth: Number of blocks of the network.
        **options: Fields of the mechanism's ``Config``.

    Returns:
        A module called as ``layer(x, grid)``: (b, h * w, dim) -> (b, h * w, dim).

    Raises:
        ValueError: Unknown name, or a value that is out of range.
        TypeError: Unknown option (the nearest is suggested), or a value of the wrong type.
    """
    cls = get_attention(name)
    context = AttentionContext(dim=dim, num_heads=num_heads, layer_index=layer_index, depth=depth)
    return cls(context, cls.Config.from_options(name, options))
