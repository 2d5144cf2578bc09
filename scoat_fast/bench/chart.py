"""A bar chart of how many times faster than eager torch each implementation is."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import BadInputError, ScoatFastError
from ..imaging.files import write_atomically

COLOURS = {"compile": "#9a9a9a", "triton": "#3b76af", "cuda": "#5aa469", "cpu": "#3b76af"}
DIRECTIONS = ("forward", "backward")


def draw(results: str | Path, output: str | Path) -> None:
    """Draws the results of ``ops.run`` from their JSON file as a PNG (or what the name of ``output`` ends in).

    Of several batches, dtypes and layouts it shows one: the largest batch, and of that the first of its rows. A
    number that was not measured has no bar.

    Raises:
        ScoatFastError: without matplotlib; BadInputError for the file of results, OutputError for the chart.
    """
    result, rows = _read(Path(results))
    try:
        import matplotlib
    except ImportError as error:
        raise ScoatFastError("a chart needs matplotlib: pip install 'scoat-fast[bench]'") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    directions = [d for d in DIRECTIONS if any(row["direction"] == d for row in rows)]
    figure, axes = plt.subplots(len(directions), squeeze=False, figsize=(10, 3.4 * len(directions)))
    for ax, direction in zip(axes[:, 0], directions, strict=True):
        _bars(ax, [row for row in rows if row["direction"] == direction])
        ax.set_title(direction, loc="left", fontsize=10)
        ax.set_ylabel("times faster than eager")
    first = rows[0]
    where = result.get("gpu") or f"CPU {result.get('cpu')}"
    figure.suptitle(f"{where}, {first['dtype']}, {first['layout']}, batch {first['batch']}", fontsize=11)
    figure.tight_layout()
    kind = Path(output).suffix.removeprefix(".") or "png"
    try:
        write_atomically(output, lambda file: figure.savefig(file, format=kind, dpi=150))
    finally:
        plt.close(figure)


def _read(path: Path) -> tuple[dict, list[dict]]:
    """The results, and those rows that are drawn."""
    try:
        result = json.loads(path.read_text())
        rows = [row for row in result["rows"] if row["ratio_to_eager"] is not None and row["implementation"] != "eager"]
        largest = max((row["batch"] for row in rows), default=None)
        rows = [row for row in rows if row["batch"] == largest]
        same = [all(row[key] == rows[0][key] for key in ("dtype", "layout")) for row in rows]
    except OSError as error:
        raise BadInputError(path, error.strerror or str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(path, f"wanted results of scoat-fast bench ops, got {error!r}") from error
    if not rows:
        raise BadInputError(path, "wanted results with a ratio to eager, got none")
    return result, [row for row, drawn in zip(rows, same, strict=True) if drawn]


def _bars(ax, rows: list[dict]) -> None:
    """A group of bars for each operation and sample, a bar in it for each implementation."""
    groups = list(dict.fromkeys((row["op"], row["sample"]) for row in rows))
    implementations = list(dict.fromkeys(row["implementation"] for row in rows))
    width = 0.8 / len(implementations)
    for i, name in enumerate(implementations):
        found = [
            (groups.index((r["op"], r["sample"])), r["ratio_to_eager"]) for r in rows if r["implementation"] == name
        ]
        places = [group + (i - (len(implementations) - 1) / 2) * width for group, _ in found]
        bars = ax.bar(places, [ratio for _, ratio in found], width, label=name, color=COLOURS.get(name))
        ax.bar_label(bars, fmt="%.1f", fontsize=6, padding=1)
    ax.axhline(1, color="black", linewidth=0.8, linestyle="--")
    ax.set_xticks(range(len(groups)), [f"{op.replace('_', ' ')}\n{sample}" for op, sample in groups], fontsize=7)
    ax.tick_params(axis="x", rotation=30)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.02, y=0.12)
    ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(implementations))
