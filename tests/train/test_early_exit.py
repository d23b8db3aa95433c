"""Early-exit training and distillation from end to end on a tiny model, against losses written out by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rrt
from rrt.checkpoint.format import read_checkpoint_config
from rrt.checkpoint.presets import preset
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.folding.unroll import prepare_export
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.model.sizes import model_sizes
from rrt.model.transformer import RecursiveTransformer
from tests.util import training
from tests.util.processes import run_on_two
from tests.util.tokenizers import make_bpe_tokenizer, make_sentencepiece_tokenizer
from tests.util.training import (
    BATCH,
    LENGTH,
    VOCAB,
    Flags,
    losses,
    make_checkpoint,
    make_data,
    make_flags,
    metrics,
    run_script,
    samples_of,
)
from train import early_exit, uptrain
from train.architecture import TrainingSpec
from train.command import Command
from train.distributed import Processes, processes
from train.early_exit import EarlyExitRecipe
from train.estimate import estimate_memory
from train.losses import ExitWeights
from train.objective import early_exit_objective, exit_coefficients, uptraining_objective
from train.optimizer import learning_rate, make_optimizer
from train.recipe import DistillConfig, ExitsConfig, OptimConfig, read_recipe
from train.teacher import ShardedTeacher, open_teacher

STEPS = 3
LLAMA = replace(training.LLAMA, num_layers=6)
WIDE = replace(LLAMA, hidden_size=40, num_layers=2, tie_embeddings=False)
LORA = LoraRanks.uniform(3)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sentencepiece_tokenizer(tmp_path_factory.mktemp("tokenizer"), "llama", VOCAB)


@pytest.fixture(scope="module")
def data(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), tokenizer)


@pytest.fixture(scope="module")
def checkpoints(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    kinds = {
        "two": (LLAMA, RecursiveConfig(num_loops=2, lora_rank=LORA)),
        "three": (LLAMA, RecursiveConfig(num_loops=3, lora_rank=LORA)),
        "translated": (LLAMA, RecursiveConfig(num_loops=3, lora_rank=LORA, exit_translators=True)),
        "vanilla": (LLAMA, RecursiveConfig()),
        "sequence": (LLAMA, RecursiveConfig(num_loops=2, sharing="sequence")),
        "teacher": (WIDE, RecursiveConfig()),
    }
    return {name: make_checkpoint(root / name, tokenizer, *kind, noise=0.05) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def flags(data: Path) -> Flags:
    def make(checkpoint: Path, out: Path, steps: int = STEPS, **overrides: Any) -> list[str]:
        return make_flags(checkpoint, data)(out, steps, **overrides)

    return make


def train(argv: list[str], command: Command[Any] = early_exit.COMMAND) -> None:
    training.train(argv, command)


Loss = Callable[[list[Tensor], Tensor, Tensor], Tensor]


def train_plainly(
    model: RecursiveTransformer, data: Path, loss_of: Loss, teacher: RecursiveTransformer | None, steps: int = STEPS
) -> list[float]:
    """The same training without trainer, chunks or sharding: `loss_of` gets every exit's whole logits."""
    optim = OptimConfig(lr=5e-3, warmup_steps=2)
    samples = samples_of(data)
    optimizer = make_optimizer(model, optim)
    found = []
    for step in range(steps):
        inputs, targets = samples.batch(step * BATCH, BATCH)
        exits = [model(inputs, exit_loop=loop).flatten(0, 1) for loop in range(model.recursion.num_loops)]
        with torch.no_grad():
            reference = exits[-1] if teacher is None else teacher(inputs).flatten(0, 1)
        loss = loss_of(exits, targets.flatten(), reference)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def ce(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def kl(logits: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (logits, reference.detach()))
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


SETTINGS: dict[str, tuple[str, dict[str, Any], Loss]] = {
    "weighted": (
        "three",
        {"exits__weighting": "weighted"},
        lambda z, y, _: ce(z[0], y) / 6 + ce(z[1], y) / 3 + ce(z[2], y) / 2,
    ),
    "weighted, two loops": (
        "two",
        {"exits__weighting": "weighted"},
        lambda z, y, _: ce(z[0], y) / 3 + 2 * ce(z[1], y) / 3,
    ),
    "aggressive": ("two", {}, lambda z, y, _: 0.1 * ce(z[0], y) + ce(z[1], y)),
    "aggressive, another coefficient": (
        "three",
        {"exits__coefficient": 0.3},
        lambda z, y, _: 0.3 * ce(z[0], y) + 0.3 * ce(z[1], y) + ce(z[2], y),
    ),
    "distilled from the last exit": (
        "three",
        {"exits__distill": "last", "distill__weight": 0.75},
        lambda z, y, last: (
            sum(0.1 * (0.25 * ce(z[i], y) + 0.75 * kl(z[i], last)) for i in (0, 1)) + ce(z[2], y)  # type: ignore[return-value]
        ),
    ),
    "distilled from a teacher": (
        "three",
        {"exits__distill": "teacher", "distill__teacher": "teacher", "distill__temperature": 2.0},
        lambda z, y, p: sum(  # type: ignore[return-value]
            w * 0.5 * (ce(z[i], y) + kl(z[i], p, 2.0)) for i, w in enumerate((0.1, 0.1, 1.0))
        ),
    ),
}
SETTINGS |= {
    f"{name}, translated": ("translated", *SETTINGS[name][1:])
    for name in ("distilled from the last exit", "distilled from a teacher")
}


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_those_of_whole_logits(
    name: str, checkpoints: dict[str, Path], flags: Flags, data: Path, tmp_path: Path
) -> None:
    kind, overrides, loss_of = SETTINGS[name]
    teacher = None
    if "distill__teacher" in overrides:
        overrides = {**overrides, "distill__teacher": checkpoints["teacher"]}
        teacher = rrt.load_model(checkpoints["teacher"])
    expected = train_plainly(rrt.load_model(checkpoints[kind]).train(), data, loss_of, teacher)
    train(flags(checkpoints[kind], tmp_path / "one", **overrides))
    assert losses(tmp_path / "one") == pytest.approx(expected, abs=2e-4)
    if teacher is not None:
        run_on_two(train, flags(checkpoints[kind], tmp_path / "two", **overrides))
        assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 2e-4), ("bf16", 0.05)])
