"""A trace of eight ranks, small enough to be walked through in a second."""

from pathlib import Path

import numpy as np
import pytest

from hiermoe.advice.advice_config import AdviceConfig
from hiermoe.advice.assessment import Assessment, assess
from hiermoe.advice.case import Case
from hiermoe.advice.inputs import resolve
from hiermoe.advice.systems import candidates
from hiermoe.routing.step import RoutingRequest
from hiermoe.routing.synthetic import Topic
from hiermoe.routing.trace import RoutingTrace, TraceMetadata
from hiermoe.topology.cluster import Cluster

RANKS, TOKENS, EXPERTS, TOPK, ITERATIONS = 8, 64, 32, 4, 32
SYSTEMS = ("hd1", "hd2", "hd2_moe", "hd_moe", "hiermoe", "smartmoe_f1", "tutel_2dh_padded_cf1")


def tiny_trace(iterations: int = ITERATIONS, model: str = "tiny", layers: int = 1) -> RoutingTrace:
    """Tokens of a topic like the same experts, so that there is something to group."""
    source = Topic(RoutingRequest("", EXPERTS, TOPK, RANKS, TOKENS), num_topics=4, run_length=16, strength=8.0)
    steps = [source.step(i).expert_ids_NK.numpy() for i in range(iterations * layers)]
    ids = np.stack(steps).reshape(iterations, layers, RANKS, TOKENS, TOPK)
    metadata = TraceMetadata(
        model=model,
        num_experts=EXPERTS,
        topk=TOPK,
        num_recorded=TOPK,
        router="none",
        corpus="topics",
        vocabulary=None,
        seed=0,
        training_step=list(range(iterations)),
        loss=[None] * iterations,
        layers=[*range(1, layers + 1)],
        how_made="tests/advice",
        versions={},
    )
    return RoutingTrace(ids, np.full((iterations, RANKS), TOKENS, dtype=np.int32), metadata)


@pytest.fixture(scope="session")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny trace."""
    path = tmp_path_factory.mktemp("traces") / "tiny.trace"
    tiny_trace().save(path)
    return path


def config_of(**more: object) -> AdviceConfig:
    """A question about the paper's single node."""
    values = {"cluster": Cluster.named("a6000_1x8"), "layer": 0, "tokens_per_rank": TOKENS, "seed": 0}
    return AdviceConfig.model_validate(
        {**values, "iterations": ITERATIONS, "hidden_size": 4096, "moe_ffn_hidden_size": 512, **more}
    )


@pytest.fixture(scope="session")
def case(trace_file: Path) -> Case:
    """The tiny trace on the paper's single node."""
    return resolve(config_of(trace=str(trace_file))).cases[0]


@pytest.fixture(scope="session")
def assessment(case: Case) -> Assessment:
    """Some systems on it."""
    return assess(case, *candidates(case.cluster, SYSTEMS))
