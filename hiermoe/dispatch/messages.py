"""Pieces of memory from rank to rank, one message for every two of them: what moves experts, and weights of copies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

Piece = tuple[int, Tensor]


@dataclass(frozen=True)
class Message:
    """Pieces on their way to and from all other ranks.

    Attributes:
        works: to wait for.
        writes: order of writing, where it goes, and the buffer that it arrives in.
        outgoing: what is being sent, kept until it is.
        sent_bytes: over the wire, by this rank.
    """

    works: list[Any]
    writes: list[tuple[int, Tensor, Tensor]]
    outgoing: list[Tensor]
    sent_bytes: int

    @classmethod
    def begin(
        cls,
        leaving: Mapping[int, list[Tensor]],
        arriving: Mapping[int, list[Piece]],
        group: dist.ProcessGroup | None,
    ) -> Self:
        """Send pieces; nothing is overwritten yet. *Collective: those who send to each other must call it.*

        Args:
            leaving: by receiver, a global rank: one-dimensional uint8 tensors, in the order in which they travel.
            arriving: by sender: where they go, in the same order, each with its turn to be written.
            group: process group of all of them; None for the world.
        """
        rank = dist.get_rank()
        outgoing = {
            peer: parts[0] if len(parts) == 1 and peer != rank else torch.cat(parts) for peer, parts in leaving.items()
        }
        incoming = {
            peer: outgoing[rank] if peer == rank else parts[0][1].new_empty(sum(len(part) for _, part in parts))
            for peer, parts in arriving.items()
        }
        operations = [
            dist.P2POp(operation, buffer, peer, group)
            for operation, buffers in ((dist.isend, outgoing), (dist.irecv, incoming))
            for peer, buffer in sorted(buffers.items())
            if peer != rank
        ]
        writes = [
            (number, part, received)
            for peer, parts in arriving.items()
            for (number, part), received in zip(parts, incoming[peer].split([len(x) for _, x in parts]), strict=True)
        ]
        return cls(
            works=dist.batch_isend_irecv(operations) if operations else [],
            writes=writes,
            outgoing=list(outgoing.values()),
            sent_bytes=sum(len(buffer) for peer, buffer in outgoing.items() if peer != rank),
        )

    def wait(self) -> None:
        """Until everything has left and arrived."""
        for work in self.works:
            work.wait()

    def finish(self) -> int:
        """Wait, and write what arrived to its place.

        Returns:
            Bytes that this rank sent over the wire.
        """
        self.wait()
        for _, part, received in sorted(self.writes, key=lambda write: write[0]):
            part.copy_(received)
        return self.sent_bytes


def carry(
    leaving: Mapping[int, Sequence[Tensor]],
    arriving: Mapping[int, Sequence[Tensor]],
    group: dist.ProcessGroup,
    at_once: int,
) -> int:
    """Bring contiguous tensors of one size each to another rank, the same elements of all of them at once.

    *Collective: every rank of the group that sends or receives must call it.*

    Args:
        leaving: by receiver, a rank of the group.
        arriving: by sender: where they go, in the sender's order.
        group: process group.
        at_once: elements of a tensor that a message has, the same on all ranks.

    Returns:
        Bytes that this rank sent over the wire.
    """
    flat = [
        {dist.get_global_rank(group, p): [x.view(-1) for x in xs] for p, xs in of.items()} for of in (leaving, arriving)
    ]
    tensors = [tensor for of in flat for mine in of.values() for tensor in mine]
    sent_bytes = 0
    for start in range(0, len(tensors[0]) if tensors else 0, at_once):
        out, into = (
            {peer: [x[start : start + at_once].view(torch.uint8) for x in mine] for peer, mine in of.items()}
            for of in flat
        )
        numbered = {peer: [(0, part) for part in parts] for peer, parts in into.items()}
        sent_bytes += Message.begin(out, numbered, group).finish()
    return sent_bytes