def test_uptraining_with_a_teacher_is_distillation_of_the_last_loop(
    dtype: str, tolerance: float, checkpoints: dict[str, Path], flags: Flags, data: Path, tmp_path: Path
) -> None:
    overrides = {"distill__teacher": checkpoints["teacher"], "distill__weight": 0.25, "run__save_every": 2}
    expected = train_plainly(
        rrt.load_model(checkpoints["two"]).train(),
        data,
        lambda z, y, p: 0.75 * ce(z[1], y) + 0.25 * kl(z[1], p),
        rrt.load_model(checkpoints["teacher"]),
    )
    train(flags(checkpoints["two"], tmp_path / "run", run__dtype=dtype, **overrides), uptrain.COMMAND)
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=tolerance)
    record = metrics(tmp_path / "run")[0]
    parts = 0.75 * record["cross_entropy_loop_1"] + 0.25 * record["from_teacher_loop_1"]
    assert parts == pytest.approx(record["loss"], abs=1e-6)
    provenance = json.loads((tmp_path / "run" / "final" / "provenance.json").read_text())
    assert provenance["teacher"]["path"] == str(checkpoints["teacher"])


def test_the_final_checkpoint_names_its_exits_and_each_part_is_logged(
    checkpoints: dict[str, Path], flags: Flags, tmp_path: Path
) -> None:
    train(flags(checkpoints["three"], tmp_path / "run", exits__distill="last"))
    config = read_checkpoint_config(tmp_path / "run" / "final" / "config.json")
    assert config.recursion == RecursiveConfig(num_loops=3, lora_rank=LORA, exit_loops=(0, 1))
    record = metrics(tmp_path / "run")[-1]
    logged = {f"{part}_loop_{loop}" for part in ("cross_entropy", "from_last_exit") for loop in (0, 1)}
    assert {key for key in record if "_loop_" in key} == logged | {"cross_entropy_loop_2"}
    parts = sum(0.05 * record[name] for name in logged) + record["cross_entropy_loop_2"]
    assert parts == pytest.approx(record["loss"], abs=1e-5)


def test_early_exits_learn(checkpoints: dict[str, Path], flags: Flags, tmp_path: Path) -> None:
    train(flags(checkpoints["three"], tmp_path / "run", steps=16, exits__coefficient=0.3))
    first, last = metrics(tmp_path / "run")[0], metrics(tmp_path / "run")[-1]
    for loop in range(3):
        assert last[f"cross_entropy_loop_{loop}"] < first[f"cross_entropy_loop_{loop}"] - 0.5


