"""A recording run of a few seconds."""

from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hiermoe.narrow.record_config import RecordConfig
from hiermoe.records.project import CONF

TINY = [
    "corpus_files=24",
    "model.vocab_size=512",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=32",
    "model.moe_ffn_hidden_size=16",
    "seq_length=16",
    "sequences_per_step=4",
    "train_steps=2",
    "record_steps=3",
    "logical_ranks=8",
]


def composed(overrides: list[str]) -> dict[str, Any]:
    """conf/record.yaml with overrides, as plain values."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        container = OmegaConf.to_container(compose("record", overrides=overrides), resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def tiny_record_config(cache_dir: str, output: str, *overrides: str) -> RecordConfig:
    """A recording run of a few seconds."""
    return RecordConfig.model_validate(composed([*TINY, f"cache_dir={cache_dir}", f"output={output}", *overrides]))
