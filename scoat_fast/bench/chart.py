"""Results as pictures, and as a table of Markdown: how many times faster than eager PyTorch everything is."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import BadInputError, ScoatFastError
from ..files import write_atomically

COLOURS = {"compile": "#9a9a9a", "triton": "#3b76af", "cuda": "#5aa469", "cpu": "#3b76af"}
DIRECTIONS = ("forward", "backward")


def draw(results: str | Path, output: str | Path) -> None:
    """Draws the results of ``bench ops``, ``model`` or ``train`` from their JSON file, as what ``output`` ends in.

    Of several batches, dtypes and layouts of the operations it shows one: the largest batch, and of that the first of
    its rows. A number that was not measured has no bar.

    Raises:
        ScoatFastError: without matplotlib; BadInputError for the file of results, OutputError for the chart.
    """
    result = _read(Path(results))
    if _is_cohort(result):
        raise BadInputError(results, "wanted results of scoat-fast bench ops, model or train")
    try:
        import matplotlib
    except ImportError as error:
        raise ScoatFastError("a chart needs matplotlib: pip install 'scoat-fast[bench]'") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    drawing = _draw_model if _is_model(result) else _draw_train if _is_train(result) else _draw_ops
    figure = drawing(plt, result)
    figure.tight_layout()
    kind = Path(output).suffix.removeprefix(".") or "png"
    try:
        write_atomically(output, lambda file: figure.savefig(file, format=kind, dpi=150))
    finally:
        plt.close(figure)


def table(results: str | Path) -> str:
    """The rows of ``bench model``, ``train`` or ``cohort`` as a table of Markdown, with ratios to what they are for.

    Raises:
        BadInputError: for the file of results.
    """
    result = _read(Path(results))
    if _is_cohort(result):
        loop = result["rows"][-1]["slices_per_s"]
        lines = [f"| {result['cases']} scans of {result['slices'] // result['cases']} slices | slices/s | x loop |"]
        lines.append("|---|---|---|")
        rows = [row for row in result["rows"] if row["slices_per_s"] is not None]
        return "\n".join(
            lines + [f"| {r['name']} | {r['slices_per_s']:.3g} | {r['slices_per_s'] / loop:.2f} |" for r in rows]
        )
    if _is_train(result):
        lines = ["| | width, size, batch | ms a step | images/s | x eager | peak MiB |", "|---|---|---|---|---|---|"]
        for row in _timed(result):
            cells = [row["name"], _setting(row), f"{row['ms_per_step']:.4g}", f"{row['images_per_s']:.3g}"]
            cells += [_or_empty(row["ratio_to_eager"], ".2f"), f"{row['peak_mib']:.0f}"]
            lines.append(_line(cells))
        return "\n".join(lines)
    if not _is_model(result):
        raise BadInputError(results, "wanted results of scoat-fast bench model, train or cohort")
    lines = ["| | width, size, batch | ms a slice | slices/s | x eager | % of floor | peak MiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in _timed(result):
        us, ratio = row["us_per_slice"], _times_faster(result, row)
        cells = [row["name"], _setting(row), f"{us / 1000:.4g}", f"{1e6 / us:.3g}", _or_empty(ratio, ".2f")]
        cells += [_or_empty(row["percent_of_floor"], ".0f"), _or_empty(row["peak_mib"], ".0f")]
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _setting(row: dict) -> str:
    return f"{row['width']}, {row['size']}x{row['size']}, {row['batch']}"


def _or_empty(number: float | None, form: str) -> str:
    """What was not measured is not shown."""
    return "" if number is None else format(number, form)


def _read(path: Path) -> dict:
    """Results with at least one number to show."""
    try:
        result = json.loads(path.read_text())
        drawn = result["rows"] and _shown(result)
    except OSError as error:
        raise BadInputError(path, error.strerror or str(error)) from error
    except (ValueError, LookupError, TypeError) as error:
        raise BadInputError(path, f"wanted results of scoat-fast bench, got {error!r}") from error
    if not drawn:
        raise BadInputError(path, "wanted results with a ratio to eager, got none")
    return result


def _shown(result: dict) -> list[dict]:
    if _is_cohort(result):
        return result["rows"]
    return _timed(result) if _is_model(result) or _is_train(result) else _drawn_ops(result)


def _is_cohort(result: dict) -> bool:
    return "share_of_engine" in result["rows"][0]


def _is_model(result: dict) -> bool:
    return "us_per_slice" in result["rows"][0]


def _is_train(result: dict) -> bool:
    return "ms_per_step" in result["rows"][0]


def _timed(result: dict) -> list[dict]:
    time = "us_per_slice" if _is_model(result) else "ms_per_step"
    return [row for row in result["rows"] if row[time] is not None]


def _times_faster(result: dict, row: dict) -> float | None:
    """Than the baseline in eager float32 on the same slices."""
    for other in _timed(result):
        if other["name"] == "eager float32" and all(other[key] == row[key] for key in ("width", "batch", "size")):
            return other["us_per_slice"] / row["us_per_slice"]
    return None


def _drawn_ops(result: dict) -> list[dict]:
    rows = [row for row in result["rows"] if row["ratio_to_eager"] is not None and row["implementation"] != "eager"]
    largest = max((row["batch"] for row in rows), default=None)
    rows = [row for row in rows if row["batch"] == largest]
    return [row for row in rows if all(row[key] == rows[0][key] for key in ("dtype", "layout"))]


def _draw_model(plt, result: dict):
    """Bars for the widest network and the largest batch."""
    rows = _timed(result)
    widest, largest = (max(row[key] for row in rows) for key in ("width", "batch"))
    rows = [row for row in rows if (row["width"], row["batch"]) == (widest, largest)]
    figure, ax = plt.subplots(figsize=(10, 0.8 + 0.42 * len(rows)))
    rates = [1e6 / row["us_per_slice"] for row in rows]
    colours = ["#3b76af" if row["name"].startswith("engine") else "#9a9a9a" for row in rows]
    bars = ax.barh([row["name"] for row in rows], rates, color=colours)
    faster = [_times_faster(result, row) for row in rows]
    labels = [f"{rate:.3g}" + (f"  ({x:.1f}x)" if x else "") for rate, x in zip(rates, faster, strict=True)]
    ax.bar_label(bars, labels, fontsize=8, padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.spines[["top", "right"]].set_visible(False)
    size = rows[0]["size"]
    ax.set_xlabel(f"slices a second, {size}x{size} (times eager float32)")
    figure.suptitle(f"{_where(result)}, width {widest}, batch {largest}", fontsize=11)
    return figure


def _draw_train(plt, result: dict):
    """The losses of all rows on top of each other, of the widest network and the largest batch."""
    rows = _timed(result)
    widest, largest = (max(row[key] for row in rows) for key in ("width", "batch"))
    figure, ax = plt.subplots(figsize=(8, 4))
    for row in rows:
        if (row["width"], row["batch"]) == (widest, largest):
            label = f"{row['name']}: {row['images_per_s']:.3g} images/s"
            ax.plot(range(1, len(row["losses"]) + 1), row["losses"], label=label, alpha=0.7)
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{_where(result)}, width {widest}, batch {largest}", fontsize=11)
    return figure


def _draw_ops(plt, result: dict):
    rows = _drawn_ops(result)
    directions = [d for d in DIRECTIONS if any(row["direction"] == d for row in rows)]
    figure, axes = plt.subplots(len(directions), squeeze=False, figsize=(10, 3.4 * len(directions)))
    for ax, direction in zip(axes[:, 0], directions, strict=True):
        _bars(ax, [row for row in rows if row["direction"] == direction])
        ax.set_title(direction, loc="left", fontsize=10)
        ax.set_ylabel("times faster than eager")
    first = rows[0]
    figure.suptitle(f"{_where(result)}, {first['dtype']}, {first['layout']}, batch {first['batch']}", fontsize=11)
    return figure


def _where(result: dict) -> str:
    return result.get("gpu") or f"CPU {result.get('cpu')}"


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
