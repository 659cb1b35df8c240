"""What a user mistypes: every command says in one line what may have been meant, and all that is wrong at once."""

from pathlib import Path

import pytest

from tests.conftest import Command

TRACE = "qwen3_30b_a3b_e128_late"
BROKEN = """\
name: broken
lable: Broken
levels:
  - {name: node, groups: 0, port: {gb_per_s: -1, gpus: 1, latency_us: 14.0}}
  - {name: gpu, groups: 16, prt: {}}
"""


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        ("runn", "command=runn is unknown; did you mean run?"),
        ("run system=hiermo", "system=hiermo is unknown; did you mean hiermoe"),
        ("run -m system=hd2,hd22", "system=hd22 is unknown; did you mean hd2"),
        ("run model=deepseek_v4", "model=deepseek_v4 is unknown; did you mean deepseek_v3"),
        ("run cluster=a6000_4x9", "cluster=a6000_4x9 is unknown; did you mean a6000_4x8"),
        ("run routing=unifrom", "routing=unifrom is unknown; did you mean uniform?"),
        ("run measure=predikt", "measure=predikt is unknown; did you mean predict?"),
        ("run measure=replay ranks=locl", "ranks=locl is unknown; did you mean local"),
        ("run -m public=deepseek_v2_lite_law system=hd2,megatron", "public: no such key; choose from system, model"),
        ("run +recording=for_whole_steps", "+recording=for_whole_steps: not for this command"),
        ("run experiment=table4_k6", "values for several of them: +experiment=table4_k6"),
        ("run iteration=4", "iteration: no such key; did you mean iterations?"),
        ("run model.top_k=4", "model.top_k: no such key; did you mean topk?"),
        ("run +model.top_k=4", "model.top_k=4: no such key; did you mean topk?"),
        ("run +model.router.group_top_k=4", "model.router.group_top_k=4: no such key; did you mean group_topk"),
        ("run cluster.levels.0.group=4", "cluster.levels.0.group: no such key; did you mean groups?"),
        ("run system.policy.max_function=smoth", "max_function=smoth is unknown; did you mean smooth?"),
        ("run -m +sweeps=fig_11", "sweeps=fig_11 is unknown; did you mean fig11"),
        ("run +experiment=table4_k66", "experiment=table4_k66 is unknown; did you mean table4_k6"),
        ("calibrate cluster=emulated_4x9", "cluster=emulated_4x9 is unknown; did you mean emulated_4x8"),
        ("train system=hd22", "system=hd22 is unknown; did you mean hd2"),
        ("train step=3", "step: no such key; did you mean steps"),
        ("record model=deepseek_v3_narow", "model=deepseek_v3_narow is unknown; did you mean deepseek_v3_narrow"),
        ("reproduce --sweeps table5", "sweep=table5 is unknown; did you mean table4"),
        ("reproduce --quik", "--quik: no such option; did you mean --quick?"),
        ("reproduce --on slurmm", "--on=slurmm is unknown; did you mean slurm?"),
        ("report --referense", "--referense: no such option; did you mean --reference?"),
        ("published --referense", "--referense: no such option; did you mean --reference?"),
        ("doctor --jsn", "--jsn: no such option; did you mean --json?"),
        ("advise trace=qwen3_30b_e128 cluster=a6000_1x8", f"trace=qwen3_30b_e128 is unknown; did you mean {TRACE}"),
        (f"advise trace={TRACE} cluster=a6000_1x8 shar=0.4", "shar: no such key; did you mean share?"),
        (f"advise trace={TRACE} cluster=a6000_1x8 systems=[hd22]", "system=hd22 is unknown; did you mean hd2"),
        ("trace shw", "command=shw is unknown; did you mean show?"),
        ("trace show qwen3_30b_a3b", f"trace=qwen3_30b_a3b is unknown; did you mean {TRACE}"),
        (f"trace show {TRACE} --cluster a6000_4x9", "cluster=a6000_4x9 is unknown; did you mean a6000_4x8"),
        (
            f"trace export-matrix {TRACE} --cluster a6000_4x8 --system megatronn --row-bytes 2 --output m",
            "system=megatronn is unknown; did you mean megatron",
        ),
        ("trace import megatronn x --output y", "format=megatronn is unknown; did you mean megatron"),
    ],
)  # fmt: skip
def test_a_typo_is_answered_with_what_may_have_been_meant(command: str, meant: str, hiermoe: Command) -> None:
    code, out, err = hiermoe(*command.split())
    assert code != 0 and out.strip() == ""
    assert meant in err and len(err.strip().splitlines()) == 1


def test_a_name_like_no_other_is_answered_with_all_there_are(hiermoe: Command) -> None:
    _, _, err = hiermoe("run", "measure=xyz")
    assert "measure=xyz is unknown; choose from bound, plan_cost, predict, replay, self_test" in err


@pytest.mark.parametrize(
    "command",
    [
        ["run"],
        ["trace", "show", TRACE, "--cluster"],
        ["run", "world_size=8", "max_ep_size=4"],
        ["calibrate"],
        ["advise", f"trace={TRACE}"],
    ],
)
def test_all_that_is_wrong_in_a_file_is_said_at_once(command: list[str], tmp_path: Path, hiermoe: Command) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(BROKEN)
    named = str(path) if command[-1] == "--cluster" else f"cluster={path}"
    code, out, err = hiermoe(*command, named)
    assert code != 0 and out == ""
    heading, *lines = err.strip().splitlines()
    assert "7 values" in heading and "break a rule:" in heading
    for wrong in (
        "lable=Broken: no such key; did you mean label?",
        "description: is missing",
        "levels.0.groups=0: Input should be greater than or equal to 1",
        "levels.0.port.gb_per_s=-1: Input should be greater than 0",
        "levels.0.port.source: is missing",
        "levels.1.link_gb_per_s: is missing",
        "levels.1.prt: no such key; did you mean port?",
    ):
        assert sum(line.strip().removeprefix("cluster.") == wrong for line in lines) == 1, (wrong, err)


def test_all_that_is_wrong_on_a_command_line_is_said_at_once(hiermoe: Command) -> None:
    code, _, err = hiermoe("run", "system=hd22", "iteration=4", "model.top_k=2", "cluster=a6000_4x9")
    assert code != 0
    assert [line.split()[0].rstrip(":") for line in err.strip().splitlines()[1:]] == [
        "system=hd22", "cluster=a6000_4x9", "iteration", "model.top_k",
    ]  # fmt: skip
    _, _, err = hiermoe("run", "iterations=1", "tokens_per_rank=0", "seed=-1", "model.topk=0", "system.color=red")
    assert {line.split("=")[0].strip() for line in err.strip().splitlines()[1:]} == {
        "iterations", "tokens_per_rank", "seed", "model.topk", "system.color",
    }  # fmt: skip
