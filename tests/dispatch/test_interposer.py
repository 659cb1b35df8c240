"""Whatever is sent through torch.distributed is counted, whoever sends it, and afterwards nothing is left of it."""

import inspect
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hiermoe.dispatch.interposer import Interposer, Transfer, busy_ms, staged
from hiermoe.ranks.launch import run_ranks
from tests.dispatch.worlds import DEADLINE, TIMEOUT

KEPT: Callable[..., Any] = dist.all_to_all_single  # as a library keeps it that imports the function by name
RANKS = 3


def everything_once(rank: int, pair: dist.ProcessGroup) -> None:
    """One call of each kind, of sizes that tell them apart."""
    rows = torch.arange(6.0 * 2).view(6, 2)
    received = torch.empty(3 * (rank + 1), 2)
    KEPT(received, rows, [rank + 1] * RANKS, [1, 2, 3])  # the receiver's number of rows
    assert received.unique(dim=0).shape[0] == rank + 1
    even = torch.empty(6, dtype=torch.int64)
    dist.all_to_all_single(even, torch.arange(6))
    gathered = torch.empty(RANKS * 4, dtype=torch.int32)
    dist.all_gather_into_tensor(gathered, torch.full((4,), rank, dtype=torch.int32))
    assert gathered.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    total = torch.ones(5)
    dist.all_reduce(total)
    assert total.tolist() == [3.0] * 5
    dist.all_gather([torch.empty(7) for _ in range(RANKS)], torch.ones(7))
    dist.broadcast(torch.ones(9), src=0)
    if rank == 2:
        dist.send(torch.ones(11), dst=0)
    if rank == 0:
        dist.recv(torch.ones(11), src=2)
    if rank != 1:
        dist.all_reduce(torch.ones(13, 1), group=pair)


def observe(rank: int) -> dict[str, Any]:
    pair: Any = dist.new_group([0, 2])  # rank 1, which is no member, gets a number
    methods = {name: inspect.getattr_static(dist.ProcessGroup, name) for name in dir(dist.ProcessGroup)}
    seen: dict[str, Any] = {}
    with Interposer() as interposer:
        seen["active"] = Interposer.active is interposer
        interposer.phase = "all"
        everything_once(rank, pair)
        seen["transfers"] = interposer.drain()
        seen["after_drain"] = interposer.drain()
        interposer.phase = ""
        with staged("1:outer"):
            dist.all_reduce(torch.ones(1))
            with staged("2:inner"):
                dist.all_reduce(torch.ones(1))
            dist.all_reduce(torch.ones(1))
        dist.all_reduce(torch.ones(1))
        seen["stages"] = [(transfer.phase, transfer.stage) for transfer in interposer.drain()]
        into = torch.empty(6, dtype=torch.int64)
        work: Any = dist.all_to_all_single(into, torch.arange(6), async_op=True)
        time.sleep(0.05)
        work.wait()
        seen["exchanged"] = interposer.drain()
        assert work.is_completed() and into.tolist() == [2 * rank, 2 * rank + 1] * RANKS
        work = dist.all_reduce(x := torch.ones(4), async_op=True)
        assert work is not None
        work.wait()
        seen["asynchronous"] = [t.operation for t in interposer.drain()], x.tolist()
        try:
            Interposer().__enter__()
        except RuntimeError as error:
            seen["nested"] = str(error)
        dist.all_reduce(torch.ones(1))
        seen["still_counting"] = len(interposer.drain())
    seen["restored"] = {
        name: inspect.getattr_static(dist.ProcessGroup, name) is method for name, method in methods.items()
    }
    everything_once(rank, pair)  # works, and is not counted
    seen["outside"] = interposer.drain()
    with staged("no interposer"):
        seen["none_active"] = Interposer.active is None
    try:
        with Interposer():
            raise KeyError
    except KeyError:
        seen["restored_after_error"] = all(
            inspect.getattr_static(dist.ProcessGroup, name) is method for name, method in methods.items()
        )
    with Interposer() as again:
        dist.all_reduce(torch.ones(1))
        seen["again"] = len(again.drain())
    return seen


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    return run_ranks(observe, RANKS, (), TIMEOUT, deadline=DEADLINE)


def the(transfers: list[Transfer], operation: str, position: int = 0) -> Transfer:
    return [transfer for transfer in transfers if transfer.operation == operation][position]


