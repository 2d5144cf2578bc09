"""Predicted masks against true ones, case by case: the paper's six metrics, as a table, files, and its figure 3."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from .. import __version__
from ..errors import BadInputError, ScoatFastError, one_line
from ..files import check_output, write_csv, write_text
from ..imaging.nifti import SUFFIXES, read_nifti, stem
from ..imaging.pictures import read_mask
from ..imaging.volume import Turn, check_mask, mask_on_grid
from ..segmentation.cases import is_report
from .figures import box_plot, check_figure
from .metrics import METRICS, Counts, count, scores

MASK = "_mask"  # what segment adds to the name of a case
IN_SPACE = ("RLP 3-D", "RLR 3-D")
COLUMNS = (*METRICS, *IN_SPACE, "predicted mL", "true mL")


@dataclass(frozen=True)
class Rules:
    """How to count: see ``metrics.count`` and ``metrics.scores``."""

    empty: str = "score"
    centre_of: str = "prediction"


@dataclass(frozen=True)
class Outputs:
    """Files to write, beside the table on the terminal."""

    json: Path | None = None
    csv: Path | None = None
    figure: Path | None = None


def evaluate(predicted: Path, truth: Path, rules: Rules, outputs: Outputs, quiet: bool = False) -> bool:
    """Compares masks, prints a table and writes files; whether all cases went well.

    Args:
        predicted, truth: NIfTI volumes or pictures, or folders of such. In folders, a case is what has the same name;
            ``CASE_mask.nii.gz``, as segment writes it, is case CASE.

    A case that lacks one of its masks, or whose masks lie on different grids, is named on stderr and left out.
    """
    for path in filter(None, (outputs.json, outputs.csv, outputs.figure)):
        check_output(path)
    if outputs.figure:
        check_figure(outputs.figure)
    pairs, errors = _pairs(predicted, truth)
    cases: dict[str, dict] = {}
    counts = Counts()
    for name in tqdm(sorted(pairs), "evaluating", unit="case", leave=False, disable=True if quiet else None):
        try:
            cases[name], own = _evaluate(*pairs[name], rules)
            counts += own
        except BadInputError as error:
            errors.append(error)
    for error in errors:
        tqdm.write(f"scoat-fast: {error}", file=sys.stderr)
    if not cases:
        raise ScoatFastError("no case could be evaluated")
    totals = {"mean": mean(cases.values()), "pooled": scores(counts, rules.empty)}
    rows = [*cases.items(), *totals.items()]  # a case may be called as these are
    if outputs.json:
        found = {
            "scoat_fast": __version__,
            **asdict(rules),
            "cases": cases,
            **totals,
            "left_out": list(map(str, errors)),
        }
        write_text(outputs.json, json.dumps(found, indent=2, allow_nan=False) + "\n")
    if outputs.csv:
        write_csv(outputs.csv, ("case", *COLUMNS), [{"case": name, **row} for name, row in rows])
    if outputs.figure:
        box_plot(cases, outputs.figure)
    print(table(rows))
    return not errors


def mean(rows: Iterable[dict[str, float | None]]) -> dict[str, float | None]:
    """The mean of each number over the cases that have it."""
    rows = list(rows)
    values = {
        name: [row[name] for row in rows if row.get(name) is not None]
        for name in dict.fromkeys(name for row in rows for name in row)
    }
    return {name: math.fsum(known) / len(known) if known else None for name, known in values.items()}


def table(rows: Sequence[tuple[str, dict]]) -> str:
    """Numbers by case and name as a Markdown table; shares in percent, as in the paper."""
    columns = [name for name in COLUMNS if any(row.get(name) is not None for _, row in rows)]
    lines = ["| case | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for case, row in rows:
        values = [(row.get(name), 1 if name.endswith("mL") else 100) for name in columns]
        cells = ["-" if value is None else f"{value * scale:.2f}" for value, scale in values]
        lines.append(f"| {one_line(case)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _evaluate(predicted: Path, truth: Path, rules: Rules) -> tuple[dict[str, float | None], Counts]:
    """The numbers of a case, and its counts in 2-D."""
    report = predicted.with_name(f"{_case(predicted)}.json")
    if is_report(report) and json.loads(report.read_bytes()).get("unfinished"):
        raise BadInputError(predicted, "a run was stopped before all results were there; segment the case again")
    if _is_nifti(predicted) != _is_nifti(truth):
        raise BadInputError(predicted, f"two volumes or two pictures are wanted, got a truth named {truth.name}")
    if not _is_nifti(predicted):
        ours, theirs = read_mask(predicted)[None], read_mask(truth)[None]
        for path, mask in ((predicted, ours), (truth, theirs)):
            check_mask(path, mask)
        if ours.shape != theirs.shape:
            raise BadInputError(
                predicted, f"a mask of {theirs.shape[1:]} is wanted, as its truth, got {ours.shape[1:]}"
            )
        counts = count(ours, theirs, centre_of=rules.centre_of)
        return scores(counts, rules.empty), counts
    volume = read_nifti(predicted, labels=True)
    check_mask(predicted, volume.voxels)
    turn = Turn(volume.affine)
    ours = turn.to_slices(volume.voxels != 0)
    theirs = turn.to_slices(mask_on_grid(volume, read_nifti(truth, labels=True)))
    counts, in_space = (count(ours, theirs, dims, turn.spacing, rules.centre_of) for dims in (2, 3))
    regions = scores(in_space, rules.empty)
    ml = turn.voxel_mm3 / 1000
    return scores(counts, rules.empty) | {
        **{name: regions[name[:3]] for name in IN_SPACE},
        "predicted mL": counts.predicted * ml,
        "true mL": counts.true * ml,
    }, counts


def _pairs(predicted: Path, truth: Path) -> tuple[dict[str, tuple[Path, Path]], list[BadInputError]]:
    """The masks of each case, and what lacks its counterpart."""
    if not predicted.is_dir() and not truth.is_dir():
        return {_case(predicted): (predicted, truth)}, []
    if not (predicted.is_dir() and truth.is_dir()):
        raise ScoatFastError(f"two files or two folders are wanted, got {predicted} and {truth}")
    ours, theirs = _masks(predicted), _masks(truth)
    pairs = {name: (path, theirs[name]) for name, path in ours.items() if name in theirs}
    alone = [
        BadInputError(path, f"no truth of this name in {truth}") for name, path in ours.items() if name not in theirs
    ]
    alone += [
        BadInputError(path, f"no prediction of it in {predicted}") for name, path in theirs.items() if name not in ours
    ]
    return pairs, alone


def _masks(folder: Path) -> dict[str, Path]:
    """The masks in a folder by their cases: what segment names so, or else every volume and PNG picture."""
    try:
        files = sorted(path for path in folder.iterdir() if _is_nifti(path) or path.suffix.lower() == ".png")
    except OSError as error:
        raise BadInputError(folder, f"cannot be read: {error.strerror}") from error
    named = [path for path in files if stem(path).endswith(MASK)]
    found: dict[str, Path] = {}
    for path in named or files:
        name = _case(path)
        if name in found:
            raise BadInputError(path, f"a second mask of the case {name}, beside {found[name].name}")
        found[name] = path
    return found


def _case(path: Path) -> str:
    return stem(path).removesuffix(MASK)


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)
