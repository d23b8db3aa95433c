"""Plots as SVG text, for a page without scripts: lines or points over linear or logarithmic axes, and bars.

Colours are the page's CSS variables (`--c0` to `--c7`, `--grid`) and its text colour, so that a plot follows the page
into dark mode. Points have tooltips with their values.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

NUM_COLOURS = 8
STYLE = Path(__file__).with_name("report.css")
"""Of the page."""
WIDTH, HEIGHT = 560, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 12, 44
_LINE_HEIGHT = 22


@dataclass(frozen=True)
class Series:
    """Points (x, y) under one name; `is_line` joins them, `has_marks` draws them, `labels` stand beside them."""

    name: str
    points: Sequence[tuple[float, float]]
    is_line: bool = True
    has_marks: bool = True
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    """An axis of a plot: its range (of logarithms if `is_log`) and its ticks."""

    label: str
    low: float
    high: float
    is_log: bool

    @classmethod
    def around(cls, label: str, values: Sequence[float], is_log: bool = False) -> "Axis":
        """Make an axis that contains `values` with a margin; logarithmic only if all are positive."""
        is_log = is_log and min(values) > 0
        low, high = (math.log10(min(values)), math.log10(max(values))) if is_log else (min(values), max(values))
        margin = 0.06 * (high - low) or (0.1 if is_log else 0.1 * abs(high) or 1.0)
        return cls(label, low - margin, high + margin, is_log)

    def place(self, value: float) -> float:
        """Return the position of `value` on the axis, 0 to 1."""
        return ((math.log10(value) if self.is_log else value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if not self.is_log:
            return _round_numbers(self.low, self.high)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            ticks = [step * 10.0**power for power in powers for step in steps]
            inside = [tick for tick in ticks if self.low <= math.log10(tick) <= self.high]
            if len(inside) >= 3:
                return inside
        return [10**tick for tick in _round_numbers(self.low, self.high)]


def _round_numbers(low: float, high: float) -> list[float]:
    """List about five multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def number(value: float) -> str:
    """Format a number with 4 significant digits, thousands as K, M, B."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.4g}"


def plot(
    title: str, series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False
) -> str:
    """Draw the finite points as a figure with its legend; an empty string if there are none."""
    series = _with_points(series)
    if not series:
        return ""
    legend = "".join(
        f'<span><i style="background:var(--c{index % NUM_COLOURS})"></i>{escape(one.name)}</span>'
        for index, one in enumerate(series)
    )
    content = _draw(series, x_label, y_label, log_x, log_y)
    return _figure(title, content, HEIGHT, legend if len(series) > 1 else "")


def plot_file(
    title: str, series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False
) -> str:
    """Draw the same as a whole SVG file, with title, legend and colours in it, for a Markdown page."""
    series = _with_points(series)
    if not series:
        return ""
    # The page's colours: the beginning of its style.
    colours = STYLE.read_text(encoding="utf-8").partition("\n* {")[0]
    style = f"{colours}\ntext {{ font: 11px system-ui, sans-serif; fill: var(--ink); }} .title {{ font-weight: 600; }}"
    top, columns = 24, 2
    legend = []
    for index, one in enumerate(series):
        row, column = divmod(index, columns)
        x, y = _LEFT + column * (WIDTH - _LEFT) / columns, top + HEIGHT + 14 + row * _LINE_HEIGHT
        colour = f"var(--c{index % NUM_COLOURS})"
        legend.append(f'<rect x="{x:.0f}" y="{y - 9:.0f}" width="10" height="10" rx="2" fill="{colour}"/>')
        legend.append(_text(x + 16, y, escape(one.name), "start"))
    height = top + HEIGHT + 14 + _LINE_HEIGHT * -(-len(series) // columns)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(title)}"><style>{style}</style><rect width="100%" height="100%" fill="var(--card)"/>'
        f'<text class="title" x="{_LEFT}" y="18">{escape(title)}</text><g transform="translate(0 {top})">'
        f"{_draw(series, x_label, y_label, log_x, log_y)}</g>{''.join(legend)}</svg>\n"
    )


def _with_points(series: Sequence[Series]) -> list[Series]:
    return [one for one in map(_finite, series) if one.points]


def _draw(series: Sequence[Series], x_label: str, y_label: str, log_x: bool, log_y: bool) -> str:
    """Draw axes, lines and points."""
    xs, ys = zip(*(point for one in series for point in one.points), strict=True)
    x_axis, y_axis = Axis.around(x_label, xs, log_x), Axis.around(y_label, ys, log_y)
    lines, marks, taken = [], [], []
    for index, one in enumerate(series):
        colour = f"var(--c{index % NUM_COLOURS})"
        places = [(_x(x_axis, x), _y(y_axis, y)) for x, y in one.points]
        if one.is_line:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        for i, (x, y) in enumerate(places if one.has_marks else []):
            label = one.labels[i] if i < len(one.labels) else ""
            tip = escape(f"{label or one.name}: {number(one.points[i][0])}, {number(one.points[i][1])}")
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{colour}"><title>{tip}</title></circle>')
            if label:
                marks.append(_label(x, y, label, taken))
    return "".join((_frame(x_axis, y_axis), *lines, *marks))


def _finite(series: Series) -> Series:
    kept = [all(map(math.isfinite, point)) for point in series.points]
    points, labels = (list(itertools.compress(values, kept)) for values in (series.points, series.labels))
    return replace(series, points=points, labels=labels)


def _label(x: float, y: float, label: str, taken: list[tuple[float, float, float]]) -> str:
    """Draw a point's label, if possible where it hides none of those in `taken` (left, right, base line)."""
    width = 6.2 * len(label)
    for anchor, left in (("start", x + 7), ("end", x - 7 - width)):
        for base in (y - 6, y + 15, y - 19, y + 28):
            is_free = all(left > end or left + width < begin or abs(base - line) > 12 for begin, end, line in taken)
            if is_free and left >= _LEFT and left + width <= WIDTH:
                taken.append((left, left + width, base))
                return _text(left if anchor == "start" else left + width, base, escape(label), anchor)
    return _text(x + 7, y - 6, escape(label), "start")


