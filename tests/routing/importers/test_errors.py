"""Bad files end with one line that names the file and the place, a non-zero exit, and nothing written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Command
from tests.routing.importers.files import (
    record,
    some_ids,
    write_flame,
    write_lines,
    write_llama,
    write_megatron,
    write_npy,
    write_parquet,
)

Write = Callable[[Path], Path]
IDS = some_ids(layers=2, tokens=6)


def cut(path: Path, keep: float) -> Path:
    """Only the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def changed(token: int, expert: int, layer: int = 0) -> np.ndarray:
    """The last expert of a token replaced."""
    ids = IDS.copy()
    ids[layer, token, -1] = expert
    return ids


def repeated(token: int, layer: int = 0) -> np.ndarray:
    """A token with its first expert twice."""
    return changed(token, int(IDS[layer, token, 0]), layer)


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def lines(path: Path, *records: dict[str, object]) -> Path:
    return write_lines(path / "a.jsonl", list(records))


GOOD = record(0, 0, 0, IDS[0])


def with_layers(folder: Path, *lengths: int) -> Path:
    for layer, length in enumerate(lengths, 2):
        write_parquet(folder / f"layer_{layer:02d}.parquet", indices=IDS[0, :length].tolist())
    return folder


@pytest.mark.parametrize(
    ("format_and_options", "write", "message"),
    [
        # NumPy
        ("npy", lambda d: cut(write_npy(d / "a.npy", IDS), 0.9), "a.npy: it is truncated or no .npy file"),
        ("npy", lambda d: text(d / "a.npy", "no array"), "a.npy: it is truncated or no .npy file"),
        ("npy", lambda d: text(d / "a.npy", ""), "a.npy: it is truncated or no .npy file"),
        ("npy --topk 4", lambda d: write_npy(d / "a.npy", IDS), "a.npy: K=3 experts a token, topk=4 was asked for"),
        ("npy", lambda d: write_npy(d / "a.npy", changed(4, 16)), "token 4, layer 0: expert 16 is outside 0..15"),
        ("npy", lambda d: write_npy(d / "a.npy", changed(4, -1, 1)), "a.npy: token 4, layer 1: expert ids"),
        ("npy", lambda d: write_npy(d / "a.npy", repeated(5, 1)), "token 5, layer 1: a token has an expert twice"),
        ("npy --layers 0 2", lambda d: write_npy(d / "a.npy", IDS), "a.npy: layer 2 is not in it; it has [0, 1]"),
        (
            "npy --ranks 4",
            lambda d: write_npy(d / "a.npy", IDS),
            "6 tokens do not divide over ranks=4; give --tokens 4",
        ),
        (
            "npy --ranks 2 --tokens-per-rank 2",
            lambda d: write_npy(d / "a.npy", IDS),
            "6 tokens do not divide over ranks=2 x tokens_per_rank=2; give --tokens 4",
        ),
        ("npy --ranks 0", lambda d: write_npy(d / "a.npy", IDS), "ranks=0 must be at least 1"),
        ("npy", lambda d: write_npy(d / "a.npy", IDS[:, :0]), "a.npy: it has no tokens"),
        ("npy", lambda d: d / "gone.npy", "gone.npy: there is no such file"),
        # Parquet
        (
            "parquet",
            lambda d: cut(write_parquet(d / "a.parquet", indices=IDS[0].tolist()), 0.9),
            "a.parquet: it is tru",
        ),
        ("parquet", lambda d: text(d / "a.parquet", "no parquet"), "a.parquet: it is truncated or no Parquet file"),
        ("parquet", lambda d: write_parquet(d / "a.parquet", indices=[[1, 2], [3]]), "row 1 has 1 experts, topk=2"),
        (
            "parquet",
            lambda d: write_parquet(d / "a.parquet", indices=[[1, 2], None]),
            "a.parquet: row 1 has no indices",
        ),
        ("parquet", lambda d: write_parquet(d / "a.parquet", indices=[[1, 2], [None, 3]]), "row 1 has an expert that"),
        ("parquet", lambda d: write_parquet(d / "a.parquet", indices=[[1, 2], [3, 16]]), "row 1, layer 0: expert 16"),
        (
            "parquet",
            lambda d: write_parquet(d / "a.parquet", indices=[[1, 2], [-3, 1]]),
            "a.parquet: row 1: expert ids",
        ),
        (
            "parquet",
            lambda d: write_parquet(d / "a.parquet", indices=[[1, 2], [3, 3]]),
            "row 1, layer 0: a token has an",
        ),
        ("parquet", lambda d: write_parquet(d / "a.parquet", indices=[]), "a.parquet: it has no tokens"),
        (
            "parquet",
            lambda d: write_parquet(d / "a.parquet", indices=[[1, 2], [3, 4], [3, 3]], layer=[0, 1, 1]),
            "layers have unequal numbers of tokens: {0: 1, 1: 2}",
        ),
        (
            "parquet",
            lambda d: write_parquet(
                d / "a.parquet", indices=[[1, 2], [3, 4], [5, 5]], layer=[0, 0, 1], token=[0, 1, 0]
            ),
            "unequal numbers of tokens",
        ),
        (
            "parquet",
            lambda d: write_parquet(d / "a.parquet", indices=[[1, 2], [5, 5]], layer=[0, 1]),
            "a.parquet: row 1, layer 1: a token has an expert twice",
        ),
        (
            "parquet",
            lambda d: write_parquet(d / "a.parquet", indices=[[1, 2], [3, 4]], token=[7, 7]),
            "a.parquet: row 1, layer 0: its step and token are there twice",
        ),
        (
            "parquet",
            lambda d: write_parquet(d / "a.parquet", indices=[[1, 2], [3, 4]], layer=[0, 1], token=[0, 1]),
            "layers 0 and 1 do not have the same steps and tokens",
        ),
        (
            "parquet --ranks 2",
            lambda d: write_parquet(d / "a.parquet", indices=[[1, 2]] * 3, step=[0, 0, 1]),
            "1 tokens of a step do not divide over ranks=2",
        ),
        ("parquet --ranks 4", lambda d: with_layers(d, 6), "6 tokens do not divide over ranks=4"),
        ("parquet", lambda d: with_layers(d, 6, 5), "layers have unequal numbers of tokens: {2: 6, 3: 5}"),
        ("parquet --layers 9", lambda d: write_flame(d, IDS), "layer 9 is not in it; it has [2, 3]"),
        ("parquet", lambda d: d, "no file in this folder is named layer_*.parquet"),
        # CSV
        (
            "llama-csv",
            lambda d: write_llama(d / "a.csv", IDS),
            "a.csv: the format does not say how many experts a token",
        ),
        (
            "llama-csv --topk 3",
            lambda d: cut(write_llama(d / "a.csv", IDS), 0.99),
            "a.csv: the last line has no end: it is truncated",
        ),
        (
            "llama-csv --topk 3",
            lambda d: text(d / "a.csv", "layer,expert\n0,1\n0,2\n0,3\n0,4\n"),
            "a.csv: layer 0 has 4 rows, no multiple of topk=3",
        ),
        (
            "llama-csv --topk 1",
            lambda d: text(d / "a.csv", "0,1\n0,two\n0,3\n"),
            "a.csv: line 2 is '0,two', not layer,",
        ),
        ("llama-csv --topk 1", lambda d: text(d / "a.csv", "layer,expert\n0,1\n0,2,3\n"), "a.csv: line 3 is '0,2,3'"),
        ("llama-csv --topk 1", lambda d: text(d / "a.csv", "0,1\n\n0,2\n"), "a.csv: line 2 is ''"),
        ("llama-csv --topk 1", lambda d: text(d / "a.csv", "0,1\n0,\n"), "a.csv: line 2 is '0,', not layer,expert"),
        ("llama-csv --topk 1", lambda d: text(d / "a.csv", "0,1\n0,1.5\n"), "a.csv: line 2 is '0,1.5'"),
        ("llama-csv --topk 1", lambda d: text(d / "a.csv", ""), "a.csv: it is empty"),
        ("llama-csv --topk 1", lambda d: text(d / "a.csv", "layer,expert\n"), "a.csv"),
        ("llama-csv --topk 1", lambda d: text(d / "a.csv", "1,1\n0,2\n0,-3\n1,2\n"), "a.csv: line 3: expert ids [-3]"),
        (
            "llama-csv --topk 2",
            lambda d: text(d / "a.csv", "layer,expert\n0,1\n0,2\n1,3\n1,4\n0,3\n0,16\n1,1\n1,2\n"),
            "a.csv: line 6, token 1 of layer 0: expert 16 is outside 0..15",
        ),
        ("llama-csv --topk 2", lambda d: text(d / "a.csv", "0,1\n0,1\n"), "line 1, token 0 of layer 0: a token has an"),
        (
            "llama-csv --topk 1",
            lambda d: text(d / "a.csv", "0,1\n0,2\n1,1\n"),
            "layers have unequal numbers of tokens: {0: 2, 1: 1}; llama.cpp's last layer has fewer",
        ),
        (
            "llama-csv --topk 3 --layers 7",
            lambda d: write_llama(d / "a.csv", IDS),
            "layer 7 is not in it; it has [0, 1]",
        ),
        # Megatron
        (
            "megatron",
            lambda d: cut(lines(d, GOOD, GOOD | {"layer": 1}), 0.9),
            "a.jsonl: line 2 is truncated or malformed",
        ),
        ("megatron", lambda d: text(d / "a.jsonl", ""), "a.jsonl: it has no lines"),
        ("megatron", lambda d: lines(d, GOOD, GOOD | {"top_indices": "x"}), "a.jsonl: line 2"),
        ("megatron", lambda d: lines(d, GOOD | {"step": 0.5}), "a.jsonl: line 1: step is no integer"),
        ("megatron", lambda d: lines(d, GOOD, {"step": 0, "layer": 1}), "line 2 has no rank, num_tokens, topk"),
        ("megatron", lambda d: lines(d, GOOD | {"num_tokens": 5}), "a.jsonl: line 1 has 6 tokens, num_tokens=5"),
        ("megatron", lambda d: lines(d, GOOD | {"topk": 4}), "a.jsonl: line 1, token 0 has 3 experts, topk=4"),
        (
            "megatron",
            lambda d: lines(d, record(0, 0, 0, IDS[0, :2]) | {"top_indices": [[1, 2, 3], [4, 5]]}),
            "a.jsonl: line 1, token 1 has 2 experts, topk=3",
        ),
        ("megatron", lambda d: lines(d, GOOD, record(1, 0, 0, IDS[0, :, :2])), "line 2 has 2 experts a token, not K=3"),
        ("megatron --topk 2", lambda d: lines(d, GOOD), "line 1 has 3 experts a token, not K=2"),
        (
            "megatron",
            lambda d: lines(d, GOOD, record(1, 0, 0, changed(4, 99)[0])),
            "line 2, token 4 (layer 0): expert 99",
        ),
        ("megatron", lambda d: lines(d, record(0, 0, 0, changed(4, -9)[0])), "line 1, token 4: expert ids"),
        ("megatron", lambda d: lines(d, record(0, 0, 0, repeated(2)[0])), "line 1, token 2 (layer 0): a token has an"),
        (
            "megatron",
            lambda d: lines(d, GOOD, GOOD | {"layer": 1}, GOOD | {"step": 1}),
            "layer 1 is missing in step 1 of rank 0",
        ),
        ("megatron", lambda d: lines(d, GOOD, record(0, 1, 0, IDS[0, :5])), "line 2: layer 1 has 5 tokens in step 0"),
        ("megatron --layers 3", lambda d: lines(d, GOOD), "layer 3 is not in it; it has [0]"),
        ("megatron", lambda d: lines(d, GOOD | {"block": "mtp"}), "it has no lines of the decoder's layers"),
        ("megatron --ranks 4", lambda d: write_megatron(d, IDS[None, :, None]), "it has 1 ranks, ranks=4 does not fit"),
        ("megatron --tokens 4", lambda d: write_megatron(d, IDS[None, :, None]), "it says who held which token"),
        ("megatron", lambda d: d, "no file in this folder is named *.jsonl"),
    ],
)
def test_bad_file(format_and_options: str, write: Write, message: str, hiermoe: Command, tmp_path: Path) -> None:
    name, *options = format_and_options.split()
    folder = tmp_path / "in"
    folder.mkdir()
    path, output = write(folder), tmp_path / "out" / "a.trace"
    code, out, err = hiermoe(
        "trace", "import", name, str(path), "--output", str(output), "--num-experts", "16", *options
    )
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1 and out == ""
    assert not output.parent.exists()


