"""Builds the native operators (rrt/_native.so) and the host planning (rrt._plan) with CMake at installation.

Torch is found on disk and never imported, so the build works under pip's build isolation. Where torch, a
compiler or CMake is missing the package installs without native code and says so, and without rrt._plan where
pybind11 or Python's headers are; a compilation that fails is an error. Environment:

    RRT_WITH_CUDA=auto|0|1   CUDA kernels: if nvcc is there (default), never, or demanded
    RRT_WITH_NATIVE=auto|0|1 native operators: if the tools are there (default), never, or demanded
    RRT_TORCH_DIR=DIR        the torch package to build for, where it is not found by itself
"""

import hashlib
import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SWITCH_VALUES = ("auto", "0", "1")
# Read by rrt/native.py: why there is no such module.
FAILED_NOTES = {"rrt._native": "_native_failed.txt", "rrt._plan": "_plan_failed.txt"}
MIN_TORCH, END_TORCH = (2, 11), (2, 14)


class MissingTool(Exception):
    """Why a module cannot be built here, and what would change that."""


def switch(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in SWITCH_VALUES:
        sys.exit(f"error: {name}: found '{value}'; expected one of {', '.join(SWITCH_VALUES)}")
    return value


def find_torch() -> Path:
    """Find the torch package of the target environment; under build isolation it is not on sys.path."""
    asked = os.environ.get("RRT_TORCH_DIR")
    if asked:
        candidates = [Path(asked)]
    else:
        spec = importlib.util.find_spec("torch")
        roots = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
        if os.environ.get("VIRTUAL_ENV"):
            python = f"python{sys.version_info.major}.{sys.version_info.minor}"
            roots.append(os.path.join(os.environ["VIRTUAL_ENV"], "lib", python, "site-packages"))
        roots.append(site.getusersitepackages())
        candidates = [Path(root) / "torch" for root in roots]
        if spec is not None and spec.origin is not None:
            candidates.insert(0, Path(spec.origin).parent)
    for path in candidates:
        if (path / "version.py").is_file():
            check_torch_version(path)
            return path
    wanted = f"RRT_TORCH_DIR={asked} holds none" if asked else f"none for {sys.executable}"
    raise MissingTool(f"no torch to build for ({wanted}): install torch first")


def check_torch_version(torch: Path) -> None:
    match = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text(encoding="utf-8"))
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if not MIN_TORCH <= version < END_TORCH:
        found, low, end = (f"{major}.{minor}" for major, minor in (version, MIN_TORCH, END_TORCH))
        raise MissingTool(f"found torch {found} in {torch}; expected at least {low} and below {end}")


def find_tool(what: str, names: list[str]) -> str:
    # A virtual environment's own scripts count even where it was not activated.
    path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    for name in names:
        found = shutil.which(name, path=path)
        if found:
            return found
    raise MissingTool(f"no {what} (looked for {', '.join(names)})")


def find_pybind11() -> str:
    """Find the folder of pybind11's CMake files."""
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise MissingTool(f"no headers of Python for {sys.executable}: install its development package")
    try:
        import pybind11
    except ImportError:
        raise MissingTool(f"no pybind11 for {sys.executable}: pip install pybind11") from None
    if tuple(map(int, pybind11.__version__.split(".")[:2])) < (2, 12):
        raise MissingTool(f"found pybind11 {pybind11.__version__}; expected at least 2.12")
    return str(pybind11.get_cmake_dir())


def configure_options(torch: Path) -> list[str]:
    compiler = os.environ.get("CXX")
    find_tool("C++ compiler", [compiler.split()[0]] if compiler else ["c++", "g++", "clang++"])
    make = find_tool("build tool", ["ninja", "make"])
    generator = "Ninja" if Path(make).name == "ninja" else "Unix Makefiles"
    return [
        f"-G{generator}",
        f"-DCMAKE_MAKE_PROGRAM={make}",
        f"-DTORCH_DIR={torch}",
        f"-DRRT_WITH_CUDA={switch('RRT_WITH_CUDA')}",
        f"-DPython3_EXECUTABLE={sys.executable}",
        "-DRRT_WITH_TORCH=1",
        "-DRRT_WITH_TESTS=0",
    ]