def bars(title: str, groups: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], unit: str) -> str:
    """Draw horizontal bars from zero; each group has one per name."""
    if not groups:
        return ""
    longest = max(value for _, values in groups for value in values) or 1.0
    left, room = 190, WIDTH - 190 - 90
    parts, y = [], 6.0
    for label, values in groups:
        middle = y + _LINE_HEIGHT * len(values) / 2 + 4
        parts.append(_text(left - 8, middle, escape(label), "end"))
        for index, value in enumerate(values):
            width = max(1.0, room * value / longest)
            parts.append(
                f'<rect x="{left}" y="{y:.1f}" width="{width:.1f}" height="{_LINE_HEIGHT - 5}" rx="2" '
                f'fill="var(--c{index % NUM_COLOURS})"><title>{escape(label)}, {escape(names[index])}: {value:.4g} '
                f"{escape(unit)}</title></rect>"
            )
            parts.append(_text(left + width + 6, y + 13, f"{number(value)} {escape(unit)}", "start"))
            y += _LINE_HEIGHT
        y += 9
    legend = "".join(
        f'<span><i style="background:var(--c{index % NUM_COLOURS})"></i>{escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return _figure(title, "".join(parts), y, legend if len(names) > 1 else "")


def _figure(title: str, content: str, height: float, legend: str) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{content}</svg><div class="legend">{legend}</div></figure>'
    )


def _frame(x_axis: Axis, y_axis: Axis) -> str:
    parts = []
    for tick in x_axis.ticks():
        x = _x(x_axis, tick)
        parts.append(_grid(x, _TOP, x, HEIGHT - _BOTTOM))
        parts.append(_text(x, HEIGHT - _BOTTOM + 16, number(tick), "middle"))
    for tick in y_axis.ticks():
        y = _y(y_axis, tick)
        parts.append(_grid(_LEFT, y, WIDTH - _RIGHT, y))
        parts.append(_text(_LEFT - 6, y + 4, number(tick), "end"))
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(_text((WIDTH + _LEFT) / 2, HEIGHT - 8, escape(x_axis.label), "middle"))
    parts.append(
        f'<text transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_axis.label)}</text>'
    )
    return "".join(parts)


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.place(value) * (HEIGHT - _TOP - _BOTTOM)


def _grid(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="var(--grid)"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
