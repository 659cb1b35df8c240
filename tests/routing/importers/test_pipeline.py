"""Files of a pipeline give the model's layers, each with its own tokens; what may be either is asked about."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiermoe.routing.importers.pipeline import Line, numbered_through
from hiermoe.routing.importers.recording import Source
from tests.routing.importers.files import record, some_ids, write_lines
from tests.routing.importers.test_round_trips import imported

STEPS, PLACES, TOKENS = 2, 2, 3


def ids_of(step: int, place: int, batch: int, layer: int) -> np.ndarray:
    """What one place's tokens of a micro-batch choose in a layer of the model."""
    return some_ids(1, TOKENS, 3, seed=1000 * step + 100 * place + 10 * batch + layer)[0]


def write_pipeline(folder: Path, stages: int, chunks: int, batches: int, layers: int = 2, **more: object) -> Path:
    """As Megatron-LM's tracer writes it: a file a rank, layers counted in a chunk, in the order of forwards."""
    folder.mkdir(exist_ok=True)
    for stage in range(stages):
        for place in range(PLACES):
            lines = []
            for step in range(STEPS):
                for start in range(0, batches, stages):
                    for chunk in range(chunks):
                        for batch in range(start, min(start + stages, batches)):
                            first = (chunk * stages + stage) * layers
                            lines += [
                                record(
                                    step,
                                    layer,
                                    stage * PLACES + place,
                                    ids_of(step, place, batch, first + layer),
                                    **more,
                                )
                                for layer in range(layers)
                            ]
            write_lines(folder / f"router_trace_rank{stage * PLACES + place}.jsonl", lines)
    return folder


@pytest.mark.parametrize(
    ("stages", "chunks", "batches"), [(1, 1, 1), (2, 1, 1), (2, 1, 3), (2, 2, 4), (4, 2, 4), (2, 3, 5)]
)
def test_layers_are_those_of_the_model(stages: int, chunks: int, batches: int, tmp_path: Path) -> None:
    path = write_pipeline(tmp_path / "m", stages, chunks, batches)
    trace = imported("megatron", path, pipeline=stages, chunks=chunks)
    layers = 2 * stages * chunks
    assert trace.metadata.layers == list(range(layers))
    assert trace.expert_ids.shape == (STEPS, layers, PLACES, batches * TOKENS, 3)
    for step in range(STEPS):
        for layer in range(layers):
            for place in range(PLACES):
                expected = np.concatenate([ids_of(step, place, batch, layer) for batch in range(batches)])
                np.testing.assert_array_equal(trace.expert_ids[step, layer, place], expected)
    last = imported("megatron", path, pipeline=stages, chunks=chunks, layers=(layers - 1,))
    np.testing.assert_array_equal(last.expert_ids, trace.expert_ids[:, -1:])


