"""Reading of corpora: documents of every kind of file, splits, and errors that name file and line."""

import codecs
import gzip
import json
import random
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from rrt.data import corpus
from rrt.data.corpus import (
    STDLIB_HELDOUT,
    Part,
    TextFilter,
    documents,
    find_files,
    grouped_documents,
    read_documents,
    stdlib_files,
    whole_file,
)
from rrt.errors import UserError
from tests.util.files import LFS_POINTER


def records(texts: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"meta": 1, field: text}).encode() + b"\n" for text in texts)


def write_lines(path: Path, texts: list[str]) -> Path:
    data = records(texts)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        half = len(data) // 2  # two frames, as tools that append write them
        data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.rst"])
def test_a_text_file_is_one_document_with_its_line_ends(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes("\ufeffone\r\ntwo é\n\n".encode())
    assert list(documents(path)) == ["one\r\ntwo é\n\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines_give_their_documents(tmp_path: Path, name: str) -> None:
    texts = ["one", "two\nlines é", "", "x" * 3_000_000, "last"]
    assert list(documents(write_lines(tmp_path / name, texts))) == [text for text in texts if text]


def test_parquet_gives_its_documents_and_their_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = ["one", "two\nlines é", "", "last"]
    meta = [{"set": "web"}, {"set": "books"}, {"set": "web"}, {"set": None}]
    table = pyarrow.table({"id": [1, 2, 3, 4], "text": texts, "meta": meta})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert list(documents(path)) == ["one", "two\nlines é", "last"]
    expected = [("one", "web"), ("two\nlines é", "books"), ("last", None)]
    assert list(grouped_documents(path, "meta.set")) == expected
    assert [group for _, group in grouped_documents(path, "absent.field")] == [None] * 3


LINES = [b'{"text": "a"}', b'{"text": null}', b'{"text": ""}', b'{"text": "b"}']
COMPRESS = {".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_records_without_text_are_skipped_and_counted_or_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "", "b"]}), path)
    else:
        path.write_bytes(COMPRESS.get(path.suffix, bytes)(b"\n".join(LINES)))
    lenient, strict = TextFilter(), TextFilter(is_strict=True)
    assert list(documents(path, text_filter=lenient)) == list(documents(path)) == ["a", "b"]
    assert lenient.skipped == 2
    assert [text for text, _ in grouped_documents(path, "set", text_filter=lenient)] == ["a", "b"]
    assert lenient.skipped == 4
    place = f"{path}: row 2" if path.suffix == ".parquet" else f"{path}:2"
    with pytest.raises(UserError, match=f"^{place}: field 'text' is null; expected a text, or no --strict[^\n]*$"):
        list(documents(path, text_filter=strict))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_byte_order_mark_before_a_record_is_dropped(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    joined = b"".join(codecs.BOM_UTF8 + records(texts) for texts in (["\ufeffone", "two"], ["three"]))
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(joined))
    assert list(documents(path)) == ["\ufeffone", "two", "three"]
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(codecs.BOM_UTF8 + b"\n"))
    assert list(documents(path)) == []
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(records(["one"]).decode().encode("utf-16")))
    with pytest.raises(UserError, match=f"^{path}:1: not UTF-8 text"):
        list(documents(path))


def test_parquet_that_cannot_be_read_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: no field 'text' \(fields found: 'content'\)"):
        list(documents(path))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: row 2: field 'text' is null; expected a text, or no --strict"):
        list(documents(path, text_filter=TextFilter(is_strict=True)))
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: row 1: field 'text' is a int"):
        list(documents(path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.parquet: damaged or not a parquet file \([^\n]*\)$"):
        list(documents(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a\.parquet: reading parquet needs pyarrow"):
        list(documents(path))


@pytest.mark.parametrize(
    ("meta", "group"),
    [({"set": "web"}, "web"), ('{"set": "web"}', "web"), ("web", None), ({"set": None}, None), ({}, None), ([1], None)],
)
def test_a_group_is_a_path_into_the_record_or_a_string_of_json(tmp_path: Path, meta: object, group: str | None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x", "meta": meta}) + "\n" + json.dumps({"text": "y"}) + "\n")
    assert list(grouped_documents(path, "meta.set")) == [("x", group), ("y", None)]


def test_a_last_line_without_newline_and_blank_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "a"}\r\n  \n{"text": "b"}')
    assert list(documents(path)) == ["a", "b"]


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(records(["body"], "content"))
    assert list(documents(path, text_field="content")) == ["body"]


def test_an_existing_path_is_taken_literally_before_it_is_a_glob(tmp_path: Path) -> None:
    for name in ("sp ace [1].txt", "sp ace 1.txt", "da[t]a/a?.txt", "da[t]a/ab.txt", "data/ab.txt", "*.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(pattern: str) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in find_files(f"{tmp_path}/{pattern}")]

    assert found("sp ace [1].txt") == ["sp ace [1].txt"]
    assert found("sp ace [12].txt") == ["sp ace 1.txt"]
    assert found("*.txt") == ["*.txt"]
    assert found("da[t]a/*.txt") == ["da[t]a/a?.txt", "da[t]a/ab.txt"]
    assert found("da[t]a/a?.txt") == ["da[t]a/a?.txt"]
    assert found("d[a]t*/ab.txt") == ["data/ab.txt"]
    with pytest.raises(UserError, match=r"da\[t\]a: is a directory; expected files, such as '.*da\[t\]a/\*\*/"):
        found("da[t]a")


def test_a_git_lfs_pointer_is_named_whatever_its_kind(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"):
        (tmp_path / name).write_text(LFS_POINTER)
        with pytest.raises(UserError, match=f"^{tmp_path / name}: found a git-lfs pointer; .* git lfs pull"):
            list(documents(tmp_path / name))


def test_files_come_in_the_order_given_sorted_within_a_glob_each_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "z.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = find_files([f"{tmp_path}/*.md", f"{tmp_path}/**/*.txt", tmp_path / "a.txt"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["z.md", "a.txt", "b.txt", "sub/c.txt"]


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(0, 40), max_size=30), step=st.integers(1, 90), newline=st.booleans())
def test_byte_ranges_of_any_length_cover_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], step: int, newline: bool
) -> None:
    path = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    data = records([f"{i}" + "x" * length for i, length in enumerate(lengths)])
    path.write_bytes(data if newline else data.rstrip(b"\n"))
    size = path.stat().st_size
    parts = [Part(path, start, min(start + step, size)) for start in range(0, size, step)]
    assert [text for part in parts for text in read_documents(part)] == list(read_documents(whole_file(path)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "found a JSON list; expected an object with field 'text'"),
        (b'{"content": "x"}', r"no field 'text' \(fields found: 'content'\)"),
        (b"{}", r"no field 'text' \(fields found: none\)"),
        (b'{"text": 7}', "field 'text' is a int; expected a string"),
        (b'{"text": "\xff"}', "not UTF-8 text"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, name: str, line: bytes, message: str) -> None:
    path = tmp_path / name
    data = records(["one", "two"]) + b"\n" + line + b"\n" + records(["three"])
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(data))
    with pytest.raises(UserError, match=f"^{path}:4: {message}") as caught:
        list(documents(path))
    assert "\n" not in str(caught.value)


def test_a_bad_line_in_a_byte_range_has_its_line_number_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = records(["x" * 50] * 100)
    path.write_bytes(good + b"bad\n" + good)
    size = path.stat().st_size
    for start in (0, 1, len(good) // 2, len(good) - 1, len(good)):
        with pytest.raises(UserError, match=r"a\.jsonl:101: not valid JSON"):
            list(read_documents(Part(path, start, size)))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "other format"])
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    noise = random.Random(0)
    path = write_lines(tmp_path / name, ["".join(noise.choices("abcdefgh", k=100)) for _ in range(200)])
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[:-40]
    elif damage == "flipped":
        data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    else:
        data = bytearray(b"plain text")
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path}(:\\d+)?: (damaged or not a|not valid JSON)"):
        list(documents(path))


def test_a_truncated_zstd_file_without_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    data = zstandard.ZstdCompressor(write_content_size=False).compress(records(["x"] * 1000))
    path.write_bytes(data[:-3])
    with pytest.raises(UserError, match="ends within a frame"):
        list(documents(path))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing-*.txt", "no file matches"),
        ("dangling.txt", "found a broken link, or no ordinary file; expected text files"),
        ("folder", "is a directory"),
        ("table.arrow", "unknown kind of file; expected text files"),
        ("latin.txt", "not UTF-8 text"),
    ],
)
def test_unreadable_inputs_are_refused_in_one_line(tmp_path: Path, pattern: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    (tmp_path / "table.arrow").write_bytes(b"ARROW1")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        list(documents(f"{tmp_path}/{pattern}"))
    assert "\n" not in str(caught.value) and pattern in str(caught.value)


def test_the_standard_library_is_held_out_by_package() -> None:
    train, heldout = stdlib_files("train"), stdlib_files("heldout")
    assert not set(train) & set(heldout)
    size, held_out = (sum(path.stat().st_size for path in files) for files in (train, heldout))
    assert 0.05 < held_out / (size + held_out) < 0.15
    assert {path.parent.name for path in heldout} >= {"json", "logging", "email"} <= STDLIB_HELDOUT
    assert not any("test" in path.parts or "site-packages" in path.parts for path in train)


def test_the_standard_library_is_read_in_the_order_of_its_paths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in (
        "json/b.py",
        "os.py",
        "json/__init__.py",
        "test/x.py",
        "abc.py",
        "email/test/y.py",
        "_sysconfigdata_.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "bad.py").write_bytes(b"\xff")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(documents("python-stdlib")) == ["abc.py", "os.py"]
    assert list(documents("python-stdlib", split="heldout")) == ["json/__init__.py", "json/b.py"]
    with pytest.raises(UserError, match="split is 'validation'; expected one of train, heldout"):
        list(documents("python-stdlib", split="validation"))
