"""docs/ADDING_A_FAMILY.md against the code that it describes."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_file_and_table_of_the_guide_exists():
    guide = (ROOT / "docs" / "ADDING_A_FAMILY.md").read_text(encoding="utf-8")
    quoted = set(re.findall(r"`([^`\n]+)`", guide))
    files = {name for name in quoted if name.startswith(("rrt/", "tests/"))}
    tables = {name for name in quoted if re.fullmatch(r"_?[A-Z][A-Z_]+|_[a-z]+|model_config_\w+|make_\w+", name)}
    assert len(files) > 10 and len(tables) > 12
    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in files)
    missing = {name for name in tables if not re.search(rf"^(def )?{name}\b", code, re.MULTILINE)}
    assert not missing
