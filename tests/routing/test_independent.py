"""Experts drawn independently with equal loads: nothing but the tokens' company changes."""

import numpy as np
import pytest

from hiermoe.routing.independent import drawn_independently
from hiermoe.routing.trace import has_twice


def companions(num_experts: int, tokens: int, topk: int) -> np.ndarray:
    """Experts that always come together: the first K, or the next K, and so on, the first ones more often."""
    rng = np.random.default_rng(1)
    groups = num_experts // topk
    chances = np.arange(groups, 0, -1) / np.arange(groups, 0, -1).sum()
    return (rng.choice(groups, tokens, p=chances)[:, None] * topk + np.arange(topk)).astype(np.uint8)


@pytest.mark.parametrize(("num_experts", "tokens", "topk"), [(128, 8192, 8), (16, 4000, 4), (8, 64, 1)])
def test_loads_are_kept_and_company_is_not(num_experts: int, tokens: int, topk: int) -> None:
    ids_NK = companions(num_experts, tokens, topk)
    before = ids_NK.copy()
    drawn = drawn_independently(ids_NK, np.random.default_rng(0))
    assert drawn.dtype == ids_NK.dtype and (ids_NK == before).all()
    assert (np.bincount(drawn.ravel()) == np.bincount(ids_NK.ravel())).all()
    assert not has_twice(drawn).any()
    if topk > 1:
        together = (drawn // topk == drawn[:, :1] // topk).all(axis=1)
        assert together.mean() < 0.05


def test_an_expert_of_nearly_every_token_is_dealt_out_too() -> None:
    rng = np.random.default_rng(2)
    others = np.argsort(rng.random((2000, 15)), axis=1)[:, :3] + 1
    ids_NK = np.concatenate([np.where(rng.random(2000) < 0.9, 0, 16)[:, None], others], axis=1)
    drawn = drawn_independently(ids_NK, rng)
    assert (np.bincount(drawn.ravel()) == np.bincount(ids_NK.ravel())).all() and not has_twice(drawn).any()


def test_loads_that_leave_no_choice_are_refused() -> None:
    with pytest.raises(ValueError, match="leave hardly a choice"):
        drawn_independently(np.array([[0, 0], [0, 1]]), np.random.default_rng(0))
