"""Name -> mechanism: a plain dict behind a few functions."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from attnzoo.contract import Attention, AttentionConfig, AttentionContext, nearest
from attnzoo.errors import InvalidType, InvalidValue

_REGISTRY: dict[str, type[Attention]] = {}
_SOURCES: dict[str, str] = {}  # of mechanisms that came from outside
ENTRY_POINTS = "attnzoo.mechanisms"
_MARKERS = ".ov^<>8sp*hHDdPX"  # matplotlib's filled ones, as a picture mixes no others with them
_ARGUMENTS = {"name", *AttentionContext.__dataclass_fields__}  # of build_attention
Mechanism = TypeVar("Mechanism", bound=type[Attention])


def register_attention(name: str) -> Callable[[Mechanism], Mechanism]:
    """Class decorator that puts a mechanism into the zoo under ``name``.

    Raises:
        InvalidType: The class is not an ``Attention``, its ``Config`` no dataclass of options, or
            the name, ``paper`` or ``complexity`` no string; or an option is called as something
            that is there.
        InvalidValue: The name or the class is taken, the name holds a sign of patterns, or
            ``plot_style`` is none.
    """
    if not isinstance(name, str) or not name:
        raise InvalidType(
            f"register_attention takes a name, as in @register_attention('mine'), got {name!r}"
        )
    if not re.fullmatch(r"\w[\w.-]*", name):  # the others have meanings in patterns and commands
        raise InvalidValue(
            f"attention {name!r} needs a name of letters, digits, '-', '_' and '.', such as "
            f"{re.sub(r'[^a-zA-Z0-9_]+', '-', name).strip('-') or 'mine'!r}"
        )

    def register(cls: Mechanism) -> Mechanism:
        if name in _REGISTRY:
            raise InvalidValue(f"attention {name!r} is already registered by {_REGISTRY[name]}")
        if not (isinstance(cls, type) and issubclass(cls, Attention)) or inspect.isabstract(cls):
            raise InvalidType(
                f"{cls!r} must subclass attnzoo.Attention and define forward to be registered"
            )
        if cls in _REGISTRY.values():
            raise InvalidValue(f"{cls!r} is attention {cls.name!r} already; subclass it")
        config: Any = cls.Config
        is_config = isinstance(config, type) and issubclass(config, AttentionConfig)
        # Without the decorator nobody would see its options.
        if is_config and inspect.get_annotations(config).keys() - {"removed"}:
            is_config = "__dataclass_fields__" in vars(config)
        if not is_config:
            raise InvalidType(
                f"Config of {cls!r} must be a subclass of attnzoo.AttentionConfig, decorated by "
                f"@dataclass(frozen=True, kw_only=True), got {config!r}"
            )
        options = [field.name for field in dataclasses.fields(config)]
        taken = [z for z in options if z in _ARGUMENTS or hasattr(AttentionConfig, z)]
        if taken:
            raise InvalidType(
                f"Config of {cls!r} has an option {taken[0]!r}, which is a name of the library's "
                f"own: rename it, such as to 'own_{taken[0]}'"
            )
        if cls.name and "plot_style" not in vars(cls):
            cls.plot_style = None  # a registered parent's would make two curves look alike
        _check_shown(name, cls)
        cls.name = name
        _REGISTRY[name] = cls
        if cls.__module__.partition(".")[0] != "attnzoo":  # what imports it may know its file
            _SOURCES[name] = cls.__module__
        return cls

    return register


def _check_shown(name: str, cls: type[Attention]) -> None:
    """Refuses what tables and pictures cannot show, before a run has been trained for them."""
    for attribute in ("paper", "complexity"):
        if not isinstance(shown := getattr(cls, attribute), str):
            raise InvalidType(f"{attribute} of attention {name!r} must be a string, got {shown!r}")
    style: Any = cls.plot_style
    is_pair = isinstance(style, tuple) and [*map(type, style)] == [str, str]
    if style is not None and not (
        is_pair and re.fullmatch("#[0-9a-fA-F]{6}", style[0]) and style[1] in [*_MARKERS]
    ):
        raise InvalidValue(
            f"plot_style of attention {name!r} must be a color and a filled marker of "
            f"matplotlib, one of {' '.join(_MARKERS)}, such as ('#1F77B4', 'o'); got {style!r}"
        )


def list_attention() -> list[str]:
    """Sorted names of all mechanisms: the registered ones and those of installed packages."""
    return sorted({*_REGISTRY, *offered()})


def offered() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """What installed packages offer in the group ``attnzoo.mechanisms``, by name, not loaded.

    A registered mechanism comes before one of its name that a package offers.
    """
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.name not in _REGISTRY and point not in found.get(point.name, []):
            found.setdefault(point.name, []).append(point)
    return dict(sorted(found.items()))


def get_attention(name: str) -> type[Attention]:
    """The class of a mechanism; what an installed package offers is imported now.

    A package offers one by an entry point of the group ``attnzoo.mechanisms``: the mechanism's
    name, and the class or the module that registers it.

    Raises:
        InvalidType: The name is no string, or the package offers something else.
        InvalidValue: The name is unknown, or several packages offer it. What goes wrong inside a
            package is raised as is.
    """
    if not isinstance(name, str):
        raise InvalidType(f"the name of an attention must be a string, got {name!r}")
    if name not in _REGISTRY:
        points = offered().get(name)
        if not points:
            names = list_attention()
            raise InvalidValue(
                f"unknown attention {name!r}{nearest(name, names)} Registered: {', '.join(names)}"
            )
        _load(name, points)
    return _REGISTRY[name]


def _load(name: str, points: list[importlib.metadata.EntryPoint]) -> None:
    values = " and ".join(point.value for point in points)
    if len(points) > 1:
        raise InvalidValue(f"attention {name!r} is offered by {values}; uninstall all but one")
    with _all_or_nothing() as new:
        found = points[0].load()
        if name not in _REGISTRY and isinstance(found, type):
            register_attention(name)(found)
        if name not in _REGISTRY:
            raise InvalidType(f"{values}, offered as attention {name!r}, registers no such one")
    _SOURCES.update(dict.fromkeys(new, points[0].module))


@contextlib.contextmanager
def _all_or_nothing() -> Iterator[list[str]]:
    """Gives the names that were registered inside; if it fails, they are free again."""
    before, new = set(_REGISTRY), []
    try:
        yield new
    except BaseException:
        for name in set(_REGISTRY) - before:  # else a second try finds the names taken
            del _REGISTRY[name]
            _SOURCES.pop(name, None)
        raise
    new += set(_REGISTRY) - before


def import_mechanisms(source: str | os.PathLike[str]) -> None:
    """Imports a Python file or a module for the mechanisms that it registers; once.

    Args:
        source: Path of a file that ends in .py, or the name of a module that can be imported
            from here or from the working folder.

    Raises:
        InvalidType: It is neither a string nor a path.
        InvalidValue: There is no such file or module. What goes wrong inside it is raised as is.
    """
    if not isinstance(source, str | os.PathLike):
        raise InvalidType(f"a mechanism is imported from a file or a module, got {source!r}")
    with _all_or_nothing() as new:
        origin = _import(os.fspath(source))
    _SOURCES.update(dict.fromkeys(new, origin))


def _import(source: str) -> str:
    if source.endswith(".py") or os.sep in source:
        path = Path(os.path.expanduser(source)).resolve()  # Path.expanduser fails on no user
        _import_file(source, path)
        return str(path)
    _import_module(source)
    return source


def source_of(name: str) -> str | None:
    """The file or module that a mechanism came from, as "__main__"; None for the zoo's own."""
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
    if not all(name.split(".")):
        raise InvalidValue(
            f"{name!r} is no module to import a mechanism from; give a file such as mine.py, or "
            f"a module's full name"
        )
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
        InvalidValue: Unknown name, or a value that is out of range.
        InvalidType: Unknown option (the nearest is suggested), or a value of the wrong type.
    """
    cls = get_attention(name)
    context = AttentionContext(dim=dim, num_heads=num_heads, layer_index=layer_index, depth=depth)
    return cls(context, cls.Config.from_options(name, options))
