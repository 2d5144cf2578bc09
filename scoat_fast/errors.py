"""The errors that callers may want to catch."""

from __future__ import annotations

import re
from pathlib import Path


class ScoatFastError(Exception):
    """The base of this package's own errors; the command line prints them as one line."""


def one_line(name: str | Path) -> str:
    """The name of a file without what would break or blank a line: control characters are escaped."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], str(name))


class BadInputError(ScoatFastError, ValueError):
    """A file or folder that cannot be used: ``path`` names it, ``reason`` says what was wanted and what came."""

    def __init__(self, path: str | Path, reason: str):
        # one line, whatever a file was named and a library had to say
        self.path, self.reason = one_line(path), " ".join(reason.split())
        super().__init__(f"{self.path}: {self.reason}")


class WeightsError(BadInputError):
    """A weights file that is unknown, damaged, does not fit its network or is not safe to load."""


class OutputError(ScoatFastError, OSError):
    """A result that could not be written."""

    def __init__(self, path: str | Path, reason: str):
        self.path, self.reason = one_line(path), f"cannot be written: {reason}"
        super().__init__(f"{self.path}: {self.reason}")
