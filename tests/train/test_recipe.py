"""Reading recipes: TOML, flags, `--help` and errors."""

import dataclasses
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrt.common.schema import field_doc
from rrt.errors import UserError
from train.pretrain import PretrainRecipe
from train.recipe import OptimConfig, accumulation, read_recipe, to_toml
from train.uptrain import UptrainRecipe

REQUIRED = {"checkpoint.path": "model", "data.path": "data", "run.out": "out", "run.tokens": "4194304"}


def argv(**changes: str) -> list[str]:
    values = REQUIRED | {name.replace("__", "."): value for name, value in changes.items()}
    return [text for name, value in values.items() for text in (f"--{name}", value)]


def read(arguments: list[str]) -> UptrainRecipe:
    return read_recipe(UptrainRecipe, "", arguments)


def error_of(arguments: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        read(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(directory: Path, text: str) -> str:
    path = directory / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


WHOLE = '[checkpoint]\npath = "m"\n[data]\npath = "d"\n[run]\nout = "o"\ntokens = 4_194_304\n'


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, WHOLE + "seed = 3\nkeep = 4\n[optim]\nlr = 1e-3\n")
    recipe = read(["--recipe", path, "--run.keep", "5", "--run.overwrite", "true"])
    assert (recipe.optim.lr, recipe.run.seed, recipe.run.keep, recipe.run.overwrite) == (1e-3, 3, 5, True)
    assert recipe.optim == dataclasses.replace(OptimConfig(), lr=1e-3)


def test_required_fields_may_come_from_flags_alone(tmp_path: Path) -> None:
    recipe = read(["--recipe", write(tmp_path, "[optim]\nlr = 2\n"), *argv()])
    assert (recipe.checkpoint.path, recipe.optim.lr) == ("model", 2.0)
    assert isinstance(recipe.optim.lr, float)


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("run.tokens", "15_000_000_000", 15_000_000_000),
        ("optim.lr", "1e-4", 1e-4),
        ("optim.lr", "1", 1.0),
        ("optim.grad_clip", "inf", math.inf),
        ("run.overwrite", "false", False),
        ("run.dtype", "fp32", "fp32"),
        ("run.out", "123", "123"),
        ("data.path", "data/a", "data/a"),
        ("data.path", '["data/a", "data/b"]', ("data/a", "data/b")),
        ("run.out", 'with space, "quotes" = true', 'with space, "quotes" = true'),
    ],
)
def test_a_flag_is_a_toml_value_and_a_string_needs_no_quotes(flag: str, text: str, value: object) -> None:
    table, field = flag.split(".")
    found = getattr(getattr(read(argv(**{flag: text})), table), field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run__tokens": "many"}, "command line: field 'run.tokens': found 'many'; expected int"),
        ({"run__tokens": "5e9"}, "command line: field 'run.tokens': found 5000000000.0; expected int"),
        ({"run__tokens": "1\nkeep = 2"}, "command line: field 'run.tokens': found '1\\nkeep = 2'; expected int"),
        ({"run__overwrite": "yes"}, "command line: field 'run.overwrite': found 'yes'; expected bool"),
        ({"run__keep": "true"}, "command line: field 'run.keep': found True; expected int"),
        ({"run__dtype": "fp8"}, "command line: field 'run.dtype': found 'fp8'; expected one of 'bf16', 'fp32'"),
        ({"run__keep": "0"}, "command line: field 'run.keep': found 0; expected a positive number"),
        ({"run__seed": "-1"}, "command line: field 'run.seed': found -1; expected 0 or more"),
        ({"run__save_every": "-1"}, "command line: field 'run.save_every': found -1; expected 0 or more"),
        (
            {"run__tokens": "5"},
            "command line: field 'run.tokens': found 5; expected at least run.batch_tokens = 2097152",
        ),
        ({"data__path": "[]"}, "command line: field 'data.path': found (); expected at least one path"),
        (
            {"data__path": '["a", "b"]', "data__weights": "[1.0]"},
            "command line: field 'data.weights': found (1.0,); expected a positive number for each of 2 path(s)",
        ),
        (
            {"data__weights": "[0.0]"},
            "command line: field 'data.weights': found (0.0,); expected a positive number for each of 1 path(s)",
        ),
        ({"data__offset": "-1"}, "command line: field 'data.offset': found -1; expected 0 or more"),
        ({"data__seq_len": "0"}, "command line: field 'data.seq_len': found 0; expected a positive number"),
        ({"optim__lr": "nan"}, "command line: field 'optim.lr': found nan; expected a positive number"),
        ({"optim__lr": "inf"}, "command line: field 'optim.lr': found inf; expected a positive number"),
        ({"optim__beta2": "1"}, "command line: field 'optim.beta2': found 1.0; expected a number from 0 to below 1"),
        (
            {"optim__min_lr_ratio": "2"},
            "command line: field 'optim.min_lr_ratio': found 2.0; expected a number from 0 to 1",
        ),
        ({"guard__loss_spike": "1"}, "command line: field 'guard.loss_spike': found 1.0; expected a number above 1"),
        ({"guard__window": "0"}, "command line: field 'guard.window': found 0; expected a positive number"),
        ({"optim__warmup_steps": "-1"}, "command line: field 'optim.warmup_steps': found -1; expected 0 or more"),
        (
            {"optim__warmup": "1"},
            "command line: found --optim.warmup 1; expected --optim.warmup_steps (--help lists the flags)",
        ),
    ],
)
def test_a_wrong_flag_is_named_with_what_was_found_and_expected(changes: dict[str, str], message: str) -> None:
    assert error_of(argv(**changes)) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nrate = 1\n", "unknown field 'optim.rate'; expected one of: lr, warmup_steps"),
        (
            "[optimizer]\nlr = 1\n",
            "unknown field 'optimizer'; expected one of: checkpoint, start, distill",
        ),
        ('[optim]\nlr = "high"\n', "field 'optim.lr': found 'high'; expected float"),
        ("[optim]\nlr = [1]\n", "field 'optim.lr': found [1]; expected float"),
        ("[optim]\nlr = -1\n", "field 'optim.lr': found -1.0; expected a positive number"),
        ("lr = [", "not valid TOML ("),
    ],
)
def test_a_wrong_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text + WHOLE)
    assert error_of(["--recipe", path]).startswith(f"{path}: {message}")
    if "TOML" not in message:
        assert error_of(["--recipe", path, "--run.seed", "1"]).startswith(f"{path} with flags: {message}")


