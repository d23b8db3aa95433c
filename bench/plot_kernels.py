"""Plot of the linears' time over floor: python bench/plot_kernels.py RESULT.json OUT.png

Reads a result of `bench/kernels.py --json`; its `--plot` draws the same. Needs matplotlib (the extra "plot").
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rrt.common.cli import run_command
from rrt.common.files import read_json
from rrt.errors import UserError

STYLES = {"ours": "-o", "base": "--", "unfused": "-", "concatenated": "-", "merged": "-"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot time over floor by rows, of every variant: a panel per projection and rank; two loops mixed if measured."""
    records = [*result["linear"], *result.get("layer", [])]
    measured = sorted({record["loops"] for record in records})
    loops = 2 if 2 in measured else measured[-1]
    records = [record for record in records if record["loops"] == loops]
    names = list(dict.fromkeys(record["projection"] for record in records))
    ranks = sorted({record["rank"] for record in records})
    figure, grid = plt.subplots(
        len(ranks),
        len(names),
        figsize=(3.4 * len(names) + 1, 2.6 * len(ranks) + 1),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for row, rank in zip(grid, ranks, strict=True):
        for axes, name in zip(row, names, strict=True):
            cases = sorted(
                (r for r in records if (r["projection"], r["rank"]) == (name, rank)), key=lambda r: r["rows"]
            )
            for index, (variant, style) in enumerate(STYLES.items()):
                points = [(r["rows"], r["over_floor"][variant]) for r in cases if variant in r["over_floor"]]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=f"C{index}", markersize=3, label=variant)
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
            axes.set_title(f"{name}, rank {rank}", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("rows")
    for row in grid:
        row[0].set_ylabel("time / floor")
    most = max(grid.flat, key=lambda axes: len(axes.lines))
    figure.legend(*most.get_legend_handles_labels(), loc="upper right", ncols=len(STYLES), fontsize=9)
    title = f"{result['shapes']}, {result['dtype']}, {loops} loop{'s' if loops > 1 else ''} mixed"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError(
            f"arguments: found {len(sys.argv) - 1}; expected a result of bench/kernels.py and a PNG to write"
        )
    source = Path(sys.argv[1])
    result = read_json(source)
    missing = {"linear", "shapes", "dtype"} - set(result)
    if missing:
        raise UserError(
            f"{source}: no field {sorted(missing)[0]!r}; expected a result of bench/kernels.py with linears"
        )
    plot(result, Path(sys.argv[2]))


if __name__ == "__main__":
    run_command(main)
