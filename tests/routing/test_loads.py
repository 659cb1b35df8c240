"""Routing from expert loads alone: the loads come out, and what cannot be is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hiermoe.routing.load_table import read_loads
from hiermoe.routing.loads import IndependentLoads, inclusion_rates
from hiermoe.routing.step import RoutingRequest


def drawn_shares(load_E: np.ndarray, topk: int, steps: int = 1) -> np.ndarray:
    source = IndependentLoads(RoutingRequest("", len(load_E), topk, 8, 4096), load_E)
    ids_NK = np.concatenate([source.step(i).expert_ids_NK.numpy() for i in range(steps)])
    assert bool((np.diff(np.sort(ids_NK, axis=1), axis=1) > 0).all())
    return np.bincount(ids_NK.ravel(), minlength=len(load_E)) / ids_NK.size


@pytest.mark.parametrize(("num_experts", "topk", "exponent"), [(8, 2, 0.5), (64, 6, 0.8), (128, 8, 0.5)])
def test_experts_are_drawn_as_often_as_their_loads_say(num_experts: int, topk: int, exponent: float) -> None:
    load_E = np.arange(1, num_experts + 1.0) ** -exponent
    load_E = np.minimum(load_E / load_E.sum(), 0.9 / topk)
    load_E /= load_E.sum()
    np.testing.assert_allclose(drawn_shares(load_E, topk, steps=8), load_E, rtol=0.05)


def test_weights_in_proportion_to_loads_would_miss_them() -> None:
    load_E = np.array([5.0, 4.0, 1, 1, 1, 1, 1, 1])
    shares = drawn_shares(load_E, 2)
    assert shares[0] == pytest.approx(5 / 15, rel=0.06)
    assert inclusion_rates(load_E, 2)[0] / inclusion_rates(load_E, 2)[2] > 7  # not 5: two distinct experts a token


def test_expert_of_every_token_is_in_every_token_and_one_without_load_in_none() -> None:
    shares = drawn_shares(np.array([2.0, 0.0, 1.0, 1.0]), 2)
    assert shares[0] == 0.5 and shares[1] == 0.0


@pytest.mark.parametrize(
    ("load_E", "message"),
    [
        ([3.0, 1.0, 1.0, 0.0], "expert 0 has 60.0% of the load; with topk=2"),
        ([1.0, 0.0, 0.0, 0.0], "no expert can have more than 50.0%"),
    ],
)
def test_loads_that_no_routing_has_are_refused(load_E: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inclusion_rates(np.array(load_E), 2)


def test_rows_may_come_in_any_order(loads_file: Callable[[str], Path]) -> None:
    path = loads_file("expert,load\n2,30\n0,10.5\n1,0\n")
    np.testing.assert_array_equal(read_loads(path).load_E, [10.5, 0, 30])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no CSV file of expert,load"),
        ("id,tokens\n0,1\n", "has the columns id,tokens; the rule is expert,load"),
        ("expert,load\n", "experts must be 0 to E - 1, each once; there are 0 rows"),
        ("expert,load\n0,1\n0,2\n", "experts must be 0 to E - 1"),
        ("expert,load\n1,1\n2,2\n", "experts must be 0 to E - 1"),
        ("expert,load\n0,1\n1,many\n", "load of expert 1 is many; the rule is >= 0"),
        ("expert,load\n0,1\n1,-2\n", "load of expert 1 is -2"),
        ("expert,load\n0,1\n1,\n", "load of expert 1 is nan"),
        ("expert,load\n0,0\n1,0\n", "all loads are 0"),
        ("expert,load\n0,1\n1,2,3,4\n", "is no CSV file"),
    ],
)
def test_malformed_file_is_refused_by_name(text: str, message: str, loads_file: Callable[[str], Path]) -> None:
    path = loads_file(text)
    with pytest.raises(ValueError) as error:
        read_loads(path)
    assert message in str(error.value) and "loads.csv" in str(error.value) and "\n" not in str(error.value)
