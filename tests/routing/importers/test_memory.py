"""Imports hold their ids once, and little more: a process of its own says how much memory it took at most."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hiermoe.records.project import CODE

TOKENS, LAYERS, TOPK, EXPERTS = 120_000, 60, 8, 384  # Kimi-K2's layers and experts
# The import, then the most memory that the process held, in kibibytes; without arguments: what it takes to get there.
# getrusage would count what the test's own process held before it became this one.
IMPORT = """
import re
import sys
from pathlib import Path
from hiermoe.routing.importers import IMPORTERS
from hiermoe.routing.importers.as_trace import to_trace
from hiermoe.routing.importers.recording import Source
if sys.argv[1:]:
    source = Source(Path(sys.argv[1]))
    to_trace(IMPORTERS["npy"].read(source), source, "npy", "m", int(sys.argv[3]), "c").save(sys.argv[2])
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def most_bytes(*arguments: str) -> int:
    """Held at any time."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, *arguments],
        cwd=CODE,
        env=os.environ | {"PYTHONPATH": str(CODE)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return int(done.stdout) * 1024


@pytest.mark.slow
def test_import_holds_its_ids_once_and_rows_without_routing_cost_no_second_copy(tmp_path: Path) -> None:
    first_NL = np.random.default_rng(0).integers(0, EXPERTS, (TOKENS, LAYERS, 1))
    ids_NLK = ((first_NL + np.arange(TOPK) * 47) % EXPERTS).astype(np.int32)
    ids_NLK[::1000] = -1
    np.save(tmp_path / "a.npy", ids_NLK)
    ids_bytes = TOKENS * LAYERS * TOPK * 2
    more_bytes = most_bytes(str(tmp_path / "a.npy"), str(tmp_path / "a.trace"), str(EXPERTS)) - most_bytes()
    assert ids_bytes < more_bytes < 1.7 * ids_bytes
