"""What results were made from, so that a second run does only what is missing or changed.

The ledger's row of a case is ``made_from`` in its report: it appears last of its results, whole or not at all. While
they appear, the report says ``unfinished`` and has no such row.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from ..errors import BadInputError
from ..files import is_file
from ..model import SCOATNet

CHUNK = 1 << 20


def input_facts(path: Path) -> dict:
    """How many files there are, their bytes together, a digest of their sizes and times, and one of their contents.

    Of a folder, the files directly in it are meant. Raises BadInputError.
    """
    files = _files(path)
    contents = hashlib.sha256()
    for file in files:
        contents.update(f"{len(os.fsencode(file.name))} ".encode() + os.fsencode(file.name))
        if not is_file(file):  # a pipe would keep its reader waiting; who wants the contents says what is wrong
            continue
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(CHUNK):
                    contents.update(chunk)
        except OSError as error:
            raise BadInputError(file, f"cannot be read: {error.strerror}") from error
    return {**_stamp(files), "sha256": contents.hexdigest()}


def stamp(path: Path) -> dict:
    """The facts of ``input_facts`` that need no reading."""
    return _stamp(_files(path))


def is_unchanged(path: Path, facts: dict) -> bool:
    """Whether an input is that of earlier ``input_facts``: each file of the same size and time of change, or else all
    of the same contents. Raises BadInputError.
    """
    return stamp(path).items() <= facts.items() or input_facts(path)["sha256"] == facts["sha256"]


def network_digest(net: SCOATNet) -> str:
    """Of a network's weights, and of how they are used."""
    digest = hashlib.sha256(repr(net.pretrained).encode())
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode() + str(value.dtype).encode())
        digest.update(value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def options_digest(options: dict) -> str:
    """Of options that change results, as plain data."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()


def finished(report: Path, inputs: dict[str, Path], weights: str, options: str) -> dict | None:
    """The report of a case, if all its results are there and were made from the same; None if it is to be done.

    ``inputs``, by their names in the ledger, are the same where ``is_unchanged`` says so.
    """
    try:
        found = json.loads(report.read_bytes())
        made, results = found["made_from"], found["results"]
        if (made["weights"], made["options"]) != (weights, options):
            return None
        if any((report.parent / name).stat().st_size != size for name, size in results.items()):
            return None
        same = all(is_unchanged(path, made[name]) for name, path in inputs.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadInputError):
        return None  # whatever it is, it is no report of ours that is whole: the case is done anew, and says what fails
    return found if same else None


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    try:
        return sorted(file for file in path.iterdir() if file.is_file() or file.is_symlink())
    except OSError as error:
        raise BadInputError(path, f"cannot be read: {error.strerror}") from error


def _stamp(files: list[Path]) -> dict:
    try:
        states = [(file.name, file.stat()) for file in files]
    except OSError as error:
        raise BadInputError(error.filename, f"cannot be read: {error.strerror}") from error
    stamps = [[name, state.st_size, state.st_mtime_ns] for name, state in states]
    return {
        "files": len(files),
        "bytes": sum(state.st_size for _, state in states),
        "stamp": hashlib.sha256(json.dumps(stamps).encode()).hexdigest(),
    }
