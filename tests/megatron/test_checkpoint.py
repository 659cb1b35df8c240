"""A checkpoint goes on under any system as if training had never stopped, and is there whole or not at all."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

from hiermoe.megatron.checkpoint_folder import checkpoint_path, finished_steps, newest_first  # noqa: E402
from hiermoe.narrow.corpus import Corpus, training_corpus  # noqa: E402
from hiermoe.narrow.training_config import TrainingConfig  # noqa: E402
from hiermoe.ranks.server import RankFailedError  # noqa: E402
from hiermoe.records.checksums import Damaged  # noqa: E402
from tests.megatron.moving import HIERMOE, SHUFFLED, STATIC, STOCK, Run, joined, largest_error, launch, small, system  # noqa: E402

# Decides from what it sums over four steps, so a stop after two must not lose the sum.
REPACKED = system("baselines.smartmoe.SmartMoEPolicy", "smartmoe", interval=4)
SYSTEMS = {"stock": STOCK, "static": STATIC, "shuffled": SHUFFLED, "hiermoe": HIERMOE, "repacked": REPACKED}
# Where it was saved and where it goes on, by type.
PAIRS = {
    "fp64": [("shuffled", "stock"), ("shuffled", "hiermoe"), ("stock", "shuffled"), ("repacked", "repacked")],
    "bf16": [("shuffled", "stock"), ("repacked", "repacked")],
}
STOP, STEPS = 2, 5
Seen = dict[Any, Any]


pytestmark = pytest.mark.slow


def save(run: Run, folder: Path, **options: Any) -> None:
    run.trainer.save(folder, run.finished, run.placement, **options)


def resumed(config: TrainingConfig, corpus: Corpus, name: str, checkpoint: Path) -> Run:
    run = Run(config, corpus, SYSTEMS[name])
    run.finished = run.trainer.load(checkpoint, run.placement)
    return run


def stop_and_go_on(rank: int, config: TrainingConfig, corpus: Corpus, folder: Path, pairs: list[Any]) -> Seen:
    seen: Seen = {}
    for name in dict.fromkeys(("stock", *(saved for saved, _ in pairs))):
        run = Run(config, corpus, SYSTEMS[name]).train(STOP)
        seen["saved", name] = run.copied()
        save(run, folder / name)
        if name != "shuffled":
            run.train(STEPS - STOP)
            seen["whole", name] = {"losses": run.losses, "updates": run.updates, "tensors": run.copied()}
    for saved, name in pairs:
        (checkpoint,) = newest_first(folder / saved)
        run = resumed(config, corpus, name, checkpoint)
        seen["loaded", (saved, name)] = run.copied()
        run.train(STEPS - run.finished)
        seen["resumed", (saved, name)] = {"losses": run.losses, "updates": run.updates, "tensors": run.copied()}
    return seen


@pytest.fixture(scope="module", params=["fp64", pytest.param("bf16", marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, cache_dir: str, tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    config = small("deepseek_v3", cache_dir, dtype=request.param, lr_warmup_steps=8)
    folder = tmp_path_factory.mktemp("checkpoints")
    return launch(stop_and_go_on, config, training_corpus(config), folder, PAIRS[request.param])


def cases(ranks: list[Seen]) -> list[tuple[str, str]]:
    return [key[1] for key in ranks[0] if key[0] == "resumed"]


def test_what_is_loaded_is_what_was_saved_to_the_bit(ranks: list[Seen]) -> None:
    for saved, name in cases(ranks):
        loaded = joined([rank["loaded", (saved, name)] for rank in ranks])
        assert largest_error(loaded, joined([rank["saved", saved] for rank in ranks])) == 0, (saved, name)


def test_the_same_system_goes_on_to_the_bit(ranks: list[Seen]) -> None:
    for saved, name in cases(ranks):
        if saved == name:
            for rank in ranks:
                whole, rest = rank["whole", name], rank["resumed", (saved, name)]
                assert rest["losses"] == whole["losses"][STOP:], name
                assert rest["updates"] == whole["updates"][STOP:], name
                assert largest_error(rest["tensors"], whole["tensors"]) == 0, name


def test_another_system_goes_on_with_the_same_curve(ranks: list[Seen]) -> None:
    tolerance = 1e-9 if next(iter(ranks[0]["whole", "stock"]["tensors"].values())).dtype == torch.float64 else 1e-3
    for saved, name in cases(ranks):
        rest, stock = ranks[0]["resumed", (saved, name)], ranks[0]["whole", "stock"]
        assert rest["losses"] == pytest.approx(stock["losses"][STOP:], rel=tolerance), (saved, name)
        if tolerance == 1e-9:
            tensors = joined([rank["resumed", (saved, name)]["tensors"] for rank in ranks])
            expected = joined([rank["whole", "stock"]["tensors"] for rank in ranks])
            assert largest_error(tensors, expected) < 1e-9, (saved, name)


def test_policies_do_decide_in_these_runs(ranks: list[Seen]) -> None:
    moves = [bool(updates) for updates in ranks[0]["whole", "repacked"]["updates"]]
    assert moves == [False, False, False, True, False]
    assert all(any(ranks[0]["resumed", pair]["updates"]) for pair in cases(ranks) if pair[1] != "stock")


def plain_megatron(rank: int, config: TrainingConfig, corpus: Corpus, folder: Path) -> Seen:
    """Save and load by Megatron's own functions alone."""
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    from hiermoe.megatron.checkpoint import _writers_allowed

    def bare(run: Run) -> Any:
        return unwrap_model(run.trainer.model)

    seen: Seen = {}
    for name in ("stock", "shuffled"):
        run = Run(config, corpus, SYSTEMS[name]).train(2)
        seen["saved", name] = weights(run)
        if rank == 0:
            (folder / name).mkdir()
        torch.distributed.barrier()
        with cpu.cuda_means_cpu(), _writers_allowed():
            dist_checkpointing.save(bare(run).sharded_state_dict(), str(folder / name))
    for saved, name in (("stock", "shuffled"), ("shuffled", "stock")):
        run = Run(config, corpus, SYSTEMS[name]).train(1)
        with cpu.cuda_means_cpu():
            state = dist_checkpointing.load(bare(run).sharded_state_dict(), str(folder / saved))
        bare(run).load_state_dict(state)
        seen["loaded", saved] = weights(run)
    return seen


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: x for name, x in run.copied().items() if name.endswith(" weight")}


