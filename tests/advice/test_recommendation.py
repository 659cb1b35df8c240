"""Each rule of the ladder, on numbers made for it."""

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from hiermoe.advice.recommendation import (
    FEWEST_FOR_INTERVALS,
    HORIZON_STEPS,
    PLACEMENT_PAYS_FROM,
    RESOLUTION,
    STAY_BELOW_GAIN,
    TIE,
    Constants,
    Option,
    Recommendation,
    constants_of,
    recommend,
)
from hiermoe.topology.cluster import Cluster

N = 16


def option(
    name: str,
    ms: float,
    *,
    moved_ms: float | None = None,
    stages: int = 2,
    lossy: bool = False,
    noise: float = 0.0,
    n: int = N,
) -> Option:
    wave = np.where(np.arange(n) % 2, 1 + noise, 1 - noise)
    return Option(name, ms * wave, moved_ms or 0.0, moved_ms is not None, stages, lossy)


FLAT = option("flat", 100.0, stages=1)


def answer(*options: Option, constants: Constants = "calibrated", share: float | None = None) -> Recommendation:
    return recommend([FLAT, *options], constants, share)


def test_stays_where_nothing_is_faster() -> None:
    found = answer(option("hd2", 130.0), option("moving", 99.0, moved_ms=5.0))
    assert (found.outcome, found.chosen, found.fastest) == ("stay", "flat", "moving")


@pytest.mark.parametrize(
    ("saved", "outcome"), [(STAY_BELOW_GAIN - 0.001, "stay"), (STAY_BELOW_GAIN + 0.001, "unresolved")]
)
def test_stays_below_a_named_gain(saved: float, outcome: str) -> None:
    assert answer(option("hd2", 100 * (1 - saved))).outcome == outcome


@pytest.mark.parametrize(("share", "outcome"), [(0.01, "stay"), (0.3, "dispatch"), (None, "dispatch")])
def test_stays_where_alltoall_is_too_little_of_the_step(share: float | None, outcome: str) -> None:
    found = answer(option("hd2", 50.0), share=share)
    assert found.outcome == outcome
    assert ("1.0% of the step" in found.why) == (outcome == "stay")


@pytest.mark.parametrize("constants", list(RESOLUTION))
@pytest.mark.parametrize(("beside", "outcome"), [(-0.01, "unresolved"), (0.01, "dispatch")])
def test_gain_counts_from_what_the_constants_resolve(constants: Constants, beside: float, outcome: str) -> None:
    found = answer(option("hd2", 100 / (1 + RESOLUTION[constants] + beside)), constants=constants)
    assert (found.outcome, found.chosen, found.resolution) == (outcome, "hd2", RESOLUTION[constants])


def test_gain_that_its_interval_does_not_tell_from_none_is_unresolved() -> None:
    step_ms = np.full(N, 120.0)
    step_ms[3] = -600.0 + 16  # one iteration makes the whole gain
    found = answer(Option("hd2", step_ms, 0.0, False, 2, False))
    assert found.speedup.value > 1.15 and found.speedup.low < 1
    assert found.outcome == "unresolved" and "does not exclude 1" in found.why


def test_few_iterations_are_judged_without_interval() -> None:
    n = FEWEST_FOR_INTERVALS - 1
    step_ms = np.full(n, 120.0)
    step_ms[1] = -220.0
    found = recommend([option("flat", 100.0, n=n), Option("hd2", step_ms, 0.0, False, 2, False)], "calibrated", None)
    assert found.speedup.low < 1 and found.outcome == "dispatch"


def test_takes_the_fewest_stages_of_dispatches_as_fast_as_each_other() -> None:
    near, far = 60 * (1 + TIE * 0.9), 60 * (1 + TIE * 1.1)
    assert answer(option("hd3", 60.0, stages=3), option("hd2", near)).chosen == "hd2"
    assert answer(option("hd3", 60.0, stages=3), option("hd2", far)).chosen == "hd3"


@pytest.mark.parametrize(("more", "outcome"), [(-0.005, "dispatch"), (0.005, "placement")])
def test_moves_experts_only_where_that_saves_enough(more: float, outcome: str) -> None:
    moving = option("moving", 60 / (1 + PLACEMENT_PAYS_FROM + more), moved_ms=0.001)
    found = answer(option("hd2", 60.0), moving)
    assert found.outcome == outcome
    assert found.chosen == ("moving" if outcome == "placement" else "hd2")


@pytest.mark.parametrize(("computes", "outcome"), [(-0.1, "placement"), (0.1, "dispatch")])
def test_moves_no_experts_where_the_busiest_gpu_computes_longer_than_that_saves(computes: float, outcome: str) -> None:
    still = replace(option("hd2", 60.0), whole_ms=100.0)
    moving = replace(option("moving", 40.0, moved_ms=1.0 * HORIZON_STEPS), whole_ms=99.0 + computes)
    found = answer(still, moving)
    assert found.outcome == outcome
    assert ("would compute for longer" in found.why) == (outcome == "dispatch")
    assert answer(option("hd2", 60.0), replace(moving, whole_ms=None)).outcome == "placement"


def test_placement_that_costs_more_than_it_saves_in_time_is_left() -> None:
    saves_ten_ms_a_step = 10.0
    cheap = option("moving", 50.0, moved_ms=0.1 * saves_ten_ms_a_step * HORIZON_STEPS)
    dear = option("moving", 50.0, moved_ms=0.9 * saves_ten_ms_a_step * HORIZON_STEPS)
    assert answer(option("hd2", 60.0), cheap).outcome == "placement"
    assert answer(option("hd2", 60.0), dear).outcome == "dispatch"


def test_of_placements_as_good_as_each_other_the_one_that_moves_least() -> None:
    much, little = option("much", 40.0, moved_ms=300.0), option("little", 40.5, moved_ms=20.0)
    assert answer(option("hd2", 60.0), much, little).chosen == "little"


def test_system_that_drops_tokens_is_never_recommended() -> None:
    found = answer(option("dropping", 20.0, lossy=True), option("hd2", 60.0))
    assert (found.chosen, found.fastest) == ("hd2", "hd2")


def test_nothing_to_compare_with_is_refused() -> None:
    with pytest.raises(ValueError, match="no system to compare"):
        answer(option("dropping", 20.0, lossy=True))


def with_source(source: str, published: bool) -> Cluster:
    cluster = Cluster.named("a6000_1x8")
    assert cluster.world is not None
    return cluster.model_copy(
        update={"world": cluster.world.model_copy(update={"source": source, "published": published})}
    )


@pytest.mark.parametrize(
    ("source", "published", "kind"),
    [
        ("Fig. 9", True, "published"),
        ("beta x 2/3", False, "derived"),
        ("data sheet of the card", False, "data sheet"),
        ("Data sheet: 400 Gb/s", False, "data sheet"),
        ("calibrated on host on 2026-01-01", False, "published"),  # the other levels are the paper's
    ],
)
def test_constants_are_as_certain_as_the_least_certain_of_them(source: str, published: bool, kind: str) -> None:
    assert constants_of(with_source(source, published)) == kind


def test_cluster_that_was_calibrated_throughout_is_called_so() -> None:
    cluster = Cluster.named("a6000_1x8")
    text = cluster.model_dump_json()
    for peers in cluster.exchanges:
        text = text.replace(cluster.constants(peers).source, "calibrated on 8 ranks")
    try:
        assert constants_of(Cluster.model_validate_json(text)) == "calibrated"
    except ValidationError as error:  # pragma: no cover
        raise AssertionError(text) from error