def test_a_frozen_model_learns_by_the_lora_on_its_head(
    checkpoints: dict[str, Path], flags: Flags, tmp_path: Path
) -> None:
    argv = flags(
        checkpoints["three"],
        tmp_path / "run",
        steps=20,
        exits__freeze="true",
        exits__head_lora_rank=4,
        optim__lr=0.05,
        optim__weight_decay=0.0,
        run__save_every=8,
    )
    run_on_two(train, argv)
    before, after = rrt.load_model(checkpoints["three"]), rrt.load_model(tmp_path / "run" / "final")
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after.get_parameter(name)), name
    assert after.head_lora_a is not None and after.head_lora_b is not None
    assert (after.head_lora_a.shape, after.head_lora_b.shape) == ((2, 4, 32), (2, VOCAB, 4))
    assert after.head_lora_b.abs().amax((1, 2)).min() > 1e-3
    first, last = metrics(tmp_path / "run")[0], metrics(tmp_path / "run")[-1]
    for loop in (0, 1):
        assert last[f"cross_entropy_loop_{loop}"] < first[f"cross_entropy_loop_{loop}"] - 0.3
    inputs = torch.arange(VOCAB - LENGTH, VOCAB)[None]
    with torch.no_grad():
        assert torch.equal(before(inputs), after(inputs))
        assert (before(inputs, exit_loop=0) - after(inputs, exit_loop=0)).abs().max() > 1e-3
        truncated = rrt.load_model(tmp_path / "run" / "final", num_loops=1)
        torch.testing.assert_close(truncated(inputs), after(inputs, exit_loop=0), rtol=0, atol=1e-4)
    sizes = [model_sizes(model.config, model.recursion, torch.float32) for model in (before, after)]
    assert sizes[1].lora_params - sizes[0].lora_params == 2 * 4 * (32 + VOCAB)
    prepared = prepare_export(tmp_path / "run" / "final", tmp_path / "hf")
    assert prepared.notices == ("the LoRA on the head is left out: only exits before the last loop use it",)


def test_exits_with_a_lora_on_the_head_train_further(
    checkpoints: dict[str, Path], flags: Flags, data: Path, tmp_path: Path
) -> None:
    train(flags(checkpoints["two"], tmp_path / "first", exits__head_lora_rank=3))
    start = tmp_path / "first" / "final"
    expected = train_plainly(rrt.load_model(start).train(), data, lambda z, y, _: 0.1 * ce(z[0], y) + ce(z[1], y), None)
    train(flags(start, tmp_path / "second", exits__head_lora_rank=3))
    assert losses(tmp_path / "second") == pytest.approx(expected, abs=2e-4)
    with pytest.raises(UserError, match=r"field 'exits.head_lora_rank': found 0; expected the checkpoint's, 3"):
        train(flags(start, tmp_path / "third"))
    # Uptraining leaves the LoRA alone: the last loop does without it.
    train(flags(start, tmp_path / "up"), uptrain.COMMAND)
    model = rrt.load_model(start)
    inputs = samples_of(data).batch(0, BATCH)
    expected_loss = ce(model(inputs[0]).flatten(0, 1), inputs[1].flatten()).item()
    assert losses(tmp_path / "up")[0] == pytest.approx(expected_loss, abs=1e-5)
    uptrained = rrt.load_model(tmp_path / "up" / "final")
    assert torch.equal(uptrained.get_parameter("head_lora_b"), model.get_parameter("head_lora_b"))
    argv = flags(start, tmp_path / "parts", run__save_every=2)
    training.train_until(2, argv, uptrain.COMMAND)
    train(argv, uptrain.COMMAND)
    assert losses(tmp_path / "parts") == losses(tmp_path / "up")


