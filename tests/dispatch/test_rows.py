"""Copies of rows and their sums are each other's adjoints, with padding, without copies and without rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hiermoe.dispatch.rows import RowCopies
from tests.planner.cases import examples

WIDTH = 5


@st.composite
def sources(draw: st.DrawFn) -> tuple[list[int], int, bool]:
    """Input row of every output, number of inputs, whether some outputs may be padding."""
    num_inputs = draw(st.integers(0, 8))
    padded = draw(st.booleans())
    last = num_inputs if padded else num_inputs - 1
    source = draw(st.lists(st.integers(0, last), max_size=20)) if last >= 0 else []
    return source, num_inputs, padded


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def row_copies(source: list[int], num_inputs: int, padded: bool = False) -> RowCopies:
    num_padding = source.count(num_inputs) if padded else 0
    all_used = {*range(num_inputs)} <= {*source}
    return RowCopies.of(torch.tensor(source, dtype=torch.int64), num_inputs, num_padding, all_used)


@examples(200)
@given(sources())
def test_copy_and_sum_do_what_a_loop_does(case: tuple[list[int], int, bool]) -> None:
    source, num_inputs, padded = case
    copies = row_copies(source, num_inputs, padded)
    x_NM, y_RM = integers(num_inputs, WIDTH), integers(len(source), WIDTH)
    copied, summed = torch.zeros(len(source), WIDTH), torch.zeros(num_inputs, WIDTH)
    for output, row in enumerate(source):
        if row < num_inputs:  # the rest is padding
            copied[output] = x_NM[row]
            summed[row] += y_RM[output]
    assert torch.equal(copies.copy(x_NM), copied)
    assert torch.equal(copies.sum(y_RM), summed)


@examples(200)
@given(sources())
def test_copy_and_sum_are_adjoint(case: tuple[list[int], int, bool]) -> None:
    source, num_inputs, padded = case
    copies = row_copies(source, num_inputs, padded)
    x_NM, y_RM = integers(num_inputs, WIDTH), integers(len(source), WIDTH)
    assert (copies.copy(x_NM) * y_RM).sum() == (x_NM * copies.sum(y_RM)).sum()


@pytest.mark.parametrize(
    ("source", "num_inputs", "padded"),
    [
        ([], 0, False),
        ([], 4, False),
        ([], 0, True),
        ([0, 0, 0], 0, True),
        ([3, 3], 3, True),
        ([2, 0, 1], 3, False),
        ([2, 2, 2, 0], 4, False),
        ([1, 0, 2], 2, True),
    ],
    ids=[
        "nothing", "no copies", "no inputs but padding allowed", "padding alone, no inputs", "padding alone",
        "a permutation", "some rows without copies", "a permutation and padding",
    ],
)  # fmt: skip
def test_shapes_at_the_edges(source: list[int], num_inputs: int, padded: bool) -> None:
    copies = row_copies(source, num_inputs, padded)
    x_NM, y_RM = integers(num_inputs, WIDTH), integers(len(source), WIDTH)
    assert copies.copy(x_NM).shape == (len(source), WIDTH)
    assert copies.sum(y_RM).shape == (num_inputs, WIDTH)
    assert (copies.copy(x_NM) * y_RM).sum() == (x_NM * copies.sum(y_RM)).sum()


def test_half_precision_rows_are_added_in_fp32_and_rounded_once() -> None:
    ones = torch.ones(300, 1, dtype=torch.bfloat16)  # added in bf16 the sum would stay at 256
    assert row_copies([0] * 300, 1).sum(ones).item() == 300
    generator = torch.Generator().manual_seed(2)
    y_RM = torch.randint(-120, 121, (200, 16), generator=generator).bfloat16()  # any sum of them is exact in fp32
    exact = torch.stack([y_RM[row::5].float().sum(0) for row in range(5)])
    summed = row_copies([row % 5 for row in range(200)], 5).sum(y_RM)
    assert summed.dtype == torch.bfloat16
    once = (exact.bfloat16().float() - exact).abs()  # what one rounding costs; either neighbour will do on ties
    assert ((summed.float() - exact).abs() <= once).all()
    assert once.any()


def test_sums_are_the_same_in_every_run_whatever_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(3)
    source = torch.randint(0, 50, (4000,), generator=generator)
    y_RM = torch.randn(4000, 64, generator=generator)
    copies = RowCopies.of(source, 50)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(copies.sum(y_RM))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
