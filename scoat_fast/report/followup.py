"""One patient over time: results side by side, with numbers, their change, and slices as in the paper's figure 6."""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .. import __version__
from ..errors import BadInputError, ScoatFastError, one_line
from ..files import write_csv
from ..imaging.nifti import read_nifti
from ..imaging.volume import Turn, mask_on_grid
from ..imaging.window import LUNG
from ..segmentation.cases import find_cases, is_report, read_volume
from ..segmentation.ledger import series_of, unchanged
from ..segmentation.overlay import FOUND, contour
from ..segmentation.results import check_begins
from .pages import number, picture, write_page

NUMBERS = ("ml", "share_of_lung", "ground_glass_ml", "consolidation_ml", "right_share", "left_share")
SETTINGS = ("weights", "threshold", "min_mm3")
COLUMNS = ("date", "case", *NUMBERS, "change_ml", "change_percent")
ACROSS = 420  # pixels of a picture
WIDE, TALL, EDGE = 640, 200, 46  # of the chart


@dataclass
class Visit:
    """A result and its date; the change is from the visit before."""

    date: datetime.date
    path: Path
    report: dict
    change_ml: float | None = None
    change_percent: float | None = None
    axial: str = ""
    coronal: str = ""
    doubt: str = ""

    @property
    def is_clear(self) -> bool:
        return not self.report["statistics"]["ml"]


def write_followup(given: Sequence[str], output: Path) -> None:
    """Writes a page and, beside it, a table.

    Args:
        given: "DATE=CASE.json" of each date, with an ISO date and a report that ``scoat-fast segment`` wrote, of a
            volume. Pictures need its input where it was, and its mask beside it; without, the numbers stand alone.
        output: ends in ``.html``; the table has the same name and ``.csv``.

    Raises:
        ScoatFastError: for a date that is none, two of the same, or results that were made in different ways.
        BadInputError: for a file that is no such report. OutputError: for a file of somebody else, or one that cannot
        be written.
    """
    if output.suffix != ".html":
        raise ScoatFastError(f"a page that ends in .html is wanted, got {output.name!r}")
    visits = read_visits(given)
    table = output.with_suffix(".csv")
    check_begins(table, ",".join(COLUMNS).encode())
    for before, visit in itertools.pairwise(visits):
        old, new = (one.report["statistics"]["ml"] for one in (before, visit))
        visit.change_ml = new - old
        visit.change_percent = 100 * (new - old) / old if old else None
    for visit in visits:
        try:
            visit.axial, visit.coronal = (picture(_drawn(*cut)) for cut in cuts(visit))
        except BadInputError as error:
            visit.doubt = f"No pictures: {error.reason}"
    rows = [
        ("Opacity", [number("ml", visit.report["statistics"]["ml"]) for visit in visits]),
        ("Change", ["\u2013" if v.change_ml is None else f"{v.change_ml:+.1f} mL" for v in visits]),
        ("", ["\u2013" if v.change_percent is None else f"{v.change_percent:+.0f} %" for v in visits]),
        ("Share of the lungs", _row(visits, "share_of_lung")),
        ("Right lung", _row(visits, "right_share")),
        ("Left lung", _row(visits, "left_share")),
        ("Ground glass", _row(visits, "ground_glass_ml")),
        ("Consolidation", _row(visits, "consolidation_ml")),
        ("Lung mask", _row(visits, "lung_mask")),
    ]
    made = dict(zip(SETTINGS, _settings(visits[0]), strict=True)) | {"weights": visits[0].report["weights"]}
    write_page(output, "followup.html", visits=visits, rows=rows, chart=_chart(visits), made=made, version=__version__)
    write_csv(table, COLUMNS, map(_table_row, visits))


def read_visits(given: Sequence[str]) -> list[Visit]:
    """The visits of ``write_followup``, by their dates. Raises ScoatFastError and BadInputError, as it does."""
    visits = sorted(map(_visit, given), key=lambda visit: visit.date)
    if len(visits) < 2 or len({visit.date for visit in visits}) < len(visits):
        raise ScoatFastError("results of two or more different dates are wanted")
    for visit in visits[1:]:
        for name, value, first in zip(SETTINGS, _settings(visit), _settings(visits[0]), strict=True):
            if value != first:
                raise BadInputError(
                    visit.path,
                    f"the same {name} as in {visits[0].path} is wanted ({first}), got {value}: a change would be of "
                    "how they were segmented, and not of the patient",
                )
    return visits


