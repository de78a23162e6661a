"""Sampling steps as one launch: the same images, and a reason where there can be none."""

import inspect

import pytest
import torch
from torch import nn

import attnzoo
from backbones import build_backbone
from recipes import evaluate as evaluate_module
from recipes import sample as sample_module
from recipes.lab.console import UserError
from recipes.lab.diffusion import MODES, PRECISIONS, Diffusion, Recorder, generator_for, sample
from recipes.lab.diffusion.recorded import Steps, solver_weights
from recipes.lab.evaluation.shards import Plan, shard_folder
from recipes.lab.sampling import RunSampler

SHAPE, CLASSES = (3, 8, 8), 5
SOLVERS = [
    ("epsilon", "dpm++"),
    ("v_prediction", "dpm++"),
    ("epsilon", "ddim"),
    ("v_prediction", "ddim"),
    ("flow", "euler-flow"),
]
MECHANISMS = attnzoo.list_attention()
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Curved(nn.Module):
    """A model that is linear in nothing."""

    def forward(self, hidden_states, timestep, class_labels, return_dict):
        assert timestep.shape == class_labels.shape == hidden_states.shape[:1]
        scale = (1 + class_labels / CLASSES + timestep / 1000).view(-1, 1, 1, 1)
        return (torch.tanh(scale * hidden_states) - hidden_states / 4,)


def drawn(model, diffusion, count=5, device="cpu", **options):
    return sample(
        model, diffusion, labels=torch.arange(count) % CLASSES, indices=torch.arange(count),
        seed=0, num_classes=CLASSES, shape=SHAPE, device=device, **options,
    )  # fmt: skip


class Unrecorded(Recorder):
    """What a GPU records, launched step by step on any device."""

    def check(self, *_):
        return True

    def __call__(self, key, make):
        self.batches = [*getattr(self, "batches", []), key[3]]
        return make()


TOLERANCES = pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-3), ("bf16", 5e-2)])


def images_are_the_eager_ones(model, recorder, precision, bound):
    device = model.class_embedding.weight.device
    options = {"device": device, "steps": 6, "cfg": 2.0, "precision": precision}
    for diffusion in (Diffusion("v_prediction"), Diffusion("flow")):
        more = options | {"sampler": diffusion.default_sampler}
        wanted = drawn(model, diffusion, 7, **more)
        for size in (64, 4):
            found = drawn(model, diffusion, 7, recorder=recorder, batch_size=size, **more)
            # Rounding may send a token to another expert.
            assert (found - wanted).abs().mean() < bound * wanted.abs().mean()


class TestTheStepsOfARecording:
    @pytest.mark.parametrize("name", ["softmax", "dydila"])
    @TOLERANCES
    def test_they_give_the_images_of_a_model(self, name, precision, bound):
        images_are_the_eager_ones(model_of(name), Unrecorded(), precision, bound)

    @pytest.mark.parametrize("steps", [1, 2, 7, 20])
    @pytest.mark.parametrize(("prediction", "sampler"), SOLVERS)
    def test_they_are_those_of_the_scheduler(self, prediction, sampler, steps):
        diffusion = Diffusion(prediction)
        options = {"sampler": sampler, "steps": steps, "cfg": 2.5, "cfg_channels": 2}
        wanted = drawn(Curved(), diffusion, **options)
        found = drawn(Curved(), diffusion, recorder=Unrecorded(), **options)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())

    def test_a_solver_that_looks_back_uses_the_step_before(self):
        weights = solver_weights(Diffusion("epsilon").scheduler("dpm++", 20))
        assert weights.shape == (20, 4) and not weights[0, :2].any()
        assert (weights[1:-1, :2] != 0).all() and (weights[:, 3] != 0).all()
        assert not solver_weights(Diffusion("epsilon").scheduler("ddim", 20))[:, :2].any()

    @pytest.mark.parametrize(("count", "batches"), [(5, [5]), (8, [8]), (9, [5]), (17, [6])])
    def test_batches_are_even_and_the_last_is_filled(self, count, batches):
        recorder = Unrecorded()
        options = {"sampler": "dpm++", "steps": 4, "cfg": 2.0, "batch_size": 8}
        wanted = drawn(Curved(), Diffusion("v_prediction"), count, **options)
        found = drawn(Curved(), Diffusion("v_prediction"), count, recorder=recorder, **options)
        assert recorder.batches == batches and found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())

    def test_what_is_not_finite_stays_in_its_image_and_its_call(self):
        def predict(noisy, time, labels):
            return torch.where(labels.view(-1, 1, 1, 1) == 3, torch.nan, noisy)

        scheduler = Diffusion("v_prediction").scheduler("dpm++", 5)
        steps = Steps(Curved(), predict, scheduler, 4, SHAPE, CLASSES, torch.device("cpu"))
        noise = torch.randn(4, *SHAPE, generator=generator_for(0))
        bad = steps(noise, torch.tensor([0, 3, 1, 2]), int)
        finite = bad.isfinite().flatten(1).all(1)
        assert finite.tolist() == [True, False, True, True]
        again = steps(noise[:3], torch.tensor([0, 1, 2]), int)
        assert again.isfinite().all() and torch.equal(again[0], bad[0])


