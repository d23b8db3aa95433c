"""The build, seen from outside: what it needs, what it says without it, what the library depends on."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from rrt.ops import build_info
from rrt.version import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TORCH = Path(torch.__file__).parent
needs_native = pytest.mark.skipif(build_info().library is None, reason=f"no native library: {build_info().reason}")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what building and importing need, without the library."""
    for name in ("csrc", "rrt"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_native*", "__pycache__"))
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
ours = [str(w.message) for w in caught if str(w.message).startswith("rrt:")]
info = build_info()
print(json.dumps({"reason": info.reason, "stale": info.stale, "warnings": ours}))
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


needs_tools = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a C++ compiler on PATH"
)


@needs_tools
def test_cuda_demanded_without_nvcc_is_an_error_that_says_what_to_do(checkout: Path) -> None:
    result = build(checkout, RRT_WITH_CUDA="1", RRT_TORCH_DIR=str(TORCH), CUDACXX=str(checkout / "nvcc"))
    assert result.returncode == 1
    assert "RRT_WITH_CUDA=1 but no working nvcc was found" in " ".join(result.stderr.split())


def test_a_library_that_does_not_load_breaks_no_import(checkout: Path) -> None:
    library = checkout / "rrt" / "_native.so"
    library.write_bytes(b"not a library")
    facts = report(checkout)
    assert isinstance(facts["reason"], str)
    assert facts["reason"].startswith(f"{library} does not load with torch {torch.__version__}: ")
    assert len(facts["warnings"]) == 1 and "To build them: " in facts["warnings"][0]


@needs_native
def test_a_library_of_other_sources_is_reported_stale(checkout: Path) -> None:
    if build_info().stale:
        pytest.fail("the library here is stale: rebuild it")
    shutil.copy(ROOT / "rrt" / "_native.so", checkout / "rrt")
    assert report(checkout) == {"reason": None, "stale": False, "warnings": []}
    with (checkout / "csrc" / "ops.cpp").open("a", encoding="utf-8") as source:
        source.write("// changed\n")
    facts = report(checkout)
    assert facts["stale"] is True and len(facts["warnings"]) == 1
    shutil.rmtree(checkout / "csrc")
    assert report(checkout)["stale"] is False, "an installed package has no sources to compare with"


@needs_native
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs binutils")
def test_the_library_depends_on_torchs_c_interface_alone() -> None:
    """That is what lets one file load with several versions of torch, with and without CUDA."""
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
    assert report(checkout) == {"reason": None, "stale": False, "warnings": []}
