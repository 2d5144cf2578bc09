"""Files in, files out: the ``segment`` command."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from .. import __version__
from ..errors import BadInputError, OutputError, ScoatFastError, one_line
from ..imaging.files import StagedFiles, is_file, make_folder, write_csv
from ..imaging.grid import SQUARE_PIXELS
from ..imaging.nifti import nifti_bytes, read_nifti
from ..imaging.pictures import check_windowed, read_mask, read_picture
from ..imaging.volume import Turn, Volume, mask_on_grid
from ..model import ATTENTION_NODES
from .cases import Case, find_cases, is_report, read_volume
from .inference import Segmenter
from .overlay import contact_sheet
from .statistics import check_min_mm3, measure

NOTE = "research only, not for clinical use"
OPTIONAL = ("probability", *(f"attention_x{i}{j}" for i, j in ATTENTION_NODES))
CSV_COLUMNS = (
    "case", "input", "status", "voxels", "mm3", "ml", "hu_mean", "hu_sd", "slices", "lung_ml", "share_of_lung",
    "warnings", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to do with every case, beside what the weights say."""

    threshold: float | None = None
    min_mm3: float = 0.0
    lung: Path | None = None  # a mask, or a folder of masks named as the cases
    save_probabilities: bool = False
    save_attention: bool = False
    quiet: bool = False


def segment_files(inputs: Sequence[str | Path], output: Path, segmenter: Segmenter, options: Options) -> bool:
    """Segments every case that ``inputs`` hold into the folder ``output``; whether all went well.

    A case that fails is named on standard error with its reason, and the others go on. ``cases.csv`` lists them all.
    Raises OutputError if the folder cannot be made, ScoatFastError for an option out of range.
    """
    segmenter.threshold(options.threshold)
    check_min_mm3(options.min_mm3)
    if options.lung is not None and not options.lung.exists():
        raise BadInputError(options.lung, "no such lung mask or folder of lung masks")
    make_folder(output)
    _check_table(output / "cases.csv")
    cases, errors = find_cases(inputs, output)
    rows = [_failed("", str(error.path), error.reason) for error in errors]
    for error in errors:
        _say(f"scoat-fast: {error}", sys.stderr)
    bar = tqdm(cases, unit="case", disable=True if options.quiet or len(cases) < 2 else None)
    try:
        for case in bar:
            rows.append(_attempt(case, output, segmenter, options))
    finally:
        write_csv(output / "cases.csv", CSV_COLUMNS, rows)
    return all(row["status"] == "ok" for row in rows)


def _attempt(case: Case, output: Path, segmenter: Segmenter, options: Options) -> dict:
    segment_one = _segment_picture if case.kind == "picture" else _segment_volume
    try:
        _check_free(case, output)
        stale = _results(case, output, OPTIONAL)
        report = segment_one(case, output, segmenter, options)
        _remove(stale - set(report.pop("files")))  # of an earlier run with other options
    except (BadInputError, OutputError) as error:
        return _complain(case, error.path, error.reason)
    except ScoatFastError as error:
        return _complain(case, str(case.path), str(error))
    except Exception as error:  # one case must never cost the others; its traceback is not lost
        traceback.print_exc()
        return _complain(case, str(case.path), f"unexpected {type(error).__name__}: {error}")
    if not options.quiet:
        _say(_line(report), sys.stdout)
    row = {"case": case.name, "input": str(case.path), "status": "ok", "warnings": "; ".join(report["warnings"])}
    return row | report["statistics"]


def _check_free(case: Case, output: Path) -> None:
    """Raises OutputError where a result would replace a file that this program has not written."""
    report = output / f"{case.name}.json"
    for path in (report, *sorted(_results(case, output))):
        if os.path.lexists(path) and not is_report(report):
            raise OutputError(path, "a file of this name is there already, and is no result of this program")


def _check_table(path: Path) -> None:
    """Raises OutputError where ``cases.csv`` is somebody else's."""
    if not is_file(path):
        raise OutputError(path, "what has this name is no file")
    try:
        with path.open("rb") as file:
            ours = file.readline().strip() == ",".join(CSV_COLUMNS).encode()
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error
    if not ours:
        raise OutputError(path, "a file of this name is there already, and is no result of this program")


def _results(case: Case, output: Path, kinds: Sequence[str] = ("mask", "overlay", *OPTIONAL)) -> set[Path]:
    """Those of the results of a case that are there, beside its report."""
    paths = (output / f"{case.name}_{kind}.{suffix}" for kind in kinds for suffix in ("nii.gz", "png"))
    return {path for path in paths if os.path.lexists(path)}


def _remove(paths: set[Path]) -> None:
    """Raises OutputError where a file cannot be removed."""
    for path in sorted(paths):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(path, f"it is of an earlier run and stays: {error.strerror}") from error


