"""Expert sets of tokens, by step."""

from collections import Counter

import pytest
import torch

from hiermoe.planner.token_sets import TokenSets

IDS = torch.randint(4, (200,), generator=torch.Generator().manual_seed(0))[:, None] + torch.tensor([4, 0, 8])
STEP = torch.arange(200) // 70 * 5  # steps 0, 5, 10


def contents(sets: TokenSets) -> Counter[tuple[int, ...]]:
    """How many tokens each step and set stand for."""
    rows = zip(sets.step_N.tolist(), sets.ids_NK.tolist(), sets.weight_N.tolist(), strict=True)
    counted: Counter[tuple[int, ...]] = Counter()
    for step, ids, weight in rows:
        counted[step, *ids] += weight
    return counted


def test_merging_keeps_every_set_of_every_step_and_sorts_its_experts() -> None:
    sets = TokenSets.of(IDS, 12, STEP)
    merged = sets.merged()
    expected = Counter((step // 5, *sorted(ids)) for step, ids in zip(STEP.tolist(), IDS.tolist(), strict=True))
    assert contents(sets) == contents(merged) == expected
    assert len(merged.step_N) == len(expected) < 200
    assert merged.tokens_S.tolist() == [70, 70, 60] and merged.tokens == 200


def test_steps_part_and_join_again() -> None:
    sets = TokenSets.of(IDS, 12, STEP).merged()
    parts = sets.by_step()
    assert [part.num_steps for part in parts] == [1, 1, 1]
    assert contents(TokenSets.joined(parts)) == contents(sets)


def test_a_sample_is_of_all_steps_and_remembers_how_many_tokens_each_had() -> None:
    sample = TokenSets.of(IDS, 12, STEP).sample(60, torch.Generator().manual_seed(1))
    assert sample.tokens == 60 and sample.tokens_S.tolist() == [70, 70, 60]
    assert set(sample.step_N.tolist()) == {0, 1, 2}
    assert not contents(sample) - contents(TokenSets.of(IDS, 12, STEP))


def test_coactivation_counts_tokens_that_select_both() -> None:
    sets = TokenSets.of(IDS, 12, STEP).merged()
    together = sets.coactivation()
    for a in range(12):
        for b in range(12):
            expected = sum(a in ids and b in ids for ids in IDS.tolist()) if a != b else 0
            assert together[a, b] == expected


@pytest.mark.parametrize(
    ("ids", "step", "message"),
    [
        (torch.zeros(0, 2, dtype=torch.int64), None, "needs tokens"),
        (torch.tensor([[0, 12]]), None, "num_experts is 12"),
        (torch.tensor([[0, 1]]), torch.tensor([0, 0]), "step_N has shape"),
    ],
)
def test_what_is_no_routing_is_refused(ids: torch.Tensor, step: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenSets.of(ids, 12, step)
