"""Training does not depend on the system: in double precision every one gives stock Megatron's losses."""

import json
from itertools import cycle

import pytest

from hiermoe.planner.scheme import DispatchScheme
from hiermoe.policies.protocol import StaticPolicy
from hiermoe.policies.system import SystemConfig
from hiermoe.records.project import CONF
from hiermoe.records.status import NotApplicable
from hiermoe.records.store import RunStore
from hiermoe.runs.execute import execute
from hiermoe.topology.cluster import Cluster
from tests.runs.test_train import configured

MODELS = ("qwen3_30b_a3b_narrow", "deepseek_v3_narrow")
STEPS = 10
OPTIONS = [
    f"steps={STEPS}",
    "dtype=fp64",
    "learning_rate=1.0e-3",
    "world_size=8",
    "model.vocab_size=1024",  # the vocabulary does not pass through the system
    "model.num_experts=32",  # stock computes them one after another
    "corpus_files=200",
]


def schemes_of(system: SystemConfig) -> tuple[DispatchScheme, ...]:
    """Candidates on eight ranks; none where the hierarchy has too few levels or a GPU is needed."""
    if system.executor == "flex":
        return ()
    try:
        return system.build_schemes(Cluster.named("a6000_4x8").reduced(8).hierarchy)
    except NotApplicable:
        return ()


def cases() -> list[tuple[str, str]]:
    """System and model: every lossless scheme and every policy that moves experts, with either model in turn.

    tests/megatron/test_dispatcher_layers.py has every scheme with both, in one layer.
    """
    systems = [SystemConfig.named(path.stem) for path in sorted((CONF / "system").glob("*.yaml"))]
    behaviours: dict[str, str] = {}
    for system in systems:
        schemes = schemes_of(system)
        if not schemes or any(scheme.lossy for scheme in schemes) or system.name == "megatron" or system.makes_copies:
            continue
        if isinstance(system.build_policy(), StaticPolicy):
            behaviours.setdefault(json.dumps([system.schemes, system.executor], sort_keys=True), system.name)
        else:
            behaviours.setdefault(f"{system.policy['_target_']} {system.migration}", system.name)
    return list(zip(behaviours.values(), cycle(MODELS), strict=False))


def losses(system: str, model: str, store: RunStore) -> list[float]:
    """Of all steps."""
    config = configured(f"system={system}", f"model={model}", "+cluster.overlap=1.0", *OPTIONS)
    outcome = execute(config, store)
    assert (outcome.status, outcome.reason) == ("ok", "")
    records = store.read(outcome.run_id)
    return records[records["rank"] == 0].sort_values("iteration")["loss"].tolist()


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Stock Megatron's losses of every model."""
    store = RunStore(tmp_path_factory.mktemp("stock"))
    return {model: losses("megatron", model, store) for model in MODELS}


@pytest.mark.slow
@pytest.mark.parametrize(("system", "model"), cases())
def test_every_lossless_system_trains_like_stock(
    system: str, model: str, stock: dict[str, list[float]], store: RunStore
) -> None:
    seen = losses(system, model, store)
    assert len(seen) == STEPS
    difference = max(abs(ours / theirs - 1) for ours, theirs in zip(seen, stock[model], strict=True))
    print(f"{system} {model}: largest relative difference of {STEPS} losses {difference:.1e}")
    assert difference <= 1e-9
    assert stock[model][-1] < stock[model][0]