def test_translators_train_along_and_uptraining_leaves_them_alone(
    checkpoints: dict[str, Path], flags: Flags, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = checkpoints["translated"]
    expected = train_plainly(
        rrt.load_model(start).train(), data, lambda z, y, _: 0.1 * (ce(z[0], y) + ce(z[1], y)) + ce(z[2], y), None
    )
    train(flags(start, tmp_path / "run"))
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=2e-4)
    before, after = rrt.load_model(start), rrt.load_model(tmp_path / "run" / "final")
    assert after.recursion.exit_translators and after.recursion.exit_loops == (0, 1)
    for name in ("exit_translator_weight", "exit_translator_bias"):
        assert (after.get_parameter(name) - before.get_parameter(name)).abs().amax(-1).min() > 1e-4
    stale = f"notice: {uptrain.STALE_TRANSLATORS}\n"
    assert stale not in capsys.readouterr().out
    train(flags(start, tmp_path / "up"), uptrain.COMMAND)
    assert stale in capsys.readouterr().out
    uptrained = rrt.load_model(tmp_path / "up" / "final")
    assert torch.equal(
        uptrained.get_parameter("exit_translator_weight"), before.get_parameter("exit_translator_weight")
    )
    assert not torch.equal(uptrained.embed, before.embed)
    with pytest.raises(UserError, match=r"found 2; .* has 3 and exit translators"):
        train(flags(start, tmp_path / "short", checkpoint__num_loops=2), uptrain.COMMAND)


def test_weight_decay_spares_norms_biases_and_translators() -> None:
    config = replace(LLAMA, qkv_bias=True)
    model = RecursiveTransformer(config, RecursiveConfig(num_loops=3, head_lora_rank=2, exit_translators=True))
    decayed, plain = (
        {id(parameter) for parameter in group["params"]} for group in make_optimizer(model, OptimConfig()).param_groups
    )
    for name, parameter in model.named_parameters():
        spared = "norm" in name or name.endswith("bias") or name.startswith("exit_translator_")
        assert (id(parameter) in plain, id(parameter) in decayed) == (spared, not spared), name
    assert id(model.exit_translator_weight) in plain and id(model.head_lora_a) in decayed


@pytest.mark.parametrize("rank", [0, 4])
def test_of_a_frozen_model_translators_learn_alone_or_with_the_lora(
    rank: int, checkpoints: dict[str, Path], flags: Flags, tmp_path: Path
) -> None:
    argv = flags(
        checkpoints["translated"],
        tmp_path / "run",
        steps=12,
        exits__freeze="true",
        exits__head_lora_rank=rank,
        optim__lr=0.02,
        run__save_every=5,
    )
    run_on_two(train, argv)
    before, after = rrt.load_model(checkpoints["translated"]), rrt.load_model(tmp_path / "run" / "final")
    changed = {name for name, _ in after.named_parameters() if "exit_translator" in name or "head_lora" in name}
    assert len(changed) == (4 if rank else 2)
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after.get_parameter(name)) == (name not in changed), name
    first, last = metrics(tmp_path / "run")[0], metrics(tmp_path / "run")[-1]
    for loop in (0, 1):
        assert last[f"cross_entropy_loop_{loop}"] < first[f"cross_entropy_loop_{loop}"] - 0.1


@pytest.mark.parametrize("translates", [False, True])
def test_exits_take_the_final_norm_once(translates: bool) -> None:
    model = RecursiveTransformer(LLAMA, RecursiveConfig(num_loops=3, exit_translators=translates)).double()
    model.init_weights(0)
    with torch.no_grad():
        model.norm.weight.mul_(torch.linspace(0.5, 3.0, 32))
        if model.exit_translator_weight is not None:
            model.exit_translator_weight.add_(0.1 * torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1)))
    tokens = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    objective = early_exit_objective(ExitsConfig(), DistillConfig(), 3)
    _, parts = objective.bind(model)(inputs, targets)
    for loop in range(3):
        whole = ce(model(inputs, exit_loop=loop).flatten(0, 1), targets.flatten())
        assert parts[loop, 0].item() == pytest.approx(whole.item(), abs=1e-12)


