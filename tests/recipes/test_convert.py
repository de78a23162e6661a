"""From a trained softmax model to one of another attention."""

import copy
import hashlib
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from PIL import Image

import attnzoo
from attnzoo import registry
from backbones import DiT
from recipes import convert as convert_module
from recipes import train as train_module
from recipes.lab.console import UserError
from recipes.lab.diffusion import Diffusion
from recipes.lab.evaluation.evaluate import classify
from recipes.lab.sampling import RunSampler, read_checkpoint
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.conversion import inherit
from recipes.lab.training.distillation import Distillation, parse_terms
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings

SMALL = {"batch_size": 8, "checkpoint_every": 2, "sample_every": 1000}
FLAGS = ["--steps", "4"]
OWN = """
import attnzoo
import torch.nn as nn


@attnzoo.register_attention("convert-mean")
class MeanAttention(attnzoo.Attention):
    def __init__(self, context, config):
        super().__init__(context, config)
        self.value = nn.Linear(self.dim, self.dim)

    def forward(self, x, grid):
        self.check_tokens(x, grid)
        return self.value(x).mean(1, keepdim=True).expand_as(x)
"""


@pytest.fixture(scope="module")
def softmax(tmp_path_factory):
    """A run of ten steps whose softmax has an option and few heads of its own."""
    run = Run(tmp_path_factory.mktemp("convert") / "softmax")
    settings = Settings(attn="softmax", attn_options={"qk_norm": True}, steps=10, **SMALL)
    assert train(settings, run) == 0
    return run


@pytest.fixture(scope="module")
def converted(softmax):
    """A run of LiT's attention that has learned from it by every term there is on digits."""
    out = softmax.folder.with_name("lit")
    arguments = [str(softmax.folder), "--attn", "lit", "--distil", "noise,features=0.1"]
    assert convert_module.main([*arguments, *FLAGS, "--out", str(out)]) == 0
    return Run(out)


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def first_weights(run):
    """The weights of step 0."""
    part = run.folder.with_name(f"{run.folder.name}-first")
    shutil.copytree(run.folder, part, dirs_exist_ok=True)
    for folder in (part / "checkpoints").iterdir():
        if folder.name != "step-00000000":
            shutil.rmtree(folder)
    return read_checkpoint(Run(part))


def test_everything_but_the_attention_is_taken(softmax, tmp_path):
    out = tmp_path / "out"
    arguments = [str(softmax.folder), "--attn", "lit", "--steps", "1", "--out", str(out)]
    assert convert_module.main(arguments) == 0
    begun, trained = first_weights(Run(out)), read_checkpoint(softmax)
    assert begun.step == 0 and begun.config["attn"] == "lit"
    report = json.loads((out / "conversion.json").read_text())
    for name, tensor in trained.tensors.items():
        if ".attention." not in name:
            assert name in report["taken"]
            torch.testing.assert_close(begun.tensors[name], tensor, rtol=0, atol=0)
    assert all(".attention." in name for name in [*report["new"], *report["dropped"]])
    assert set(report["taken"]) | set(report["new"]) == set(begun.tensors)
    assert "blocks.0.attention.query_norm.weight" in report["dropped"]
    assert not (out / "teacher").exists()  # nobody learns from it


