"""Tokenizers in GGUF files: the ids of the tokenizer that was written into it, of transformers' reading too."""

import gzip
import json
import re

import pytest
import tokenizers
import transformers
from tokenizers import Regex, pre_tokenizers

from rrt.data.tokenizer import load_tokenizer, tokenizer_of
from rrt.errors import UserError
from rrt.folding.conversion import convert
from rrt.folding.unroll import export
from rrt.model.config import RecursiveConfig
from tests.util.gguf_files import bpe_fields, sentencepiece_fields, write_gguf
from tests.util.models import make_hf_model
from tests.util.real import real_data, real_gguf
from tests.util.tokenizers import GEMMA_SYMBOLS, TEXTS, make_bpe_tokenizer, make_sentencepiece_tokenizer, training_texts

VOCAB = 420
MORE_TEXTS = (
    "I'll say: it'S 1234567 or 12.5e-3!",
    "if x == 0:\n        return 1\n\n\n    y =    42",
    "DON'T  (stop)...\r\n\r\n\tnow; naïve cafés",
    "<|endoftext|> and <start_of_turn>user",
    *training_texts(),
)
ALL_TEXTS = [*TEXTS, *MORE_TEXTS]
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN.replace("{1,3}", "")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    sizes = dict(num_layers=2, hidden_size=16, intermediate_size=16, vocab_size=VOCAB)
    return make_hf_model(tmp_path_factory.mktemp("base"), "llama", **sizes)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return make_bpe_tokenizer(tmp_path_factory.mktemp("bpe"), "gpt_neox", VOCAB)


@pytest.fixture(scope="module")
def sentencepieces(tmp_path_factory):
    root = tmp_path_factory.mktemp("sentencepiece")
    return {kind: make_sentencepiece_tokenizer(root / kind, kind, VOCAB) for kind in ("llama", "gemma")}


def bpe_gguf(path, base, bpe, pre="gpt-2", **changes):
    return write_gguf(path, base, tokenizer=bpe_fields(bpe, pre, **{"eos_token_id": 0, "bos_token_id": 0} | changes))


def sentencepiece_gguf(path, base, sentencepieces, kind, **changes):
    if kind == "gemma":
        changes = {"user_defined": GEMMA_SYMBOLS, "add_space_prefix": False, "padding_token_id": 0, **changes}
    fields = sentencepiece_fields(sentencepieces[kind], **changes)
    return write_gguf(path, base, tokenizer=fields, change=add_template)


