"""The tree of groups that an interconnect forms."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise


@dataclass(frozen=True)
class Hierarchy:
    """Number of groups U[0] = 1, U[1], ..., U[D] = G that each level splits all GPUs into (paper, Sec. II and Table I).

    Groups are contiguous: GPU g belongs to group ``g // lanes(i)`` of level i, and has lane ``g % lanes(i)`` in it.

    Attributes:
        groups: U[1..D]; each must divide the next.
        names: name of a group of each level, outermost first.
    """

    groups: tuple[int, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.groups or self.groups[0] < 1:
            raise ValueError(f"groups={list(self.groups)}: a hierarchy has at least one level of at least one group")
        for coarse, fine in pairwise(self.groups):
            if fine % coarse or fine <= coarse:
                raise ValueError(
                    f"groups={list(self.groups)}: {fine} groups do not split {coarse} groups evenly; "
                    "every level must be a proper multiple of the one before"
                )
        if self.names and len(self.names) != len(self.groups):
            raise ValueError(f"{len(self.names)} level names for {len(self.groups)} levels")

    @property
    def depth(self) -> int:
        """D, the number of levels."""
        return len(self.groups)

    @property
    def num_ranks(self) -> int:
        """G, the number of GPUs."""
        return self.groups[-1]

    @cached_property
    def U(self) -> tuple[int, ...]:
        """U[0..D]."""
        return (1, *self.groups)

    def lanes(self, level: int) -> int:
        """G / U[level], GPUs of one group of the level."""
        return self.num_ranks // self.U[level]
