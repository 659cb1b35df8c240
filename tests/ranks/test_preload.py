"""Ranks import nothing when they are told what to do: their fork server has done it, once for all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hiermoe.records.project import CODE

# As a command does: configurations first, ranks after. Prints what a rank has imported that others have not.
COMMAND = """
import sys
from datetime import timedelta


def imported(rank, config):
    return set(sys.modules)


if __name__ == "__main__":
    import loaded
    from hiermoe.ranks.launch import run_ranks
    from hiermoe.runs.compose import compose
    from hiermoe.runs.run_config import RunConfig
    if sys.argv[1] == "run":
        config = compose("config", ["measure=replay", "ranks=local", "world_size=2"], RunConfig)
    else:
        from hiermoe.runs.training import TrainRunConfig
        config = compose("train", [], TrainRunConfig)
    nothing, told = (run_ranks(loaded.imported, 2, (x,), timedelta(minutes=2))[0] for x in (None, config))
    print(sorted(told - nothing))
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "train"])
def test_a_rank_that_is_told_a_configuration_imports_nothing(command: str, tmp_path: Path) -> None:
    (tmp_path / "loaded.py").write_text(COMMAND)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "loaded.py"), command],
        env=os.environ | {"PYTHONPATH": f"{CODE}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.strip() == "[]"
