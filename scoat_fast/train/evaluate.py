"""How well weights do on held-out patients, slice by slice on each slice's own grid."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import ScoatFastError
from ..files import write_atomically
from ..imaging.grid import SQUARE_PIXELS
from ..segmentation.inference import Segmenter
from ..segmentation.overlay import contact_sheet
from .data import Slice, can_name_a_file

TOTAL = "total"


def evaluate(
    segmenter: Segmenter, slices: Sequence[Slice], quiet: bool = False, overlays: Path | None = None
) -> dict[str, dict]:
    """Overlap with the masks, for each patient (all their pixels pooled) and in total.

    Slices go the way of ``scoat-fast segment``: resized to the network's size, back to their own grid, thresholded
    there. Ratios whose denominator is empty are None. "volume ratio" is predicted to true opacity, "false alarms"
    counts slices without opacity in which some was found. With ``overlays``, a contact sheet of each patient goes
    into that folder: the masks in red, what was found in cyan. Raises ScoatFastError for a patient called "total", and
    with ``overlays`` for one whose name cannot be that of a file.
    """
    patients = sorted({slice.patient for slice in slices})
    if TOTAL in patients:
        raise ScoatFastError(f"a patient cannot be called {TOTAL!r}, which is the row of all of them")
    unfit = [patient for patient in patients if overlays is not None and not can_name_a_file(patient)]
    if unfit:
        raise ScoatFastError(f"patient {unfit[0]!r}: a name is wanted that can be the name of a file")
    counts: dict[str, np.ndarray] = {}
    with tqdm(slices, "validating", unit="slice", leave=False, disable=True if quiet else None) as bar:
        for patient in patients:
            seen = []
            for slice in (slice for slice in slices if slice.patient == patient):
                image, truth = slice.read(segmenter.window)
                found = segmenter.mask(image[None], SQUARE_PIXELS)[0].astype(bool)
                counts[patient] = counts.get(patient, 0) + _count(found, truth)
                if overlays is not None:
                    seen.append((image, found, truth))
                bar.update()
            if overlays is not None:
                metrics = _metrics(counts[patient])
                dice = "-" if metrics["Dice"] is None else f"{metrics['Dice']:.2f}"
                title = f"{patient}: Dice {dice}; red: radiologist, cyan: {segmenter.pretrained.name}"
                image, found, truth = map(_stacked, zip(*seen, strict=True))
                sheet = contact_sheet(image, found, SQUARE_PIXELS, title, truth)
                write_atomically(overlays / f"{patient}.png", partial(sheet.save, format="PNG"))
    return {patient: _metrics(row) for patient, row in {**counts, TOTAL: sum(counts.values())}.items()}


def _stacked(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures [H, W] as [N, H, W], black beyond what the smaller ones have."""
    height, width = np.max([picture.shape for picture in pictures], axis=0)
    return np.stack([np.pad(x, ((0, height - x.shape[0]), (0, width - x.shape[1]))) for x in pictures])


def _count(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    false_alarm = found.any() and not truth.any()
    return np.array([(found & truth).sum(), found.sum(), truth.sum(), 1, truth.any(), false_alarm])


def table(metrics: dict[str, dict]) -> str:
    """The metrics as a Markdown table."""
    columns = list(next(iter(metrics.values())))
    lines = ["| patient | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for patient, row in metrics.items():
        cells = ["-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append(f"| {patient} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _metrics(row: np.ndarray) -> dict:
    overlap, predicted, truth, slices, positive, alarms = (int(count) for count in row)
    return {
        "slices": slices,
        "with opacity": positive,
        "Dice": 2 * overlap / (predicted + truth) if predicted + truth else None,
        "sensitivity": overlap / truth if truth else None,
        "precision": overlap / predicted if predicted else None,
        "volume ratio": predicted / truth if truth else None,
        "false alarms": alarms,
    }
