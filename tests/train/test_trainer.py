"""The training commands from end to end on a tiny model, and the trainer's parts."""

import fcntl
import json
import os
import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load

import rrt
from rrt.data.shards import ShardWriter
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.model.transformer import RecursiveTransformer
from tests.util.commands import run_program
from tests.util.processes import run_on_two
from tests.util.sharding import next_token_loss
from tests.util.tokenizers import environment, make_bpe_tokenizer, make_sentencepiece_tokenizer
from tests.util.training import (
    BATCH,
    LENGTH,
    LLAMA,
    RELAXED,
    ROOT,
    VOCAB,
    Flags,
    losses,
    make_checkpoint,
    make_data,
    make_flags,
    metrics,
    run_script,
    samples_of,
    steps_kept,
    to_flags,
    train,
    train_here,
    train_until,
)
from train import pretrain, uptrain
from train.distributed import full_parameters
from train.flops import training_flops_per_token
from train.optimizer import learning_rate, make_optimizer
from train.recipe import OptimConfig
from train.trainer import StepResult, Trainer

# As in the processes that these runs are compared with.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sentencepiece_tokenizer(tmp_path_factory.mktemp("tokenizer"), "llama", VOCAB)


@pytest.fixture(scope="module")
def data(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), tokenizer)


@pytest.fixture(scope="module")
def checkpoint(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "relaxed", tokenizer)


@pytest.fixture(scope="module")
def flags(checkpoint: Path, data: Path) -> Flags:
    return make_flags(checkpoint, data)


