"""Megatron's routing map becomes ids, or is refused."""

import pytest
import torch

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

from hiermoe.megatron.adapter import chosen_experts  # noqa: E402


def test_map_becomes_the_experts_of_every_token() -> None:
    routing_map = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]], dtype=torch.bool)
    assert chosen_experts(routing_map, 2).tolist() == [[1, 3], [0, 1]]
    assert chosen_experts(routing_map[:0], 2).shape == (0, 2)


@pytest.mark.parametrize("rows", [[[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 0, 0, 0], [1, 1, 0, 0]]])
def test_tokens_with_other_numbers_of_experts_are_refused_though_the_total_may_fit(rows: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="choices of 2 tokens, not 2 of each"):
        chosen_experts(torch.tensor(rows, dtype=torch.bool), 2)
