"""What nccl-tests and rccl-tests printed or wrote of an AlltoAll: who exchanged, how much, how long it took.

Text (versions 2.0 to 2.19) is read by the names in its table's header, so columns of ``-I`` and ``-S`` do no harm, nor
do lines of others between its own. JSON is that of ``-J`` (versions 1 to 3 of its form). Of either one that was cut
off, what is whole is used, and a note says so. Size is what a rank sends, its own share included, as everywhere here.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ALLTOALL = "alltoall_perf"
_RANK = re.compile(r"#\s+Rank\s+(\d+)\s+(?:Group\s+(\d+)\s+)?Pid\s+\d+\s+on\s+(\S+)\s+device", re.IGNORECASE)
_TEST = re.compile(r"#\s*Collective test starting:\s*(\S+)")
_HEADER = re.compile(r"#\s+size\s+count(\s+\S+)*\s+(cpu)?time\s+algbw", re.IGNORECASE)
_PREFIX = re.compile(r"^\[\d+,\d+\]<std\w+>:\s*|^\s*\d+:\s")  # of mpirun --tag-output, of srun --label
_CUT = re.compile(r"\}\s*,?\s*\{|\}\s*\]")


@dataclass(frozen=True)
class NcclTest:
    """One run of ``alltoall_perf``.

    Attributes:
        path: its file.
        group: of every rank, those of equal number exchanging; empty where the file does not list ranks.
        hosts: of every rank, likewise.
        size_bytes: float [n], of one rank, its own share included.
        time_ms: float [n], out of place.
        notes: what is to be known of the file.
    """

    path: Path
    group: tuple[int, ...]
    hosts: tuple[str, ...]
    size_bytes: np.ndarray
    time_ms: np.ndarray
    notes: tuple[str, ...]

    @property
    def members(self) -> tuple[int, ...]:
        """Ranks of the first group, ascending; empty where the file does not list ranks."""
        return tuple(rank for rank, group in enumerate(self.group) if group == self.group[0])


def read_nccl_test(path: Path) -> NcclTest:
    """Read a file of either form.

    Raises:
        ValueError: it is of neither, of another collective, has wrong elements, or no times.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    return _json(path, text) if text.lstrip().startswith("{") else _text(path, text)


def _text(path: Path, text: str) -> NcclTest:
    lines = [_PREFIX.sub("", line) for line in text.splitlines()]
    for line in lines:
        if (said := _TEST.search(line)) and not said[1].endswith(ALLTOALL):
            raise ValueError(f"{path} is of {said[1]}; the constants are those of {ALLTOALL}")
    ranks = [found.groups() for found in map(_RANK.search, lines) if found]
    header = next((line.lstrip("# ").split() for line in lines if _HEADER.search(line)), None)
    if header is None:
        raise ValueError(f"{path} has no table of nccl-tests ('# size count type ... time algbw busbw') and is no JSON")
    time = next(at for at, name in enumerate(header) if name in ("time", "cputime"))
    wrong = next((at for at, name in enumerate(header) if name in ("#wrong", "error")), None)
    if wrong is None:
        raise ValueError(f"{path}: its table has no column #wrong or error")
    rows, notes = [], []
    for number, line in enumerate(lines, start=1):
        cells = line.split()
        if len(cells) < 2 or not (cells[0].isdigit() and cells[1].isdigit()):
            continue
        is_cut = number == len(lines) and not text.endswith("\n") and len(cells) < len(header)
        if len(cells) <= wrong or is_cut:
            notes.append(f"line {number} is cut off and was left out")
            continue
        rows.append((cells[0], cells[time], cells[wrong]))
    return _test(path, [row for row in ranks if row], rows, notes)


def _json(path: Path, text: str) -> NcclTest:
    content, notes = _whole(path, text)
    program = Path(str(_get(content, "args", list, path)[0])).name if content.get("args") else ALLTOALL
    if not program.startswith(ALLTOALL):
        raise ValueError(f"{path} is of {program}; the constants are those of {ALLTOALL}")
    config = _get(content, "config", dict, path)
    per_process = int(config.get("nthreads", 1)) * int(config.get("ngpus", 1))
    devices = _get(config, "devices", list, path)
    each = per_process if all(int(d["rank"]) % per_process == 0 for d in devices) else 1  # of a process one is listed
    ranks = [(int(d["rank"]) + i, d.get("group"), str(d["hostname"])) for d in devices for i in range(each)]
    rows = []
    for result in _get(content, "results", list, path):
        out = result.get("out_of_place")
        if not isinstance(out, dict):
            raise ValueError(f"{path} has no times out of place, and {ALLTOALL} has no others that count")
        rows.append((result["size"], out.get("time", out.get("cpu_time")), out.get("nwrong")))
    return _test(path, ranks, rows, notes)


def _whole(path: Path, text: str) -> tuple[dict[str, Any], list[str]]:
    """The content, of a file that was cut off up to its last whole result."""
    try:
        return json.loads(text), []
    except ValueError:
        pass
    for cut in reversed([found.start() for found in _CUT.finditer(text)]):
        try:
            return json.loads(text[: cut + 1] + "]}"), ["the file is cut off; its last size was left out"]
        except ValueError:
            continue
    raise ValueError(f"{path} is cut off before its first result, or is no JSON of nccl-tests")


def _get(content: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    value = content.get(key)
    if not isinstance(value, kind):
        raise ValueError(f"{path} is JSON, but not of nccl-tests: it has no {key}")
    return value


def _test(path: Path, ranks: Sequence[tuple], rows: Sequence[tuple], notes: Sequence[str]) -> NcclTest:
    sizes, times, wrong = [], [], []
    for size, time, number in rows:
        try:
            found = float(size), float(time) / 1e3
        except (TypeError, ValueError):
            raise ValueError(f"{path}: size {size} has the time {time!r}, which is no number") from None
        if number not in (None, "N/A") and float(number) > 0:
            wrong.append(f"{float(number):g} of size {size}")
        if found[0] > 0 and math.isfinite(found[1]) and found[1] > 0:
            sizes.append(found[0])
            times.append(found[1])
    if wrong:
        raise ValueError(f"{path}: wrong elements arrived ({wrong[0]}): times of a broken exchange count for nothing")
    if not sizes:
        raise ValueError(f"{path} has no time of any size")
    by_rank = {int(rank): (int(group or 0), host) for rank, group, host in ranks}
    if sorted(by_rank) != [*range(len(by_rank))]:
        raise ValueError(f"{path} lists ranks {sorted(by_rank)}, some are missing")
    group, hosts = zip(*(by_rank[rank] for rank in range(len(by_rank))), strict=True) if by_rank else ((), ())
    return NcclTest(path, group, hosts, np.array(sizes), np.array(times), tuple(notes))
