"""Each family of synthetic routing has the statistics that its name promises."""

from itertools import permutations
from math import comb
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from hiermoe.planner.counts import count_routing
from hiermoe.routing.step import RoutingSource
from hiermoe.routing.synthetic import Skewed, Topic, Uniform, generator, uniform_choices, weighted_choices
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.routing.worlds import a_request

LEVELS = Hierarchy((4, 8, 16, 32))
FAMILIES = {
    "uniform": Uniform(a_request()),
    "skewed": Skewed(a_request(), exponent=1.0),
    "topic": Topic(a_request(), num_topics=16, run_length=64, strength=16.0),
}


def load(source: RoutingSource, iterations: int) -> torch.Tensor:
    """Token-expert pairs of every expert over some iterations: int64 [E]."""
    ids = torch.cat([source.step(i).expert_ids_NK.flatten() for i in range(iterations)])
    return torch.bincount(ids, minlength=128)


def together(source: RoutingSource, iterations: int) -> torch.Tensor:
    """Tokens that chose both of two experts: float [E, E]."""
    total = torch.zeros(128, 128)
    for i in range(iterations):
        ids_NK = source.step(i).expert_ids_NK
        chosen_NE = torch.zeros(len(ids_NK), 128).scatter(1, ids_NK, 1.0)
        total += chosen_NE.T @ chosen_NE
    return total


def assert_frequencies(ids_NK: torch.Tensor, probability: dict[tuple[int, ...], float]) -> None:
    """Every ordered choice occurs as often as it should (chi-squared test)."""
    seen = dict.fromkeys(probability, 0)
    for choice, number in zip(*np.unique(ids_NK.numpy(), axis=0, return_counts=True), strict=True):
        seen[tuple(choice.tolist())] = int(number)
    expected = np.array(list(probability.values())) * len(ids_NK)
    assert chisquare(list(seen.values()), expected).pvalue > 1e-3


@given(data=st.data(), num_experts=st.integers(1, 300), tokens=st.integers(0, 40), seed=st.integers(0, 2**40))
@settings(max_examples=100, derandomize=True, deadline=None)
def test_draws_are_distinct_and_in_range(data: st.DataObject, num_experts: int, tokens: int, seed: int) -> None:
    topk = data.draw(st.integers(1, min(num_experts, 12)))
    rng = generator("any", seed)
    for ids_NK in (
        uniform_choices(rng, num_experts, tokens, topk),
        weighted_choices(rng, torch.rand(num_experts) + 0.01, tokens, topk),
    ):
        assert ids_NK.dtype == torch.int64
        assert ids_NK.shape == (tokens, topk)
        assert all(len(set(row)) == topk and set(row) <= set(range(num_experts)) for row in ids_NK.tolist())


def test_every_ordered_uniform_choice_is_equally_likely() -> None:
    choices = list(permutations(range(5), 3))
    ids_NK = uniform_choices(generator("any", 0), num_experts=5, num_tokens=60_000, topk=3)
    assert_frequencies(ids_NK, dict.fromkeys(choices, 1 / len(choices)))


def test_weighted_choices_are_drawn_in_proportion_to_what_is_left() -> None:
    weights = [1.0, 2.0, 3.0, 10.0]
    ids_NK = weighted_choices(generator("any", 0), torch.tensor(weights), num_tokens=60_000, topk=2)
    expected = {
        (a, b): weights[a] / sum(weights) * weights[b] / (sum(weights) - weights[a])
        for a, b in permutations(range(4), 2)
    }
    assert_frequencies(ids_NK, expected)


def test_expert_without_weight_is_never_drawn_even_when_all_arrive_at_once() -> None:
    all_at_once = Mock(spec=np.random.Generator)
    all_at_once.standard_exponential.side_effect = lambda shape, dtype: np.zeros(shape, dtype)
    weights = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    ids_NK = weighted_choices(all_at_once, weights, num_tokens=50, topk=3)
    assert ids_NK.sort(dim=1).values.tolist() == [[1, 3, 4]] * 50


def test_what_is_fixed_over_a_run_is_not_the_randomness_of_a_step() -> None:
    assert generator("any", 0).integers(2**62) != generator("any", 0, 0).integers(2**62)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_rank_holds_all_its_tokens(name: str) -> None:
    step = FAMILIES[name].step(0)
    assert torch.bincount(step.source_N).tolist() == [64] * 32


