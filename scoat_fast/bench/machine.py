"""Where and with what a benchmark was run, and the file that its results go to."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path

import torch

import scoat_fast

from ..doctor import machine_facts
from ..files import write_text


def facts(device: torch.device, commit: str = "") -> dict:
    """The machine and the versions as ``doctor`` tells them, the commit ("" if not known) and the date."""
    found = machine_facts(device.type)
    if device.type == "cuda" and not found["driver"]:  # a container may not show what the kernel knows
        found["driver"] = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or None
    return {**found, "commit": commit or _commit(), "date": datetime.date.today().isoformat()}


def save(path: str | Path, result: dict) -> None:
    """Writes results as JSON, with a line for each row of a list. Raises OutputError."""
    parts = ",\n".join(f"  {json.dumps(name)}: {_lines(value)}" for name, value in result.items())
    write_text(path, f"{{\n{parts}\n}}\n")


def reason_of(failure: Exception) -> str:
    """Why a row has no number: the kind of an error and its first line."""
    return f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"


def _lines(value: object) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value, allow_nan=False)
    rows = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in value)
    return f"[\n{rows}\n  ]"


def _commit() -> str:
    """Of this package's own repository, not of one that it happens to be installed in."""
    root = Path(scoat_fast.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    git = ["git", "--no-optional-locks", "-C", str(root)]
    return _output([*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])


def _output(command: list[str]) -> str:
    """The first line that a command prints, empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]
