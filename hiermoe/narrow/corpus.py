"""A corpus as tokens of a byte-level BPE trained on it."""

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hiermoe.narrow.texts import Texts, read_texts
from hiermoe.narrow.training_config import TrainingConfig
from hiermoe.records.project import in_workplace
from hiermoe.records.whole_file import whole

_END_OF_DOCUMENT = "<|endoftext|>"
_AT_ONCE = 256  # documents that are encoded together
_KEYS: dict[tuple[object, ...], str] = {}  # by what tells a corpus, as reading one takes a second


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus.

    Attributes:
        tokens: uint16 [N], documents in shuffled order, each ended by the end-of-document token.
        name: What the text is, with the versions of its sources.
        num_bytes: Size of the text.
        num_documents: Pieces of text.
        vocabulary: Size of the vocabulary.
        seed: Of the order of documents and of sequences.
        key: A hash of the text and of how it is tokenised and ordered.
    """

    tokens: np.ndarray
    name: str
    num_bytes: int
    num_documents: int
    vocabulary: int
    seed: int
    key: str

    def describe(self) -> str:
        """One line for a trace's metadata."""
        return (
            f"{self.name}: {self.num_documents} documents, {self.num_bytes} bytes, "
            f"{len(self.tokens)} tokens of a byte-level BPE, vocabulary {self.vocabulary}"
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


def training_corpus(config: TrainingConfig) -> Corpus:
    """The corpus of a training run, tokenised now or by an earlier call.

    The cache's entries are named by the content of text and settings.

    Raises:
        ValueError: A source is missing, the vocabulary does not fit 16 bits, or the text is too short to fill it.
    """
    vocabulary = config.model.vocab_size
    if not 257 <= vocabulary <= 2**16:
        raise ValueError(f"vocabulary={vocabulary} is outside 257..65536")
    texts = _texts(config)
    key = _content_key(texts, config)
    entry = in_workplace(config.cache_dir) / f"{config.corpus.name}-{key}.npz"
    if entry.exists():
        with np.load(entry, allow_pickle=False) as stored:
            return Corpus(tokens=stored["tokens"], **json.loads(str(stored["about"])))
    documents = texts.documents
    about = {
        "name": texts.about,
        "num_bytes": sum(len(text.encode()) for text in documents),
        "num_documents": len(documents),
        "vocabulary": vocabulary,
        "seed": config.seed,
        "key": key,
    }
    tokenizer = train_tokenizer(documents, vocabulary)
    end = tokenizer.token_to_id(_END_OF_DOCUMENT)
    order = np.random.default_rng(config.seed).permutation(len(documents))
    parts: list[np.ndarray] = []
    for start in range(0, len(order), _AT_ONCE):
        encodings = tokenizer.encode_batch_fast([documents[i] for i in order[start : start + _AT_ONCE]])
        parts += [np.asarray([*encoding.ids, end], dtype=np.uint16) for encoding in encodings]
    tokens = np.concatenate(parts)
    with whole(entry) as partial:
        np.savez_compressed(partial, tokens=tokens, about=json.dumps(about))
    return Corpus(tokens=tokens, **about)


def corpus_key(config: TrainingConfig) -> str:
    """Name of a training run's corpus: a hash of its text and of how it is tokenised and ordered."""
    order = config.model.vocab_size, config.seed
    told = (config.corpus.model_dump_json(), config.corpus_files, in_workplace(config.cache_dir), *order)
    if told not in _KEYS:
        _KEYS[told] = _content_key(_texts(config), config)
    return _KEYS[told]


def _texts(config: TrainingConfig) -> Texts:
    cache = in_workplace(config.cache_dir) / "packages"
    return read_texts(config.corpus, cache, config.corpus_files)


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocabulary` tokens, the same for the same documents.

    Raises:
        ValueError: The documents hold too few different words for so many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
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


def _content_key(texts: Texts, config: TrainingConfig) -> str:
    settings = f"{texts.about} {config.model.vocab_size} {config.seed} {version('tokenizers')}"
    digest = hashlib.sha256(settings.encode())
    for text in texts.documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]
