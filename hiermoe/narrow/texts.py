"""Real text as documents: of Debian packages, of Python's standard library, or of folders, by kind."""

import gzip
import hashlib
import html
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hiermoe.narrow.debian_packages import unpacked
from hiermoe.narrow.training_config import CorpusConfig, TextKind

_LONGEST = 2**20  # characters of a document; longer files are several
_SHORTEST = 200  # characters
_FOREIGN = {"site-packages", "dist-packages", "__pycache__"}  # installed beside the standard library
_PACKED = {".gz", ".dz"}
_MARKUP = {".html", ".htm", ".page", ".xml"}
_NO_TEXT = re.compile(r"(?si)<(script|style|head|info)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>")
_BLANK = re.compile(r"\n\s*\n\s*")
_ROFF = re.compile(r'(?m)^\.\\".*\n|\\f[BIRP]|\\&')
_ROFF_NAME = re.compile(r"\.[1-9][a-z]*$")


@dataclass(frozen=True)
class Texts:
    """Documents of a corpus.

    Attributes:
        documents: text of each, kind after kind.
        about: one line: kinds with their sizes, and sources with their versions.
    """

    documents: list[str]
    about: str


def read_texts(corpus: CorpusConfig, cache: Path, most: int | None = None) -> Texts:
    """The text of a corpus, the same for the same versions of its sources.

    Args:
        corpus: what to read.
        cache: folder of unpacked Debian packages.
        most: keep only so many documents; None for all.

    Raises:
        ValueError: a source is missing, or holds no text.
    """
    sources = sorted({source for kind in corpus.kinds.values() for source in kind.files})
    packages = unpacked([name for name in sources if name != "python" and "/" not in name], cache)
    roots = {source: packages.get(source) or _root(source) for source in sources}
    documents: list[str] = []
    sizes: list[str] = []
    for name, kind in corpus.kinds.items():
        mine = _of_kind(kind, roots, None if most is None else most - len(documents))
        documents += mine
        sizes.append(f"{name} {sum(map(len, mine)) / 1e6:.1f}")
    versions = ", ".join(_version(source, folder) for source, folder in roots.items())
    return Texts(documents, f"{corpus.name} (10^6 characters: {', '.join(sizes)}; from {versions})")


def _root(source: str) -> Path:
    folder = Path(sysconfig.get_path("stdlib")) if source == "python" else Path(source).expanduser()
    if not folder.is_dir():
        raise ValueError(f"corpus: {source} is no folder")
    return folder


def _version(source: str, folder: Path) -> str:
    return f"Python {platform.python_version()}" if source == "python" else folder.name


def _of_kind(kind: TextKind, roots: dict[str, Path], most: int | None) -> list[str]:
    """Equal shares of all sources, until the kind is full or they are empty, or there are so many documents."""
    limit = float("inf") if kind.megabytes is None else kind.megabytes * 1e6
    readers = {source: _documents(roots[source], pattern) for source, pattern in kind.files.items()}
    taken: dict[str, list[str]] = {source: [] for source in readers}
    sizes = dict.fromkeys(readers, 0)
    while readers and sum(sizes.values()) < limit and (most is None or sum(map(len, taken.values())) < most):
        source = min(readers, key=lambda each: sizes[each])
        document = next(readers[source], None)
        if document is None:
            if not taken[source]:
                raise ValueError(f"corpus: {source} has no text under {kind.files[source]}")
            del readers[source]
            continue
        taken[source].append(document)
        sizes[source] += len(document.encode())
    return [document for source in taken for document in taken[source]]


def _documents(root: Path, pattern: str) -> Iterator[str]:
    """Texts of the files under a pattern, in an order that has nothing to do with their names."""
    for path in _files(root, pattern):
        text = _text(path)
        for start in range(0, len(text), _LONGEST):
            part = text[start : start + _LONGEST]
            if len(part.strip()) >= _SHORTEST:
                yield part


@lru_cache(maxsize=64)
def _files(root: Path, pattern: str) -> tuple[Path, ...]:
    files = (path for path in root.glob(pattern) if path.is_file() and not path.is_symlink())
    names = {path: str(path.relative_to(root)) for path in files}
    mine = [path for path, name in names.items() if not _FOREIGN.intersection(Path(name).parts)]
    return tuple(sorted(mine, key=lambda path: hashlib.sha256(names[path].encode()).digest()))


def _text(path: Path) -> str:
    """What a file says, without the tags of markup; nothing where that is not UTF-8."""
    content = path.read_bytes()
    name = path
    if path.suffix in _PACKED:
        content, name = gzip.decompress(content), path.with_suffix("")
    text = content.decode("utf-8", errors="replace")
    if "\0" in text or text.count("\N{REPLACEMENT CHARACTER}") > len(text) // 100:
        return ""  # of another encoding, or wrong on purpose, as some of Python's own tests
    if name.suffix in _MARKUP:
        return _BLANK.sub("\n\n", html.unescape(_NO_TEXT.sub("", text)))
    if _ROFF_NAME.search(name.name):
        return _ROFF.sub("", text).replace("\\-", "-")
    return text
