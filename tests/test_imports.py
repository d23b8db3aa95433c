"""Imports flow one way through the project, and reference libraries stay in tests and benchmarks."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"errors", "version", "native"}
COMMANDS = {path.stem for path in (ROOT / "rrt").glob("*.py")} - LIBRARIES - {"__init__"}
# A unit, a folder or a module of rrt/ or another top-level folder, imports itself and units of the lines above it.
# Units of one line don't import each other.
ORDER = [
    {"rrt._plan"},  # of C++
    {f"rrt.{name}" for name in LIBRARIES},
    {"rrt.common", "rrt.ops"},
    {"rrt.model"},
    {"rrt.checkpoint", "rrt.data"},
    {"rrt.folding", "rrt.decode"},
    {"rrt.serve"},
    {f"rrt.{name}" for name in COMMANDS},
    {"train", "eval"},
    {"bench"},
]
LEVELS = {unit: level for level, units in enumerate(ORDER) for unit in units}
# Libraries that check or measure ours, and tests: who may import them.
ALLOWED = {"tests": set(), "peft": set(), "transformers": {"bench"}}


def imported_names(source):
    """Dotted names that `source` imports, at its head, in functions or by a literal name; relative ones with dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # Names of `rrt` itself are modules: `from rrt import ops`.
            yield from (f"rrt.{alias.name}" for alias in node.names) if module == "rrt" else [module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def unit_of(name):
    """The unit that a dotted name lies in: `rrt.model.config` in `rrt.model`, `train.data` in `train`."""
    return ".".join(name.split(".")[: 2 if name.startswith("rrt.") else 1])


def imports_against_the_order(module, source):
    """The imports in `source`, the code of `module` (a dotted name), that the order does not allow."""
    unit = unit_of(module)
    for name in imported_names(source):
        imported = unit_of(name)
        if name.startswith("."):
            yield f"{module} imports {name}, a relative name"
        elif imported in ALLOWED:
            if module.split(".")[0] not in ALLOWED[imported]:
                yield f"{module} imports {name}"
        elif imported in LEVELS:
            if imported != unit and LEVELS[imported] >= LEVELS[unit]:
                yield f"{module} imports {name}"
        elif imported.split(".")[0] == "rrt" == unit.split(".")[0]:
            yield f"{module} imports {name}, a public name: import it from where it is defined"


def modules_of_the_project():
    """(dotted name, path) of every module that has a place in the order."""
    for package in ("rrt", "train", "eval", "bench"):
        assert (ROOT / package).is_dir()
        for path in sorted((ROOT / package).rglob("*.py")):
            if path != ROOT / "rrt" / "__init__.py":  # the public names, from everywhere
                yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def test_every_form_of_import_is_seen():
    source = "import a.b, c\ndef f():\n from d.e import g\n importlib.import_module('h.i')\nfrom . import j\n"
    source += "from ..k import l\nfrom rrt import ops, errors\n"
    assert set(imported_names(source)) == {"a.b", "c", "d.e", "h.i", ".", "..k", "rrt.ops", "rrt.errors"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rrt.ops.kv", "from rrt.model.config import ModelConfig"),
        ("rrt.model.sizes", "def f():\n from rrt.checkpoint.source import open_source"),
        ("rrt.data.corpus", "import rrt.checkpoint.format"),
        ("rrt.checkpoint.source", "from rrt.data import tokenizer"),
        ("rrt.decode.generation", "from rrt.folding.fold import Folding"),
        ("rrt.native", "from rrt.common import files"),
        ("rrt.folding.unroll", "from rrt.export import main"),
        ("rrt.folding.unroll", "from rrt import export"),
        ("rrt.convert", "from rrt.inspect import sizes_table"),
        ("rrt.decode.generation", "from rrt import load_model"),
        ("rrt.decode.generation", "from .decoder import Decoder"),
        ("rrt.export", "import train.recipe"),
        ("train.losses", "import eval.scoring"),
        ("eval.scoring", "importlib.import_module('train.losses')"),
        ("train.losses", "from bench import timing"),
        ("eval.scoring", "import transformers"),
        ("bench.kernels", "from tests.util import models"),
        ("bench.kernels", "import peft"),
    ],
)
def test_an_import_against_the_order_is_found(module, source):
    assert len(list(imports_against_the_order(module, source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rrt.model.transformer", "from rrt import ops"),
        ("rrt.decode.generation", "from rrt.decode.decoder import Decoder\nimport torch.nn"),
        ("rrt.convert", "from rrt.folding.conversion import convert"),
        ("bench.kernels", "import transformers, eval.scoring, train.losses, rrt\nfrom rrt import load_model"),
    ],
)
def test_an_import_along_the_order_is_allowed(module, source):
    assert not list(imports_against_the_order(module, source))


def test_every_module_has_a_place_in_the_order():
    assert {unit_of(name) for name, _ in modules_of_the_project()} == LEVELS.keys() - {"rrt._plan"}


def test_imports_follow_the_order():
    modules = list(modules_of_the_project())
    assert not [found for name, path in modules for found in imports_against_the_order(name, path.read_text())]


def test_importing_the_package_imports_no_torch():
    code = "import sys, rrt; rrt.UserError; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_every_public_name_resolves():
    import rrt

    assert all(getattr(rrt, name) is not None for name in rrt.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = rrt.absent
