"""Tables of recipes: which settings a row gets, and what is said of a table that is wrong."""

from pathlib import Path
from typing import Any

import pytest

from rrt.errors import UserError
from train import early_exit, pretrain, uptrain
from train.command import Command
from train.recipe import read_recipe
from train.recipe_table import read_rows, read_settings, script_of
from train.uptrain import UptrainRecipe

SHARED = """
[common]
optim = { lr = 1.0, beta1 = 0.1, beta2 = 0.1, eps = 0.1, weight_decay = 0.1, grad_clip = 0.1 }
run.tokens = 4_194_304
[parts.wide]
optim = { beta2 = 0.3, eps = 0.3, weight_decay = 0.3, grad_clip = 0.3 }
[parts.narrow]
optim = { weight_decay = 0.5, grad_clip = 0.5 }
"""
TABLE = """
shared = "shared.toml"
[common]
optim = { beta1 = 0.2, beta2 = 0.2, eps = 0.2, weight_decay = 0.2, grad_clip = 0.2 }
[[group]]
use = ["wide"]
optim = { eps = 0.4, weight_decay = 0.4, grad_clip = 0.4 }
[group.rows]
a_15b = { use = ["narrow"], optim.grad_clip = 0.6 }
"b_0.1" = {}
[[group]]
[group.rows]
c_15b = { run.seed = 3 }
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "shared.toml").write_text(SHARED)
    (tmp_path / "table.toml").write_text(TABLE)
    return tmp_path / "table.toml"


def error_of(recipe: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        read_settings(str(recipe))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_narrowest_place_that_sets_a_field_wins(table: Path) -> None:
    rows = read_rows(table)
    assert list(rows) == ["a_15b", "b_0.1", "c_15b"]
    assert list(rows["a_15b"]["optim"].values()) == [1.0, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert list(rows["b_0.1"]["optim"].values()) == [1.0, 0.2, 0.3, 0.4, 0.4, 0.4]
    assert list(rows["c_15b"]["optim"].values()) == [1.0, 0.2, 0.2, 0.2, 0.2, 0.2]
    assert rows["c_15b"]["run"] == {"tokens": 4_194_304, "seed": 3}
    assert read_settings(f"{table}#c_15b") == rows["c_15b"]


def test_a_row_is_read_as_a_recipe_that_flags_override(table: Path) -> None:
    paths = ["--checkpoint.path", "m", "--data.path", "d", "--run.out", "o"]
    recipe = read_recipe(UptrainRecipe, "", ["--recipe", f"{table}#c_15b", *paths, "--optim.eps", "0.9"])
    assert (recipe.run.seed, recipe.optim.lr, recipe.optim.eps) == (3, 1.0, 0.9)


def test_a_hash_in_a_file_name_names_no_row(tmp_path: Path) -> None:
    (tmp_path / "my#1.toml").write_text("[optim]\nlr = 2.0\n")
    assert read_settings(str(tmp_path / "my#1.toml")) == {"optim": {"lr": 2.0}}


def test_a_missing_row_is_refused_with_similar_ones(table: Path) -> None:
    assert error_of(f"{table}#c_60b") == (f"{table}: no row 'c_60b'; expected one of its 3 rows, such as c_15b")
    assert error_of(f"{table}#nope") == f"{table}: no row 'nope'; expected one of its 3 rows"
    assert error_of(table) == f"{table}: has 3 rows; name one of them, as {table}#a_15b"


def test_a_row_of_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("[optim]\nlr = 2.0\n")
    assert error_of(f"{path}#a") == f"{path}: has no rows; expected --recipe {path}, without #a"
    assert error_of(f"{tmp_path}/none.toml#a").startswith(f"{tmp_path}/none.toml: No such file or directory; expected")


@pytest.mark.parametrize("line", ['include = ["a.toml"]', 'shared = "a.toml"'])
def test_a_recipe_that_takes_settings_from_other_files_is_told_to_be_a_table(line: str, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(f"{line}\n[optim]\nlr = 2.0\n")
    assert error_of(path) == (
        f"{path}: field '{line.split()[0]}': a recipe without rows takes nothing from other files; "
        "expected a table of rows under [[group]], with shared = FILE and [parts]"
    )


@pytest.mark.parametrize(
    ("setting", "command", "script"),
    [
        ("exits.coefficient = 0.1", uptrain.COMMAND, "train/early_exit.py"),
        ('model.config = "gemma-2b"', uptrain.COMMAND, "train/pretrain.py"),
        ('model.config = "gemma-2b"', early_exit.COMMAND, "train/pretrain.py"),
        ("exits.coefficient = 0.1", pretrain.COMMAND, "train/early_exit.py"),
    ],
)
def test_a_row_given_to_another_command_names_its_own(
    setting: str, command: Command[Any], script: str, table: Path
) -> None:
    table.write_text(TABLE.replace("run.seed = 3", setting))
    row = f"{table}#c_15b"
    assert script_of(read_settings(row)) == script
    with pytest.raises(UserError) as caught:
        read_recipe(command.recipe, "", ["--recipe", row])
    name = setting.partition(".")[0]
    assert str(caught.value) == f"{row}: has a table [{name}]; expected --recipe {row} to be given to {script}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[common]", "[comon]", ": unknown field 'comon'; expected one of: shared, group, common, parts"),
        ('"shared.toml"', "3", ": field 'shared': found 3; expected a file beside this one"),
        (
            "[common]\noptim = {",
            "[common]\noptim = 3 # {",
            ": common: field 'optim': found 3; expected a table [optim]",
        ),
        ("[common]\noptim", "common = 3\n# optim", ": field 'common': found 3; expected a table [common]"),
        ('["wide"]', '["x"]', ": group 1: field 'use': found ['x']; expected a list of parts: wide, narrow"),
        ('["narrow"]', '"x"', "#a_15b: field 'use': found 'x'; expected a list of parts: wide, narrow"),
        ("[group.rows]", "rows = 3\n[group.x]", ": group 1: field 'rows': found 3; expected a table [rows]"),
        ("optim.grad_clip", "grad_clip", "#a_15b: field 'grad_clip': found 0.6; expected a table [grad_clip]"),
        ("= {}", "= 3", ": group 1: rows: field 'b_0.1': found 3; expected a table [b_0.1]"),
        ("c_15b =", "a_15b =", "#a_15b: found twice; expected every row once"),
    ],
)
def test_a_wrong_table_is_named_with_the_row(old: str, new: str, message: str, table: Path) -> None:
    assert old in TABLE
    table.write_text(TABLE.replace(old, new, 1))
    assert error_of(f"{table}#c_15b") == f"{table}{message}"


def test_groups_that_are_no_groups_are_refused(table: Path) -> None:
    table.write_text("group = [3]\n")
    assert error_of(f"{table}#a") == f"{table}: field 'group': found [3]; expected groups, each under [[group]]"


def test_a_wrong_shared_file_is_named(table: Path) -> None:
    shared = table.parent / "shared.toml"
    shared.write_text("[[group]]\n")
    assert error_of(f"{table}#c_15b") == (f"{shared}: unknown field 'group'; expected one of: common, parts")
    shared.unlink()
    assert error_of(f"{table}#c_15b") == (
        f"{shared}: No such file or directory; expected a recipe (TOML), as {table} says"
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.lr = 3", "unknown field 'optimizer'; expected one of: checkpoint, start"),
        ("optim.rate = 3", "unknown field 'optim.rate'; expected one of: lr, warmup_steps"),
        ("optim.lr = -1", "field 'optim.lr': found -1.0; expected a positive number"),
    ],
)
def test_a_wrong_field_of_a_row_is_named_with_the_row(setting: str, message: str, table: Path) -> None:
    table.write_text(TABLE.replace("run.seed = 3", setting))
    paths = ["--checkpoint.path", "m", "--data.path", "d", "--run.out", "o"]
    with pytest.raises(UserError) as caught:
        read_recipe(UptrainRecipe, "", ["--recipe", f"{table}#c_15b", *paths])
    assert str(caught.value).startswith(f"{table}#c_15b with flags: {message}")
