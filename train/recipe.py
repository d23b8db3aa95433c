"""Recipes: TOML read into strict dataclasses, any field overridden by a flag (`--optim.lr 1e-4`).

The dataclasses are the documentation: `--help` prints their field docs and defaults.
"""

import argparse
import dataclasses
import math
import tomllib
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from rrt.common.cli import CommandParser
from rrt.common.schema import field_doc, from_mapping
from rrt.errors import UserError
from rrt.model.transformer import Checkpointing
from train.losses import Divergence
from train.recipe_table import SCRIPTS, read_settings

T = TypeVar("T")

ABSENT = "-"
"""The value of a required path that a dry run does without."""


@dataclass(frozen=True)
class DataConfig:
    """Data to train on."""

    path: str | tuple[str, ...] = field_doc("token shards written by train/prepare_data.py; a list of several is mixed")
    weights: tuple[float, ...] | None = field_doc(
        "with several paths, the proportion of each in the samples; default: of their sizes", default=None
    )
    split: str = field_doc("which split of the shards", default="train")
    seq_len: int = field_doc("context length, tokens", default=2048)
    offset: int = field_doc(
        "tokens of the shuffled order to skip: after an earlier run of so many tokens, with the same data, seq_len and "
        "seed, all data are new until the epoch ends",
        default=0,
    )

    def __post_init__(self) -> None:
        _positive(self, "data", "seq_len")
        _check(self, "data", "0 or more", lambda value: value >= 0, "offset")
        _check(self, "data", "at least one path", lambda value: len(value) > 0, "path")
        if self.weights is not None:
            fits = len(self.weights) == len(self.paths) and all(0 < weight < math.inf for weight in self.weights)
            _check(self, "data", f"a positive number for each of {len(self.paths)} path(s)", lambda _: fits, "weights")

    @property
    def paths(self) -> tuple[str, ...]:
        """All of `path`."""
        return (self.path,) if isinstance(self.path, str) else self.path