def test_parquet_without_lists_is_refused(hiermoe: Command, tmp_path: Path) -> None:
    for columns, message in (
        ({"indices": pa.array([1, 2])}, "column indices is int64; the rule is a list of integers"),
        ({"experts": pa.array([[1, 2]])}, "no column indices; it has ['experts']"),
        ({"indices": pa.array([[1, 2]]), "layer": pa.array(["a"])}, "column layer is string; the rule is an integer"),
        ({"indices": pa.array([[1, 2]]), "layer": pa.array([None], pa.int32())}, "row 0 has no layer"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        code, _, err = hiermoe(
            "trace", "import", "parquet", str(tmp_path / "a.parquet"), "--output", "no", "--topk", "2"
        )
        assert code == 2
        assert message in err


def test_array_that_is_no_three_axes_of_integers_is_refused(hiermoe: Command, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for array, message in (
        (np.zeros((3, 2), np.int16), "shape (3, 2); the rule is one array [tokens, layers, K]"),
        (np.zeros((3, 2, 1)), "dtype float64; the rule is an integer"),
        (np.array([[[None]]]), "truncated or no .npy file"),
    ):
        np.save(path, array)
        code, _, err = hiermoe("trace", "import", "npy", str(path), "--output", str(tmp_path / "no"))
        assert code == 2
        assert message in err