def uptrain_in_double(argv: list[str]) -> dict[str, torch.Tensor]:
    """The weights after training with parameters in double precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecursiveTransformer, "float", RecursiveTransformer.double)
        weights: dict[str, torch.Tensor] = {}
        save_final = Trainer._save_final

        def keep(self: Trainer) -> None:
            weights.update((name, tensor.clone()) for name, tensor in full_parameters(self.model))
            save_final(self)

        patch.setattr(Trainer, "_save_final", keep)
        train(argv)
        return weights


def test_torchrun_trains_and_leaves_a_checkpoint_and_a_recipe_that_gives_the_same(
    flags: Flags, data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    argv = flags(out, steps=24, run__save_every=8, run__micro_batch=4, run__log_every=6)
    result = run_script(argv, processes=2)
    check_output(result, out)
    check_records(out)
    assert steps_kept(out) == [16, 24] and not list(out.glob(".*"))
    check_final_checkpoint(out, data, checkpoint)
    run_on_two(train_here, ["--recipe", str(out / "recipe.toml"), "--run.out", str(tmp_path / "again")])
    assert losses(tmp_path / "again") == losses(out)


def check_output(result: "subprocess.CompletedProcess[str]", out: Path) -> None:
    """Nothing alarming is printed."""
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("uptrain: llama, 4 layers as 2 loop(s) of 2, LoRA rank 3")
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["6/24", "12/24", "18/24", "24/24"]
    assert lines[-1] == f"wrote {out / 'final'}"


def check_records(out: Path) -> None:
    """The loss falls and every step is recorded once."""
    found = losses(out)
    assert len(found) == 24
    assert found[-1] < found[0] - 0.7
    assert {"step", "tokens", "loss", "lr", "grad_norm"} <= metrics(out)[0].keys()
    assert metrics(out)[23]["tokens"] == 24 * BATCH * LENGTH
    assert list((out / "tb").glob("events.out.tfevents.*"))


def check_final_checkpoint(out: Path, data: Path, checkpoint: Path) -> None:
    """`final/` is the last training state, and better than the model that the run began with."""
    model = rrt.load_model(out / "final")
    stored = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is only this process
        load({"model": stored}, checkpoint_id=out / "step-24", no_dist=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name], parameter), name
    inputs, targets = samples_of(data).batch(24 * BATCH, BATCH)
    with torch.no_grad():
        trained, untrained = (next_token_loss(m(inputs), targets) for m in (model, rrt.load_model(checkpoint)))
    assert trained == pytest.approx(losses(out)[-1], abs=0.5)
    assert trained < untrained - 0.7
    provenance = json.loads((out / "final" / "provenance.json").read_text())
    assert provenance["stage"] == "uptrain"
    assert provenance["steps"] == 24
    assert load_tokenizer(out / "final").sha256 == load_tokenizer(checkpoint).sha256


def train_plainly(
    checkpoint: Path, data: Path, optim: OptimConfig, steps: int, num_loops: int | None = None
) -> tuple[dict[str, Any], list[float]]:
    """Weights and losses of the same training in double precision as a loop without trainer or sharding."""
    model = rrt.load_model(checkpoint, dtype=torch.float64, num_loops=num_loops).train()
    samples = samples_of(data)
    groups = make_optimizer(model, optim).param_groups
    optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        inputs, targets = samples.batch(step * BATCH, BATCH)
        loss = next_token_loss(model(inputs), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, steps)
        optimizer.step()
        found.append(loss.item())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, found


@pytest.mark.parametrize(("processes", "micro_batch"), [(1, 8), (2, 2)])
def test_weights_and_losses_are_those_of_a_plain_loop(
    processes: int, micro_batch: int, flags: Flags, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    optim = OptimConfig(lr=5e-3, warmup_steps=2, grad_clip=0.5)
    expected, expected_losses = train_plainly(checkpoint, data, optim, steps=4)
    argv = flags(tmp_path / "run", steps=4, run__micro_batch=micro_batch, optim__grad_clip=0.5)
    weights = uptrain_in_double(argv) if processes == 1 else run_on_two(uptrain_in_double, argv)[0]
    assert max(record["grad_norm"] for record in metrics(tmp_path / "run")) > 0.5  # some were clipped
    assert losses(tmp_path / "run") == pytest.approx(expected_losses, abs=1e-12)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_wrapping_copies_and_checkpointing_change_no_weight(
    flags: Flags, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    expected, _ = train_plainly(checkpoint, data, OptimConfig(lr=5e-3, warmup_steps=2, grad_clip=0.5), steps=4)
    settings = dict(run__wrap="layer", run__shard_size=1, run__checkpointing="loop", optim__grad_clip=0.5)
    weights, _ = run_on_two(uptrain_in_double, flags(tmp_path / "run", steps=4, **settings))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_the_first_loops_train_as_a_model_of_their_own(
    flags: Flags, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    expected, _ = train_plainly(checkpoint, data, OptimConfig(lr=5e-3, warmup_steps=2), steps=4, num_loops=1)
    weights = uptrain_in_double(flags(tmp_path / "run", steps=4, checkpoint__num_loops=1))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    trained = rrt.load_model(tmp_path / "run" / "final")
    assert (trained.config.num_layers, trained.recursion.num_loops) == (2, 1)


def test_bf16_trains(flags: Flags, tmp_path: Path) -> None:
    train_here(flags(tmp_path / "fp32", steps=6))
    train_here(flags(tmp_path / "bf16", steps=6, run__dtype="bf16", run__save_dtype="bfloat16"))
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), abs=0.05)
    assert rrt.load_model(tmp_path / "bf16" / "final").embed.dtype == torch.bfloat16


@pytest.mark.parametrize("has_instructions", [False, True])
def test_a_cpu_without_bf16_instructions_is_told_once(
    flags: Flags,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    has_instructions: bool,
) -> None:
    monkeypatch.setattr("train.trainer.multiplies_bfloat16", lambda: has_instructions)
    for dtype in ("bf16", "fp32"):
        train_here(flags(tmp_path / dtype, run__dtype=dtype))
    assert capsys.readouterr().out.count("this CPU has no instructions for bf16") == (not has_instructions)


def test_a_run_mixes_corpora_from_where_it_is_told_to(
    flags: Flags, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = dict(data__path=json.dumps([str(data), str(data)]), data__weights="[1, 3]", data__offset=2 * LENGTH)
    train_here(flags(tmp_path / "run", steps=2, **mixed))
    shares = [line.split(", ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("data: /")]
    assert shares == ["28.44 K tokens", "28.44 K tokens"]
    with pytest.raises(UserError, match="holds a finished run"):
        train_here(["--recipe", str(tmp_path / "run" / "recipe.toml")])


def test_deterministic_algorithms_are_on_during_a_run_that_asks_for_them(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    train_here(flags(tmp_path / "plain", steps=2))
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    seen, step = [], Trainer._train_step

    def take(self: Trainer, rate: float) -> StepResult:
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]))
        return step(self, rate)

    monkeypatch.setattr(Trainer, "_train_step", take)
    train_here(flags(tmp_path / "deterministic", steps=2, run__deterministic="true"))
    assert seen == [(True, ":4096:8")] * 2 and not torch.are_deterministic_algorithms_enabled()
    assert losses(tmp_path / "deterministic") == losses(tmp_path / "plain")


def test_merged_and_plain_lora_train_alike(flags: Flags, tmp_path: Path) -> None:
    train_here(flags(tmp_path / "merged", steps=4))
    train_here(flags(tmp_path / "plain", steps=4, run__lora="plain"))
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "merged"), abs=1e-4)


def test_a_finished_run_is_refused_and_overwritten_on_request(flags: Flags, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_here(flags(out, steps=2))
    before = losses(out)
    with pytest.raises(UserError, match="holds a finished run"):
        train_here(flags(out, steps=2))
    assert losses(out) == before
    train_here(flags(out, steps=3, run__overwrite="true"))
    assert len(losses(out)) == 3
    with pytest.raises(UserError, match="holds a finished run"):  # what it left behind does not delete it
        train_here(["--recipe", str(out / "recipe.toml")])


def test_overwriting_spares_other_directories_and_the_runs_inputs(flags: Flags, tmp_path: Path, data: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("years of work")
    with pytest.raises(UserError, match="not empty and not a training run"):
        train_here(flags(tmp_path / "thesis", run__overwrite="true"))
    assert (tmp_path / "thesis" / "text").exists()
    out = tmp_path / "run"
    train_here(flags(out, steps=2))
    with pytest.raises(UserError, match=r"lies in run\.out"):
        train_here(flags(out, run__overwrite="true", checkpoint__path=out / "final"))
    assert (out / "final").exists()
    argv = pretrain_flags(out, out / "final", data, run__overwrite="true")
    with pytest.raises(UserError, match=r"final: lies in run\.out"):
        train_here(argv, pretrain.COMMAND)
    assert (out / "final").exists()


def test_the_checkpoint_that_a_run_begins_with_may_be_gone_when_it_ends(
    flags: Flags, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, save = tmp_path / "parent", Trainer._save_final
    shutil.copytree(checkpoint, parent)

    def save_without(self: Trainer) -> None:
        shutil.rmtree(parent)
        save(self)

    monkeypatch.setattr(Trainer, "_save_final", save_without)
    train_here(flags(tmp_path / "run", steps=1, checkpoint__path=parent))
    assert load_tokenizer(tmp_path / "run" / "final").sha256 == load_tokenizer(checkpoint).sha256


def test_two_runs_never_share_a_directory(flags: Flags, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_until(3, flags(out, run__save_every=2))
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another training run writes to it"):
        train_here(flags(out, run__save_every=2))
    assert steps_kept(out) == [2]
    os.close(handle)
    train_here(flags(out, run__save_every=2))


def test_another_run_in_the_same_directory_is_refused(flags: Flags, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_until(2, flags(out, run__save_every=1, run__keep=1))
    changes: dict[str, dict[str, Any]] = {
        "run.seed": {"run__seed": 1},
        "data.seq_len": {"data__seq_len": 16},
        "data.offset": {"data__offset": 32},
        "run.tokens": {"steps": 9},
    }
    for field, change in changes.items():
        with pytest.raises(UserError, match=f"trainer.json: field '{field}': found .*, this run has"):
            train_here(flags(out, **change))
        assert steps_kept(out) == [2]


def test_a_progress_line_shows_the_share_of_the_peak_that_was_asked_for(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(flags(tmp_path / "run", steps=2, run__log_every=1, run__peak_flops=1e12, run__lora="merged"))
    record = metrics(tmp_path / "run")[-1]
    assert 0 < record["mfu"] < 1
    assert record["mfu"] / record["tokens_per_second"] == pytest.approx(
        training_flops_per_token(LLAMA, RELAXED, LENGTH, merged_over=2 * LENGTH) / 1e12
    )
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 2/2"))
    assert f"MFU {record['mfu']:.1%}" in line and "ETA 0:00:00" in line and "grad norm" in line


@pytest.fixture(scope="module")
def bad_input(flags: Flags, data: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Overrides that make each kind of bad input, with what the message says."""
    other = make_bpe_tokenizer(tmp_path_factory.mktemp("neox"), vocab_size=VOCAB)
    foreign = tmp_path_factory.mktemp("foreign")
    with ShardWriter(foreign, load_tokenizer(other)) as writer:
        writer.append("train", [1] * 100, [100], [100])
        writer.finish({})
    return {
        "no shards": ({"data__path": data / "none"}, "no meta.json; expected a directory written by"),
        "no split": ({"data__split": "test"}, "no split 'test'; it has train"),
        "another tokenizer's shards": ({"data__path": foreign}, "made with the tokenizer of sha256"),
        "indivisible batch": (
            {"run__batch_tokens": BATCH * LENGTH + 1, "run__tokens": 1000},
            "field 'run.batch_tokens'",
        ),
        "context too long": ({"data__seq_len": 128, "run__tokens": 1024}, "context_length = 64"),
        "no checkpoint": (
            {"checkpoint__path": checkpoint / "none"},
            "no such directory; expected an HF model directory",
        ),
        "another start": (
            {"start__base": "tinyllama-1.1b", "start__convert": "--num-loops 4"},
            "has num_loops 2; expected 4, as the recipe's start.convert = '--num-loops 4' says",
        ),
        "another family": (
            {"start__base": "pythia-160m", "start__convert": "--num-loops 2"},
            "has family llama; expected gpt_neox, as the recipe's start.base = 'pythia-160m' says",
        ),
        "too many loops": ({"checkpoint__num_loops": 3}, f"num_loops: found 3; {checkpoint} has 2: expected 1 to 2"),
        "no wandb": ({"run__wandb": "project"}, "field 'run.wandb': the wandb package cannot be imported ("),
        "no warm-up": ({"optim__warmup_steps": -1}, "field 'optim.warmup_steps': found -1; expected 0 or more"),
        "a file in the way": ({"run__out": data / "meta.json"}, "is a file; expected a directory"),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "no shards",
        "no split",
        "another tokenizer's shards",
        "indivisible batch",
        "context too long",
        "no checkpoint",
        "another start",
        "another family",
        "too many loops",
        "no wandb",
        "no warm-up",
        "a file in the way",
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    kind: str,
    bad_input: dict[str, Any],
    flags: Flags,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides, message = bad_input[kind]
    overrides = {"run__micro_batch": 1, **overrides}
    done = run_program(uptrain.main, flags(tmp_path / "deep" / "out", **overrides), capsys, monkeypatch)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("error: ") and message in done.err
    assert not (tmp_path / "deep").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_error(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_program(uptrain.main, flags(tmp_path / "out", run__device="cuda"), capsys, monkeypatch)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("error: field 'run.device': found 0 GPU(s); expected one for each of 1 process")
    assert not (tmp_path / "out").exists()


def test_bad_input_is_the_same_error_in_all_processes(flags: Flags, tmp_path: Path) -> None:
    errors = run_on_two(train_here, flags(tmp_path / "out", data__path=tmp_path / "none"))
    assert {str(error) for error in errors} == {
        f"{tmp_path / 'none'}: no meta.json; expected a directory written by train/prepare_data.py"
    }
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_process_of_torchrun_reports_the_error(flags: Flags, tmp_path: Path) -> None:
    result = run_script(flags(tmp_path / "out", data__path=tmp_path / "none"), processes=2)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: {tmp_path / 'none'}: no meta.json; expected a directory written by train/prepare_data.py"
    ]
    assert 'uptrain.py", line' not in result.stderr  # no traceback of ours
    assert not (tmp_path / "out").exists()


def pretrain_flags(out: Path, tokenizer: Path, data: Path, **overrides: Any) -> list[str]:
    values = {
        "model.config": ROOT / "runs" / "demo_scratch_base.json",
        "model.tokenizer": tokenizer,
        "model.num_layers": 2,
        "data.path": data,
        "data.seq_len": 16,
        "run.out": out,
        "run.tokens": 3 * 64,
        "run.batch_tokens": 64,
        "run.micro_batch": 1,
        "run.dtype": "fp32",
        "run.device": "cpu",
    }
    return to_flags(values, **overrides)


def test_pretraining_starts_alike_on_any_number_of_processes(tokenizer: Path, data: Path, tmp_path: Path) -> None:
    train_here(pretrain_flags(tmp_path / "one", tokenizer, data, model__num_loops=2), pretrain.COMMAND)
    run_on_two(train_here, pretrain_flags(tmp_path / "two", tokenizer, data, model__num_loops=2), pretrain.COMMAND)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    model = rrt.load_model(tmp_path / "two" / "final")
    assert (model.config.num_layers, model.recursion.num_loops, len(model.stack.layers)) == (2, 2, 1)
    assert model.config.eos_token_ids == (load_tokenizer(tokenizer).eos_id,)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model__config": "gemma-3b"},
            "found 'gemma-3b'; expected a config.json, a model directory, a GGUF file or one of gemma-2b",
        ),
        ({"model__num_layers": 0}, "field 'num_layers': found 0; expected a positive number"),
        ({"model__num_loops": 3}, "does not divide the base's 2 layers"),
    ],
)
def test_a_shape_that_cannot_be_trained_is_refused(
    overrides: dict[str, Any], message: str, tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        train_here(pretrain_flags(tmp_path / "out", tokenizer, data, **overrides), pretrain.COMMAND)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    assert [learning_rate(optim, step, 14) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(optim, 9, 14) == pytest.approx(0.55)
    assert learning_rate(optim, 14, 14) == pytest.approx(0.1)
    rates = [learning_rate(optim, step, 14) for step in range(4, 15)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(replace(optim, warmup_steps=0), 0, 1) == 1.0


def test_norms_and_biases_are_not_decayed() -> None:
    config = replace(
        LLAMA, family="gpt_neox", norm_type="layernorm", qkv_bias=True, out_bias=True, mlp_bias=True, num_kv_heads=4
    )
    recursion = replace(RELAXED, prefix_length=2)
    model = RecursiveTransformer(config, recursion)
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.2))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    undecayed = {
        name.removeprefix("stack.layers.0.") for name in names if names[name] == 0.0 and "layers.1" not in name
    }
    assert undecayed == {
        *(f"{norm}.{part}" for norm in ("attn_norm", "mlp_norm", "norm") for part in ("weight", "bias")),
        *(f"attn.{linear}.bias" for linear in ("q", "k", "v", "out")),
        *(f"mlp.{linear}.bias" for linear in ("gate", "up", "down")),
    }
    assert {value for name, value in names.items() if value} == {0.2}
    assert {"embed", "stack.prefix", "stack.layers.0.mlp.up.lora_b"} <= {name for name in names if names[name]}


@pytest.mark.gpu
def test_uptraining_on_a_gpu(flags: Flags, tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = flags(out, steps=24, run__device="cuda", run__dtype="bf16", run__save_every=10)
    result = run_script(argv, processes=1)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    found = losses(out)
    assert len(found) == 24
    assert found[-1] < found[0] - 0.7
    model = rrt.load_model(out / "final", device="cuda")
    inputs = torch.arange(LENGTH, device="cuda")[None]
    assert model(inputs).isfinite().all()
    train_here(flags(tmp_path / "cpu", steps=24, run__dtype="bf16"))
    assert found == pytest.approx(losses(tmp_path / "cpu"), abs=0.1)


@pytest.mark.gpu
def test_a_run_on_a_gpu_resumes(flags: Flags, tmp_path: Path) -> None:
    settings = dict(run__device="cuda", run__dtype="bf16", run__save_every=4)
    with environment(CUBLAS_WORKSPACE_CONFIG=":4096:8"):
        train_here(flags(tmp_path / "whole", **settings))
        train_until(5, flags(tmp_path / "parts", **settings))
        train_here(flags(tmp_path / "parts", **settings))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-2)
