"""The command from end to end: what it writes, what it says, and what it refuses."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from hiermoe.records.project import CONF
from tests.advice.conftest import EXPERTS, tiny_trace
from tests.conftest import Command

NODE = ["cluster=a6000_1x8", "tokens_per_rank=64"]
SIZES = ["hidden_size=4096", "moe_ffn_hidden_size=512"]
FEW = "systems=[hd2,hd_moe,hiermoe,smartmoe_f1]"
FIGURES = {"overview", "systems", "traffic", "placement", "sensitivity"}


ASSUMED = ("ms a step", "speed-up", "present share", "step under", "distinct", "duplication", "MB a GPU", "paid back")


def cells(markdown: str) -> Iterator[tuple[str, str]]:
    """Heading and content of every cell of every table."""
    header: list[str] = []
    for line in markdown.splitlines():
        row = [cell.strip() for cell in line[1:-1].split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = row
        elif not line.startswith("|---"):
            yield from zip(header, row, strict=True)


def plain(text: str) -> str:
    """Without line breaks and frames."""
    return re.sub(r"[\s│]+", " ", text)


def test_trace_gives_a_page_tables_and_the_short_of_it(trace_file: Path, tmp_path: Path, hiermoe: Command) -> None:
    picture = tmp_path / "small" / "advice.png"
    arguments = [f"trace={trace_file}", *NODE, *SIZES, FEW, "share=0.4", f"output={tmp_path}", f"picture={picture}"]
    code, out, err = hiermoe("advise", *arguments)
    assert (code, err) == (0, "")
    assert "HD2" in out and "Megatron-LM" in out and "recorded routing of tiny, layer 1" in out
    page, text = (tmp_path / "advice.html").read_text(), (tmp_path / "advice.md").read_text()
    assert page.count("data:image/png;base64") == len(FIGURES) and 'src="figures' not in page
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == FIGURES
    bold = text.splitlines()[2]
    assert bold.startswith("**Use ") and "40% of it" in bold and bold.strip("*")[:40] in plain(out)
    assert "published for the paper's testbed" in text and "hiermoe advise trace=" in text
    systems = pd.read_csv(tmp_path / "figures" / "systems.csv")
    assert {"megatron", "hd2", "hd_moe", "hiermoe", "smartmoe_f1"} == set(systems["system"])
    assert systems["n"].eq(16).all() and systems["low"].le(systems["speedup"]).all()
    assert "†" not in text
    steps, by_name = pd.read_csv(tmp_path / "figures" / "end_to_end.csv"), systems.set_index("system")
    step_ms, moved_ms = by_name["step_ms"].to_dict(), by_name["moved_ms"].to_dict()
    for name in steps.columns[1:]:
        communication = (step_ms[name] + moved_ms[name] / 1000) / step_ms["megatron"]
        at_forty = steps.loc[np.isclose(steps["alltoall_share"], 0.4), name].item()
        assert at_forty == pytest.approx(1 / (0.6 + 0.4 * communication))
    with Image.open(picture) as small:
        assert small.width == 1100


def test_systems_with_copies_alone_are_held_against_those_without(
    trace_file: Path, tmp_path: Path, hiermoe: Command
) -> None:
    arguments = [*NODE, *SIZES, "systems=[ultraep]", "copies=true", f"output={tmp_path}"]
    code, out, err = hiermoe("advise", f"trace={trace_file}", *arguments)
    assert (code, err) == (0, "")
    assert "HD-MoE" in out and "UltraEP" in (tmp_path / "advice.md").read_text()


@pytest.mark.slow
def test_loads_mark_every_number_that_takes_experts_to_be_independent(tmp_path: Path, hiermoe: Command) -> None:
    loads = tmp_path / "loads.csv"
    loads.write_text("expert,load\n" + "\n".join(f"{e},{100 + 5 * e}" for e in range(EXPERTS)))
    arguments = [f"loads={loads}", "topk=4", *NODE, *SIZES, FEW, "iterations=16", f"output={tmp_path}"]
    code, out, _ = hiermoe("advise", *arguments)
    assert code == 0 and "cannot be known from loads" in plain(out)
    text = (tmp_path / "advice.md").read_text()
    columns: set[str] = set()
    for header, value in cells(text):
        if any(word in header for word in ASSUMED) and value not in ("", "1", "never", "0"):
            columns.add(header)
            assert "†" in value, f"{header}: {value}"
    seen = {word for word in ASSUMED if any(word in header for header in columns)}
    assert seen >= set(ASSUMED) - {"paid back"}  # which may be never
    marked = re.findall(r"\d×(.)", text)
    assert marked and set(marked) == {"†"}  # every speed-up
    assert "any routing with this K" in text and "50% to 75%" in text


@pytest.mark.slow
def test_synthetic_routing_is_called_so(tmp_path: Path, hiermoe: Command) -> None:
    arguments = ["routing=uniform", "model=deepseek_v3", *NODE, "systems=[hd2]", "iterations=4", f"output={tmp_path}"]
    code, out, _ = hiermoe("advise", *arguments)
    assert code == 0
    for condition in ("Routing is synthetic (uniform)", "4 of 8 groups", "Only 2 held-out iterations: no intervals"):
        assert condition in plain(out)
    assert not (tmp_path / "figures" / "placement.png").exists()
    assert pd.read_csv(tmp_path / "figures" / "systems.csv")["low"].isna().all()


def test_model_is_that_of_the_trace_and_part_of_a_cluster_is_said_to_be(tmp_path: Path, hiermoe: Command) -> None:
    arguments = ["trace=qwen3_30b_a3b_e128_late", "cluster=a6000_4x8", "ep_size=8", "systems=[hd2]"]
    code, out, _ = hiermoe("advise", *arguments, "iterations=4", f"output={tmp_path}")
    assert code == 0
    assert "8 GPUs (2 x 4 x 8 groups) of the kind of a6000_4x8, whose file has 32" in plain(out)
    assert "narrow sibling" in plain(out)
    text = (tmp_path / "advice.md").read_text()
    assert "sizes of qwen3_30b_a3b: M = 2048, expert FFN 768" in text
    assert "32 ranks of 256 tokens are regrouped in their order to 8 of 1024" in plain(text)


@pytest.mark.slow
def test_new_policy_appears_by_its_file_alone(
    trace_file: Path, tmp_path: Path, hiermoe: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "conf"
    (conf / "system").mkdir(parents=True)
    own = {"name": "search", "label": "Search", "color": "#117733"}
    added = yaml.safe_load((CONF / "system" / "hiermoe_multi.yaml").read_text()) | own
    added["policy"]["max_swaps"] += 1  # no system of the suite is the same
    (conf / "system" / "search.yaml").write_text(yaml.safe_dump(added))
    monkeypatch.setattr("hiermoe.records.groups.OWN", conf)
    arguments = [f"trace={trace_file}", *NODE, *SIZES]
    code, out, err = hiermoe("advise", *arguments, f"output={tmp_path / 'out'}")
    assert (code, err) == (0, "") and "Search" in out
    assert "Search" in set(pd.read_csv(tmp_path / "out" / "figures" / "placement.csv")["label"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cluster=a6000_1x8"], "one of trace=, loads= and routing=; given: none of them"),
        (["trace={trace}", "routing=uniform", *NODE], "given: trace= and routing="),
        (["trace={trace}"], "cluster=... is missing; choose from a"),
        (["trace={trace}", "cluster=moon"], "moon"),
        (["trace=nowhere", *NODE], "trace=nowhere is unknown; choose from deepseek_v"),
        (
            ["trace={trace}", *NODE],
            "is missing, M, width of a token: recorded routing of tiny, layer 1 does not say it",
        ),
        (["trace={trace}", *NODE, "model=qwen3_30b_a3b"], "the trace has num_experts=32, model qwen3_30b_a3b has 128"),
        (["trace={trace}", *NODE, "model=qwen3_30b_a3b", "num_experts=32"], "the trace has topk=4, model"),
        (["trace={trace}", *NODE, *SIZES, "num_experts=64"], "num_experts=64: the trace has num_experts=32"),
        (["trace={trace}", *NODE, *SIZES, "topk=5"], "topk=5 exceeds the 4 experts"),
        (["trace={trace}", *NODE, *SIZES, "layer=1"], "layer=1 is not among the trace's 1 layers"),
        (
            ["trace={trace}", "cluster=a6000_1x8", "tokens_per_rank=2048", *SIZES],
            "has one iteration of 8 x 2048 tokens",
        ),
        (
            ["trace={trace}", "cluster=a6000_1x8", "tokens_per_rank=4096", *SIZES],
            "asks 32768: 4096 on each of 8 ranks; two iterations fit with tokens_per_rank=1024",
        ),
        (["trace={trace}", *NODE, *SIZES, "ep_size=3"], "do not fill whole groups of"),
        (["trace={trace}", *NODE, *SIZES, "systems=[nothing]"], "system=nothing is unknown"),
        (["trace={trace}", *NODE, *SIZES, "systems=[tutel_2dh_padded_cf1]"], "no system to compare"),
        (
            ["trace={trace}", *NODE, *SIZES, "systems=[eplb]"],
            "with the flat AlltoAll: EPLB (global) keeps experts in more than one place; copies=true prices that",
        ),
        (["trace={trace}", *NODE, *SIZES, "share=1.5"], "share=1.5"),
        (["trace={trace}", *NODE, *SIZES, "shape=1"], "shape"),
        (["trace={csv}", *NODE, *SIZES], "is truncated or not a trace"),
        (["loads={csv}", *NODE, *SIZES], "topk=... (or model=...) is missing"),
        (
            ["loads={csv}", *NODE, *SIZES, "topk=1"],
            "num_experts=4 is smaller than ep_size=8",
        ),
        (["loads={csv}", *NODE, "model=qwen3_30b_a3b"], "has 4 experts, not 128"),
        (["loads=nowhere.csv", *NODE, *SIZES, "topk=1"], "nowhere.csv"),
        (["routing=uniform", *NODE, *SIZES, "topk=2"], "num_experts=... (or model=...) is missing"),
        (["routing=group_limited", *NODE, "model=qwen3_30b_a3b"], "router has no group limit"),
        (["routing=recorded", *NODE], "model=... is missing: routing=recorded is that of a model"),
        (["routing=uniform", *NODE, "num_experts=16", "topk=2"], "hidden_size=... (or model=...) is missing"),
    ],
)
def test_bad_input_ends_with_one_clear_message(
    arguments: list[str], message: str, trace_file: Path, tmp_path: Path, hiermoe: Command
) -> None:
    csv = tmp_path / "four.csv"
    csv.write_text("expert,load\n0,1\n1,1\n2,1\n3,1\n")
    code, out, err = hiermoe("advise", *(x.format(trace=trace_file, csv=csv) for x in arguments))
    assert code != 0 and message in plain(err)
    assert "Traceback" not in err and out.strip() == ""


def test_help_lists_the_choices(hiermoe: Command) -> None:
    code, out, _ = hiermoe("advise", "--help")
    assert code == 0
    for choice in ("a6000_4x8", "deepseek_v3", "topic", "tokens_per_rank", "hiermoe advise loads="):
        assert choice in out


def test_trace_of_a_known_model_needs_no_model(tmp_path: Path, hiermoe: Command) -> None:
    path = tmp_path / "mine.trace"
    tiny_trace(iterations=4, model="qwen3_30b_a3b").save(path)
    code, _, err = hiermoe("advise", f"trace={path}", *NODE, "systems=[hd2]", f"output={tmp_path}")
    assert code != 0 and "model qwen3_30b_a3b has 128" in err  # found by name; its E is another
    sizes = ["num_experts=32", "topk=4"]
    code, _, _ = hiermoe("advise", f"trace={path}", *NODE, *sizes, "systems=[hd2]", f"output={tmp_path}")
    assert code == 0 and "sizes of qwen3_30b_a3b" in (tmp_path / "advice.md").read_text()


FOUR = {"num_experts": 40, "topk": 3, "hidden_size": 512, "moe_ffn_hidden_size": 192}


@pytest.mark.slow
@pytest.mark.parametrize("spelled", ["options", "file"])
def test_four_sizes_are_enough(spelled: str, tmp_path: Path, hiermoe: Command) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(FOUR))
    sizes = [f"{key}={size}" for key, size in FOUR.items()]
    given = sizes if spelled == "options" else [f"model={tmp_path / 'mine.yaml'}"]
    code, out, err = hiermoe("advise", "routing=topic", "cluster=a6000_1x8", FEW, *given, f"output={tmp_path}")
    assert code == 0, err
    text = (tmp_path / "advice.md").read_text()
    assert "E = 40, K = 3" in text and "M = 512, expert FFN 192" in text
    said = "1024 tokens a GPU (tokens_per_rank)", "one expert-parallel group of all 8 GPUs (ep_size)"
    assert all(assumed in plain(out) and assumed in text for assumed in said)


def test_all_sizes_that_are_missing_are_said_at_once(hiermoe: Command) -> None:
    code, _, err = hiermoe("advise", "routing=topic", "cluster=a6000_1x8")
    assert code != 0
    assert [line.split("=")[0].strip() for line in err.splitlines()[1:]] == list(FOUR)


def test_what_only_training_needs_is_asked_for_where_a_model_is_trained(tmp_path: Path, hiermoe: Command) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(FOUR))
    code, _, err = hiermoe("train", f"model={tmp_path / 'mine.yaml'}")
    assert code != 0 and "model mine does not say num_layers, ffn_hidden_size, vocab_size, attention" in err


@pytest.mark.slow
def test_pages_of_two_questions_lie_side_by_side_where_the_user_stands(
    tmp_path: Path, hiermoe: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    layers = tmp_path / "two.trace"
    tiny_trace(iterations=4, layers=2).save(layers)
    traced = [f"trace={layers}", *NODE, *SIZES, "systems=[hd2]", "iterations=4"]
    drawn = ["routing=uniform", *NODE, "systems=[hd2]", "iterations=4"]
    questions = [
        [*traced, "layer=0"],
        [*traced, "layer=1"],
        [*traced, "topk=4", "tokens_per_rank=32"],
        [*drawn, "model=deepseek_v3"],
        [*drawn, "model=qwen3_30b_a3b"],
    ]
    pages = {}
    for number, question in enumerate(questions):
        code, out, err = hiermoe("advise", *question)
        assert (code, err) == (0, "")
        (told,) = re.findall(r"page: (\S+)", out)
        pages[number] = tmp_path / told
        assert pages[number].is_file() and pages[number].is_relative_to(tmp_path / "advice")
    assert len(set(pages.values())) == len(questions)
    texts = [page.with_suffix(".md").read_text() for page in pages.values()]
    assert len(set(texts)) == len(questions)
    hiermoe("advise", *questions[0])
    assert len(list((tmp_path / "advice").iterdir())) == len(questions)
    assert [page.with_suffix(".md").read_text() for page in pages.values()][1:] == texts[1:]
