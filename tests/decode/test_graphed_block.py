"""Passes padded into buckets: the rows and the cache of passes as they are. Graphs themselves need a GPU."""

import pytest
import torch

from rrt.decode.graphed_block import GraphedBlock
from rrt.decode.passes import Chunk, PassRows
from tests.util.decoding import make_decoder, make_model


def passes(sharing_mixes):
    """Rows of five sequences, which have 3 + i positions at every loop, some kv-only, and a chunk at the end."""
    yield PassRows([0], [1], [2])
    yield PassRows([0, 1, 2], [1, 1, 1], [2, 3, 4])
    if sharing_mixes:
        yield PassRows([4, 0, 1, 2], [1, 1, 0, 1], [6, 2, 3, 4], num_kv_only=1)
        yield PassRows([4, 3, 0, 1, 2], [1, 1, 1, 0, 1], [6, 5, 2, 3, 4], num_kv_only=3)
        yield PassRows([4, 3, 0], [1, 0, 1], [6, 5, 2], num_kv_only=3)
    yield PassRows([0, 1], [0, 0], [2, 3], chunks=[Chunk(3, 0, 2, 4)])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("looped", ["relaxed-2", "prefix-2", "cycle-rev-relaxed-prefix-3"])
def test_padded_passes_are_bitwise_those_without(looped, family):
    model = make_model(family, looped, dtype=torch.float32)
    plain, padded = make_decoder(model), make_decoder(model)
    graphed = GraphedBlock(padded)
    sequences = [[decoder.cache.allocate() for _ in range(5)] for decoder in (plain, padded)]
    assert sequences[0] == sequences[1] == [0, 1, 2, 3, 4]
    for decoder in (plain, padded):
        decoder.cache.k.nan_to_num_(1.0), decoder.cache.v.nan_to_num_(1.0)
        for i in range(5):
            decoder.cache.append(i, 3 + i)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for rows in passes(looped != "cycle-rev-relaxed-prefix-3"):
            count = len(rows.sequences) + sum(chunk.length for chunk in rows.chunks)
            x = torch.randn(count, model.config.hidden_size, generator=generator)
            expected = plain.block(x, plain.cache.plan(rows))
            assert torch.equal(graphed(x, padded.cache.plan(rows)), expected)
            assert torch.equal(plain.cache.k, padded.cache.k) and torch.equal(plain.cache.v, padded.cache.v)
    # A second round records nothing new.
    assert graphed.num_recordings == (2 if looped == "cycle-rev-relaxed-prefix-3" else 5)


def test_fewer_rows_in_a_bucket_leave_alone_what_earlier_ones_wrote():
    model = make_model("llama", "relaxed-2", dtype=torch.float32)
    plain, padded = make_decoder(model), make_decoder(model)
    graphed = GraphedBlock(padded)
    for decoder in (plain, padded):
        decoder.cache.k.nan_to_num_(1.0), decoder.cache.v.nan_to_num_(1.0)
        for _ in range(8):
            decoder.cache.append(decoder.cache.allocate(), 5)
    generator = torch.Generator().manual_seed(0)
    # Kept and decode rows, fewer of both each time, in one bucket; the states differ, so that a stale row shows.
    for kept, decoding in ((4, 4), (3, 3), (2, 3), (4, 4)):
        rows = PassRows(
            [*range(4, 4 + kept), *range(decoding)], [1] * (kept + decoding), [4] * (kept + decoding), num_kv_only=kept
        )
        x = torch.randn(kept + decoding, model.config.hidden_size, generator=generator)
        expected = plain.block(x, plain.cache.plan(rows))
        assert torch.equal(graphed(x, padded.cache.plan(rows)), expected)
        assert torch.equal(plain.cache.k, padded.cache.k) and torch.equal(plain.cache.v, padded.cache.v)
    assert graphed.num_recordings == 1


def test_more_rows_than_are_recorded_go_through_the_decoder():
    decoder = make_decoder(make_model("llama", "relaxed-2"))
    graphed = GraphedBlock(decoder, max_rows=2)
    for _ in range(3):
        decoder.cache.append(decoder.cache.allocate(), 1)
    x = torch.randn(3, decoder.model.config.hidden_size, dtype=torch.float64)
    for count, recordings in ((3, 0), (2, 1), (1, 2)):
        rows = PassRows(list(range(count)), [0] * count, [0] * count)
        assert len(graphed(x[:count], decoder.cache.plan(rows))) == count
        assert graphed.num_recordings == recordings


def test_the_recording_that_was_not_used_for_longest_goes():
    decoder = make_decoder(make_model("llama", "relaxed-2"))
    graphed = GraphedBlock(decoder, max_recordings=2)
    for _ in range(8):
        decoder.cache.append(decoder.cache.allocate(), 1)
    x = torch.randn(8, decoder.model.config.hidden_size, dtype=torch.float64)
    recorded = []
    record = graphed._record
    graphed._record = lambda bucket: recorded.append(bucket.num_decoding) or record(bucket)
    for count in (1, 2, 1, 4, 1, 2):
        rows = PassRows(list(range(count)), [0] * count, [0] * count)
        assert torch.equal(
            graphed(x[:count], decoder.cache.plan(rows)), decoder.block(x[:count], decoder.cache.plan(rows))
        )
        assert graphed.num_recordings <= 2
    assert recorded == [1, 2, 4, 2]
