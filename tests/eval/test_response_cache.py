"""eval/response_cache.py: what was written is there again, whatever the end of the file looks like."""

import pytest

from eval.response_cache import ResponseCache, code_digest
from rrt.errors import UserError


def test_responses_survive_exactly_and_need_no_closing(tmp_path):
    path = tmp_path / "deep" / "cache.jsonl"
    cache = ResponseCache(path)
    responses = {"a": (-12.345678901234567, True), "b": "text\nwith “lines”\u2028 and \ud800", "c": (-0.0, False)}
    cache.add(responses)
    cache.add({"d": ""})
    again = ResponseCache(path)
    assert len(again) == 4 and "d" in again and "e" not in again
    assert again["a"] == [-12.345678901234567, True]
    assert again["b"] == responses["b"] and again["d"] == ""


@pytest.mark.parametrize("tail", [b'["x", [-1.5, tr', b'["x"', b"\xff\xfe", b"12\n", b'["x", 1, 2]\n', b"\n\n"])
def test_a_line_cut_short_is_left_out_and_the_next_begins_anew(tmp_path, tail):
    path = tmp_path / "cache.jsonl"
    ResponseCache(path).add({"a": 1})
    path.write_bytes(path.read_bytes() + tail)
    cache = ResponseCache(path)
    assert len(cache) == 1
    cache.add({"b": 2})
    again = ResponseCache(path)
    assert (again["a"], again["b"], len(again)) == (1, 2, 2)


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        ResponseCache(tmp_path / "file" / "cache.jsonl")


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ResponseCache().add({"a": 1})
    assert not list(tmp_path.iterdir())


def test_the_codes_digest_changes_with_any_file_that_responses_come_from(tmp_path):
    names = ("eval/scoring.py", "rrt/ops/loop_lora.py", "rrt/_native.so")
    for name in (*names, "train/trainer.py", "rrt/__pycache__/linear.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = {code_digest(tmp_path)}
    for name in names:
        (tmp_path / name).write_text("changed")
        found.add(code_digest(tmp_path))
    assert len(found) == 4
    (tmp_path / "train" / "trainer.py").write_text("changed")
    (tmp_path / "rrt" / "__pycache__" / "linear.pyc").write_text("changed")
    assert code_digest(tmp_path) in found and len(code_digest()) == 64
