"""A page for each case of a folder of results, and one for all of them."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image
from tqdm import tqdm

from .. import __version__
from ..errors import BadInputError, one_line
from ..files import make_folder, read_csv
from ..imaging.nifti import read_nifti
from ..imaging.volume import Turn
from ..segmentation.cases import is_report
from ..segmentation.results import OF_ANOTHER
from .pages import picture, rows_of, write_page

THUMB, SHEET, MAP = 160, 1200, 420  # pixels across
HEAT = np.array([[0, 0, 8], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], float)  # dark to bright


@dataclass
class Entry:
    """A case of a folder of results: its report, or why there is none."""

    name: str
    input: str
    report: dict | None = None
    error: str = ""
    page: str = ""
    thumb: str = ""
    numbers: dict = field(default_factory=dict)

    @property
    def status(self) -> str:
        return "failed" if self.error else self.report["qc"]["status"]

    @property
    def reasons(self) -> list[str]:
        return [self.error] if self.error else self.report["qc"]["reasons"]


def write_report(results: Path, output: Path, full_paths: bool = False, quiet: bool = False) -> bool:
    """Writes ``output/index.html`` and ``output/cases/CASE.html`` for what ``scoat-fast segment`` left in ``results``.

    Args:
        full_paths: show where inputs lie, not only what they are called.

    Returns:
        Whether every case that did not fail before has a whole page.

    Raises:
        BadInputError: if there are no results. OutputError: for a file of somebody else, or one that cannot be written.
    """
    entries = list(_entries(results, full_paths))
    if not entries:
        raise BadInputError(results, "no results of scoat-fast segment are in it")
    make_folder(output / "cases")
    whole = True
    for entry in tqdm(entries, unit="case", disable=True if quiet else None):
        doubts = []
        write_page(output / "cases" / f"{entry.name}.html", "case.html", **_case_page(results, entry, doubts))
        entry.page = f"cases/{quote(os.fsencode(entry.name))}.html"
        if entry.report is not None and not entry.error:
            entry.numbers = entry.report["statistics"]
        entry.report = entry.report and {"qc": entry.report["qc"]}  # the rest is on its page
        for doubt in doubts:
            print(f"scoat-fast: {doubt}", file=sys.stderr)
            whole = False
    counts = Counter(entry.status for entry in entries)
    shown = [(status, counts[status]) for status in ("pass", "warn", "fail", "failed") if counts[status]]
    entries.sort(key=lambda entry: (-(entry.numbers.get("ml") or -1), entry.name))
    write_page(output / "index.html", "cohort.html", cases=entries, counts=shown, version=__version__)
    return whole


def _entries(results: Path, full_paths: bool) -> Iterator[Entry]:
    """The cases of the tables, and of the reports that no table names. What several tables name, the latest tells.

    A scan is left out under the name that it had before another one of that name joined it.
    """
    seen, told, scans = set(), set(), set()  # names, names with inputs, scans
    try:
        tables = sorted(results.glob("cases*.csv"), key=lambda path: (-path.stat().st_mtime_ns, path.name))
    except OSError as error:
        raise BadInputError(results, f"cannot be read: {error}") from error
    for table in tables:
        try:
            with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                rows = [row for row in read_csv(file) if row.get("case")]
        except (OSError, csv.Error) as error:
            raise BadInputError(table, f"cannot be read: {error}") from error
        for row in rows:
            if Path(row["case"]).name != row["case"]:
                raise BadInputError(table, f"a case that is called {one_line(row['case'])}: no table of this program")
            settled = (row["case"], row.get("input")) in told
            told.add((row["case"], row.get("input")))
            if OF_ANOTHER in (row.get("error") or ""):
                if not settled:
                    yield Entry(f"{row['case']} (not done)", _shown(row["input"], full_paths), error=row["error"])
            elif row["case"] not in seen:
                seen.add(row["case"])
                entry = _entry(results / f"{row['case']}.json", row["case"], row, full_paths)
                scans.add(_scan(entry))
                yield entry
    reports = [path for path in sorted(results.glob("*.json")) if path.stem not in seen and is_report(path)]
    for path in sorted(reports, key=os.path.getmtime, reverse=True):
        entry = _entry(path, path.stem, {}, full_paths)
        if _scan(entry) is None or _scan(entry) not in scans:
            scans.add(_scan(entry))
            yield entry


def _scan(entry: Entry) -> tuple | None:
    """Where the scan of a report lies, if it has one that says so."""
    try:
        made = entry.report["made_from"]["input"]
        return made["place"], made["series"]
    except (KeyError, TypeError):
        return None


def _entry(path: Path, name: str, row: dict, full_paths: bool) -> Entry:
    entry = Entry(name, _shown(row.get("input") or "", full_paths))
    if row.get("status", "ok") != "ok":
        entry.error = row.get("error") or "failed"
        return entry
    try:
        report = json.loads(path.read_bytes())
        if report.get("unfinished"):
            raise ValueError("it says that a run was stopped before all results were there; segment the case again")
        if not is_report(path) or not {"status", "reasons"} <= report["qc"].keys():
            raise ValueError("it is no report of this version")
        entry.input, entry.report = _shown(report["input"], full_paths), report
        rows_of(report["statistics"])  # every number can be shown
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        entry.error, entry.report = f"its report is missing or damaged: {error}", None
    return entry


def _shown(path: str, full: bool) -> str:
    return one_line(path if full else Path(path).name)


def _case_page(results: Path, entry: Entry, doubts: list[str]) -> dict:
    """What the page of a case shows; what is damaged is added to ``doubts``."""
    values = {"case": entry.name, "input": entry.input, "report": None, "error": entry.error, "version": __version__}
    if entry.error:
        if entry.error.startswith("its report"):
            doubts.append(f"{one_line(results / entry.name)}.json: {entry.error}")
        return values
    report = entry.report
    sheet = no_sheet = ""
    try:
        with Image.open(results / f"{entry.name}_overlay.png") as image:
            sheet, entry.thumb = picture(image, SHEET), picture(image, THUMB)
    except (OSError, ValueError, SyntaxError) as error:
        no_sheet = "The picture of this case is missing or damaged."
        doubts.append(f"{one_line(results / entry.name)}_overlay.png: {error}")
    maps = []
    try:
        maps = _attention(results, entry.name)
    except BadInputError as error:
        doubts.append(str(error))
    spacing = report.get("spacing_mm")
    millimetres = "\u2013" if spacing is None else " \u00d7 ".join(f"{mm:g}" for mm in spacing) + " mm"
    made = [
        ("Weights", report["weights"]),
        ("Threshold of the probability", f"{report['threshold']:g}"),
        ("Regions left out below", f"{report['min_mm3']:g} mm\u00b3"),
        ("Grid", " \u00d7 ".join(map(str, report["shape"]))),
        ("Spacing: slices, rows, columns", millimetres),
        ("scoat_fast", report["scoat_fast"]),
    ]
    return values | {
        "report": True,
        "status": entry.status,
        "reasons": entry.reasons,
        "rows": rows_of(report["statistics"]),
        "made": made,
        "sheet": sheet,
        "no_sheet": no_sheet,
        "maps": maps,
    }


def _attention(results: Path, name: str) -> list[tuple[str, str]]:
    """Attention maps of the slice with the most opacity, in colours, where they were saved. Raises BadInputError."""
    paths = sorted(results.glob(f"{_literal(name)}_attention_x??.*"))
    if not paths:
        return []
    if paths[0].suffix == ".png":
        return [(path.stem[-3:], picture(_coloured(_grey(path)), MAP)) for path in paths]
    mask = read_nifti(results / f"{name}_mask.nii.gz")
    turn = Turn(mask.affine)
    k = int(turn.to_slices(mask.voxels).sum(axis=(1, 2)).argmax())
    rows, columns = turn.spacing[1:]
    found = []
    for path in paths:
        map = turn.to_slices(read_nifti(path).voxels)[k]
        image = _coloured(map)
        tall = max(round(image.width * map.shape[0] * rows / (map.shape[1] * columns)), 1)
        found.append((path.name.removesuffix(".nii.gz")[-3:], picture(image.resize((image.width, tall)), MAP)))
    return found


def _grey(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"), float) / 255
    except (OSError, ValueError, SyntaxError) as error:
        raise BadInputError(path, f"not a readable picture: {error}") from error


def _coloured(map: np.ndarray) -> Image.Image:
    """Values in 0..1 as colours, 0 dark and 1 bright."""
    place = np.linspace(0, 1, len(HEAT))
    return Image.fromarray(np.stack([np.interp(map, place, HEAT[:, c]) for c in range(3)], -1).round().astype(np.uint8))


def _literal(name: str) -> str:
    """A name for ``glob``, whose signs mean themselves."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)
