"""The corpus is real text, the same for the same interpreter and seed."""

from pathlib import Path

import numpy as np
import pytest

from hiermoe.narrow.corpus import Corpus, train_tokenizer, training_corpus
from hiermoe.narrow.texts import read_texts
from tests.narrow.tiny_training import tiny_training

MODEL = "qwen3_30b_a3b"


def library(documents: int) -> list[str]:
    """Some files of the standard library."""
    return read_texts(tiny_training(MODEL, "").corpus, Path("unused"), documents).documents


@pytest.fixture(scope="module")
def corpus(cache_dir: str) -> Corpus:
    return training_corpus(tiny_training(MODEL, cache_dir))


def test_corpus_says_what_it_is(corpus: Corpus) -> None:
    assert corpus.describe().startswith("library (10^6 characters: Python ")
    assert "; from Python 3." in corpus.describe()
    assert f"{len(corpus.tokens)} tokens" in corpus.describe()
    assert corpus.num_documents <= 24


def test_tokens_are_more_than_bytes_and_stay_inside_the_vocabulary(corpus: Corpus) -> None:
    assert corpus.tokens.max() < 512
    assert len(np.unique(corpus.tokens)) > 256


def test_cached_corpus_equals_the_first(corpus: Corpus, cache_dir: str) -> None:
    again = training_corpus(tiny_training(MODEL, cache_dir))
    assert np.array_equal(again.tokens, corpus.tokens)
    assert again.describe() == corpus.describe()


def test_tokenizer_training_is_deterministic() -> None:
    documents = library(20)
    first, second = (train_tokenizer(documents, 400).to_str() for _ in range(2))
    assert first == second


def test_seed_orders_the_text(corpus: Corpus, cache_dir: str) -> None:
    other = training_corpus(tiny_training(MODEL, cache_dir, seed=2))
    assert len(other.tokens) == len(corpus.tokens)
    assert not np.array_equal(other.tokens, corpus.tokens)


def test_tokens_give_the_text_back() -> None:
    documents = library(20)
    tokenizer = train_tokenizer(documents, 400)
    assert tokenizer.decode(tokenizer.encode(documents[3]).ids) == documents[3]


def test_steps_of_an_epoch_share_no_sequence_and_the_next_epoch_repeats_them(corpus: Corpus) -> None:
    available = (len(corpus.tokens) - 1) // 64
    epoch = corpus.step_batch(0, available, 64)
    assert epoch.shape == (available, 65)
    starts = np.sort(epoch[:, :-1].ravel())
    assert np.array_equal(starts, np.sort(corpus.tokens[: available * 64].astype(np.int64)))
    assert np.array_equal(corpus.step_batch(1, available, 64), epoch)


def test_targets_follow_inputs(corpus: Corpus) -> None:
    sequence = corpus.step_batch(0, 1, 64)[0]
    joined = corpus.tokens.astype(np.int64)
    starts = [i for i in range(0, len(joined) - 64, 64) if np.array_equal(joined[i : i + 65], sequence)]
    assert len(starts) >= 1


def test_vocabulary_beyond_16_bits_is_refused(cache_dir: str) -> None:
    config = tiny_training(MODEL, cache_dir)
    large = config.model.model_copy(update={"vocab_size": 70000})
    with pytest.raises(ValueError, match=r"vocabulary=70000 is outside 257\.\.65536"):
        training_corpus(config.model_copy(update={"model": large}))


def test_text_too_short_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="the text fills only"):
        train_tokenizer(["a b c"], 8192)
