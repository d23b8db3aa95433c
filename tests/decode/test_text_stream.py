"""Text that comes token by token: its pieces make up the decoded whole, and stop strings end it in time."""

import random

import pytest

from rrt.data.tokenizer import load_tokenizer
from rrt.decode.text_stream import StopStrings, TextStream
from tests.util.real import real_model_directory
from tests.util.tokenizers import TEXTS, make_bpe_tokenizer, make_sentencepiece_tokenizer

KINDS = ("sp-gemma", "sp-llama", "json-gemma", "json-llama", "json-gpt_neox")
CHARACTERS = ["a", " ", "  ", "\n", "é", "日", "本語", "🎉", "👨‍👩‍👧", "�", "\u2581", "x = 1\n", " the", "\t"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    loaded = {}
    for kind in KINDS:
        form, _, family = kind.partition("-")
        make = make_sentencepiece_tokenizer if form == "sp" else make_bpe_tokenizer
        make(root / kind, family)
        loaded[kind] = load_tokenizer(root / kind)
    return loaded


def stream_pieces(tokenizer, tokens, sizes=(1,)):
    """The pieces of `tokens`, pushed in groups of these sizes, again and again; the last is that of the end."""
    stream, pieces, start, turn = TextStream(tokenizer), [], 0, 0
    while start < len(tokens):
        size = sizes[turn % len(sizes)]
        pieces.append(stream.push(tokens[start : start + size]))
        start, turn = start + size, turn + 1
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_up_the_text(tokenizers, kind):
    tokenizer, chance = tokenizers[kind], random.Random(0)
    texts = [*TEXTS, *("".join(chance.choices(CHARACTERS, k=chance.randint(1, 40))) for _ in range(60))]
    for text in texts:
        ids = tokenizer.encode(text)
        sizes = [chance.randint(1, 5) for _ in range(4)]
        for pieces in (stream_pieces(tokenizer, ids), stream_pieces(tokenizer, ids, sizes)):
            assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_any_tokens_make_up_their_text(tokenizers, kind):
    """Special tokens and broken characters included: a model may generate anything."""
    tokenizer, chance = tokenizers[kind], random.Random(1)
    byte_tokens = [i for i in range(tokenizer.vocab_size) if "�" in tokenizer.decode([i])]
    assert byte_tokens
    for _ in range(150):
        pool = chance.choice([range(tokenizer.vocab_size), byte_tokens, [*byte_tokens[:40], *range(300)]])
        ids = chance.choices(pool, k=chance.randint(1, 60))
        assert "".join(stream_pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_of_several_tokens_comes_whole_and_at_once(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("a🎉b", bos=False)
    assert len(ids) >= 4
    pieces = [piece for piece in stream_pieces(tokenizer, ids) if piece]
    assert all("�" not in piece for piece in pieces)
    assert len(pieces) > 1


def test_ordinary_text_is_not_held_back(tokenizers):
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode("def load(path):", bos=False)
        assert stream_pieces(tokenizer, ids)[-1] == ""


def test_a_decoder_that_changes_what_it_wrote_does_not_stop_the_text():
    class CleansUp:
        vocab_size = 3

        def decode(self, ids):
            return "".join(("do n", "'t", " go")[i] for i in ids).replace(" n't", "n't")

    pieces = stream_pieces(CleansUp(), [0, 1] + [2] * 40)
    assert "".join(pieces[:-1]).count(" go") >= 38


def test_only_the_last_tokens_are_decoded_again(tokenizers):
    tokenizer = tokenizers["json-llama"]
    decoded = []

    class Counting:
        vocab_size = tokenizer.vocab_size

        def decode(self, ids):
            decoded.append(len(list(ids)))
            return tokenizer.decode(ids)

    ids = tokenizer.encode("import json\n\nclass Decoder:\n    pass\n" * 30)
    assert "".join(stream_pieces(Counting(), ids)) == tokenizer.decode(ids)
    assert len(ids) > 400 and max(decoded) <= 20
    # Special tokens, as a model repeats that may not end, have no text.
    decoded.clear()
    special = tokenizer.encode("")[:1] or [next(iter(tokenizer.stop_ids))]
    assert tokenizer.decode(special) == ""
    ids = [*ids[:30], *special * 100, *ids[30:60]]
    assert "".join(stream_pieces(Counting(), ids)) == tokenizer.decode(ids)
    assert max(decoded) <= 20


def split_anywhere(text, chance):
    cuts = sorted(chance.choices(range(len(text) + 1), k=chance.randint(0, 6)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def test_a_stop_string_ends_the_text_however_it_is_split():
    chance = random.Random(2)
    for _ in range(500):
        text = "".join(chance.choices("ab\n", k=20))
        stops = ["".join(chance.choices("ab\n", k=chance.randint(1, 4))) for _ in range(chance.randint(1, 3))]
        matcher, out, seen = StopStrings(stops), "", ""
        for piece in split_anywhere(text, chance):
            out, seen = out + matcher.push(piece), seen + piece
            # What was returned is before any stop string, and what is held back could still begin one.
            places = [place for place in map(seen.find, stops) if place >= 0]
            assert matcher.has_stopped == bool(places)
            if matcher.has_stopped:
                break
            held = seen[len(out) :]
            assert seen.startswith(out) and (not held or any(stop.startswith(held) for stop in stops))
        if matcher.has_stopped:
            assert out == seen[: min(places)] and matcher.push("more") == "" and matcher.finish() == ""
        else:
            assert out + matcher.finish() == text


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none():
    matcher = StopStrings(["</end>", "STOP"])
    assert [matcher.push(piece) for piece in ("a<", "/e", "x ST", "O", "P b")] == ["a", "", "</ex ", "", ""]
    assert matcher.has_stopped


@pytest.mark.real
def test_pieces_of_a_real_tokenizer_make_up_the_text():
    tokenizer, chance = load_tokenizer(real_model_directory()), random.Random(3)
    for _ in range(300):
        text = "".join(chance.choices(CHARACTERS, k=30))
        for ids in (tokenizer.encode(text), chance.choices(range(tokenizer.vocab_size), k=30)):
            pieces = stream_pieces(tokenizer, ids)
            assert "".join(pieces) == tokenizer.decode(ids)
