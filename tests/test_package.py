"""What is published: metadata, long description, citation; the wheel, built and used elsewhere.

The wheel's own test takes half a minute: ``python -m pytest -m slow tests/test_package.py``.
"""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from setuptools.config.pyprojecttoml import read_configuration

import attnzoo

ROOT = Path(__file__).parents[1]
SETTINGS = (ROOT / "pyproject.toml").read_text("utf-8")


def test_the_version_stands_in_one_place():
    assert 'dynamic = ["version", "readme"]' in SETTINGS
    assert 'version = { attr = "attnzoo.__version__" }' in SETTINGS
    assert not re.search(r'^version = "', SETTINGS, re.MULTILINE)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert str(cited["version"]) == attnzoo.__version__
    assert f"## [{attnzoo.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_every_supported_python_is_a_classifier():
    from tests.test_pythons import SUPPORTED

    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', SETTINGS)
    assert named == SUPPORTED


def test_the_citation_keeps_the_schema():
    """Required keys, types and enumerations of the Citation File Format 1.2.0, by hand."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited) <= {
        "abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi",
        "identifiers", "keywords", "license", "license-url", "message", "preferred-citation",
        "references", "repository", "repository-artifact", "repository-code", "title", "type",
        "url", "version",
    }  # fmt: skip
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert len(cited["keywords"]) == len(set(cited["keywords"]))
    (reference,) = cited["references"]
    assert {"type", "title", "authors"} <= set(reference)
    assert reference["type"] == "article" and isinstance(reference["year"], int)
    for author in (*cited["authors"], *reference["authors"]):
        assert set(author) == {"name"} and isinstance(author["name"], str)
    (identifier,) = reference["identifiers"]
    assert identifier == {"type": "other", "value": "arXiv:2601.13683"}
    for url in (cited["repository-code"], reference["url"]):
        assert url.startswith("https://")


def long_description():
    spec = importlib.util.spec_from_file_location("attnzoo_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_the_long_description_are_absolute(tmp_path, monkeypatch):
    text = long_description().long_description()
    links = re.findall(r"\]\(([^)\s]+)\)|(?:\bsrc|srcset)=\"([^\"]+)\"", text)
    assert links and all(re.match(r"https?://|#", a or b) for a, b in links)
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) == len(readme.splitlines())
    module = long_description()
    (tmp_path / "pyproject.toml").write_text('Repository = "https://x.org/r"\n')
    (tmp_path / "README.md").write_text(
        "![a](docs/a.png) [b](docs/b.md#c) [d](#e) [f](https://g.h) [![i](j.png)](k.md)\n"
        '<img src="docs/l.png" width="40%"> `x[0](1)`\n'
    )
    monkeypatch.setattr(module, "ROOT", tmp_path)
    raw, page = "https://x.org/r/raw/main/", "https://x.org/r/blob/main/"
    assert module.long_description().splitlines()[:1] == [
        f"![a]({raw}docs/a.png) [b]({page}docs/b.md#c) [d](#e) [f](https://g.h) "
        f"[![i]({raw}j.png)]({page}k.md)"
    ]
    assert f'<img src="{raw}docs/l.png" width="40%">' in module.long_description()


USE = """
import torch
from pathlib import Path
from backbones import build_backbone
import attnzoo, backbones
for module in (attnzoo, backbones):
    assert "site-packages" in module.__file__, module.__file__
    assert (Path(module.__file__).parent / "py.typed").exists()
model = build_backbone(attn="dydila", size="tiny", resolution=64)
out = model(torch.randn(1, 4, 8, 8), timestep=500, class_labels=torch.tensor([1])).sample
assert out.shape == (1, 8, 8, 8)
"""


def test_a_new_folder_of_code_is_in_the_wheel_without_being_listed(tmp_path):
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    for name in ("attnzoo", "attnzoo/ops", "attnzoo/ops/mine", "backbones", "recipes", "bench"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text('__version__ = "1"\n')
    # The description, which setup.py gives, is missing here.
    settings = read_configuration(tmp_path / "pyproject.toml", ignore_option_errors=True)
    packages = settings["tool"]["setuptools"]["packages"]
    assert set(packages) == {"attnzoo", "attnzoo.ops", "attnzoo.ops.mine", "backbones"}


@pytest.mark.slow
def test_the_wheel_is_built_checked_installed_and_used_elsewhere(tmp_path):
    """Builds from what git has, offline; installs beside torch, away from the checkout."""

    def run(*command, cwd=tmp_path, **changed):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            list(map(str, command)), cwd=cwd, capture_output=True, text=True,
            env=environment | changed,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    source, dist = tmp_path / "source", tmp_path / "dist"
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    # The wheel is built from the source distribution.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source)
    (wheel,), (archive,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, archive)
    with zipfile.ZipFile(wheel) as file:
        tops = {name.partition("/")[0] for name in file.namelist()}
        assert tops == {"attnzoo", "backbones", f"attnzoo-{attnzoo.__version__}.dist-info"}
        (metadata,) = (n for n in file.namelist() if n.endswith("METADATA"))
        said = file.read(metadata).decode()
    assert "Project-URL: Repository, https://" in said and "](docs/" not in said
    assert f"\nVersion: {attnzoo.__version__}\n" in said

    home = tmp_path / "home"
    venv.create(home, with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
    packages = next(p for p in map(Path, sys.path) if (p / "torch").is_dir())
    # Everything but the checkout, which .pth files would bring: only folders named here count.
    (site / "shared.pth").write_text(f"{packages}\n")
    run(sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--no-deps",
        "--no-index", "--quiet", "--force-reinstall", wheel)  # fmt: skip
    command = home / "bin" / "attnzoo"
    assert "dydila" in run(command, "list")
    assert "MMACs" in run(command, "count", "--attn", "dydila", "--size", "tiny")
    assert "measured on" in run(command, "recommend", "--resolution", "1024", "--memory", "8GiB")
    assert "README" not in run(home / "bin" / "python", "-m", "attnzoo", "doctor")
    run(home / "bin" / "python", "-c", USE)
