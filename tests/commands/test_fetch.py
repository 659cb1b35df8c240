"""`hiermoe trace fetch`: public sets are listed, brought by git or taken from a folder, and run on."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from hiermoe.records.groups import file_of
from hiermoe.records.project import CODE
from hiermoe.records.store import RunStore
from hiermoe.routing import public
from hiermoe.routing.importers import IMPORTERS
from hiermoe.routing.trace import RoutingTrace
from tests.conftest import Command
from tests.routing.importers.files import some_ids, write_esft, write_npz
from tests.routing.importers.test_round_trips import flat

NAME = "deepseek_v2_lite_law"
IDS = some_ids(layers=2, tokens=96, topk=6, num_experts=64)
REAL = CODE.parent / "shared" / "data" / "routes"


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the set's trace will be."""
    folder = tmp_path / "fetched"
    for module in ("hiermoe.routing.public", "hiermoe.routing.trace"):
        monkeypatch.setattr(f"{module}.PUBLIC", folder)
    return folder / f"{NAME}.trace"


def described(folder: Path, monkeypatch: pytest.MonkeyPatch, url: str, commit: str = "null") -> None:
    """The set, in another repository."""
    text = file_of("public", NAME).read_text()
    lines = [f"url: {url}" if line.startswith("url:") else line for line in text.splitlines()]
    lines = [f"commit: {commit}" if line.startswith("commit:") else line for line in lines]
    (folder / "public").mkdir(parents=True)
    (folder / "public" / f"{NAME}.yaml").write_text("\n".join(lines))
    for root in ("CONF", "OWN"):  # one folder in a checkout
        monkeypatch.setattr(f"hiermoe.records.groups.{root}", folder)


def test_every_set_is_named_as_its_file_and_of_a_known_form(hiermoe: Command, fetched: Path) -> None:
    code, out, _ = hiermoe("trace", "fetch")
    assert code == 0
    for name, known in public.public_sets().items():
        assert known.name == name and known.form in IMPORTERS
        assert f"{name}: {known.what}" in out and known.url in out and known.licence in out
    assert len(out.splitlines()) == len(public.public_sets())


