"""Nothing that a policy measures is lost: it is asked to decide after every iteration in which it measures."""

import pytest
import torch

from hiermoe.policies.protocol import StaticPolicy
from hiermoe.policies.system import SystemConfig
from hiermoe.records.groups import files_of
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.planner.cases import random_step

HIERARCHY, EXPERTS = Hierarchy((2, 8)), 16


@pytest.mark.parametrize("name", sorted(files_of("system")))
def test_a_policy_decides_after_what_it_measures(name: str) -> None:
    policy = SystemConfig.named(name).build_policy()
    step = random_step([4] * HIERARCHY.num_ranks, EXPERTS, 2, torch.Generator().manual_seed(0))
    measured = 0
    for iteration in range(40):
        found = policy.measure(step.expert_ids_NK, step.source_N, Placement.identity(EXPERTS), HIERARCHY, iteration)
        assert found is None or policy.decides_after(iteration)
        measured += found is not None
    assert measured or isinstance(policy, StaticPolicy) or policy.copies is not None
