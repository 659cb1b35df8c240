"""HierMoE (net): how long gains last is learnt, and decides what pays."""

import pytest
import torch

from hiermoe.model import RowBytes
from hiermoe.planner.scheme import hierarchical
from hiermoe.policies.hierd_es import HierDESPolicy
from hiermoe.policies.net import PRIOR, NetPolicy
from hiermoe.policies.protocol import StepContext
from hiermoe.routing.step import RoutingStep
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement
from tests.planner.cases import random_step

EXPERTS, ROW_BYTES = 64, 4096


def routing(seed: int) -> RoutingStep:
    """Skewed routing; another seed has other experts that are popular."""
    return random_step([32] * 32, EXPERTS, 4, torch.Generator().manual_seed(seed), skew=1.0)


def train(policy: HierDESPolicy, seeds: list[int], cluster: Cluster, expert_parameters: int = 1) -> list[bool]:
    """Whether the policy moved experts after each step."""
    placement, moved = Placement.identity(EXPERTS), []
    scheme = hierarchical(3, True, cluster.hierarchy)
    for iteration, seed in enumerate(seeds):
        step = routing(seed)
        measured = policy.measure(step.expert_ids_NK, step.source_N, placement, cluster.hierarchy, iteration)
        update = policy.decide(
            measured, placement, StepContext(iteration, cluster, scheme, RowBytes.alike(ROW_BYTES), expert_parameters)
        )
        moved.append(update is not None)
        placement = placement if update is None else update.placement
    return moved


def net(**arguments: float) -> NetPolicy:
    return NetPolicy(**{"interval": 1, "first": 10, "longest": 100, **arguments})  # type: ignore[arg-type]


def test_gains_that_stay_are_expected_for_long_and_gains_that_go_are_not(a6000: Cluster) -> None:
    steady, changing = net(), net()
    train(steady, [1] * 12, a6000)
    train(changing, list(range(12)), a6000)
    assert steady.expected_iterations() > 3 * 10
    assert changing.expected_iterations() < 10 / 3


def test_a_first_decision_is_that_of_a_gate_with_the_same_horizon(a6000: Cluster) -> None:
    for parameters in (10**3, 10**6, 10**8):
        gated = HierDESPolicy(gated=True, horizon=10)
        assert train(net(), [1], a6000, parameters) == train(gated, [1], a6000, parameters)


def test_what_is_hidden_costs_nothing(a6000: Cluster) -> None:
    heavy = 10**8
    assert train(net(), [1], a6000, heavy) == [False]
    assert train(net(exposed=0.0), [1], a6000, heavy) == [True]


def test_what_was_seen_outweighs_the_first_guess_as_more_is_seen() -> None:
    policy = net()
    assert policy.expected_iterations() == 10
    for _ in range(2):
        policy._carried.add(2.0, 1.0)
    assert policy._carried.value == pytest.approx((PRIOR * 1 + 2 * 0.5) / (PRIOR + 2))
    for _ in range(1000):
        policy._carried.add(2.0, 1.0)
    assert policy._carried.value == pytest.approx(0.5, abs=2e-3)


def test_a_policy_that_goes_on_from_a_checkpoint_decides_as_one_that_ran_through(a6000: Cluster) -> None:
    through, before, after = net(), net(), net()
    train(through, [1, 2, 3, 1, 2, 3], a6000)
    train(before, [1, 2, 3, 1, 2, 3], a6000)
    after.load_state_dict(before.state_dict())
    assert after.expected_iterations() == through.expected_iterations()
    assert {name: x.tolist() for name, x in after.state_dict().items()} == {
        name: x.tolist() for name, x in through.state_dict().items()
    }
    with pytest.raises(ValueError, match="NetPolicy remembers"):
        after.load_state_dict({"sum_E": torch.zeros(1)})


@pytest.mark.parametrize("wrong", [{"exposed": 1.5}, {"first": 101}, {"interval": 20}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exposed must be from 0 to 1"):
        net(**wrong)
