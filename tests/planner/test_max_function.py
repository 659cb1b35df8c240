"""The maximum functions of Q."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiermoe.planner.maxima import MaxFunction
from tests.planner import reference
from tests.planner.cases import examples

COUNTS = st.lists(st.integers(0, 5000), min_size=1, max_size=40)
GAMMAS = st.sampled_from([1.0, 2.0, 5.0, 10.0, 19.0, 50.0])
KINDS = ["plain", "smooth", "logsumexp"]


def value(x: list[int], kind: str, gamma: float = 10.0) -> float:
    return float(MaxFunction(kind, gamma)(torch.tensor(x, dtype=torch.float64)))  # type: ignore[arg-type]


@given(x=COUNTS, gamma=GAMMAS)
@examples(60)
def test_values_equal_the_formulas(x: list[int], gamma: float) -> None:
    for kind in KINDS:
        assert math.isclose(value(x, kind, gamma), reference.maximum([float(i) for i in x], kind, gamma), rel_tol=1e-12)


@given(x=COUNTS, gamma=GAMMAS)
@examples(60)
def test_smooth_ones_are_never_below_the_maximum(x: list[int], gamma: float) -> None:
    plain = value(x, "plain")
    assert plain == max(x)
    assert value(x, "smooth", gamma) >= plain * (1 - 1e-12)
    assert value(x, "logsumexp", gamma) >= plain * (1 - 1e-12)
    assert value(x, "smooth", gamma) <= plain * len(x) ** (1 / gamma) * (1 + 1e-12)


@given(x=COUNTS, gamma=GAMMAS, scale=st.sampled_from([1e-6, 0.125, 3.0, 1e6]))
@examples(60)
def test_all_are_homogeneous(x: list[int], gamma: float, scale: float) -> None:
    x_U = torch.tensor(x, dtype=torch.float64)
    for kind in KINDS:
        function = MaxFunction(kind, gamma)  # type: ignore[arg-type]
        assert math.isclose(float(function(scale * x_U)), scale * float(function(x_U)), rel_tol=1e-12)


def test_large_gamma_tends_to_the_maximum() -> None:
    x = [100, 99, 50, 3, 0]
    gaps = [value(x, "smooth", gamma) - 100 for gamma in (5.0, 10.0, 50.0, 200.0, 1000.0)]
    assert gaps == sorted(gaps, reverse=True)
    assert 0 <= gaps[-1] < 1e-2
    assert value(x, "logsumexp", 1000.0) == pytest.approx(100, abs=1e-2)


def test_equal_groups_are_inflated_as_the_readings_say() -> None:
    assert value([700] * 32, "smooth") / 700 == pytest.approx(1.41, abs=0.005)
    assert value([700] * 4, "smooth") / 700 == pytest.approx(1.15, abs=0.005)
    assert value([700] * 32, "smooth") / 700 == pytest.approx(32 ** (1 / 10), rel=1e-12)


def test_runners_up_count() -> None:
    """Equal maxima, different second: the reason for smoothing at all."""
    assert value([100, 10], "plain") == value([100, 90], "plain")
    assert value([100, 10], "smooth") < value([100, 90], "smooth")
    assert value([100, 10], "logsumexp") < value([100, 90], "logsumexp")


def test_nothing_at_all_is_zero() -> None:
    for kind in KINDS:
        assert value([0, 0, 0], kind) == 0.0


@given(x=COUNTS.filter(lambda x: len(x) > 1), gamma=GAMMAS, data=st.data())
@examples(60)
def test_replacing_two_elements_equals_writing_them(x: list[int], gamma: float, data: st.DataObject) -> None:
    size = len(x)
    ends = st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)).filter(lambda ab: ab[0] != ab[1])
    pairs = data.draw(st.lists(ends, min_size=1, max_size=12), label="the two elements of each pair")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    new_2P = torch.randint(0, 6000, (2, len(pairs)), generator=generator)
    new_2P[:, 0] = 0
    x_U = torch.tensor(x)
    for kind in KINDS:
        function = MaxFunction(kind, gamma)  # type: ignore[arg-type]
        found_P = function.after_replacing(x_U, torch.tensor([a * size + b for a, b in pairs]), new_2P)
        for p, (a, b) in enumerate(pairs):
            changed = x_U.clone()
            changed[a], changed[b] = new_2P[:, p]
            wanted = reference.maximum([float(i) for i in changed.tolist()], kind, gamma)
            assert math.isclose(float(found_P[p]), wanted, rel_tol=1e-9, abs_tol=1e-12), (kind, a, b)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan, math.inf])
def test_gamma_must_be_a_positive_number(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma="):
        MaxFunction("smooth", gamma)


def test_unknown_function_is_refused() -> None:
    with pytest.raises(ValueError, match="max_function=median is unknown; choose from plain, smooth, logsumexp"):
        MaxFunction("median")  # type: ignore[arg-type]
