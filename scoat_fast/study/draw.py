"""The paper's figures 3 to 6, from the user's own results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from glob import escape
from pathlib import Path

import numpy as np
import torch

from ..errors import BadInputError, ScoatFastError
from ..imaging.grid import SQUARE_PIXELS, from_square, to_square
from ..imaging.pictures import read_mask
from ..imaging.window import LUNG, Window
from ..model import SCOATNet
from ..report.followup import cuts, read_visits
from ..train.data import Slice, read_index
from .figures import attention, box_plot, contours, over_time
from .metrics import METRICS
from .tables import TITLES

MAPS = ("x11", "x22", "x13")  # from the early stage to the late one, as in the paper


def figure3(results: Path, network: str, loss: str, output: Path) -> None:
    """How the metrics spread over cases. ``results``: of evaluate, or ``study.json``, of one network and loss.

    Raises BadInputError, and ScoatFastError where the study lacks these.
    """
    try:
        found = json.loads(results.read_bytes())
        runs = found.get("runs", [])
        of_study = {
            patient: row
            for run in runs
            if (run["network"], run["loss"]) == (network, loss)
            for patient, row in run["patients"].items()
        }
        cases = {
            case: {name: None if row.get(name) is None else float(row[name]) for name in METRICS}
            for case, row in (of_study if runs else found["cases"]).items()
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInputError(results, f"neither what evaluate --json wrote nor a study.json: {error}") from error
    if not cases:
        raise ScoatFastError(f"{results} has no run of {network} with {loss}")
    box_plot(cases, output)


def figure4(study: Path, data: Path, ids: Sequence[str], networks: Sequence[str], loss: str, output: Path) -> None:
    """What networks of a study found in slices that they had not been trained on, beside the truth."""
    slices = _slices(data, ids)
    pictures = {slice.id: slice.read(slice.window or LUNG) for slice in slices}
    found: dict[str, dict[str, np.ndarray]] = {}
    for network in networks:
        masks = {}
        for slice in slices:
            paths = list((study / "runs").glob(f"{network}-{loss}-fold*/predictions/{escape(slice.id)}.png"))
            if len(paths) != 1:
                raise ScoatFastError(f"{study} has {len(paths)} predictions of {network} with {loss} for {slice.id}")
            masks[slice.id] = read_mask(paths[0])
        found[TITLES.get(network, network)] = masks
    greys, truth = ({name: pair[part] for name, pair in pictures.items()} for part in (0, 1))
    contours(greys, truth, found, output)


def figure5(weights: str, data: Path, ids: Sequence[str], output: Path) -> None:
    """What a network found in slices, and its attention maps ``MAPS``. Raises BadInputError."""
    net = SCOATNet.from_pretrained(weights)
    net.deep_supervision = False
    facts = net.pretrained
    greys, truth, found, maps = {}, {}, {}, {}
    for slice in _slices(data, ids):
        grey, mask = slice.read(Window(*facts.window))
        square = to_square(torch.from_numpy(grey)[None, None], SQUARE_PIXELS, facts.size)
        with torch.no_grad():
            logits, attended = net(square.expand(-1, net.in_channels, -1, -1), return_attention=True)
        shape = (facts.size, facts.size)
        large = [torch.nn.functional.interpolate(attended[name], shape, mode="bilinear") for name in MAPS]
        answer, *each = (from_square(x, grey.shape, SQUARE_PIXELS)[0, 0].numpy() for x in (logits.sigmoid(), *large))
        greys[slice.id], truth[slice.id], maps[slice.id] = grey, mask, each
        found[slice.id] = answer > facts.threshold
    attention(greys, truth, found, maps, MAPS, output)


def figure6(given: Sequence[str], output: Path) -> None:
    """One patient over dates, axial and coronal, with mL. ``given``: as for ``report.followup.write_followup``.

    Raises BadInputError, also where an input is not there any more.
    """
    visits = read_visits(given)
    pictures = {visit.date.isoformat(): cuts(visit) for visit in visits}
    over_time(pictures, [visit.report["statistics"]["ml"] for visit in visits], output)


def _slices(data: Path, ids: Sequence[str]) -> list[Slice]:
    known = {slice.id: slice for slice in read_index(data)}
    missing = [name for name in ids if name not in known]
    if missing:
        raise ScoatFastError(f"{data} has no slice {', '.join(missing)}")
    return [known[name] for name in ids]