class TestARecorder:
    def test_an_unknown_mode_is_refused(self):
        with pytest.raises(UserError, match="--cuda-graph 'always' is none of auto, on, off"):
            Recorder("always")

    def test_auto_says_once_why_not(self):
        lines = []
        recorder = Recorder("auto", lines.append)
        model = nn.Linear(1, 1)
        assert not recorder.check(model, torch.device("cpu"), "dpm++")
        assert not recorder.check(model, torch.device("cpu"), "dpm++")
        assert len(lines) == 1
        assert "launched eagerly: a CUDA graph needs a GPU" in lines[0]
        assert not recorder.check(model, torch.device("cuda"), "ddpm")
        assert "'ddpm' draws noise on the host" in lines[1]
        assert recorder.check(model, torch.device("cuda"), "ddim")

    def test_off_records_nothing_and_says_nothing(self):
        assert not Recorder("off", pytest.fail).check(
            nn.Linear(1, 1), torch.device("cuda"), "ddim"
        )

    def test_what_fails_is_launched_eagerly_and_not_tried_again(self):
        class Waiting:
            def record(self):
                tried.append(self)
                raise RuntimeError("operation not permitted\nwhen stream is capturing")

        tried, lines = [], []
        recorder = Recorder("auto", lines.append, lambda reason: False)
        assert recorder("a", Waiting) is None and recorder("a", Waiting) is None
        assert len(tried) == 1 and "not permitted when stream is capturing" in lines[0]
        with pytest.raises(UserError, match=r"not possible: operation not .*use auto or off"):
            Recorder("on")("a", Waiting)

    def test_what_fails_is_tried_again_where_that_may_help(self):
        class FailsOnce:
            def record(self):
                tried.append(self)
                if len(tried) == 1:
                    raise RuntimeError("no compiler")

        tried, reasons = [], []
        recorder = Recorder("on", retry=lambda reason: not reasons.append(reason))
        assert recorder("a", FailsOnce) is tried[1] and reasons == ["no compiler"]

    def test_an_equal_call_shares_the_recording(self):
        class Steady:
            def record(self):
                made.append(self)

        made = []
        recorder = Recorder("on")
        first = recorder("a", Steady)
        assert recorder("a", Steady) is first and recorder("b", Steady) is not first
        assert len(made) == 2


