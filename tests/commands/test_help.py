"""Help: every option and every choice has its line, and what is the same under two names says so."""

import argparse
from pathlib import Path

import pytest
import yaml

from hiermoe.commands.help_text import described, help_text
from hiermoe.commands.trace_command import _parser
from hiermoe.policies.system import SystemConfig
from hiermoe.records.project import CONF
from hiermoe.topology.cluster import Cluster
from tests.conftest import Command

COMMANDS = {"run": "config", "advise": "advise", "record": "record", "train": "train", "calibrate": "calibrate"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_and_every_choice_has_its_line(command: str, hiermoe: Command) -> None:
    code, out, err = hiermoe(command, "--help")
    assert (code, err) == (0, "")
    assert out.rstrip("\n") == help_text(COMMANDS[command]).rstrip("\n") and "$" not in out.replace("${model.name}", "")
    content = yaml.safe_load((CONF / f"{COMMANDS[command]}.yaml").read_text())
    lines = out.splitlines()
    groups = {key for entry in content["defaults"] if isinstance(entry, dict) for key in entry}
    for key, value in content.items():
        if key in ("defaults", "hydra"):
            continue
        nested = isinstance(value, dict) and key not in groups
        for name in value if nested else [key]:
            (line,) = [line for line in lines if line.strip().startswith(f"{name}: ") and "# " in line]
            assert len(line.partition("# ")[2]) > 3, f"{command}: {name} says nothing"
    for group in (group for group in groups if "/" not in group):
        for path in (CONF / group).glob("*.yaml"):
            assert any(line.split()[:1] == [path.stem] and len(line.split()) > 1 for line in lines), path


def files() -> list[Path]:
    return sorted(path for path in CONF.rglob("*.yaml") if path.parent != CONF)


@pytest.mark.parametrize("path", files(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_says_in_a_sentence_what_it_is(path: Path) -> None:
    assert 8 < len(described(path)) < 260 and "\n" not in described(path)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("# The cheapest of HD1 ... HDD in every step. More.\n", "The cheapest of HD1 ... HDD in every step"),
        ("# As Fig. 9 and Sec. 3 have it, e.g. here. More.\n", "As Fig. 9 and Sec. 3 have it, e.g. here"),
        ("# One. Two.\n", "One"),
    ],
)
def test_a_sentence_ends_where_it_ends(head: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(head)
    assert described(tmp_path / "one.yaml") == said


def test_systems_of_two_names_say_so() -> None:
    """Every two systems that do the same, apart from whose code does it, name each other."""
    hierarchy = Cluster.named("a6000_4x8").hierarchy
    found: dict[str, list[str]] = {}
    for path in sorted((CONF / "system").glob("*.yaml")):
        system = SystemConfig.named(path.stem)
        if system.executor == "staged":
            rows = [(scheme.stages, scheme.padding, scheme.chunks) for scheme in system.build_schemes(hierarchy)]
            found.setdefault(f"{rows} {system.policy} {system.copy_choice} {system.migration}", []).append(path.stem)
    twins = [names for names in found.values() if len(names) > 1]
    assert ["hd2", "hd2_moe"] in twins
    for names in twins:
        for name in names:
            said = described(CONF / "system" / f"{name}.yaml")
            assert any(f"the same as {other}" in said for other in names if other != name), name


def test_what_deepep_does_is_said() -> None:
    said = described(CONF / "system" / "megatron_flex.yaml")
    assert "DeepEP" in said and "to each node once" in said and "HD2" in said


def test_every_option_of_trace_has_its_line() -> None:
    (commands,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    for name, parser in commands.choices.items():
        for action in parser._actions:
            assert action.help, f"trace {name}: {action.dest}"
