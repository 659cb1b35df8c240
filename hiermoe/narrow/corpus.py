"""Real text that needs no network: the Python standard library, as tokens of a BPE trained on it.

Its sources are English (docstrings, comments, and the language reference in `pydoc_data.topics`) and code, in about
equal parts. The tokens depend on the interpreter's version, which every trace states.
"""

import hashlib
import json
import platform
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hiermoe.narrow.training_config import TrainingConfig
from hiermoe.records.project import in_workplace
from hiermoe.records.whole_file import whole

_END_OF_DOCUMENT = "<|endoftext|>"


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus.

    Attributes:
        tokens: uint16 [N], documents in shuffled order, each ended by the end-of-document token.
        name: What the text is, with the interpreter's version.
        num_bytes: Size of the text.
        num_documents: Files.
        vocabulary: Size of the vocabulary.
        seed: Of the order of documents and of sequences.
    """

    tokens: np.ndarray
    name: str
    num_bytes: int
    num_documents: int
    vocabulary: int
    seed: int

    def describe(self) -> str:
        """One line for a trace's metadata."""
        return (
            f"{self.name}: {self.num_documents} files, {self.num_bytes} bytes, "
            f"{len(self.tokens)} tokens of a byte-level BPE over whole lines, vocabulary {self.vocabulary}"
        )

    def step_batch(self, step: int, sequences: int, seq_length: int) -> np.ndarray:
        """The sequences of one training step, wrapping around after the last one.

        Sequences are cut from the tokens and then shuffled, as pre-training does: neighbours in the text would make a
        step as one-sided as the file that it falls into.

        Args:
            step: Training step, from 0.
            sequences: Sequences in a step.
            seq_length: Tokens of a sequence.

        Returns:
            int64 [sequences, seq_length + 1]: inputs and, shifted by one, targets.
        """
        available = (len(self.tokens) - 1) // seq_length
        order = np.random.default_rng(self.seed).permutation(available)
        starts = order[np.arange(step * sequences, (step + 1) * sequences) % available] * seq_length
        return self.tokens[starts[:, None] + np.arange(seq_length + 1)].astype(np.int64)


def standard_library(max_documents: int | None = None) -> list[str]:
    """The text of every .py file of the standard library (packages installed beside it left out), by falling path.

    Args:
        max_documents: Keep only so many files; None for all.
    """
    # A few files of the test suite are deliberately not UTF-8.
    texts = (path.read_bytes().decode("utf-8", errors="replace") for path in _library_paths()[:max_documents])
    return [text for text in texts if text.strip()]


@lru_cache(maxsize=1)
def _library_paths() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    foreign = {"site-packages", "dist-packages", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not foreign.intersection(p.relative_to(root).parts))


def training_corpus(config: TrainingConfig) -> Corpus:
    """The corpus of a training run: the standard library, tokenised now or by an earlier call.

    The cache's entries are named by the content of text and settings.

    Raises:
        ValueError: The model's vocabulary does not fit 16 bits, or the text is too short to fill it.
    """
    vocabulary = config.model.vocab_size
    if not 257 <= vocabulary <= 2**16:
        raise ValueError(f"vocabulary={vocabulary} is outside 257..65536")
    documents = standard_library(config.corpus_files)
    entry = in_workplace(config.cache_dir) / f"stdlib-{_content_key(documents, config)}.npz"
    if entry.exists():
        with np.load(entry, allow_pickle=False) as stored:
            return Corpus(tokens=stored["tokens"], **json.loads(str(stored["about"])))
    about = {
        "name": f"standard library of Python {platform.python_version()}",
        "num_bytes": sum(len(text.encode()) for text in documents),
        "num_documents": len(documents),
        "vocabulary": vocabulary,
        "seed": config.seed,
    }
    tokenizer = train_tokenizer(documents, vocabulary)
    end = tokenizer.token_to_id(_END_OF_DOCUMENT)
    order = np.random.default_rng(config.seed).permutation(len(documents))
    encodings = tokenizer.encode_batch([documents[i] for i in order])
    tokens = np.concatenate([np.asarray([*encoding.ids, end], dtype=np.uint16) for encoding in encodings])
    with whole(entry) as partial:
        np.savez_compressed(partial, tokens=tokens, about=json.dumps(about))
    return Corpus(tokens=tokens, **about)


def corpus_key(config: TrainingConfig) -> str:
    """Name of a training run's corpus: a hash of its text and of how it is tokenised and ordered."""
    return _content_key(standard_library(config.corpus_files), config)


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocabulary` tokens, the same for the same documents.

    Raises:
        ValueError: The documents hold too few different words for so many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    # Words are whole lines, so that tokens may span words and signs ("self.", "):"). Split at every sign, as is usual,
    # some signs are a twentieth of source text each; most of one token's occurrences choose the same experts, and no
    # router balances that over a step.
    lines = pre_tokenizers.Split("\n", "merged_with_next")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, in_bytes])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"the text fills only {tokenizer.get_vocab_size()} of vocabulary={vocabulary} tokens")
    return tokenizer


def _content_key(documents: list[str], config: TrainingConfig) -> str:
    settings = f"lines {config.model.vocab_size} {config.seed} {version('tokenizers')}"
    digest = hashlib.sha256(settings.encode())
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]
