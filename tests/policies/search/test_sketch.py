"""A sample of expert sets that ranks can sum."""

from collections import Counter

import pytest
import torch

from hiermoe.policies.search.sketch import Sketch

EXPERTS, TOPK = 64, 4


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """Half of them from 40 frequent sets."""
    generator = torch.Generator().manual_seed(seed)
    ids_NK = torch.rand(count, EXPERTS, generator=generator).argsort(dim=1)[:, :TOPK]
    ids_NK[::2] = ids_NK[torch.randint(40, (len(ids_NK[::2]),), generator=generator)]
    return ids_NK


def truth(ids_NK: torch.Tensor) -> Counter[tuple[int, ...]]:
    return Counter(tuple(sorted(ids)) for ids in ids_NK.tolist())


def read(sketch: Sketch, summed: torch.Tensor) -> dict[tuple[int, ...], int]:
    sets = sketch.read(summed, EXPERTS)
    return dict(zip((tuple(ids) for ids in sets.ids_NK.tolist()), sets.weight_N.tolist(), strict=True))


def test_sum_over_ranks_is_the_sketch_of_all_tokens() -> None:
    ids_NK, sketch = tokens(600), Sketch(512)
    parts = [sketch.measure(ids_NK[rank::8].flip(1)) for rank in range(8)]
    assert torch.equal(torch.stack(parts).sum(0, dtype=torch.int32), sketch.measure(ids_NK))
    assert parts[0].dtype == torch.int32 and parts[0].numel() == 512 * (TOPK + 1) + 1


def test_what_is_read_was_there_so_often() -> None:
    ids_NK, sketch = tokens(1500), Sketch(1024)
    sets, known = read(sketch, sketch.measure(ids_NK)), truth(ids_NK)
    assert all(known[ids] == weight for ids, weight in sets.items())
    # Each of the distinct sets has a cell for itself with probability exp(-load).
    distinct = len(known)
    alone = distinct * (1 - 1 / 1024) ** (distinct - 1)
    assert len(sets) == pytest.approx(alone, rel=0.15)


def test_frequent_sets_are_as_likely_to_be_read_as_rare_ones() -> None:
    found, present = Counter(), Counter()
    for seed in range(30):
        ids_NK = tokens(300, seed)
        sets = read(Sketch(256), Sketch(256).measure(ids_NK))
        for ids, weight in truth(ids_NK).items():
            present[weight > 1] += 1
            found[weight > 1] += ids in sets
    assert found[True] / present[True] == pytest.approx(found[False] / present[False], abs=0.05)


def test_a_full_sketch_takes_fewer_sets_the_next_time_and_they_stand_for_more() -> None:
    ids_NK, sketch = tokens(6000), Sketch(256)
    assert len(read(sketch, sketch.measure(ids_NK))) < 5
    for _ in range(3):
        sketch = sketch.adapted(sketch.measure(ids_NK))
    sets, known = read(sketch, sketch.measure(ids_NK)), truth(ids_NK)
    assert len(sets) > 60  # the most that 256 cells can hold is 94
    assert all(weight == known[ids] << sketch.zero_bits for ids, weight in sets.items())
    assert sketch.read(sketch.measure(ids_NK), EXPERTS).tokens_S.tolist() == [6000]
    few = tokens(50)
    assert sketch.adapted(sketch.measure(few)).zero_bits < sketch.zero_bits


def test_no_tokens_give_no_sets() -> None:
    sketch = Sketch(64)
    summed = sketch.measure(torch.zeros(0, TOPK, dtype=torch.int64))
    assert not read(sketch, summed) and sketch.adapted(summed) == sketch


def test_cells_are_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="cells=1000 is not a power of two"):
        Sketch(1000)
