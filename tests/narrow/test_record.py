"""`hiermoe record` trains on two gloo ranks and writes a trace of what the routers chose."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from hiermoe.megatron.checkpoint_folder import finished_steps
from hiermoe.narrow.record import max_over_mean_load, record
from hiermoe.narrow.record_config import BalancingWarmup
from hiermoe.ranks.server import RankFailedError
from hiermoe.records.store import RunStore
from hiermoe.routing.trace import RoutingTrace
from tests.conftest import Command
from tests.narrow.tiny_run import TINY, composed, tiny_record_config

SOFTMAX = ["model=qwen3_30b_a3b_narrow", "model.num_experts=8", "model.topk=2", "num_recorded=4"]
GROUPED = [
    "model=deepseek_v3_narrow",
    "model.num_experts=8",
    "model.topk=2",
    "model.router.num_groups=4",
    "model.router.group_topk=2",
    "num_recorded=4",
]


def recorded(overrides: list[str], cache_dir: str, output: Path) -> RoutingTrace:
    record(tiny_record_config(cache_dir, str(output), *overrides), command="hiermoe record tiny")
    return RoutingTrace.load(output.with_stem(f"{output.stem}_late"))


@pytest.fixture(scope="module")
def softmax_trace(cache_dir: str, tmp_path_factory: pytest.TempPathFactory) -> RoutingTrace:
    return recorded(SOFTMAX, cache_dir, tmp_path_factory.mktemp("softmax") / "a.trace")


@pytest.fixture(scope="module")
def grouped_trace(cache_dir: str, tmp_path_factory: pytest.TempPathFactory) -> RoutingTrace:
    return recorded(GROUPED, cache_dir, tmp_path_factory.mktemp("grouped") / "b.trace")


def test_trace_has_a_row_for_every_token_of_every_recorded_step(softmax_trace: RoutingTrace) -> None:
    assert softmax_trace.expert_ids.shape == (3, 2, 8, 8, 4)  # steps, layers, logical ranks, tokens, experts
    assert (softmax_trace.num_tokens == 8).all()


def test_trace_says_how_it_was_made(softmax_trace: RoutingTrace) -> None:
    metadata = softmax_trace.metadata
    assert metadata.training_step == [2, 3, 4]
    assert len(metadata.loss) == 3
    assert metadata.layers == [1, 2]
    assert metadata.how_made == "hiermoe record tiny"
    assert metadata.router == "softmax, global_aux_loss 0.001"
    assert "tokens of a byte-level BPE, vocabulary 512" in metadata.corpus
    assert metadata.versions.keys() == {"python", "hiermoe", "torch", "megatron-core", "tokenizers"}


def test_sigmoid_router_with_bias_and_group_limit_is_recorded_with_its_limit(grouped_trace: RoutingTrace) -> None:
    assert grouped_trace.metadata.layers == [2]  # the first layer is dense
    groups = np.sort(grouped_trace.expert_ids // 2, axis=-1)
    assert (np.diff(groups, axis=-1) > 0).sum(axis=-1).max() < 2  # at most 2 of 4 groups


def test_the_same_command_gives_the_same_trace(grouped_trace: RoutingTrace, cache_dir: str, tmp_path: Path) -> None:
    again = recorded(GROUPED, cache_dir, tmp_path / "again.trace")
    assert np.array_equal(again.expert_ids, grouped_trace.expert_ids)
    assert again.metadata == grouped_trace.metadata


def test_a_failing_rank_ends_the_run_without_a_trace(cache_dir: str, tmp_path: Path) -> None:
    (tmp_path / "folder_late").mkdir()  # rank 0 cannot replace a folder by a file
    config = tiny_record_config(cache_dir, str(tmp_path / "folder"), *SOFTMAX, "stages.late={after: 0, steps: 1}")
    with pytest.raises(RankFailedError, match="rank 0 of 2 failed: IsADirectoryError"):
        record(config, command="")


def test_a_run_that_was_ended_goes_on_from_its_checkpoint_to_the_same_traces(cache_dir: str, tmp_path: Path) -> None:
    stages = ["+stages.early={after: 1, steps: 1}", "stages.late.after=4", "checkpoint_every=3"]
    stages.append(f"checkpoint_dir={tmp_path / 'checkpoints'}")
    config = tiny_record_config(cache_dir, str(tmp_path / "a.trace"), *GROUPED, *stages)
    (tmp_path / "a_late.trace").mkdir()
    with pytest.raises(RankFailedError):
        record(config, command="")  # ends when it writes the last trace, after a checkpoint of three steps
    (tmp_path / "a_late.trace").rmdir()
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*")
    assert finished_steps(checkpoint) == 3
    early = (tmp_path / "a_early.trace").stat().st_mtime_ns

    record(config, command="")
    assert (tmp_path / "a_early.trace").stat().st_mtime_ns == early  # so it did not begin anew
    assert not list((tmp_path / "checkpoints").iterdir())
    whole = config.model_copy(update={"output": str(tmp_path / "b.trace")})
    record(whole, command="")
    for stage in ("early", "late"):
        resumed, uninterrupted = (RoutingTrace.load(tmp_path / f"{name}_{stage}.trace") for name in "ab")
        assert np.array_equal(resumed.expert_ids, uninterrupted.expert_ids)
        assert resumed.metadata == uninterrupted.metadata


@pytest.mark.slow
def test_a_stage_whose_trace_is_gone_is_recorded_again(cache_dir: str, tmp_path: Path) -> None:
    stages = ["+stages.early={after: 1, steps: 1}", "stages.late.after=4", "checkpoint_every=3"]
    stages.append(f"checkpoint_dir={tmp_path / 'checkpoints'}")
    config = tiny_record_config(cache_dir, str(tmp_path / "a.trace"), *GROUPED, *stages)
    (tmp_path / "a_late.trace").mkdir()
    with pytest.raises(RankFailedError):
        record(config, command="")
    (tmp_path / "a_late.trace").rmdir()
    (tmp_path / "a_early.trace").unlink()
    record(config, command="")  # from the beginning: its only checkpoint is later than the lost trace
    assert RoutingTrace.load(tmp_path / "a_early.trace").metadata.training_step == [1]


@pytest.mark.slow
def test_the_trained_model_stays_for_a_training_on_more_ranks(
    hiermoe: Command, cache_dir: str, store: RunStore, tmp_path: Path
) -> None:
    def losses(steps: int, *output: str) -> list[float | None]:
        recording = ["ep_size=2", "data_parallel=1", "balancing_warmup.aux_loss_times=1", f"stages.late.steps={steps}"]
        config = tiny_record_config(cache_dir, str(tmp_path / "a.trace"), *SOFTMAX, *recording, *output)
        record(config, command="")
        return RoutingTrace.load(tmp_path / "a_late.trace").metadata.loss

    with pytest.raises(ValueError, match="model_output needs ep_size=2"):
        tiny_record_config(cache_dir, "a.trace", "model_output=a")
    begun = losses(3, f"model_output={tmp_path}")
    (checkpoint,) = tmp_path.glob("step-*")
    assert finished_steps(checkpoint) == 5
    model = [word for word in (*SOFTMAX, *TINY) if word.partition("=")[0].startswith(("model", "seq", "corpus"))]
    where = ["world_size=4", "cluster=a6000_4x8", "sequences_per_step=4", f"cache_dir={cache_dir}"]
    run = ["system=hd2", "steps=8", "lr_warmup_steps=100", f"resume={checkpoint}"]
    code, _, err = hiermoe("train", *model, *where, *run)
    assert code == 0, err
    (folder,) = store.folder.iterdir()
    trained = store.read(folder.name).query("rank == 0")
    assert trained["iteration"].tolist() == [5, 6, 7]
    gone_on = losses(6)
    assert gone_on[:3] == begun
    assert trained["loss"].tolist() == pytest.approx(gone_on[3:], rel=1e-3)
    assert trained["loss"].tolist() != pytest.approx(gone_on[:3], rel=1e-3)


def test_balancing_falls_geometrically_to_the_models_own() -> None:
    warmup = BalancingWarmup(aux_loss_times=16.0, bias_rate_times=81.0, steps=4)
    assert warmup.at(0) == (16.0, 81.0)
    assert warmup.at(2) == pytest.approx((4.0, 9.0))
    assert warmup.at(4) == warmup.at(100) == (1.0, 1.0)


def test_load_is_the_busiest_experts_share_over_the_mean() -> None:
    ids = np.array([[[0, 1, 3], [0, 2, 1]], [[0, 1, 2], [2, 3, 0]]])  # the third choice does not count
    assert max_over_mean_load(ids, num_experts=4, topk=2).tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.num_experts=64"],
        ["model.num_experts=256"],
        ["model.num_layers=5", "layers=[1,5]"],
        ["model=deepseek_v3_narrow", "layers=[2]"],
    ],
    ids=" ".join,
)
def test_other_shapes_compose(overrides: list[str]) -> None:
    composed(overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ep_size=3"], "num_experts=128 is not divisible by ep_size=3"),
        (["sequences_per_step=7"], "sequences_per_step=7 is not divisible by world_size=2"),
        (["logical_ranks=31"], "sequences_per_step * seq_length = 8192 is not divisible by logical_ranks=31"),
        (["num_recorded=7"], "num_recorded=7 is outside 8..128"),
        (["model=deepseek_v3_narrow", "num_recorded=129"], "num_recorded=129 is outside 8..128"),
        (["model=deepseek_v3_narrow", "layers=[1]"], "layers=[1] have no experts; MoE layers are [2, 3, 4]"),
        (["model.topk=129"], "model: topk=129 exceeds num_experts=128"),
        (["stages.late.steps=0"], "stages.late.steps=0: Input should be greater than 0"),
        (["stages.early.steps=2442"], "stages: early is not over when late begins, after 2800 steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_named_before_any_rank_starts(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        composed(overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, ValidationError)
