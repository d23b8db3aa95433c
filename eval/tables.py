"""Tables of results: the same cells for a terminal and as Markdown; and one error for results that lack some."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rrt.errors import UserError


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header.

    Attributes:
        title: a line above; may be empty.
        header: names of the columns.
        rows: of each row as many cells as there are columns.
        text_columns: columns that hold text and are aligned left; numbers are aligned right.
        gap_after: on a terminal a blank line stands where the first `gap_after` cells change.
        notes: lines below.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[int] = (0,)
    gap_after: int = 0
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Format the table with aligned columns, two spaces apart."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [self.title] if self.title else []
        before: Sequence[str] | None = None
        for row in (self.header, *self.rows):
            key = tuple(row[: self.gap_after])
            if before is not None and key != before:
                lines.append("")
            before = key
            cells = (
                cell.ljust(width) if column in self.text_columns else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *self.notes])

    def markdown(self) -> str:
        """Format as Markdown: the title in bold, the table, and the notes as paragraphs of a line each."""
        head = [f"**{self.title}**", ""] if self.title else []
        rules = ["---" if column in self.text_columns else "---:" for column in range(len(self.header))]
        rows = [f"| {' | '.join(row)} |" for row in (self.header, rules, *self.rows)]
        notes = [line for note in self.notes for line in ("", note)]
        return "\n".join([*head, *rows, *notes])


@contextmanager
def expect_whole_result(path: Path, kind: str) -> Iterator[None]:
    """Show a result inside of this context.

    Raises:
        UserError: instead of what a missing or damaged field raises.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        found = f"field {error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: {found}; expected a whole result of kind {kind!r}: make it again") from None


def print_tables(tables: Iterable[Table]) -> None:
    """Print tables with an empty line before each."""
    for table in tables:
        print(f"\n{table.text()}")


def format_seconds(seconds: float) -> str:
    """Format seconds with three digits in s, ms or us: ``0.00125`` -> ``"1.25 ms"``."""
    scale, unit = (1.0, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "us")
    value = seconds / scale
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def format_spread(seconds: dict[str, float]) -> str:
    """Format half the distance of the quartiles over the median, in percent; empty if there are no quartiles."""
    if "lower_quartile" not in seconds:
        return ""
    return f"{(seconds['upper_quartile'] - seconds['lower_quartile']) / 2 / seconds['median']:.0%}"
