"""Routing from expert loads alone: the loads come out, and what cannot be is refused."""

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiermoe.routing.load_table import read_loads
from hiermoe.routing.loads import IndependentLoads, inclusion_rates
from hiermoe.routing.step import RoutingRequest


def drawn_shares(load_E: np.ndarray, topk: int, steps: int = 1) -> np.ndarray:
    source = IndependentLoads(RoutingRequest("", len(load_E), topk, 8, 4096), load_E)
    ids_NK = np.concatenate([source.step(i).expert_ids_NK.numpy() for i in range(steps)])
    assert bool((np.diff(np.sort(ids_NK, axis=1), axis=1) > 0).all())
    return np.bincount(ids_NK.ravel(), minlength=len(load_E)) / ids_NK.size


@pytest.mark.parametrize(("num_experts", "topk", "exponent"), [(8, 2, 0.5), (64, 6, 0.8), (128, 8, 0.5)])
def test_experts_are_drawn_as_often_as_their_loads_say(num_experts: int, topk: int, exponent: float) -> None:
    load_E = np.arange(1, num_experts + 1.0) ** -exponent
    load_E = np.minimum(load_E / load_E.sum(), 0.9 / topk)
    load_E /= load_E.sum()
    np.testing.assert_allclose(drawn_shares(load_E, topk, steps=8), load_E, rtol=0.05)


def test_weights_in_proportion_to_loads_would_miss_them() -> None:
    load_E = np.array([5.0, 4.0, 1, 1, 1, 1, 1, 1])
    shares = drawn_shares(load_E, 2)
    assert shares[0] == pytest.approx(5 / 15, rel=0.06)
    assert inclusion_rates(load_E, 2)[0] / inclusion_rates(load_E, 2)[2] > 7  # not 5: two distinct experts a token


def test_expert_of_every_token_is_in_every_token_and_one_without_load_in_none() -> None:
    shares = drawn_shares(np.array([2.0, 0.0, 1.0, 1.0]), 2)
    assert shares[0] == 0.5 and shares[1] == 0.0


@pytest.mark.parametrize(
    ("load_E", "message"),
    [
        ([3.0, 1.0, 1.0, 0.0], "expert 0 has 60.0% of the load; with topk=2"),
        ([1.0, 0.0, 0.0, 0.0], "no expert can have more than 50.0%"),
    ],
)
def test_loads_that_no_routing_has_are_refused(load_E: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inclusion_rates(np.array(load_E), 2)


def test_rows_may_come_in_any_order(loads_file: Callable[[str], Path]) -> None:
    path = loads_file("expert,load\n2,30\n0,10.5\n1,0\n")
    np.testing.assert_array_equal(read_loads(path).load_E, [10.5, 0, 30])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no CSV file of expert,load"),
        ("id,tokens\n0,1\n", "has the columns id,tokens; the rule is expert,load"),
        ("expert,load\n", "experts must be 0 to E - 1, each once; there are 0 rows"),
        ("expert,load\n0,1\n0,2\n", "experts must be 0 to E - 1"),
        ("expert,load\n1,1\n2,2\n", "experts must be 0 to E - 1"),
        ("expert,load\n0,1\n1,many\n", "load of expert 1 is many; the rule is >= 0"),
        ("expert,load\n0,1\n1,-2\n", "load of expert 1 is -2"),
        ("expert,load\n0,1\n1,\n", "load of expert 1 is nan"),
        ("expert,load\n0,0\n1,0\n", "all loads are 0"),
        ("expert,load\n0,1\n1,2,3,4\n", "is no CSV file"),
    ],
)
def test_malformed_file_is_refused_by_name(text: str, message: str, loads_file: Callable[[str], Path]) -> None:
    path = loads_file(text)
    with pytest.raises(ValueError) as error:
        read_loads(path)
    assert message in str(error.value) and "loads.csv" in str(error.value) and "\n" not in str(error.value)


def test_columns_have_other_names_and_layers_are_chosen(loads_file: Callable[[str], Path]) -> None:
    path = loads_file(
        "layer_id, expert_id, Count\n" + "".join(f"{x}, {e}, {10 * x + e}\n" for x in (3, 7) for e in (1, 0))
    )
    table = read_loads(path, layer=1)
    np.testing.assert_array_equal(table.load_E, [70, 71])
    assert table.layer == 7 and table.notes == ("One of the file's layers [3, 7]: layer=1 is number 7.",)
    with pytest.raises(ValueError, match="layer=2 is not among its 2 layers"):
        read_loads(path, layer=2)


