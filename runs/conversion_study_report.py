"""Report of a conversion study: tables and plots from its results alone; what is missing is shown as missing."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.harness_tasks import PAPER_METRICS
from eval.svg import Series, plot_file
from eval.tables import Table, expect_whole_result
from rrt.common.cli import human_count
from rrt.common.files import atomic_write, read_json
from rrt.common.results import write_result
from runs.conversion_arms import (
    BASE,
    DECISIVE,
    MEASURES,
    TASKS,
    TITLES,
    Arm,
    Training,
    all_arms,
    draw_name,
    draws,
    result_path,
    trainings,
)
from runs.study_results import pack_results
from runs.study_steps import format_duration

MISSING = "missing"
PLOT_NAME = "conversion-study-{}.svg"
LINE_WIDTH = 120
LOSS_STEPS = 4
"""Optimizer steps whose mean is a point of a training loss."""


@dataclass(frozen=True)
class StudyResults:
    """The results of a study, and what it is to have.

    Attributes:
        settings: content of study.json.
    """

    out: Path
    settings: dict[str, Any]
    arms: tuple[Arm, ...]
    tokens: tuple[int, ...]
    num_seeds: int

    @classmethod
    def open(cls, out: Path) -> "StudyResults":
        """Read what the study in `out` is to have.

        Raises:
            UserError: there is no study.
        """
        path = out / "study.json"
        settings = read_json(path)
        with expect_whole_result(path, "conversion study"):
            plan = settings["plan"]
            arms = tuple(arm for arm in all_arms(settings["num_layers"]) if arm.name in plan["arms"])
            return cls(out, settings, arms, tuple(plan["tokens"]), plan["num_seeds"])

    def get(self, model: str, name: str) -> dict[str, Any] | None:
        """Return a result, None if it is missing."""
        path = result_path(self.out, model, name)
        return read_json(path) if path.exists() else None

    def loss(self, model: str, measure: str) -> float | None:
        """Return the loss of a model, nats per token."""
        result = self.get(model, measure)
        return None if result is None else float(result["loss"])

    def trainings(self, arm: Arm, tokens: int, is_distilled: bool) -> list[Training]:
        """List the trainings of an arm that differ in their seeds."""
        found = trainings([arm], [tokens], self.num_seeds)
        return [training for training in found if training.is_distilled == is_distilled]

    def start_losses(self, arm: Arm, measure: str) -> list[float | None]:
        """List the losses right after conversion, one for each draw of a calibration text."""
        return [self.loss(draw_name(arm, draw), measure) for draw in draws(arm, self.num_seeds)]

    def end_losses(self, arm: Arm, tokens: int, is_distilled: bool, measure: str) -> list[float | None]:
        """List the losses after training, one for each seed."""
        return [self.loss(training.name, measure) for training in self.trainings(arm, tokens, is_distilled)]

    def curve(self, arm: Arm, is_distilled: bool, measure: str) -> list[tuple[int, float]]:
        """Return tokens and mean loss over the seeds, from the conversion on, where there are results."""
        losses = {0: self.start_losses(arm, measure)}
        losses |= {tokens: self.end_losses(arm, tokens, is_distilled, measure) for tokens in self.tokens}
        means = ((tokens, _mean(found)) for tokens, found in losses.items())
        return [(tokens, mean) for tokens, mean in means if mean is not None]


def tokens_to_reach(curve: Sequence[tuple[int, float]], target: float) -> tuple[str, int] | None:
    """Find after how many tokens a curve of losses first is at `target` or below.

    Between two trainings the loss is taken as linear in the logarithm of the tokens. Before the first of them, nothing
    is known but the conversion: the answer is then a bound.

    Returns:
        "about" and the tokens, "less than" and the shortest training's, or "more than" and the longest one's; None
        without any.
    """
    trained = [(tokens, loss) for tokens, loss in curve if tokens > 0]
    if not trained:
        return None
    for i, (tokens, loss) in enumerate(trained):
        if loss <= target:
            if i == 0:
                return "less than", tokens
            before, loss_before = trained[i - 1]
            share = (loss_before - target) / (loss_before - loss)
            return "about", round(before * (tokens / before) ** share)
    return "more than", trained[-1][0]


def write_report(out: Path) -> Path:
    """Write report.md, report.json, the plots and results.json.gz into `out`; returns the first.

    Raises:
        UserError: there is no study, or a result is damaged.
    """
    results = StudyResults.open(out)
    with expect_whole_result(out, "conversion study"):
        tables = [*conversion_tables(results), *training_tables(results), *comparison_tables(results)]
        plots = {
            "conversion": ("Perplexity right after conversion", plot_conversion(results)),
            "uptraining": ("Held-out loss over tokens of uptraining", plot_uptraining(results)),
            "training-loss": ("Training loss of the longest runs", plot_training_loss(results)),
        }
        header = describe(results)
    parts = [header, *(table.markdown() for table in tables)]
    for name, (title, picture) in plots.items():
        path = out / PLOT_NAME.format(name)
        path.unlink(missing_ok=True)
        if picture:
            atomic_write(path, picture)
            parts.append(f"![{title}]({path.name})")
        else:
            parts.append(f"{title}: {MISSING}")
    atomic_write(out / "report.md", "\n\n".join(parts) + "\n")
    named = [{"title": table.title, "header": list(table.header), "rows": list(table.rows)} for table in tables]
    write_result(out / "report.json", {"kind": "conversion-study", "settings": results.settings, "tables": named})
    pack_results(out, out / "results.json.gz")
    return out / "report.md"


def describe(results: StudyResults) -> str:
    """Describe base, data, settings and machine as a list."""
    study = results.settings
    settings = study["settings"]
    measured = [
        f"{TITLES[measure]}: {result['tokens']:,} tokens"
        for measure in MEASURES
        if (result := results.get(BASE.name, measure)) is not None
    ]
    every = {path: read_json(path) for path in sorted(results.out.glob("results/*/*.json"))}
    lines = [
        f"Base: {study['base']}, {study['num_layers']} layers. Training and measurements in {_dtypes(every)}.",
        f"Text: {study['train_documents']} documents to train and calibrate on (calibration: "
        f"{settings['calibration_tokens']:,} tokens), the {study['heldout_documents']} after them held out. Code: "
        "Python's library, of whose held-out packages excerpts are measured.",
        f"Measured: {'; '.join(measured) or MISSING}.",
        f"Trainings: text and code by equal parts, {study['batch_tokens']:,} tokens a step, context "
        f"{study['train_context']}, learning rate {study['learning_rate']:g} falling to zero by a cosine, one "
        "for each length. Distilled: half of the loss is cross-entropy, half forward KL from the base.",
    ]
    if every:
        device, cores, torch, code = (
            ", ".join(sorted({str(result[key]) for result in every.values()}))
            for key in ("device", "cores", "torch", "code_version")
        )
        days = sorted(result["created"][:10] for result in every.values())
        when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
        lines.append(f"Machine: {device}, {cores} cores, torch {torch}; code {code}; {when}.")
    wrapper = textwrap.TextWrapper(
        LINE_WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(map(wrapper.fill, lines))


def _dtypes(results: Mapping[Path, Mapping[str, Any]]) -> str:
    """Return the dtype, or of several ones all, with the models that are not in the one of most."""
    models: dict[str, set[str]] = {}
    for path, result in results.items():
        if "dtype" in result:
            models.setdefault(result["dtype"], set()).add(path.parent.name)
    if not models:
        return MISSING
    first, *others = sorted(models, key=lambda dtype: -len(models[dtype]))
    return "".join([first, *(f"; in {dtype}: {', '.join(sorted(models[dtype]))}" for dtype in others)])


# Right after conversion


def conversion_tables(results: StudyResults) -> list[Table]:
    """Make the table of all arms right after conversion."""
    has_fewshot = results.settings["plan"]["has_fewshot"]
    rows = []
    for arm in results.arms:
        model = results.get(arm.name, "model")
        if model is None:
            sizes = [MISSING] * 3
        else:
            seconds = model["conversion_seconds"]
            time = "" if arm is BASE else "unknown" if seconds is None else format_duration(seconds)
            sizes = [human_count(model["total_params"]), human_count(model["lora_params"]), time]
        losses = [_perplexity(results.loss(arm.name, measure)) for measure in MEASURES]
        rows.append([arm.title, *sizes, *losses, *(_accuracies(results, arm.name) if has_fewshot else [])])
    header = ["model", "parameters", "of these LoRA", "conversion", *(_short(measure) for measure in MEASURES)]
    notes = [_draws_note(results, arm) for arm in results.arms if len(draws(arm, results.num_seeds)) > 1]
    if has_fewshot:
        header += [*TASKS, "mean"]
        notes.append(_accuracy_note(results))
    return [Table("Right after conversion: perplexity, and accuracy in %", header, rows, notes=notes)]


def _draws_note(results: StudyResults, arm: Arm) -> str:
    found = [
        f"{_short(measure)} {', '.join(map(_perplexity, results.start_losses(arm, measure)))}" for measure in MEASURES
    ]
    return f"{arm.title}, on {len(draws(arm, results.num_seeds))} draws of the calibration text: {'; '.join(found)}."


def _accuracies(results: StudyResults, model: str) -> list[str]:
    """Return the cells of the tasks' accuracies and their mean, in percent."""
    result = results.get(model, "fewshot")
    if result is None:
        return [MISSING] * (len(TASKS) + 1)
    values = [100 * result["tasks"][task]["metrics"][PAPER_METRICS[task]] for task in TASKS]
    return [f"{value:.1f}" for value in (*values, sum(values) / len(values))]