class TestFlags:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--device", "warp"], "--device 'warp' cannot be used"),
            (["--device", "meta"], "--device 'meta' cannot be used"),
            (["--device", "cuda:99"], "--device 'cuda:99' cannot be used"),
            (["--device", "cpu", "--cuda-graph", "on"], "a CUDA graph needs a GPU"),
        ],
    )
    @pytest.mark.parametrize("script", [sample_module, evaluate_module])
    def test_what_cannot_be_is_one_line_before_anything(self, trained, script, arguments, words):
        before = sorted(trained.folder.rglob("*"))
        with pytest.raises(UserError) as caught:
            script.main([str(trained.folder), *arguments])
        assert words in str(caught.value) and "\n" not in str(caught.value)
        assert sorted(trained.folder.rglob("*")) == before

    def test_sample_says_why_it_launches_eagerly(self, trained, tmp_path, capsys):
        arguments = [str(trained.folder), "--classes", "1", "--steps", "2", "--device", "cpu"]
        arguments += ["--out", str(tmp_path / "a.png"), "--precision", "bf16"]
        assert sample_module.main(arguments) == 0
        assert capsys.readouterr().err.count("launched eagerly: a CUDA graph needs a GPU") == 1
        assert sample_module.main([*arguments, "--cuda-graph", "off"]) == 0
        assert "eagerly" not in capsys.readouterr().err

    def test_the_choices_are_those_of_the_library(self):
        for script in (sample_module, evaluate_module):
            given = {action.dest: action.choices for action in script._parser()._actions}
            assert given["cuda_graph"] == [*MODES] and given["precision"] == [*PRECISIONS]

    def test_bf16_is_close_and_other_images(self, trained):
        draw = RunSampler(trained, device="cpu")
        labels = torch.arange(4)
        wanted, found = (draw(labels, steps=2, precision=name) for name in PRECISIONS)
        assert found.dtype == torch.float32 and not torch.equal(found, wanted)
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)
        with pytest.raises(UserError, match="'fp8' is none of fp32, bf16"):
            draw.check(precision="fp8")

    def test_images_of_another_precision_have_a_folder_of_their_own(self, trained):
        """And those of before it could be chosen keep theirs."""
        assert shard_folder(trained, Plan()) != shard_folder(trained, Plan(precision="bf16"))
        assert "precision" in inspect.signature(Plan).parameters

    def test_images_on_a_cpu_are_not_those_of_a_folded_model(self, trained, monkeypatch):
        monkeypatch.setattr("backbones.DiT.fuse", None)
        RunSampler(trained, device="cpu")


def model_of(name):
    model = build_backbone(name, "tiny", in_channels=3, num_classes=CLASSES, resolution=8,
                           latent_factor=1, patch_size=2, learn_sigma=False)  # fmt: skip
    generator = generator_for(1)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@needs_gpu
class TestOnAGpu:
    @pytest.fixture(autouse=True)
    def exact_products(self):
        """Training in the same process allows TF32."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        yield
        torch.set_float32_matmul_precision(before)

    @pytest.mark.parametrize("name", MECHANISMS)
    @TOLERANCES
    def test_recorded_images_are_the_eager_ones(self, name, precision, bound):
        images_are_the_eager_ones(model_of(name).cuda(), Recorder("on"), precision, bound)

    def test_nothing_waits_for_the_gpu_between_steps(self):
        model = model_of("softmax").cuda()
        steps = Steps(
            model, lambda noisy, time, labels: model(noisy, time.expand(4), labels).sample,
            Diffusion("v_prediction").scheduler("dpm++", 5), 4, SHAPE, CLASSES,
            torch.device("cuda"),
        )  # fmt: skip
        steps.record()
        noise, labels = torch.randn(4, *SHAPE, device="cuda"), torch.arange(4, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps(noise, labels, int)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_what_waits_is_launched_eagerly(self):
        class Waiting(Curved):
            def forward(self, hidden_states, **rest):
                assert hidden_states.isfinite().all()  # asks the GPU
                return super().forward(hidden_states, **rest)

        lines = []
        options = {"device": "cuda", "sampler": "ddim", "steps": 3}
        found = drawn(Waiting(), Diffusion("epsilon"), recorder=Recorder("auto", lines.append),
                      **options)  # fmt: skip
        assert len(lines) == 1 and "launched eagerly" in lines[0]
        assert torch.equal(found, drawn(Curved(), Diffusion("epsilon"), **options))

    def test_a_run_is_sampled_and_folded(self, trained, capsys):
        draw = RunSampler(trained, cuda_graph="on")
        eager = RunSampler(trained, device="cpu")
        labels = torch.arange(10)
        found, wanted = draw(labels, steps=6, cfg=2.0), eager(labels, steps=6, cfg=2.0)
        assert (found - wanted).abs().mean() < 0.02 * wanted.abs().max()
        assert (
            sample_module.main([str(trained.folder), "--precision", "bf16", "--steps", "4"]) == 0
        )
        assert "eagerly" not in capsys.readouterr().err
