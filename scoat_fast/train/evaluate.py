"""How well weights do on held-out patients, slice by slice on each slice's own grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from ..segmentation.inference import Segmenter
from .data import SQUARE_PIXELS, Slice

TOTAL = "total"


def evaluate(segmenter: Segmenter, slices: Sequence[Slice], quiet: bool = False) -> dict[str, dict]:
    """Overlap with the masks, for each patient (all their pixels pooled) and in total.

    Slices go the way of ``scoat-fast segment``: resized to the network's size, back to their own grid, thresholded
    there. Ratios whose denominator is empty are None. "volume ratio" is predicted to true opacity, "false alarms"
    counts slices without opacity in which some was found.
    """
    counts: dict[str, np.ndarray] = {}
    for slice in tqdm(slices, "validating", unit="slice", leave=False, disable=True if quiet else None):
        image, truth = slice.read(segmenter.window)
        predicted = segmenter.probabilities(image[None], SQUARE_PIXELS)[0][0] > segmenter.threshold(None)
        false_alarm = predicted.any() and not truth.any()
        row = np.array([(predicted & truth).sum(), predicted.sum(), truth.sum(), 1, truth.any(), false_alarm])
        counts[slice.patient] = counts.get(slice.patient, 0) + row
    counts = dict(sorted(counts.items()))
    return {patient: _metrics(row) for patient, row in {**counts, TOTAL: sum(counts.values())}.items()}


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
