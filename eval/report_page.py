"""Sections of the report page as HTML: size against quality, training, early exits, throughput, sources."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from eval.svg import STYLE, Series, bars, number, plot
from rrt.common.cli import human_bytes, human_count
from rrt.common.results import result_header

CURVE_POINTS = 300
"""Most points of a loss curve."""

KINDS = ("perplexity", "fewshot", "exits", "throughput", "throughput-paper", "bigram")


@dataclass
class Results:
    """Results by kind, each with its path, and training runs with their records."""

    by_kind: dict[str, list[tuple[Path, dict[str, Any]]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    runs: list[tuple[Path, list[dict[str, Any]]]] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [result for _, result in self.by_kind[kind]]


def shorten(path: str | Path) -> str:
    """Shorten the path of a checkpoint or run to its last part, apart from `final`."""
    parts = [part for part in Path(path).parts if part not in ("final", "/")]
    return parts[-1] if parts else str(path)


def shorten_all(paths: Sequence[str]) -> dict[str, str]:
    """Map paths to their short names, or to themselves where two names would be the same."""
    short = {path: shorten(path) for path in paths}
    return {path: name if list(short.values()).count(name) == 1 else path for path, name in short.items()}


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], style: str = "") -> str:
    """Make an HTML table; None is an empty cell. The style `texts` is for cells of text (report.css)."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{'' if cell is None else escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="table {style}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def plots(*figures: str) -> str:
    found = "".join(figures)
    return f'<div class="plots">{found}</div>' if found else ""


