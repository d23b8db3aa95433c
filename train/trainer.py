"""The trainer: one loop for uptraining and for training from scratch, on any number of processes."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rrt.checkpoint.format import CheckpointConfig, write_checkpoint
from rrt.common.cli import human_count
from rrt.common.dtypes import parse_dtype
from rrt.common.files import atomic_write, read_json, sha256_file
from rrt.common.provenance import fingerprint, make_provenance
from rrt.data.shards import META_FILE
from rrt.data.tokenizer import Tokenizer, check_vocab
from rrt.errors import UserError
from rrt.model.config import ModelConfig, RecursiveConfig
from rrt.model.meta import meta_model
from rrt.model.transformer import RecursiveTransformer
from train.checkpoints import STATE_FILE, CheckpointWriter, check_identity, latest_complete, load_step, whole_steps
from train.compile import compile_layers
from train.data import open_data
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
from train.objective import NEXT_TOKEN, PART_NAMES, Objective
from train.permutation import keyed_uint64s
from train.recipe import DataConfig, GuardConfig, OptimConfig, RunConfig, to_toml
from train.teacher import ShardedTeacher, open_teacher

RECIPE_FILE = "recipe.toml"


class Recipe(Protocol):
    """The tables that every training recipe has."""

    @property
    def data(self) -> DataConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def run(self) -> RunConfig: ...
    @property
    def guard(self) -> GuardConfig: ...


@dataclasses.dataclass(frozen=True)
class InitialModel:
    """The model that training begins with."""

    stage: str
    """What `provenance.json` calls this training."""
    model: ModelConfig
    recursion: RecursiveConfig
    tokenizer: Tokenizer
    open: Callable[[], Callable[[str], Tensor]]
    """Called once, if no earlier part of the run is resumed, for what gives a parameter's initial value by name."""
    parent: Path | None
    """The checkpoint that the parameters come from."""
    objective: Objective = NEXT_TOKEN
    teacher: Path | None = None
    """The model that the objective distills from."""


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then a cosine."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    floor = optim.min_lr_ratio
    return optim.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def accumulation(recipe: Recipe, world_size: int) -> int:
    """Micro-batches per process and optimizer step.

    Raises:
        UserError: `run.batch_tokens` is not a whole number of them.
    """
    tokens = recipe.run.micro_batch * recipe.data.seq_len * world_size
    if recipe.run.batch_tokens % tokens:
        raise UserError(
            f"field 'run.batch_tokens': found {recipe.run.batch_tokens}; expected a multiple of {tokens} = "
            f"run.micro_batch {recipe.run.micro_batch} x data.seq_len {recipe.data.seq_len} x {world_size} processes"
        )
    return recipe.run.batch_tokens // tokens


