"""Every file in conf/routing/ is a source that keeps the promises of RoutingSource."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hiermoe.policies.system import build
from hiermoe.records.project import CONF
from hiermoe.routing.step import RoutingRequest, RoutingSource, RoutingStep
from tests.routing.worlds import a_request

FILES = sorted((CONF / "routing").glob("*.yaml"))
SYNTHETIC = [file for file in FILES if file.stem not in ("recorded", "resampled", "public")]
REQUESTS = {
    "paper": a_request(num_groups=8, group_topk=4),
    "one_node": a_request(num_experts=64, topk=6, num_ranks=8, num_groups=8, group_topk=2),
    "wide": a_request(num_experts=256, topk=10, tokens_per_rank=7, num_groups=8, group_topk=4),
}
each_file = pytest.mark.parametrize("file", SYNTHETIC, ids=lambda file: file.stem)


def source_of(file: Path, request: RoutingRequest) -> RoutingSource:
    spec: dict[str, Any] = yaml.safe_load(file.read_text())["source"]
    return build(spec, request=request)


def same(a: RoutingStep, b: RoutingStep) -> bool:
    return torch.equal(a.expert_ids_NK, b.expert_ids_NK) and torch.equal(a.source_N, b.source_N)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file_is_named_for_its_routing_and_says_what_it_is(file: Path) -> None:
    text = file.read_text()
    assert text.startswith("# ")
    assert yaml.safe_load(text)["name"] == file.stem


@pytest.mark.parametrize("request_name", REQUESTS)
@each_file
def test_every_token_has_distinct_experts_in_range(file: Path, request_name: str) -> None:
    request = REQUESTS[request_name]
    source = source_of(file, request)
    assert source.num_distinct is None
    for iteration in range(3):
        step = source.step(iteration)
        ordered = step.expert_ids_NK.sort(dim=1).values
        assert step.expert_ids_NK.dtype == step.source_N.dtype == torch.int64
        assert step.expert_ids_NK.shape == (len(step.source_N), request.topk)
        assert (ordered[:, 1:] > ordered[:, :-1]).all()
        assert int(ordered.min()) >= 0
        assert int(ordered.max()) < request.num_experts == step.num_experts
        assert (step.source_N[1:] >= step.source_N[:-1]).all()
        assert step.num_ranks == request.num_ranks
        assert int(torch.bincount(step.source_N).max()) <= request.tokens_per_rank


@each_file
def test_step_depends_on_seed_and_iteration_alone(file: Path) -> None:
    request = REQUESTS["paper"]
    walked, fresh = source_of(file, request), source_of(file, request)
    torch.manual_seed(1)
    steps = [walked.step(i) for i in range(4)]
    torch.manual_seed(2)
    for iteration in (3, 0):
        assert same(fresh.step(iteration), steps[iteration])
    assert not torch.equal(steps[0].expert_ids_NK, steps[3].expert_ids_NK)
    other_seed = source_of(file, a_request(num_groups=8, group_topk=4, seed=1))
    assert not torch.equal(other_seed.step(0).expert_ids_NK, steps[0].expert_ids_NK)


def test_no_two_families_share_their_randomness() -> None:
    first = [source_of(file, REQUESTS["paper"]).step(2).expert_ids_NK for file in SYNTHETIC]
    for i, a in enumerate(first):
        for b in first[i + 1 :]:
            assert float((a[:64] == b[:64]).float().mean()) < 0.1


@each_file
def test_negative_iteration_or_seed_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="iteration=-1 must be at least 0"):
        source_of(file, REQUESTS["paper"]).step(-1)
    with pytest.raises(ValueError, match="seed=-3 must be at least 0"):
        source_of(file, a_request(num_groups=8, group_topk=4, seed=-3)).step(0)
