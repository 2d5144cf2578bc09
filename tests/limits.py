"""Work within bounds of time and memory: in a process of its own, which is killed where it goes beyond them."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

SECONDS, BYTES = 5, 1 << 30  # that a bad file may take
LOOK = 0.02  # seconds between two looks at the memory


def within(seconds: float, most: int, function: Callable, *arguments):
    """What ``function`` returns. AssertionError where it fails, or takes more time, or more bytes than were in use."""
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(read)
        # what the caller left, as garbage or free already, would hide as much of what the function takes
        gc.freeze()
        ctypes.CDLL(None).malloc_trim(0)
        os.write(write, _memory(os.getpid()).to_bytes(8, "big"))
        try:
            answer = pickle.dumps((True, function(*arguments)))
        except BaseException:  # also what pytest raises
            answer = pickle.dumps((False, traceback.format_exc()))
        with os.fdopen(write, "wb") as pipe:
            pipe.write(answer)
        sys.stdout.flush()
        os._exit(0)
    os.close(write)
    began, answer, beyond, done = time.monotonic(), b"", "", False
    with os.fdopen(read, "rb", buffering=0) as pipe:
        before = int.from_bytes(pipe.read(8), "big")
        while not (done or beyond):
            if select.select([pipe], [], [], LOOK)[0]:
                answer, done = pipe.readall(), True
            if time.monotonic() - began > seconds:
                beyond = f"took more than {seconds} s"
            elif not done and _memory(child) - before > most:
                beyond = f"took more than {most} bytes"
    if beyond:
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    assert not beyond, beyond
    assert status == 0, f"ended with status {status}"
    assert used.ru_maxrss * 1024 - before <= most, f"took {used.ru_maxrss * 1024 - before} bytes"
    good, result = pickle.loads(answer)
    assert good, result
    return result


def _memory(process: int) -> int:
    """Bytes that a process has in memory; 0 of one that has ended."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0
