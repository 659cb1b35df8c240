"""A recording run of a few seconds."""

from hiermoe.narrow.record_config import RecordConfig
from hiermoe.runs.compose import compose

TINY = [
    "corpus_files=24",
    "model.vocab_size=512",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=32",
    "model.moe_ffn_hidden_size=16",
    "seq_length=16",
    "sequences_per_step=4",
    "corpus=standard_library",
    "~stages.early",
    "stages.late.after=2",
    "stages.late.steps=3",
    "logical_ranks=8",
]


def composed(overrides: list[str]) -> RecordConfig:
    """conf/record.yaml with overrides."""
    return compose("record", overrides, RecordConfig)


def tiny_record_config(cache_dir: str, output: str, *overrides: str) -> RecordConfig:
    """A recording run of a few seconds."""
    return composed([*TINY, f"cache_dir={cache_dir}", f"output={output}", *overrides])