def test_every_call_is_recorded_once_and_in_order(seen: list[dict[str, Any]]) -> None:
    everywhere = ["all_to_all", "all_to_all", "all_gather", "all_reduce", "all_gather", "broadcast"]
    for rank, extra in enumerate((["receive", "all_reduce"], [], ["send", "all_reduce"])):
        assert [transfer.operation for transfer in seen[rank]["transfers"]] == everywhere + extra
        assert seen[rank]["after_drain"] == []
        assert seen[rank]["active"]
        assert all(transfer.phase == "all" for transfer in seen[rank]["transfers"])
        assert all(transfer.wire_ms > 0 for transfer in seen[rank]["transfers"])


def test_a_reference_kept_from_before_is_counted_with_its_splits(seen: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        transfer = the(seen[rank]["transfers"], "all_to_all")
        assert transfer.sent_bytes == (8, 16, 24)
        assert transfer.received_bytes == (8 * (rank + 1),) * RANKS
        assert transfer.members == (0, 1, 2)


def test_only_floating_rows_are_payload(seen: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        transfers = seen[rank]["transfers"]
        assert the(transfers, "all_to_all", 0).kind == "payload"
        assert the(transfers, "all_to_all", 1).kind == "metadata"  # integers
        assert the(transfers, "all_reduce", 0).kind == "metadata"  # one axis


def test_bytes_without_splits(seen: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        transfers = seen[rank]["transfers"]
        assert the(transfers, "all_to_all", 1).sent_bytes == (16, 16, 16)
        assert the(transfers, "all_gather", 0).sent_bytes == the(transfers, "all_gather", 0).received_bytes == (16,) * 3
        assert the(transfers, "all_reduce", 0).sent_bytes == (20, 20, 20)
        assert the(transfers, "broadcast").sent_bytes == (36, 36, 36)


def test_messages_between_two_ranks_name_the_peer(seen: list[dict[str, Any]]) -> None:
    assert the(seen[2]["transfers"], "send").sent_bytes == (44, 0, 0)
    assert the(seen[2]["transfers"], "send").received_bytes == (0, 0, 0)
    assert the(seen[0]["transfers"], "receive").received_bytes == (0, 0, 44)


def test_a_smaller_group_is_named_by_its_members(seen: list[dict[str, Any]]) -> None:
    for rank in (0, 2):
        transfer = the(seen[rank]["transfers"], "all_reduce", 1)
        assert (transfer.members, transfer.sent_bytes, transfer.kind) == ((0, 2), (52, 52), "payload")


def test_stages_name_what_is_sent_inside_them(seen: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        assert seen[rank]["stages"] == [("", "1:outer"), ("", "2:inner"), ("", "1:outer"), ("", "")]


def test_an_asynchronous_call_still_gives_its_result(seen: list[dict[str, Any]]) -> None:
    assert all(result["asynchronous"] == (["all_reduce"], [3.0] * 4) for result in seen)


def test_a_second_interposer_is_refused_and_the_first_goes_on(seen: list[dict[str, Any]]) -> None:
    for result in seen:
        assert "active already" in result["nested"]
        assert result["still_counting"] == 1


def test_leaving_restores_the_methods_and_counts_no_more(seen: list[dict[str, Any]]) -> None:
    for result in seen:
        assert [name for name, same in result["restored"].items() if not same] == []
        assert result["outside"] == []
        assert result["none_active"]
        assert result["restored_after_error"]
        assert result["again"] == 1


def test_an_asynchronous_exchange_lasts_until_it_has_been_waited_for(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        (transfer,) = rank["exchanged"]
        assert transfer.operation == "all_to_all" and transfer.wire_ms >= 50


@pytest.mark.parametrize(
    ("spans", "busy"),
    [
        ([], 0.0),
        ([(1.0, 3.0), (5.0, 6.0)], 3000.0),
        ([(1.0, 3.0), (2.0, 4.0)], 3000.0),
        ([(2.0, 4.0), (1.0, 9.0), (3.0, 5.0)], 8000.0),
    ],
)
def test_what_is_on_its_way_together_counts_once(spans: list[tuple[float, float]], busy: float) -> None:
    transfers = [Transfer("all_to_all", (0,), "payload", (1,), (1,), *span, "", "") for span in spans]
    assert busy_ms(transfers) == pytest.approx(busy)