def _settings(visit: Visit) -> tuple:
    """What an amount of opacity depends on, beside the scan."""
    report = visit.report
    return report["made_from"]["weights"], report["threshold"], report["min_mm3"]


def _visit(given: str) -> Visit:
    date, _, path = given.partition("=")
    try:
        day = datetime.date.fromisoformat(date)
    except ValueError as error:
        raise ScoatFastError(f"DATE=CASE.json is wanted with a date as 2026-01-31, got {given!r}") from error
    report = Path(path)
    if not is_report(report):
        raise BadInputError(report, "a report that scoat-fast segment wrote is wanted")
    found = json.loads(report.read_bytes())
    known = {"qc", "made_from", "statistics", "weights", "threshold", "min_mm3"} <= found.keys()
    if not known or found["statistics"].get("ml") is None:
        raise BadInputError(report, "a volume's report is wanted: this one has no mL")
    return Visit(day, report, found)


def _row(visits: Sequence[Visit], name: str) -> list[str]:
    return [number(name, visit.report["statistics"].get(name)) for visit in visits]


def _table_row(visit: Visit) -> dict:
    numbers = {name: visit.report["statistics"].get(name) for name in NUMBERS}
    changes = {"change_ml": visit.change_ml, "change_percent": visit.change_percent}
    return {"date": visit.date.isoformat(), "case": visit.report["case"], **numbers, **changes}


def cuts(visit: Visit) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """The axial and the coronal slice with the most opacity, the head up: grey values in 0..1 and mask [H, W], and the
    ratio of a pixel's height to its width; those in the middle, where there is none. Raises BadInputError.
    """
    path, facts = Path(visit.report["input"]), visit.report["made_from"]["input"]
    cases, errors = find_cases([path], visit.path.parent)
    cases = [case for case in cases if (case.path, series_of(case)) == (path, facts.get("series"))]
    if len(cases) > 1:  # an archive of volumes
        cases = [case for case in cases if case.name == visit.report["case"]]
    if not cases:
        reason = errors[0].reason if errors else "it holds other scans now"
        raise BadInputError(path, f"the input {one_line(path.name)}: {reason}")
    if unchanged(path, facts) is None:
        raise BadInputError(path, f"the input {one_line(path.name)} was changed since")
    volume = read_volume(cases[0])
    mask = read_nifti(visit.path.with_name(f"{visit.report['case']}_mask.nii.gz"), labels=True)
    turn = Turn(volume.affine)
    marked = turn.to_slices(mask_on_grid(volume, mask, may_be_full=True))
    greys = LUNG.apply(turn.to_slices(volume.voxels).astype(np.float32))
    between_slices, rows, columns = turn.spacing
    k, row = marked.shape[0] // 2, marked.shape[1] // 2
    if marked.any():
        k, row = int(marked.sum(axis=(1, 2)).argmax()), int(marked.sum(axis=(0, 2)).argmax())
    return [
        (greys[k], marked[k], rows / columns),
        (greys[::-1, row], marked[::-1, row], between_slices / columns),
    ]


def _drawn(grey: np.ndarray, mask: np.ndarray, ratio: float) -> Image.Image:
    """A slice with the contours of its mask; ``ratio`` of a pixel's height to its width."""
    size = (ACROSS, max(round(ACROSS * grey.shape[0] * ratio / grey.shape[1]), 1))
    image = Image.fromarray((grey * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    pixels = np.stack([np.asarray(image)] * 3, axis=-1)
    pixels[contour(mask, size)] = FOUND
    return Image.fromarray(pixels)


def _chart(visits: Sequence[Visit]) -> dict:
    """mL over the dates, as places in a drawing of ``WIDE`` x ``TALL``."""
    days = [visit.date.toordinal() for visit in visits]
    amounts = [visit.report["statistics"]["ml"] for visit in visits]
    top = max(amounts) or 1.0
    span = days[-1] - days[0]
    across = [EDGE + (WIDE - 2 * EDGE) * (day - days[0]) / span for day in days]
    down = [TALL - EDGE - (TALL - 2 * EDGE) * amount / top for amount in amounts]
    points = [(round(x, 1), round(y, 1), v) for x, y, v in zip(across, down, visits, strict=True)]
    return {"wide": WIDE, "tall": TALL, "floor": TALL - EDGE, "left": EDGE, "right": WIDE - EDGE, "points": points}
