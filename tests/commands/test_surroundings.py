"""Commands work wherever people are: terminals of few letters, odd temporary folders, no home, any folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hiermoe.records.project import CODE

SMALL = ("system=hiermoe", "iterations=4", "tokens_per_rank=64")


def use(folder: Path, *arguments: str, variables: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """A command in a folder of its own, whose results are in results/ below."""
    environment = os.environ | {"PYTHONPATH": str(CODE), "HIERMOE_HOME": str(folder)} | (variables or {})
    done = subprocess.run(
        [sys.executable, "-m", "hiermoe", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        errors="strict",
        timeout=600,
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        pytest.param({"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.slow),
    ],
    ids=["C locale", "ascii"],
)
def test_a_terminal_that_knows_ascii_alone_gets_ascii(variables: dict[str, str], tmp_path: Path) -> None:
    done = use(tmp_path, "run", *SMALL, "wandb.mode=disabled", variables=variables)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).isascii()
    assert "HierMoE - qwen3_30b_a3b_paper - a6000_4x8" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("home", ["/nonexistent", None], ids=["no such folder", "unset"])
def test_without_a_home_a_run_is_whole(home: str | None, tmp_path: Path) -> None:
    missing = {"HOME": home} if home else {}
    removed = dict.fromkeys(("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "WANDB_DIR"), "")
    done = use(tmp_path, "run", *SMALL, variables=removed | (missing or {"HOME": ""}))
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "results" / "runs").glob("*/records.parquet"))) == 1


@pytest.mark.slow
def test_where_wandb_fails_a_line_says_so_and_the_run_is_whole(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("in the way of W&B's folder")
    done = use(tmp_path, "run", *SMALL, variables={"WANDB_DIR": str(tmp_path / "wandb")})
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "results" / "runs").glob("*/records.parquet"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a blank", "ümlaut", "long" * 40], ids=["blank", "umlaut", "long"])
def test_the_temporary_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    ranks = ("measure=replay", "ranks=local", "world_size=2", "narrowed=64", "system=hd1", "wandb.mode=disabled")
    done = use(tmp_path, "run", *SMALL[1:], *ranks, variables={"TMPDIR": str(folder)})
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} <= {
        f"torchinductor_{os.environ.get('USER', 'root')}"
    }  # torch's own


@pytest.mark.slow
def test_paths_are_seen_from_the_folder_of_the_command_and_may_have_any_letters(tmp_path: Path) -> None:
    here = tmp_path / "h=e,r{e}"
    here.mkdir()
    trace = here / "my {odd} trace"
    trace.write_bytes((CODE / "results" / "traces" / "qwen3_30b_a3b_e128_late.trace").read_bytes())
    path = "routing.source.path='my {odd} trace'"
    done = use(here, "run", *SMALL, "routing=recorded", path, "wandb.mode=disabled")
    assert done.returncode == 0, done.stderr
