"""Steps with a loss or gradient that is not finite, or leaps: what is kept, and what is said."""

from pathlib import Path
from typing import Any

import pytest
import torch

import rrt
from rrt.data.shards import open_shards
from rrt.errors import UserError
from rrt.model.transformer import RecursiveTransformer
from tests.util.processes import run_on_two
from tests.util.training import (
    Flags,
    losses,
    make_inputs,
    metrics,
    refuse_to_write,
    samples_of,
    steps_kept,
    train,
    train_here,
    train_until,
)
from train.trainer import StepResult, Trainer

# As in the processes that these runs are compared with.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def flags(inputs: Path) -> Flags:
    return make_inputs(inputs)


def test_a_run_that_diverges_ends_with_one_message_and_its_checkpoint(flags: Flags, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_until(3, flags(out, run__save_every=2))
    bad = "step 4: loss .*, gradient norm .*; expected finite numbers"
    continues = f"which continues from step 3, or without {out / 'step-3'} from step 2$"
    with pytest.raises(UserError, match=f"{bad}.*{continues}"):
        train_here(flags(out, optim__lr=1e30, run__keep=1))
    assert steps_kept(out) == [2, 3]  # step 3 was good, and spoilt the weights
    with pytest.raises(UserError, match=f"{bad}.*{continues}"):
        train_here(flags(out, run__keep=1))
    assert steps_kept(out) == [2, 3]
    assert not (out / "final").exists()
    (out / "step-3").rename(tmp_path / "spoilt")
    train_here(flags(out))
    assert len(losses(out)) == 8


def test_skipped_steps_cost_no_good_checkpoint(flags: Flags, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings: dict[str, Any] = dict(guard__on_bad_step="skip", guard__max_skips=2, run__save_every=1, run__keep=1)
    train_until(2, flags(out, **settings))
    step_3 = dict(optim__lr=1e30, run__save_every=2, **{name: settings[name] for name in settings if "guard" in name})
    with pytest.raises(UserError) as error:
        train_here(flags(out, run__keep=1, **step_3))
    assert str(error.value).startswith("step 6: loss ")
    # Nothing was saved at step 4, nor was step 2 deleted.
    assert str(error.value).endswith(
        "; it comes after 2 skipped ones: lower optim.lr, or raise guard.max_skips, and run again, "
        f"which continues from step 5, or without {out / 'step-5'} from step 2"
    )
    assert steps_kept(out) == [2, 5]


def test_a_bad_step_is_reported_even_if_the_step_before_cannot_be_saved(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    train_until(3, flags(out, run__save_every=2))
    refuse_to_write(monkeypatch, 3)
    told = r"step 4: loss .*; .*step-3: cannot be written \(.*No space left.*which continues from step 2, or without"
    with pytest.raises(UserError, match=told):
        train_here(flags(out, optim__lr=1e30))
    assert steps_kept(out) == [2] and not list(out.glob(".*"))


def uptrain_with_a_poisoned_step(step: int, argv: list[str]) -> tuple[list[int], str | None]:
    """An uptraining in which one micro-batch of the second process gives NaN in `step`.

    Returns the optimizer's step counts and the error, if any.
    """
    whole_step, embed = Trainer._train_step, RecursiveTransformer.embed_tokens
    poisoned = False

    def take(self: Trainer, rate: float) -> StepResult:
        nonlocal poisoned
        poisoned = self.step + 1 == step and self.processes.rank == 1
        return whole_step(self, rate)

    def embed_tokens(self: RecursiveTransformer, input_ids: torch.Tensor) -> torch.Tensor:
        nonlocal poisoned
        factor, poisoned = (float("nan") if poisoned else 1.0), False
        return embed(self, input_ids) * factor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", take)
        patch.setattr(RecursiveTransformer, "embed_tokens", embed_tokens)
        try:
            trainer = train(argv)
        except UserError as error:
            return [], str(error)
    return [int(state["step"]) for state in trainer.optimizer.state.values()], None


def test_a_bad_step_is_skipped_by_all_processes_and_leaves_the_optimizer_alone(flags: Flags, tmp_path: Path) -> None:
    argv = flags(tmp_path / "run", steps=6, guard__on_bad_step="skip")
    for updates, error in run_on_two(uptrain_with_a_poisoned_step, 4, argv):
        assert error is None and set(updates) == {5}
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] is None for record in records] == [record["step"] == 4 for record in records]
    assert ["fault" in record for record in records] == [record["step"] == 4 for record in records]
    model = rrt.load_model(tmp_path / "run" / "final")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_bad_step_stops_the_run_and_names_the_samples(flags: Flags, inputs: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "run", inputs / "data"
    argv = flags(out, steps=6, run__save_every=2)
    (_, error), other = run_on_two(uptrain_with_a_poisoned_step, 4, argv)
    assert other == ([], error) and error is not None
    # Step 4 sees samples 24 to 31; the second process's first micro-batch of two is the third and fourth of them.
    assert error.startswith("step 4: loss nan, gradient norm nan; expected finite numbers; the highest loss is in ")
    assert "in samples 26 to 27, which python -m rrt.shards shows: " in error
    assert error.endswith(f"run again, which continues from step 3, or without {out / 'step-3'} from step 2")
    assert steps_kept(out) == [2, 3]
    samples = samples_of(data)
    shown = samples.place(26)
    assert f"shows: {shown}, " in error
    path, _, start, _, count = shown.split()
    tokens = open_shards(data, "train").shards[0].tokens[int(start) : int(start) + int(count)]
    assert path == str(data / "train-00000.bin")
    assert torch.equal(torch.from_numpy(tokens[1:].astype(int)), samples.batch(26, 1)[1][0])
    assert metrics(out)[-1]["fault"] in error
    run_on_two(train_here, argv)
    run_on_two(train_here, flags(tmp_path / "whole", steps=6))
    assert losses(out) == losses(tmp_path / "whole")


def test_the_guards_memory_survives_a_resumption(flags: Flags, tmp_path: Path) -> None:
    trainer = train(flags(tmp_path / "whole", run__save_every=3))
    train_until(5, flags(tmp_path / "parts", run__save_every=3))
    resumed = train(flags(tmp_path / "parts", run__save_every=3))
    assert len(trainer.guard.state_dict()["recent"]["loss"]) == 8
    assert resumed.guard.state_dict() == trainer.guard.state_dict()