@dataclass(frozen=True)
class StartConfig:
    """Origin of checkpoint and teacher: runs/paper.py makes them, and --dry-run takes their shapes from here."""

    base: str | None = field_doc(
        "preset of the pretrained model; training refuses a checkpoint that `convert` would not make", default=None
    )
    convert: str = field_doc(
        "flags of rrt.convert that make the checkpoint from it; none for the base itself", default=""
    )
    after: str | None = field_doc("row beside this one whose result is trained further", default=None)
    teacher: str | None = field_doc("row beside this one whose result is the teacher", default=None)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine decay (the paper's schedule)."""

    lr: float = field_doc("peak learning rate", default=2e-4)
    warmup_steps: int = field_doc("optimizer steps of linear warm-up", default=200)
    min_lr_ratio: float = field_doc("final learning rate as a fraction of the peak", default=0.0)
    beta1: float = field_doc("decay of the first moment", default=0.9)
    beta2: float = field_doc("decay of the second moment", default=0.95)
    eps: float = field_doc("added to the root of the second moment", default=1e-8)
    weight_decay: float = field_doc(
        "decoupled decay of matrices; norms, biases and exit translators have none", default=0.1
    )
    grad_clip: float = field_doc("largest gradient norm; larger ones are scaled down to it; inf for none", default=1.0)

    def __post_init__(self) -> None:
        _positive(self, "optim", "grad_clip")
        _check(self, "optim", "a positive number", lambda value: 0 < value < math.inf, "lr", "eps")
        _check(self, "optim", "0 or more", lambda value: 0 <= value < math.inf, "warmup_steps", "weight_decay")
        _check(self, "optim", "a number from 0 to 1", lambda value: 0 <= value <= 1, "min_lr_ratio")
        _check(self, "optim", "a number from 0 to below 1", lambda value: 0 <= value < 1, "beta1", "beta2")


@dataclass(frozen=True)
class GuardConfig:
    """Bad steps, whose loss or gradient norm is not finite or spikes: stop the run or skip them."""

    on_bad_step: Literal["stop", "skip"] = field_doc(
        "'stop' the run, saved before the weights change, or 'skip' the step: weights and optimizer stay as they were, "
        "its data counts as seen",
        default="stop",
    )
    loss_spike: float = field_doc(
        "a loss above this multiple of the recent median is a spike; inf for none", default=2.0
    )
    grad_spike: float = field_doc("the same of the gradient norm before clipping", default=math.inf)
    window: int = field_doc("good steps in the median; before half of them there are no spikes", default=64)
    max_skips: int = field_doc("bad steps in a row that may be skipped; one more stops the run", default=10)

    def __post_init__(self) -> None:
        _check(self, "guard", "a number above 1", lambda value: value > 1, "loss_spike", "grad_spike")
        _positive(self, "guard", "window", "max_skips")


@dataclass(frozen=True)
class RunConfig:
    """Length, batches, devices and output of the run."""

    out: str = field_doc("output directory: step-N/ (resumable), metrics.jsonl, tb/, final/ (the checkpoint)")
    tokens: int = field_doc("training length, tokens; a multiple of batch_tokens, rounded down")
    batch_tokens: int = field_doc("tokens per optimizer step over all processes", default=2**21)
    micro_batch: int = field_doc("sequences per process in one forward", default=8)
    dtype: Literal["bf16", "fp32"] = field_doc(
        "compute dtype; parameters, optimizer and reductions are fp32", default="bf16"
    )
    lora: Literal["auto", "merged", "plain"] = field_doc(
        "compute each LoRA merged into its weight, or as products of its own; auto: merged where that takes fewer "
        "FLOPs, from 4/3 of in*out/(in+out) tokens per forward",
        default="auto",
    )
    checkpointing: Checkpointing = field_doc(
        "recompute activations in the backward, keeping only the input of each layer, or of each loop",
        default="none",
    )
    compile: bool = field_doc(
        "torch.compile the layers: slower to start; needs a C++ compiler, on CUDA Triton",
        default=False,
    )
    wrap: Literal["stack", "layer"] = field_doc(
        "unit of FSDP: the looped stack for the fewest collectives; its layers, for large blocks, overlap "
        "communication and need smaller buffers (a single process in fp32 has no FSDP)",
        default="stack",
    )
    shard_size: int = field_doc("processes that share one copy of the parameters (HSDP); 0 for all of them", default=0)
    device: Literal["auto", "cpu", "cuda"] = field_doc("'auto' takes CUDA where it is available", default="auto")
    seed: int = field_doc("seed of the data order, and of the weights when training from scratch", default=0)
    deterministic: bool = field_doc(
        "the same bits from every run on GPUs too, but slower; on CPUs they are always the same", default=False
    )
    save_every: int = field_doc("optimizer steps between resumable checkpoints; 0 saves only at the end", default=500)
    keep: int = field_doc("how many resumable checkpoints to keep", default=2)
    save_async: bool = field_doc(
        "write checkpoints while training goes on, from a copy in host memory: 12 bytes per parameter, divided by the "
        "processes that share the model",
        default=True,
    )
    log_every: int = field_doc("optimizer steps between progress lines; metrics.jsonl has every step", default=10)
    wandb: str | None = field_doc("also log to this W&B project; needs the wandb package", default=None)
    peak_flops: float | None = field_doc(
        "FLOP/s of one device for MFU; default by the GPU's name, in bf16", default=None
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] = field_doc("dtype of final/", default="float32")
    overwrite: bool = field_doc("delete an earlier run in `out` instead of resuming it", default=False)

    def __post_init__(self) -> None:
        _positive(self, "run", "tokens", "batch_tokens", "micro_batch", "keep", "log_every")
        if self.peak_flops is not None:
            _positive(self, "run", "peak_flops")
        _check(self, "run", "0 or more", lambda value: value >= 0, "seed", "save_every", "shard_size")
        if self.tokens < self.batch_tokens:
            raise UserError(
                f"field 'run.tokens': found {self.tokens}; expected at least run.batch_tokens = {self.batch_tokens}"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // self.batch_tokens


@dataclass(frozen=True)
class DryRun:
    """The settings of an estimate, made in place of a run."""

    processes: int
    mfu: float
    gpu: str

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise UserError(f"command line: --dry-run: found {self.processes}; expected a positive number of processes")
        if not 0 < self.mfu <= 1:
            raise UserError(f"command line: --mfu: found {self.mfu}; expected a number above 0, at most 1")


@dataclass(frozen=True)
class DistillConfig:
    """Distillation: (1 - weight) cross-entropy + weight x temperature^2 x divergence."""

    teacher: str | None = field_doc(
        "HF directory, .gguf file or checkpoint with the model's tokenizer; none: no teacher", default=None
    )
    loss: Divergence = field_doc("divergence of the student's distribution from the teacher's", default="forward_kl")
    temperature: float = field_doc("divides both models' logits in the divergence", default=1.0)
    weight: float = field_doc("share of the divergence in the loss, from 0 to 1", default=0.5)

    def __post_init__(self) -> None:
        _check(self, "distill", "a positive number", lambda value: 0 < value < math.inf, "temperature")
        _check(self, "distill", "a number from 0 to 1", lambda value: 0 <= value <= 1, "weight")
        if self.teacher is not None and self.weight == 0:
            raise UserError(
                f"field 'distill.weight': found 0 with distill.teacher = {self.teacher!r}, from which nothing would be "
                "learned; expected a positive share, or no teacher"
            )

    @property
    def teacher_path(self) -> Path | None:
        """`teacher` as a path, if there is one."""
        return None if self.teacher is None else Path(self.teacher)


@dataclass(frozen=True)
class ExitsConfig:
    """Losses of the exits after the loops before the last (arXiv 2410.20672, section 2.4)."""

    weighting: Literal["weighted", "aggressive"] = field_doc(
        "weighted: exit i of B counts i / (1 + ... + B); aggressive: the last counts 1, the others coefficient",
        default="aggressive",
    )
    coefficient: float = field_doc("weight of each exit before the last, under aggressive", default=0.1)
    distill: Literal["none", "last", "teacher"] = field_doc(
        "distill the exits before the last from the last, which gets no gradient from it, or from the teacher",
        default="none",
    )
    head_lora_rank: int = field_doc("rank of a LoRA on the head for each exit before the last; 0: none", default=0)
    freeze: bool = field_doc(
        "train only what exits have of their own: the LoRA on the head, translators", default=False
    )

    def __post_init__(self) -> None:
        _check(self, "exits", "a positive number", lambda value: 0 < value < math.inf, "coefficient")
        _check(self, "exits", "0 or more", lambda value: value >= 0, "head_lora_rank")


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


def accumulation(recipe: Recipe, world_size: int) -> int:
    """Return the number of micro-batches per process and optimizer step.

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


def _check(config: object, table: str, expected: str, accept: Callable[[Any], bool], *names: str) -> None:
    for name in names:
        if not accept(getattr(config, name)):
            raise UserError(f"field '{table}.{name}': found {getattr(config, name)}; expected {expected}")


def _positive(config: object, table: str, *names: str) -> None:
    _check(config, table, "a positive number", lambda value: value > 0, *names)


def _tables(cls: type) -> dict[str, type]:
    """Return the dataclass of each table of a recipe, by the table's name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING


def _choices(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _parse_flag(text: str, kind: Any) -> Any:
    """Read a flag's text as a TOML value of type `kind`; strings need no quotes."""
    is_list = text.startswith("[") and any(typing.get_origin(option) is tuple for option in typing.get_args(kind))
    if not is_list and (str in (kind, *typing.get_args(kind)) or _choices(kind)):
        return text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text  # refused later, with the field's name and type
    return parsed["value"] if len(parsed) == 1 else text


def _help(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata["doc"]).replace("%", "%%")
    if _is_required(field):
        return f"{text} (required)"
    if field.default is None:
        return text
    return f"{text} (default {str(field.default).lower() if isinstance(field.default, bool) else field.default})"


def _make_parser(cls: type, description: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--recipe",
        metavar="FILE[#ROW]",
        help="TOML file with the tables below, or a row of a file like train/recipes/gemma.toml; flags override it",
    )
    dry = parser.add_argument_group("estimate instead of training; needs no weights and no data")
    dry.add_argument(
        "--dry-run",
        type=int,
        nargs="?",
        const=8,
        metavar="PROCESSES",
        help="print sizes, memory per process and hours for so many processes (default 8)",
    )
    dry.add_argument("--mfu", type=float, default=0.4, metavar="SHARE", help="of the peak FLOP/s, for the hours (0.4)")
    dry.add_argument("--gpu", default="H100", metavar="NAME", help="whose peak, unless run.peak_flops (H100)")
    for table, kind in _tables(cls).items():
        group = parser.add_argument_group(f"[{table}] {(kind.__doc__ or '').splitlines()[0].rstrip('.')}")
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            choices = _choices(hints[field.name])
            metavar = "{" + ",".join(choices) + "}" if choices else field.name.upper()
            group.add_argument(f"--{table}.{field.name}", metavar=metavar, help=_help(field))
    return parser


def read_recipe(cls: type[T], description: str, argv: list[str] | None = None) -> T:
    """Parse the command line into a recipe, as `read_command` does."""
    return read_command(cls, description, argv)[0]


def read_command(cls: type[T], description: str, argv: list[str] | None = None) -> tuple[T, DryRun | None]:
    """Parse the command line: `--recipe R.toml` and flags `--table.field value` that override it.

    Args:
        cls: a dataclass whose fields are dataclasses, one per TOML table.
        description: printed by `--help` before the flags.
        argv: arguments to parse in place of the command line's.

    Returns:
        The recipe, and the settings of `--dry-run` where it is given: then required paths may be missing, and are
        `ABSENT`.

    Raises:
        UserError: the recipe is not readable, or a field is unknown, missing, mistyped or out of range.
    """
    arguments = vars(_make_parser(cls, description).parse_args(argv))
    file: str | None = arguments.pop("recipe")
    processes, mfu, gpu = (arguments.pop(name) for name in ("dry_run", "mfu", "gpu"))
    dry_run = None if processes is None else DryRun(processes, mfu, gpu)
    flags = {name: text for name, text in arguments.items() if text is not None}
    tables = _tables(cls)
    settings = read_settings(file) if file else {}
    for table, script in SCRIPTS.items():
        if table in settings and table not in tables:
            raise UserError(f"{file}: has a table [{table}]; expected --recipe {file} to be given to {script}")
    values: dict[str, dict[str, Any]] = {table: {} for table in tables} | settings
    for name, text in flags.items():
        table, key = name.split(".")
        values[table][key] = _parse_flag(text, typing.get_type_hints(tables[table])[key])
    where = "command line" if file is None else f"{file} with flags" if flags else file
    missing = []
    for table, kind in tables.items():
        for field in dataclasses.fields(kind):
            if not _is_required(field) or field.name in values[table]:
                continue
            hint = typing.get_type_hints(kind)[field.name]
            if dry_run is not None and str in (hint, *typing.get_args(hint)):
                values[table][field.name] = ABSENT
            else:
                missing.append(f"'{table}.{field.name}'")
    if missing:
        flag = missing[0].strip("'")
        raise UserError(f"{where}: missing {', '.join(missing)}; give them in a --recipe or as --{flag} ...")
    return from_mapping(cls, values, where), dry_run


def to_toml(recipe: Any) -> str:
    """Write the recipe, with every default filled in, as TOML that `read_recipe` accepts."""
    lines = []
    for section, table in dataclasses.asdict(recipe).items():
        lines.append(f"[{section}]")
        for key, value in table.items():
            if value is not None:
                lines.append(f"{key} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(map(_toml_character, value)) + '"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    return repr(value)


def _toml_character(character: str) -> str:
    if character in '\\"':
        return "\\" + character
    if ord(character) < 0x20 or ord(character) == 0x7F:
        return f"\\u{ord(character):04x}"
    return character