class BuildNative(build_ext):
    """Both modules, built by one run of CMake."""

    def get_ext_filename(self, fullname: str) -> str:
        # Not a Python extension module, so its name has no ABI tag.
        if fullname == "rrt._native":
            return os.path.join("rrt", "_native.so")
        return str(super().get_ext_filename(fullname))

    def build_extensions(self) -> None:
        folder = Path(self.get_ext_fullpath("rrt._native")).resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        for stale in placed_by_builds(folder):
            stale.unlink()
        wanted = switch("RRT_WITH_NATIVE")
        demanded = "1" in (wanted, switch("RRT_WITH_CUDA"))
        try:
            if wanted == "0":
                raise MissingTool("RRT_WITH_NATIVE=0 was set")
            cmake = find_tool("CMake", ["cmake"])
            options = configure_options(find_torch())
        except MissingTool as missing:
            if demanded and wanted != "0":
                sys.exit(f"error: cannot build the native operators: {missing}")
            # pip shows this line with -v only; rrt.build_info() reads the notes.
            print(f"rrt: installing without native operators: {missing}", file=sys.stderr)
            for note in FAILED_NOTES.values():
                (folder / note).write_text(f"{missing}\n", encoding="utf-8")
            return
        try:
            plan_options = ["-DRRT_WITH_PYTHON=1", f"-Dpybind11_DIR={find_pybind11()}"]
        except MissingTool as missing:
            plan_options = ["-DRRT_WITH_PYTHON=0"]
            print(f"rrt: installing without rrt._plan: {missing}", file=sys.stderr)
            (folder / FAILED_NOTES["rrt._plan"]).write_text(f"{missing}\n", encoding="utf-8")
        self.build_with_cmake(cmake, options, plan_options, folder)

    def copy_extensions_to_source(self) -> None:
        """Copy what this build made for in-place and editable builds, and nothing older."""
        for stale in placed_by_builds(ROOT / "rrt"):
            stale.unlink()
        for built in placed_by_builds(Path(self.build_lib) / "rrt"):
            shutil.copy2(built, ROOT / "rrt")

    def build_with_cmake(self, cmake: str, options: list[str], plan_options: list[str], folder: Path) -> None:
        # CMake never forgets a compiler, so other compilers mean another build directory. Not so for the paths
        # of the build tools, which are new ones in every isolated build.
        compilers = [os.environ.get("CXX", ""), os.environ.get("CUDACXX", ""), shutil.which("nvcc") or ""]
        key = hashlib.sha256("\n".join(options[:1] + options[2:] + compilers).encode()).hexdigest()[:8]
        build = ROOT / "build" / f"native-{key}"
        configure = [cmake, "-S", str(ROOT), "-B", str(build), *options, *plan_options]
        if self.debug:
            configure.append("-DCMAKE_BUILD_TYPE=Debug")
        steps = [
            configure,
            [cmake, "--build", str(build), "--parallel", str(self.parallel or os.cpu_count() or 1)],
            [cmake, "--install", str(build), "--prefix", str(folder)],
        ]
        for step in steps:
            if subprocess.run(step, check=False).returncode != 0:
                sys.exit(
                    "error: building the native operators failed, see the messages above; "
                    "RRT_WITH_NATIVE=0 installs without them"
                )


def placed_by_builds(folder: Path) -> list[Path]:
    """List the modules and notes that a build has left in `folder`."""
    names = ["_native.so", f"_plan{sysconfig.get_config_var('EXT_SUFFIX')}", *FAILED_NOTES.values()]
    return [folder / name for name in names if (folder / name).exists()]


setup(
    ext_modules=[Extension(name, sources=[]) for name in FAILED_NOTES],
    cmdclass={"build_ext": BuildNative},
)
