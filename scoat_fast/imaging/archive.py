"""zip archives of scans, unpacked within bounds: nobody's file is named, and no bomb inflated."""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections.abc import Container
from pathlib import Path, PurePosixPath

from ..errors import BadInputError

SUFFIX = ".zip"
MEMBERS, LARGEST, RATIO, SMALL = 20_000, 8 << 30, 200, 64 << 20  # files, bytes of all, times the packed size, bytes
CHUNK = 1 << 20


def unpack(path: Path, folder: Path, most: int | None = None, wanted: Container[str] | None = None) -> None:
    """Unpacks an archive into an empty folder, but for what is hidden, under names of its own: a number, and the suffix
    that the file had.

    Args:
        most: bytes of each file, to look at their headers; all by default.
        wanted: the files to unpack, by their places in ``folder``; all by default.

    Raises:
        BadInputError: for a damaged or encrypted archive, one with links, absolute names or names that climb out of
            it, and one that declares, or holds, too much; before a byte of it is written where the directory says so.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            _check(path, members)
            folders = {name: k for k, name in enumerate(sorted({_parent(member) for member in members}))}
            for k, member in enumerate(members):
                place = f"{folders[_parent(member)]:05}/{k:05}{_suffix(member)}"
                if not _is_hidden(member) and (wanted is None or place in wanted):
                    (folder / place).parent.mkdir(exist_ok=True)
                    _extract(path, archive, member, folder / place, most)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, BadInputError):
            raise
        raise BadInputError(path, f"a damaged archive, or one that cannot be unpacked: {error}") from error
    except OSError as error:
        raise BadInputError(path, f"cannot be unpacked: {error.strerror or error}") from error


def _check(path: Path, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MEMBERS:
        raise BadInputError(path, f"an archive of at most {MEMBERS} files is wanted, got {len(members)}")
    total, packed = (sum(getattr(member, name) for member in members) for name in ("file_size", "compress_size"))
    if total > LARGEST:
        raise BadInputError(path, f"declares {total / 2**30:.0f} GiB, more than {LARGEST >> 30}")
    if total > SMALL and total > RATIO * packed:
        raise BadInputError(path, f"declares {total} bytes in {packed} packed ones: no scan packs so well")
    for member in members:
        name = PurePosixPath(member.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
            raise BadInputError(path, f"holds a name that leads out of it: {member.filename[:80]!r}")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise BadInputError(path, f"holds a link: {member.filename[:80]!r}")
        if member.flag_bits & 1:
            raise BadInputError(path, "is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others inflate without a bound
            raise BadInputError(path, f"stored or deflated files are wanted, got {member.filename[:80]!r}")


def _extract(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, to: Path, most: int | None) -> None:
    """Writes a file, and no more of it than its entry declares, nor than ``most``."""
    written = 0
    with archive.open(member) as packed, to.open("xb") as file:
        while (most is None or written < most) and (chunk := packed.read(min(CHUNK, most or CHUNK))):
            written += len(chunk)
            if written > member.file_size:
                raise BadInputError(path, f"holds more than it declares: {member.filename[:80]!r}")
            file.write(chunk)


def _parent(member: zipfile.ZipInfo) -> str:
    return str(PurePosixPath(member.filename.replace("\\", "/")).parent)


def _is_hidden(member: zipfile.ZipInfo) -> bool:
    """Whether a folder would not be searched for it, either; or it is what macOS adds."""
    parts = PurePosixPath(member.filename.replace("\\", "/")).parts
    return "__MACOSX" in parts or any(part.startswith(".") for part in parts)


def _suffix(member: zipfile.ZipInfo) -> str:
    """What tells the kind of a file."""
    name = PurePosixPath(member.filename.replace("\\", "/")).name
    if name.lower().endswith(".nii.gz"):
        return ".nii.gz"
    suffix = PurePosixPath(name).suffix
    return suffix.lower() if 1 < len(suffix) <= 8 and suffix.isascii() and suffix[1:].isalnum() else ""
