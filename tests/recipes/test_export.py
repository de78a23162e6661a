"""A run as a pipeline folder of diffusers: what it holds, what it draws, what is refused."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file

import attnzoo
from attnzoo import InvalidValue
from attnzoo.registry import _REGISTRY, _SOURCES
from recipes.export import main
from recipes.lab.console import UserError
from recipes.lab.data.encoding import encode
from recipes.lab.evaluation.cache import cached
from recipes.lab.evaluation.evaluate import evaluate
from recipes.lab.evaluation.features import CustomExtractor
from recipes.lab.evaluation.shards import Plan
from recipes.lab.files import save_tensors
from recipes.lab.imports import import_remembered, origins
from recipes.lab.sampling import RunSampler
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from tests.backbones.test_pipeline import MINE
from tests.recipes.reliability import make_vae
from tests.recipes.test_latent_runs import colors, draw_classes

LABELS = torch.tensor([1, 4])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of pixels, of flow, and of latents, of one step each."""
    root = tmp_path_factory.mktemp("exported")
    images, vae = draw_classes(root / "images"), make_vae(root / "vae")
    common = {"attn": "sana", "batch_size": 4, "steps": 1}
    assert train(Settings(**common), Run(root / "pixels")) == 0
    assert train(Settings(**common, preset="flow"), Run(root / "flow")) == 0
    latents = Settings(**common, data=str(images), vae=vae, resolution=16)
    assert train(latents, Run(root / "latents")) == 0
    return root


def modes(*folders):
    """Who may read files, as numbers, and of a file that a program just makes."""
    (folders[0] / "usual").touch()
    return {file.stat().st_mode for folder in folders for file in folder.rglob("*.*")
            if file.is_file()} | {(folders[0] / "usual").stat().st_mode}  # fmt: skip


def test_who_may_read_one_file_may_read_all(runs, tmp_path):
    """Weights and latents were left to the account that had made them."""
    assert main([str(runs / "pixels"), "--out", str(tmp_path / "out")]) == 0
    assert encode(runs / "images", tmp_path / "cache", vae=str(runs / "vae"), resolution=16) == 0
    cached(tmp_path / "features.safetensors", lambda: {"x": torch.ones(1)})
    assert len(modes(tmp_path, runs / "pixels", runs / "latents")) == 1


def test_who_may_read_tensors_is_asked_for_by_the_umask(tmp_path, monkeypatch):
    def refused(*arguments):
        raise OSError(errno.ENOTSUP, "no modes here")

    usual = os.umask(0o027)
    try:
        save_tensors({"x": torch.ones(1)}, tmp_path / "x", {})
        monkeypatch.setattr(Path, "chmod", refused)
        save_tensors({"y": torch.ones(1)}, tmp_path / "y", {})
    finally:
        os.umask(usual)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640 and load_file(tmp_path / "y")


