"""FasterMoE's shadows: as many as make its modelled step shorter, and used on every GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.fastermoe import FasterMoEPolicy, shadows
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import WORLD
from tests.baselines.counted import at_home, context, random_home, random_pairs, shares
from tests.planner.cases import examples


def modelled(load: list[int], number: int, token_ms: float, shadow_ms: float) -> float:
    return sorted(load, reverse=True)[number] * token_ms + number * shadow_ms


@given(
    load=st.lists(st.integers(0, 100), min_size=2, max_size=12), token_ms=st.sampled_from([1.0, 4.0]),
    shadow_ms=st.sampled_from([0.0, 5.0, 30.0]), most=st.sampled_from([None, 1, 3]),
)  # fmt: skip
@examples(100)
def test_one_more_is_broadcast_as_long_as_the_step_gets_shorter(
    load: list[int], token_ms: float, shadow_ms: float, most: int | None
) -> None:
    number = 0
    while number < (len(load) - 1 if most is None else min(most, len(load) - 1)) and modelled(
        load, number + 1, token_ms, shadow_ms
    ) < modelled(load, number, token_ms, shadow_ms):
        number += 1
    found = shadows(load, token_ms, shadow_ms, most)
    assert found == sorted(range(len(load)), key=lambda e: (-load[e], e))[:number]


@given(ranks=st.integers(2, 6), seed=st.integers(0, 10**6), spare=st.sampled_from([None, 2]))
@examples(40)
def test_every_source_uses_the_shadow_on_its_own_gpu(ranks: int, seed: int, spare: int | None) -> None:
    pairs_GE, home, where = random_pairs(ranks, 3 * ranks, 9000, seed), random_home(ranks, 3, seed), Hierarchy((ranks,))
    found = shares(FasterMoEPolicy(spare).rebalance(pairs_GE, home, context(where)), pairs_GE, home)
    cluster, parameters, row_bytes = context(where).cluster, 10**6, 4096
    beta_ms = cluster.constants(WORLD).beta_ms_per_byte
    token_ms = 3 * 2 * parameters / (100 * 1e9) + 4 * row_bytes * beta_ms
    hot = shadows(pairs_GE.sum(0).tolist(), token_ms, 2 * parameters * beta_ms, spare)
    wanted = {
        (source, expert, source if expert in hot else rank): n
        for (source, expert, rank), n in at_home(pairs_GE, home).items()
    }
    assert found == wanted


def test_a_rate_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="tflops=0 must be positive"):
        FasterMoEPolicy(tflops=0)
    assert FasterMoEPolicy().rebalance(torch.ones(2, 4).long(), random_home(2, 2, 0), context(Hierarchy((2,)))) is None