@pytest.mark.slow
def test_megatrons_own_functions_save_and_load_logical_experts(cache_dir: str, tmp_path: Path) -> None:
    config = small("qwen3_30b_a3b", cache_dir)
    ranks = launch(plain_megatron, config, training_corpus(config), tmp_path)
    for saved in ("stock", "shuffled"):
        loaded = joined([rank["loaded", saved] for rank in ranks])
        assert largest_error(loaded, joined([rank["saved", saved] for rank in ranks])) == 0
        assert any("local_experts.7" in name for name in loaded)


def killed_in_the_third_save(rank: int, config: TrainingConfig, corpus: Corpus, folder: Path, where: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from hiermoe.megatron import checkpoint

    def die(*_args: Any, **_kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def then_die(*args: Any, **kwargs: Any) -> None:
        written(*args, **kwargs)
        die()

    written = dist_checkpointing.save
    run = Run(config, corpus, SHUFFLED)
    for step in range(3):
        run.train(1)
        if step == 2 and rank == 0:
            match where:
                case "moved":  # experts are elsewhere than the last checkpoint says
                    die()
                case "begun":
                    TorchDistSaveShardedStrategy.async_save = die  # type: ignore[method-assign]
                case "written":
                    checkpoint.dist_checkpointing.save = then_die
        save(run, folder, keep=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", [*(pytest.param(where, marks=pytest.mark.slow) for where in ("moved", "begun")), "written"]
)
def test_a_run_killed_before_its_checkpoint_is_whole_goes_on_from_the_one_before(
    where: str, cache_dir: str, tmp_path: Path
) -> None:
    config = small("qwen3_30b_a3b", cache_dir)
    corpus = training_corpus(config)
    with pytest.raises(RankFailedError, match="rank 0 of 4 died by signal SIGKILL"):
        launch(killed_in_the_third_save, config, corpus, tmp_path, where)
    assert finished_steps(newest_first(tmp_path)[0]) == 2
    assert bool(list(tmp_path.glob(".step-*"))) == (where != "moved")
    if where == "written":
        whole, rest = launch(go_on, config, corpus, tmp_path)[0]
        assert rest == whole[2:]
        # Only whole checkpoints are left.
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def go_on(rank: int, config: TrainingConfig, corpus: Corpus, folder: Path) -> tuple[list[float], list[float]]:
    """Losses of a run without a stop, and of one that goes on from the latest checkpoint."""
    rest = resumed(config, corpus, "shuffled", newest_first(folder)[0])
    while rest.finished < 4:
        rest.train(1)
        save(rest, folder, keep=2)
    return Run(config, corpus, SHUFFLED).train(4).losses, rest.losses


def save_on_a_bad_disk(rank: int, config: TrainingConfig, corpus: Corpus, folder: Path, kind: str) -> list[str]:
    """Errors of every attempt; ends with an error that it does not survive."""
    run = Run(config, corpus, SHUFFLED).train(1)
    errors = []
    save(run, folder)
    run.train(1)
    if kind == "no folder":
        (folder / "file").touch()
        try:
            save(run, folder / "file" / "inside")
        except OSError as error:
            errors.append(str(error))
    else:
        most, limits = {"full": 10_000, "full at once": 100}[kind], resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            save(run, folder)
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            if kind == "full at once":
                raise
            errors.append(str(error))
    save(run, folder)
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no folder", "full"])
def test_a_disk_that_takes_no_checkpoint_is_an_error_on_every_rank_and_training_can_go_on(
    kind: str, cache_dir: str, tmp_path: Path
) -> None:
    config = small("qwen3_30b_a3b", cache_dir)
    ranks = launch(save_on_a_bad_disk, config, training_corpus(config), tmp_path, kind)
    reason = "Not a directory" if kind == "no folder" else "File too large"
    assert all(errors == ranks[0] and len(errors) == 1 and reason in errors[0] for errors in ranks)
    assert [path.name for path in sorted(tmp_path.glob("*step-*"))] == ["step-00000001", "step-00000002"]


def test_a_rank_that_alone_cannot_write_ends_all_of_them(cache_dir: str, tmp_path: Path) -> None:
    config = small("qwen3_30b_a3b", cache_dir)
    with pytest.raises(RankFailedError, match=r"rank \d of 4 failed: OSError: cannot write the checkpoint .*step-0000"):
        launch(save_on_a_bad_disk, config, training_corpus(config), tmp_path, "full at once")
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]


def load_beside_damage(rank: int, config: TrainingConfig, corpus: Corpus, folder: Path) -> tuple[int, str]:
    """Step of the checkpoint that is taken where the newest is damaged, and what is said where both are."""
    from hiermoe.megatron.checkpoint import load_latest

    def damage(step: int) -> None:
        if rank == 0:
            shard = min(checkpoint_path(folder, step).glob("*.distcp"))
            content = bytearray(shard.read_bytes())
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
        torch.distributed.barrier()

    run = Run(config, corpus, SHUFFLED)
    for step in (1, 2):
        run.train(1)
        run.trainer.save(folder, step, run.placement)
    parts = run.trainer.model, run.trainer.optimizer, run.trainer.schedule, run.placement
    damage(2)
    step = load_latest(folder, *parts)
    damage(1)
    try:
        load_latest(folder, *parts)
    except Damaged as error:
        return step, str(error)
    return step, "nothing"


@pytest.mark.slow
def test_every_rank_takes_the_checkpoint_before_a_damaged_one(cache_dir: str, tmp_path: Path) -> None:
    config = small("qwen3_30b_a3b", cache_dir)
    seen = launch(load_beside_damage, config, training_corpus(config), tmp_path)
    assert {step for step, _ in seen} == {1}
    assert len({said for _, said in seen}) == 1 and "step-00000001" in seen[0][1]
    assert "is not what was written" in seen[0][1]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert newest_first(tmp_path) == newest_first(tmp_path / "missing") == []
    for name in ("step-00000012", "step-x", "other"):
        (tmp_path / name).mkdir()
    assert finished_steps(tmp_path / "step-00000012") == 12
    for name in ("step-x", "other", "step-00000013"):
        with pytest.raises(ValueError, match=r"is not a checkpoint|there is no such checkpoint"):
            finished_steps(tmp_path / name)
