"""What nccl-tests wrote is read: sizes, times and who exchanged, in every form, whole or cut off."""

from pathlib import Path

import numpy as np
import pytest

from hiermoe.topology.nccl_tests import read_nccl_test
from tests.topology.nccl_logs import SIZES, json_log, text_log

NODE = [0] * 8
ANSWER = [0.02 + size * 3e-9 for size in SIZES]


def time(size: int) -> float:
    return 0.02 + size * 3e-9


@pytest.mark.parametrize("form", ["2.0", "2.13", "2.19"])
@pytest.mark.parametrize("between", ["", "host0:1000:1000 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM"])
def test_text_of_every_version_with_lines_of_others_in_it(form: str, between: str, tmp_path: Path) -> None:
    test = read_nccl_test(text_log(tmp_path / "a.txt", time, NODE, form=form, between=between))
    np.testing.assert_array_equal(test.size_bytes, SIZES)
    np.testing.assert_allclose(test.time_ms, ANSWER, rtol=1e-3)
    assert test.members == tuple(range(8)) and set(test.hosts) == {"host0"} and not test.notes


@pytest.mark.parametrize("prefix", ["[1,0]<stdout>:", "0: "])
def test_text_that_a_launcher_has_labelled(prefix: str, tmp_path: Path) -> None:
    path = text_log(tmp_path / "a.txt", time, NODE)
    path.write_text("".join(f"{prefix}{line}\n" for line in path.read_text().splitlines()))
    assert len(read_nccl_test(path).size_bytes) == len(SIZES)


@pytest.mark.parametrize("per_process", [1, 8])
def test_json(per_process: int, tmp_path: Path) -> None:
    test = read_nccl_test(json_log(tmp_path / "a.json", time, NODE * 2, per_process=per_process))
    np.testing.assert_allclose(test.time_ms, ANSWER)
    assert len(test.group) == 16 and test.hosts == ("host0",) * 8 + ("host1",) * 8


@pytest.mark.parametrize("ranks", [1, 2, 8, 80])
def test_ranks_of_any_number(ranks: int, tmp_path: Path) -> None:
    for path in (text_log(tmp_path / "a.txt", time, [0] * ranks), json_log(tmp_path / "a.json", time, [0] * ranks)):
        assert read_nccl_test(path).members == tuple(range(ranks))


@pytest.mark.parametrize("share", [0.5, 0.7, 0.93])
def test_of_a_file_that_was_cut_off_what_is_whole_counts(share: float, tmp_path: Path) -> None:
    for path in (text_log(tmp_path / "a.txt", time, NODE), json_log(tmp_path / "a.json", time, NODE)):
        text = path.read_text()
        path.write_text(text[: int(share * len(text))])
        test = read_nccl_test(path)
        assert 0 < len(test.size_bytes) < len(SIZES)
        np.testing.assert_allclose(test.time_ms, ANSWER[: len(test.time_ms)], rtol=1e-3)


def test_a_cut_number_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    path = text_log(tmp_path / "a.txt", time, NODE)
    lines = path.read_text().splitlines()
    row = next(at for at, line in enumerate(lines) if line.strip().startswith(str(SIZES[5])))
    cells = lines[row].split()
    for kept in range(2, len(cells)):
        path.write_text("\n".join([*lines[:row], " ".join(cells[:kept])[:-1]]))
        assert len(read_nccl_test(path).size_bytes) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("alltoall_perf", "all_reduce_perf"), "is of all_reduce_perf"),
        (lambda text: "hello\n", "has no table of nccl-tests"),
        (lambda text: text.split("    1024 ")[0], "has no time of any size"),
        (lambda text: text.replace("#  Rank  3 ", "#  Rank 33 "), "some are missing"),
        (lambda text: "{", "cut off before its first result, or is no JSON"),
        (lambda text: '{"a": 1}', "is JSON, but not of nccl-tests"),
    ],
)
def test_what_it_is_not_is_said_in_one_line(change: object, message: str, tmp_path: Path) -> None:
    path = text_log(tmp_path / "a.txt", time, NODE, form="2.19")
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message) as raised:
        read_nccl_test(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("log", [text_log, json_log])
def test_wrong_elements_are_refused(log: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong elements arrived"):
        read_nccl_test(log(tmp_path / "a", time, NODE, wrong=3))  # type: ignore[operator]
