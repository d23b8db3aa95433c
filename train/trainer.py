"""The trainer: one loop for uptraining, early exits and training from scratch, on any number of processes."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rrt.common.cli import human_count
from rrt.common.dtypes import parse_dtype
from rrt.common.files import read_json
from rrt.common.machine import multiplies_bfloat16
from rrt.data.tokenizer import check_vocab
from rrt.errors import UserError
from rrt.model.meta import meta_model
from rrt.model.transformer import RecursiveTransformer
from train.architecture import InitialModel, describe_model
from train.checkpoints import STATE_FILE, TrainingStateWriter, load_step
from train.compile import compile_layers
from train.data import open_data
from train.determinism import deterministic_algorithms
from train.distributed import (
    AgreedError,
    Processes,
    broadcast_from_main,
    fill_parameters,
    full_parameters,
    raise_everywhere,
    set_last_micro_batch,
    shard_model,
)
from train.flops import peak_flops, run_flops_per_token
from train.guard import Guard
from train.interrupt import Interrupt, Interrupted
from train.metrics import Meter, MetricsWriter, import_wandb, memory_bytes, progress_line
from train.objective import PART_NAMES, Objective
from train.optimizer import learning_rate, make_optimizer
from train.permutation import keyed_uint64s
from train.recipe import Recipe, RunConfig, accumulation
from train.run_directory import RunDirectory
from train.teacher import ShardedTeacher, open_teacher


class StepResult(NamedTuple):
    """One optimizer step, the same in all processes."""

    loss: float
    """Mean over all processes, nats per token."""
    grad_norm: float
    """Before clipping."""
    parts: dict[str, float]
    """The losses of each exit by name, unweighted; none where the loss has one part only."""
    fault: str | None
    """Why the weights were left as they are, if they were."""


def set_up_model(model: RecursiveTransformer, run: RunConfig, objective: Objective, mesh: DeviceMesh) -> None:
    """Make `model` compute as `run` says and train what `objective` trains, sharded over `mesh`, in place."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(objective.should_train(name))
    model.set_merge({"auto": None, "merged": True, "plain": False}[run.lora])
    model.stack.checkpointing = run.checkpointing
    shard_model(model, mesh, torch.bfloat16 if run.dtype == "bf16" else None, run.wrap)


