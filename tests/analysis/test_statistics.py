"""Ratios and their intervals, on numbers small enough to check by hand."""

import numpy as np
import pandas as pd
import pytest

from hiermoe.analysis.statistics import (
    RESAMPLES,
    block_indices,
    bootstrap,
    paired,
    ratio_of_sums,
    ratio_of_variation,
)


def test_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    estimate = ratio_of_sums(np.array([10.0, 30.0]), np.array([10.0, 10.0]))
    assert estimate.value == 2.0
    assert estimate.n == 2


def test_constant_series_have_no_spread() -> None:
    estimate = ratio_of_sums(np.full(16, 6.0), np.full(16, 4.0))
    assert (estimate.low, estimate.value, estimate.high) == (1.5, 1.5, 1.5)


def test_noise_that_both_share_cancels() -> None:
    noise = np.random.default_rng(0).lognormal(size=64)
    shared = ratio_of_sums(3 * noise, 2 * noise)
    apart = ratio_of_sums(3 * noise, 2 * noise[::-1])
    assert shared.high - shared.low < 1e-9 < 0.1 < apart.high - apart.low


def test_interval_holds_the_value_and_is_the_same_every_time() -> None:
    x, y = np.random.default_rng(0).normal(10, 1, (2, 32))
    first, second = ratio_of_sums(x, y), ratio_of_sums(x, y)
    assert first == second
    assert first.low < first.value < first.high


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        estimate = bootstrap(lambda x: x.mean(-1), rng.normal(5, 1, 32))
        hits += estimate.low <= 5 <= estimate.high
    assert 0.86 <= hits / 300 <= 0.98  # percentile intervals of 32 values are somewhat narrow


def test_resamples_are_made_of_whole_blocks() -> None:
    indices = block_indices(27)
    assert indices.shape == (RESAMPLES, 27)
    assert indices.min() == 0 and indices.max() == 26
    assert (np.diff(indices.reshape(RESAMPLES, 9, 3), axis=-1) % 27 == 1).all()


def test_every_iteration_is_drawn_alike_so_a_trend_does_not_shift_the_interval() -> None:
    drawn = np.bincount(block_indices(16).ravel())
    assert drawn.min() > 0.9 * drawn.mean()


def test_blocks_widen_the_interval_of_drifting_series() -> None:
    drift = 10 + np.repeat(np.random.default_rng(0).normal(0, 1, 10), 3)
    shuffled = np.random.default_rng(1).permutation(drift)
    widths = [e.high - e.low for e in (bootstrap(lambda x: x.mean(-1), x) for x in (drift, shuffled))]
    assert widths[0] > 1.2 * widths[1]


def test_variation_is_relative_to_the_mean() -> None:
    steady, restless = np.array([100.0, 102.0] * 4), np.array([10.0, 12.0] * 4)
    assert ratio_of_variation(steady, restless).value == pytest.approx((1 / 101) / (1 / 11))


def test_resamples_without_variation_say_nothing_about_it() -> None:
    estimate = ratio_of_variation(np.array([10.0, 11.0, 13.0]), np.array([20.0, 24.0, 21.0]))
    assert 0 <= estimate.low <= estimate.value <= estimate.high < np.inf


def test_series_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths"):
        ratio_of_sums(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="lengths"):
        bootstrap(lambda x: x.mean(-1), np.array([]))


def test_runs_over_other_routing_are_not_paired() -> None:
    a = pd.DataFrame({"run_id": "a", "iteration": [0, 1], "routing_iteration": [0, 1], "ms": [1.0, 2.0]})
    same, other = paired(a, a.assign(run_id="b"), "ms")
    assert same.tolist() == other.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="same steps"):
        paired(a, a.assign(run_id="b", routing_iteration=[1, 2]), "ms")
