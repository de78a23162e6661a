"""The code suits every supported Python that this machine has, though torch may be there for one.

Each interpreter compiles every source, with warnings as errors, and finds what the sources take
from the standard library. pyright checks the same against Python 3.10 in ``make lint``; the tests
themselves run on another Python with ``make test PYTHON=python3.13 VENV=build/venv-3.13``.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUPPORTED = [f"3.{minor}" for minor in range(10, 15)]

# Runs in the other interpreter, which has the standard library and nothing else.
CHECK = r"""
import ast, importlib, json, sys, warnings
warnings.simplefilter("error")
wrong = []

def imports(node):
    for child in ast.iter_child_nodes(node):
        # What is asked for conditionally has a substitute on older Pythons.
        by_version = isinstance(child, ast.If) and "version_info" in ast.dump(child.test)
        if by_version or isinstance(child, ast.Try):
            continue
        if isinstance(child, ast.Import):
            yield from ((child.lineno, name.name, None) for name in child.names)
        elif isinstance(child, ast.ImportFrom) and not child.level:
            yield from ((child.lineno, child.module, name.name) for name in child.names)
        yield from imports(child)

standard = {*json.loads(sys.argv[1]), *sys.stdlib_module_names}
for path in sys.argv[2:]:
    try:
        tree = ast.parse(open(path, "rb").read(), path)
        compile(tree, path, "exec")
        for line, module, name in imports(tree):
            if module.partition(".")[0] in standard:
                try:
                    found = importlib.import_module(module)
                    if name and name != "*" and not hasattr(found, name):
                        importlib.import_module(f"{module}.{name}")
                except ImportError as error:
                    wrong.append(f"{path}:{line}: {error}")
    except (SyntaxError, Warning) as error:
        wrong.append(f"{path}: {error}")
print(json.dumps(wrong))
"""


def sources():
    """Every Python file of the repository."""
    rooms = ("attnzoo", "backbones", "recipes", "bench", "examples", "tests")
    return [str(path) for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def interpreters():
    """Version -> executable, of the supported Pythons on the path or from pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for version in SUPPORTED:
        candidates = [shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python")]
        for candidate in filter(None, candidates):
            asked = subprocess.run([candidate, "-V"], capture_output=True, text=True)
            if asked.stdout.startswith(f"Python {version}."):  # a shim of pyenv may lead nowhere
                found[version] = str(candidate)
                break
    found["{}.{}".format(*sys.version_info)] = sys.executable
    return found


FOUND = interpreters()


@pytest.mark.parametrize("version", sorted(FOUND))
def test_the_sources_suit(version):
    command = [
        FOUND[version],
        "-I",
        "-B",
        "-c",
        CHECK,
        json.dumps(sorted(sys.stdlib_module_names)),
    ]
    done = subprocess.run([*command, *sources()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_the_oldest_python_is_named_alike_everywhere():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = re.search(r'requires-python = ">=([\d.]+)"', text)[1]
    assert oldest == SUPPORTED[0] == re.search(r'pythonVersion = "([\d.]+)"', text)[1]
    assert f'target-version = "py{oldest.replace(".", "")}"' in text
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"sys.version_info < ({oldest.replace('.', ', ')})" in makefile