def test_uniform_loads_all_experts_alike() -> None:
    load_E = load(FAMILIES["uniform"], iterations=20).double()
    assert chisquare(load_E.numpy()).pvalue > 1e-3


def test_uniform_duplicates_by_chance_alone() -> None:
    counts = count_routing(Uniform(a_request(tokens_per_rank=1024)).step(0), Placement.identity(128), LEVELS)
    for level in range(1, 5):
        groups = LEVELS.U[level]
        missed = comb(128 - 128 // groups, 8) / comb(128, 8)
        assert counts.duplication_rate(level) == pytest.approx(1 - groups * (1 - missed) / 8, abs=0.003)


def test_skewed_popularity_falls_in_the_order_that_the_seed_gives() -> None:
    source = Skewed(a_request(), exponent=1.0)
    load_E = load(source, iterations=10)
    assert sorted(source.by_popularity.tolist()) == list(range(128))
    by_rank = load_E[source.by_popularity]
    assert (by_rank[:8].diff() < 0).all()
    octets = by_rank.view(-1, 8).sum(1)
    assert (octets.diff() < 0).all()
    assert not torch.equal(source.by_popularity, Skewed(a_request(seed=1), exponent=1.0).by_popularity)


def test_skewed_first_choice_follows_the_power_law() -> None:
    source = Skewed(a_request(tokens_per_rank=1024), exponent=0.5)
    first_E = torch.bincount(source.step(0).expert_ids_NK[:, 0], minlength=128)[source.by_popularity]
    expected = np.arange(1, 129) ** -0.5
    assert chisquare(first_E.numpy(), expected / expected.sum() * 32 * 1024).pvalue > 1e-3


def test_skewed_without_exponent_is_uniform() -> None:
    assert chisquare(load(Skewed(a_request(), exponent=0.0), iterations=10).numpy()).pvalue > 1e-3


def test_topics_share_out_the_experts() -> None:
    for num_topics in (1, 16, 48, 128):
        topic_E = Topic(a_request(), num_topics, run_length=64, strength=16.0).topic_E
        sizes = torch.bincount(topic_E, minlength=num_topics)
        assert int(sizes.max()) - int(sizes.min()) <= 1
        assert int(sizes.min()) >= 1


def test_experts_of_a_topic_fire_together() -> None:
    source = Topic(a_request(), num_topics=16, run_length=64, strength=16.0)
    pairs_EE = together(source, iterations=20)
    load_E = pairs_EE.diagonal()
    lift_EE = pairs_EE * 20 * 32 * 64 / (load_E[:, None] * load_E[None, :])  # 1 where experts are independent
    others = ~torch.eye(128, dtype=torch.bool)
    alike = (source.topic_E[:, None] == source.topic_E[None, :]) & others
    assert float(lift_EE[alike].mean()) > 2.0
    assert float(lift_EE[~alike & others].mean()) < 1.0
    assert float(load_E.max() / load_E.min()) < 1.5  # co-activation, not load


def test_topic_without_strength_is_uniform() -> None:
    pairs_EE = together(Topic(a_request(), num_topics=16, run_length=64, strength=1.0), iterations=20)
    assert chisquare(pairs_EE.diagonal().numpy()).pvalue > 1e-3


def test_tokens_of_a_run_share_their_topic_and_ranks_start_a_new_one() -> None:
    source = Topic(a_request(tokens_per_rank=10), num_topics=128, run_length=4, strength=16.0)
    topic_GT = source.topic_of_tokens(generator("any", 0)).view(32, 10)
    for run in topic_GT.split(4, dim=1):
        assert (run == run[:, :1]).all()
    assert (topic_GT[:, 0] != topic_GT[:, 4]).float().mean() > 0.8
    assert (topic_GT[1:, 0] != topic_GT[:-1, 9]).float().mean() > 0.8


def test_parameter_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exponent=-0\.5 must be at least 0"):
        Skewed(a_request(), exponent=-0.5)
    with pytest.raises(ValueError, match=r"num_topics=129 is outside 1\.\.num_experts=128"):
        Topic(a_request(), num_topics=129, run_length=1, strength=1.0)
    with pytest.raises(ValueError, match="run_length=0 must be at least 1"):
        Topic(a_request(), num_topics=1, run_length=0, strength=1.0)
    with pytest.raises(ValueError, match=r"strength=0\.5 must be at least 1"):
        Topic(a_request(), num_topics=1, run_length=1, strength=0.5)
