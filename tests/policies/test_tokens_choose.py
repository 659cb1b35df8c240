"""Copies of any policy, of which tokens choose."""

from dataclasses import replace

import pytest
import torch

from baselines.eplb import EPLBPolicy
from baselines.ultraep import UltraEPPolicy
from hiermoe.policies.system import SystemConfig
from hiermoe.policies.tokens_choose import TokensChooseCopies
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.baselines.counted import context, random_home, random_pairs
from tests.planner.cases import random_step

HIERARCHY = Hierarchy((2, 4))


def test_plans_and_state_are_the_policys_own() -> None:
    step = random_step([9] * 4, 8, 3, torch.Generator().manual_seed(0), 2.0)
    plain, wrapped = EPLBPolicy(1, interval=2), TokensChooseCopies(EPLBPolicy(1, interval=2))
    assert wrapped.copies == plain.copies
    placement = gathered = Placement.identity(8)
    for iteration in range(4):
        decided = []
        for policy, at in ((plain, placement), (wrapped, gathered)):
            summed = policy.measure(step.expert_ids_NK, step.source_N, at, HIERARCHY, iteration)
            decided.append(policy.decide(summed, at, context(HIERARCHY, iteration)))
        assert wrapped.state_dict().keys() == plain.state_dict().keys() == ({"sum_E"} if iteration % 2 == 0 else set())
        again = TokensChooseCopies(EPLBPolicy(1, interval=2))
        again.load_state_dict(wrapped.state_dict())
        wrapped = again
        if iteration % 2 == 0:
            assert decided == [None, None]
            continue
        placement, gathered = (update.placement for update in decided if update is not None)
        assert gathered.gathered_in == context(HIERARCHY).cluster.hierarchy
        assert replace(gathered, gathered_in=None).key == placement.key


def test_copies_of_a_micro_batch_too() -> None:
    home, pairs_GE = random_home(4, 2, 1), random_pairs(4, 8, 5000, 3)
    plain = UltraEPPolicy(1).rebalance(pairs_GE, home, context(HIERARCHY))
    wrapped = TokensChooseCopies(UltraEPPolicy(1)).rebalance(pairs_GE, home, context(HIERARCHY))
    assert plain is not None and wrapped is not None and wrapped.gathered_in is not None
    assert replace(wrapped, gathered_in=None).key == plain.key


def test_a_policy_without_copies_has_nothing_to_choose() -> None:
    assert isinstance(SystemConfig.named("hd_moe_eplb_by_token").build_policy(), TokensChooseCopies)
    bare = SystemConfig.named("hd_moe").model_copy(update={"copy_choice": "token"})
    with pytest.raises(ValueError, match="copy_choice=token, but StaticPolicy makes no copies of experts"):
        bare.build_policy()
