"""The command that trains a tokenizer: full disks, and records without text."""

import json
from pathlib import Path

import pytest

from rrt import tokenizer
from rrt.errors import UserError
from tests.util.files import files_of_at_most
from tests.util.tokenizers import training_texts


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    records = [*training_texts(), None, ""]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
    return ["train", "--input", str(tmp_path / "a.jsonl"), "--vocab-size", "300", "--out", str(tmp_path / "out")]


def test_a_full_disk_is_one_line_with_the_path_and_leaves_nothing(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(UserError) as caught, files_of_at_most(1000):
        tokenizer.main(flags)
    assert str(caught.value).startswith(f"{tmp_path / 'out'}: larger than files may be ")
    assert "KiB needed" in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_records_without_text_are_counted_or_refused(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl:{len(training_texts()) + 1}: field 'text' is null"):
        tokenizer.main([*flags, "--strict"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    tokenizer.main(flags)
    assert "\nskipped 2 records without text\n" in capsys.readouterr().out
