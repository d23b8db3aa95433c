"""Special tokens spelt in a text: parsed in prompts on demand, as transformers does, and never in a corpus."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from rrt.data.tokenizer import Tokenizer, load_tokenizer
from tests.util.tokenizers import KINDS, SPECIAL_TOKENS, TEXTS, set_config, training_texts

PROMPTS = (
    "{bos}Hello{eos}",
    "{bos}{bos}{eos}{eos}x",
    "a{eos}b",
    "a {eos} b",
    "{eos}\n\nx\ny{eos}  z",
    "  {eos}  ",
    "{unk} and {unk}x",
    "{bos}def f(x):\n    return 'é日本🎉'{eos}\n",
    "{eos",
)


def prompts(kind: str) -> list[str]:
    tokens = SPECIAL_TOKENS.get(kind.partition("-")[2], {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<x>"})
    spelt = {name.removesuffix("_token"): token for name, token in tokens.items()}
    written = [text.replace("{bos}", spelt["bos"]).replace("{eos}", spelt["eos"]) for text in PROMPTS]
    return [text.replace("{unk}", spelt["unk"]) for text in written]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_parsed_as_in_transformers(
    directories: dict[str, Path], loaded: dict[str, Tokenizer], kind: str
) -> None:
    from transformers import AutoTokenizer

    # Llama's rules for spaces: see below.
    theirs = AutoTokenizer.from_pretrained(directories[kind])
    texts = [text for text in prompts(kind) if "llama" not in kind or not (" " in text or text.startswith("a"))]
    assert len(texts) >= 3
    for text in texts:
        expected = theirs(text, add_special_tokens=False).input_ids
        if kind != "json-llama":  # tokenizer.json asks for a space where transformers 5 has none
            assert loaded[kind].encode(text, bos=False, parse_special=True) == expected, text
        decoded = theirs.decode(expected, skip_special_tokens=True)
        assert loaded[kind].decode(expected) == decoded


def test_a_legacy_sentencepiece_model_parses_like_its_published_conversion(
    copy_of: Callable[[str], Path], directories: dict[str, Path]
) -> None:
    directory = copy_of("sp-llama")
    set_config(directory, legacy=True)
    ours = load_tokenizer(directory)
    published = tokenizers.Tokenizer.from_file(str(directories["json-llama"] / "tokenizer.json"))
    for text in (*prompts("sp-llama"), *TEXTS):
        assert ours.encode(text, bos=False, parse_special=True) == published.encode(text, add_special_tokens=False).ids


def test_text_after_a_special_token_has_a_space_of_its_own_in_legacy_alone(
    copy_of: Callable[[str], Path], loaded: dict[str, Tokenizer]
) -> None:
    new = loaded["sp-llama"]
    assert new.decode([*new.encode("a</s>b", bos=False, parse_special=True)]) == "ab"
    directory = copy_of("sp-llama")
    set_config(directory, legacy=True)
    legacy = load_tokenizer(directory)
    assert legacy.decode(legacy.encode("a</s>b", bos=False, parse_special=True)) == "a b"


@pytest.mark.parametrize("kind", KINDS)
def test_without_special_tokens_parsing_changes_nothing(loaded: dict[str, Tokenizer], kind: str) -> None:
    texts = [*TEXTS, *training_texts(), "a\ud800b"]
    assert loaded[kind].encode_batch(texts, parse_special=True) == loaded[kind].encode_batch(texts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_switch_holds_for_one_call(loaded: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = loaded[kind]
    text = prompts(kind)[0]
    plain = tokenizer.encode(text)
    assert tokenizer.encode(text, parse_special=True) != plain == tokenizer.encode(text)
    assert tokenizer.decode(plain) == text


def test_special_tokens_keep_what_tokenizer_json_says_of_spaces_beside_them(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("json-gpt_neox")
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    for entry in content["added_tokens"]:
        entry["rstrip"] = True
    path.write_text(json.dumps(content))
    ids = load_tokenizer(directory).encode("a<|endoftext|> \n b", parse_special=True)
    expected = tokenizers.Tokenizer.from_file(str(path)).encode("a<|endoftext|> \n b", add_special_tokens=False).ids
    assert ids == expected and len(ids) == 3


def test_spaces_beside_an_added_token_go_where_its_file_says_so(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("sp-gemma")
    entry = {"content": "<|end|>", "special": True, "rstrip": True, "lstrip": False, "single_word": False}
    set_config(directory, added_tokens_decoder={"420": entry | {"normalized": False}})
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode("a <|end|> \n b", bos=False, parse_special=True)
    assert tokenizer.decode(ids) == "a b" and 420 in ids