def pixels_of(pipe, labels=LABELS, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(labels.tolist(), output_type="pt", num_inference_steps=3, **options).images


@pytest.mark.parametrize("name", ["pixels", "flow", "latents"])
def test_three_lines_of_diffusers_draw_what_the_run_draws(runs, name, tmp_path, monkeypatch):
    assert main([str(runs / name), "--out", str(tmp_path / "out")]) == 0
    draw = RunSampler(Run(runs / name), device="cpu")
    data = draw.data
    shape = data["channels"], data["resolution"], data["resolution"]
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(
        "diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, **__: noise.clone()
    )
    pipe = DiTPipeline.from_pretrained(tmp_path / "out")
    theirs = pixels_of(pipe, guidance_scale=2.0)
    rows = iter(noise.clone())
    monkeypatch.setattr("recipes.lab.diffusion.guidance.torch.randn", lambda *_, **__: next(rows))
    images = draw(LABELS, steps=3, cfg=2.0)
    torch.testing.assert_close(theirs, (images / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
    assert theirs.shape[2] == draw.image_shape[1]
    assert pipe.get_label_ids([data["class_names"][1]]) == [1]


@pytest.mark.parametrize(
    "is_fresh", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "fresh process"]
)
def test_the_lines_of_the_card_make_pictures(runs, tmp_path, is_fresh, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(runs / "pixels"), "--out", "out", "--weights", "model"]) == 0
    card = Path("out", "README.md").read_text()
    [code] = re.findall("```python\n(.*?)```", card, re.DOTALL)
    assert code.count("\n") == 3 and "weights: model" in card and "Not evaluated yet" in card
    code += "assert len(images) == 2 and images[0].size == (8, 8) and images[0].mode == 'L'\n"
    if is_fresh:
        subprocess.run([sys.executable, "-c", code], check=True)
    else:
        exec(code, {})


def test_the_card_has_the_metrics_and_no_folder_of_ones_own(runs, tmp_path):
    run = Run(runs / "latents")
    evaluate(run, plan=Plan(samples=10, steps=1), extractor=CustomExtractor("colors", colors))
    assert main([str(run.folder), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    result = json.loads(run.metrics_file.read_text())["results"]["1"]
    assert f"{result['FID[colors]']:.4g}" in card and "FID[colors]" in card
    assert card.startswith("---\nlibrary_name: diffusers\n") and str(runs) not in card
    assert '"attn": "sana"' in card and "Step 1" in card
    run.metrics_file.write_text("{}")
    with pytest.raises(UserError, match=r"metrics\.json is damaged"):
        main([str(run.folder), "--out", str(tmp_path / "again")])
    assert not (tmp_path / "again").exists() and not list(tmp_path.glob(".tmp*"))
    run.metrics_file.unlink()


def test_nothing_is_overwritten_unasked(runs, tmp_path, monkeypatch):
    out, call = tmp_path / "out", [str(runs / "pixels"), "--out", str(tmp_path / "out")]
    assert main(call) == 0
    (out / "transformer" / "note").write_text("")
    with pytest.raises(UserError, match="--overwrite"):
        main(call)
    assert main([*call, "--overwrite"]) == 0
    assert not (out / "transformer" / "note").exists() and list(tmp_path.iterdir()) == [out]
    monkeypatch.chdir(out)
    assert main([*call[:2], ".", "--overwrite"]) == 0 and (out / "model_index.json").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for place in ("mine", "mine/thesis.tex"):
        with pytest.raises(UserError, match="choose another --out"):
            main([str(runs / "pixels"), "--out", str(tmp_path / place), "--overwrite"])
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_full_disk_is_one_line_and_loses_nothing(runs, tmp_path, monkeypatch):
    def full(self, folder, **options):
        folder.mkdir()
        (folder / "half").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    call = [str(runs / "pixels"), "--out", str(tmp_path / "out")]
    assert main(call) == 0
    monkeypatch.setattr(DiTPipeline, "save_pretrained", full)
    with pytest.raises(UserError, match=r"cannot write .*out.*No space left"):
        main([*call, "--overwrite"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_what_no_pipeline_does_is_refused(runs, tmp_path):
    run, out = runs / "pixels", str(tmp_path / "out")
    with pytest.raises(UserError, match="pixels: drop --vae"):
        main([str(run), "--out", out, "--vae", "here"])
    with pytest.raises(UserError, match="holds no run"):
        main([str(tmp_path), "--out", out])
    config = json.loads((run / "config.json").read_text())
    for change, said in (
        ({"class_names": [str(i) for i in range(1001)]}, "1001 classes"),
        ({"latent": {"shift_factor": 0.1, "place": "x", "factor": 2}}, "shift_factor=0.1"),
    ):
        changed = Run(tmp_path / said)
        changed.folder.mkdir()
        (changed.folder / "checkpoints").symlink_to(run / "checkpoints")
        text = json.dumps(config | {"data": config["data"] | change})
        changed.config_file.write_text(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("recipes.lab.export.open_vae", lambda *_: None)
            with pytest.raises(UserError, match=said):
                main([str(changed.folder), "--out", out])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nobody", "me/a/b", "me/", "../x"])
def test_a_name_that_is_none_is_refused_before_any_work(runs, tmp_path, name):
    with pytest.raises(UserError, match="--push"):
        main([str(runs / "pixels"), "--out", str(tmp_path / "out"), "--push", name])
    assert not (tmp_path / "out").exists()


def test_pushing_uploads_the_folder_or_fails_with_one_line(runs, tmp_path, monkeypatch, capsys):
    call = [str(runs / "pixels"), "--out", str(tmp_path / "out"), "--push", "me/it", "--overwrite"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(UserError, match=r"cannot push to me/it \(.*hf upload me/it") as caught:
        main(call)
    assert "\n" not in str(caught.value) and (tmp_path / "out" / "model_index.json").is_file()
    seen = []
    for name in ("whoami", "create_repo", "upload_folder"):
        monkeypatch.setattr(
            f"huggingface_hub.HfApi.{name}",
            lambda self, *args, _name=name, **options: (
                seen.append((_name, args, options)) or "url"
            ),
        )
    assert main(call) == 0
    assert [name for name, *_ in seen] == ["whoami", "create_repo", "upload_folder"]
    assert seen[2][2] == {"repo_id": "me/it", "folder_path": str(tmp_path / "out")}
    assert "pushed: url" in capsys.readouterr().out
    assert 'from_pretrained("me/it")' in (tmp_path / "out" / "README.md").read_text()


def test_ones_own_mechanism_goes_along_or_is_refused(tmp_path):
    known = dict(_REGISTRY), dict(_SOURCES)
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    try:
        attnzoo.import_mechanisms(file)
        run = Run(tmp_path / "run")
        assert train(Settings(attn="carried-mean", steps=1, batch_size=4), run) == 0
        out = tmp_path / "out"
        assert main([str(run.folder), "--out", str(out), "--import", str(file)]) == 0
        assert (out / "transformer" / "mine.py").read_text() == MINE
        assert "trust_remote_code=True" in (out / "README.md").read_text()
        _SOURCES["carried-mean"] = "package.part"
        with pytest.raises(InvalidValue, match=r"'carried-mean'.*package\.part.*one file"):
            main([str(run.folder), "--out", str(tmp_path / "again")])
        assert not (tmp_path / "again").exists() and not list(tmp_path.glob(".tmp*"))
        # As in a notebook.
        cls = type("Mean", (_REGISTRY.pop("carried-mean"),), {"__module__": "__main__"})
        attnzoo.register_attention("carried-mean")(cls)
        origin = {"carried-mean": {"source": "__main__", "sha256": ""}}
        assert origins(["carried-mean", "sana"]) == origin
        with pytest.raises(InvalidValue, match=r"'carried-mean'.*__main__.*one file"):
            main([str(run.folder), "--out", str(tmp_path / "again")])
        del _REGISTRY["carried-mean"]
        with pytest.raises(UserError, match=r"'carried-mean' of __main__.*--import FILE"):
            import_remembered(run.folder, origin)
    finally:
        for now, then in zip((_REGISTRY, _SOURCES), known, strict=True):
            now.clear()
            now.update(then)
    with pytest.raises(InvalidValue, match=r"mine\.py.*trust_remote_code"):
        DiTPipeline.from_pretrained(out)


def test_what_a_killed_export_left_goes_with_the_next_one(runs, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, alive = process.pid, os.getpid()
    left = [f".tmp-{dead}-0123abcd-out", f".tmp-{dead}-0123abcd-out-old"]
    others = [f".tmp-{alive}-0123abcd-out", f".tmp-{dead}-0123abcd-without"]
    for name in left + others:
        (tmp_path / name / "vae").mkdir(parents=True)
    assert main([str(runs / "pixels"), "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}
