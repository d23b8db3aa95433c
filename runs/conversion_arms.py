"""What the conversion study compares: the arms, which of them are trained, and where each result lies.

A model's results are the files of `results/MODEL/`: `model.json` (sizes, time of the conversion) or `training.json`
(losses), and one for each measure. MODEL is an arm right after conversion, `calibrated-r64`; of another draw of the
calibration text, `calibrated-r64-draw1`; or after training, `calibrated-r64-102400-plain-seed0`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from rrt.errors import UserError

RANKS = (64, 128, 32)
"""In the order of what they decide."""
TRAINED_RANK = 64
TASKS = {"hellaswag": 25, "piqa": 50, "arc_easy": 25}
"""Accuracy by chance of each few-shot task, %."""
MEASURES = {"natural-512": 512, "natural-2048": 2048, "code-512": 512}
"""Context of each measurement of perplexity."""
TITLES = {
    "natural-512": "held-out text, context 512",
    "natural-2048": "held-out text, context 2048",
    "code-512": "held-out code, context 512",
}


@dataclass(frozen=True)
class Arm:
    """A way to make a smaller model of the base.

    Attributes:
        name: of its results; `title` is for readers.
        flags: of rrt.convert; none for the base itself.
        loops: of what they make.
        method: arms of one method differ in rank alone.
        needs_text: whether the conversion is calibrated.
        num_seeds: of its training; 0 if it is not trained. A calibrated arm has a draw of its text for each.
    """

    name: str
    title: str
    flags: tuple[str, ...] = ()
    loops: int = 1
    method: str = ""
    needs_text: bool = False
    num_seeds: int = 0


METHODS = (
    Arm("average-svd", "average + SVD", ("--init", "average", "--lora-init", "svd"), num_seeds=3),
    Arm("calibrated", "calibrated", ("--lora-init", "calibrated"), needs_text=True, num_seeds=3),
    Arm("joint", "joint, without data", ("--lora-init", "joint")),
    Arm("no-refit", "calibrated, not refitted", ("--lora-init", "calibrated", "--no-refit"), needs_text=True),
    Arm("low-rank-only", "low rank only, calibrated", ("--lora-init", "low-rank-only"), needs_text=True, num_seeds=1),
)
"""With LoRA, before loops and rank are chosen. All fold the norms' gains; low-rank-only shares nothing."""
WITH_THREE_LOOPS = ("average-svd", "joint", "calibrated")
DECISIVE = ("average-svd-r64", "calibrated-r64")
"""The pair whose losses over tokens are compared."""
BASE = Arm("base", "base")


def all_arms(num_layers: int) -> list[Arm]:
    """List the arms for a base of so many layers: the base, then those of 2 loops, then those of 3 if they divide it.

    Raises:
        UserError: 2 loops do not.
    """
    if num_layers % 2:
        raise UserError(f"--base: found {num_layers} layers; expected an even number, for two loops")
    kept = num_layers // 2
    arms = [
        BASE,
        Arm("stepwise", "stepwise, no LoRA", ("--num-loops", "2", "--init", "stepwise"), 2, num_seeds=1),
        Arm(f"keep-{kept}", f"{kept} layers, not looped", ("--keep-layers", str(kept)), num_seeds=1),
    ]
    arms += [_with_rank(method, 2, rank) for rank in RANKS for method in METHODS]
    if num_layers % 3 == 0:
        arms += [_with_rank(method, 3, TRAINED_RANK) for method in METHODS if method.name in WITH_THREE_LOOPS]
    return arms


def _with_rank(method: Arm, loops: int, rank: int) -> Arm:
    suffix = f"r{rank}" if loops == 2 else f"b{loops}-r{rank}"
    return replace(
        method,
        name=f"{method.name}-{suffix}",
        title=f"{method.title}, rank {rank}" + (f", {loops} loops" if loops > 2 else ""),
        flags=("--num-loops", str(loops), "--lora-rank", str(rank), *method.flags),
        loops=1 if method.name == "low-rank-only" else loops,
        method=method.name if loops == 2 else "",
        num_seeds=method.num_seeds if (loops, rank) == (2, TRAINED_RANK) else 0,
    )


def choose_arms(arms: Sequence[Arm], patterns: Sequence[str]) -> list[Arm]:
    """Return the arms that the patterns, such as ``*-r64``, match, and the base; all without patterns.

    Raises:
        UserError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(arm.name, pattern) for arm in arms):
            raise UserError(
                f"--arms: found {pattern!r}; expected names, or patterns: {', '.join(a.name for a in arms)}"
            )
    return [arm for arm in arms if not patterns or arm is BASE or any(fnmatchcase(arm.name, p) for p in patterns)]


@dataclass(frozen=True)
class Training:
    """A training of one arm: so many tokens, with the base as teacher or not."""

    arm: Arm
    tokens: int
    is_distilled: bool
    seed: int

    @property
    def start(self) -> str:
        """The model that it begins with."""
        return draw_name(self.arm, self.seed if self.arm.needs_text else 0)

    @property
    def name(self) -> str:
        """The model that it makes."""
        kind = "distilled" if self.is_distilled else "plain"
        return f"{self.arm.name}-{self.tokens}-{kind}-seed{self.seed}"


def draw_name(arm: Arm, draw: int) -> str:
    """Return the name of an arm that was calibrated on one draw of the text."""
    return f"{arm.name}-draw{draw}" if draw else arm.name


def draws(arm: Arm, num_seeds: int) -> range:
    """Return the draws of calibration text of an arm."""
    return range(max(1, min(arm.num_seeds, num_seeds)) if arm.needs_text else 1)


def trainings(arms: Sequence[Arm], tokens: Sequence[int], num_seeds: int) -> list[Training]:
    """List all trainings in the order of what they decide.

    The first seed comes first, without a teacher and then with one, in it the decisive pair, in that the shorter ones.
    """
    listed = [
        Training(arm, count, is_distilled, seed)
        for arm in arms
        for count in tokens
        for is_distilled in (False, True)
        for seed in range(min(num_seeds, arm.num_seeds))
    ]
    return sorted(listed, key=_order)


def _order(training: Training) -> tuple[bool, bool, int, bool, int]:
    is_decisive = training.arm.name in DECISIVE
    return training.seed > 0, training.is_distilled, training.seed, not is_decisive, training.tokens


def result_path(out: Path, model: str, name: str) -> Path:
    """Return the file of one result of a model."""
    return out / "results" / model / f"{name}.json"
