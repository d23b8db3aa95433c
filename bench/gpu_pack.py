"""Gather what bench/gpu.sh needs on a machine that starts bare and gets only some files: bench/gpu.sh pack

Writes the folder bench/out/carry (git ignores it) to be brought along with the working tree: rrt/_native.so and
rrt/_plan as they are here, or for --python's version, so that nothing is built there; the commit, since git's history
may stay behind; with --model DIR an HF directory's configuration and tokenizer, for which random weights are made there
(its speed does not depend on them); with --wheels DIR wheels of pure-Python packages that the machine lacks, unpacked.

    bench/gpu.sh pack --python python3.12 --model models/smollm2-135m

Results that came back (gpu.tar.gz) can be unpacked as bench/out/gpu and brought along too, to go on with what is not
done. bench/gpu.sh puts everything into its place.
"""

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Without this folder: its tabulate.py would take the place of a library that torch imports.
sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(ROOT / "bench"))]

from bench.gpu_steps import CARRY, MODEL

MIB = 2**20


def unpack() -> list[str]:
    """Copy the binaries that were brought along into rrt/; return what was done, in lines.

    A newer one, built since they were packed, stays.
    """
    lines = []
    for source in sorted((CARRY / "native").glob("*.so")):
        target = ROOT / "rrt" / source.name
        if not target.is_file() or target.stat().st_mtime < source.stat().st_mtime:
            beside = target.with_name(target.name + ".tmp")
            shutil.copyfile(source, beside)
            beside.replace(target)  # a process may have the old one open
            lines.append(f"unpacked rrt/{source.name}")
    return lines


def write_model() -> None:
    """Make the model that was brought along, with random weights in bf16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    source, partial = CARRY / "model", MODEL.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    model.to(torch.bfloat16).save_pretrained(partial)
    shutil.rmtree(MODEL, ignore_errors=True)
    partial.rename(MODEL)


def build_plan(python: str) -> Path:
    """Build rrt._plan alone for an interpreter, in build/plan-VERSION; return the module."""
    from rrt.errors import UserError

    program = "import sysconfig, sys; print(sysconfig.get_config_var('EXT_SUFFIX'), sys.executable)"
    try:
        found = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.split()
        import pybind11
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--python: found {python}, which does not run ({error}); expected an interpreter") from None
    except ImportError:
        raise UserError("--python: pybind11 is not installed; expected it: pip install pybind11") from None
    suffix, executable = found
    build = ROOT / "build" / f"plan{suffix.removesuffix('.so')}"
    switches = {"RRT_WITH_TORCH": 0, "RRT_WITH_CUDA": 0, "RRT_WITH_TESTS": 0, "RRT_WITH_PYTHON": 1}
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "--log-level=WARNING"]
    configure += [f"-D{name}={value}" for name, value in switches.items()]
    configure += [f"-DPython3_EXECUTABLE={executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    for command in (configure, ["cmake", "--build", str(build), "--target", "rrt_plan"]):
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:
            raise UserError(f"--python: rrt._plan does not build for {executable}; see above")
    (module,) = build.glob(f"**/_plan{suffix}")
    return module


def tracked_bytes() -> int:
    """Count the bytes of the working tree that travels: tracked files, and those that git does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    return sum((ROOT / name).stat().st_size for name in set(names) if name and (ROOT / name).is_file())


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def pack(arguments: argparse.Namespace) -> None:
    from bench.gpu_session import read_commit
    from rrt.errors import UserError
    from rrt.ops import build_info

    info = build_info()
    remedy = "build it first: RRT_WITH_CUDA=1 RRT_WITH_NATIVE=1 pip install --no-build-isolation --no-deps -e ."
    if info.library is None or not info.cuda or info.stale:
        found = "none" if info.library is None else "a stale one" if info.stale else "one without CUDA"
        raise UserError(f"rrt/_native.so: found {found}; expected one of these sources with CUDA: {remedy}")
    if arguments.python is not None:
        plan = build_plan(arguments.python)
    elif info.plan is not None:
        plan = Path(info.plan)
    else:
        raise UserError(f"rrt._plan: found none ({info.plan_reason}); expected --python, or {remedy}")
    shutil.rmtree(CARRY, ignore_errors=True)
    (CARRY / "native").mkdir(parents=True)
    for path in (Path(info.library), plan):
        shutil.copy(path, CARRY / "native")
    commit = read_commit({})
    if commit is not None:
        (CARRY / "commit").write_text(commit + "\n", encoding="utf-8")
    if arguments.model is not None:
        (CARRY / "model").mkdir()
        for path in arguments.model.iterdir():
            if path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.endswith(".index.json"):
                shutil.copyfile(path, CARRY / "model" / path.name)
    for wheel in sorted(arguments.wheels.glob("*.whl")) if arguments.wheels is not None else []:
        with zipfile.ZipFile(wheel) as file:
            file.extractall(CARRY / "site")
    limit, tree, carried = arguments.limit_mib * MIB, tracked_bytes(), folder_bytes(CARRY)
    print(f"working tree {tree / MIB:.1f} MiB, {CARRY.relative_to(ROOT)} {carried / MIB:.1f} MiB (commit {commit})")
    if tree + carried > limit:
        raise UserError(f"--limit-mib: found {arguments.limit_mib:g}; expected {(tree + carried) / MIB:.1f} or more")


def main() -> None:
    from rrt.common.cli import CommandParser
    from rrt.errors import UserError

    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", metavar="EXE", help="build rrt._plan for this interpreter's version (default: as here)"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="HF directory of a small model; weights stay here")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels to unpack")
    parser.add_argument(
        "--limit-mib", type=float, default=64, metavar="MIB", help="what travels in a call (default 64)"
    )
    parser.add_argument("--plan-only", action="store_true", help="only build rrt._plan for this interpreter, into rrt/")
    parser.add_argument("--write-model", action="store_true", help="only make the model that was brought along")
    arguments = parser.parse_args()
    for flag in ("model", "wheels"):
        path = getattr(arguments, flag)
        if path is not None and not path.is_dir():
            raise UserError(f"--{flag}: found {path}; expected a directory")
    if arguments.model is not None and not (arguments.model / "config.json").is_file():
        raise UserError(f"--model: found {arguments.model}; expected an HF directory with config.json")
    if arguments.plan_only:
        shutil.copy(build_plan(sys.executable), ROOT / "rrt")
    elif arguments.write_model:
        write_model()
    else:
        pack(arguments)


if __name__ == "__main__":
    from rrt.common.cli import run_command

    run_command(main)
