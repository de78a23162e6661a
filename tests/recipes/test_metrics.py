"""Metrics against closed forms, against torchmetrics, and their properties."""

import math

import pytest
import torch

from recipes.lab.evaluation import metrics
from recipes.lab.evaluation.metrics import Moments, frechet, frechet_bias, kid


def normal(count, dim, seed, mean=0.0, variance=1.0):
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return mean + math.sqrt(variance) * sample


def gaussian(mean, covariance, count=10**6):
    return Moments(count, mean, covariance * (count - 1))


class TestFrechet:
    def test_commuting_covariances_have_a_closed_form(self):
        rotation = torch.linalg.qr(normal(16, 16, 0)).Q
        a, b = normal(1, 16, 1)[0].square() + 0.1, normal(1, 16, 2)[0].square() + 0.1
        shift = normal(1, 16, 3)[0]
        found = frechet(
            gaussian(torch.zeros(16).double(), rotation @ torch.diag(a) @ rotation.T),
            gaussian(shift, rotation @ torch.diag(b) @ rotation.T),
        )
        wanted = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
        assert found == pytest.approx(wanted.item(), rel=1e-12)

    @pytest.mark.parametrize("count", [200, 30])
    def test_a_set_is_at_no_distance_from_itself(self, count):
        moments = Moments.of(normal(count, 64, 0))
        assert frechet(moments, moments) < 1e-6

    def test_symmetric_and_the_same_in_rotated_features(self):
        x, y = normal(300, 32, 0), normal(40, 32, 1, mean=0.3, variance=2.0)
        rotation = torch.linalg.qr(normal(32, 32, 2)).Q
        there = frechet(Moments.of(x), Moments.of(y))
        assert there == pytest.approx(frechet(Moments.of(y), Moments.of(x)), rel=1e-9)
        turned = frechet(Moments.of(x @ rotation), Moments.of(y @ rotation))
        assert there == pytest.approx(turned, rel=1e-9)

    def test_the_same_distribution_shows_the_predicted_bias(self):
        found = frechet(Moments.of(normal(2000, 64, 0)), Moments.of(normal(2000, 64, 1)))
        assert frechet_bias(64, 2000, 2000) == 64 * 69 / 4000
        assert found == pytest.approx(frechet_bias(64, 2000, 2000), rel=0.08)

    def test_merged_moments_are_those_of_the_whole(self):
        x = normal(1000, 16, 0, mean=1e4)  # a mean that would swallow the scatter's digits
        whole, merged = Moments.of(x), Moments.of_blocks(x.split([1, 499, 300, 200]))
        assert merged.count == 1000
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-9)

    def test_agrees_with_torchmetrics_on_the_same_features(self):
        fid = pytest.importorskip("torchmetrics.image.fid")
        x, y = normal(400, 32, 0), normal(500, 32, 1, mean=0.2, variance=1.5)
        theirs = fid.FrechetInceptionDistance(feature=Identity(32)).set_dtype(torch.float64)
        theirs.update(as_images(x), real=True)
        theirs.update(as_images(y), real=False)
        ours = frechet(Moments.of(x), Moments.of(y))
        assert ours == pytest.approx(theirs.compute().item(), rel=1e-3)


class Identity(torch.nn.Module):
    """Stands in for Inception where the "images" already are features."""

    def __init__(self, dim):
        super().__init__()
        self.num_features = dim

    def forward(self, images):
        return images.flatten(1)


def as_images(features):
    return features[:, :, None, None]