@pytest.mark.parametrize(
    ("stages", "chunks", "batches", "options", "message"),
    [
        (
            2,
            1,
            1,
            {},
            "counts layers within a stage of a pipeline, and its 4 ranks may be of one stage or of 2 or 4: say",
        ),
        (2, 2, 2, {}, "its 4 ranks may be of one stage or of 2 or 4: say --pipeline P"),
        (
            2,
            2,
            2,
            {"pipeline": 2},
            "rank 0 has 4 lines of layer 0 in step 0, micro-batches or chunks .*: say --chunks V",
        ),
        (2, 1, 1, {"pipeline": 1, "chunks": 2}, "chunks=2 are of an interleaved pipeline: say --pipeline P, above 1"),
        (2, 1, 1, {"chunks": 2}, "chunks=2 are of an interleaved pipeline: say --pipeline P, above 1"),
        (2, 1, 2, {"pipeline": 3}, "pipeline=3 does not divide its 4 ranks"),
        (2, 1, 3, {"pipeline": 2, "chunks": 2}, "the 3 forwards of its step and rank are not 2 chunks"),
    ],
)
def test_what_may_be_a_pipeline_is_asked_about(
    stages: int, chunks: int, batches: int, options: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        imported("megatron", write_pipeline(tmp_path / "m", stages, chunks, batches), **options)


def test_one_rank_with_several_lines_is_asked_about(tmp_path: Path) -> None:
    lines = [record(0, 0, 0, ids_of(0, 0, batch, 0)) for batch in range(2)]
    with pytest.raises(ValueError, match=r"rank 0 has 2 lines of layer 0 in step 0.*say --pipeline"):
        imported("megatron", write_lines(tmp_path / "a.jsonl", lines))


def test_stages_are_recognised_by_ranks_with_other_layers(tmp_path: Path) -> None:
    lines = [record(0, layer, rank, ids_of(0, 0, 0, layer)) for rank, layer in ((0, 1), (1, 0), (1, 1))]
    path = write_lines(tmp_path / "a.jsonl", lines)
    with pytest.raises(
        ValueError, match=r"rank 0 has layers \[1\] and rank 1 has layers \[0, 1\], as stages of a pipeline have"
    ):
        imported("megatron", path)
    assert imported("megatron", path, pipeline=2).metadata.layers == [1, 2, 3]


def test_ranks_with_tokens_of_unequal_number_are_no_stages_and_ask_nothing(tmp_path: Path) -> None:
    """Two of four ranks may still be a stage where they are as long as the other two."""
    for lengths, possible in {(3, 2, 1, 3): "", (3, 2, 3, 2): "may be of one stage or of 2:"}.items():
        lines = [
            record(step, 0, rank, ids_of(step, rank, batch, 0)[:length])
            for step in range(2)
            for rank, length in enumerate(lengths)
            for batch in range(2)
        ]
        path = write_lines(tmp_path / "a.jsonl", lines)
        if possible:
            with pytest.raises(ValueError, match=possible):
                imported("megatron", path)
        else:
            np.testing.assert_array_equal(imported("megatron", path).num_tokens, [[2 * x for x in lengths]] * 2)


def test_ranks_whose_files_are_cut_may_be_stages(tmp_path: Path) -> None:
    lines = [record(step, 0, rank, ids_of(step, rank, 0, 0)) for rank in range(2) for step in range(2 - rank)]
    with pytest.raises(ValueError, match="its 2 ranks may be of one stage or of 2: say --pipeline"):
        imported("megatron", write_lines(tmp_path / "a.jsonl", lines))


def test_layers_that_are_numbered_through_the_model_ask_nothing(tmp_path: Path) -> None:
    path = write_pipeline(tmp_path / "m", 1, 1, 3, numbering="model")
    assert imported("megatron", path).expert_ids.shape == (STEPS, 2, PLACES, 3 * TOKENS, 3)
    with pytest.raises(ValueError, match="numbered through the model; leave pipeline"):
        imported("megatron", path, pipeline=2)


def test_stages_with_unequal_tokens_are_no_stages(tmp_path: Path) -> None:
    lines = [record(0, 0, rank, ids_of(0, 0, 0, rank)[: 3 - rank]) for rank in range(2)]
    with pytest.raises(ValueError, match="layer 1 has 2 tokens in step 0 of rank 0, another layer has 3"):
        imported("megatron", write_lines(tmp_path / "a.jsonl", lines), pipeline=2)


@given(stages=st.integers(2, 4), chunks=st.integers(2, 4), batches=st.integers(1, 9))
@settings(max_examples=50, derandomize=True, deadline=None)
def test_every_chunk_gets_every_micro_batch_once_and_in_order(stages: int, chunks: int, batches: int) -> None:
    """Against the order that a loop over groups of micro-batches gives."""
    forwards = {}
    for rank in range(stages):
        order = [
            (chunk, batch)
            for group in range(-(-batches // stages))
            for chunk in range(chunks)
            for batch in range(batches)
            if batch // stages == group
        ]
        forwards[0, rank] = [
            Line(layer, np.array([[chunk, batch]]), f"{rank}") for chunk, batch in order for layer in (0, 1)
        ]
    pieces, _ = numbered_through(Source(Path(), pipeline=stages, chunks=chunks), forwards, False)
    assert sorted(pieces) == list(range(2 * stages * chunks))
    for layer, of_layer in pieces.items():
        found = np.concatenate([line.ids_TK for line in of_layer[0, 0]])
        np.testing.assert_array_equal(found, [[layer // 2 // stages, batch] for batch in range(batches)])
