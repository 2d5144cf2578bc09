"""Whether a result can be trusted: what the scan and the mask themselves say about that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..imaging.volume import Turn

COVERAGE_MM = 150.0  # lungs of adults are 200 to 300 mm high
GAP_MM = 10.0  # between slices; what lies between them is not seen
# of [slices, H, W]: where each slice ends, as a radiologist sees it
SIDES = {"front": np.s_[..., 0, :], "back": np.s_[..., -1, :], "right": np.s_[..., 0], "left": np.s_[..., -1]}
OBLIQUE = 15.0  # degrees between the slices' axes and the patient's
MOST = 0.5  # of the voxels; more cannot be lung


def assess(mask: np.ndarray, turn: Turn | None, warnings: Sequence[str], has_lungs: bool = True) -> dict:
    """``status`` "pass", "warn" or "fail", and the ``reasons``: the warnings about the input, and what the mask shows.

    Args:
        mask: [slices, H, W], slices from the feet up.
        turn: the place of its volume in space; None for a picture.
        warnings: what was noticed so far.
        has_lungs: whether lungs were found in the scan.
    """
    reasons, failures = list(warnings), []
    if turn is not None:
        gap, *_ = turn.spacing
        height = gap * len(mask)
        if height < COVERAGE_MM:
            reasons.append(f"the scan covers {height:.0f} mm from feet to head: parts of the lungs may be missing")
        if gap > GAP_MM:
            reasons.append(f"the slices are {gap:.1f} mm apart: what lies between them is not seen")
        if (angle := turn.oblique) > OBLIQUE:
            reasons.append(f"the slices lie {angle:.0f} degrees from the patient's axes: the weights know none such")
        ends = [name for name, k in (("lowest", 0), ("highest", -1)) if len(mask) > 1 and mask[k].any()]
        if ends:
            reasons.append(f"opacity reaches the {' and the '.join(ends)} slice: it may go on outside the scan")
    # lungs lie within a whole slice: where opacity reaches its edge, the field of view or a crop has cut them
    if sides := [name for name, place in SIDES.items() if mask[place].any()]:
        reasons.append(f"opacity reaches the {' and the '.join(sides)} edge of slices: it may go on outside them")
    if (share := np.count_nonzero(mask) / mask.size) > MOST:
        failures.append(f"{share:.0%} of all voxels are marked as opacity: this is no segmentation of lungs")
    if turn is not None and not has_lungs and not share:
        failures.append("neither lungs nor opacity were found: this says nothing about the patient")
    status = "fail" if failures else "warn" if reasons else "pass"
    return {"status": status, "reasons": failures + reasons}
