"""What a few seeds can decide, against statsmodels and figures known from elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from recipes.studies.comparison.statistics import (
    holm,
    is_at_chance,
    paired_difference,
    power_of,
    seeds_needed,
    steps_saved,
    steps_to_reach,
)


class TestPairedDifferences:
    def test_they_are_students(self):
        draws = np.random.default_rng(0).normal([[0.5], [0.0]], size=(2, 6))
        found = paired_difference(*draws.tolist())
        expected = stats.ttest_rel(*draws)
        assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
        low, high = expected.confidence_interval(0.95)
        assert (found.mean - found.margin, found.mean + found.margin) == pytest.approx((low, high))
        assert found.percent == pytest.approx(100 * found.mean / abs(draws[1].mean()))

    def test_pairs_without_a_number_are_left_out(self):
        found = paired_difference([1.0, math.nan, 3.0, 5.0], [0.5, 1.0, math.inf, 4.0])
        assert (found.pairs, found.mean) == (2, 0.75)

    @pytest.mark.parametrize("first", [[], [1.0], [1.0, 2.0, 3.0]])
    def test_what_says_nothing_has_no_p(self, first):
        found = paired_difference(first, [value - 0.25 for value in first])
        assert math.isnan(found.p)
        assert math.isinf(found.bound) == (len(first) < 2)

    def test_equal_numbers_are_a_tie_bounded_by_nothing(self):
        found = paired_difference([0.1 + 0.2, 0.5], [0.3, 0.5])
        assert (found.mean, found.margin, found.p, found.bound_percent) == (0, 0, 1, 0)

    def test_the_bound_of_a_tie_is_the_far_end_of_its_interval(self):
        found = paired_difference([101.0, 99.0, 101.5], [100.0, 100.0, 100.0])
        assert found.p > 0.05
        assert found.bound == pytest.approx(found.mean + found.margin)
        assert found.bound_percent == pytest.approx(found.bound)
        worse = paired_difference([100.0, 100.0, 100.0], [101.0, 99.0, 101.5])
        assert worse.bound == pytest.approx(found.bound)


class TestHolm:
    def test_it_gives_the_figures_of_statsmodels(self):
        multipletests = pytest.importorskip("statsmodels.stats.multitest").multipletests
        draws = np.random.default_rng(1)
        for size in (1, 2, 7, 66):
            values = draws.random(size) ** 4
            values[: size // 3] = values[0]  # ties
            expected = multipletests(values, method="holm")[1]
            assert holm(values) == pytest.approx(expected, rel=1e-12)

    def test_a_claim_without_a_number_counts_for_none(self):
        found = holm([0.01, math.nan, 0.03])
        assert math.isnan(found[1]) and [found[0], found[2]] == pytest.approx([0.02, 0.03])
        assert holm([]) == []


class TestPower:
    def test_seeds_are_those_of_statsmodels(self):
        power = pytest.importorskip("statsmodels.stats.power").TTestPower()
        pilot = [0.8, 1.4, 0.2]
        for size, level in ((None, 0.05), (0.3, 0.05), (0.5, 0.05 / 66)):
            effect = (np.mean(pilot) if size is None else size) / np.std(pilot, ddof=1)
            expected = power.solve_power(effect, power=0.8, alpha=level, nobs=None)
            assert seeds_needed(pilot, size, level=level) == math.ceil(expected)
            assert power_of(effect, 1, 5, level) == pytest.approx(power.power(effect, 5, level))

    def test_no_difference_needs_more_seeds_than_there_are(self):
        assert seeds_needed([1.0, -1.0]) == math.inf == seeds_needed([1.0, -1.0], 1e-6)
        assert seeds_needed([1.0, 1.0]) == 2 == seeds_needed([1.0, 1.001], 1e9)
        with pytest.raises(ValueError, match="got 1"):
            seeds_needed([1.0, math.nan])


class TestLearningCurves:
    slow = ((100, 4.0), (200, 2.0), (400, 1.0))
    fast = ((100, 3.0), (200, 0.5), (400, 0.25))

    def test_the_better_one_is_interpolated(self):
        assert steps_to_reach(self.fast, 1.0) == pytest.approx(180)
        assert steps_saved(self.fast, self.slow) == pytest.approx(220)
        assert steps_saved(self.slow, self.slow) == 0

    def test_what_is_never_reached_is_none(self):
        assert steps_saved(self.slow, self.fast) is None
        assert steps_saved((), self.fast) is None is steps_saved(self.fast, ())

    def test_a_curve_that_begins_lower_has_its_first_step(self):
        assert steps_to_reach(self.fast, 3.5) == 100


def test_chance_is_what_guessing_reaches():
    assert is_at_chance(0.1, 500, 10) and is_at_chance(0.104, 500, 10)
    assert not is_at_chance(0.2, 500, 10) and is_at_chance(0.2, 24, 10)