def frontier(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[tuple[float, float]]:
    """Return the points that beat all others of at most their size, sorted by size."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1] if higher_is_better else point[1])):
        if not best or (y > best[-1][1] if higher_is_better else y < best[-1][1]):
            best.append((x, y))
    return best


def pareto(title: str, y_label: str, points: dict[str, tuple[float, float]], higher_is_better: bool = False) -> str:
    """Plot size against quality, with the frontier of the best."""
    if not points:
        return ""
    best = frontier(list(points.values()), higher_is_better)
    models = Series("models", list(points.values()), is_line=False, labels=list(points))
    lines = [Series("no smaller model is as good", best, has_marks=False)] if len(best) > 1 else []
    return plot(title, [models, *lines], "non-embedding parameters", y_label, log_x=True)


def quality(results: Results) -> str:
    """Render perplexity and accuracy of each checkpoint and exit, against size."""
    perplexities, shots, bigrams = (results.of(kind) for kind in ("perplexity", "fewshot", "bigram"))
    if not (perplexities or shots or bigrams):
        return ""
    names = shorten_all([*dict.fromkeys(result["checkpoint"] for result in (*perplexities, *shots))])
    sections = []
    data_sets = list(dict.fromkeys((result["data"], result["mode"]) for result in perplexities))
    measured = {data for data, _ in data_sets}
    data_sets += dict.fromkeys(
        (floor["data"], "bigram model alone") for floor in bigrams if floor["data"] not in measured
    )
    for data, mode in data_sets:
        own = [result for result in perplexities if (result["data"], result["mode"]) == (data, mode)]
        floors = [floor for floor in bigrams if floor["data"] == data]
        points = {
            names[r["checkpoint"]]: (r["non_embedding_params"], r["exits"][-1]["perplexity"])
            for r in own
            if r["exit_loop"] == r["num_loops"] - 1
        }
        rows = [
            [
                names[r["checkpoint"]],
                human_count(r["non_embedding_params"]),
                row["loop"],
                f"{row['perplexity']:.3f}",
                f"{row['loss']:.4f}",
                None if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
                f"{r['tokens']:,}" + ("" if r["complete"] else " (incomplete)"),
            ]
            for r in own
            for row in r["exits"]
        ]
        rows += [["bigram model", None, None, f"{r['perplexity']:.3f}", None, None, f"{r['tokens']:,}"] for r in floors]
        sections.append(heading(f"{data}, {mode}"))
        sections.append(plots(pareto("Size against perplexity (last loop)", "perplexity", points)))
        heads = ("model", "N-emb", "exit after loop", "perplexity", "nats/token", "bits/byte", "tokens")
        sections.append(table(heads, rows))
        sections += [groups_table(names[r["checkpoint"]], r) for r in own if r.get("groups")]
    if shots:
        sections.append(fewshot(shots, names))
    return "<h2>Size against quality</h2>" + "".join(sections)


def groups_table(name: str, result: dict[str, Any]) -> str:
    """Make the table of perplexities of each subset of a corpus."""
    rows = [
        [group or "(none)", f"{value['tokens']:,}", *(f"{row['perplexity']:.3f}" for row in value["exits"])]
        for group, value in result["groups"].items()
    ]
    heads = [f"{name}: subset", "tokens", *(f"loop {row['loop']}" for row in result["exits"])]
    return table(heads, rows)


def fewshot(shots: list[dict[str, Any]], names: dict[str, str]) -> str:
    """Render accuracy per task and on average."""
    tasks = list(dict.fromkeys(task for result in shots for task in result["tasks"]))
    rows, points = [], {}
    for result in shots:
        name = names[result["checkpoint"]]
        cells = []
        for task in tasks:
            metrics = result["tasks"].get(task, {}).get("metrics", {})
            value = next((metrics[key] for key in ("acc_norm", "acc") if metrics.get(key) is not None), None)
            cells.append(None if value is None else f"{100 * value:.1f}")
        average = result["average"] and result["average"]["value"]
        if average is not None:
            is_last = result["exit_loop"] == result["num_loops"] - 1
            label = name if is_last else f"{name}, loop {result['exit_loop']}"
            points[label] = (result["non_embedding_params"], 100 * average)
        size = human_count(result["non_embedding_params"])
        rows.append([name, size, result["exit_loop"], None if average is None else f"{100 * average:.1f}", *cells])
    local = dict.fromkeys(file["path"] for result in shots for file in result.get("data", {}).values())
    own = f" From local files, not the published data sets: {', '.join(local)}." if local else ""
    return (
        heading("Few-shot accuracy, %")
        + plots(pareto("Size against few-shot average", "average of seven, %", points, higher_is_better=True))
        + table(("model", "N-emb", "exit after loop", "average of seven", *tasks), rows)
        + f'<p class="soft">acc_norm where a task has it, else acc.{escape(own)}</p>'
    )


def training(results: Results) -> str:
    """Render the loss of every run over its tokens, and at its end."""
    if not results.runs:
        return ""
    names = shorten_all([str(path) for path, _ in results.runs])
    series, rows = [], []
    for path, records in results.runs:
        width = max(1, len(records) // CURVE_POINTS)
        groups = [records[i : i + width] for i in range(0, len(records), width)]
        curve = [(group[-1]["tokens"], sum(r["loss"] for r in group) / len(group)) for group in groups]
        series.append(Series(names[str(path)], curve, has_marks=False))
        last = records[-max(1, len(records) // 20) :]
        mean = sum(record["loss"] for record in last) / len(last)
        rows.append([names[str(path)], f"{len(records):,}", human_count(records[-1]["tokens"]), f"{mean:.4f}"])
    figure = plot("Training loss", series, "tokens", "nats per token")
    heads = ("run", "steps", "tokens", "loss, mean of the last 5 % of steps")
    note = "The loss that each run minimises: with distillation or exits not the last loop's cross-entropy alone."
    return "<h2>Training</h2>" + plots(figure) + table(heads, rows) + f'<p class="soft">{escape(note)}</p>'


def exits(results: Results) -> str:
    """Render agreement, loops and perplexity of early exits."""
    sections = []
    names = shorten_all([*dict.fromkeys(result["checkpoint"] for result in results.of("exits"))])
    for result in results.of("exits"):
        name = names[result["checkpoint"]]
        static, curve, oracle = result["static"], result["thresholds"], result["oracle"]
        trust = [
            Series(f"loop {loop}", [(row["confidence"], row["agreement"]) for row in rows])
            for loop, rows in enumerate(result["reliability"])
        ]
        trust.append(Series("agreement = confidence", [(0.0, 0.0), (1.0, 1.0)], has_marks=False))
        agreement = [(row["mean_loops"], row["agreement"]) for row in curve]
        perplexity = [(row["mean_loops"], row["perplexity"]) for row in curve]
        by_loop = [(row["loop"] + 1, row["perplexity"]) for row in static]
        sections.append(
            f"{heading(name)}<p>{result['samples']:,} samples, {result['tokens']:,} tokens of "
            f"{escape(str(result['data']))}; with oracle exits {oracle['mean_loops']:.3f} of "
            f"{result['num_loops']:d} loops per token.</p>"
            + plots(
                plot("Confidence against agreement with the last loop", trust, "top-1 probability", "agreement"),
                plot(
                    "Loops against agreement, by threshold", [Series(name, agreement)], "loops per token", "agreement"
                ),
                plot(
                    "Loops against perplexity",
                    [Series("exit by threshold", perplexity), Series("all tokens after a loop", by_loop)],
                    "loops per token",
                    "perplexity",
                ),
            )
            + table(
                ("exit of all tokens after loop", "perplexity", "agrees with last", "oracle exits here", "few-shot"),
                [
                    [
                        row["loop"],
                        f"{row['perplexity']:.3f}",
                        f"{row['agreement']:.2%}",
                        f"{share:.2%}",
                        None if row["fewshot"] is None else f"{row['fewshot']:.1%}",
                    ]
                    for row, share in zip(static, oracle["share"], strict=True)
                ],
            )
            + table(
                ("wanted agreement of early exits", "thresholds", "measured on held-back samples", "loops per token"),
                [
                    [
                        row["agreement"],
                        ", ".join("never" if value is None else f"{value:.4f}" for value in row["thresholds"]),
                        None if row["measured_agreement"] is None else f"{row['measured_agreement']:.4f}",
                        f"{row['mean_loops']:.3f}",
                    ]
                    for row in result["calibrations"]
                ],
            )
        )
    return "<h2>Early exits</h2>" + "".join(sections) if sections else ""


def throughput(results: Results) -> str:
    """Render measured pass times, simulated throughput, and the paper's own."""
    sections = []
    for result in results.of("throughput"):
        for setting in result["settings"]:
            memory = f" in {human_bytes(setting['memory'])}" if setting["memory"] else ""
            lengths = f"prompt {setting['prefix']}, generated {setting['decode']}{memory}"
            state = "" if result["complete"] else " (incomplete)"
            sections.append(heading(f"{result['subject']}, {result['dtype']}, {lengths}{state}"))
            times = [
                Series(model["model"], [(p["rows"], 1e3 * p["block"] / p["rows"]) for p in model["times"]])
                for model in setting["models"]
            ]
            figures = [plot("Block, time per token", times, "rows of a pass", "ms per token", log_x=True, log_y=True)]
            for queue in setting["queues"]:
                stages = list(queue["rows"][0]["counted"])
                ends = (stages[0], stages[-1])
                groups = [
                    (f"{row['model']}, {row['strategy']}", [row["counted"][s]["tokens_per_second"] for s in ends])
                    for row in queue["rows"]
                ]
                shown = ("blocks only, as in the paper", "everything")
                figures.append(bars(f"Throughput, {queue['name']}", groups, shown, "tok/s"))
            sections.append(plots(*figures))
            sections += [queue_table(setting, queue) for queue in setting["queues"]]
    for result in results.of("throughput-paper"):
        rows = [
            [
                f"{row['corpus']}: {row['counted']}",
                *(f"{row['ours'][s]:.0f} ({row['paper'][s]})" for s in ("static", "csb", "cdb")),
                f"{row['cdb_over_csb']:.2f} ({row['paper_cdb_over_csb']:.2f})",
            ]
            for row in result["rows"]
        ]
        heads = ("Gemma 2B, A100: counted", "static", "CSB", "CDB, oracle", "CDB over CSB")
        sections.append(heading("The paper's block times through our simulation (the paper's figures)"))
        sections.append(table(heads, rows))
    return "<h2>Throughput</h2>" + "".join(sections) if sections else ""


def queue_table(setting: dict[str, Any], queue: dict[str, Any]) -> str:
    """Make the table of tokens per second and their ratio to the vanilla model's CSB, by the costs that are counted."""
    stages = list(queue["rows"][0]["counted"])
    sizes = {model["model"]: human_count(model["non_embedding_params"]) for model in setting["models"]}

    def cell(row: dict[str, Any], stage: str) -> str:
        over_static = f"{row['over_static'][stage]:.2f}, " if stage == stages[0] else ""
        return f"{number(row['counted'][stage]['tokens_per_second'])} ({over_static}{row['over_csb'][stage]:.2f})"

    rows = [
        [f"{row['model']}, {row['strategy']}", sizes[row["model"]], row["batch"], *(cell(row, s) for s in stages)]
        for row in queue["rows"]
    ]
    caption = (
        f"{queue['name']}: {queue['samples']:,} samples, {queue['mean_loops']:.3f} loops per token. Tokens per second "
        "(over the vanilla model's static batching, blocks only, and its CSB), by the costs that are counted:"
    )
    return f"<p>{escape(caption)}</p>" + table(("", "N-emb", "batch", *stages), rows)


def sources(results: Results) -> str:
    """Render file, command, code version, device and time of each result."""
    rows = [
        [path, kind, *(result.get(name) for name in ("command", "code_version", "device", "created"))]
        for kind, found in results.by_kind.items()
        for path, result in found
    ]
    rows += [[path, "training run", None, None, None, None] for path, _ in results.runs]
    return "<h2>Sources</h2>" + table(("file", "kind", "command", "code", "device", "made"), rows, "texts")


def render_sections(results: Results) -> str:
    """Render all sections but those that have no result."""
    parts: tuple[Callable[[Results], str], ...] = (quality, training, exits, throughput, sources)
    return "".join(part(results) for part in parts)


def render_page(results: Results) -> str:
    """Render the whole page as one self-contained document."""
    header = result_header()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Relaxed Recursive Transformers: report</title><style>{STYLE.read_text()}</style></head><body>"
        f"<h1>Relaxed Recursive Transformers</h1><p>Report of {escape(header['created'])}, "
        f"code {escape(header['code_version'])}.</p>{render_sections(results)}</body></html>\n"
    )
