"""Tables I to III of a study beside the paper's, with confidence intervals over patients and a paired test."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BadInputError, ScoatFastError
from ..files import write_text
from .metrics import METRICS
from .networks import TABLE_2, TABLE_3

RESULT = "result.json"  # of a run, in its folder
OURS = ("scoat", "bce-dice")  # what the others are compared with
LOSSES = ("mae", "iou", "bce", "dice", "focal", "bce-dice")
CONFIDENCE, RESAMPLES, SEED = 0.95, 9999, 0
MIB = 4 / 2**20  # of a float32 parameter
TITLES = {
    "fcn": "FCN", "deeplabv3": "DeepLabV3", "pspnet": "PSPNet", "attention-unet": "Attention U-Net", "unet": "U-Net",
    "unet++": "UNet++", "unet++-v1": "AttentionV1", "unet++-v2": "AttentionV2", "unet++-v3": "AttentionV3",
    "unet++-res": "UNet++, residual", "scoat": "SCOAT-Net",
    "mae": "MAE", "iou": "IoU", "bce": "BCE", "dice": "Dice", "focal": "Focal", "bce-dice": "BCE-Dice",
    "bce-dice-literal": "BCE-Dice (equation 7 as printed)",
}  # fmt: skip
# the paper's percentages, in the order of METRICS. Its VA of BCE-Dice in table I, 90.64, repeats PPV; tables II and III
# say 94.97. Attention U-Net has the same number twice, too.
PAPER = {
    "mae": (85.74, 84.97, 83.52, 91.78, 82.49, 84.77),
    "iou": (88.10, 86.36, 90.47, 94.69, 92.28, 88.17),
    "bce": (88.53, 86.85, 91.43, 94.70, 92.47, 89.93),
    "dice": (86.79, 89.24, 85.38, 90.78, 86.77, 92.30),
    "focal": (87.73, 87.28, 87.93, 93.86, 88.18, 88.96),
    "bce-dice": (89.48, 88.74, 90.64, 90.64, 93.04, 91.18),
    "fcn": (82.21, 84.07, 80.78, 93.16, 81.94, 82.18),
    "deeplabv3": (84.81, 86.32, 83.62, 93.35, 87.80, 87.95),
    "pspnet": (85.08, 84.95, 85.84, 92.40, 90.81, 86.07),
    "attention-unet": (85.64, 84.87, 86.69, 86.69, 91.70, 86.49),
    "unet": (84.72, 82.23, 87.90, 90.46, 91.48, 87.03),
    "unet++": (84.82, 83.55, 86.35, 94.09, 89.05, 84.75),
    "unet++-v1": (86.22, 85.56, 87.44, 92.96, 90.53, 87.57),
    "unet++-v2": (88.01, 87.14, 89.28, 94.70, 93.28, 90.57),
    "unet++-v3": (86.91, 84.76, 89.55, 92.38, 93.22, 89.55),
    "scoat": (89.48, 88.74, 90.64, 94.97, 93.04, 91.18),
}


@dataclass(frozen=True)
class Result:
    """Of one run: ``patients`` has, for each held-out one, the metrics and what they were counted from."""

    parameters: int
    steps: int
    seconds: float
    patients: dict[str, dict]


def write_tables(output: Path) -> None:
    """Writes ``study.json``, all results of the runs in a folder, and ``tables.md``. Raises BadInputError."""
    runs = []
    for path in sorted((output / "runs").glob(f"*/{RESULT}")):
        try:
            runs.append(json.loads(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise BadInputError(path, f"not a readable result: {error}") from error
    write_text(output / "study.json", json.dumps({"runs": runs}, indent=1) + "\n")
    write_text(output / "tables.md", tables(output / "study.json"))


def tables(path: Path) -> str:
    """The tables of a ``study.json`` as Markdown: of what was run on all folds. Raises BadInputError."""
    try:
        runs = json.loads(path.read_bytes())["runs"]
        groups = _groups(runs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInputError(path, f"not the results of a study: {error}") from error
    parts, shown = [], set()
    for title, names, key in (
        ("I: SCOAT-Net with different losses", LOSSES, lambda name: ("scoat", name)),
        ("II: networks", TABLE_2, lambda name: (name, "bce-dice")),
        ("III: attention on UNet++", TABLE_3, lambda name: (name, "bce-dice")),
    ):
        there = [name for name in names if key(name) in groups]
        if there:
            parts.append(_table(f"Table {title}", {TITLES[name]: key(name) for name in there}, groups))
            parts.append(_paper(there))
            shown |= {key(name) for name in there}
    rest = {", ".join(TITLES[name] for name in key): key for key in groups if key not in shown}
    if rest:
        parts.append(_table("In none of the paper's tables", rest, groups))
    return "\n".join(parts) if parts else "Nothing was run on all its folds yet.\n"


def _groups(runs: Sequence[dict]) -> dict[tuple[str, str], dict]:
    """By network and loss, where all folds are there: the parameters, and the patients of all folds."""
    groups: dict[tuple[str, str], dict] = {}
    for run in runs:
        group = groups.setdefault((run["network"], run["loss"]), {"folds": set(), "patients": {}, "of": run["folds"]})
        group["folds"].add(run["fold"])
        group["patients"] |= run["patients"]
        group["parameters"] = run["parameters"]
    whole = {key: group for key, group in groups.items() if len(group["folds"]) == group["of"]}
    if len({frozenset(group["patients"]) for group in whole.values()}) > 1:
        raise ValueError("its runs were judged on different patients")
    return whole


def _table(title: str, rows: dict[str, tuple[str, str]], groups: dict[tuple[str, str], dict]) -> str:
    """``rows``: what each is called, and its network and loss."""
    patients = len(groups[next(iter(rows.values()))]["patients"])
    lines = [
        f"{title}; means over {patients} held-out patients in percent, with 95 % intervals. p: that the Dice is "
        "SCOAT-Net's (BCE-Dice), by permutation of pairs.",
        "",
        "| | parameters, MiB | " + " | ".join(METRICS) + " | p |",
        "|---" * (len(METRICS) + 3) + "|",
    ]
    for label, key in rows.items():
        group = groups[key]
        cells = [_interval([row[metric] for row in group["patients"].values()]) for metric in METRICS]
        other = "-" if OURS not in groups or key == OURS else _p_value(group, groups[OURS])
        lines.append(f"| {label} | {group['parameters'] * MIB:.2f} | " + " | ".join(cells) + f" | {other} |")
    return "\n".join(lines) + "\n"


def _paper(names: Sequence[str]) -> str:
    lines = [
        "The paper's, on its private data of 19 patients: other data, not comparable.",
        "",
        "| | " + " | ".join(METRICS) + " |",
        "|---" * (len(METRICS) + 1) + "|",
    ]
    lines += [
        f"| {TITLES[name]} | " + " | ".join(f"{v:.2f}" for v in PAPER[name]) + " |" for name in names if name in PAPER
    ]
    return "\n".join(lines) + "\n"


def _interval(values: Sequence[float]) -> str:
    """The mean, and where it lies for patients drawn anew: bootstrap, bias-corrected and accelerated."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2 or len(set(values)) == 1:
        return f"{100 * mean:.1f}"
    interval = (
        _scipy()
        .bootstrap(
            (np.array(values),),
            np.mean,
            confidence_level=CONFIDENCE,
            n_resamples=RESAMPLES,
            rng=np.random.default_rng(SEED),
        )
        .confidence_interval
    )
    return f"{100 * mean:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def _p_value(group: dict, ours: dict) -> str:
    """Two-sided, of the mean difference between patients' Dice; exact where there are few patients."""
    both = sorted(group["patients"].keys() & ours["patients"].keys())
    pairs = [np.array([one["patients"][patient]["DSC"] for patient in both]) for one in (group, ours)]
    if len(both) < 2:
        return "-"
    test = _scipy().permutation_test(
        pairs, lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=RESAMPLES, rng=np.random.default_rng(SEED),
    )  # fmt: skip
    return f"{test.pvalue:.3f}" if test.pvalue >= 0.001 else "under 0.001"


def _scipy():
    try:
        from scipy import stats
    except ImportError as error:
        raise ScoatFastError("a study needs scipy: pip install 'scoat-fast[study]'") from error
    return stats
