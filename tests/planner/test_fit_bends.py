"""Curves through timings: known constants come back, small messages get pieces of their own, doubt is stated."""

import numpy as np
import pytest
import torch

from hiermoe.planner.fit_bends import fit_curve
from hiermoe.topology.peers import AlphaBeta, Bend

SIZES = np.array([2.0**power for power in range(10, 31)])
LINE = AlphaBeta(alpha_ms=0.03, beta_ms_per_byte=3e-9, source="made up")
BENT = LINE.model_copy(
    update={"bends": (Bend(below_bytes=2.0**18, ms_per_byte=-3e-8), Bend(below_bytes=2.0**24, ms_per_byte=-6e-10))}
)


def test_a_line_comes_back_and_has_no_bend() -> None:
    fit = fit_curve(SIZES, LINE.ms(SIZES), "made up")
    assert fit.constants.bends == ()
    assert fit.constants.alpha_ms == pytest.approx(0.03) and fit.constants.beta_ms_per_byte == pytest.approx(3e-9)
    assert abs(fit.residuals).max() < 1e-9


def test_bends_come_back() -> None:
    fit = fit_curve(SIZES, BENT.ms(SIZES), "made up")
    np.testing.assert_allclose(fit.constants.ms(SIZES), BENT.ms(SIZES), rtol=0.11)
    assert fit.constants.beta_ms_per_byte == pytest.approx(3e-9, rel=0.02)


def test_intervals_hold_the_truth_and_grow_with_noise() -> None:
    widths = []
    for noise in (0.01, 0.04):
        rng = np.random.default_rng(3)
        sizes = np.repeat(SIZES, 3)
        fit = fit_curve(sizes, LINE.ms(sizes) * (1 + noise * rng.standard_normal(len(sizes))), "made up")
        for (low, high), truth in ((fit.alpha_ms, 0.03), (fit.beta_ms_per_byte, 3e-9)):
            assert low < truth < high
        widths.append(fit.beta_ms_per_byte[1] - fit.beta_ms_per_byte[0])
    assert 2 < widths[1] / widths[0] < 8


def test_a_bent_line_is_continuous_and_takes_numbers_tensors_and_arrays() -> None:
    for bend in BENT.bends:
        below, above = (BENT.ms(bend.below_bytes * (1 + side * 1e-9)) for side in (-1, 1))
        assert below == pytest.approx(above, rel=1e-6)
    by_array = BENT.ms(SIZES / 4, 4.0)
    np.testing.assert_allclose(by_array, [BENT.ms(float(size)) for size in SIZES])
    np.testing.assert_allclose(by_array, BENT.ms(torch.from_numpy(SIZES)).numpy())
    assert BENT.ms(2.0**30) == LINE.ms(2.0**30) and BENT.ms(0.0) < LINE.ms(0.0)
    assert BENT.times(1, 2).ms(1e6) - 0.03 == pytest.approx(2 * (BENT.ms(1e6) - 0.03))


@pytest.mark.parametrize(
    ("sizes", "times", "message"),
    [
        ([1e3, 1e6], [1.0, 2.0], "2 different sizes"),
        ([1e3, 1e6, 1e9], [1.0, 1.0, 1.0], "more bytes took no longer"),
    ],
)
def test_what_gives_no_curve(sizes: list[float], times: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_curve(np.array(sizes), np.array(times), "made up")
