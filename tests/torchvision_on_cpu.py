"""torchvision beside a CPU build of torch.

Its wheel from PyPI brings operators for the CUDA build only; without their schemas it cannot be imported, nor can what
imports it. ``declare`` gives it the schemas of the two that it names at import (github.com/pytorch/vision/issues/8985).
To run a study beside such a torch: ``python tests/torchvision_on_cpu.py study DATA ...``.
"""

from __future__ import annotations

import sys
from importlib import metadata

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept = []  # a library's operators go when it does


def declare() -> None:
    """Declares the operators, unless torchvision is not there or brings its own."""
    try:
        version = metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return
    if torch.version.cuda is None and "+cpu" not in version and not _kept:
        library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            library.define(schema)
        _kept.append(library)


if __name__ == "__main__":
    from scoat_fast.cli import main

    declare()
    sys.exit(main())