class TestKernelDistance:
    def test_the_same_distribution_is_at_distance_0_on_average(self):
        found = kid(normal(2000, 32, 0), normal(2000, 32, 1))
        assert abs(found.full) < 3e-3
        assert abs(found.mean) < 5e-3
        assert found.std > 0

    def test_an_identical_array_is_slightly_below_0(self):
        x = normal(2000, 32, 0)
        assert -0.01 < kid(x, x).full < 0  # the cross term keeps its diagonal

    def test_two_scales_have_a_closed_form(self):
        d, a, b = 64, 1.0, 1.8
        found = kid(normal(4000, d, 0, variance=a), normal(4000, d, 1, variance=b))
        assert found.full == pytest.approx(3 * (a - b) ** 2 / d, rel=0.15)

    def test_a_shift_has_a_closed_form(self):
        d, shift = 32, 0.35
        s = d * shift**2
        wanted = (
            (1 + 3 / d)
            + (1 + 3 * s / d + 3 * (d + 2 * s + s * s) / d**2)
            + (s**3 + 6 * s * s + 3 * s * (d + 2)) / d**3
            - 2 * (1 + 3 * (d + s) / d**2)
        )
        found = kid(normal(4000, d, 0), normal(4000, d, 1, mean=shift))
        assert found.full == pytest.approx(wanted, rel=0.1)

    def test_its_draws_are_its_own(self):
        x, y = normal(300, 8, 0), normal(300, 8, 1, mean=0.1)
        before = torch.get_rng_state()
        first = kid(x, y, subset_size=50)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(5)
        assert kid(x, y, subset_size=50) == first
        assert kid(x, y, subset_size=50, seed=1) != first

    def test_the_references_own_term_is_no_other_when_it_is_known(self):
        x, y = normal(120, 8, 0), normal(300, 8, 1, mean=0.1)
        options = {"subsets": 7, "subset_size": 50, "seed": 3}
        known = metrics.kernel_within(y, 120, **options)
        assert kid(x, y, **options, within_reference=known) == kid(x, y, **options)
        assert kid(x, y, **options, within_reference=known + 1).full == pytest.approx(
            kid(x, y, **options).full + 1
        )

    def test_one_subset_of_everything_is_the_full_estimate(self):
        x, y = normal(90, 8, 0), normal(90, 8, 1, mean=0.2)
        found = kid(x, y)
        assert found.mean == pytest.approx(found.full, rel=1e-12)
        tiled = kid(x.repeat(20, 1), y.repeat(20, 1), subsets=3, subset_size=1800)
        assert tiled.mean == pytest.approx(tiled.full, rel=1e-12)

    def test_agrees_with_torchmetrics_on_the_same_features(self):
        theirs = pytest.importorskip("torchmetrics.image.kid").KernelInceptionDistance(
            feature=Identity(16), subsets=2, subset_size=200
        ).set_dtype(torch.float64)  # fmt: skip
        x, y = normal(200, 16, 0), normal(200, 16, 1, mean=0.3, variance=1.4)
        theirs.update(as_images(x), real=True)
        theirs.update(as_images(y), real=False)
        ours = kid(y, x, subsets=2, subset_size=200)
        assert ours.mean == pytest.approx(theirs.compute()[0].item(), rel=1e-3)


class TestInceptionScore:
    def test_uniform_and_certain_predictions(self):
        assert metrics.inception_score(torch.zeros(100, 10))[0] == pytest.approx(1)
        certain = 200 * torch.nn.functional.one_hot(torch.arange(500) % 10).double()
        assert metrics.inception_score(certain)[0] == pytest.approx(10)

    def test_the_order_matters_in_chunks(self):
        labels = torch.arange(100).repeat_interleave(50)
        logits = 200 * torch.nn.functional.one_hot(labels).double()
        order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
        assert metrics.inception_score(logits, chunk=500)[0] == pytest.approx(10)
        assert 85 < metrics.inception_score(logits[order], chunk=500)[0] < 97


