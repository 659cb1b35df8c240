"""What training a model takes. Pure: imports neither torch nor megatron."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from hiermoe.model import ModelConfig
from hiermoe.records.groups import read_named
from hiermoe.records.strict import Strict


class TextKind(Strict):
    """One kind of text of a corpus.

    Attributes:
        files: By source (a Debian package, ``python`` for the standard library, or a folder with a slash in its name)
            the pattern of its files.
        megabytes: Of text, in equal shares of the sources; None for all there is.
    """

    files: dict[str, str] = Field(min_length=1)
    megabytes: PositiveFloat | None = None


class CorpusConfig(Strict):
    """What a model is trained on: text of several kinds."""

    name: str
    kinds: dict[str, TextKind] = Field(min_length=1)

    @classmethod
    def named(cls, name: str) -> "CorpusConfig":
        """The corpus of this name.

        Raises:
            ValueError: there is none, or it breaks a rule.
        """
        return read_named("corpus", name, cls)


class TrainingConfig(Strict):
    """Training with expert parallelism, and with data parallelism of the experts if there are replicas.

    Attributes:
        model: The model to train.
        seq_length: Tokens of a sequence.
        sequences_per_step: Sequences of a training step, over all ranks.
        learning_rate: Of Adam, constant after the warm-up.
        lr_warmup_steps: Steps over which the learning rate rises from 0.
        seed: Of weights and of the order of documents.
        ep_size: Ranks that share the experts of a layer.
        data_parallel: Replicas of the experts, each on `ep_size` ranks.
        dtype: `fp32`, `fp64` (nothing is rounded to less, for parity) or `bf16` (mixed precision with fp32 masters).
        recompute: Whether backward computes the MoE layers again and keeps none of their activations.
        distributed_optimizer: Whether replicas share masters and moments, and each steps its part.
        overlap: Whether gradients are reduced, and by the distributed optimizer parameters gathered, beside computing.
        corpus: What to train on.
        corpus_files: Use only so many documents of the corpus; None for all.
        cache_dir: Folder for the corpus: unpacked packages, tokens.
    """

    model: ModelConfig
    seq_length: PositiveInt
    sequences_per_step: PositiveInt
    learning_rate: PositiveFloat
    lr_warmup_steps: NonNegativeInt
    seed: NonNegativeInt
    ep_size: PositiveInt
    data_parallel: PositiveInt
    dtype: Literal["fp32", "fp64", "bf16"]
    recompute: bool
    distributed_optimizer: bool = False
    overlap: bool = False
    corpus: CorpusConfig
    corpus_files: PositiveInt | None
    cache_dir: str

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.model.lacking:
            raise ValueError(
                f"model {self.model.name} does not say {', '.join(self.model.lacking)}: a training needs that"
            )
        if self.model.num_experts % self.ep_size:
            raise ValueError(f"num_experts={self.model.num_experts} is not divisible by ep_size={self.ep_size}")
        if self.sequences_per_step % self.world_size:
            raise ValueError(
                f"sequences_per_step={self.sequences_per_step} is not divisible by world_size={self.world_size}"
            )
        return self

    @property
    def world_size(self) -> int:
        """Processes, one thread each, with an equal share of the sequences."""
        return self.ep_size * self.data_parallel

    @property
    def sequences_per_rank(self) -> int:
        """Sequences of a step on one rank."""
        return self.sequences_per_step // self.world_size
