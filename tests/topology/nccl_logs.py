"""Logs as nccl-tests writes them, of AlltoAlls whose times are known."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import Peers

SIZES = tuple(2**power for power in range(10, 31))  # 1 KiB to 1 GiB, a rank's
Time = Callable[[int], float]  # ms of a size


def groups_of(peers: Peers, hierarchy: Hierarchy) -> list[int]:
    """Group of every rank, by NCCL_TESTS_SPLIT's colour of it: any number that those who exchange share."""
    return [peers.members(rank, hierarchy)[0] for rank in range(hierarchy.num_ranks)]


def text_log(
    path: Path,
    time: Time,
    groups: Sequence[int],
    per_host: int = 8,
    *,
    wrong: int = 0,
    sizes: Sequence[int] = SIZES,
    form: str = "2.13",
    between: str = "",
) -> Path:
    """A log of ``alltoall_perf``: forms 2.0 (error, no groups), 2.13, 2.19 (version, test, per-iteration columns)."""
    size = groups.count(groups[0])
    lines = []
    if form == "2.19":
        lines += ["# nccl-tests version 2.19.6 nccl-headers=22907 nccl-library=22907"]
        lines += ["# Collective test starting: alltoall_perf"]
    lines += ["# nThread 1 nGpus 1 minBytes 1024 maxBytes 1073741824 step: 2(factor) warmup iters: 5 iters: 20", "#"]
    lines += ["# Using devices"]
    for rank, group in enumerate(groups):
        of = "" if form == "2.0" else f"Group {group:2d} "
        device = f"host{rank // per_host} device {rank % per_host:2d} [0x{rank:02x}] NVIDIA H100"
        lines.append(f"#  Rank {rank:2d} {of}Pid {1000 + rank:6d} on {device}")
    last = "error" if form == "2.0" else "#wrong"
    more = "   i_min    i_max    i_p99    i_cv%" if form == "2.19" else ""
    half = f"     time   algbw   busbw {last}{more}"
    lines += ["#", f"#       size         count      type   redop    root{half}{half}"]
    lines += ["#        (B)    (elements)                               (us)  (GB/s)  (GB/s)"]
    for number in sizes:
        if between:
            lines.append(between)
        us = time(number) * 1e3
        rate = number / us / 1e3
        first = f"{us:.2f}"[:7] if us < 1e7 else f"{us:.1e}"
        bad = "0e+00" if form == "2.0" else str(wrong)
        extra = f"  {us:.2f}  {us:.2f}  {us:.2f}  1.00" if form == "2.19" else ""
        out = f"  {first}  {rate:.2f}  {rate * (size - 1) / size:.2f}  {bad}{extra}"
        inside = f"  {us * 1.5:.2f}  {rate:.2f}  {rate:.2f}  {'0e+00' if form == '2.0' else 'N/A'}{extra}"
        lines.append(f"{number:12d}  {number // size // 4:12d}     float    none      -1{out}{inside}")
    lines += ["# Out of bounds values : 0 OK", "# Avg bus bandwidth    : 100.0", "#", ""]
    path.write_text("\n".join(lines))
    return path


def json_log(
    path: Path, time: Time, groups: Sequence[int], per_host: int = 8, *, wrong: int = 0, per_process: int = 1
) -> Path:
    """The file of ``-J``; of a process with several GPUs, it lists the first one."""
    listed = range(0, len(groups), per_process)
    content = {
        "version": 3,
        "args": ["./build/alltoall_perf", "-b", "1K"],
        "env": ["NCCL_TESTS_SPLIT=DIV 8"],
        "nccl_version": 22907,
        "config": {
            "nthreads": 1,
            "ngpus": per_process,
            "devices": [
                {"rank": rank, "group": groups[rank], "hostname": f"host{rank // per_host}", "device": rank % per_host}
                for rank in listed
            ],
        },
        "results": [
            {
                "size": number,
                "count": number // 4,
                "type": "float",
                "out_of_place": {"time": time(number) * 1e3, "alg_bw": 1.0, "bus_bw": 1.0, "nwrong": float(wrong)},
                "in_place": {"time": time(number) * 2e3, "alg_bw": 1.0, "bus_bw": 1.0, "nwrong": None},
            }
            for number in SIZES
        ],
    }
    path.write_text(json.dumps(content))
    return path
