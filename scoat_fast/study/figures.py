"""How the paper's figures 3 to 6 are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import ScoatFastError
from ..files import write_atomically
from .metrics import METRICS

KINDS = (".png", ".pdf", ".svg")
TRUTH, FOUND = (1.0, 0.235, 0.235), (0.0, 0.863, 1.0)  # red and cyan, as in the paper
TILE = 2.2  # inches
LOOK = {"savefig.bbox": "tight", "svg.hashsalt": "scoat_fast", "font.size": 9}


def box_plot(cases: Mapping[str, Mapping[str, float | None]], path: Path) -> None:
    """Figure 3: how the six metrics spread over cases, with their medians. Values that are None are left out."""
    figure, write = _figure(path, (5.5, 3.2))
    axes = figure.subplots()
    values = [[row[name] for row in cases.values() if row.get(name) is not None] for name in METRICS]
    axes.boxplot(values, tick_labels=METRICS, widths=0.5, medianprops={"color": "tab:red"})
    for place, column in enumerate(values, 1):
        axes.plot([place] * len(column), column, "o", color="tab:blue", alpha=0.4, markersize=3)
    axes.set_ylabel(f"of {len(cases)} cases")
    axes.grid(axis="y", alpha=0.3)
    write()


def contours(
    slices: Mapping[str, np.ndarray],
    truth: Mapping[str, np.ndarray],
    found: Mapping[str, Mapping[str, np.ndarray]],
    path: Path,
) -> None:
    """Figure 4: a row for each network, a column for each slice; the truth in red, what was found in cyan.

    Args:
        slices: grey values [H, W] in 0..1, by slice.
        truth: masks of the same shapes, by slice.
        found: masks by network and slice.
    """
    grid, write = _grid(path, len(found), len(slices))
    for row, (network, masks) in zip(grid, found.items(), strict=True):
        for axes, (name, grey) in zip(row, slices.items(), strict=True):
            _picture(axes, grey, {TRUTH: truth[name], FOUND: masks[name]})
            if axes in grid[0]:
                axes.set_title(name)
        row[0].set_ylabel(network)
    write()


def attention(
    slices: Mapping[str, np.ndarray],
    truth: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    maps: Mapping[str, Sequence[np.ndarray]],
    names: Sequence[str],
    path: Path,
) -> None:
    """Figure 5: a row for each slice, with what was found and with attention maps [H, W] in 0..1."""
    grid, write = _grid(path, len(slices), 2 + len(names))
    for row, (name, grey) in zip(grid, slices.items(), strict=True):
        _picture(row[0], grey, {TRUTH: truth[name]})
        _picture(row[1], grey, {FOUND: found[name]})
        for axes, values in zip(row[2:], maps[name], strict=True):
            _picture(axes, grey, {})
            axes.imshow(values, cmap="jet", vmin=0, vmax=1, alpha=0.6)
        row[0].set_ylabel(name)
    for axes, title in zip(grid[0], ("truth", "found", *names), strict=True):
        axes.set_title(title)
    write()


def over_time(
    visits: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray, float]]], ml: Sequence[float], path: Path
) -> None:
    """Figure 6: a column for each date; an axial slice with the date over a coronal one with mL, the opacity in red.

    Args:
        visits: for each date two cuts: grey values in 0..1 and mask [H, W], and the ratio of a pixel's height to its
            width.
    """
    grid, write = _grid(path, 2, len(visits))
    for column, ((date, cuts), amount) in enumerate(zip(visits.items(), ml, strict=True)):
        for axes, (grey, mask, ratio), text in zip(grid[:, column], cuts, (date, f"{amount:.0f} mL"), strict=True):
            _picture(axes, grey, {}, ratio)
            red = np.zeros((*mask.shape, 4))
            red[mask] = (*TRUTH, 0.6)
            axes.imshow(red, aspect=ratio)
            axes.text(0.97, 0.03, text, color="white", ha="right", va="bottom", transform=axes.transAxes)
    write()


def _picture(axes, grey: np.ndarray, masks: Mapping[tuple, np.ndarray], ratio: float = 1.0) -> None:
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, aspect=ratio)
    for colour, mask in masks.items():
        if mask.any():
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=0.8)
    axes.set_xticks([])
    axes.set_yticks([])


def _grid(path: Path, rows: int, columns: int):
    figure, write = _figure(path, (TILE * columns, TILE * rows))
    return figure.subplots(rows, columns, squeeze=False, gridspec_kw={"hspace": 0.03, "wspace": 0.03}), write


def check_figure(path: Path) -> None:
    """Raises ScoatFastError without matplotlib, or for a file of another kind than ``KINDS``."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ScoatFastError("figures need matplotlib: pip install 'scoat-fast[study]'") from error
    if path.suffix.lower() not in KINDS:
        raise ScoatFastError(f"a figure that ends in {', '.join(KINDS)} is wanted, got {path.name!r}")


def _figure(path: Path, size: tuple[float, float]):
    """An empty figure of ``size`` in inches, and what writes it. Raises ScoatFastError."""
    check_figure(path)
    import matplotlib
    from matplotlib.figure import Figure

    kind = path.suffix.lower()
    figure = Figure(size, dpi=150)
    undated = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}

    def write() -> None:
        with matplotlib.rc_context(LOOK):
            save = partial(figure.savefig, format=kind[1:], metadata=undated[kind], bbox_inches="tight")
            write_atomically(path, save)

    return figure, write
