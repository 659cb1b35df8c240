"""Checksums of a folder's files, so that whoever reads them knows that they are what was written.

The list has the form that ``sha256sum --check`` reads. Its first line says in which format the folder is and what it
holds, so that one that was put in another's place is seen too. It is written last: a folder without it is not whole.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

LIST = "checksums.sha256"
FORMAT = 1
_HEAD = re.compile(r"# format (\d+): (.+)")


class Damaged(ValueError):
    """A folder does not hold what was written there.

    Attributes:
        why: without the folder.
    """

    def __init__(self, folder: Path, why: str) -> None:
        """Take both."""
        super().__init__(f"{folder}: {why}")
        self.why = why


def checksum_list(holds: str, digests: Mapping[str, str]) -> bytes:
    """The list's content.

    Args:
        holds: what the folder holds, e.g. the name of a run; one line.
        digests: by the names of files, in the folder or below it.
    """
    lines = [f"# format {FORMAT}: {holds}", *(f"{digest}  {name}" for name, digest in digests.items())]
    return "".join(f"{line}\n" for line in lines).encode()


def read_list(folder: Path, holds: str, names: Iterable[str]) -> dict[str, str]:
    """Checksums of a folder's files.

    Args:
        folder: that has a list.
        holds: what it should hold.
        names: of files that must be in the list.

    Raises:
        Damaged: there is no such list.
    """
    try:
        lines = (folder / LIST).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise Damaged(folder, "has no checksums, as if an earlier version wrote it or its writer was killed") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(folder, f"{LIST} cannot be read: {error}") from error
    head = _HEAD.fullmatch(lines[0]) if lines else None
    if head is None:
        raise Damaged(folder, f"{LIST} is not what was written")
    if int(head[1]) != FORMAT:
        kind = "a later" if int(head[1]) > FORMAT else "an earlier"
        raise Damaged(folder, f"is of {kind} version, in format {head[1]} where this one has {FORMAT}")
    if head[2] != holds:
        raise Damaged(folder, f"holds {head[2]}")
    found = {name: digest for digest, _, name in (line.partition("  ") for line in lines[1:])}
    for name in names:
        if name not in found:
            raise Damaged(folder, f"{LIST} lacks {name}")
    return found


def whole_content(folder: Path, name: str, digest: str) -> bytes:
    """What a small file holds.

    Raises:
        Damaged: not what was written.
    """
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise Damaged(folder, _unreadable(name, error)) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise Damaged(folder, f"{name} is {'empty' if not content else 'not what was written'}")
    return content


def digest_of(folder: Path, name: str) -> str:
    """Of a file of any size.

    Raises:
        Damaged: it cannot be read.
    """
    try:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Damaged(folder, _unreadable(name, error)) from error


def _unreadable(name: str, error: OSError) -> str:
    return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name} cannot be read: {error.strerror}"