def _accuracy_note(results: StudyResults) -> str:
    documents = results.settings["settings"]["fewshot_documents"]
    chance = ", ".join(f"{task} {percent}" for task, percent in TASKS.items())
    # The largest error that a share of so many documents can have.
    error = 50 / math.sqrt(documents)
    return f"Accuracies are of {documents} documents a task, standard errors of up to {error:.1f}; by chance: {chance}."


# After training


def training_tables(results: StudyResults) -> list[Table]:
    """Make a table of perplexities after training for each measure, and one of accuracies."""
    trained = [(arm, is_distilled) for arm in _trained(results) for is_distilled in (False, True)]
    if not trained or not results.tokens:
        return []
    tables = []
    for measure in MEASURES:
        rows = []
        for arm, is_distilled in trained:
            ends = [_spread(results.end_losses(arm, tokens, is_distilled, measure)) for tokens in results.tokens]
            rows.append([arm.title, _yes(is_distilled), _spread(results.start_losses(arm, measure)), *ends])
        header = ["model", "distilled", "before", *map(_tokens, results.tokens)]
        note = f"The base has {_perplexity(results.loss(BASE.name, measure))}."
        if any(len(results.trainings(arm, results.tokens[0], False)) > 1 for arm, _ in trained):
            note += (
                " In parentheses the least and the greatest of several seeds or, before training, calibration texts."
            )
        tables.append(Table(f"After training: perplexity of {TITLES[measure]}", header, rows, (0, 1), notes=[note]))
    if results.settings["plan"]["has_fewshot"]:
        rows = []
        for arm, is_distilled in trained:
            first = results.trainings(arm, results.tokens[-1], is_distilled)[0]
            rows.append([arm.title, _yes(is_distilled), *_accuracies(results, first.name)])
        rows.append([BASE.title, "", *_accuracies(results, BASE.name)])
        title = f"After training on {_tokens(results.tokens[-1])} tokens: accuracy in %"
        tables.append(
            Table(title, ["model", "distilled", *TASKS, "mean"], rows, (0, 1), notes=[_accuracy_note(results)])
        )
    return tables


