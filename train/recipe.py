"""Recipes: TOML files read into strict dataclasses, any field overridden by a flag (`--optim.lr 1e-4`).

The dataclasses are the documentation: their field docs and defaults are what `--help` prints.
"""

import argparse
import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from rrt.config import doc, from_mapping
from rrt.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    path: str = doc("token shards written by train/prepare_data.py")
    split: str = doc("which split of the shards", default="train")
    seq_len: int = doc("context length, tokens", default=2048)

    def __post_init__(self) -> None:
        _positive(self, "data", "seq_len")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine decay (the paper's schedule)."""

    lr: float = doc("peak learning rate", default=2e-4)
    warmup_steps: int = doc("optimizer steps of linear warm-up", default=200)
    min_lr_ratio: float = doc("final learning rate as a fraction of the peak", default=0.0)
    beta1: float = doc("decay of the first moment", default=0.9)
    beta2: float = doc("decay of the second moment", default=0.95)
    eps: float = doc("added to the root of the second moment", default=1e-8)
    weight_decay: float = doc("decoupled decay of matrices; norms and biases have none", default=0.1)
    grad_clip: float = doc("largest gradient norm; larger ones are scaled down to it", default=1.0)

    def __post_init__(self) -> None:
        _positive(self, "optim", "lr", "eps", "grad_clip")
        for name in ("warmup_steps", "weight_decay", "min_lr_ratio"):
            if getattr(self, name) < 0:
                raise UserError(f"field 'optim.{name}': found {getattr(self, name)}; expected 0 or more")


@dataclass(frozen=True)
class RunConfig:
    """How much to train, in which pieces, and what to leave behind."""

    out: str = doc("output directory: step-N/ (resumable), metrics.jsonl, tb/, final/ (the checkpoint)")
    tokens: int = doc("training length, tokens; a multiple of batch_tokens, rounded down")
    batch_tokens: int = doc("tokens per optimizer step over all processes", default=2**21)
    micro_batch: int = doc("sequences per process in one forward", default=8)
    dtype: Literal["bf16", "fp32"] = doc("compute dtype; parameters, optimizer and reductions are fp32", default="bf16")
    lora: Literal["merged", "plain"] = doc(
        "compute LoRA merged into the weights, cheaper from about 2000 tokens a forward, or apart", default="merged"
    )
    device: Literal["auto", "cpu", "cuda"] = doc("'auto' takes CUDA where it is", default="auto")
    seed: int = doc("of the data order, and of the weights when training from scratch", default=0)
    save_every: int = doc("optimizer steps between resumable checkpoints; 0 saves only at the end", default=500)
    keep: int = doc("how many resumable checkpoints to keep", default=2)
    log_every: int = doc("optimizer steps between progress lines; metrics.jsonl has every step", default=10)
    save_dtype: Literal["float32", "bfloat16", "float16"] = doc("dtype of final/", default="float32")
    overwrite: bool = doc("delete an earlier run in `out` instead of resuming it", default=False)

    def __post_init__(self) -> None:
        _positive(self, "run", "tokens", "batch_tokens", "micro_batch", "keep", "log_every")
        if self.save_every < 0:
            raise UserError(f"field 'run.save_every': found {self.save_every}; expected 0 or more")
        if self.tokens < self.batch_tokens:
            raise UserError(
                f"field 'run.tokens': found {self.tokens}; expected at least run.batch_tokens = {self.batch_tokens}"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // self.batch_tokens


def _positive(config: object, section: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise UserError(f"field '{section}.{name}': found {getattr(config, name)}; expected a positive number")


def _sections(cls: type) -> dict[str, type]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _parse_flag(text: str, kind: Any) -> Any:
    """A flag's text as a TOML value of type `kind`; strings need no quotes."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if str in options or any(typing.get_origin(option) is Literal for option in options):
        return text
    if float in options or int in options:
        try:
            return tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            return text
    return {"true": True, "false": False}.get(text, text)


def _help(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata["doc"]).replace("%", "%%")
    if field.default is dataclasses.MISSING:
        return f"{text} (required)"
    return text if field.default is None else f"{text} (default {field.default})"


def read_recipe(cls: type[T], description: str, argv: list[str] | None = None) -> T:
    """Parse the command line: `--recipe R.toml` and flags `--section.field value` that override it.

    Args:
        cls: a dataclass whose fields are dataclasses, one per TOML table.

    Raises:
        UserError: the recipe is not readable, or a field is unknown, missing, mistyped or out of range.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", type=Path, help="TOML file with the tables below; flags override it")
    for section, kind in _sections(cls).items():
        group = parser.add_argument_group(f"[{section}] {(kind.__doc__ or '').splitlines()[0]}")
        for field in dataclasses.fields(kind):
            group.add_argument(f"--{section}.{field.name}", metavar=field.name.upper(), help=_help(field))
    arguments = vars(parser.parse_args(argv))
    path = arguments.pop("recipe")
    values: dict[str, Any] = {section: {} for section in _sections(cls)}
    if path is not None:
        try:
            parsed = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; expected a recipe (TOML)") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid TOML ({error})") from None
        for section, table in parsed.items():
            if not isinstance(table, dict):
                raise UserError(f"{path}: field '{section}': found {table!r}; expected a table [{section}]")
            values.setdefault(section, {}).update(table)
    for name, text in arguments.items():
        if text is not None:
            section, key = name.split(".")
            kind = typing.get_type_hints(_sections(cls)[section])[key]
            values[section][key] = _parse_flag(text, kind)
    return from_mapping(cls, values, str(path or "command line"))


def to_toml(recipe: Any) -> str:
    """The recipe with every default filled in, as TOML that `read_recipe` accepts."""
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
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)
