"""What checkpoints are called, which is the newest, and which are whole. Pure: imports neither torch nor megatron."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from hiermoe.records.checksums import LIST, Damaged, checksum_list, digest_of, read_list
from hiermoe.records.whole_file import write_whole

_PREFIX = "step-"
_PATTERN = f"{_PREFIX}{'[0-9]' * 8}"


def checkpoint_path(folder: Path, step: int) -> Path:
    """The checkpoint after so many finished steps."""
    return folder / f"{_PREFIX}{step:08d}"


def newest_first(folder: Path) -> list[Path]:
    """All checkpoints, whether damaged or not."""
    return sorted(folder.glob(_PATTERN), reverse=True)


def file_names(checkpoint: Path) -> list[str]:
    """All files of a checkpoint but their checksums, in alphabetical order."""
    names = (str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for name in names if name != LIST)


def write_checksums(folder: Path, step: int, digests: Mapping[str, str]) -> None:
    """Make a checkpoint whole.

    Args:
        folder: that has all its files, whatever it is called.
        step: finished steps.
        digests: of all files.
    """
    write_whole(folder / LIST, checksum_list(_holds(step), digests))


def check_files(checkpoint: Path, share: int = 0, shares: int = 1) -> None:
    """Compare files with their checksums.

    Args:
        checkpoint: with the name that it was given.
        share: of the files this one, where several processes share the work.
        shares: how many of them there are.

    Raises:
        Damaged: not what was written.
    """
    names = file_names(checkpoint)
    digests = read_list(checkpoint, _holds(finished_steps(checkpoint)), names)
    for name in sorted(digests)[share::shares]:
        if digest_of(checkpoint, name) != digests[name]:
            raise Damaged(checkpoint, f"{name} is not what was written")


def _holds(step: int) -> str:
    return f"checkpoint after {step} steps"


def finished_steps(checkpoint: Path) -> int:
    """Training steps that a checkpoint comes after.

    Raises:
        ValueError: it is none.
    """
    if not checkpoint.exists():
        raise ValueError(f"{checkpoint}: there is no such checkpoint")
    if not (checkpoint.match(_PATTERN) and checkpoint.is_dir()):
        raise ValueError(f"{checkpoint} is not a checkpoint: a folder {_PREFIX}<eight digits> is")
    return int(checkpoint.name.removeprefix(_PREFIX))


def remove_old(folder: Path, keep: int) -> None:
    """Remove all checkpoints but so many of the newest."""
    for old in newest_first(folder)[keep:]:
        shutil.rmtree(old)


def remove_partial(folder: Path) -> None:
    """Remove what killed runs left behind."""
    for left_behind in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(left_behind)
