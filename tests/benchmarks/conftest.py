"""A table of ratios at the end of the run: absolute times depend on the machine, ratios in one run hardly do."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import process_time
from typing import Any

import pytest
import torch


@dataclass
class Ratios:
    """What the benchmarks of a run have found.

    Attributes:
        rows: (what, ms, reference, reference ms).
        counts: (what, number, reference, its number).
        growth: by (what, letter): pairs of (size, ms).
    """

    rows: list[tuple[str, float, str, float]] = field(default_factory=list)
    counts: list[tuple[str, int, str, int]] = field(default_factory=list)
    growth: dict[tuple[str, str], list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))


RATIOS = pytest.StashKey[Ratios]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RATIOS] = Ratios()


class Measure:
    """Time a function by pytest-benchmark and a reference beside it, and keep the ratio of their shortest CPU times.

    CPU time, so that what else runs on the machine counts little; all work is on one thread.
    """

    def __init__(self, benchmark: Any, ratios: Ratios) -> None:
        self._benchmark, self._ratios = benchmark, ratios

    def __call__(
        self,
        name: str,
        function: Callable[[], Any],
        reference_name: str,
        reference: Callable[[], Any],
        *,
        times: float = 1.0,
        note: str = "",
        rounds: int = 5,
        grows_with: tuple[str, str, int] | None = None,
    ) -> None:
        """Run both.

        Args:
            name: of the row.
            function: what is benchmarked.
            reference_name: what it is compared with.
            reference: its shortest of 3 calls counts.
            times: the reference's work is this many of its calls (an extrapolation; say so in ``note``).
            note: kept in extra_info.
            rounds: of the function.
            grows_with: (curve, letter, size): a point of a growth curve.
        """
        self._benchmark.pedantic(function, rounds=rounds, warmup_rounds=1)
        if self._benchmark.stats is None:  # --benchmark-disable
            return
        ms = 1e3 * self._benchmark.stats.stats.min
        reference()
        laps = []
        for _ in range(3):
            start = process_time()
            reference()
            laps.append(process_time() - start)
        reference_ms = 1e3 * times * min(laps)
        self._benchmark.extra_info.update(
            reference=reference_name, reference_ms=reference_ms, ratio=reference_ms / ms, note=note
        )
        self._ratios.rows.append((name, ms, reference_name, reference_ms))
        if grows_with is not None:
            curve, letter, size = grows_with
            self._ratios.growth[curve, letter].append((size, ms))


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Measure]:
    """On one torch thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Measure(benchmark, request.config.stash[RATIOS])
    torch.set_num_threads(threads)


def exponent(points: list[tuple[int, float]]) -> float:
    """Slope of log ms over log size."""
    slope, _ = statistics.linear_regression([math.log(size) for size, _ in points], [math.log(ms) for _, ms in points])
    return slope


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    ratios = config.stash[RATIOS]
    if not ratios.rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section(
        "speed: shortest times in this run and their ratios; of one thread of the CPU, or of the GPU that a row names"
    )
    widths = [max(len(row[i]) for row in [("what", "", "reference"), *ratios.rows]) for i in (0, 2)]
    write(f"{'what':{widths[0]}}  {'ms':>9}  {'reference':{widths[1]}}  {'ms':>11}  {'ratio':>8}")
    for name, ms, reference, reference_ms in ratios.rows:
        write(f"{name:{widths[0]}}  {ms:9.3f}  {reference:{widths[1]}}  {reference_ms:11.1f}  {reference_ms / ms:8.1f}")
    for name, number, reference, reference_number in ratios.counts:
        write(f"{name}: {number}, {reference}: {reference_number}")
    for (curve, letter), points in ratios.growth.items():
        if len(points) > 1:
            curve_text = ", ".join(f"{size}: {ms:.1f}" for size, ms in points)
            write(f"{curve} grows as {letter}^{exponent(points):.2f}  (ms at {letter} = {curve_text})")
    write("* extrapolated: a sample of swaps, times E(E-1)/2")
