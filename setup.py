"""Builds the native operators (rrt/_native.so) with CMake while the package is installed.

Torch is found on disk and never imported, so the build works under pip's build isolation. Where torch, a
compiler or CMake is missing the package installs without native operators and says so; a compilation that
fails is an error. Environment:

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
FAILED_NOTE = "_native_failed.txt"  # read by rrt/_build.py
MIN_TORCH, END_TORCH = (2, 11), (2, 14)


class MissingTool(Exception):
    """Why the native operators cannot be built here, and what would change that."""


def switch(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in SWITCH_VALUES:
        sys.exit(f"error: {name}: found '{value}'; expected one of {', '.join(SWITCH_VALUES)}")
    return value


def find_torch() -> Path:
    """The torch package of the target environment; under build isolation it is not on sys.path."""
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
    ]


class BuildNative(build_ext):
    """One library, built by CMake: not a Python extension module, so its name has no ABI tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        note = library.with_name(FAILED_NOTE)
        library.parent.mkdir(parents=True, exist_ok=True)
        for stale in (library, note):
            stale.unlink(missing_ok=True)
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
            # pip shows this line with -v only; rrt.build_info() reads the note.
            print(f"rrt: installing without native operators: {missing}", file=sys.stderr)
            note.write_text(f"{missing}\n", encoding="utf-8")
            return
        self.build_with_cmake(cmake, options, library)

    def copy_extensions_to_source(self) -> None:
        """For in-place and editable builds: whichever of the two there is now, and no older other one."""
        for name in ("_native.so", FAILED_NOTE):
            built, placed = Path(self.build_lib) / "rrt" / name, ROOT / "rrt" / name
            placed.unlink(missing_ok=True)
            if built.exists():
                shutil.copy2(built, placed)

    def build_with_cmake(self, cmake: str, options: list[str], library: Path) -> None:
        # CMake never forgets a compiler, so other compilers mean another build directory.
        compilers = [os.environ.get("CXX", ""), os.environ.get("CUDACXX", ""), shutil.which("nvcc") or ""]
        key = hashlib.sha256("\n".join(options[2:] + compilers).encode()).hexdigest()[:8]
        build = ROOT / "build" / f"native-{key}"
        configure = [cmake, "-S", str(ROOT), "-B", str(build), *options]
        if self.debug:
            configure.append("-DCMAKE_BUILD_TYPE=Debug")
        steps = [
            configure,
            [cmake, "--build", str(build), "--parallel", str(self.parallel or os.cpu_count() or 1)],
            [cmake, "--install", str(build), "--prefix", str(library.parent)],
        ]
        for step in steps:
            if subprocess.run(step, check=False).returncode != 0:
                sys.exit(
                    "error: building the native operators failed, see the messages above; "
                    "RRT_WITH_NATIVE=0 installs without them"
                )


setup(ext_modules=[Extension("rrt._native", sources=[])], cmdclass={"build_ext": BuildNative})
