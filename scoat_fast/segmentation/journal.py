"""What a run tells while it goes on: lines for people, and ``failures.jsonl`` for programs."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TextIO

from tqdm import tqdm

from ..errors import OutputError, one_line
from ..files import append_text


class Journal(Protocol):
    """Any thread may write in it."""

    def tell(self, text: str) -> None:
        """What became of a case."""

    def complain(self, text: str) -> None:
        """What is wrong with the program or its surroundings."""

    def fail(self, failure: dict, where: str) -> None:
        """A failed case: ``case, input, reason, kind``, and the path that the reason is about."""


class OpenJournal:
    """Lines go to the terminal, failures into a file as well, at once.

    Args:
        failures: the file; that of an earlier run is removed.
        quiet: tell nothing of cases that went well.
    """

    def __init__(self, failures: Path, quiet: bool):
        self._path, self._quiet, self._unwritten, self._lock = failures, quiet, "", threading.Lock()
        try:
            failures.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(failures, error.strerror or str(error)) from error

    def tell(self, text: str) -> None:
        if not self._quiet:
            say(text, sys.stdout)

    def complain(self, text: str) -> None:
        say(text, sys.stderr)

    def fail(self, failure: dict, where: str) -> None:
        with self._lock:
            self._unwritten += json.dumps(failure) + "\n"
            say(f"scoat-fast: {one_line(where)}: {failure['reason']}", sys.stderr)
            try:
                append_text(self._path, self._unwritten)
                self._unwritten = ""
            except OutputError as full:  # the table has it as well, and the exit code; the next failure tries again
                say(f"scoat-fast: {full}", sys.stderr)


@dataclass
class Notes:
    """A journal that another process reads out: ``entries`` are the names and arguments of the calls."""

    entries: list[tuple] = field(default_factory=list)

    def tell(self, text: str) -> None:
        self.entries.append(("tell", text))

    def complain(self, text: str) -> None:
        self.entries.append(("complain", text))

    def fail(self, failure: dict, where: str) -> None:
        self.entries.append(("fail", failure, where))

    def read_out(self, journal: Journal) -> None:
        for name, *arguments in self.entries:
            getattr(journal, name)(*arguments)


def say(text: str, stream: TextIO) -> None:
    """Prints a line, in the letters that the stream has. Nobody to read it is no reason to stop: files hold it all."""
    encoding = stream.encoding or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # full, closed at the other end, or closed here
        tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)
        stream.flush()