def make_optimizer(model: torch.nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; norms and biases, which have two dimensions if untied, are not decayed."""
    plain: list[torch.nn.Parameter] = []
    decayed: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if "norm" in name or name.endswith("bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )


def set_up_model(model: RecursiveTransformer, run: RunConfig, mesh: DeviceMesh) -> None:
    """Make `model` compute as `run` says, sharded over `mesh`, in place."""
    model.set_merge({"auto": None, "merged": True, "plain": False}[run.lora])
    model.stack.checkpointing = run.checkpointing
    shard_model(model, mesh, torch.bfloat16 if run.dtype == "bf16" else None, run.wrap)


def describe(model: ModelConfig, recursion: RecursiveConfig) -> str:
    """A model in one line."""
    shape = meta_model(model, recursion)
    count, block = (sum(p.numel() for p in module.parameters()) for module in (shape, shape.stack))
    return (
        f"{model.family}, {model.num_layers} layers as {recursion.num_loops} loop(s) of "
        f"{recursion.layers_per_loop(model)}, LoRA rank {recursion.lora_rank}, {human_count(count)} parameters "
        f"({human_count(block)} in the block)"
    )


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Have every operator give the same bits for the same input, or refuse; CUDA's may be slower for it."""
    # What cuBLAS asks for; read when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Trainer:
    """One training run. Construction checks everything that can be checked; `run` trains.

    Raises:
        UserError: the recipe, the data, the tokenizer and the model do not fit together, or `run.out` holds a
            run that this one cannot continue.
    """

    def __init__(self, recipe: Recipe, start: InitialModel, processes: Processes) -> None:
        self.recipe, self.start, self.processes = recipe, start, processes
        self.out = Path(recipe.run.out)
        self.steps = recipe.run.steps
        self.accumulation = accumulation(recipe, processes.world_size)
        check_vocab(start.tokenizer, start.model.vocab_size, "the model")
        self.samples = open_data(recipe.data, start.tokenizer, recipe.run.seed)
        if recipe.data.seq_len > start.model.max_position_embeddings:
            raise UserError(
                f"field 'data.seq_len': found {recipe.data.seq_len}; expected at most the model's "
                f"max_position_embeddings = {start.model.max_position_embeddings}"
            )
        self.teacher = None
        if start.teacher is not None:
            self.teacher = open_teacher(start.teacher, start.model, start.tokenizer, recipe.data.seq_len)
        if processes.is_main:
            # Before training: parent and tokenizer may be gone when it ends.
            self.tokenizer_files = {file.name: file.read_bytes() for file in start.tokenizer.files}
            self.provenance = make_provenance(start.stage, start.parent, data=recipe.data.path)
            if start.teacher is not None:
                self.provenance["teacher"] = {"path": str(start.teacher), "sha256": fingerprint(start.teacher)}
            self.identity = self._identity()
        self._check_out()
        if recipe.run.wandb is not None:
            import_wandb()
        self.guard = Guard(recipe.guard)
        self.step = 0
        self.parts: dict[str, float] = {}

    def run(self) -> None:
        """Train to the end, resuming from the newest whole checkpoint of `run.out`; write `final/`.

        On SIGTERM or SIGUSR1 it saves the last finished step instead, and returns.
        """
        with contextlib.ExitStack() as self._cleanup:
            self.interrupt = self._cleanup.enter_context(Interrupt())
            if self.recipe.run.deterministic:
                self._cleanup.enter_context(deterministic_algorithms())
            self._run()

    def _run(self) -> None:
        self.resumed = broadcast_from_main(self._prepare_out)
        self._build()
        self._resume()
        self._describe()
        self.checkpoints = CheckpointWriter(self.out, keep=self.recipe.run.keep, background=self.recipe.run.save_async)
        self._cleanup.callback(self.checkpoints.close)
        interrupted = None
        try:
            self._loop()
        except Interrupted as caught:  # the gradients of an unfinished step are dropped
            interrupted = caught
        if self.step_saved != self.step and self.step > 0:
            self._save_step()
        self.checkpoints.wait()
        if interrupted is None:
            self._save_final()
        else:
            saved = f"saved step {self.step} of {self.steps}" if self.step else "no step was finished"
            self._print(f"{interrupted.signal}: {saved}; the same command goes on from there")

    def _build(self) -> None:
        run, device = self.recipe.run, self.processes.device
        self.model = meta_model(self.start.model, self.start.recursion).float().train()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.start.objective.trains(name))
        set_up_model(self.model, run, self.processes.mesh)
        if run.compile:
            raise_everywhere(lambda: compile_layers(self.model.stack, device))
        self.model.to_empty(device=device)
        dtype = torch.bfloat16 if run.dtype == "bf16" else torch.float32
        teacher = self.teacher and ShardedTeacher.load(self.teacher, self.processes, dtype)
        self.losses = self.start.objective.bind(self.model, teacher)
        self.optimizer = make_optimizer(self.model, self.recipe.optim)

    def _loop(self) -> None:
        run = self.recipe.run
        meter, write = self._meter(), self._open_metrics()
        while self.step < self.steps:
            rate = learning_rate(self.recipe.optim, self.step, self.steps)
            loss, grad_norm, fault = self._train_step(rate)
            self.step += 1
            record: dict[str, Any] = {
                "step": self.step,
                "tokens": self.step * run.batch_tokens,
                "loss": loss,
                "lr": rate,
                "grad_norm": grad_norm,
                **self.parts,
            }
            if fault is not None:
                record["fault"] = fault
            if self.step % run.log_every == 0 or self.step == self.steps:
                record |= meter.read(self.step)
                record["memory_bytes"] = memory_bytes(self.processes.device)
                self._print(progress_line(record, self.steps))
            write(record)
            if fault is not None:
                self._stop_or_skip(fault)
            if run.save_every and self.step % run.save_every == 0 and fault is None:
                self._save_step()
                meter.restart(self.step)

    def _train_step(self, rate: float) -> tuple[float, float, str | None]:
        """One optimizer step, left out if the guard finds fault with it.

        Returns:
            The mean loss over all processes (nats per token), the gradient norm and the fault.
        """
        run, processes = self.recipe.run, self.processes
        # A resumed run draws what the first one would have: no state of generators has to be kept.
        torch.manual_seed(keyed_uint64s(run.seed, self.step, processes.rank, count=1)[0])
        losses = torch.zeros(self.accumulation, dtype=torch.float64, device=processes.device)
        parts = losses.new_zeros(len(self.start.objective.weights), len(PART_NAMES))
        for micro in range(self.accumulation):
            if self.interrupt.check(self.checkpoints.failed):
                self.checkpoints.wait()
            set_last_micro_batch(self.model, micro == self.accumulation - 1)
            inputs, targets = self.samples.batch(self._first_sample(micro, processes.rank), run.micro_batch)
            inputs, targets = inputs.to(processes.device), targets.to(processes.device)
            loss, exit_parts = self.losses(inputs, targets)
            loss = loss / self.accumulation
            loss.backward()
            losses[micro] = loss.detach()
            parts += exit_parts / self.accumulation
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optim.grad_clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        sums = torch.cat((losses.sum()[None], parts.flatten()))
        dist.all_reduce(sums)
        mean, *means = (sums / processes.world_size).tolist()
        self.parts = self.start.objective.named_parts(means, self.start.recursion.num_loops)
        grad_norm = norm.item()
        # The same numbers in all processes, so all step or none does.
        fault = self.guard.diagnose(mean, grad_norm)
        if fault is None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        else:
            fault = f"{fault}; {self._worst_samples(losses)}"
        self.optimizer.zero_grad(set_to_none=True)
        return mean, grad_norm, fault

    def _first_sample(self, micro: int, rank: int) -> int:
        """Position in the run's data of the first sample of one micro-batch of the current step."""
        place = (self.step * self.accumulation + micro) * self.processes.world_size + rank
        return place * self.recipe.run.micro_batch

    def _worst_samples(self, losses: Tensor) -> str:
        """The samples of the micro-batch with the highest loss, and where they lie. A collective."""
        gathered = [torch.empty_like(losses) for _ in range(self.processes.world_size)]
        dist.all_gather(gathered, losses)
        everywhere = torch.stack(gathered).nan_to_num(nan=math.inf)
        rank, micro = divmod(int(everywhere.argmax()), self.accumulation)
        first = self._first_sample(micro, rank)
        samples = range(first, first + self.recipe.run.micro_batch)
        places = ", ".join(self.samples.place(sample) for sample in samples)
        found = f"samples {samples[0]} to {samples[-1]}"
        return f"the highest loss is in {found}, which python -m rrt.shards shows: {places}"

    def _stop_or_skip(self, fault: str) -> None:
        message = f"step {self.step}: {fault}"
        if not self.guard.must_stop:
            self._print(f"skipped {message}")
            return
        self.step -= 1
        try:
            if self.step_saved < self.step and self.step > 0:
                self._save_step()
            self.checkpoints.wait()
        except AgreedError as error:
            message += f"; {error}"
        if self.recipe.guard.on_bad_step == "stop":
            remedy = "lower optim.lr, or skip such steps with --guard.on_bad_step skip"
        else:
            skipped = self.recipe.guard.max_skips
            remedy = f"it comes after {skipped} skipped ones: lower optim.lr, or raise guard.max_skips"
        raise AgreedError(
            f"{message}; {remedy}, and run again, which continues from {broadcast_from_main(self._continues_from)}"
        )

    def _continues_from(self) -> str:
        """Where the same command goes on, and where without the newest checkpoint: its weights may be spoilt."""
        older, newest = [0, 0, *whole_steps(self.out)][-2:]
        before = f"step {older}" if older else "the start"
        return f"step {newest}, or without {self.out / f'step-{newest}'} from {before}" if newest else before

    def _meter(self) -> Meter:
        run, device, start = self.recipe.run, self.processes.device, self.start
        flops = run_flops_per_token(
            start.model,
            start.recursion,
            self.recipe.data.seq_len,
            run,
            start.objective,
            self.teacher and (self.teacher.model, self.teacher.recursion),
        )
        peak = run.peak_flops
        if peak is None and device.type == "cuda" and run.dtype == "bf16":
            peak = peak_flops(torch.cuda.get_device_name(device))
        whole_peak = None if peak is None else peak * self.processes.world_size
        return Meter(self.step, self.steps, run.batch_tokens, flops, whole_peak)

    def _open_metrics(self) -> Callable[[dict[str, Any]], None]:
        """What takes a step's record; it does nothing but in the first process."""
        if not self.processes.is_main:
            return lambda record: None
        recipe: Any = self.recipe
        writer = MetricsWriter(self.out, self.step, self.recipe.run.wandb, dataclasses.asdict(recipe))
        self._cleanup.callback(writer.close)
        return writer.write

    def _check_out(self) -> None:
        """Refuse a directory that is not an earlier part of this same run. The first process looks for all."""
        if not self.processes.is_main:
            return
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out}: is a file; expected a directory")
        if not self.out.is_dir() or not any(self.out.iterdir()):
            return
        if not (self.out / RECIPE_FILE).is_file():
            raise UserError(f"{self.out}: not empty and not a training run; name another run.out")
        if self.recipe.run.overwrite:
            self._check_inputs_outside()
            return
        if (self.out / "final").exists():
            raise UserError(f"{self.out}: holds a finished run; name another run.out or add --run.overwrite true")
        newest = latest_complete(self.out, warn=True)
        if newest is None:
            return  # interrupted before its first checkpoint
        check_identity(newest, self.identity)

    def _check_inputs_outside(self) -> None:
        """Refuse to overwrite a directory that this run reads from."""
        out = self.out.resolve()
        data = map(Path, self.recipe.data.paths)
        for source in (self.start.parent, self.start.teacher, *self.start.tokenizer.files, *data):
            if source is not None and source.resolve().is_relative_to(out):
                raise UserError(f"{source}: lies in run.out, which --run.overwrite would delete; name another run.out")

    def _identity(self) -> dict[str, Any]:
        """What must not change between the parts of one run, as JSON."""
        identity = {
            "stage": self.start.stage,
            "model": dataclasses.asdict(self.start.model),
            "recursion": dataclasses.asdict(self.start.recursion),
            "data.seq_len": self.recipe.data.seq_len,
            "data.split": self.recipe.data.split,
            "data.weights": self.recipe.data.weights,
            "data.offset": self.recipe.data.offset,
            "data": [sha256_file(Path(path) / META_FILE) for path in self.recipe.data.paths],
            "parent": self.provenance["parent"] and self.provenance["parent"]["sha256"],
            "objective": dataclasses.asdict(self.start.objective),
            "teacher": self.start.teacher and self.provenance["teacher"]["sha256"],
            "run.batch_tokens": self.recipe.run.batch_tokens,
            "run.tokens": self.recipe.run.tokens,
            "run.seed": self.recipe.run.seed,
        }
        return dict(json.loads(json.dumps(identity)))

    def _prepare_out(self) -> Path | None:
        """Lock and clean `run.out`; returns the checkpoint to resume from, if any. For the first process."""
        self.out.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.out, os.O_RDONLY)
        self._cleanup.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.out}: another training run writes to it; expected none") from None
        for pattern in ("*", ".*") if self.recipe.run.overwrite else (".step-*", ".final.*"):
            for old in self.out.glob(pattern):
                if old.is_dir() and not old.is_symlink():
                    shutil.rmtree(old)
                else:
                    old.unlink()
        recipe: Any = self.recipe
        # Running it again must resume, not delete.
        again = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, overwrite=False))
        atomic_write(self.out / RECIPE_FILE, to_toml(again))
        return latest_complete(self.out, warn=False)

    def _resume(self) -> None:
        self.step_saved = -1
        if self.resumed is None:
            raise_everywhere(lambda: fill_parameters(self.model, self.start.open()))
            return
        self.step = self.step_saved = load_step(self.resumed, self.model, self.optimizer)
        self.guard.load_state_dict(read_json(self.resumed / STATE_FILE)["guard"])
        self._print(f"resuming from {self.resumed}")

    def _save_step(self) -> None:
        state = {"identity": self.identity} if self.processes.is_main else {}
        state["guard"] = self.guard.state_dict()
        # After a bad step the weights may be spoilt: nothing older goes for them.
        delete_old = not self.guard.last_was_bad
        self.checkpoints.save(self.step, self.model, self.optimizer, state, delete_old)
        self.step_saved = self.step

    def _save_final(self) -> None:
        """Gather the parameters into an ordinary checkpoint directory, `final/`.

        Gathered first and written then, when no process waits in a collective that could time out.
        """
        config = CheckpointConfig(self.start.model, self.start.recursion, parse_dtype(self.recipe.run.save_dtype))
        target = self.out / "final"
        gathered = {}
        for name, tensor in full_parameters(self.model):
            if self.processes.is_main:
                gathered[name] = tensor.to("cpu", config.dtype)
        dist.barrier()
        if self.processes.is_main:
            trained = {"tokens": self.step * self.recipe.run.batch_tokens, "steps": self.step}
            with write_checkpoint(target, config, {**self.provenance, **trained}) as writer:
                for name, tensor in gathered.items():
                    writer.add(name, tensor)
                for name, content in self.tokenizer_files.items():
                    (writer.directory / name).write_bytes(content)
            print(f"wrote {target}", flush=True)

    def _describe(self) -> None:
        """Say what is about to happen: sizes, tokens, processes."""
        run, world = self.recipe.run, self.processes.world_size
        samples = self.steps * run.batch_tokens // self.recipe.data.seq_len
        self._print(
            f"{self.start.stage}: {describe(self.start.model, self.start.recursion)}\n"
            f"{self.samples.describe(samples)}"
            f"train: {self.steps} steps of {human_count(run.batch_tokens)} tokens = {human_count(run.tokens)}; "
            f"{world} process(es) x {self.accumulation} micro-batch(es) x {run.micro_batch} x "
            f"{self.recipe.data.seq_len}; {run.dtype} on {self.processes.device.type}\n"
            f"loss: {self.start.objective.describe(self.start.recursion.num_loops)}\n"
            f"{_warmup_note(self.recipe.optim, self.steps)}"
            "memory and hours: --dry-run estimates them"
        )

    def _print(self, text: str) -> None:
        if self.processes.is_main:
            print(text, flush=True)


def _warmup_note(optim: OptimConfig, steps: int) -> str:
    if optim.warmup_steps < steps:
        return ""
    return f"note: the warm-up of {optim.warmup_steps} steps does not end in {steps}; set --optim.warmup_steps\n"
