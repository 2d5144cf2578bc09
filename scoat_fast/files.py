"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, TextIO

from .errors import OutputError

TEMPORARY = re.compile(r"\.scoat_fast-([0-9a-f]{8})-(\d+)-.+\.part")  # with the machine and the process of the writer
FORMULA = re.compile(r"'*[=+\-@\t\r\n]")  # how it begins, and what must not be taken for one that was made harmless
DAY = 86_400  # seconds; nothing takes so long to write


class StagedFiles:
    """Several files that become visible together, when the ``with`` block ends without an error.

    Each is written under a temporary name in its own folder, flushed to disk and renamed at the end, so that a
    killed process or a full disk never leaves a file that only looks finished; what a killed process left under
    temporary names goes away when another first writes into the folder. Raises OutputError.
    """

    def __init__(self) -> None:
        self._staged: list[tuple[Path, Path]] = []

    def __enter__(self) -> StagedFiles:
        return self

    @property
    def paths(self) -> list[Path]:
        """What was staged so far."""
        return [path for _, path in self._staged]

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of what was staged so far, by the name of the file."""
        return {path.name: temporary.stat().st_size for temporary, path in self._staged}

    def write(self, path: Path, writer: Callable[[BinaryIO], None]) -> None:
        """Stages ``path`` with what ``writer`` writes into the binary file that it is given."""
        try:
            _remove_leftovers(path.parent)
            prefix = f".scoat_fast-{_machine()}-{os.getpid()}-"  # without the name of the file, which may be 255 bytes
            handle, temporary = tempfile.mkstemp(prefix=prefix, suffix=".part", dir=path.parent)
            self._staged.append((Path(temporary), path))
            with os.fdopen(handle, "wb") as file:
                writer(file)
                file.flush()
                os.fchmod(file.fileno(), 0o666 & ~_UMASK)  # mkstemp makes private files
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(path, error.strerror or str(error)) from error

    def __exit__(self, kind, error, traceback) -> None:
        shown: list[Path] = []
        try:
            if kind is None:
                for temporary, path in self._staged:
                    try:
                        temporary.replace(path)
                        shown.append(path)
                    except OSError as failure:
                        for earlier in shown:
                            earlier.unlink()
                        raise OutputError(path, failure.strerror or str(failure)) from failure
                for folder in {path.parent for _, path in self._staged}:
                    _sync_folder(folder)
        finally:
            for temporary, _ in self._staged:
                temporary.unlink(missing_ok=True)


def write_atomically(path: str | Path, writer: Callable[[BinaryIO], None]) -> None:
    """Writes one file through a temporary one beside it. Raises OutputError."""
    with StagedFiles() as files:
        files.write(Path(path), writer)


def write_text(path: str | Path, text: str) -> None:
    """Writes one UTF-8 text file through a temporary one beside it. Raises OutputError.

    Names of files that are not UTF-8 keep their bytes.
    """
    write_atomically(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def append_text(path: Path, text: str) -> None:
    """Adds to a UTF-8 text file, flushed to disk, in one write: all of it or, where the disk is full, nothing.

    Raises OutputError.
    """
    data = text.encode(errors="surrogateescape")
    try:
        with path.open("ab", buffering=0) as file:
            written = file.write(data)
            if written < len(data):
                file.truncate(file.tell() - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Writes a table, missing values empty, through a temporary file beside it. Raises OutputError.

    Text that spreadsheets would run as a formula, such as the name of a file, has an apostrophe before it.
    """
    lines: list[str] = []
    keep = SimpleNamespace(write=lambda line: lines.append(line.removesuffix("\r\n") + "\n"))
    # before Python 3.13 a CR in text is quoted only where lines end in one
    table = csv.DictWriter(keep, columns, lineterminator="\r\n")
    table.writeheader()
    table.writerows({name: _harmless(value) for name, value in row.items()} for row in rows)
    write_text(path, "".join(lines))


def read_csv(file: TextIO) -> list[dict]:
    """The rows of a table as ``write_csv`` writes it. Raises csv.Error."""
    return [{name: _as_it_was(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _as_it_was(value):
    return value[1:] if isinstance(value, str) and value[:1] == "'" and FORMULA.match(value, 1) else value


def _harmless(value):
    if not isinstance(value, str) or not FORMULA.match(value):
        return value
    try:
        float(value)  # and no formula
    except ValueError:
        return f"'{value}"
    return value


def is_file(path: str | Path) -> bool:
    """Whether there is something to read: a pipe or a socket would keep its reader waiting."""
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except OSError:
        return True  # a link to nothing, say; whoever reads it names the reason


def check_output(path: Path) -> None:
    """Raises OutputError, before the work is done, where a file could not be written after it."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error


def make_folder(path: Path) -> Path:
    """Makes a folder and its parents. Raises OutputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error
    return path


@cache  # once a process: a folder may hold the results of thousands of scans
def _remove_leftovers(folder: Path) -> None:
    """Removes what dead processes left in a folder under temporary names; that of the living stays."""
    with os.scandir(folder) as entries:
        found = [(entry, match) for entry in entries if (match := TEMPORARY.fullmatch(entry.name))]
    for entry, (machine, process) in ((entry, match.groups()) for entry, match in found):
        with contextlib.suppress(FileNotFoundError):  # it has its name by now, or somebody else was faster
            if (machine == _machine() and not _lives(int(process))) or time.time() - entry.stat().st_mtime > DAY:
                Path(entry).unlink()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


@cache
def _machine() -> str:
    """Of where the numbers of processes mean the same as here: this start of this machine, or a container on it."""
    facts = [os.uname().nodename]
    with contextlib.suppress(OSError):  # only Linux tells more, and has containers
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256("".join(facts).encode()).hexdigest()[:8]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()  # read once: reading it means setting it, which is not safe among threads