class TestNeighbors:
    def test_identical_and_disjoint_sets(self):
        x = normal(200, 8, 0)
        assert metrics.precision_recall(x, x) == (1, 1)
        assert metrics.precision_recall(x, x + 1000) == (0, 0)
        assert metrics.density_coverage(x, x + 1000) == (0, 0)

    def test_known_radii_change_nothing(self):
        x, y = normal(100, 8, 0), normal(150, 8, 1, mean=0.5)
        for measure, k in ((metrics.precision_recall, 3), (metrics.density_coverage, 5)):
            assert measure(x, y, k, metrics.radii(y, k)) == measure(x, y, k)
            assert measure(x, y, k, 9 * metrics.radii(y, k)) != measure(x, y, k)

    def test_a_collapsed_model_is_precise_and_reaches_one_image(self):
        real = normal(500, 8, 0)
        collapsed = real[:1].repeat(500, 1)
        assert metrics.precision_recall(collapsed, real) == (1, 1 / 500)
        assert metrics.density_coverage(collapsed, real)[1] < 0.05

    def test_missing_modes_lower_recall_and_strange_ones_precision(self):
        a, b = normal(600, 8, 0), normal(600, 8, 1, mean=20.0)
        c, other = normal(600, 8, 2), normal(600, 8, 3, mean=-20.0)
        precision, recall = metrics.precision_recall(c, torch.cat([a, b]))
        assert precision > 0.85 and recall < 0.5
        precision, recall = metrics.precision_recall(torch.cat([c, other]), a)
        assert precision < 0.5 and recall > 0.85

    @pytest.mark.parametrize(("dim", "wanted"), [(2, 0.97), (16, 0.79)])
    def test_one_distribution_does_not_score_1(self, dim, wanted):
        found = metrics.precision_recall(normal(2000, dim, 0), normal(2000, dim, 1))
        assert found == pytest.approx((wanted, wanted), abs=0.03)

    def test_density_and_coverage_of_one_distribution_are_about_1(self):
        density, coverage = metrics.density_coverage(normal(1500, 8, 0), normal(1500, 8, 1))
        assert density == pytest.approx(1, abs=0.06)
        assert coverage == pytest.approx(1 - 2**-5, abs=0.02)

    def test_noise_can_be_precise_but_covers_nothing(self):
        # Real images on a thin, spread set; noise near its middle lies in an outlier's ball.
        real = torch.cat([0.1 * normal(400, 32, 0), normal(40, 32, 1, variance=25.0)])
        noise = normal(400, 32, 2)
        assert metrics.precision_recall(noise, real)[0] > 0.9
        assert metrics.density_coverage(noise, real)[1] < 0.1


def test_class_accuracy_alone_sees_shuffled_labels():
    labels = torch.arange(1000) % 10
    logits = torch.nn.functional.one_hot(labels).double()
    assert metrics.class_accuracy(logits, labels) == 1
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert metrics.class_accuracy(logits, labels[order]) == pytest.approx(0.1, abs=0.04)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: Moments.of(x / 0), "not finite"),
        (lambda x: kid(x, x[:, :2]), "width 4 do not compare with width 2"),
        (lambda x: kid(x, x[:1]), "at least 2"),
        (lambda x: metrics.precision_recall(x, x[:3]), "more than 3"),
        (lambda x: metrics.class_accuracy(x, torch.zeros(3)), "8 predictions"),
    ],
)
def test_what_cannot_be_measured_says_why(call, words):
    with pytest.raises(ValueError, match=words):
        call(normal(8, 4, 0))


@pytest.mark.parametrize(
    ("mean", "covariance", "words"),
    [
        (float("nan"), torch.eye(4), "not finite"),
        (0.0, torch.eye(4) / 0, "not finite"),
        (0.0, -torch.eye(4), "negative"),
        (0.0, torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0])), "negative"),
        (0.0, torch.triu(torch.ones(4, 4)), "not symmetric"),
        (0.0, torch.eye(3), "do not belong together"),
    ],
)
def test_what_is_no_gaussian_is_at_no_distance(mean, covariance, words):
    good = gaussian(torch.zeros(4).double(), torch.eye(4).double())
    bad = gaussian(torch.full((4,), mean).double(), covariance.double())
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(metrics.NotMeasured, match=words):
            frechet(*pair)
