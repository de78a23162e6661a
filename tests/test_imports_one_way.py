"""Imports run one way, `attnzoo <- backbones <- recipes.lab <- scripts, studies <- bench`.

Read from the code, so that an import inside a function or under TYPE_CHECKING counts too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("attnzoo", "backbones", "recipes", "bench")
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for package in PACKAGES
    for file in sorted((ROOT / package).rglob("*.py"))
}
MODULES = {name.removesuffix(".__init__"): file for name, file in FILES.items()}
# What each room may import; the scripts of recipes/ stand beside the studies they start.
MAY_IMPORT = {
    "attnzoo": {"attnzoo"},
    "backbones": {"attnzoo", "backbones"},
    "recipes.lab": {"attnzoo", "backbones", "recipes.lab"},
    "recipes.studies": {"attnzoo", "backbones", "recipes.lab", "recipes.studies"},
    "script": {"attnzoo", "backbones", "recipes.lab", "recipes.studies"},
    "bench": {"attnzoo", "backbones", "recipes.lab", "recipes.studies", "bench"},
}


def room_of(module: str) -> str:
    """The room a module stands in."""
    parts = module.split(".")
    if parts[0] != "recipes":
        return parts[0]
    return ".".join(parts[:2]) if parts[1:2] in (["lab"], ["studies"]) else "script"


def imports_of(module: str) -> Iterator[tuple[str, int]]:
    """Modules of this repository that a module imports, with the line."""
    is_package = MODULES[module].name == "__init__.py"
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (whole if whole in MODULES else base), node.lineno


EDGES = {
    module: [(other, line) for other, line in imports_of(module) if other in MODULES]
    for module in MODULES
}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_no_room_imports_one_that_stands_on_it(room):
    wrong = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {other}"
        for module, edges in EDGES.items()
        if room_of(module) == room and module != "recipes"
        for other, line in edges
        if room_of(other) not in MAY_IMPORT[room] and other != "recipes"
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_between_files(package):
    """A file that imports its way back to itself can be read only together with all of them.

    A package's ``__init__.py`` gathers what lies below it, and is no way back by that alone.
    """
    graph = {
        module: {other for other, _ in edges if other != module}
        for module, edges in EDGES.items()
        if module.split(".")[0] == package
    }
    circles, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            circles.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    assert not circles, "\n".join(circles)