def test_a_fifth_of_the_steps_is_the_default_and_few_heads_are_its_own(softmax, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert_module.main([str(softmax.folder), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "taken: 35 tensors" in said and "attention of blocks 0, 1, 2, 3" in said
    run = Run(out)
    assert run.config()["settings"]["steps"] == 2 and len(run.read_log()) == 2
    assert [b.attention.num_heads for b in RunSampler(run).model.blocks] == [2] * 4


def test_the_result_is_an_ordinary_run_that_is_resumed_exactly(converted, tmp_path):
    log = converted.read_log()
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    parts = log[0]["mse"] + 0.5 * log[0]["distil_noise"] + 0.1 * log[0]["distil_features"]
    assert log[0]["loss"] == pytest.approx(parts, rel=1e-5)
    assert log[0]["distil_noise"] > 0 and log[0]["distil_features"] > 0
    part = tmp_path / "part"
    shutil.copytree(converted.folder, part)
    shutil.rmtree(part / "checkpoints" / "step-00000004")
    assert train_module.main(["--resume", "--out", str(part)]) == 0
    for one, other in zip(Run(part).read_log(), log, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    ours, wanted = read_checkpoint(Run(part)), read_checkpoint(converted)
    assert ours.digest == wanted.digest and ours.step == 4


def test_it_trains_on_samples_and_is_classified(converted, tmp_path):
    longer = tmp_path / "longer"
    shutil.copytree(converted.folder, longer)
    more = ["--out", str(longer), "--steps", "5", "--allow-change", "steps"]
    assert train_module.main(more) == 0
    assert Run(longer).read_log()[-1]["distil_noise"] > 0
    assert RunSampler(converted)(torch.arange(2), steps=2).isfinite().all()
    assert 0 <= classify(converted)["accepted"] <= 100


def test_a_mixture_keeps_the_softmax_blocks_whole(softmax, tmp_path):
    out = tmp_path / "out"
    arguments = [str(softmax.folder), "--attn", "sana+softmax", "--set", "sana.qk_norm=true"]
    assert convert_module.main([*arguments, "--steps", "1", "--out", str(out)]) == 0
    report = json.loads((out / "conversion.json").read_text())
    changed = {name.split(".")[1] for name in report["new"]}
    assert changed == {"0", "2"}
    model: DiT = RunSampler(Run(out)).model
    kept, new = model.blocks[1].attention, model.blocks[0].attention
    assert kept.config.qk_norm and kept.num_heads == 3  # type: ignore[attr-defined]
    assert new.config.qk_norm and new.name == "sana"  # type: ignore[attr-defined]
    begun, trained = first_weights(Run(out)), read_checkpoint(softmax)
    name = "blocks.3.attention.qkv.weight"
    torch.testing.assert_close(begun.tensors[name], trained.tensors[name], rtol=0, atol=0)


def test_a_mechanism_of_ones_own_is_a_target(softmax, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", {**registry._REGISTRY})  # not for other tests
    file, out = tmp_path / "mine.py", tmp_path / "out"
    file.write_text(OWN)
    flags = ["--import", str(file), "--attn", "convert-mean+softmax", "--steps", "1"]
    assert convert_module.main([str(softmax.folder), *flags, "--out", str(out)]) == 0
    assert Run(out).config()["imports"].keys() == {"convert-mean"}
    names = [block.attention.name for block in RunSampler(Run(out)).model.blocks]
    assert names == ["convert-mean", "softmax"] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attn", "softmax"], "has attention 'softmax' already"),
        (["--attn", "litt"], "did you mean 'lit'"),
        (["--attn", "lit+softmxa"], r"block 1 of 'lit\+softmxa'"),
        (["--set", "epss=1"], "'lit' has no option 'epss'"),
        (["--size", "S"], "--size S is not .*width, depth"),
        (["--patch-size", "2"], "--patch-size 2 is not"),
        (["--preset", "flow"], "--preset flow is not"),
        (["--distil", "variance"], "--distil variance needs a model that learns its variance"),
        (["--distil", ""], "--distil '' is empty"),
        (["--distil", "noises"], "--distil 'noises' is none of noise, variance, features"),
        (["--distil", "noise,noise"], "names noise twice"),
        (["--distil", "noise=much"], "has no number as its weight"),
        (["--distil", "noise=-1"], "needs a finite weight above 0"),
        (["--distil", "features", "--compile"], "--distil features looks into blocks"),
        (["--data", "shapes"], "give data of as many classes and channels"),
        (["--steps", "1", "--batch-size", "7", "--accumulate", "2"], "does not divide"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(arguments, words, softmax, tmp_path):
    before, out = digests(softmax.folder), tmp_path / "out"
    with pytest.raises((UserError, attnzoo.UsageError), match=words) as caught:
        convert_module.main([str(softmax.folder), "--out", str(out), *arguments])
    assert "\n" not in str(caught.value)
    assert not out.exists() and digests(softmax.folder) == before


def test_what_is_no_run_of_softmax_is_one_line(softmax, converted, tmp_path):
    empty = tmp_path / "empty"
    shutil.copytree(softmax.folder, empty)
    shutil.rmtree(empty / "checkpoints")
    for folder, words in (
        (tmp_path / "missing", "holds no run"),
        (empty, "holds no whole checkpoint yet"),
        (converted.folder, "has attention 'lit': a conversion begins with a run of softmax"),
    ):
        with pytest.raises(UserError, match=words):
            convert_module.main([str(folder), "--attn", "sana", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_nothing_that_is_there_is_lost(softmax, converted):
    before = digests(softmax.folder.parent)
    for out, flags, words in (
        (softmax.folder, ["--overwrite"], "is the trained model itself"),
        (converted.folder, [], "already holds a run"),
    ):
        with pytest.raises(UserError, match=words):
            convert_module.main([str(softmax.folder), "--out", str(out), *flags])
    assert digests(softmax.folder.parent) == before


def test_the_command_that_continues_a_conversion_is_right(softmax, converted, tmp_path):
    out = tmp_path / "a copy"
    shutil.copytree(converted.folder, out)
    with pytest.raises(UserError) as raised:
        convert_module.main([str(softmax.folder), "--out", str(out)])
    command = re.search(r"python recipes/train\.py (.*?), replace", str(raised.value))
    assert command and train_module.main(shlex.split(command[1])) == 0


def test_a_run_whose_beginning_or_teacher_is_gone_is_not_continued(converted, tmp_path):
    for number, (spoil, words) in enumerate((
        (lambda run: shutil.rmtree(run / "checkpoints"), "convert again"),
        (lambda run: shutil.rmtree(run / "teacher"), "the teacher in .* cannot be used"),
        (lambda run: shutil.copy(
            run / "checkpoints/step-00000002/ema/diffusion_pytorch_model.safetensors",
            run / "teacher",
        ), "its weights are not those that the run began with"),
    )):  # fmt: skip
        run = tmp_path / str(number)
        shutil.copytree(converted.folder, run)
        shutil.rmtree(run / "checkpoints" / "step-00000004")
        spoil(run)
        before = digests(run)
        with pytest.raises(UserError, match=words):
            train_module.main(["--resume", "--out", str(run)])
        assert digests(run) == before


def test_overwriting_a_converted_run_leaves_no_teacher(converted, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(converted.folder, out)
    flags = ["--out", str(out), "--overwrite", "--attn", "sana", "--steps", "1"]
    assert train_module.main([*flags, "--batch-size", "4", "--sample-every", "1000"]) == 0
    assert not (out / "teacher").exists() and not (out / "conversion.json").exists()


def little(attn="softmax", **options):
    torch.manual_seed(1)
    model = DiT(attn, dim=16, depth=2, num_heads=2, in_channels=1, num_classes=3, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


class TestTerms:
    def batch(self, diffusion):
        generator = torch.Generator().manual_seed(0)
        images, noise = torch.randn(2, 3, 1, 8, 8, generator=generator).unbind()
        times = diffusion.sample_timesteps(3, generator)
        return (images, torch.tensor([0, 3, 1])), {"timesteps": times, "noise": noise}

    def test_they_are_what_they_say(self):
        diffusion = Diffusion("epsilon", learn_sigma=True)
        student, teacher = little("lit", learn_sigma=True), little(learn_sigma=True)
        weights = {"noise": 0.5, "variance": 0.05, "features": 2.0}
        inputs, given = self.batch(diffusion)
        losses = Distillation(diffusion, student, teacher, weights).training_losses(
            student, *inputs, **given
        )
        plain = diffusion.training_losses(student, *inputs, **given)
        noisy = diffusion.noised(inputs[0], given["noise"], given["timesteps"])[0]
        one, other = (
            m(noisy, given["timesteps"], inputs[1]).sample for m in (student, teacher)
        )  # fmt: skip
        squares = (one - other).square()
        noise, variance = squares[:, :1].mean((1, 2, 3)), squares[:, 1:].mean((1, 2, 3))
        torch.testing.assert_close(losses["distil_noise"], noise)
        torch.testing.assert_close(losses["distil_variance"], variance)
        torch.testing.assert_close(
            losses["loss"],
            plain["loss"] + 0.5 * noise + 0.05 * variance + 2.0 * losses["distil_features"],
        )

    def test_a_student_that_equals_its_teacher_has_nothing_to_learn(self):
        diffusion, teacher = Diffusion("epsilon", learn_sigma=True), little(learn_sigma=True)
        student = copy.deepcopy(teacher)
        weights = dict.fromkeys(("noise", "variance", "features"), 1.0)
        inputs, given = self.batch(diffusion)
        losses = Distillation(diffusion, student, teacher, weights).training_losses(
            student, *inputs, **given
        )
        for name in weights:
            assert losses[f"distil_{name}"].abs().max() == 0

    @pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
    def test_the_teacher_gets_no_gradient_and_is_in_eval_mode(self, prediction):
        diffusion = Diffusion(prediction)
        student, teacher = little("lit").train(), little().train()
        terms = {"noise": 1.0, "features": 1.0}
        inputs, given = self.batch(diffusion)
        distillation = Distillation(diffusion, student, teacher, terms)
        distillation.training_losses(student, *inputs, **given)["loss"].mean().backward()
        assert not any(module.training for module in teacher.modules())
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        assert all(p.grad is not None for p in student.blocks.parameters())
        assert not any(block._forward_hooks for block in (*student.blocks, *teacher.blocks))

    def test_the_features_gradient_survives_checkpointing(self):
        diffusion, terms = Diffusion("v_prediction"), {"features": 1.0}
        inputs, given = self.batch(diffusion)

        def gradients(is_checkpointed):
            student = little("lit").train()
            if is_checkpointed:
                student.enable_gradient_checkpointing()
            distillation = Distillation(diffusion, student, little(), terms)
            distillation.training_losses(student, *inputs, **given)["loss"].sum().backward()
            return torch.cat([p.grad.flatten() for p in student.parameters()])  # type: ignore

        torch.testing.assert_close(gradients(True), gradients(False))

    def test_weights_are_read(self):
        assert parse_terms("noise,variance") == {"noise": 0.5, "variance": 0.05}  # LiT's
        assert parse_terms("features=2, noise") == {"features": 2.0, "noise": 0.5}


def test_inheritance_names_what_does_not_fit():
    with pytest.raises(UserError, match=r"'class_embedding.weight' is 4x16 .* and 6x16"):
        inherit(little(), DiT("lit", dim=16, depth=2, in_channels=1, num_classes=5))


@pytest.fixture(scope="module")
def diffusers_dit(tmp_path_factory):
    """A folder with a small random DiT of diffusers, and one with images to train it on."""
    root = tmp_path_factory.mktemp("diffusers")
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6,
        num_layers=2, sample_size=8, num_embeds_ada_norm=2,
    )  # fmt: skip
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    model.save_pretrained(root / "dit")
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{number}.png")
    return root, model.eval()


def test_a_dit_of_diffusers_becomes_a_run(diffusers_dit, tmp_path):
    root, theirs = diffusers_dit
    common = ["--data", str(root / "images"), "--resolution", "8", "--batch-size", "4",
              "--steps", "1", "--sample-every", "1000"]  # fmt: skip
    arguments = [str(root / "dit"), "--attn", "lit", "--distil", "noise,variance", *common]
    assert convert_module.main([*arguments, "--out", str(tmp_path / "lit")]) == 0
    entry = Run(tmp_path / "lit").read_log()[0]
    assert {"vb", "distil_noise", "distil_variance"} <= entry.keys()
    model = RunSampler(Run(tmp_path / "lit")).model
    assert (model.config.dim, model.config.depth, model.config.attn) == (16, 2, "lit")
    arguments = [str(root / "dit"), "--attn", "softmax", *common, "--out", str(tmp_path / "soft")]
    assert convert_module.main(arguments) == 0
    begun = first_weights(Run(tmp_path / "soft"))
    ours: DiT = DiT.from_config(begun.config)  # type: ignore[assignment]
    ours.load_state_dict(begun.tensors)
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 2])
    with torch.no_grad():
        found, wanted = ours.eval()(*inputs).sample, theirs(*inputs).sample
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_dit_of_diffusers_needs_data_that_fits(diffusers_dit, tmp_path):
    root, _ = diffusers_dit
    for flags, words in (
        ([], "names no data: give it with --data"),
        (["--data", "digits"], "give data of as many classes and channels"),
        (["--data", str(root / "images"), "--preset", "tiny"], "--preset tiny is not"),
    ):
        with pytest.raises(UserError, match=words):
            convert_module.main([str(root / "dit"), *flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
