"""What a file is of is found out and said; what is of none, or may be of several, is asked about."""

from pathlib import Path

import numpy as np
import pytest

from hiermoe.routing.importers import IMPORTERS
from hiermoe.routing.importers.detection import detected
from hiermoe.routing.trace import RoutingTrace
from tests.conftest import Command
from tests.routing.importers.files import some_ids, write_npy
from tests.routing.importers.hostile import check_refused
from tests.routing.importers.test_round_trips import WRITERS, flat

IDS = some_ids()


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_is_found_and_said(name: str, hiermoe: Command, tmp_path: Path) -> None:
    write, first_layer = WRITERS[name]
    path, output = write(tmp_path, IDS), tmp_path / "out.trace"
    sizes = ["--num-experts", "16", "--topk", "3"]
    code, out, err = hiermoe("trace", "import", str(path), "--output", str(output), *sizes)
    assert code == 0, err
    assert out.startswith(f"{path}: ") and f"(form {name})" in out.splitlines()[0]
    trace = RoutingTrace.load(output)
    np.testing.assert_array_equal(flat(trace), IDS)
    assert trace.metadata.layers[0] == first_layer


@pytest.mark.parametrize(
    "content", [b"", b"nothing that is known", b"{}", b"[]", b"\x93NUMPY", b"PK\x03\x04", b"\x1f\x8bno", bytes(99)]
)
def test_no_form_is_guessed(content: bytes, hiermoe: Command, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    known = ", ".join(sorted(IMPORTERS))
    broken = "truncated or no .npy file" if content.startswith(b"\x93") else f"name one of {known}"
    check_refused(hiermoe, "", tmp_path / "a", broken)


def test_an_empty_folder_is_no_form(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no form is recognized"):
        detected(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        detected(tmp_path / "gone")


def test_several_forms_are_asked_about(tmp_path: Path) -> None:
    for name in ("esft", "parquet"):
        WRITERS[name][0](tmp_path, IDS)
    folder = tmp_path / "both"
    folder.mkdir()
    for file in (*(tmp_path / "law").iterdir(), *(tmp_path / "iter_0540").iterdir()):
        file.rename(folder / file.name)
    with pytest.raises(ValueError, match=r"may be of several forms \(parquet: .*; esft: .*\); name one of them"):
        detected(folder)


def test_an_option_of_other_forms_is_refused(hiermoe: Command, tmp_path: Path) -> None:
    path = write_npy(tmp_path / "a.npy", IDS)
    check_refused(hiermoe, "", path, "pipeline=2 is of the format megatron, not of npy", "--pipeline", "2")
