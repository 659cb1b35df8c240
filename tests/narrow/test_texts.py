"""A corpus is read from packages, the standard library and folders, in equal shares and the same order."""

import gzip
from pathlib import Path

import pytest

from hiermoe.narrow import debian_packages
from hiermoe.narrow.texts import read_texts
from hiermoe.narrow.training_config import CorpusConfig, TextKind

LONG = "A line of text that is long enough to be kept. " * 6


def corpus(files: dict[str, str], megabytes: float | None = None) -> CorpusConfig:
    """A corpus of one kind."""
    return CorpusConfig(name="mine", kinds={"any": TextKind(files=files, megabytes=megabytes)})


def read(files: dict[str, str], cache: Path, megabytes: float | None = None) -> list[str]:
    """Its documents."""
    return read_texts(corpus(files, megabytes), cache).documents


def test_packed_files_and_markup_are_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        f"<head><title>no</title></head><p>x &lt; y</p>\n\n\n{LONG}<!-- no --><script>no</script>"
    )
    (tmp_path / "b.1.gz").write_bytes(gzip.compress(f'.\\" no\n\\fBbold\\fR \\-v {LONG}'.encode()))
    texts = read({f"{tmp_path}/": "*"}, tmp_path)
    assert sorted(texts) == sorted([f"x < y\n\n{LONG}", f"bold -v {LONG}"])


def test_short_and_undecodable_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "other.txt").write_bytes(LONG.encode("utf-16"))
    (tmp_path / "kept.txt").write_text(LONG)
    assert read({f"{tmp_path}/": "*.txt"}, tmp_path) == [LONG]


def test_a_long_file_is_several_documents(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * (2**20 + 500))
    assert [len(text) for text in read({f"{tmp_path}/": "*.txt"}, tmp_path)] == [2**20, 500]


def test_sources_share_a_kind_equally_until_it_is_full(tmp_path: Path) -> None:
    for name, count in (("a", 40), ("b", 40), ("c", 2)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.txt").write_text(name * 1000)
    files = {f"{tmp_path}/{name}": "*.txt" for name in "abc"}
    texts = read(files, tmp_path, megabytes=0.02)
    assert [sum(text[0] == name for text in texts) for name in "abc"] == [9, 9, 2]
    assert read(files, tmp_path, megabytes=0.02) == texts
    assert len(read(files, tmp_path)) == 82


def test_an_unpacked_package_needs_no_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_packages.shutil, "which", lambda _: None)
    (tmp_path / "words_1.0").mkdir()
    (tmp_path / "words_1.0" / "a.txt").write_text(LONG)
    texts = read_texts(corpus({"words": "**/*.txt"}), tmp_path)
    assert texts.documents == [LONG]
    assert "from words_1.0" in texts.about


def test_a_package_that_cannot_be_had_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_packages.shutil, "which", lambda _: None)
    with pytest.raises(ValueError) as caught:
        read({"words": "*"}, tmp_path)
    assert "the corpus needs the Debian packages words, which cannot be downloaded: there is no apt-get" in str(
        caught.value
    )
    assert "choose corpus=standard_library" in str(caught.value)


def test_sources_without_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no text under \*\.txt"):
        read({f"{tmp_path}/": "*.txt"}, tmp_path)
    with pytest.raises(ValueError, match="nowhere/ is no folder"):
        read({"nowhere/": "*.txt"}, tmp_path)


def test_most_documents_are_the_first(tmp_path: Path) -> None:
    files = {"python": "**/*.py"}
    some, fewer = (read_texts(corpus(files, 0.5), tmp_path, most).documents for most in (8, 3))
    assert some[:3] == fewer
    assert not any("site-packages" in text[:50] for text in some)
