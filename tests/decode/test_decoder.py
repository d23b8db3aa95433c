"""The paged inference path against the model's plain forward: passes, chunks, mixed loops, prefixes, generation."""

import numpy as np
import pytest
import torch

from rrt import ops
from rrt.checkpoint.source import load_model
from rrt.decode import row_linears
from rrt.decode.decoder import Decoder
from rrt.decode.generation import generate
from rrt.decode.kv_cache import PagedCache
from rrt.decode.passes import Chunk, PassRows
from rrt.decode.row_linears import DecodeLayer
from rrt.errors import UserError
from rrt.model.config import RecursiveConfig
from rrt.model.meta import meta_model
from tests.util.decoding import (
    FAMILIES,
    LOOPED,
    VOCABULARY,
    assert_close,
    decode,
    make_decoder,
    make_model,
    prefill,
    random_tokens,
)
from tests.util.models import VARIANTS, make_variant
from tests.util.pairwise import pairwise

# Small products on threads that other test processes hold up would take most of the time.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def set_threads():
    """`torch.set_num_threads` for the length of a test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture
def native():
    if ops.build_info().library is None:
        pytest.skip("the reference promises no bitwise independence of rows")


def decode_in_chunks(decoder, tokens, chunks):
    """Compute the logits [T, V] of a sequence that is fed in chunks; a chunk of one token is a decode row."""
    sequence, start, states = decoder.cache.allocate(), 0, []
    for part in tokens.split(chunks):
        if len(part) == 1:
            states.append(decode(decoder, [sequence], part, [start]))
        else:
            states.append(prefill(decoder, sequence, part, start))
        start += len(part)
    decoder.cache.free(sequence)
    return decoder.logits(torch.cat(states))


CHUNKS = [[1] * 11, [6, 1, 1, 1, 1, 1], [4, 5, 1, 1], [11]]


@pairwise(family=list(FAMILIES), looped=list(LOOPED), chunks=CHUNKS)
def test_incremental_decoding_equals_the_full_forward(family, looped, chunks):
    model = make_model(family, looped)
    tokens = random_tokens(11)
    assert_close(decode_in_chunks(make_decoder(model), tokens, chunks), model(tokens[None])[0])


def test_16_bit_rows_on_other_devices_have_ranks_of_whole_vectors_and_give_the_same(monkeypatch):
    model, tokens = make_model("llama", "relaxed-mixed-2"), random_tokens(11)
    for dtype, ranks in ((torch.bfloat16, [8, 8, 0]), (torch.float32, [3, 6, 0])):
        qkv = DecodeLayer(meta_model(model.config, model.recursion).to(dtype).stack.layers[0]).qkv
        assert qkv.segment_rank == ranks and qkv.lora_a.shape[1] == sum(ranks) and qkv.lora_b.shape[2] == max(ranks)
    monkeypatch.setattr(row_linears, "_row_rank", lambda linear: -(-linear.rank // 8) * 8)
    assert_close(decode_in_chunks(make_decoder(model), tokens, [1] * 11), model(tokens[None])[0])


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_incremental_decoding_equals_transformers(variant, tmp_path):
    hf = make_variant(variant)
    hf.save_pretrained(tmp_path)
    decoder, tokens = make_decoder(load_model(tmp_path, torch.float32)), random_tokens(11)
    expected = hf(tokens[None]).logits[0]
    for chunks in CHUNKS:
        assert_close(decode_in_chunks(decoder, tokens, chunks), expected, 2e-5)


@pytest.mark.parametrize(
    "looped", [name for name in LOOPED if name.startswith(("sequence", "cycle-rev", "low-rank-only"))]
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_other_sharings_and_none_decode_as_their_full_forward(family, looped):
    model = make_model(family, looped)
    tokens = random_tokens(11)
    for chunks in ([1] * 11, [4, 5, 1, 1]):
        assert_close(decode_in_chunks(make_decoder(model), tokens, chunks), model(tokens[None])[0])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_rows_of_several_loops_are_refused_where_loops_run_different_layers(family):
    for name in (name for name in LOOPED if name.startswith(("sequence", "cycle-rev"))):
        decoder = make_decoder(make_model(family, name))
        sequence = decoder.cache.allocate()
        decoder.cache.append(sequence, 1)
        plan = decoder.cache.plan(PassRows([sequence] * 2, [0, 1], [0, 0]))
        with pytest.raises(UserError, match="rows of a pass: found several loops; expected one"):
            decoder.block(decoder.embed(torch.tensor([3, 3])), plan)
        plan = decoder.cache.plan(PassRows([sequence], [1], [0], num_kv_only=1))
        x = decoder.embed(torch.tensor([3]))
        if name.startswith("sequence"):
            with pytest.raises(UserError, match="found 1 kv-only ones with sharing 'sequence'"):
                decoder.block(x, plan)
        else:
            assert torch.equal(decoder.block(x, plan), x)


@pytest.mark.parametrize("looped", ["head-lora-3", "translators-2", "translators-head-lora-3"])
@pytest.mark.parametrize("family", ["gemma", "gpt_neox"])
def test_each_row_exits_through_the_head_lora_and_the_translator_of_its_loop(family, looped):
    model = make_model(family, looped)
    last = model.recursion.num_loops - 1
    x = torch.randn(7, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    loops = torch.tensor([0, 2, 1, 1, 0, 2, 2], dtype=torch.int32).clamp(max=last)
    decoder = make_decoder(model)
    found = decoder.logits(x, loops)
    expected = torch.stack([model.logits(row, loop) for row, loop in zip(x, loops.tolist(), strict=True)])
    assert_close(found, expected)
    assert (found[0] - model.logits(x[0])).abs().max() > 0.1
    assert torch.equal(decoder.logits(x)[loops == last], found[loops == last])


@pytest.mark.parametrize(
    "looped", ["vanilla", "recursive-2", "head-lora-3", "translators-2", "translators-head-lora-3"]
)
def test_exits_after_loops_that_a_model_has_not_are_refused(looped):
    model = make_model("llama", looped)
    decoder, num_loops = make_decoder(model), model.recursion.num_loops
    for loop in (-1, num_loops, 5):
        message = rf"loops\[1\]: found {loop}; expected a loop in \[0, {num_loops}\)"
        with pytest.raises(RuntimeError, match=message):
            decoder.logits(torch.ones(2, 48, dtype=torch.float64), torch.tensor([0, loop], dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("looped", ["translators-2", "translators-head-lora-3"])
def test_logits_of_an_exit_are_bitwise_the_same_in_any_batch(native, set_threads, looped, dtype):
    model = make_model("llama", looped, dtype)
    set_threads(2)
    decoder = make_decoder(model)
    x = torch.randn(37, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    loops = (torch.arange(37) % model.recursion.num_loops).int()
    together = decoder.logits(x, loops)
    for chosen in ([0], [36], [2, 1], [5, 0, 13, 7], list(range(9, 36))):
        assert torch.equal(decoder.logits(x[chosen], loops[chosen]), together[chosen])


@pytest.mark.parametrize("family", FAMILIES)
def test_any_chunking_of_a_prompt_gives_the_same_states(family):
    model = make_model(family, "relaxed-prefix-untied-3")
    tokens = random_tokens(21)
    decoder = make_decoder(model)
    single = prefill(decoder, decoder.cache.allocate(), tokens)
    for sizes in ([20, 1], [4] * 5 + [1], [3, 8, 2, 7, 1], [1] * 21):
        sequence, start, states = decoder.cache.allocate(), 0, []
        for part in tokens.split(sizes):
            states.append(prefill(decoder, sequence, part, start))
            start += len(part)
        assert_close(torch.cat(states), single)
        decoder.cache.free(sequence)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_sequences_and_chunks_at_different_loops_in_one_pass(page_size):
    """Two prompts and two decode rows, half a loop apart, through passes that mix them all."""
    model = make_model("llama", "relaxed-2")
    decoder = make_decoder(model, num_pages=200, page_size=page_size)
    cache = decoder.cache
    prompts = [random_tokens(n, seed=n) for n in (7, 5, 9, 4)]
    a, b, c, d = (cache.allocate() for _ in prompts)
    for sequence, prompt in ((a, prompts[0]), (b, prompts[1])):
        prefill(decoder, sequence, prompt[:-1])
        cache.append(sequence, 1)
    for sequence, prompt in ((c, prompts[2]), (d, prompts[3])):
        cache.append(sequence, len(prompt))
    x_a, x_b = (decoder.embed(prompt[-1:]) for prompt in prompts[:2])
    x_c, x_d = (decoder.embed(prompt) for prompt in prompts[2:])
    # Pass 1: a and c enter loop 0. Pass 2: they are at loop 1 while b and d enter. Pass 3: b and d at loop 1.
    x_a, x_c = decoder.block(
        torch.cat((x_a, x_c)), cache.plan(PassRows([a], [0], [6], chunks=[Chunk(c, 0, 0, 9)]))
    ).split([1, 9])
    mixed = PassRows([b, a], [0, 1], [4, 6], chunks=[Chunk(d, 0, 0, 4), Chunk(c, 1, 0, 9)])
    x_b, x_a, x_d, x_c = decoder.block(torch.cat((x_b, x_a, x_d, x_c)), cache.plan(mixed)).split([1, 1, 4, 9])
    x_b, x_d = decoder.block(
        torch.cat((x_b, x_d)), cache.plan(PassRows([b], [1], [4], chunks=[Chunk(d, 1, 0, 4)]))
    ).split([1, 4])
    for prompt, states in zip(prompts, (x_a, x_b, x_c, x_d), strict=True):
        assert_close(decoder.logits(states), model(prompt[None])[0, -len(states) :])


def rows_after_prompts(decoder, count):
    """Prefill `count` sequences of different lengths, each to decode at a loop of its own next: (rows, x)."""
    cache, loops = decoder.cache, decoder.cache.num_loops
    rows = []
    for i in range(count):
        sequence = cache.allocate()
        prefill(decoder, sequence, random_tokens(3 + 2 * i, seed=i))
        cache.append(sequence, 1)
        rows.append((sequence, i % loops, 3 + 2 * i))
    x = torch.randn(count, decoder.model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    return rows, x.to(decoder.model.embed.dtype)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# PyTorch treats the ends of vectors apart (72), and splits large tensors among threads anywhere (14 x 5120).
INNER_AND_THREADS = [(72, 1), (5120, 2), (5120, 3)]


# PyTorch computes the erf-gelu of gpt_neox and of the gated one, native kernels the others' activations.
@pairwise(
    family=[*FAMILIES, "gemma with gated erf-gelu"],
    dtype=DTYPES,
    inner_and_threads=INNER_AND_THREADS,
    exhaustive=("gpt_neox", "gemma with gated erf-gelu"),
)
def test_a_decode_row_is_bitwise_the_same_in_any_batch(native, set_threads, family, dtype, inner_and_threads):
    activation = dict(activation="gelu") if "erf" in family else {}
    inner, threads = inner_and_threads
    model = make_model(family.split()[0], "relaxed-3-untied", dtype, intermediate_size=inner, **activation)
    decoder = make_decoder(model, num_pages=200)
    rows, x = rows_after_prompts(decoder, 14)

    def states(chosen, chunks=()):
        sequences, loops, positions = zip(*(rows[i] for i in chosen), strict=True)
        plan = decoder.cache.plan(PassRows(sequences, loops, positions, chunks=chunks))
        extra = torch.zeros(sum(chunk.length for chunk in chunks), x.shape[1], dtype=x.dtype)
        out = decoder.block(torch.cat((x[list(chosen)], extra)), plan)[: len(chosen)]
        return out, decoder.logits(out)

    set_threads(threads)
    together = states(range(14))
    for chosen in ([0], [5], [13], [1, 0], [13, 2, 7], [4, 8, 1, 0, 3, 9, 12]):
        for alone, mixed in zip(states(chosen), together, strict=True):
            assert torch.equal(alone, mixed[chosen])
    with_chunk = states([3, 6], [Chunk(rows[9][0], 1, 0, 3)])
    for alone, mixed in zip(with_chunk, together, strict=True):
        assert torch.equal(alone, mixed[[3, 6]])


@pytest.mark.parametrize("looped", ["relaxed-3-untied", "relaxed-prefix-untied-3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kv_only_rows_write_what_their_state_has_and_stay_as_they_are(family, looped):
    model = make_model(family, looped)
    decoder = make_decoder(model)
    cache, reference = decoder.cache, make_decoder(model)
    exited, other = cache.allocate(), cache.allocate()
    prefill(decoder, exited, random_tokens(5))
    prefill(decoder, other, random_tokens(6))
    alone = reference.cache.allocate()
    prefill(reference, alone, random_tokens(6))
    for sequence in (exited, other):
        cache.append(sequence, 1)
    reference.cache.append(alone, 1)
    x = torch.randn(2, 48, dtype=torch.float64)
    out = decoder.block(x, cache.plan(PassRows([exited, other], [2, 0], [5, 6], num_kv_only=1)))
    assert torch.equal(out[0], x[0])
    assert_close(out[1:], reference.block(x[1:], reference.cache.plan(PassRows([alone], [0], [6]))))
    # Expected by the model's own modules, for every layer.
    slot = cache.plan(PassRows([exited], [2], [5])).decode.slot_mapping[0]
    cos_sin = decoder._cos_sin[5]
    for index, layer in enumerate(model.stack.layers):
        h = layer.attn_norm(x[:1], 2)
        k, v = (linear(h, 2).unflatten(1, (-1, model.config.head_dim))[0] for linear in (layer.attn.k, layer.attn.v))
        _, k = layer.attn.normalize(k, k, 2)
        half = len(cos_sin) // 2
        first, second = k[:, :half].clone(), k[:, half : 2 * half].clone()
        k[:, :half] = first * cos_sin[:half] - second * cos_sin[half:]
        k[:, half : 2 * half] = second * cos_sin[:half] + first * cos_sin[half:]
        assert_close(cache.k[index].flatten(0, 1)[slot], k)
        assert_close(cache.v[index].flatten(0, 1)[slot], v)


def test_a_forked_sequence_decodes_like_one_that_was_never_forked():
    model = make_model("gpt_neox", "relaxed-prefix-untied-3")
    decoder = make_decoder(model)
    tokens = random_tokens(9)
    first = decoder.cache.allocate()
    prefill(decoder, first, tokens[:6])
    second = decoder.cache.fork(first)
    used = decoder.cache.num_used_pages
    other = torch.tensor([1, 2, 3])
    for i in range(3):
        states = decode(decoder, [first, second], [tokens[6 + i], other[i]], [6 + i, 6 + i])
        for state, tail in zip(states, (tokens[6:], other), strict=True):
            full = torch.cat((tokens[:6], tail[: i + 1]))
            assert_close(decoder.logits(state[None]), model(full[None])[:, -1])
    assert decoder.cache.num_used_pages > used
    decoder.cache.free(first)
    decoder.cache.free(second)
    decoder.cache.check()


def test_half_precision_is_as_close_to_fp32_as_the_plain_forward():
    for dtype in (torch.bfloat16, torch.float16):
        for family in FAMILIES:
            model = make_model(family, "relaxed-2", torch.float32)
            tokens = random_tokens(24)
            exact = model(tokens[None])[0]
            model.to(dtype)
            plain = model(tokens[None])[0].float()
            decoder = make_decoder(model)
            sequence = decoder.cache.allocate()
            states = [prefill(decoder, sequence, tokens[:12])]
            states += [decode(decoder, [sequence], tokens[i : i + 1], [i]) for i in range(12, 24)]
            paged = decoder.logits(torch.cat(states)).float()
            assert (paged - exact).norm() <= 1.25 * (plain - exact).norm()


def naive_greedy(model, prompt, count, eos=None):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


PROMPTS = [random_tokens(n, seed=n).tolist() for n in (1, 9, 4, 17, 2)]


@pytest.mark.parametrize(
    "looped", ["vanilla", "recursive-2", pytest.param("relaxed-prefix-untied-3", marks=pytest.mark.fallback)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_the_naive_full_forward(family, looped):
    model = make_model(family, looped)
    decoder = make_decoder(model, num_pages=300)
    used = decoder.cache.num_used_pages
    expected = [naive_greedy(model, prompt, 12) for prompt in PROMPTS]
    for chunk_size in (1, 7, 512):
        assert generate(decoder, PROMPTS, 12, chunk_size=chunk_size) == expected
        assert (decoder.cache.num_used_pages, decoder.cache.num_sequences) == (used, 0)
    eos = expected[3][4]
    assert generate(decoder, PROMPTS, 12, stop_ids=[eos]) == [naive_greedy(model, p, 12, eos) for p in PROMPTS]
    wanted = [tokens[:length] for tokens, length in zip(expected, (3, 1, 12, 7, 2), strict=True)]
    # A sequence may begin as another that ends early.
    wanted = [next(t[:n] for n in range(1, 13) if t[:n] in wanted) for t in expected]
    assert generate(decoder, PROMPTS, 12, should_stop=lambda new_tokens: new_tokens in wanted) == wanted
    assert generate(decoder, PROMPTS[1:2], 12) == expected[1:2]
    assert generate(decoder, PROMPTS, 1) == [tokens[:1] for tokens in expected]
    assert generate(decoder, PROMPTS, 0) == [[]] * 5
    assert generate(decoder, [], 5) == []
    decoder.cache.check()


def test_prompts_may_be_integer_tensors_and_one_tensor_of_equal_lengths():
    decoder = make_decoder(make_model(), num_pages=300)
    expected = generate(decoder, PROMPTS, 4)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert generate(decoder, [torch.tensor(prompt, dtype=dtype) for prompt in PROMPTS], 4) == expected
    assert generate(decoder, [tuple(map(np.int64, prompt)) for prompt in PROMPTS], 4) == expected
    rows = [[1, 2, 3], [4, 5, 6]]
    assert generate(decoder, torch.tensor(rows), 4) == generate(decoder, rows, 4)


def test_generation_takes_every_page_that_it_asked_for_and_no_more():
    model = make_model("llama", "recursive-3")
    pages = 3 * (2 + 3)  # 5 and 9 positions of 4 per page, at 3 loops
    prompts = [[1, 2], [3] * 6]
    assert len(generate(make_decoder(model, num_pages=pages), prompts, 4)[1]) == 4
    decoder = make_decoder(model, num_pages=pages - 1)
    with pytest.raises(UserError, match=f"cache: found {pages - 1} free pages; expected {pages} for 2 prompts: give"):
        generate(decoder, prompts, 4)
    assert decoder.cache.num_used_pages == decoder.cache.num_sequences == 0


def test_generation_that_fails_gives_its_pages_back(monkeypatch):
    decoder = make_decoder(make_model())
    calls = []

    def failing(x):
        calls.append(x)
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder, "logits", failing)
    with pytest.raises(KeyboardInterrupt):
        generate(decoder, PROMPTS, 3)
    assert calls
    assert decoder.cache.num_used_pages == decoder.cache.num_sequences == 0


def test_bad_generation_arguments_are_named():
    decoder = make_decoder(make_model())
    for prompts, options, message in (
        ([[1], []], {}, r"prompts\[1\]: found no token; expected at least one"),
        ([[1, VOCABULARY]], {}, r"prompts\[0\]: found token 97; expected tokens in \[0, 97\)"),
        ([[-1]], {}, r"prompts\[0\]: found token -1"),
        (
            [torch.tensor([1.5])],
            {},
            r"prompts\[0\]: found a tensor \[1\] of float32; expected token ids: one",
        ),
        ([[1], torch.ones(1, 2, dtype=torch.int64)], {}, r"prompts\[1\]: found a tensor \[1, 2\] of int64; expected"),
        (torch.tensor([1, 2]), {}, r"prompts\[0\]: found a tensor \[\] of int64; expected token ids"),
        ([torch.tensor([], dtype=torch.int64)], {}, r"prompts\[0\]: found no token"),
        ([1, 2], {}, r"prompts\[0\]: found int \(.*not iterable\); expected token ids"),
        (["text"], {}, r"prompts\[0\]: found str \(.*\); expected token ids"),
        ([[1]], dict(max_new_tokens=-1), "max_new_tokens: found -1; expected at least 0"),
        ([[1]], dict(chunk_size=0), "chunk_size: found 0; expected at least 1"),
        ([[1] * 60], dict(max_new_tokens=6), r"need 65 positions; expected at most max_positions = 64"),
    ):
        with pytest.raises(UserError, match=message):
            generate(decoder, prompts, **{**dict(max_new_tokens=2), **options})


def test_positions_beyond_the_rotary_table_are_refused():
    decoder = make_decoder(make_model(), max_positions=8)
    sequence = decoder.cache.allocate()
    prefill(decoder, sequence, random_tokens(8))
    with pytest.raises(RuntimeError, match=r"positions\[0\]: found 8; expected a position in \[0, 8\)"):
        decode(decoder, [sequence], [1], [8])


def test_a_cache_for_another_model_is_refused():
    model = make_model()
    for cache, what in (
        (PagedCache(model.config, RecursiveConfig(num_loops=3), 4, dtype=torch.float64), "configuration"),
        (PagedCache(model.config, model.recursion, 4), "dtype torch.float32; expected the model's, torch.float64"),
        (PagedCache(model.config, model.recursion, 4, dtype=torch.float64, device="meta"), "device meta; expected"),
    ):
        with pytest.raises(UserError, match=f"cache: found {what}"):
            Decoder(model, cache)


def test_a_state_of_another_shape_than_the_plan_is_refused():
    decoder = make_decoder(make_model())
    sequence = decoder.cache.allocate()
    decoder.cache.append(sequence, 2)
    plan = decoder.cache.plan(PassRows([sequence], [0], [0], chunks=[Chunk(sequence, 1, 0, 2)]))
    with pytest.raises(ValueError, match=r"x: found shape \[2, 48\]; expected \[3, 48\], as the plan has rows"):
        decoder.block(torch.zeros(2, 48, dtype=torch.float64), plan)


def test_an_empty_pass_does_nothing():
    decoder = make_decoder(make_model())
    assert decoder.block(torch.zeros(0, 48, dtype=torch.float64), decoder.cache.plan(PassRows())).shape == (0, 48)
    assert decoder.logits(torch.zeros(0, 48, dtype=torch.float64)).shape == (0, VOCABULARY)
