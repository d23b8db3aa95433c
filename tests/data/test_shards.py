"""Token shards: documents written and mapped back, and damaged directories."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rrt.data.bpe import train_bpe
from rrt.data.shards import ShardWriter, open_shards, token_dtype
from rrt.data.tokenizer import Tokenizer, load_tokenizer
from rrt.errors import UserError
from rrt.shards import main
from tests.util.tokenizers import make_bpe_tokenizer, training_texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_bpe_tokenizer(tmp_path_factory.mktemp("neox"), "gpt_neox"))


def write(directory: Path, tokenizer: Tokenizer, batches: list[list[list[int]]], shard_tokens: int = 1000) -> Path:
    """Write batches of documents; each document's text counts its tokens times three."""
    with ShardWriter(directory, tokenizer, shard_tokens) as writer:
        for batch in batches:
            lengths = [len(document) for document in batch]
            writer.append(
                "train", [i for document in batch for i in document], lengths, [3 * length for length in lengths]
            )
        writer.append("heldout", [5, 6, 7], [3], [11])
        writer.finish({"inputs": ["x"]})
    return directory


@pytest.fixture
def directory(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return write(tmp_path / "data", tokenizer, [[[1, 2], [3] * 6], [[4], [5] * 9]], shard_tokens=9)


def test_documents_come_back_as_they_were_written(directory: Path) -> None:
    shards = open_shards(directory, "train")
    assert [document.tolist() for document in shards.documents()] == [[1, 2], [3] * 6, [4], [5] * 9]
    assert (shards.num_documents, shards.num_tokens, shards.text_bytes) == (4, 18, 54)
    assert [len(shard.tokens) for shard in shards.shards] == [9, 9]
    heldout = open_shards(directory, "heldout")
    assert (heldout.num_documents, heldout.num_tokens, heldout.text_bytes) == (1, 3, 11)


@settings(max_examples=50)
@given(
    batches=st.lists(st.lists(st.lists(st.integers(0, 419), min_size=1, max_size=12), max_size=6), max_size=5),
    shard_tokens=st.integers(1, 30),
)
def test_any_documents_are_cut_into_shards_whole_in_order_and_full(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, batches: list[list[list[int]]], shard_tokens: int
) -> None:
    directory = write(tmp_path_factory.mktemp("data"), tokenizer, batches, shard_tokens)
    documents = [document for batch in batches for document in batch]
    if not documents:
        with pytest.raises(UserError, match="no split 'train'"):
            open_shards(directory, "train")
        return
    shards = open_shards(directory, "train")
    assert [document.tolist() for document in shards.documents()] == documents
    assert shards.text_bytes == 3 * shards.num_tokens
    for shard, following in zip(shards.shards, [*shards.shards[1:], None], strict=True):
        assert len(shard.tokens) <= shard_tokens or len(shard.starts) == 1
        assert following is None or len(shard.tokens) + len(following.document(0)) > shard_tokens


def test_the_files_are_little_endian_and_described_by_the_meta_file(directory: Path, tokenizer: Tokenizer) -> None:
    meta = json.loads((directory / "meta.json").read_text())
    assert (meta["format"], meta["version"], meta["dtype"]) == ("rrt-tokens", 1, "uint16")
    assert meta["tokenizer"] == {"sha256": tokenizer.sha256, "vocab_size": 420, "bos_id": None, "eos_id": 0}
    assert meta["splits"]["train"][0] == {"file": "train-00000.bin", "tokens": 9, "documents": 3, "text_bytes": 27}
    assert (directory / "train-00000.bin").read_bytes() == bytes([1, 0, 2, 0, *[3, 0] * 6, 4, 0])
    assert (directory / "train-00000.idx").read_bytes() == np.array([0, 2, 8], "<u8").tobytes()


def test_ids_beyond_16_bits_are_stored_in_32(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert [token_dtype(size).itemsize for size in (2**16, 2**16 + 1)] == [2, 4]
    large = Tokenizer(**(vars(tokenizer) | {"vocab_size": 256_000}))
    write(tmp_path, large, [[[255_999, 1]]])
    assert [document.tolist() for document in open_shards(tmp_path, "train").documents()] == [[255_999, 1]]


def test_shards_are_mapped_not_read(directory: Path) -> None:
    tokens = open_shards(directory, "train").shards[0].tokens
    assert isinstance(tokens.base, np.memmap) and not tokens.flags.writeable


def test_another_tokenizer_is_refused(directory: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards = open_shards(directory, "train")
    shards.check_tokenizer(tokenizer)
    (tmp_path / "other").mkdir()
    train_bpe(training_texts(), 300, tmp_path / "other")
    with pytest.raises(UserError, match="made with the tokenizer of sha256"):
        shards.check_tokenizer(load_tokenizer(tmp_path / "other"))


def test_the_same_vocabulary_with_another_bos_or_eos_is_refused(directory: Path, tokenizer: Tokenizer) -> None:
    shards = open_shards(directory, "train")
    with pytest.raises(UserError, match="made with bos_id None, the tokenizer has 0"):
        shards.check_tokenizer(Tokenizer(**(vars(tokenizer) | {"add_bos": True})))
    with pytest.raises(UserError, match="made with eos_id 0, the tokenizer has 1"):
        shards.check_tokenizer(Tokenizer(**(vars(tokenizer) | {"eos_id": 1})))


def test_without_finish_nothing_opens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with ShardWriter(tmp_path, tokenizer) as writer:
        writer.append("train", [1, 2], [2], [1])
    with pytest.raises(UserError, match=r"no meta\.json"):
        open_shards(tmp_path, "train")


def change_meta(directory: Path, **changes: object) -> None:
    path = directory / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, r"no meta\.json"),
    "not json": (lambda d: (d / "meta.json").write_text("{"), r"meta\.json: not valid JSON"),
    "other format": (lambda d: change_meta(d, format="other"), "format is 'other'; expected 'rrt-tokens'"),
    "other version": (lambda d: change_meta(d, version=2), "version is 2; expected 1"),
    "other dtype": (lambda d: change_meta(d, dtype="int8"), r"meta\.json: damaged \(KeyError: 'int8'\)"),
    "no tokenizer": (lambda d: change_meta(d, tokenizer={}), r"meta\.json: damaged"),
    "bad shard": (lambda d: change_meta(d, splits={"train": [{"file": "x"}]}), r"meta\.json: damaged"),
    "no split": (lambda d: change_meta(d, splits={"heldout": []}), "no split 'train'; it has heldout"),
    "no tokens": (lambda d: (d / "train-00001.bin").unlink(), r"train-00001\.bin: no such file"),
    "no starts": (lambda d: (d / "train-00001.idx").unlink(), r"train-00001\.idx: no such file"),
    "truncated tokens": (lambda d: truncate(d / "train-00001.bin"), "truncated: found 17 bytes, expected 18"),
    "truncated starts": (lambda d: truncate(d / "train-00000.idx"), "truncated: found 23 bytes, expected 24"),
    "too long": (lambda d: (d / "train-00001.bin").write_bytes(bytes(20)), "too long: found 20 bytes, expected 18"),
    "starts outside": (
        lambda d: (d / "train-00001.idx").write_bytes(np.array([9], "<u8").tobytes()),
        r"documents lie outside train-00001\.bin",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_directory_is_refused_in_one_line(directory: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(directory)
    with pytest.raises(UserError, match=message) as caught:
        open_shards(directory, "train")
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


def test_the_command_shows_the_text_of_any_tokens_by_document(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["def first(): pass", "second = 2", "third"]
    documents = [tokenizer.encode_document(text) for text in texts]
    for name in ("data", "tokenizer"):
        (tmp_path / name).mkdir()
    tokenizer.save(tmp_path / "tokenizer")
    path = write(tmp_path / "data", tokenizer, [documents]) / "train-00000.bin"
    first, second, third = map(len, documents)

    def show(start: int, count: int) -> str:
        main([str(path), "--start", str(start), "--count", str(count), "--tokenizer", str(tmp_path / "tokenizer")])
        return capsys.readouterr().out

    whole = show(0, first + second + third)
    assert whole.splitlines() == [
        f"--- document 0, tokens 0 to {first}",
        texts[0],
        f"--- document 1, tokens {first} to {first + second}",
        texts[1],
        f"--- document 2, tokens {first + second} to {first + second + third}",
        texts[2],
    ]
    assert show(first, second).splitlines() == whole.splitlines()[2:4]
    cut = show(1, first).splitlines()
    assert cut[0] == whole.splitlines()[0] and cut[1] == tokenizer.decode(documents[0][1:])
    assert cut[3] == tokenizer.decode(documents[1][:1])
    for start, count in ((-1, 2), (0, 0), (0, first + second + third + 1)):
        with pytest.raises(UserError, match=r"train-00000.bin: found tokens .*; expected some of 0 to"):
            show(start, count)
    with pytest.raises(UserError, match=r"train-00001.bin: not one of the shards in .*meta.json"):
        main([str(path.with_name("train-00001.bin")), "--tokenizer", str(tmp_path / "tokenizer")])
    with pytest.raises(UserError, match=r"train.bin: not the name of a shard; expected one such as train-00000.bin"):
        main([str(path.with_name("train.bin")), "--tokenizer", str(tmp_path / "tokenizer")])
    with pytest.raises(UserError, match=r"data: found a directory; expected one of its .bin files"):
        main([str(path.parent), "--tokenizer", str(tmp_path / "tokenizer")])
