"""gzip, by isal where it is installed (pip install 'scoat-fast[fast]'): several times as fast as Python's own."""

from __future__ import annotations

import gzip
import zlib
from typing import BinaryIO

try:
    from isal import igzip, isal_zlib
except ImportError:
    igzip = None

DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, *(() if igzip is None else (isal_zlib.error,)))


def open_packed(path) -> BinaryIO:
    """A packed file to read; ``DAMAGED`` is what reading may raise beside OSError."""
    return gzip.open(path) if igzip is None else igzip.open(path)


def pack(data: bytes) -> bytes:
    """Packed bytes, the same for the same data."""
    return gzip.compress(data, 6, mtime=0) if igzip is None else igzip.compress(data, 2, mtime=0)
