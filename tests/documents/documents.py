"""What the project's pages tell readers to type."""

import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from hiermoe.records.project import CODE

PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "baselines/README.md", "results/traces/README.md")
PROGRAMS = ("hiermoe", "make", "python", "pytest", "srun", "torchrun")


def blocks() -> Iterator[tuple[str, Token]]:
    """Page and token of every block of code and every piece of code in a line."""
    for path in sorted(path for pattern in PAGES for path in CODE.glob(pattern)):
        page = path.relative_to(CODE).as_posix()
        for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
            yield from ((page, each) for each in (token, *(token.children or ())))


def commands() -> dict[str, str]:
    """Every command, on one line without comments and with single blanks, and the first page that has it."""
    found: dict[str, str] = {}
    for page, token in blocks():
        if token.type in ("fence", "code_block", "code_inline"):
            for line in token.content.replace("\\\n", " ").splitlines():
                if line.split(" ")[0] in PROGRAMS and " " in line:
                    found.setdefault(" ".join(line.split(" #")[0].split()), page)
    return found


def python_blocks() -> dict[str, list[str]]:
    """Every block of Python, by page."""
    found: dict[str, list[str]] = {}
    for page, token in blocks():
        if token.type == "fence" and token.info == "python":
            found.setdefault(page, []).append(token.content)
    return found


def copy_project(folder: Path) -> None:
    """Copy what git knows, but tests and the reference report, so that results are the copy's own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CODE,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (CODE / name).is_file() and not name.startswith(("tests/", "reports/reference/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CODE / name, folder / name)


def words(command: str) -> list[str]:
    """The command's arguments, without its program."""
    return shlex.split(command)[1:]
