"""What ``scoat-fast doctor`` found out of bounds on this machine, and so switched off.

The verdict is a file in the user's cache, by machine and versions: after an update it no longer holds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import __version__
from ..errors import ScoatFastError

_suspended = False


def path() -> Path:
    """The file: a dict from ``machine()`` to one from "operation.implementation" to the reason."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "scoat_fast" / "doctor.json"


def machine(device: str | torch.device) -> str:
    """What a verdict on kernels for ``device`` depends on; "cuda" is the current GPU."""
    device = torch.device(device)
    if device.type == "cuda":
        parts = [torch.cuda.get_device_name(device), torch.version.cuda]
    else:
        parts = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    return " / ".join(map(str, [*parts, f"torch {torch.__version__}", f"scoat_fast {__version__}"]))


def reason(op: str, implementation: str) -> str | None:
    """Why an implementation is switched off here, or None."""
    if _suspended:
        return None
    return _load("cpu" if implementation == "cpu" else "cuda").get(f"{op}.{implementation}")


@functools.cache
def _load(device: str) -> dict[str, str]:
    if device == "cuda" and not torch.cuda.is_available():
        return {}
    return read().get(machine(device), {})


def read() -> dict[str, dict[str, str]]:
    """All verdicts. Raises ScoatFastError for a file that cannot be read: what it switched off is not known then."""
    file = path()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ScoatFastError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        verdicts = json.loads(text)
        if all(isinstance(found, dict) for found in verdicts.values()):
            return verdicts
    except (ValueError, AttributeError):
        pass
    raise ScoatFastError(f"{file}: damaged; run scoat-fast doctor, which writes it anew")


def forget() -> None:
    """Reads the file anew when it is next needed."""
    _load.cache_clear()


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Within, nothing is switched off by a verdict: for the doctor, who judges anew."""
    global _suspended
    _suspended = True
    try:
        yield
    finally:
        _suspended = False
