"""What the JSON files beside a tokenizer say: special and added tokens, EOS, and files that are damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from tests.util.files import LFS_POINTER
from tests.util.tokenizers import set_config, write_hf_config


def test_a_sentencepiece_model_alone_is_enough(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("sp-gemma")
    (directory / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.add_bos) == (2, 1, 0, True)


def test_special_tokens_map_is_read_where_the_tokenizer_config_is_silent(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("json-gpt_neox")
    (directory / "tokenizer_config.json").unlink()
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|padding|>"}}))
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.add_bos) == (1, None, False)
    with pytest.raises(UserError, match="has no BOS token"):
        tokenizer.encode("text", bos=True)


def test_added_tokens_count_in_the_vocabulary(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("sp-llama")
    (directory / "added_tokens.json").write_text(json.dumps({"<pad>": 420}))
    set_config(directory, pad_token="<pad>")
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (421, 420)
    assert tokenizer.decode([*tokenizer.encode("text"), 420]) == "text"


def added(content: str, token_id: int, **flags: bool) -> dict[str, object]:
    """An entry of `added_tokens` in `tokenizer.json`."""
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": token_id, "content": content, **dict.fromkeys(names, False), **flags}


def put_in_config(directory: Path, first_id: int = 420) -> None:
    entries = [added("<end>", first_id, special=True), added("<tool>", first_id + 1)]
    decoder = {str(entry.pop("id")): entry for entry in entries}
    set_config(directory, added_tokens_decoder=decoder, eos_token="<end>")


def put_in_json(directory: Path) -> None:
    tokens = [added("<end>", 420, special=True), added("<tool>", 421)]
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": tokens}))
    set_config(directory, eos_token={"__type": "AddedToken", "content": "<end>", "lstrip": False})


def put_in_added_tokens(directory: Path) -> None:
    (directory / "added_tokens.json").write_text(json.dumps({"<end>": 420, "<tool>": 421}))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))


def put_in_extra(directory: Path) -> None:
    (directory / "added_tokens.json").write_text(json.dumps({"<end>": 420, "<tool>": 421}))
    set_config(directory, extra_special_tokens=["<end>"])
    write_hf_config(directory, "llama", eos_token_id=420)


@pytest.mark.parametrize("put", [put_in_config, put_in_json, put_in_added_tokens, put_in_extra])
@pytest.mark.parametrize("kind", ["sp-llama", "sp-gemma"])
def test_added_tokens_are_found_wherever_transformers_puts_them(
    copy_of: Callable[[str], Path], kind: str, put: Callable[[Path], None]
) -> None:
    directory = copy_of(kind)
    put(directory)
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.vocab_size) == (420, (420,), 422)
    # An ordinary one is text, in a corpus too; a special one is told apart, and left out by decoding.
    ids = tokenizer.encode("a<tool>b<end>", bos=False)
    assert 421 in ids and 420 not in ids and tokenizer.decode(ids) == "a<tool>b<end>"
    ids = tokenizer.encode("a<tool>b<end>", bos=False, parse_special=True)
    assert ids[-1] == 420 and tokenizer.decode(ids) == "a<tool>b"


def test_added_tokens_that_tokenizer_json_lacks_are_added(copy_of: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    directory = copy_of("trained")
    put_in_config(directory, first_id=400)
    tokenizer, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (400, 402)
    text = "a<tool>b<end> c"
    assert tokenizer.encode(text, parse_special=True) == theirs(text).input_ids
    assert tokenizer.encode(text) == theirs(text, split_special_tokens=True).input_ids
    assert tokenizer.decode(theirs(text).input_ids) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)


def test_two_ids_for_one_added_token_are_refused(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("sp-llama")
    put_in_config(directory)
    (directory / "added_tokens.json").write_text(json.dumps({"<end>": 423}))
    with pytest.raises(UserError, match=r"added_tokens.json: added token '<end>' has id 423, in another file 420"):
        load_tokenizer(directory)
    directory = copy_of("json-llama")
    (directory / "added_tokens.json").write_text(json.dumps({"<end>": 423}))
    with pytest.raises(UserError, match=r"added token '<end>' has id 423, and in tokenizer.json 420"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    ("config", "generation", "eos_id", "stop_ids"),
    [
        ({}, None, 2, (2,)),  # eos_token of the tokenizer
        ({"eos_token_id": 3}, None, 3, (3,)),
        ({"eos_token_id": [5, 2]}, None, 5, (5, 2)),
        ({"eos_token_id": [5, 2]}, {"eos_token_id": 2}, 5, (2,)),  # transformers' generate obeys the second alone
        ({"eos_token_id": 5}, {"eos_token_id": [2, 5, 7]}, 5, (2, 5, 7)),
        ({"eos_token_id": [5, 2]}, {"do_sample": True}, 5, (5, 2)),
        ({"eos_token_id": -1}, {"eos_token_id": None}, 2, (2,)),
    ],
)
@pytest.mark.parametrize("ours", [False, True])
def test_documents_end_with_the_first_eos_and_generations_with_any(
    copy_of: Callable[[str], Path],
    config: dict[str, object],
    generation: dict[str, object] | None,
    eos_id: int,
    stop_ids: tuple[int, ...],
    ours: bool,
) -> None:
    directory = copy_of("json-llama")
    if ours:
        value = config.get("eos_token_id", [])
        model = {"family": "llama", "eos_token_ids": value if isinstance(value, list) else [value]}
        (directory / "config.json").write_text(json.dumps({"format": "rrt", "model": model}))
    else:
        write_hf_config(directory, "llama", **config)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (eos_id, stop_ids)
    assert tokenizer.encode_document("a")[-1] == eos_id


def break_nothing_there(directory: Path) -> None:
    shutil.rmtree(directory)


def break_no_files(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def break_model_file(directory: Path) -> None:
    for path in directory.glob("tokenizer.[mj]*"):
        path.write_bytes(path.read_bytes()[:-200])


def break_empty_model_file(directory: Path) -> None:
    for path in directory.glob("tokenizer.[mj]*"):
        path.write_bytes(b"")


def break_config_syntax(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text("{")


def break_eos_token(directory: Path) -> None:
    set_config(directory, eos_token="<nowhere>")


def break_eos_type(directory: Path) -> None:
    set_config(directory, eos_token=7)


def break_bos_id(directory: Path) -> None:
    write_hf_config(directory, "llama", bos_token_id=100000)


def break_id_type(directory: Path) -> None:
    write_hf_config(directory, "llama", bos_token_id="1")


def break_added_tokens(directory: Path) -> None:
    (directory / "added_tokens.json").write_text('{"<pad>": "420"}')


def break_added_decoder(directory: Path) -> None:
    set_config(directory, added_tokens_decoder={"420": {"lstrip": True}})


def break_generation_config(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, "3"]}')


@pytest.mark.parametrize("kind", ["sp-llama", "json-llama"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing_there, "no such directory"),
        (break_no_files, "looked for tokenizer.model and tokenizer.json"),
        (break_model_file, "tokenizer.(model: not a SentencePiece model|json: not a tokenizer)"),
        (break_empty_model_file, "tokenizer.(model: not a SentencePiece model|json: not a tokenizer)"),
        (break_config_syntax, "tokenizer_config.json: not valid JSON"),
        (break_eos_token, "eos_token '<nowhere>' is not in the vocabulary"),
        (break_eos_type, "eos_token is 7; expected a string"),
        (break_bos_id, "bos_token_id is 100000; expected an id of tokenizer.(model|json), below 420"),
        (break_id_type, "config.json: bos_token_id is '1'; expected an integer"),
        (break_added_tokens, "added_tokens.json: <pad> is '420'; expected an integer"),
        (break_added_decoder, "tokenizer_config.json: added token 420 is {'lstrip': True}; expected its string"),
        (break_generation_config, "generation_config.json: eos_token_id is '3'; expected an integer"),
    ],
)
def test_a_damaged_directory_is_refused_in_one_line(
    copy_of: Callable[[str], Path], kind: str, damage: Callable[[Path], None], message: str
) -> None:
    directory = copy_of(kind)
    damage(directory)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"added_tokens": {"a": 1}}, "tokenizer.json: added_tokens is {'a': 1}; expected a list of objects"),
        ({"added_tokens": ["x"]}, r"tokenizer.json: added_tokens is \['x'\]; expected a list of objects"),
        ({"post_processor": {"type": "New"}}, "tokenizer.json: field 'post_processor': cannot be read"),
    ],
)
def test_a_damaged_conversion_beside_a_model_is_refused_in_one_line(
    copy_of: Callable[[str], Path], content: dict[str, object], message: str
) -> None:
    directory = copy_of("sp-llama")
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_tokenizer(directory)


def test_a_conversion_without_added_tokens_is_no_matter(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("sp-llama")
    before = load_tokenizer(directory).encode("text")
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": None}))
    assert load_tokenizer(directory).encode("text") == before


def test_an_unknown_eos_is_refused(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("json-gpt_neox")
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="end-of-sequence token is unknown"):
        load_tokenizer(directory)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named(name, tmp_path):
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(UserError, match=rf"{name}: found a git-lfs pointer; .* run git lfs pull"):
        load_tokenizer(tmp_path)