def _segment_volume(case: Case, output: Path, segmenter: Segmenter, options: Options) -> dict:
    volume = read_volume(case)
    lung, warnings = _lung_volume(case, volume, options.lung)
    found = segmenter.segment(
        volume.voxels,
        affine=volume.affine,
        lung=lung,
        threshold=options.threshold,
        min_mm3=options.min_mm3,
        attention=options.save_attention,
        name=str(case.path),
        quiet=options.quiet,
    )
    turn = Turn(volume.affine)
    report = _report(case, segmenter, options, [*volume.warnings, *warnings, *found.warnings], found.statistics)
    report["shape"], report["spacing_mm"] = list(volume.voxels.shape), [round(mm, 6) for mm in turn.spacing]
    greys = segmenter.window.apply(turn.to_slices(volume.voxels))
    sheet = contact_sheet(greys, turn.to_slices(found.mask), turn.spacing[1:], _title(report))
    with StagedFiles() as files:
        volumes = {"mask": found.mask}
        if options.save_probabilities:
            volumes["probability"] = found.probabilities
        volumes |= {f"attention_{name}": maps for name, maps in found.attention.items()}
        for name, voxels in volumes.items():
            data = nifti_bytes(voxels, volume.header)
            files.write(output / f"{case.name}_{name}.nii.gz", partial(_write, data))
        _write_report(files, output, case, sheet, report)
    return report | {"files": files.paths}


def _segment_picture(case: Case, output: Path, segmenter: Segmenter, options: Options) -> dict:
    grey = read_picture(case.path)
    check_windowed(case.path, grey)
    warnings = []
    if options.min_mm3:
        warnings.append("a picture has no pixel size: small regions were kept")
    lung_path = _lung_path(case, options.lung, (".png",))
    lung = None
    if options.lung and lung_path is None:
        warnings.append("no lung mask for this case")
    if lung_path is not None:
        lung = read_mask(lung_path)[None]
        if lung.shape[1:] != grey.shape:
            raise BadInputError(
                lung_path, f"a lung mask of {grey.shape} is wanted, as the picture, got {lung.shape[1:]}"
            )
    probabilities, maps = segmenter.probabilities(grey[None], SQUARE_PIXELS, options.save_attention)
    mask = (probabilities > segmenter.threshold(options.threshold)).astype(np.uint8)
    report = _report(case, segmenter, options, warnings, measure(mask, lung=lung))
    report["shape"], report["spacing_mm"] = list(grey.shape), None
    sheet = contact_sheet(grey[None], mask, SQUARE_PIXELS, _title(report))
    with StagedFiles() as files:
        saved = {"mask": mask[0] * 255}
        if options.save_probabilities:
            saved["probability"] = (probabilities[0] * 255).round().astype(np.uint8)
        saved |= {f"attention_{name}": (map[0] * 255).round().astype(np.uint8) for name, map in maps.items()}
        for name, pixels in saved.items():
            files.write(output / f"{case.name}_{name}.png", partial(_write_png, Image.fromarray(pixels)))
        _write_report(files, output, case, sheet, report)
    return report | {"files": files.paths}


def _write_report(files: StagedFiles, output: Path, case: Case, sheet: Image.Image, report: dict) -> None:
    files.write(output / f"{case.name}_overlay.png", partial(_write_png, sheet))
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    files.write(output / f"{case.name}.json", partial(_write, text.encode()))


def _report(case: Case, segmenter: Segmenter, options: Options, warnings: list[str], statistics: dict) -> dict:
    return {
        "case": case.name,
        "input": str(case.path),
        "note": NOTE,
        "scoat_fast": __version__,
        "weights": segmenter.pretrained.name,
        "threshold": segmenter.threshold(options.threshold),
        "min_mm3": options.min_mm3,
        "warnings": warnings,
        "statistics": statistics,
    }


def _title(report: dict) -> str:
    numbers = report["statistics"]
    amount = f"{numbers['voxels']} pixels" if numbers["ml"] is None else f"{numbers['ml']:.1f} mL"
    return f"{one_line(report['case'])}: {amount} opacity. {NOTE}"


def _line(report: dict) -> str:
    name, numbers = one_line(report["case"]), report["statistics"]
    if numbers["ml"] is None:
        text = f"{name}: {numbers['voxels']} pixels of opacity"
    else:
        text = f"{name}: {numbers['ml']:.1f} mL of opacity in {numbers['slices']} slices"
    return text + "".join(f"\n  warning: {warning}" for warning in report["warnings"])


def _lung_volume(case: Case, volume: Volume, lung: Path | None) -> tuple[np.ndarray | None, list[str]]:
    path = _lung_path(case, lung, (".nii.gz", ".nii"))
    if path is None:
        return None, ["no lung mask for this case"] if lung else []
    return mask_on_grid(volume, read_nifti(path, labels=True), may_be_full=True), []  # a crop may lie within the lung


def _lung_path(case: Case, lung: Path | None, suffixes: Sequence[str]) -> Path | None:
    """The lung mask of a case: the file that was given, or the one with the case's name in the folder."""
    if lung is None or not lung.is_dir():
        return lung
    return next((path for suffix in suffixes if (path := lung / f"{case.name}{suffix}").exists()), None)


def _complain(case: Case, path: str, reason: str) -> dict:
    _say(f"scoat-fast: {one_line(path)}: {reason}", sys.stderr)
    return _failed(case.name, str(case.path), reason)


def _say(text: str, stream: TextIO) -> None:
    """Prints a line, in the letters that the stream has. Nobody to read it is no reason to stop: files hold it all."""
    encoding = stream.encoding or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # full, closed at the other end, or closed here
        tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)
        stream.flush()


def _failed(name: str, path: str, reason: str) -> dict:
    return {"case": name, "input": path, "status": "failed", "error": reason}


def _write(data: bytes, file) -> None:
    file.write(data)


def _write_png(picture: Image.Image, file) -> None:
    picture.save(file, "PNG")
