"""What checkpoints are called, and which is the newest. Pure: imports neither torch nor megatron."""

import shutil
from pathlib import Path

_PREFIX = "step-"
_PATTERN = f"{_PREFIX}{'[0-9]' * 8}"


def checkpoint_path(folder: Path, step: int) -> Path:
    """The checkpoint after so many finished steps."""
    return folder / f"{_PREFIX}{step:08d}"


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; None if there is none."""
    return max(folder.glob(_PATTERN), default=None)


def finished_steps(checkpoint: Path) -> int:
    """Training steps that a checkpoint comes after.

    Raises:
        ValueError: it is none.
    """
    if not (checkpoint.match(_PATTERN) and checkpoint.is_dir()):
        raise ValueError(f"{checkpoint} is not a checkpoint: a folder {_PREFIX}<eight digits> is")
    return int(checkpoint.name.removeprefix(_PREFIX))


def remove_old(folder: Path, keep: int) -> None:
    """Remove all checkpoints but so many of the newest."""
    for old in sorted(folder.glob(_PATTERN))[:-keep]:
        shutil.rmtree(old)


def remove_partial(folder: Path) -> None:
    """Remove what killed runs left behind."""
    for left_behind in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(left_behind)