def test_a_value_outside_any_table_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "optim = 3\n" + WHOLE)
    assert error_of(["--recipe", path]) == f"{path}: field 'optim': found 3; expected a table [optim]"


def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    assert error_of(["--recipe", str(missing)]) == f"{missing}: No such file or directory; expected a recipe (TOML)"
    assert error_of(["--recipe", str(tmp_path)]) == f"{tmp_path}: Is a directory; expected a recipe (TOML)"
    (tmp_path / "latin.toml").write_bytes(b'a = "\xe9"')
    assert error_of(["--recipe", str(tmp_path / "latin.toml")]).startswith(f"{tmp_path / 'latin.toml'}: not valid TOML")


def test_all_missing_fields_are_named_at_once(tmp_path: Path) -> None:
    assert error_of([]) == (
        "command line: missing 'checkpoint.path', 'data.path', 'run.out', 'run.tokens'; "
        "give them in a --recipe or as --checkpoint.path ..."
    )
    path = write(tmp_path, '[data]\npath = "d"\n')
    assert error_of(["--recipe", path]).startswith(f"{path}: missing 'checkpoint.path', 'run.out', 'run.tokens'; ")


@pytest.mark.parametrize("recipe", [UptrainRecipe, PretrainRecipe])
def test_help_shows_every_field_with_its_default_or_that_it_is_required(
    recipe: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        read_recipe(recipe, "What it does.", ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "What it does." in text
    entries = [" ".join(entry.split("\n\n")[0].split()) for entry in re.split(r"\n  (?=--)", text)[1:]]
    lines = {entry.split()[0]: entry for entry in entries}
    for table in dataclasses.fields(recipe):
        for field in dataclasses.fields(table.type):
            line = lines.pop(f"--{table.name}.{field.name}")
            assert field.metadata["doc"] in line
            if field.default is dataclasses.MISSING:
                assert line.endswith("(required)")
            elif field.default is not None:
                assert line.lower().endswith(f"(default {str(field.default).lower()})")
    assert lines.keys() == {"--recipe", "--dry-run", "--mfu", "--gpu"}
    assert "--run.dtype {bf16,fp32}\n" in text


@dataclass(frozen=True)
class AnyTable:
    """Every type of field."""

    text: str = field_doc("text")
    number: float = field_doc("number")
    count: int = field_doc("count")
    flag: bool = field_doc("flag")
    choice: Literal["a", "b"] = field_doc("choice", default="a")
    limit: int | None = field_doc("limit", default=None)


@dataclass(frozen=True)
class AnyRecipe:
    any: AnyTable


@given(
    table=st.builds(
        AnyTable,
        text=st.text(st.characters(codec="utf-8")),
        number=st.floats(allow_nan=False),
        count=st.integers(-(2**62), 2**62),
        flag=st.booleans(),
        choice=st.sampled_from(["a", "b"]),
        limit=st.none() | st.integers(0, 9),
    )
)
def test_a_written_recipe_reads_back_the_same(table: AnyTable, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_bytes(to_toml(AnyRecipe(table)).encode())
    assert read_recipe(AnyRecipe, "", ["--recipe", str(path)]) == AnyRecipe(table)


@pytest.mark.parametrize(
    "text", ['a"b', "a\\b", "\\u0041", "tab\tnew\nline\r", "\x00\x1f\x7f\x80", "Gemma \U0001f48e", "C:\\x"]
)
def test_awkward_strings_are_written_as_toml(text: str) -> None:
    written = to_toml(AnyRecipe(AnyTable(text, 1e-4, 1, True)))
    assert tomllib.loads(written)["any"] == {"text": text, "number": 1e-4, "count": 1, "flag": True, "choice": "a"}


def test_lists_are_written_as_toml(tmp_path: Path) -> None:
    recipe = read(argv(data__path='["a", "b"]', data__weights="[1, 0.5]"))
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    assert read(["--recipe", str(tmp_path / "recipe.toml")]).data == recipe.data
    assert (recipe.data.path, recipe.data.weights) == (("a", "b"), (1.0, 0.5))


def test_a_written_recipe_has_every_default_filled_in(tmp_path: Path) -> None:
    recipe = read(argv())
    assert read(["--recipe", write(tmp_path, to_toml(recipe))]) == recipe
    assert tomllib.loads(to_toml(recipe))["optim"] == dataclasses.asdict(OptimConfig())


def test_a_batch_that_is_no_whole_number_of_micro_batches_is_refused() -> None:
    recipe = read(argv(run__micro_batch="3"))
    with pytest.raises(UserError, match=r"found 2097152; expected a multiple of 49152 = run\.micro_batch 3 x data"):
        accumulation(recipe, 8)
