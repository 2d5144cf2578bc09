"""What results were made from, so that a second run does only what is missing or changed.

The ledger's row of a case is ``made_from`` in its report: it appears last of its results, whole or not at all. While
they appear, the report says ``unfinished``, and of which scan.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from ..errors import BadInputError
from ..files import is_file
from ..model import SCOATNet
from .cases import INSIDE, Case, is_report, is_result

CHUNK = 1 << 20
LISTS = re.compile(r"(cases|failures)(-\d+-of-\d+)?\.(csv|jsonl)")


def input_facts(path: Path) -> dict:
    """How many files there are, their bytes together, and digests: of where they lie, of this with what the file system
    tells of each, and of their contents.

    Of a folder, the files directly in it are meant, but for hidden ones and results. Raises BadInputError.
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
    return {**_stamp(path, files), "sha256": contents.hexdigest()}


def stamp(path: Path) -> dict:
    """The facts of ``input_facts`` that need no reading."""
    return _stamp(path, _files(path))


def is_unchanged(path: Path, facts: dict) -> bool:
    """Whether an input is that of earlier ``input_facts``: each file in the same place, of the same size and times of
    change, or else all of the same contents. Raises BadInputError.
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


def made_of(made_from: dict) -> str:
    """What is the same for equal inputs, wherever they lie, with equal weights and options."""
    contents = {name: what["sha256"] if isinstance(what, dict) else what for name, what in made_from.items()}
    return json.dumps(contents, sort_keys=True)


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


def scan_facts(case: Case) -> dict:
    """``input_facts`` of a case, and the UID of its series where it is one of several. Raises BadInputError."""
    within = case.series if case.kind == "dicom" else (case.series or "").partition(INSIDE)[2]
    return input_facts(case.path) | {"series": within or None}


def other_scan(report: Path, facts: dict) -> str | None:
    """The input of a report, or of a run that writes one, if that is another scan than that of ``scan_facts``."""
    try:
        found = json.loads(report.read_bytes())
        made = found["made_from"]["input"]
        moved = made.get("place", _place(Path(found["input"]))) != facts["place"]
        both = {made.get("series"), facts["series"]} - {None}
        return found["input"] if len(both) > 1 or (moved and made["sha256"] != facts["sha256"]) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # no report, or none that says: it is the result of nothing


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    try:
        return sorted(file for file in path.iterdir() if (file.is_file() or file.is_symlink()) and not _is_ours(file))
    except OSError as error:
        raise BadInputError(path, f"cannot be read: {error.strerror}") from error


def _is_ours(file: Path) -> bool:
    """Whether a file is what this program leaves in a folder of results, or hidden: no part of a scan."""
    if file.name.startswith(".") or LISTS.fullmatch(file.name):
        return True
    return is_result(file) or (file.suffix == ".json" and is_report(file))


def _stamp(path: Path, files: list[Path]) -> dict:
    try:
        states = [(file.name, file.stat()) for file in files]
    except OSError as error:
        raise BadInputError(error.filename, f"cannot be read: {error.strerror}") from error
    place = _place(path)
    # nobody can set the second time: what archives unpack has the first one that they tell
    stamps = [[name, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino] for name, state in states]
    return {
        "files": len(files),
        "bytes": sum(state.st_size for _, state in states),
        "place": place,
        "stamp": hashlib.sha256(json.dumps([place, stamps]).encode()).hexdigest(),
    }


def _place(path: Path) -> str:
    """A digest of a path, which may name a patient; links stay links, so that they may lead to a corrected scan."""
    return hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()  # noqa: PTH100 (resolve follows links)