@pytest.mark.parametrize("translates", [False, True])
@pytest.mark.parametrize(("distill", "loops_run"), [("none", 2), ("last", 3)])
def test_a_frozen_model_runs_only_the_loops_that_its_loss_needs(distill: Any, loops_run: int, translates: bool) -> None:
    recursion = RecursiveConfig(num_loops=3, head_lora_rank=2, exit_translators=translates)
    model = RecursiveTransformer(LLAMA, recursion).double()
    model.init_weights(0)
    with torch.no_grad():
        for parameter in (model.exit_translator_weight, model.exit_translator_bias):
            if parameter is not None:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    objective = early_exit_objective(ExitsConfig(freeze=True, head_lora_rank=2, distill=distill), DistillConfig(), 3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(objective.should_train(name))
    run: list[Any] = []
    model.stack.layers[0].register_forward_hook(lambda _, args, __: run.append(args[1]))
    tokens = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss, parts = objective.bind(model)(inputs, targets)
    assert run == list(range(loops_run))
    loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(trained) == {name for name, _ in model.named_parameters() if name.startswith(("head_lora_", "exit_"))}
    assert len(trained) == (4 if translates else 2)
    exits = [model(inputs, exit_loop=loop).flatten(0, 1) for loop in range(3)]
    share = 0.5 if distill == "last" else 0.0
    expected = [(1 - share) * ce(z, targets.flatten()) + share * kl(z, exits[2]) for z in exits[:2]]
    last = ce(exits[2], targets.flatten()).item() if distill == "last" else 0.0
    assert parts[:, 0].tolist() == pytest.approx([*(ce(z, targets.flatten()).item() for z in exits[:2]), last])
    assert loss.item() == pytest.approx(0.1 * sum(expected).item(), abs=1e-12)  # type: ignore[union-attr]
    gradients = torch.autograd.grad(0.1 * sum(expected), list(trained.values()))  # type: ignore[arg-type]
    for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=name)
        assert gradient.abs().max() > 1e-6 or name == "head_lora_a"  # whose gradient B = 0 leaves none


def test_the_two_weightings_are_the_papers() -> None:
    weighted = exit_coefficients(ExitsConfig(weighting="weighted"), 3)
    assert weighted == pytest.approx([1 / 6, 2 / 6, 3 / 6]) and sum(weighted) == pytest.approx(1)
    assert exit_coefficients(ExitsConfig(coefficient=0.05), 3) == [0.05, 0.05, 1.0]
    teacher = DistillConfig(teacher="x", weight=0.25)
    assert uptraining_objective(teacher).weights == (ExitWeights(0.75, teacher=0.25),)
    from_last = early_exit_objective(ExitsConfig(coefficient=0.2, distill="last"), teacher, 2)
    assert from_last.weights == (
        ExitWeights(pytest.approx(0.15), last_exit=pytest.approx(0.05)),
        ExitWeights(0.75, teacher=0.25),
    )


def teacher_bytes(path: Path, tokenizer: Path) -> tuple[int, int, int]:
    """Bytes that a process holds of the teacher before, during and after a use."""
    with processes("cpu") as group:
        teacher = make_teacher(path, tokenizer, group)

        def held() -> int:
            gathered = 0
            for parameter in teacher.model.parameters():
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                gathered += local.untyped_storage().nbytes() if local.numel() else 0
            return gathered

        inputs = torch.arange(2 * LENGTH).reshape(2, LENGTH)
        before = held()
        with teacher.read(inputs) as found:
            during = held()
            assert found.hidden.shape == (2 * LENGTH, WIDE.hidden_size) and not found.hidden.requires_grad
            logits = found.hidden @ found.weight.t()
        model = rrt.load_model(path)
        with torch.no_grad():
            torch.testing.assert_close(logits, model(inputs).flatten(0, 1), rtol=0, atol=1e-5)
        return before, during, held()


def make_teacher(path: Path, tokenizer: Path, group: Processes) -> ShardedTeacher:
    source = open_teacher(path, LLAMA, load_tokenizer(tokenizer), LENGTH)
    return ShardedTeacher.load(source, group, torch.float32)


def test_a_teacher_is_held_in_parts_again_after_each_use(checkpoints: dict[str, Path], tokenizer: Path) -> None:
    whole = sum(p.nbytes for p in rrt.load_model(checkpoints["teacher"]).parameters())
    embeddings = 2 * VOCAB * WIDE.hidden_size * 4
    for before, during, after in run_on_two(teacher_bytes, checkpoints["teacher"], tokenizer):
        assert before == after == pytest.approx(whole / 2, rel=0.02)
        # Embedding, norm and head are whole while the loss needs the head; the layers are not.
        assert during == pytest.approx(whole / 2 + embeddings / 2, rel=0.02)