def comparison_tables(results: StudyResults) -> list[Table]:
    """Make the table that sets the decisive pair against each other over tokens."""
    pair = _pair(results)
    if pair is None or not results.tokens:
        return []
    paper, calibrated = pair
    rows = []
    for measure in MEASURES:
        for is_distilled in (False, True):
            ours = dict(results.curve(calibrated, is_distilled, measure))
            curve = results.curve(paper, is_distilled, measure)
            theirs = dict(curve)
            gaps = [
                f"{ours[tokens] - theirs[tokens]:+.3f}" if tokens in ours and tokens in theirs else MISSING
                for tokens in (0, *results.tokens)
            ]
            reached = tokens_to_reach(curve, ours[0]) if 0 in ours else None
            needs = MISSING if reached is None else f"{reached[0]} {_tokens(reached[1])}"
            rows.append([TITLES[measure], _yes(is_distilled), _perplexity(ours.get(0)), needs, *gaps])
    header = [
        "measured on",
        "distilled",
        "calibrated starts at",
        "average + SVD is there after",
        "gap before",
        *(f"after {_tokens(tokens)}" for tokens in results.tokens),
    ]
    note = (
        f"Gaps are the loss of {calibrated.title} less that of {paper.title}, nats per token, means over seeds: at "
        "zero the paper's way has caught up. Between two lengths losses are taken as linear in the logarithm of tokens."
    )
    title = "Tokens that average + SVD needs to reach calibrated's starting point"
    return [Table(title, header, rows, (0, 1, 3), notes=[note])]


