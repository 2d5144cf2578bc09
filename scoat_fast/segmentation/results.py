"""The files of one case: what they are called, whose they are, and how they appear together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from nibabel.nifti1 import Nifti1Header
from PIL import Image

from .. import __version__
from ..errors import OutputError
from ..files import StagedFiles, is_file, write_text
from ..imaging.nifti import nifti_bytes
from ..model import ATTENTION_NODES
from .cases import Case, is_report
from .ledger import alone, other_scan, report_text

PACKING = 3  # of pictures: 2 % larger than at the usual 6, in less than half of the time
OPTIONAL = ("probability", "lungs", "seg", *(f"attention_x{i}{j}" for i, j in ATTENTION_NODES))
CSV_COLUMNS = (
    "case", "input", "status", "qc", "voxels", "mm3", "ml", "hu_mean", "hu_sd", "slices", "ground_glass_ml",
    "consolidation_ml", "other_ml", "lung_mask", "lung_ml", "share_of_lung", "right_ml", "right_share", "left_ml",
    "left_share", "warnings", "error",
)  # fmt: skip
OF_ANOTHER = "the result of another scan is there"  # in the reason of a failure


def report_path(case: Case, output: Path) -> Path:
    return output / f"{case.name}.json"


def check_free(case: Case, output: Path) -> None:
    """Raises OutputError where a result would replace a file that this program has not written."""
    report = report_path(case, output)
    for path in (report, *sorted(_there(case, output))):
        if os.path.lexists(path) and not is_report(report):
            raise OutputError(path, "a file of this name is there already, and is no result of this program")


def check_own(case: Case, output: Path, facts: dict) -> None:
    """Raises OutputError where the results of another scan would be replaced than that of ``ledger.scan_facts``."""
    report = report_path(case, output)
    if (other := other_scan(report, facts)) is not None:
        raise OutputError(report, f"{OF_ANOTHER}, {other}: remove it, or choose another folder")


def check_lists(table: Path, failures: Path) -> None:
    """Raises OutputError where the lists of a run would replace a file that this program has not written."""
    check_begins(table, b"case,input,status,")
    check_begins(failures, b'{"case": ')


def check_begins(path: Path, start: bytes) -> None:
    """Raises OutputError where a file is there that does not begin as those of this program."""
    if not is_file(path):
        raise OutputError(path, "what has this name is no file")
    try:
        with path.open("rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error
    if not (line.startswith(start) or start.startswith(line)):  # as much as was on disk when the power went
        raise OutputError(path, "a file of this name is there already, and is no result of this program")


def write_results(
    case: Case,
    output: Path,
    report: dict,
    volumes: dict[str, np.ndarray],
    header: Nifti1Header | None,
    sheet: Image.Image,
    seg: Callable[[BinaryIO], None] | None = None,
) -> dict:
    """Writes what was found in one case, the report last, and removes optional results of earlier runs.

    Files can only be renamed one by one. So a report that says ``unfinished`` comes first: whatever a killed run leaves
    is known as this program's, and taken for the results of nothing, also where some files are of an earlier run.

    Args:
        report: plain data; ``results``, the size of every other file by its name, is added.
        volumes: by kind ("mask", ...), on the grid of the input; with a ``header`` they become NIfTI, else pictures:
            of masks 0 and 255, of what lies in 0..1 eight bits.
        sheet: the overlay.
        seg: writes a DICOM SEG.

    Returns:
        The report as it was written. Raises OutputError.
    """
    stale = _there(case, output, OPTIONAL)
    with StagedFiles() as files:
        for kind, voxels in volumes.items():
            suffix = "png" if header is None else "nii.gz"
            write = _png(_grey(voxels)) if header is None else partial(_write, nifti_bytes(voxels, header))
            files.write(output / f"{case.name}_{kind}.{suffix}", write)
        if seg is not None:
            files.write(output / f"{case.name}_seg.dcm", seg)
        files.write(output / f"{case.name}_overlay.png", _png(sheet))
        report = report | {"results": files.sizes}
        files.write(report_path(case, output), partial(_write, report_text(report).encode()))
        scan = {"input": report["input"], "made_from": {"input": report["made_from"]["input"]}}
        claim = {"case": case.name, "scoat_fast": __version__, "unfinished": True, **scan}
        with alone(output):
            check_own(case, output, report["made_from"]["input"])
            write_text(report_path(case, output), report_text(claim))  # on disk, before anything is renamed
    _remove(stale - set(files.paths))
    return report


def has_stale(case: Case, output: Path, report: dict) -> bool:
    """Whether optional results are there that do not belong to a report."""
    return any(path.name not in report["results"] for path in _there(case, output, OPTIONAL))


def row_of(report: dict) -> dict:
    """A row of ``cases.csv``."""
    row = {"case": report["case"], "input": report["input"], "status": "ok", "qc": report["qc"]["status"]}
    return row | {"warnings": "; ".join(report["warnings"])} | report["statistics"]


def _there(case: Case, output: Path, kinds: Sequence[str] = ("mask", "overlay", *OPTIONAL)) -> set[Path]:
    """Those of the results of a case that are there, beside its report."""
    paths = (output / f"{case.name}_{kind}.{suffix}" for kind in kinds for suffix in ("nii.gz", "png", "dcm"))
    return {path for path in paths if os.path.lexists(path)}


def _remove(paths: set[Path]) -> None:
    """Raises OutputError where a file cannot be removed."""
    for path in sorted(paths):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(path, f"it is of an earlier run and stays: {error.strerror}") from error


def _grey(pixels: np.ndarray) -> Image.Image:
    scaled = pixels * 255 if pixels.dtype == np.uint8 else (pixels * 255).round().astype(np.uint8)
    return Image.fromarray(scaled)


def _png(picture: Image.Image):
    return partial(picture.save, format="PNG", compress_level=PACKING)


def _write(data: bytes, file) -> None:
    file.write(data)
