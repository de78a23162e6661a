"""What the code never does, and what strangers' files never make it do."""

import ast
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes import sample as sample_module
from recipes.lab.console import UserError
from recipes.lab.training import checkpoint as checkpoint_module
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings

ROOT = Path(__file__).parents[2]
SMALL = {"attn": "sana", "batch_size": 4, "checkpoint_every": 2, "sample_every": 1000}
WEIGHTS = "diffusion_pytorch_model.safetensors"
SOURCES = [
    path
    for package in ("attnzoo", "backbones", "recipes", "bench")
    for path in sorted((ROOT / package).rglob("*.py"))
]


def dangers(source: str) -> list[str]:
    """Calls that can run what a file says, as "line: call"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            unsafe = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
            found += [f"{node.lineno}: {name}" for name in modules if name in unsafe]
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        if (
            call in ("eval", "exec", "os.system", "os.popen")
            or (
                call.endswith(("torch.load", "hub.load")) and options.get("weights_only") != "True"
            )
            or options.get("shell") == "True"
            or options.get("allow_pickle") == "True"
            or (call.endswith("extractall") and options.get("filter") != "'data'")
        ):
            found.append(f"{node.lineno}: {call}")
    return found


# Each with the reason why no stranger can write what is read.
ALLOWED = {
    "bench/isolate.py": "a pipe to its own child",
    "recipes/lab/training/settings_file.py": "yaml's SafeLoader without tags, see test_settings",
}


def test_nothing_runs_what_a_file_says():
    assert len(SOURCES) > 50
    found = {str(path.relative_to(ROOT)): dangers(path.read_text()) for path in SOURCES}
    assert {path: lines for path, lines in found.items() if lines and path not in ALLOWED} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from yaml import load",
        "eval(text)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "tar.extractall(place)",
    ],
)
def test_the_search_finds(source):
    assert dangers(source)


@pytest.fixture
def run(no_pictures, tmp_path):
    run = Run(tmp_path / "run")
    assert train(Settings(**SMALL, steps=2), run) == 0
    return run


def _long_header(content: bytes) -> bytes:
    return struct.pack("<Q", 10**10) + content[8:]


def _overlapping(content: bytes) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


FORMS = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "long header": _long_header,
    "more at the end": lambda content: content + b"more",
    "overlapping": _overlapping,
}
CONTENTS = {
    "another type": lambda tensors, name: {**tensors, name: tensors[name].double()},
    "another shape": lambda tensors, name: {**tensors, name: tensors[name][:-1].contiguous()},
    "one more": lambda tensors, name: {**tensors, "more": torch.zeros(1)},
    "one less": lambda tensors, name: {k: v for k, v in tensors.items() if k != name},
}


@pytest.mark.parametrize("damage", [*FORMS, *CONTENTS])
def test_damaged_weights_under_an_agreeing_manifest_are_refused(run, damage):
    folder = run.checkpoints / "step-00000002"
    honest = (folder / "manifest.json").read_text()
    for part in ("model", "ema", "optimizer"):
        file = f"{part}/{WEIGHTS}" if part != "optimizer" else "optimizer.safetensors"
        victim = folder / file
        whole = victim.read_bytes()
        if damage in FORMS:
            victim.write_bytes(FORMS[damage](whole))
        elif part == "optimizer" and damage in ("another type", "one less"):
            continue  # the optimizer casts, and a parameter without a gradient has no entry
        else:
            tensors = load_file(victim)
            name = next(n for n, tensor in sorted(tensors.items()) if tensor.ndim == 2)
            save_file(CONTENTS[damage](tensors, name), victim, metadata={"format": "pt"})
        manifest = json.loads(honest)
        manifest["files"][file] = [victim.stat().st_size, checkpoint_module.sha256(victim)]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        said = "no safetensors file" if damage in FORMS else "another model"
        with pytest.raises(UserError, match=said) as caught:
            train(Settings(**SMALL, steps=4), run, resume=True)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
        if damage in FORMS and part == "ema":
            with pytest.raises(UserError, match=r"no safetensors file|lists no model"):
                sample_module.main([str(run.folder), "--steps", "2"])
        victim.write_bytes(whole)
        (folder / "manifest.json").write_text(honest)


def test_tokens_of_the_environment_are_nowhere_in_a_run(no_pictures, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    secret = "sesame-sesame-sesame"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, secret)
    run = Run(tmp_path / "run")
    assert train(Settings(**SMALL, steps=2), run, trackers=["tensorboard"]) == 0
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def contents(folder):
    return {
        str(path): (os.readlink(path) if path.is_symlink() else path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize(
    "name",
    [".lock", "config.json", "status.json", "log.jsonl", "log.held.jsonl", "checkpoints",
     "samples", "samples/step-00000004.png", "checkpoints/step-00000002", "evaluation",
     "metrics.json"],
)  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_written_or_deleted_through_a_link(run, tmp_path, name, overwrite):
    link, outside = run.folder / name, tmp_path / "outside"
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        link.rename(outside)
    elif "." in link.name:
        outside.write_text("mine")
    else:
        outside.mkdir()
        (outside / "mine").write_text("mine")
    link.symlink_to(outside)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="is a link, and nothing in"):
        train(Settings(**SMALL, steps=4), run, resume=not overwrite, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_trackers_folder_that_is_a_link_is_refused(run, tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "outside").mkdir()
    (run.folder / "attnzoo").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="is a link"):
        train(Settings(**SMALL, steps=4), run, resume=True, trackers=["tensorboard"])
    assert not list((tmp_path / "outside").iterdir())


def test_links_that_appear_while_training_lead_nowhere(no_pictures, tmp_path):
    run = Run(tmp_path / "run")
    outside = tmp_path / "outside"
    outside.write_text("mine")

    def plant(step):
        if step == 2:
            for file in (run.status_file, run.log_file):
                file.unlink()
                file.symlink_to(outside)
        return False

    assert train(Settings(**SMALL, steps=4), run, should_stop=plant) == 0
    assert outside.read_text() == "mine"
    assert not run.status_file.is_symlink()
