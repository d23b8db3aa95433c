"""The directory of one training run, `run.out`: who may write to it, where a run resumes, and its final checkpoint.

recipe.toml      the recipe with every default filled in
step-N/          resumable checkpoints (train/checkpoints.py)
metrics.jsonl    and tb/: a record of every step (train/metrics.py)
final/           the trained model as an ordinary checkpoint, there when the run has finished
"""

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from rrt.checkpoint.format import CheckpointConfig, write_checkpoint
from rrt.common.dtypes import parse_dtype
from rrt.common.files import atomic_write, sha256_file
from rrt.common.provenance import fingerprint, make_provenance
from rrt.data.shards import META_FILE
from rrt.errors import UserError
from train.architecture import InitialModel
from train.checkpoints import check_identity, complete_steps, latest_complete
from train.recipe import Recipe, to_toml

RECIPE_FILE = "recipe.toml"
FINAL = "final"


class RunDirectory:
    """`run.out` as the first process sees it; the others leave it alone.

    Construction reads what the run will need of its inputs, which may be gone when it ends, and writes nothing.

    Raises:
        UserError: the directory holds something else than an earlier part of this run, or a finished run that
            `run.overwrite` does not say to delete.
    """

    def __init__(self, recipe: Recipe, initial: InitialModel) -> None:
        self.path = Path(recipe.run.out)
        self._recipe, self._initial = recipe, initial
        self._tokenizer_files = initial.tokenizer.files
        self._provenance = make_provenance(initial.stage, initial.parent, data=recipe.data.path)
        if initial.teacher is not None:
            self._provenance["teacher"] = {"path": str(initial.teacher), "sha256": fingerprint(initial.teacher)}
        self.identity = self._make_identity()
        self._check()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the directory and keep other runs out of it.

        Raises:
            UserError: another run is writing to it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another training run writes to it; expected none") from None
            yield
        finally:
            os.close(lock)

    def prepare(self) -> Path | None:
        """Clean the locked directory and write the recipe into it; returns the checkpoint to resume from, if any."""
        for pattern in ("*", ".*") if self._recipe.run.overwrite else (".step-*", f".{FINAL}.*", ".*.partial-*"):
            for old in self.path.glob(pattern):
                if old.is_dir() and not old.is_symlink():
                    shutil.rmtree(old)
                else:
                    old.unlink()
        recipe: Any = self._recipe
        # Running it again must resume, not delete.
        again = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, overwrite=False))
        atomic_write(self.path / RECIPE_FILE, to_toml(again))
        return latest_complete(self.path, warn=False)

    def describe_resumption(self) -> str:
        """Say where the same command goes on, and where without the newest checkpoint: its weights may be spoilt."""
        older, newest = [0, 0, *complete_steps(self.path)][-2:]
        before = f"step {older}" if older else "the start"
        return f"step {newest}, or without {self.path / f'step-{newest}'} from {before}" if newest else before

    def write_final(self, parameters: dict[str, Tensor], steps: int) -> Path:
        """Write `final/`, an ordinary checkpoint directory of these whole parameters; returns its path."""
        run = self._recipe.run
        config = CheckpointConfig(self._initial.model, self._initial.recursion, parse_dtype(run.save_dtype))
        trained = {"tokens": steps * run.batch_tokens, "steps": steps}
        with write_checkpoint(self.path / FINAL, config, {**self._provenance, **trained}) as writer:
            for name, tensor in parameters.items():
                writer.add(name, tensor)
            for name, content in self._tokenizer_files.items():
                (writer.directory / name).write_bytes(content)
        return self.path / FINAL

    def _check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; expected a directory")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not (self.path / RECIPE_FILE).is_file():
            raise UserError(f"{self.path}: not empty and not a training run; name another run.out")
        if self._recipe.run.overwrite:
            self._check_inputs_outside()
            return
        if (self.path / FINAL).exists():
            raise UserError(f"{self.path}: holds a finished run; name another run.out or add --run.overwrite true")
        newest = latest_complete(self.path, warn=True)
        if newest is None:
            return  # interrupted before its first checkpoint
        check_identity(newest, self.identity)

    def _check_inputs_outside(self) -> None:
        """Refuse to overwrite a directory that this run reads from."""
        out = self.path.resolve()
        data = map(Path, self._recipe.data.paths)
        for source in (self._initial.parent, self._initial.teacher, self._initial.tokenizer.place, *data):
            if source is not None and source.resolve().is_relative_to(out):
                raise UserError(f"{source}: lies in run.out, which --run.overwrite would delete; name another run.out")

    def _make_identity(self) -> dict[str, Any]:
        """Collect what must not change between the parts of one run, as JSON."""
        recipe, initial = self._recipe, self._initial
        identity = {
            "stage": initial.stage,
            "model": dataclasses.asdict(initial.model),
            "recursive": dataclasses.asdict(initial.recursion),
            "data.seq_len": recipe.data.seq_len,
            "data.split": recipe.data.split,
            "data.weights": recipe.data.weights,
            "data.offset": recipe.data.offset,
            "data": [sha256_file(Path(path) / META_FILE) for path in recipe.data.paths],
            "parent": self._provenance["parent"] and self._provenance["parent"]["sha256"],
            "objective": dataclasses.asdict(initial.objective),
            "teacher": initial.teacher and self._provenance["teacher"]["sha256"],
            "run.batch_tokens": recipe.run.batch_tokens,
            "run.tokens": recipe.run.tokens,
            "run.seed": recipe.run.seed,
        }
        return dict(json.loads(json.dumps(identity)))
