"""Make one row of the paper, from the base model to its perplexities, with one command:

    python runs/paper.py gemma/b2_average_svd_r512_15b --base models/gemma-2b --data data/slimpajama-gemma \\
        --out runs/out/paper

Without a row it lists them all: FAMILY/ROW for each row of train/recipes/FAMILY.toml with a start of its own. The rows
that a row needs, its teacher or the model whose exits it trains, are made first. Finished steps are kept and an
interrupted training goes on when the command is run again. `--print` shows the commands instead; flags after `--` go to
the row's own training. docs/REPRODUCTION.md says which setting of the paper each row is.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rrt.common.cli import CommandParser, run_command
from rrt.common.files import read_json
from rrt.errors import UserError
from train.recipe_table import Settings, read_rows, read_settings, script_of, such_as

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "train" / "recipes"


@dataclass(frozen=True)
class Step:
    """A command and the path that it makes."""

    command: list[str]
    makes: Path


@dataclass(frozen=True)
class Inputs:
    """The user's files, the directory for results, and the number of processes."""

    base: Path
    data: Path
    out: Path
    gpus: int


def rows() -> dict[str, Settings]:
    """Read the rows of all families, by FAMILY/ROW, in the order of the files."""
    return {
        f"{path.stem}/{name}": settings
        for path in sorted(RECIPES.glob("*.toml"))
        for name, settings in read_rows(path).items()
    }


def paper_rows() -> dict[str, Settings]:
    """Read the rows that this command makes: those with a base or an architecture to start from."""
    return {row: settings for row, settings in rows().items() if "start" in settings or "model" in settings}


def check_row(row: str) -> None:
    """Raise `UserError` if this command cannot make `row`."""
    made = paper_rows()
    if row in made:
        return
    family, _, name = row.partition("/")
    if row in rows():
        raise UserError(
            f"row: {row} has neither [start] nor [model]: it trains a checkpoint of your own, with "
            f"train/uptrain.py --recipe train/recipes/{family}.toml#{name} --checkpoint.path DIR"
        )
    raise UserError(f"row: found {row!r}; expected one that runs/paper.py lists without a row{such_as(row, made)}")


def steps(row: str, inputs: Inputs, further: tuple[str, ...] = ()) -> Iterator[Step]:
    """Yield the commands of a row in order, first those of the rows that it needs, some of them more than once.

    Args:
        further: flags of the row's own training.
    """
    family, name = row.split("/")
    recipe = f"{RECIPES / family}.toml#{name}"
    settings = read_settings(recipe)
    start, out = settings.get("start", {}), inputs.out / row
    flags = ["--recipe", recipe, "--data.path", str(inputs.data), "--run.out", str(out)]
    needed = {}
    for field in ("after", "teacher"):
        if field in start:
            needed[field] = f"{family}/{start[field]}"
            yield from steps(needed[field], inputs)
    if "teacher" in needed:
        flags += ["--distill.teacher", str(inputs.out / needed["teacher"] / "final")]
    if "model" in settings:
        flags += ["--model.tokenizer", str(inputs.base)]
    elif "after" in needed:
        flags += ["--checkpoint.path", str(inputs.out / needed["after"] / "final")]
    elif start.get("convert"):
        folded = inputs.out / "start" / row
        convert = ["-m", "rrt.convert", "--base", str(inputs.base), "--out", str(folded)]
        yield Step([sys.executable, *convert, *shlex.split(start["convert"])], folded)
        flags += ["--checkpoint.path", str(folded)]
    else:
        flags += ["--checkpoint.path", str(inputs.base)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(inputs.gpus)]
    yield Step([*torchrun, str(ROOT / script_of(settings)), *flags, *further], out / "final")
    result = out / "perplexity.json"
    measure = ["--checkpoint", str(out / "final"), "--data", str(inputs.data), "--json", str(result)]
    yield Step([sys.executable, str(ROOT / "eval" / "perplexity.py"), *measure], result)


def main() -> None:
    parser = CommandParser(
        description=__doc__,
        epilog="Flags after -- go to the row's training.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("row", nargs="?", help="FAMILY/ROW; without it, list all rows")
    parser.add_argument("--base", type=Path, default=Path("BASE"), metavar="DIR", help="the published base model")
    parser.add_argument("--data", type=Path, default=Path("DATA"), metavar="DIR", help="token shards of the corpus")
    parser.add_argument("--out", type=Path, default=Path("runs/out/paper"), metavar="DIR", help="(runs/out/paper)")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="processes (8)")
    parser.add_argument("--print", action="store_true", help="print the commands instead of running them")
    own, further = sys.argv[1:], []
    if "--" in own:
        own, further = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    if arguments.row is None:
        print("\n".join(paper_rows()))
        return
    check_row(arguments.row)
    for flag, path in (("--base", arguments.base), ("--data", arguments.data)):
        if not arguments.print and not path.exists():
            raise UserError(f"{flag}: found {path}, which does not exist; expected a directory, or --print")
    inputs = Inputs(arguments.base, arguments.data, arguments.out, arguments.gpus)
    # The commands run where this one does, so that relative paths mean the same; rrt need not be installed.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    made = set()
    for step in steps(arguments.row, inputs, tuple(further)):
        if step.makes in made or (step.makes.exists() and not arguments.print):
            continue
        made.add(step.makes)
        print(f"$ {shlex.join(step.command)}", flush=True)
        if not arguments.print and subprocess.run(step.command, env=env).returncode:
            raise UserError(f"{step.makes}: not made, the command above failed; run this again to go on from there")
    if not arguments.print:
        result = inputs.out / arguments.row / "perplexity.json"
        print(f"{arguments.row}: perplexity {read_json(result)['perplexity']:.2f} ({result})")


if __name__ == "__main__":
    run_command(main)