def add_template(fields, tensors):
    fields["tokenizer.chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def read_by_transformers(path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def encoded_by_transformers(tokenizer, texts):
    return [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]


def refusal(path):
    with pytest.raises(UserError) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_ids_are_those_of_the_tokenizer_written(base, bpe, tmp_path, pre):
    original = tokenizers.Tokenizer.from_file(str(bpe / "tokenizer.json"))
    original.pre_tokenizer = PRE_TOKENIZERS[pre]
    original.normalizer = None  # GGUF has none: a decomposed letter stays one
    original.encode_special_tokens = True
    loaded = load_tokenizer(bpe_gguf(tmp_path / "m.gguf", base, bpe, pre))
    for text in ALL_TEXTS:
        assert loaded.encode(text, bos=False) == original.encode(text, add_special_tokens=False).ids, text
        assert loaded.decode(loaded.encode(text, bos=False)) == text


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_ids_are_those_of_transformers(base, bpe, tmp_path, pre):
    path = bpe_gguf(tmp_path / "m.gguf", base, bpe, pre)
    loaded, theirs = load_tokenizer(path), read_by_transformers(path)
    # transformers respells the user-defined runs of spaces, which it then does not find in texts.
    texts = [re.sub(" +", " ", text) for text in ALL_TEXTS]
    assert [loaded.encode(text, bos=False) for text in texts] == encoded_by_transformers(theirs, texts)
    prompt = "<|endoftext|>def f():\n return 1<|padding|>"
    assert loaded.encode(prompt, bos=False, parse_special=True) == theirs(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_sentencepiece_ids_are_those_of_the_model_written(base, sentencepieces, tmp_path, kind):
    original = load_tokenizer(sentencepieces[kind])
    loaded = load_tokenizer(sentencepiece_gguf(tmp_path / "m.gguf", base, sentencepieces, kind))
    for text in ALL_TEXTS:
        assert loaded.encode(text) == original.encode(text), text
        assert loaded.decode(loaded.encode(text)) == original.decode(original.encode(text))
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "add_bos"):
        assert getattr(loaded, name) == getattr(original, name), name


def test_sentencepiece_ids_are_those_of_transformers(base, sentencepieces, tmp_path):
    path = sentencepiece_gguf(tmp_path / "m.gguf", base, sentencepieces, "llama")
    # transformers drops one of the leading spaces of a text, which SentencePiece and llama.cpp keep.
    texts = [text for text in ALL_TEXTS if not text.startswith(" ")]
    loaded, theirs = load_tokenizer(path), read_by_transformers(path)
    assert [loaded.encode(text, bos=False) for text in texts] == encoded_by_transformers(theirs, texts)
    assert loaded.encode("Hi") == theirs("Hi")["input_ids"]


@pytest.mark.parametrize(
    ("pre", "says", "expected"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos_is_as_the_file_says_and_else_as_llama_cpp_does(base, bpe, tmp_path, pre, says, expected):
    loaded = load_tokenizer(bpe_gguf(tmp_path / "m.gguf", base, bpe, pre, add_bos_token=says))
    assert loaded.add_bos is expected and (loaded.encode("a")[0] == 0) is expected


def test_a_sentencepiece_text_begins_without_bos_if_the_file_says_so(base, sentencepieces, tmp_path):
    path = sentencepiece_gguf(tmp_path / "m.gguf", base, sentencepieces, "llama", add_bos_token=False)
    assert load_tokenizer(path).add_bos is False


def test_several_ends_stop_a_generation(base, bpe, tmp_path):
    path = bpe_gguf(tmp_path / "m.gguf", base, bpe, eos_token_id=1, eot_token_id=5, eom_token_id=1)
    loaded = load_tokenizer(path)
    assert (loaded.eos_id, loaded.stop_ids) == (1, (1, 5))


@pytest.mark.parametrize("kind", ["bpe", "llama", "gemma"])
def test_a_checkpoint_carries_ordinary_files(base, bpe, sentencepieces, tmp_path, kind):
    path = tmp_path / "m.gguf"
    if kind == "bpe":
        fields = bpe_fields(bpe, "qwen2", bos_token_id=0, eos_token_id=1, eot_token_id=7, add_bos_token=True)
        write_gguf(path, base, tokenizer=fields, change=add_template)
    else:
        sizes = dict(num_layers=2, hidden_size=16, intermediate_size=16, vocab_size=VOCAB)
        sentencepiece_gguf(path, make_hf_model(tmp_path / "base", kind, **sizes), sentencepieces, kind)
    convert(path, tmp_path / "folded", RecursiveConfig(num_loops=2))
    export(tmp_path / "folded", tmp_path / "exported")
    first = load_tokenizer(path)
    texts = [text for text in ALL_TEXTS if not text.startswith(" ")]
    messages = [{"role": "user", "content": "Hi"}]
    for name in ("folded", "exported"):
        copy = load_tokenizer(tmp_path / name)
        assert copy.sha256 == first.sha256 and copy.files == first.files
        for attribute in ("vocab_size", "bos_id", "eos_id", "pad_id", "stop_ids", "add_bos", "chat_template"):
            assert getattr(copy, attribute) == getattr(first, attribute), attribute
        assert copy.encode_batch(texts) == first.encode_batch(texts)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert [theirs(text, split_special_tokens=True)["input_ids"] for text in texts] == first.encode_batch(texts)
    assert theirs.apply_chat_template(messages, tokenize=False) == first.apply_chat_template(messages) == "user: Hi\n"
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "exported")
    assert generation.eos_token_id == (list(first.stop_ids) if len(first.stop_ids) > 1 else first.eos_id)


def test_a_file_without_a_tokenizer_has_none(base, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", base)
    assert tokenizer_of(path, VOCAB) is None
    assert refusal(path) == "no tokenizer; looked for tokenizer.model and tokenizer.json"


def test_an_unnamed_splitting_is_gpt_2_s_with_a_warning(base, bpe, tmp_path, caplog):
    loaded = load_tokenizer(bpe_gguf(tmp_path / "m.gguf", base, bpe, pre=None))
    assert "field 'tokenizer.ggml.pre' does not say how texts are cut into words" in caplog.text
    assert json.loads(loaded.files["tokenizer.json"])["pre_tokenizer"]["type"] == "ByteLevel"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "bert"}, "field 'tokenizer.ggml.model': found 'bert'; expected gpt2 (byte-level BPE) or llama"),
        ({"pre": "bloom"}, "field 'tokenizer.ggml.pre': found 'bloom'; expected one of gpt-2, olmo, "),
        ({"merges": None}, "missing field 'tokenizer.ggml.merges'; expected a list"),
        ({"merges": ["ab"]}, "field 'tokenizer.ggml.merges': found 'ab'; expected two tokens with a space between"),
        ({"tokens": None}, "missing field 'tokenizer.ggml.tokens'; expected a list"),
        ({"tokens": ["a", "b", "b"], "token_type": None}, "field 'tokenizer.ggml.tokens': found 'b'; expected each"),
        ({"token_type": [1, 1]}, f"field 'tokenizer.ggml.token_type': found '2 entries'; expected {VOCAB}, one for"),
        ({"eos_token_id": 999}, "field 'tokenizer.ggml.eos_token_id': found 999; expected an id of tokenizer.ggml.to"),
        ({"model": "llama"}, "missing field 'tokenizer.ggml.scores'; expected a list"),
        ({"model": "llama", "scores": [0.0] * VOCAB}, "field 'tokenizer.ggml.token_type': found 0; expected one unkn"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(base, bpe, tmp_path, changes, expected):
    assert refusal(bpe_gguf(tmp_path / "m.gguf", base, bpe, **changes)).startswith(expected)


@pytest.mark.real
def test_real_ids_are_those_of_transformers():
    path = real_gguf()
    with gzip.open(real_data("text/wikitext2_valid.jsonl.gz"), "rt", encoding="utf-8") as lines:
        articles = [json.loads(line)["text"] for line in lines]
    # transformers does not know that SmolLM's digits are cut off first, the raised and broken ones too.
    texts = [text for text in articles if not re.search(r"\s{2,}\d|\s[\u00b2\u00b3\u00b9\u00bc-\u00be]", text)]
    loaded, theirs = load_tokenizer(path), read_by_transformers(path)
    assert len(texts) >= 40
    assert loaded.encode_batch(texts, bos=False) == encoded_by_transformers(theirs, texts)
    messages = [{"role": "user", "content": "Hi"}]
    prompt = loaded.apply_chat_template(messages)
    assert prompt == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert loaded.encode(prompt, bos=False, parse_special=True) == theirs(prompt, add_special_tokens=False)["input_ids"]
