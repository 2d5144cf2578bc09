"""The weights that ship: safetensors files with their facts, model cards and licence. Loads no heavy library."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

SUFFIX = ".safetensors"


def shipped() -> dict[str, Path]:
    """The files of the weights that come with the package, by their names."""
    files = sorted(resources.files(__name__).iterdir(), key=lambda entry: entry.name)
    return {entry.name.removesuffix(SUFFIX): Path(str(entry)) for entry in files if entry.name.endswith(SUFFIX)}


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file of this package says about itself: see ``pretrained.Pretrained``."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length))["__metadata__"]
