"""Levels of groups, each splitting the one before."""

from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiermoe.topology.hierarchy import Hierarchy


@given(factors=st.lists(st.integers(2, 4), min_size=1, max_size=5), single=st.booleans())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_groups_of_every_level_share_out_the_ranks(factors: list[int], single: bool) -> None:
    splits = [1, *factors] if single else factors
    groups = tuple(prod(splits[: i + 1]) for i in range(len(splits)))
    hierarchy = Hierarchy(groups)
    assert hierarchy.depth == len(groups)
    assert hierarchy.num_ranks == prod(factors)
    assert (1, *groups) == hierarchy.U
    for level in range(hierarchy.depth + 1):
        assert hierarchy.lanes(level) * hierarchy.U[level] == hierarchy.num_ranks
    assert hierarchy.lanes(hierarchy.depth) == 1


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((), r"groups=\[\]: a hierarchy has at least one level"),
        ((0, 4), r"groups=\[0, 4\]: a hierarchy has at least one level of at least one group"),
        ((4, 6), r"groups=\[4, 6\]: 6 groups do not split 4 groups evenly"),
        ((4, 4), r"groups=\[4, 4\]: 4 groups do not split 4 groups evenly"),
        ((2, 8, 4), r"groups=\[2, 8, 4\]: 4 groups do not split 8 groups evenly"),
    ],
)
def test_levels_that_do_not_split_are_refused(groups: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hierarchy(groups)


def test_every_level_has_a_name_or_none_has() -> None:
    assert Hierarchy((2, 4), ("node", "gpu")).names == ("node", "gpu")
    with pytest.raises(ValueError, match="1 level names for 2 levels"):
        Hierarchy((2, 4), ("node",))
