"""What results were made from, so that a second run does only what is missing or changed.

The ledger's row of a case is ``made_from`` in its report: it appears last of its results, whole or not at all. While
they appear, the report says ``unfinished``, and of which scan.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import BadInputError, OutputError
from ..files import is_file, write_text
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
    stamped = _stamp(path, files)  # before they are read: what changes then has another one
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
    return {**stamped, "sha256": contents.hexdigest()}


def unchanged(path: Path, facts: dict) -> dict | None:
    """Earlier ``input_facts``, as they are now, if an input is the same: each file in the same place, of the same size
    and times of change, or else all of the same contents. Raises BadInputError.
    """
    now = _stamp(path, _files(path))
    if now["stamp"] == facts.get("stamp"):
        return facts
    return facts | now if input_facts(path)["sha256"] == facts["sha256"] else None


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

    ``inputs``, by their names in the ledger, are the same where ``unchanged`` says so; what was moved or touched since
    is noted in the report. Raises OutputError.
    """
    try:
        data = report.read_bytes()
        found = json.loads(data)
        made, results = found["made_from"], found["results"]
        if (made["weights"], made["options"]) != (weights, options):
            return None
        if any((report.parent / name).stat().st_size != size for name, size in results.items()):
            return None
        facts = {name: unchanged(path, made[name]) for name, path in inputs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadInputError):
        return None  # whatever it is, it is no report of ours that is whole: the case is done anew, and says what fails
    if None in facts.values():
        return None
    place = place_of(inputs["input"])
    if found.get("input") != place or any(made[name] != what for name, what in facts.items()):
        found |= {"input": place, "made_from": made | facts}
        with alone(report.parent):
            if report.read_bytes() == data:  # else another run does this case now
                write_text(report, report_text(found))
    return found


def report_text(report: dict) -> str:
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within, no other run is, that writes into a folder; where its file system has locks. Raises OutputError."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(folder, error.strerror or str(error)) from error
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def place_of(path: Path) -> str:
    """Where an input lies, for whoever works in another folder: as it is spelled, since a link may lead to a corrected
    scan.
    """
    return os.path.abspath(path)  # noqa: PTH100 (resolve follows links)


def scan_facts(case: Case) -> dict:
    """``input_facts`` of a case, and its ``series_of``. Raises BadInputError."""
    return input_facts(case.path) | {"series": series_of(case)}


def series_of(case: Case) -> str | None:
    """The UID of a case's series where it is one of several."""
    return (case.series if case.kind == "dicom" else (case.series or "").partition(INSIDE)[2]) or None


def other_scan(report: Path, facts: dict) -> str | None:
    """The input of a report, or of a run that writes one, if that is another scan than that of ``scan_facts``."""
    try:
        found = json.loads(report.read_bytes())
        made = found["made_from"]["input"]
        places = {made.get("place") or _digest(place_of(found["input"])), made.get("real_place")}
        moved = places.isdisjoint((facts["place"], facts["real_place"]))
        if len({made.get("series"), facts["series"]} - {None}) > 1:
            return f"{found['input']}, series {made['series']}"
        return found["input"] if moved and made["sha256"] != facts["sha256"] else None
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
    place, real = _digest(place_of(path)), _digest(os.path.realpath(path))  # folders may be linked
    # nobody can set the second time: what archives unpack has the first one that they tell
    stamps = [[name, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino] for name, state in states]
    return {
        "files": len(files),
        "bytes": sum(state.st_size for _, state in states),
        "place": place,
        "real_place": real,
        "stamp": _digest(json.dumps([real, stamps])),
    }


def _digest(text: str) -> str:
    """Of a path, say, which may name a patient."""
    return hashlib.sha256(os.fsencode(text)).hexdigest()