def test_a_set_of_ones_own_is_beside_them(
    hiermoe: Command, fetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own" / "public").mkdir(parents=True)
    text = file_of("public", NAME).read_text().replace(f"name: {NAME}", "name: mine")
    (tmp_path / "own" / "public" / "mine.yaml").write_text(text)
    monkeypatch.setattr("hiermoe.records.groups.OWN", tmp_path / "own")
    code, out, _ = hiermoe("trace", "fetch")
    assert code == 0 and "mine: " in out and f"{NAME}: " in out


def test_git_brings_the_set_alone(
    hiermoe: Command, fetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "ESFT"
    (repository / "results/expert_scores").mkdir(parents=True)
    write_esft(repository / "results/expert_scores/law", IDS)
    write_esft(repository / "results/expert_scores/intent", IDS[:, :5])
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    for step in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *step], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    described(tmp_path / "sets", monkeypatch, f"file://{repository}", commit)
    code, out, err = hiermoe("trace", "fetch", NAME)
    assert code == 0, err
    assert "2 of them (form esft)" in out and "1 x 2 x 1 x 96 x 6 of 64 experts" in out
    trace = RoutingTrace.load(fetched)
    np.testing.assert_array_equal(flat(trace), IDS)
    assert trace.metadata.layers == [2, 3] and trace.metadata.model == "deepseek_v2_lite"
    assert f"Public set {NAME}" in trace.metadata.notes and "licence MIT" in trace.metadata.notes
    assert [each.name for each in fetched.parent.iterdir()] == [fetched.name], "nothing else is left"


def test_without_network_it_is_said_what_to_put_where(
    hiermoe: Command, fetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described(tmp_path / "sets", monkeypatch, f"file://{tmp_path}/gone")
    code, out, err = hiermoe("trace", "fetch", NAME)
    assert code == 2 and out == "" and len(err.strip().splitlines()) == 1
    assert f"put results/expert_scores/law of file://{tmp_path}/gone into a folder" in err
    assert f"hiermoe trace fetch {NAME} --from FOLDER" in err and not fetched.exists()
    assert not list(fetched.parent.iterdir())


@pytest.mark.parametrize("name", ["flame_moe", "moe_expert_selection_trace"])
def test_a_set_that_git_does_not_bring_says_what_it_needs(name: str, hiermoe: Command, fetched: Path) -> None:
    code, _, err = hiermoe("trace", "fetch", name)
    needs = public.public_set(name).needs
    assert code == 2 and needs is not None and needs in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("place", ["results/expert_scores/law", ".", "npz"])
def test_a_folder_is_taken_instead(place: str, hiermoe: Command, fetched: Path, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    if place == "npz":
        write_npz(folder / f"{NAME}.npz", IDS)
    else:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        write_esft(folder / place, IDS)
    code, _, err = hiermoe("trace", "fetch", NAME, "--from", str(folder))
    assert code == 0, err
    trace = RoutingTrace.load(fetched)
    np.testing.assert_array_equal(flat(trace), IDS)
    assert trace.metadata.layers == [2, 3]


def test_bad_words_are_refused(hiermoe: Command, fetched: Path, tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", IDS)
    for arguments, message in (
        (["nothing"], "public=nothing is unknown"),
        ([NAME, "--from", str(tmp_path / "gone")], "there is no such folder"),
        ([NAME, "--from", str(tmp_path)], "no form is recognized in it"),
        (["flame_moe", "--from", str(write_esft(tmp_path / "law", IDS))], "flame_moe is of the form parquet"),
        (["--from", str(tmp_path)], "name the set that it has"),
    ):
        code, out, err = hiermoe("trace", "fetch", *arguments)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and out == ""


def a_run(hiermoe: Command, *more: str) -> tuple[int, str, str]:
    return hiermoe(
        "run", "system=hiermoe", "cluster=a6000_1x8", "routing=public", f"routing.source.name={NAME}",
        "iterations=4", "tokens_per_rank=16", "wandb.mode=disabled", *more,
    )  # fmt: skip


def test_a_run_asks_for_the_set_and_then_runs_on_it(
    hiermoe: Command, fetched: Path, tmp_path: Path, store: RunStore
) -> None:
    code, _, err = a_run(hiermoe, "model=deepseek_v2_lite")
    assert code != 0 and f"bring it by: hiermoe trace fetch {NAME}" in err
    hiermoe("trace", "fetch", NAME, "--from", str(write_esft(tmp_path / "law", IDS)))
    code, out, err = a_run(hiermoe, "model=deepseek_v2_lite", "routing.source.layer=1")
    assert code == 0 and "HierMoE" in out, err
    code, _, err = a_run(hiermoe, "model=qwen3_30b_a3b")
    assert code != 0 and "num_experts=64, the model has 128; it is of model=deepseek_v2_lite" in err


def test_a_fetched_set_is_a_trace_by_its_name(hiermoe: Command, fetched: Path, tmp_path: Path) -> None:
    hiermoe("trace", "fetch", NAME, "--from", str(write_esft(tmp_path / "law", IDS)))
    code, out, err = hiermoe("trace", "show", NAME, "--cluster", "a6000_1x8")
    assert code == 0 and "96 tokens" in out, err


@pytest.mark.skipif(not REAL.is_dir(), reason="the data of DeepSeek-V2-Lite is not beside the project")
def test_deepseek_v2_lite_is_taken_from_its_folder(hiermoe: Command, fetched: Path) -> None:
    code, out, err = hiermoe("trace", "fetch", NAME, "--from", str(REAL))
    assert code == 0 and "1 x 26 x 1 x 8327 x 6 of 64 experts" in out, err
    assert RoutingTrace.load(fetched).metadata.layers == list(range(2, 28))
