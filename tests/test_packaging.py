"""The build seen from outside: its requirements, its messages without them, and the modules' dependencies."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from rrt import native
from rrt.native import REBUILD, load_plan
from rrt.ops import build_info
from rrt.version import __version__
from tests.util.native import needs_native

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TORCH = Path(torch.__file__).parent
PLAN = load_plan().module
needs_tools = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a C++ compiler on PATH"
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that building and importing need, without the modules."""
    built = shutil.ignore_patterns("_native*", "_plan*.so", "_plan*.txt", "__pycache__")
    for name in ("csrc", "rrt"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=checkout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(checkout, "setup.py", "-q", "build_ext", "--inplace", **environment)


IMPORT_AND_REPORT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from rrt.ops import build_info, loop_lora_linear
    a = torch.ones(1, 1, 2)
    for _ in range(2):
        loop_lora_linear(torch.ones(1, 2), torch.ones(1, 2), None, a, a[..., :1], torch.zeros(1, dtype=torch.int32))
    imports = len(caught)
    from rrt.decode.page_table import make_page_table
    for _ in range(2):
        make_page_table(1, 1)
ours = [str(w.message) for w in caught[:imports] if str(w.message).startswith("rrt:")]
of_plan = [str(w.message) for w in caught[imports:] if str(w.message).startswith("rrt:")]
info = build_info()
print(json.dumps({"reason": info.reason, "stale": info.stale, "warnings": ours, "plan warnings": of_plan}))
"""


def report(checkout: Path, **environment: str) -> dict[str, object]:
    result = run(checkout, "-c", IMPORT_AND_REPORT, **environment)
    assert result.returncode == 0, result.stderr
    value: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return value


def requirements() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    texts = PROJECT["project"]["dependencies"] + [text for extra in extras for text in extra]
    return [r for r in map(Requirement, texts) if r.name != PROJECT["project"]["name"]]


def test_the_build_never_requires_torch() -> None:
    assert not [text for text in PROJECT["build-system"]["requires"] if Requirement(text).name == "torch"]


def test_constraints_pin_every_direct_dependency_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert "+" not in "".join(pins.values()), "local versions exist on one index only"
    for requirement in requirements():
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert pins.keys() == {requirement.name for requirement in requirements()}


def test_the_version_is_written_once() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_without_torch_the_build_succeeds_and_says_so_in_one_line(checkout: Path) -> None:
    empty = checkout / "no-torch-here"
    result = build(checkout, RRT_TORCH_DIR=str(empty))
    assert result.returncode == 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("rrt:")]
    assert line == (
        "rrt: installing without native operators: no torch to build for "
        f"(RRT_TORCH_DIR={empty} holds none): install torch first"
    )
    facts = report(checkout)
    assert facts["reason"] == f"not built when rrt was installed: {line.partition('operators: ')[2]}"
    assert len(facts["warnings"]) == 1 and facts["reason"] in facts["warnings"][0]
    assert facts["plan warnings"] == [f"rrt: host planning runs in Python: {facts['reason']}. To build it: {REBUILD}"]


@pytest.mark.parametrize(("missing", "message"), [("CXX", "no C++ compiler"), ("PATH", "no C")])
def test_without_tools_the_build_succeeds_unless_demanded(checkout: Path, missing: str, message: str) -> None:
    # A PATH of its own hides the compiler, but not the CMake of a virtual environment.
    environment = {missing: str(checkout / "nothing"), "RRT_TORCH_DIR": str(TORCH)}
    result = build(checkout, **environment)
    assert result.returncode == 0
    assert f"rrt: installing without native operators: {message}" in result.stderr
    for switch in ("RRT_WITH_NATIVE", "RRT_WITH_CUDA"):
        demanded = build(checkout, **environment, **{switch: "1"})
        assert demanded.returncode == 1
        assert f"error: cannot build the native operators: {message}" in demanded.stderr.splitlines()[-1]


@pytest.fixture
def tools_that_record(tmp_path: Path) -> dict[str, str]:
    """An environment whose cmake writes down its arguments and installs the library that is loaded here, if any."""
    folder = tmp_path / "tools"
    folder.mkdir()
    cmake = folder / "cmake"
    install = f'[ "$1" != --install ] || cp "{build_info().library}" "$4"' if build_info().library else ""
    cmake.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{install}\n', encoding="utf-8")
    cmake.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "RRT_TORCH_DIR": str(TORCH), "CALLS": str(folder / "calls")}


@needs_tools
def test_without_pybind11_the_operators_are_built_all_the_same(
    checkout: Path, tools_that_record: dict[str, str]
) -> None:
    hidden = checkout / "hidden"
    hidden.mkdir()
    (hidden / "pybind11.py").write_text("raise ImportError\n", encoding="utf-8")
    result = build(checkout, **tools_that_record, RRT_WITH_NATIVE="1", PYTHONPATH=str(hidden))
    assert result.returncode == 0, result.stderr
    missing = f"no pybind11 for {sys.executable}: pip install pybind11"
    assert f"rrt: installing without rrt._plan: {missing}" in result.stderr.splitlines()
    configure = Path(tools_that_record["CALLS"]).read_text(encoding="utf-8").splitlines()[0]
    assert "-DRRT_WITH_TORCH=1" in configure and "-DRRT_WITH_PYTHON=0" in configure
    facts = report(checkout)
    reason = f"not built when rrt was installed: {missing}"
    assert facts["plan warnings"] == [f"rrt: host planning runs in Python: {reason}. To build it: {REBUILD}"]
    assert build_info().library is None or facts["reason"] is None

    again = build(checkout, **tools_that_record)
    assert again.returncode == 0
    if importlib.util.find_spec("pybind11") is not None:
        assert "-DRRT_WITH_PYTHON=1" in Path(tools_that_record["CALLS"]).read_text(encoding="utf-8")
        assert not list((checkout / "rrt").glob("*.txt")), "the note of an earlier build is still there"


def test_a_torch_out_of_range_is_named(checkout: Path) -> None:
    old = checkout / "old-torch"
    old.mkdir()
    (old / "version.py").write_text("__version__ = '2.10.1+cu128'\n", encoding="utf-8")
    result = build(checkout, RRT_TORCH_DIR=str(old))
    assert result.returncode == 0
    assert f"found torch 2.10 in {old}; expected at least 2.11 and below 2.14" in result.stderr


def test_a_bad_switch_is_refused(checkout: Path) -> None:
    result = build(checkout, RRT_WITH_CUDA="yes")
    assert result.returncode == 1
    assert "error: RRT_WITH_CUDA: found 'yes'; expected one of auto, 0, 1" in result.stderr


@needs_tools
def test_cuda_demanded_without_nvcc_is_an_error_that_says_what_to_do(checkout: Path) -> None:
    result = build(checkout, RRT_WITH_CUDA="1", RRT_TORCH_DIR=str(TORCH), CUDACXX=str(checkout / "nvcc"))
    assert result.returncode == 1
    assert "RRT_WITH_CUDA=1 but no working nvcc was found" in " ".join(result.stderr.split())


def test_modules_that_do_not_load_break_no_import(checkout: Path) -> None:
    library = checkout / "rrt" / "_native.so"
    library.write_bytes(b"not a library")
    plan = checkout / "rrt" / f"_plan{sysconfig.get_config_var('EXT_SUFFIX')}"
    plan.write_bytes(b"not a module")
    facts = report(checkout)
    assert isinstance(facts["reason"], str)
    assert facts["reason"].startswith(f"{library} does not load with torch {torch.__version__}: ")
    assert len(facts["warnings"]) == 1 and "To build them: " in facts["warnings"][0]
    (warning,) = facts["plan warnings"]
    assert warning.startswith(f"rrt: host planning runs in Python: {plan} does not load: ")


@needs_native
def test_a_library_for_another_torch_names_both_versions_and_the_rebuild(checkout: Path) -> None:
    content = Path(str(build_info().library)).read_bytes()
    built_for, function = f'"torch": "{build_info().torch_at_build}"', "\0torch_library_impl\0"
    for found, other in ((built_for, '"torch": "9.8"'), (function, "\0torch_library_v9_8\0")):
        assert found.encode() in content
        content = content.replace(found.encode(), other.ljust(len(found)).encode())
    library = checkout / "rrt" / "_native.so"
    library.write_bytes(content)
    facts = report(checkout)
    cuda = f" and CUDA {build_info().nvcc}" if build_info().cuda else ""
    assert isinstance(facts["reason"], str)
    assert facts["reason"].startswith(
        f"{library}, built for torch 9.8{cuda}, does not load with torch {torch.__version__}: "
    )
    assert "torch_library_v9_8" in facts["reason"]
    (warning,) = facts["warnings"]
    assert facts["reason"] in warning and warning.endswith(f"To build them: {REBUILD}")


@needs_native
def test_modules_of_other_sources_are_reported_stale(checkout: Path) -> None:
    if build_info().stale:
        pytest.fail("the library here is stale: rebuild it")
    shutil.copy(ROOT / "rrt" / "_native.so", checkout / "rrt")
    if PLAN is not None:
        shutil.copy(str(PLAN.__file__), checkout / "rrt")
    for folder in ("tests", "bench"):
        (checkout / "csrc" / folder / "more.cpp").write_text("// not in the modules\n", encoding="utf-8")
    facts = report(checkout)
    assert (facts["reason"], facts["stale"], facts["warnings"]) == (None, False, [])
    assert PLAN is None or facts["plan warnings"] == []
    (checkout / "csrc" / "more.cpp").write_text("// of the modules\n", encoding="utf-8")
    facts = report(checkout)
    assert facts["stale"] is True and len(facts["warnings"]) == 1
    warning = f"rrt: rrt._plan was built from other sources than csrc/ has now; rebuild: {REBUILD}"
    assert PLAN is None or facts["plan warnings"] == [warning]


def test_an_installed_package_has_no_sources_to_be_stale_against(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_PACKAGE", checkout / "rrt")
    assert native._is_stale("the digest of other sources")
    shutil.rmtree(checkout / "csrc")
    assert not native._is_stale("the digest of other sources")


@needs_native
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs binutils")
def test_the_library_depends_on_torchs_c_interface_alone() -> None:
    """So that one file loads with several versions of torch, with and without CUDA."""
    library = str(build_info().library)
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic))
    assert needed & {"libtorch_cpu.so"} and not [name for name in needed if re.search("python|cuda|c10", name)]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    table = subprocess.run(["readelf", "-sW", "--dyn-syms", library], capture_output=True, text=True, check=True).stdout
    undefined = re.findall(r" UND (\S+)", table)
    assert [name for name in undefined if name.startswith(("aoti_torch_", "torch_"))]
    assert not [name for name in undefined if re.match(r"_ZN?K?.*(3c10|2at|5torch)", name)]


@pytest.mark.slow
@needs_tools
def test_a_clean_checkout_builds_in_place_and_runs(checkout: Path) -> None:
    result = build(checkout, RRT_WITH_NATIVE="1", RRT_WITH_CUDA="0", RRT_TORCH_DIR=str(TORCH))
    assert result.returncode == 0, result.stderr
    facts = report(checkout)
    assert (facts["reason"], facts["stale"], facts["warnings"]) == (None, False, [])
    if importlib.util.find_spec("pybind11") is not None:
        assert facts["plan warnings"] == []


def configure(checkout: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # From another folder, as a build tool does when CMakeLists.txt has changed.
    command = ["cmake", "-S", str(checkout), "-B", str(checkout / "configured"), *options]
    return subprocess.run(command, cwd=checkout / "csrc", capture_output=True, text=True, check=False)


NOTHING_ELSE = ("-DRRT_WITH_TORCH=0", "-DRRT_WITH_PYTHON=0", "-DRRT_WITH_CUDA=0")


@needs_tools
def test_cmake_alone_needs_neither_python_nor_torch(checkout: Path) -> None:
    result = configure(checkout, *NOTHING_ELSE)
    assert result.returncode == 0, result.stderr
    assert "torch none, CUDA none, pybind11 none, tests 1, sanitizers none" in result.stdout
    cache = (checkout / "configured" / "CMakeCache.txt").read_text(encoding="utf-8")
    assert "Python" not in cache.replace("RRT_WITH_PYTHON", "").replace("_plan: auto (if Python", "")
    listed = subprocess.run(
        ["ctest", "--test-dir", "configured", "-N"], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout
    for name in ("loop_lora_plan", "kv_cache_plan", "page_table", "cpu_isa", "loop_lora.baseline", "kv_cache.baseline"):
        assert f": {name}\n" in listed


@needs_tools
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-DRRT_WITH_TORCH=yes",), "RRT_WITH_TORCH: found 'yes'; expected one of auto, 0, 1"),
        (("-DRRT_WITH_TESTS=auto",), "RRT_WITH_TESTS: found 'auto'; expected one of 0, 1"),
        (
            (*NOTHING_ELSE[1:], "-DRRT_WITH_TORCH=1", "-DTORCH_DIR=/nowhere"),
            "no torch with a stable ABI at '/nowhere'; install torch>=2.11 or set -DTORCH_DIR=<site-packages>/torch",
        ),
        (
            ("-DRRT_WITH_TORCH=0", "-DRRT_WITH_PYTHON=1", "-DPython3_EXECUTABLE=/nowhere"),
            "RRT_WITH_PYTHON=1 but there is no Python with its headers",
        ),
        ((*NOTHING_ELSE, "-DRRT_SANITIZE=weather"), "RRT_SANITIZE: found 'weather', which"),
        (
            ("-DRRT_WITH_TORCH=1", "-DRRT_SANITIZE=address"),
            "RRT_WITH_TORCH: found 1; expected auto or 0, since RRT_SANITIZE is for the torch-free parts",
        ),
    ],
)
def test_an_option_that_cmake_cannot_satisfy_is_an_error(
    checkout: Path, options: tuple[str, ...], message: str
) -> None:
    result = configure(checkout, *options)
    assert result.returncode == 1
    assert message in " ".join(result.stderr.split())
