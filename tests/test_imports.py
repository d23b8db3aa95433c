"""Which part of the code may import which: data flows one way, and reference libraries stay in tests and benchmarks."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "rrt": {"train", "eval", "bench", "tests", "transformers", "peft"},
    "train": {"eval", "bench", "tests", "transformers", "peft"},
    "eval": {"train", "bench", "tests", "transformers", "peft"},
    "bench": {"tests", "peft"},
}


def imported_packages(source):
    """Top-level packages that `source` imports, at its head, in functions or by a literal name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value.split(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant))


def test_every_form_of_import_is_seen():
    source = "import a.b, c\ndef f():\n from d.e import g\n importlib.import_module('h.i')\nfrom . import j\n"
    assert set(imported_packages(source)) == {"a", "c", "d", "h"}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_only_what_lies_before_it(package):
    assert (ROOT / package).is_dir()
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / package).rglob("*.py")
        for name in FORBIDDEN[package].intersection(imported_packages(path.read_text()))
    }
    assert not found


def test_importing_the_package_imports_no_torch():
    code = "import sys, rrt; rrt.UserError; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_every_public_name_resolves():
    import rrt

    assert all(getattr(rrt, name) is not None for name in rrt.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = rrt.absent
