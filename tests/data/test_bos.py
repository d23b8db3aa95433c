"""Whether texts begin with BOS: the tokenizer's own files decide, the family only where they are silent."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from tests.util.tokenizers import set_config, write_hf_config

BOS = {"SpecialToken": {"id": "<s>", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def template(*single: object) -> dict[str, object]:
    special = {token: {"id": token, "ids": [i], "tokens": [token]} for i, token in enumerate(("<s>", "</s>"))}
    return {"type": "TemplateProcessing", "single": list(single), "pair": list(single), "special_tokens": special}


POST_PROCESSORS = {
    "template": (template(BOS, TEXT), True),
    "sequence": ({"type": "Sequence", "processors": [BYTE_LEVEL, template(BOS, TEXT)]}, True),
    "eos only": (template(TEXT, {"SpecialToken": {"id": "</s>", "type_id": 0}}), False),
    "empty template": (template(TEXT), False),  # SmolLM2
    "byte level": (BYTE_LEVEL, False),  # Llama 3 as of 2024
    "none": (None, False),
}


def set_post_processor(directory: Path, post_processor: object) -> None:
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": post_processor}))


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("kind", POST_PROCESSORS)
def test_the_post_processor_decides_as_in_transformers(
    copy_of: Callable[[str], Path], kind: str, add_bos_token: bool | None
) -> None:
    from transformers import AutoTokenizer

    directory = copy_of("trained")
    post_processor, adds = POST_PROCESSORS[kind]
    set_post_processor(directory, post_processor)
    set_config(directory, add_bos_token=add_bos_token)
    write_hf_config(directory, "llama", bos_token_id=0, eos_token_id=1)
    tokenizer = load_tokenizer(directory)
    ids = AutoTokenizer.from_pretrained(directory)("Hello world").input_ids
    assert tokenizer.encode("Hello world") == (ids if kind != "eos only" else ids[:-1])  # we never end with EOS
    assert tokenizer.add_bos == adds


def test_the_post_processor_beside_a_sentencepiece_model_decides(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("sp-llama")
    (directory / "tokenizer.json").write_bytes((copy_of("json-llama") / "tokenizer.json").read_bytes())
    set_config(directory, add_bos_token=False)
    assert load_tokenizer(directory).add_bos
    set_post_processor(directory, template(TEXT))
    set_config(directory, add_bos_token=True)
    assert not load_tokenizer(directory).add_bos


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_add_bos_token_decides_about_a_sentencepiece_model_alone(
    copy_of: Callable[[str], Path], add_bos_token: bool
) -> None:
    from transformers import AutoTokenizer

    directory = copy_of("sp-llama")
    write_hf_config(directory, "llama")
    set_config(directory, add_bos_token=add_bos_token)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.add_bos == add_bos_token
    assert tokenizer.encode("Hello") == AutoTokenizer.from_pretrained(directory)("Hello").input_ids


@pytest.mark.parametrize(
    ("family", "adds"),
    [("gemma", True), ("llama", True), ("mistral", True), ("gpt_neox", False), ("qwen2", False), ("another", True)],
)
@pytest.mark.parametrize("ours", [False, True])
def test_the_family_decides_where_the_files_are_silent(
    copy_of: Callable[[str], Path], family: str, adds: bool, ours: bool
) -> None:
    directory = copy_of("sp-llama")
    (directory / "tokenizer_config.json").unlink()
    if ours:
        (directory / "config.json").write_text(json.dumps({"format": "rrt", "model": {"family": family}}))
    else:
        write_hf_config(directory, family)
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.add_bos, tokenizer.bos_id, tokenizer.eos_id) == (adds, 1, 2)


def test_a_disagreement_is_told_once_and_agreement_not_at_all(
    copy_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    directory = copy_of("trained")
    write_hf_config(directory, "llama")
    load_tokenizer(directory)
    assert not caplog.records
    set_post_processor(directory, BYTE_LEVEL)
    load_tokenizer(directory)
    assert caplog.messages == [
        f"{directory}/tokenizer.json: texts begin without BOS, as in transformers, though add_bos_token in "
        "tokenizer_config.json is true and llama models mostly begin with one (--bos, where a command has it, decides "
        "otherwise)"
    ]


def test_a_llama_without_any_bos_loads(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("json-gpt_neox")
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "add_bos_token": True}))
    write_hf_config(directory, "llama", bos_token_id=None, eos_token_id=0, pad_token_id=-1)
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.pad_id) == (None, False, None)


def test_bos_token_null_means_none_whatever_the_model_config_has(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("json-gpt_neox")  # as Qwen's
    set_config(directory, bos_token=None)
    write_hf_config(directory, "qwen2", bos_token_id=0, eos_token_id=0)
    assert load_tokenizer(directory).bos_id is None


def test_with_bos_overrides_the_rule(copy_of: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(copy_of("sp-llama"))
    assert not tokenizer.with_bos("no").add_bos and tokenizer.with_bos("no").with_bos("yes").add_bos
    assert tokenizer.with_bos("auto") is tokenizer
    directory = copy_of("json-gpt_neox")
    set_config(directory, bos_token=None)
    with pytest.raises(UserError, match=r"^--bos: found yes; the tokenizer of \S+ has no BOS: expected auto or no$"):
        load_tokenizer(directory).with_bos("yes")
