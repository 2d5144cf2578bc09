"""What is installed: versions, how the kernels were built, and the weights that ship. Loads no heavy library."""

from __future__ import annotations

import json
import platform
from importlib import metadata, resources

from . import __version__, weights

PACKAGES = ("torch", "triton", "numpy", "nibabel", "pydicom", "isal", "onnxruntime", "lightning-fabric")


def info() -> dict:
    """Plain data: versions, those of ``packages`` (None where missing), ``build`` (see setup.py) and ``weights``."""
    built = resources.files(__package__) / "_build.json"
    return {
        "scoat_fast": __version__,
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "build": json.loads(built.read_text()) if built.is_file() else None,
        "weights": {name: _facts(weights.metadata(path)) for name, path in weights.shipped().items()},
    }


def version_of(package: str) -> str | None:
    """The version of an installed package, None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def text(found: dict) -> str:
    """The same for people."""
    build = found["build"] or {}
    packages = (f"{name} {version or '-'}" for name, version in found["packages"].items())
    lines = [
        f"scoat_fast {found['scoat_fast']}, Python {found['python']}",
        ", ".join(packages),
        f"kernels: C++ {'yes' if build.get('extension') else 'no'}, CUDA {'yes' if build.get('cuda') else 'no'}",
    ]
    for name, facts in found["weights"].items():
        low, high = facts["window"]
        lines.append(
            f"weights {name}: width {facts['width']}, {facts['size']}x{facts['size']}, window {low:g} to {high:g} HU, "
            f"threshold {facts['threshold']:g}; {facts['licence']}"
        )
    return "\n".join(lines)


def _facts(said: dict[str, str]) -> dict:
    numbers = {name: json.loads(said[name]) for name in ("width", "size", "window", "threshold", "deep_supervision")}
    return {**numbers, "equations": said["equations"], "licence": said["licence"]}