@pytest.mark.parametrize(
    "text",
    [
        "expert;load\n0;1000\n1;2500\n2;30\n",
        "expert\tload\n0\t1000\n1\t2500\n2\t30\n",
        '"expert","load"\r\n0,"1,000"\r\n1,"2,500"\r\n2,30.0\r\n',
        "expert;load\n0;1,000.0\n1;2,500.0\n2;30.0\n",
        "expert;load\n0;1.000,0\n1;2.500,0\n2;30,0\n",
        "expert;load\n0;1 000\n1;2\u202f500\n2;30\n",
        "expert;load\n0;1'000\n1;2'500\n2;30\n",
        "expert,load,\n0,1e3,\n1,2.5e3,\n2,3e1,\n",
        ",expert,load\n0,0,1000\n1,1,2500\n2,2,30\n",
        "\n expert , load \n\n0,1000\n1,2500\n\n2,30\n",
    ],
)
def test_numbers_are_read_as_they_are_written(text: str, loads_file: Callable[[str], Path]) -> None:
    np.testing.assert_array_equal(read_loads(loads_file(text)).load_E, [1000, 2500, 30])


@given(loads=st.lists(st.integers(0, 10**7), min_size=2, max_size=9).filter(any), mark=st.sampled_from(",.' _"))
@settings(max_examples=100, derandomize=True, deadline=None)
def test_marks_of_thousands_change_no_ratio_or_are_asked_about(loads: list[int], mark: str) -> None:
    text = "expert;load\n" + "".join(f"{e};{load:,}\n".replace(",", mark) for e, load in enumerate(loads))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "loads.csv"
        path.write_text(text)
        try:
            load_E = read_loads(path).load_E
        except ValueError as error:
            assert "write loads without marks for thousands" in str(error)
            assert mark in ",." and any(load >= 1000 for load in loads) and any(0 < load < 1000 for load in loads)
            return
    np.testing.assert_allclose(load_E / load_E.sum(), np.array(loads) / sum(loads))


def test_marks_that_may_be_either_are_asked_about(loads_file: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"load 1.234 may be 1.234 or 1234: write loads without marks for thousands"):
        read_loads(loads_file("expert;load\n0;1.234\n1;987\n"))
    np.testing.assert_array_equal(read_loads(loads_file("expert;load\n0;0.125\n1;1\n")).load_E, [0.125, 1])
    np.testing.assert_array_equal(read_loads(loads_file("expert,load\n0,1.234\n1,987\n")).load_E, [1.234, 987])


def test_rows_without_load_may_be_left_out_where_the_number_of_experts_is_known(
    loads_file: Callable[[str], Path],
) -> None:
    path = loads_file("expert,load\n3,30\n1,10\n")
    table = read_loads(path, num_experts=5)
    np.testing.assert_array_equal(table.load_E, [0, 10, 0, 30, 0])
    assert table.notes == ("3 experts have no row in the file and were given no load.",)
    with pytest.raises(ValueError, match=r"2 of them, expert 0 for one, have no row: state num_experts"):
        read_loads(path)
    with pytest.raises(ValueError, match=r"has an expert 3, num_experts=2"):
        read_loads(path, num_experts=2)


def test_a_file_of_fewer_experts_is_not_one_whose_rows_were_left_out(loads_file: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="has 2 experts, not 4: state num_experts=2 if meant"):
        read_loads(loads_file("expert,load\n0,30\n1,10\n"), num_experts=4)


def test_files_that_follow_each_other_with_their_headers_are_added(loads_file: Callable[[str], Path]) -> None:
    table = read_loads(loads_file("expert,load\n0,3\n1,4\n\ufeffexpert,load\n1,5\n0,1\n"))
    np.testing.assert_array_equal(table.load_E, [4, 9])
    assert table.notes == ("2 files in one, each with its header: their loads were added.",)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_loads_may_be_packed(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "loads").write_bytes(pack(b"expert,load\n0,3\n1,4\n"))
    np.testing.assert_array_equal(read_loads(tmp_path / "loads").load_E, [3, 4])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expert,load,count\n0,1,1\n", "has the columns load and count, which both may be the load"),
        ("expert,load\n0,1,234\n", "line 2 has 3 cells, its header 2 (a number with commas needs quotes"),
        ("expert,load\n0.5,1\n", "line 2: expert 0.5 is no number from 0 on"),
        ("expert,load\n0,inf\n", "load of expert 0 is inf"),
        ("expert,load\n0,1e999\n", "load of expert 0 is 1e999"),
        ("expert,load\n999999999,1\n", "num_experts=1000000000 is more than 65535"),
        ("layer,expert,load\n0,0,1\nx,1,1\n", "line 3: layer x is no number"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str, loads_file: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError) as raised:
        read_loads(loads_file(text))
    assert message in str(raised.value) and "\n" not in str(raised.value)