class Trainer:
    """One training run. Construction checks everything that can be checked; `run` trains.

    Raises:
        UserError: the recipe, the data, the tokenizer and the model do not fit together, or `run.out` holds a
            run that this one cannot continue.
    """

    def __init__(self, recipe: Recipe, initial: InitialModel, processes: Processes) -> None:
        self.recipe, self.initial, self.processes = recipe, initial, processes
        self.steps = recipe.run.steps
        self.accumulation = accumulation(recipe, processes.world_size)
        check_vocab(initial.tokenizer, initial.model.vocab_size, "the model")
        self.samples = open_data(recipe.data, initial.tokenizer, recipe.run.seed)
        if recipe.data.seq_len > initial.model.context_length:
            raise UserError(
                f"field 'data.seq_len': found {recipe.data.seq_len}; expected at most the model's "
                f"context_length = {initial.model.context_length}"
            )
        self.teacher = None
        if initial.teacher is not None:
            self.teacher = open_teacher(initial.teacher, initial.model, initial.tokenizer, recipe.data.seq_len)
        self.directory = RunDirectory(recipe, initial) if processes.is_main else None
        if recipe.run.wandb is not None:
            import_wandb()
        self.guard = Guard(recipe.guard)
        self.step = 0
        self.step_saved = -1

    def run(self) -> None:
        """Train to the end, resuming from the latest complete checkpoint of `run.out`; write `final/`.

        On SIGTERM or SIGUSR1 it saves the last finished step instead, and returns.
        """
        with contextlib.ExitStack() as self._cleanup:
            self.interrupt = self._cleanup.enter_context(Interrupt())
            if self.recipe.run.deterministic:
                self._cleanup.enter_context(deterministic_algorithms())
            self._set_up()
            self._describe()
            interrupted = None
            try:
                self._loop()
            except Interrupted as caught:  # the gradients of an unfinished step are dropped
                interrupted = caught
            if self.step_saved != self.step and self.step > 0:
                self._save_step()
            self.state_writer.wait()
            if interrupted is None:
                self._save_final()
            else:
                saved = f"saved step {self.step} of {self.steps}" if self.step else "no step was finished"
                self._print(f"{interrupted.signal}: {saved}; the same command goes on from there")

    # Set-up

    def _set_up(self) -> None:
        checkpoint = broadcast_from_main(self._prepare_directory)
        self._build()
        if checkpoint is None:
            raise_everywhere(lambda: fill_parameters(self.model, self.initial.open_parameters()))
        else:
            self.step = self.step_saved = load_step(checkpoint, self.model, self.optimizer)
            self.guard.load_state_dict(read_json(checkpoint / STATE_FILE)["guard"])
            self._print(f"resuming from {checkpoint}")
        run = self.recipe.run
        self.state_writer = TrainingStateWriter(Path(run.out), keep=run.keep, background=run.save_async)
        self._cleanup.callback(self.state_writer.close)

    def _prepare_directory(self) -> Path | None:
        assert self.directory is not None
        self._cleanup.enter_context(self.directory.locked())
        return self.directory.prepare()

    def _build(self) -> None:
        run, device = self.recipe.run, self.processes.device
        self.model = meta_model(self.initial.model, self.initial.recursion).float().train()
        set_up_model(self.model, run, self.initial.objective, self.processes.mesh)
        if run.compile:
            raise_everywhere(lambda: compile_layers(self.model.stack, device))
        self.model.to_empty(device=device)
        dtype = torch.bfloat16 if run.dtype == "bf16" else torch.float32
        teacher = self.teacher and ShardedTeacher.load(self.teacher, self.processes, dtype)
        self.losses = self.initial.objective.bind(self.model, teacher)
        self.optimizer = make_optimizer(self.model, self.recipe.optim)

    # The loop

    def _loop(self) -> None:
        run = self.recipe.run
        meter, write = self._make_meter(), self._open_metrics()
        while self.step < self.steps:
            rate = learning_rate(self.recipe.optim, self.step, self.steps)
            result = self._train_step(rate)
            self.step += 1
            record: dict[str, Any] = {
                "step": self.step,
                "tokens": self.step * run.batch_tokens,
                "loss": result.loss,
                "lr": rate,
                "grad_norm": result.grad_norm,
                **result.parts,
            }
            if result.fault is not None:
                record["fault"] = result.fault
            if self.step % run.log_every == 0 or self.step == self.steps:
                record |= meter.read(self.step)
                record["memory_bytes"] = memory_bytes(self.processes.device)
                self._print(progress_line(record, self.steps))
            write(record)
            if result.fault is not None:
                self._skip_or_stop(result.fault)
            elif run.save_every and self.step % run.save_every == 0:
                self._save_step()
                meter.restart(self.step)

    def _train_step(self, rate: float) -> StepResult:
        """Take one optimizer step; the weights stay as they are if the guard finds fault with it."""
        run, processes = self.recipe.run, self.processes
        # A resumed run draws what the first one would have: no state of generators has to be kept.
        torch.manual_seed(keyed_uint64s(run.seed, self.step, processes.rank, count=1)[0])
        losses = torch.zeros(self.accumulation, dtype=torch.float64, device=processes.device)
        parts = losses.new_zeros(len(self.initial.objective.weights), len(PART_NAMES))
        for micro in range(self.accumulation):
            if self.interrupt.check(self.state_writer.has_failed):
                self.state_writer.wait()
            set_last_micro_batch(self.model, micro == self.accumulation - 1)
            inputs, targets = self.samples.batch(self._first_sample(micro, processes.rank), run.micro_batch)
            inputs, targets = inputs.to(processes.device), targets.to(processes.device)
            loss, exit_parts = self.losses(inputs, targets)
            loss = loss / self.accumulation
            loss.backward()
            losses[micro] = loss.detach()
            parts += exit_parts / self.accumulation
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optim.grad_clip)
        grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        sums = torch.cat((losses.sum()[None], parts.flatten()))
        dist.all_reduce(sums)
        mean, *means = (sums / processes.world_size).tolist()
        # The same numbers in all processes, so all step or none does.
        fault = self.guard.diagnose(mean, grad_norm)
        if fault is None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        else:
            fault = f"{fault}; {self._describe_worst_samples(losses)}"
        self.optimizer.zero_grad(set_to_none=True)
        named = self.initial.objective.named_parts(means, self.initial.recursion.num_loops)
        return StepResult(mean, grad_norm, named, fault)

    def _first_sample(self, micro: int, rank: int) -> int:
        """Return the position in the run's data of the first sample of one micro-batch of the current step."""
        index = (self.step * self.accumulation + micro) * self.processes.world_size + rank
        return index * self.recipe.run.micro_batch

    def _describe_worst_samples(self, losses: Tensor) -> str:
        """Say which samples the micro-batch with the highest loss has, and where they lie. A collective."""
        gathered = [torch.empty_like(losses) for _ in range(self.processes.world_size)]
        dist.all_gather(gathered, losses)
        everywhere = torch.stack(gathered).nan_to_num(nan=math.inf)
        rank, micro = divmod(int(everywhere.argmax()), self.accumulation)
        first = self._first_sample(micro, rank)
        samples = range(first, first + self.recipe.run.micro_batch)
        places = ", ".join(self.samples.place(sample) for sample in samples)
        found = f"samples {samples[0]} to {samples[-1]}"
        return f"the highest loss is in {found}, which python -m rrt.shards shows: {places}"

    def _skip_or_stop(self, fault: str) -> None:
        message = f"step {self.step}: {fault}"
        if not self.guard.must_stop:
            self._print(f"skipped {message}")
            return
        self.step -= 1
        try:
            if self.step_saved < self.step and self.step > 0:
                self._save_step()
            self.state_writer.wait()
        except AgreedError as error:
            message += f"; {error}"
        if self.recipe.guard.on_bad_step == "stop":
            remedy = "lower optim.lr, or skip such steps with --guard.on_bad_step skip"
        else:
            skipped = self.recipe.guard.max_skips
            remedy = f"it comes after {skipped} skipped ones: lower optim.lr, or raise guard.max_skips"
        resumption = broadcast_from_main(lambda: self.directory and self.directory.describe_resumption())
        raise AgreedError(f"{message}; {remedy}, and run again, which continues from {resumption}")

    # Saving

    def _save_step(self) -> None:
        state = {"identity": self.directory.identity} if self.directory is not None else {}
        state["guard"] = self.guard.state_dict()
        # After a bad step the weights may be spoilt: no older checkpoint is deleted for this one.
        delete_old = not self.guard.last_was_bad
        self.state_writer.save(self.step, self.model, self.optimizer, state, delete_old)
        self.step_saved = self.step

    def _save_final(self) -> None:
        """Gather the parameters and write `final/`.

        Gathered first and written then, when no process waits in a collective that could time out.
        """
        dtype, gathered = parse_dtype(self.recipe.run.save_dtype), {}
        for name, tensor in full_parameters(self.model):
            if self.processes.is_main:
                gathered[name] = tensor.to("cpu", dtype)
        dist.barrier()
        if self.directory is not None:
            print(f"wrote {self.directory.write_final(gathered, self.step)}", flush=True)

    # Reporting

    def _make_meter(self) -> Meter:
        run, device, initial = self.recipe.run, self.processes.device, self.initial
        flops = run_flops_per_token(
            initial.model,
            initial.recursion,
            self.recipe.data.seq_len,
            run,
            initial.objective,
            self.teacher and (self.teacher.model, self.teacher.recursion),
        )
        peak = run.peak_flops
        if peak is None and device.type == "cuda" and run.dtype == "bf16":
            peak = peak_flops(torch.cuda.get_device_name(device))
        total_peak = None if peak is None else peak * self.processes.world_size
        return Meter(self.step, self.steps, run.batch_tokens, flops, total_peak)

    def _open_metrics(self) -> Callable[[dict[str, Any]], None]:
        """Open the metrics and return the function that writes a step's record; only the first process's writes."""
        if self.directory is None:
            return lambda record: None
        recipe: Any = self.recipe
        writer = MetricsWriter(self.directory.path, self.step, self.recipe.run.wandb, dataclasses.asdict(recipe))
        self._cleanup.callback(writer.close)
        return writer.write

    def _describe(self) -> None:
        """Say what is about to happen: sizes, tokens, processes."""
        run, world, initial = self.recipe.run, self.processes.world_size, self.initial
        optim, samples = self.recipe.optim, self.steps * run.batch_tokens // self.recipe.data.seq_len
        warmup = ""
        if optim.warmup_steps >= self.steps:
            warmup = (
                f"note: the warm-up of {optim.warmup_steps} steps does not end in {self.steps}; "
                "set --optim.warmup_steps\n"
            )
        for notice in initial.notices:
            self._print(f"notice: {notice}")
        if self.processes.device.type == "cpu" and run.dtype == "bf16" and not multiplies_bfloat16():
            self._print("notice: this CPU has no instructions for bf16: --run.dtype fp32 is likely faster")
        self._print(
            f"{initial.stage}: {describe_model(initial.model, initial.recursion)}\n"
            f"{self.samples.describe(samples)}"
            f"train: {self.steps} steps of {human_count(run.batch_tokens)} tokens = {human_count(run.tokens)}; "
            f"{world} process(es) x {self.accumulation} micro-batch(es) x {run.micro_batch} x "
            f"{self.recipe.data.seq_len}; {run.dtype} on {self.processes.device.type}\n"
            f"loss: {initial.objective.describe(initial.recursion.num_loops)}\n"
            f"{warmup}"
            "memory and hours: --dry-run estimates them"
        )

    def _print(self, text: str) -> None:
        if self.processes.is_main:
            print(text, flush=True)
