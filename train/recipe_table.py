"""Recipe files: one recipe, `my.toml`, or a table of them of which a row is chosen, `gemma.toml#b2_average_15b`.

A row says only what differs from its group, and a group what differs from the rest. From the widest to the narrowest:

    shared = "shared.toml"         # a file beside this one, whose [common] and [parts] count here too

    [common]                       # settings of every row
    run.micro_batch = 4

    [parts.distilled]              # settings that groups and rows use by name
    distill.loss = "forward_kl"

    [[group]]                      # rows that belong together, with settings of their own over those of the parts
    use = ["distilled"]
    start.base = "gemma-2b"

    [group.rows]                   # settings of one row, in the same way
    b2_jsd_15b = { use = ["15b"], distill.loss = "jsd" }

Settings are fields of a recipe, which `--help` of the training commands lists; the narrowest place wins.
"""

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rrt.errors import UserError

Settings = dict[str, dict[str, Any]]
"""Fields by name, by the table of the recipe that they are in."""

SCRIPTS = {"exits": "train/early_exit.py", "model": "train/pretrain.py"}
"""Commands by the table that only their recipes have."""


def read_settings(recipe: str) -> Settings:
    """Read the settings of `FILE`, or of one row of a table, `FILE#ROW`.

    Raises:
        UserError: the file is not readable, no TOML or no recipe, the row is missing, or a table comes without a row.
    """
    name, _, row = recipe.rpartition("#")
    if not name or Path(recipe).exists():
        name, row = recipe, ""
    path = Path(name)
    content = _read_toml(path)
    if "group" not in content:
        if row:
            raise UserError(f"{path}: has no rows; expected --recipe {path}, without #{row}")
        for key in ("include", "shared"):
            if key in content:
                raise UserError(
                    f"{path}: field '{key}': a recipe without rows takes nothing from other files; "
                    "expected a table of rows under [[group]], with shared = FILE and [parts]"
                )
        return _as_settings(content, str(path))
    rows = read_rows(path)
    if row in rows:
        return rows[row]
    if not row:
        raise UserError(f"{path}: has {len(rows)} rows; name one of them, as {path}#{next(iter(rows), 'ROW')}")
    raise UserError(f"{path}: no row {row!r}; expected one of its {len(rows)} rows{such_as(row, rows)}")


def read_rows(path: Path) -> dict[str, Settings]:
    """Read the settings of every row of a table, by the row's name.

    Raises:
        UserError: a file is not readable or no TOML, or something in it is not what belongs there.
    """
    content = _read_toml(path)
    common, parts = _common_and_parts(content, str(path), ("shared", "group"))
    if "shared" in content:
        if not isinstance(content["shared"], str):
            raise UserError(f"{path}: field 'shared': found {content['shared']!r}; expected a file beside this one")
        shared = path.parent / content["shared"]
        shared_common, shared_parts = _common_and_parts(_read_toml(shared, f", as {path} says"), str(shared))
        common, parts = _merge(shared_common, common), shared_parts | parts
    groups = content.get("group", [])
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise UserError(f"{path}: field 'group': found {groups!r}; expected groups, each under [[group]]")
    rows: dict[str, Settings] = {}
    for number, group in enumerate(groups, 1):
        where = f"{path}: group {number}"
        own_rows = _take_table(group, "rows", where)
        wider = _merge(common, _with_parts(group, parts, where))
        for name, row in _as_settings(own_rows, f"{where}: rows").items():
            if name in rows:
                raise UserError(f"{path}#{name}: found twice; expected every row once")
            rows[name] = _merge(wider, _with_parts(row, parts, f"{path}#{name}"))
    return rows


def script_of(settings: Settings) -> str:
    """Return the command that a recipe with these settings is for."""
    return next((script for table, script in SCRIPTS.items() if table in settings), "train/uptrain.py")


def such_as(name: str, names: Iterable[str]) -> str:
    """Return the end of an error message that suggests those of `names` that `name` may stand for, if there are any."""
    found = difflib.get_close_matches(name, names)
    return f", such as {', '.join(found)}" if found else ""


def _common_and_parts(
    content: dict[str, Any], where: str, others: tuple[str, ...] = ()
) -> tuple[Settings, dict[str, Settings]]:
    for key in content:
        if key not in ("common", "parts", *others):
            raise UserError(
                f"{where}: unknown field '{key}'; expected one of: {', '.join((*others, 'common', 'parts'))}"
            )
    common = _as_settings(_take_table(content, "common", where), f"{where}: common")
    parts = _as_settings(_take_table(content, "parts", where), f"{where}: parts")
    return common, {name: _as_settings(part, f"{where}: parts.{name}") for name, part in parts.items()}


def _with_parts(content: dict[str, Any], parts: dict[str, Settings], where: str) -> Settings:
    """Merge the settings of a group or row over those of the parts that it uses."""
    used = content.pop("use", [])
    if not isinstance(used, list) or not all(isinstance(name, str) and name in parts for name in used):
        raise UserError(f"{where}: field 'use': found {used!r}; expected a list of parts: {', '.join(parts)}")
    return _merge(*(parts[name] for name in used), _as_settings(content, where))


def _take_table(content: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    table = content.pop(key, {})
    if not isinstance(table, dict):
        raise UserError(f"{where}: field '{key}': found {table!r}; expected a table [{key}]")
    return table


def _as_settings(content: dict[str, Any], where: str) -> Settings:
    for name, fields in content.items():
        if not isinstance(fields, dict):
            raise UserError(f"{where}: field '{name}': found {fields!r}; expected a table [{name}]")
    return content


def _merge(*layers: Settings) -> Settings:
    """Merge settings field by field; later ones override earlier ones."""
    merged: Settings = {}
    for layer in layers:
        for table, fields in layer.items():
            merged[table] = merged.get(table, {}) | fields
    return merged


def _read_toml(path: Path, reason: str = "") -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a recipe (TOML){reason}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None
