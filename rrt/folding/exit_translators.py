"""Fit of exit translators: affine maps with which the first loops predict what the last one would say.

The head reads norm(h) of the last loop. Early states lie elsewhere: after a conversion the first loop's say nothing
through the same norm and head. An exit after loop b therefore gives the head

    T_b norm(h_b) + c_b

where T_b [D, D] and c_b [D] are the ridge regression of the last loop's norm(h) on that of loop b, over the tokens of
a text. One pass over it gives the solution in closed form, and nothing else of the model changes. Such maps are known
from reading the middle of ordinary models, by regression (arXiv 2303.09435) and trained, as the tuned lens (arXiv
2303.08112); the paper that this package follows (arXiv 2410.20672) does not have them.

Shapes: n rows of T tokens, N tokens, D model width, B loops.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rrt.checkpoint.exit_thresholds import FILE_NAME as THRESHOLDS_FILE
from rrt.checkpoint.format import CheckpointConfig, write_checkpoint
from rrt.checkpoint.source import Source, load_model, open_source
from rrt.common.dtypes import dtype_name
from rrt.common.files import check_output
from rrt.common.processes import pick_device
from rrt.common.provenance import make_provenance
from rrt.data.tokenizer import tokenizer_of
from rrt.errors import UserError
from rrt.folding.calibration_text import CalibrationText, calibration_rows
from rrt.model.meta import parameter_shapes
from rrt.model.transformer import RecursiveTransformer
from rrt.ops import precision

RIDGE = 1e-3
"""This share of the inputs' mean variance is added to each one's. From 1e-6 to 1e-2 all do alike on SmolLM2."""
HELD_OUT = 10
"""One of so many rows is not fitted: the figures are of these."""

_TOKENS_PER_INPUT = 4
_BATCH_TOKENS = 4096
_LOGITS_AT_ONCE = 2**26


class AffineRegression:
    """Ridge regression of y on x with an intercept, from sums over tokens in fp64.

    Sums are of differences from the first token: a variance is the difference of two of them, and of inputs that hardly
    change, far from 0, rounding would leave nothing or less.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = 0
        self._first_x, self._first_y = zeros(width), zeros(width)
        self._x, self._y = zeros(width), zeros(width)
        self._xx, self._xy = zeros(width, width), zeros(width, width)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens: x and y [N, D]."""
        x, y = x.double(), y.double()
        if self.count == 0:
            self._first_x, self._first_y = x[0].clone(), y[0].clone()
        x, y = x - self._first_x, y - self._first_y
        self.count += len(x)
        self._x += x.sum(0)
        self._y += y.sum(0)
        self._xx.addmm_(x.T, x)
        self._xy.addmm_(x.T, y)

    @property
    def is_finite(self) -> bool:
        return all(bool(sums.isfinite().all()) for sums in (self._xx, self._xy))

    def solve(self, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
        """Return T [D, D] and c [D], fp64, of the least ``sum |T x + c - y|^2 + N ridge v |T|^2``.

        v is the mean variance of x, so that the result does not depend on the scale of x or the number of tokens.
        """
        mean_x, mean_y = self._x / self.count, self._y / self.count
        covariance = self._xx / self.count - mean_x.outer(mean_x)
        cross = self._xy / self.count - mean_x.outer(mean_y)
        variance = covariance.diagonal().mean()
        # Inputs that never change have no variance; the floor leaves them a weight of 0.
        covariance.diagonal().add_(max(ridge * float(variance), torch.finfo(torch.float64).tiny ** 0.5))
        weight = torch.cholesky_solve(cross, torch.linalg.cholesky(covariance)).T
        return weight.contiguous(), self._first_y + mean_y - weight @ (self._first_x + mean_x)


@dataclass(frozen=True)
class ExitFigures:
    """What an exit is worth on held-out tokens.

    Attributes:
        agreement: share of tokens where its most probable token is the last loop's.
        loss: mean cross-entropy of the text in nats.
    """

    agreement: float
    loss: float

    @property
    def perplexity(self) -> float:
        """Of the text; infinite where the loss is beyond all bounds."""
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())


@dataclass(frozen=True)
class ExitFitReport:
    """Result of a fit. `before` and `after` are of the exits after each loop before the last, in order."""

    out: Path
    num_tokens: int
    num_held_out: int
    before: list[ExitFigures]
    after: list[ExitFigures]
    last: ExitFigures
    notices: list[str]
    seconds: float


def fit_exits(
    checkpoint: str | Path,
    out: str | Path,
    text: CalibrationText,
    *,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = False,
) -> ExitFitReport:
    """Fit translators to all exits of `checkpoint` and write it with them, and else as it is, to `out`.

    Translators that it has are replaced.

    Args:
        text: such as the model will write; one of `HELD_OUT` rows is held out for the figures.
        dtype: to compute in; default as stored.
        device: "cpu", "cuda", ...; "auto" is CUDA where available.
        progress: show a bar on stderr.

    Raises:
        UserError: the checkpoint is unusable, not looped, has no state between loops or a LoRA on the head; the text
            cannot be used or is too short; `out` exists; or states or translators are not finite.
    """
    start = time.monotonic()
    checkpoint, out = Path(checkpoint), Path(out)
    source = open_source(checkpoint)
    _check_fittable(source, text)
    check_output(out, checkpoint, overwrite)
    tokenizer = tokenizer_of(checkpoint, source.model.vocab_size)
    chosen = pick_device(device)
    rows = calibration_rows(text, tokenizer, source.model.context_length)
    is_held_out = torch.arange(len(rows)) % HELD_OUT == HELD_OUT - 1
    model = load_model(checkpoint, dtype, chosen)
    model.set_merge(True)
    with tqdm(total=rows[:, 1:].numel(), unit="tok", desc="fitting", disable=None if progress else True) as bar:
        regressions = _regress(model, rows[~is_held_out], bar)
        _check_finite(source, model, regressions)
        weight, bias = _solve(source, regressions)
        before, after, last = _measure(model, weight, bias, rows[is_held_out], bar)
    notices = [] if tokenizer else [f"{checkpoint} has no tokenizer; {out} will have none"]
    if (checkpoint / THRESHOLDS_FILE).exists():
        notices.append(f"{THRESHOLDS_FILE} is left out, as it is of the exits before: run eval/exits.py --calibrate")
    counts = {"num_tokens": regressions[0].count, "num_held_out": rows[is_held_out, 1:].numel()}
    provenance = make_provenance(
        "fit-exits",
        checkpoint,
        calibration=asdict(text),
        ridge=RIDGE,
        **counts,
        **{name: [asdict(exit) for exit in exits] for name, exits in (("before", before), ("after", after))},
        last=asdict(last),
    )
    recursion = replace(source.recursion, exit_translators=True, exit_loops=tuple(range(len(weight))))
    translators = {"exit_translator_weight": weight, "exit_translator_bias": bias}
    config = CheckpointConfig(source.model, recursion, source.dtype)
    with write_checkpoint(out, config, provenance, overwrite=overwrite) as writer:
        for name in parameter_shapes(source.model, recursion):
            writer.add(name, translators[name].cpu() if name in translators else source.get(name))
        if tokenizer is not None:
            tokenizer.save(writer.directory)
    seconds = time.monotonic() - start
    return ExitFitReport(out, **counts, before=before, after=after, last=last, notices=notices, seconds=seconds)


def _check_fittable(source: Source, text: CalibrationText) -> None:
    recursion, where = source.recursion, source.directory
    text.check_context(source.model.context_length)
    if recursion.num_loops == 1:
        raise UserError(f"{where}: has 1 loop and no exit before its end; expected a looped checkpoint")
    recursion.require_whole_loops(f"{where}: found a model")
    if recursion.head_lora_rank:
        raise UserError(
            f"{where}: field 'recursive.head_lora_rank': found {recursion.head_lora_rank}; expected 0: that LoRA "
            "on the head was trained for what the exits are now"
        )
    least = max(HELD_OUT * text.context, _TOKENS_PER_INPUT * source.model.hidden_size)
    if text.num_tokens < least:
        raise UserError(
            f"--calibration-tokens: found {text.num_tokens:,}; expected at least {least:,}, for {HELD_OUT} rows of "
            f"{text.context} and a map of {source.model.hidden_size} inputs"
        )


def _batches(rows: Tensor) -> Sequence[Tensor]:
    return rows.split(max(1, _BATCH_TOKENS // (rows.shape[1] - 1)))


@torch.inference_mode()
def _regress(model: RecursiveTransformer, rows: Tensor, bar: "tqdm[NoReturn]") -> list[AffineRegression]:
    """Collect for each loop before the last the regression of what the head reads after the last on its own state."""
    width, device = model.config.hidden_size, model.embed.device
    regressions = [AffineRegression(width, device) for _ in range(model.recursion.num_loops - 1)]
    for batch in _batches(rows):
        *early, last = (model.norm(state).flatten(0, 1) for state in model.hidden_states(batch[:, :-1].to(device)))
        for regression, normed in zip(regressions, early, strict=True):
            regression.add(normed, last)
        bar.update(last.shape[0])
    return regressions


def _check_finite(source: Source, model: RecursiveTransformer, regressions: list[AffineRegression]) -> None:
    for loop, regression in enumerate(regressions):
        if not regression.is_finite:
            raise UserError(
                f"{source.directory}: states after loop {loop} or the last are not finite in "
                f"{dtype_name(model.embed.dtype)}; expected finite numbers: try --dtype float32 or bfloat16"
            )


def _solve(source: Source, regressions: list[AffineRegression]) -> tuple[Tensor, Tensor]:
    """Return all T [B-1, D, D] and c [B-1, D] in the dtype that they are stored in."""
    solved = [regression.solve() for regression in regressions]
    weight, bias = (torch.stack(tensors).to(source.dtype) for tensors in zip(*solved, strict=True))
    for loop, translator in enumerate(zip(weight, bias, strict=True)):
        if not all(bool(tensor.isfinite().all()) for tensor in translator):
            raise UserError(
                f"{source.directory}: the translator of the exit after loop {loop} is not finite in the checkpoint's "
                f"dtype, {dtype_name(source.dtype)}; expected finite numbers: convert with --dtype float32 or bfloat16"
            )
    return weight, bias


@torch.inference_mode()
def _measure(
    model: RecursiveTransformer, weight: Tensor, bias: Tensor, rows: Tensor, bar: "tqdm[NoReturn]"
) -> tuple[list[ExitFigures], list[ExitFigures], ExitFigures]:
    """Measure the exits before the last as they are and with translators [B-1, D, D] and [B-1, D], and the last."""
    device, wide = model.embed.device, torch.promote_types(model.embed.dtype, torch.float32)
    weight, bias = (tensor.to(model.embed) for tensor in (weight, bias))
    at_once = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    agreed = torch.zeros(2 * len(weight) + 1, dtype=torch.int64, device=device)
    loss = torch.zeros(2 * len(weight) + 1, dtype=torch.float64, device=device)
    for batch in _batches(rows):
        inputs, targets = batch[:, :-1].to(device), batch[:, 1:].flatten().to(device)
        states = [state.flatten(0, 1).split(at_once) for state in model.hidden_states(inputs)]
        for *parts, wanted in zip(*states, targets.split(at_once), strict=True):
            best: list[Tensor] = []
            for index, logits in enumerate(_logits_of_exits(model, weight, bias, parts)):
                best.append(logits.argmax(-1))
                agreed[index] += (best[index] == best[0]).sum()
                loss[index] += F.cross_entropy(logits.to(wide), wanted, reduction="sum")
        bar.update(len(targets))
    count = rows[:, 1:].numel()
    figures = zip(agreed.tolist(), loss.tolist(), strict=True)
    of_last, *exits = (ExitFigures(right / count, lost / count) for right, lost in figures)
    return exits[: len(weight)], exits[len(weight) :], of_last


def _logits_of_exits(
    model: RecursiveTransformer, weight: Tensor, bias: Tensor, states: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Yield logits [n, V] of the last exit, of those before it in order as they are, and of these with translators."""
    *early, last = states
    yield model.logits(last)
    for loop, state in enumerate(early):
        yield model.logits(state, loop)
    for state, *translator in zip(early, weight, bias, strict=True):
        yield precision.upcasting_linear(precision.upcasting_linear(model.norm(state), *translator), model.head_weight)
