"""What travels for copies of experts in one micro-batch: weights to them, gradients home, on the ways that are priced.

Tensors of experts are one-dimensional, of equal length and on one device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from hiermoe.dispatch.interposer import staged
from hiermoe.dispatch.messages import carry
from hiermoe.policies.ways_of_copies import Ways
from hiermoe.topology.placement import Placement

BUFFER_BYTES = 2**25  # at most so much leaves a rank at once, or arrives
_Hops = tuple[Tensor, Tensor, Tensor]  # experts, their sources and targets


def at_once(hops: _Hops, element_bytes: int) -> int:
    """Elements of each expert that travel at once, so that buffers of the busiest rank stay small."""
    busiest = max(int(torch.bincount(end).max()) if len(end) else 1 for end in hops[1:])
    return max(1, BUFFER_BYTES // (element_bytes * busiest))


def send(
    hops: _Hops, leaving: Mapping[int, Tensor], arriving: Mapping[tuple[int, int], Tensor], group: dist.ProcessGroup
) -> int:
    """Send one tensor a hop. *Collective.*

    Args:
        hops: int64 [X] each: expert, source and target, ranks of the group; the same on every rank.
        leaving: tensors by expert.
        arriving: where they go, by expert and source.
        group: process group.

    Returns:
        Bytes that this rank sent.
    """
    rank = dist.get_rank(group)
    out: dict[int, list[Tensor]] = {}
    into: dict[int, list[Tensor]] = {}
    for expert, source, target in zip(*(part.tolist() for part in hops), strict=True):
        if source == rank:
            out.setdefault(target, []).append(leaving[expert])
        if target == rank:
            into.setdefault(source, []).append(arriving[expert, source])
    mine = [x for of in (out, into) for tensors in of.values() for x in tensors]
    return carry(out, into, group, at_once(hops, mine[0].element_size())) if mine else 0


@dataclass(frozen=True)
class CopiesOfExperts:
    """One rank's share of the transfers, where every expert is at home on one GPU.

    Attributes:
        ways: of all ranks.
        group: expert-parallel group.
    """

    ways: Ways
    group: dist.ProcessGroup

    def spread(self, tensor_of: Mapping[int, Tensor], stage: str) -> int:
        """From home to every copy, in place. *Collective.*

        Args:
            tensor_of: by expert, of those that are at home here or have a copy here.
            stage: what a recorder of transfers calls it.

        Returns:
            Bytes that this rank sent.
        """
        sent_bytes = 0
        with staged(stage):
            for wave in range(1, self.ways.waves + 1):
                expert, source, target = hops = self._hops(wave)
                arriving = {(e, s): tensor_of[e] for e, s, t in _listed(expert, source, target) if t == self._rank}
                sent_bytes += send(hops, tensor_of, arriving, self.group)
        return sent_bytes

    def sum_home(self, tensor_of: Mapping[int, Tensor], stage: str) -> int:
        """From every copy to its home, where they are summed in place; who passes on adds its own. *Collective.*

        Arguments and result as of :meth:`spread`.
        """
        sent_bytes = 0
        with staged(stage):
            for wave in range(self.ways.waves, 0, -1):
                expert, source, target = self._hops(wave)
                back = (expert, target, source)
                arriving = {(e, s): torch.empty_like(tensor_of[e]) for e, s, t in _listed(*back) if t == self._rank}
                sent_bytes += send(back, tensor_of, arriving, self.group)
                for (e, _), part in arriving.items():
                    tensor_of[e].add_(part)
        return sent_bytes

    @cached_property
    def _rank(self) -> int:
        return dist.get_rank(self.group)

    def _hops(self, wave: int) -> _Hops:
        now_X = self.ways.wave_X == wave
        return self.ways.expert_X[now_X], self.ways.source_X[now_X], self.ways.target_X[now_X]


@dataclass(frozen=True)
class ShardedExperts:
    """Likewise, where every GPU keeps a part of every expert and fills all its slots from these.

    Attributes:
        placement: in force.
        group: expert-parallel group.
    """

    placement: Placement
    group: dist.ProcessGroup

    def gather(self, parts: Sequence[Tensor], slots: Sequence[Tensor], stage: str) -> int:
        """Fill this rank's slots. *Collective.*

        Args:
            parts: this rank's part of every expert.
            slots: of this rank: all parts of an expert, one after the other.
            stage: what a recorder of transfers calls it.

        Returns:
            Bytes that this rank sent.
        """
        return self._exchange(
            {rank: [parts[expert] for expert in mine] for rank, mine in enumerate(self._experts)},
            {rank: [slot.view(self._ranks, -1)[rank] for slot in slots] for rank in range(self._ranks)},
            stage,
        )

    def sum_parts(self, slots: Sequence[Tensor], stage: str) -> tuple[list[Tensor], int]:
        """Sum what all ranks' slots have for this rank's parts. *Collective.*

        Args:
            slots: as of :meth:`gather`.
            stage: likewise.

        Returns:
            The sum of every expert's part, zeros of those that no slot has; bytes that this rank sent.
        """
        arrived = {rank: [slots[0].new_empty(len(slots[0]) // self._ranks) for _ in mine]
                   for rank, mine in enumerate(self._experts)}  # fmt: skip
        leaving = {rank: [slot.view(self._ranks, -1)[rank] for slot in slots] for rank in range(self._ranks)}
        sent_bytes = self._exchange(leaving, arrived, stage)
        sums = list(slots[0].new_zeros(self.placement.num_experts, len(slots[0]) // self._ranks))
        for rank, mine in enumerate(self._experts):
            for expert, part in zip(mine, arrived[rank], strict=True):
                sums[expert].add_(part)
        return sums, sent_bytes

    def _exchange(
        self, leaving: Mapping[int, Sequence[Tensor]], arriving: Mapping[int, Sequence[Tensor]], stage: str
    ) -> int:
        tensor = leaving[0][0]
        piece = BUFFER_BYTES // (tensor.element_size() * self.placement.num_slots)
        with staged(stage):
            return carry(leaving, arriving, self.group, max(1, piece))

    @cached_property
    def _ranks(self) -> int:
        return dist.get_world_size(self.group)

    @cached_property
    def _experts(self) -> list[list[int]]:
        """In each rank's slots."""
        return self.placement.expert_at_S.view(self._ranks, -1).tolist()


def _listed(*parts: Tensor) -> list[tuple[int, ...]]:
    return list(zip(*(part.tolist() for part in parts), strict=True))