# Plots


def plot_conversion(results: StudyResults) -> str:
    """Plot perplexity right after conversion over parameters, a line for each method over its ranks."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for arm in results.arms:
        if arm.loops > 2:
            continue
        model, loss = results.get(arm.name, "model"), results.loss(arm.name, "natural-512")
        if model is not None and loss is not None and math.isfinite(loss):
            name = arm.title.rpartition(", rank")[0] if arm.method else arm.title
            groups.setdefault(name, []).append((model["total_params"], math.exp(loss)))
    series = [Series(name, sorted(points), is_line=len(points) > 1) for name, points in groups.items()]
    title = f"Right after conversion: {TITLES['natural-512']}"
    return plot_file(title, series, "parameters", "perplexity", log_y=True)


def plot_uptraining(results: StudyResults) -> str:
    """Plot the held-out loss of the decisive pair over tokens, beside the base's."""
    pair = _pair(results)
    if pair is None:
        return ""
    series = []
    for arm in pair:
        for is_distilled in (False, True):
            curve = results.curve(arm, is_distilled, "natural-512")
            if len(curve) > 1:
                series.append(Series(f"{arm.title}{', distilled' if is_distilled else ''}", curve))
    base = results.loss(BASE.name, "natural-512")
    if series and base is not None:
        series.append(Series("base", [(0, base), (max(results.tokens), base)], has_marks=False))
    title = f"Loss over tokens of uptraining: {TITLES['natural-512']}"
    return plot_file(title, series, "tokens", "nats per token")


def plot_training_loss(results: StudyResults) -> str:
    """Plot the loss of each arm's longest training without a teacher, first seed, over its tokens."""
    series = []
    for arm in _trained(results) if results.tokens else ():
        result = results.get(results.trainings(arm, results.tokens[-1], False)[0].name, "training")
        if result is not None:
            pairs = list(zip(result["tokens"], result["loss"], strict=True))
            groups = [pairs[i : i + LOSS_STEPS] for i in range(0, len(pairs), LOSS_STEPS)]
            points = [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]
            series.append(Series(arm.title, points, has_marks=False))
    return plot_file("Training loss of the longest runs, not distilled", series, "tokens", "nats per token")


# Cells


def _trained(results: StudyResults) -> list[Arm]:
    return [arm for arm in results.arms if arm.num_seeds]


def _pair(results: StudyResults) -> tuple[Arm, Arm] | None:
    """Return the arms whose losses over tokens are compared, if both are in the study."""
    by_name = {arm.name: arm for arm in results.arms}
    paper, calibrated = (by_name.get(name) for name in DECISIVE)
    return None if paper is None or calibrated is None else (paper, calibrated)


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _perplexity(loss: float | None) -> str:
    if loss is None:
        return MISSING
    value = math.exp(min(loss, 700.0))
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _spread(losses: Sequence[float | None]) -> str:
    """Format the perplexity of the mean loss, with the least and the greatest, and how many there should be."""
    found = [loss for loss in losses if loss is not None]
    text = _perplexity(_mean(losses))
    if len(found) > 1 and min(found) != max(found):
        text += f" ({_perplexity(min(found))} to {_perplexity(max(found))})"
    if found and len(found) < len(losses):
        text += f", {len(found)} of {len(losses)}"
    return text


def _short(measure: str) -> str:
    kind, _, context = measure.partition("-")
    return f"{'text' if kind == 'natural' else kind}, {context}"


def _tokens(count: int) -> str:
    return f"{count / 1e6:.3g} M" if count >= 1e5 else human_count(count)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
