"""Which settings of Megatron's training are tested under moving experts: the table of docs/training.md, from results.

pytest -m 'not slow or settings' --junitxml old.xml tests/megatron  # in an environment of each version
python -m tests.megatron.settings_matrix 0.16.1=old.xml 0.19.2=new.xml
"""

import re
import sys
import xml.etree.ElementTree as ET
from itertools import takewhile
from pathlib import Path

from hiermoe.records.project import CODE

PAGE = CODE / "docs" / "training.md"
HEAD = "| setting |"
TESTS = "not slow or settings"  # of tests/megatron, as markers
PASSES, REFUSED, FAILS, UNTESTED = "passes", "refused in one line", "fails", "not tested"
_LAYOUTS = r"test_parallel_layouts.*\[{}\]"
_DIVIDED = r"test_distributed_optimizer.*{}"
_UNSUPPORTED = r"test_attach.*refused_by_name\[{}-.*\]"
SETTINGS = {
    "optimizer whose state every replica has (FP32Optimizer)": _LAYOUTS.format("tensors and sequences"),
    "bf16 weights, fp32 masters": r"test_distributed_optimizer.*bf16, overlapped\]",
    "distributed optimizer": r"test_distributed_optimizer.*\[one replica\]",
    "precision-aware optimizer, fp32 and bf16 state (FusedAdam's layout)": _DIVIDED.format("precision_aware.*"),
    "expert data parallelism": r"test_distributed_optimizer.*\[two replicas\]",
    "overlap_grad_reduce, overlap_param_gather": r"test_distributed_optimizer.*overlapped\]",
    "pipeline, virtual stages, six micro-batches in flight": _LAYOUTS.format("two chunks a stage"),
    "tensor and sequence parallelism": _LAYOUTS.format("tensors and sequences"),
    "context parallelism": _LAYOUTS.format("context"),
    "grouped experts (TEGroupedMLP's layout)": _LAYOUTS.format("grouped, optimizer divided"),
    "recomputation": r"test_placement.*every_micro_batch_counts_once.*\[True\]",
    "overlapped shared experts": r"test_attach.*overlapped_shared_expert.*",
    "multi-token prediction, shared experts": _LAYOUTS.format("predicts two tokens"),
    "dense first layers": r"test_attach.*built_from_a_changed_spec.*",
    "checkpoints that stock Megatron loads": _LAYOUTS.format("(context|two chunks a stage|grouped.*divided)"),
    "checkpoints under another EP, TP and PP": r"test_checkpoint_layouts.*under_another_layout.*",
    "moves in the background": r"test_background.*travel_change_neither.*",
    "megatron.training.pretrain: killed, resumed by stock flags": r"test_pretrain.*",
    "recording under a pipeline": r"test_rank_trace.*stages_of_a_pipeline.*",
    "expert_tensor_parallel_size > 1": _UNSUPPORTED.format("expert_tensor_parallel_size"),
    "flex and allgather dispatchers": _UNSUPPORTED.format("moe_token_dispatcher_type"),
    "capacity factor, padding to capacity": _UNSUPPORTED.format("moe_(expert_capacity|pad_expert).*"),
    "padding for FP8": _UNSUPPORTED.format("moe_router_padding_for_quantization"),
    "CUDA graphs": _UNSUPPORTED.format("cuda_graph_impl"),
    "overlap_moe_expert_parallel_comm": _UNSUPPORTED.format("overlap_moe_expert_parallel_comm"),
    "parameters in FP8": _UNSUPPORTED.format("fp8_param"),
    "optimizer state in FP8 or FP16, or offloaded": r"test_migration.*optimizers_whose_state_cannot_be_found.*",
}
"""By row of the table: the tests that show it, by module and name."""


def cells(report: Path) -> dict[str, str]:
    """What a JUnit file of pytest's says of every row."""
    outcomes = {
        _name(case): {child.tag for child in case} & {"failure", "error", "skipped"}
        for case in ET.parse(report).getroot().iter("testcase")
    }
    shown_by = {row: [outcomes[name] for name in tests_of(row, outcomes)] for row in SETTINGS}
    return {row: _cell(shown_by[row], pattern) for row, pattern in SETTINGS.items()}


def _name(case: ET.Element) -> str:
    """Module and name, without the group that pytest-xdist adds."""
    return f"{case.get('classname')}::{re.sub(r'@[^@]*$', '', case.get('name') or '')}"


def tests_of(row: str, names: "list[str] | dict[str, set[str]]") -> list[str]:
    """Those of these tests that show a row."""
    return [name for name in names if re.search(SETTINGS[row] + "$", name)]


def _cell(outcomes: list[set[str]], pattern: str) -> str:
    if not outcomes or any("skipped" in outcome for outcome in outcomes):
        return UNTESTED
    if any(outcomes):
        return FAILS
    return REFUSED if is_refusal(pattern) else PASSES


def is_refusal(pattern: str) -> bool:
    """Whether the tests show that a setting is refused."""
    return "refused_by_name" in pattern or "cannot_be_found" in pattern


def table(reports: dict[str, Path]) -> list[str]:
    """Lines of the table, a column for each version of megatron-core."""
    columns = [cells(report) for report in reports.values()]
    rows = [f"| {row} | {' | '.join(column[row] for column in columns)} |" for row in SETTINGS]
    return [f"{HEAD} {' | '.join(reports)} |", f"|---|{'---|' * len(reports)}", *rows]


def shown() -> list[str]:
    """Lines of the table in the page."""
    lines = PAGE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(HEAD))
    return list(takewhile(lambda line: line.startswith("|"), lines[start:]))


def column_shown(version: str) -> dict[str, str]:
    """What the page says of one version, by row."""
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in shown())
    return {row[0]: row[head.index(version)] for row in rows}


if __name__ == "__main__":
    made = table({version: Path(path) for version, _, path in (argument.partition("=") for argument in sys.argv[1:])})
    PAGE.write_text(PAGE.read_text().replace("\n".join(shown()), "\n".join(made)))