@pytest.fixture(scope="module")
def bad_teachers(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bad")
    other = make_bpe_tokenizer(root / "bpe", vocab_size=VOCAB)
    kinds = {
        "tokenizer": (other, WIDE),
        "vocabulary": (tokenizer, replace(WIDE, vocab_size=VOCAB + 4)),
        "context": (tokenizer, replace(WIDE, max_position_embeddings=8)),
    }
    return {
        name: make_checkpoint(root / name, source, config, RecursiveConfig())
        for name, (source, config) in kinds.items()
    }


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "tokenizer",
            "has the tokenizer of sha256 .*; expected the model's, .*: distillation compares the same tokens",
        ),
        ("vocabulary", "has vocab_size 424; expected 420, as the model has"),
        ("context", "has context_length 8; expected at least data.seq_len = 32"),
    ],
)
def test_a_teacher_of_other_tokens_is_refused(
    kind: str, message: str, bad_teachers: dict[str, Path], checkpoints: dict[str, Path], flags: Flags, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"field 'distill.teacher': {bad_teachers[kind]} {message}"):
        train(flags(checkpoints["two"], tmp_path / "run", distill__teacher=bad_teachers[kind]), uptrain.COMMAND)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("vanilla", {}, "field 'num_loops': found 1; expected a recursive model"),
        ("sequence", {}, "field 'checkpoint.path': found a model with sharing 'sequence'"),
        ("two", {"exits__distill": "teacher"}, "field 'distill.teacher': missing"),
        ("two", {"exits__freeze": "true"}, "field 'exits.head_lora_rank': found 0; expected a positive rank"),
        (
            "two",
            {"exits__freeze": "true", "exits__head_lora_rank": 2, "distill__teacher": "x"},
            "field 'distill.teacher': found 'x'; expected none",
        ),
        ("two", {"exits__coefficient": -1}, "field 'exits.coefficient': found -1.0; expected a positive number"),
        (
            "two",
            {"distill__weight": 0, "distill__teacher": "x"},
            "field 'distill.weight': found 0 with distill.teacher",
        ),
        ("two", {"distill__weight": 1.5}, "field 'distill.weight': found 1.5; expected a number from 0 to 1"),
        ("two", {"distill__temperature": 0}, "field 'distill.temperature': found 0.0; expected a positive number"),
        ("two", {"distill__loss": "l2"}, "field 'distill.loss': found 'l2'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    kind: str, overrides: dict[str, Any], message: str, checkpoints: dict[str, Path], flags: Flags, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        train(flags(checkpoints[kind], tmp_path / "run", **overrides))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_objective_does_not_resume_the_run(checkpoints: dict[str, Path], flags: Flags, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(flags(checkpoints["two"], out))
    (out / "final").rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"field 'objective\.weights\[0\]\.cross_entropy': found 0\.1, this run has 0\.3;"
    ):
        train(flags(checkpoints["two"], out, exits__coefficient=0.3))


@pytest.mark.slow
def test_the_command_runs_under_torchrun(checkpoints: dict[str, Path], flags: Flags, tmp_path: Path) -> None:
    argv = flags(checkpoints["two"], tmp_path / "run", distill__teacher=checkpoints["teacher"], exits__distill="last")
    result = run_script(argv, processes=2, script="early_exit.py")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("early-exit: llama, 6 layers as 2 loop(s) of 3, LoRA rank 3")
    assert (
        "loss: loop 0: 0.05 cross-entropy + 0.05 forward_kl from the last loop; "
        "loop 1: 0.5 cross-entropy + 0.5 forward_kl from the teacher"
    ) in lines
    assert lines[-1] == f"wrote {tmp_path / 'run' / 'final'}"


@pytest.mark.slow
def test_distilling_three_exits_of_gemma_takes_little_more_memory_than_training_them(flags: Flags) -> None:
    recipe = read_recipe(EarlyExitRecipe, "", flags(Path("x"), Path("y"), run__dtype="bf16", data__seq_len=2048))
    recipe = replace(recipe, run=replace(recipe.run, batch_tokens=2**18, tokens=2**18))
    gemma, three = preset("gemma-2b"), RecursiveConfig(num_loops=3)
    objective = early_exit_objective(ExitsConfig(distill="teacher"), DistillConfig(teacher="gemma-2b"), 3)
    plain, distilled = (
        estimate_memory(TrainingSpec(gemma, three, *rest), recipe, 8, "cuda")
        for rest in (
            (early_exit_objective(ExitsConfig(), DistillConfig(), 3),),
            (objective, (gemma, RecursiveConfig())),
        )
    )
    assert distilled.teacher > 0
    assert distilled.peak - distilled.teacher < 1.2 * plain.peak
