"""Runs of ranks whose results several files check."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from hiermoe.ranks.launch import run_ranks
from tests.dispatch import contract
from tests.dispatch.worlds import DEADLINE, TIMEOUT, WORLDS, World, cases_of


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the contract's worlds the first is quick; the deeper and larger ones are slow."""
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and getattr(item, "callspec", None)
            and item.callspec.params.get("world") in WORLDS[1:]
        ):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def contract_results() -> Callable[[World], list[dict[Any, Any]]]:
    """For a world, what every rank got from all systems on all cases; run once."""

    @cache
    def results(world: World) -> list[dict[Any, Any]]:
        return run_ranks(
            contract.run_all, world.num_ranks, (world, cases_of(world)), TIMEOUT, deadline=DEADLINE, hosts=world.hosts
        )

    return results
