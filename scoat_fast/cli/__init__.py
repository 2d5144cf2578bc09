"""The command line: one function a subcommand, no logic. Heavy imports stay inside the functions."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence

from .. import __version__
from .arguments import EXIT_CODES, EXIT_FAILED_CASES, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, LOSSES, OPERATIONS
from .bench import add_bench
from .segment import add_followup, add_report, add_segment
from .study import add_evaluate, add_figure, add_study
from .tools import add_doctor, add_export, add_info
from .train import add_prepare, add_train, add_validate

__all__ = [
    "EXIT_CODES",
    "EXIT_FAILED_CASES",
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "EXIT_USAGE",
    "LOSSES",
    "OPERATIONS",
    "main",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    from ..errors import ScoatFastError

    _open_closed_streams()
    args = _parser().parse_args(argv)
    in_charge = threading.current_thread() is threading.main_thread()  # others cannot take signals
    before = signal.signal(signal.SIGTERM, _interrupt) if in_charge else None
    try:
        code = args.run(args)
        _flush()
        return code
    except (ScoatFastError, ValueError) as error:
        _complain(error)
        return EXIT_USAGE
    except BrokenPipeError:  # nobody reads what is printed last, when all else is done
        _leave_stdout()
        return EXIT_OK
    except KeyboardInterrupt:
        _complain("interrupted")
        return EXIT_INTERRUPTED
    finally:
        if in_charge:
            signal.signal(signal.SIGTERM, before)


def _open_closed_streams() -> None:
    """Output that was closed before the program began leads nowhere; no file of ours must get its place."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def _complain(reason: Exception | str) -> None:
    with contextlib.suppress(OSError):  # nobody may be there to read it; the exit code says it, too
        print(f"scoat-fast: {reason}", file=sys.stderr, flush=True)


def _flush() -> None:
    """Writes out what was printed. Where nobody reads it any more, the work is done all the same."""
    try:
        sys.stdout.flush()
    except OSError:
        _leave_stdout()


def _leave_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush at its end


def _interrupt(number: int, frame) -> None:
    """Ends the command as Ctrl-C does, so that nothing half-written stays behind."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scoat-fast",
        description="SCOAT-Net: lung opacification on chest CT. Research only, never for clinical use.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_segment(commands)
    add_report(commands)
    add_followup(commands)
    add_prepare(commands)
    add_train(commands)
    add_validate(commands)
    add_evaluate(commands)
    add_study(commands)
    add_figure(commands)
    add_export(commands)
    add_info(commands)
    add_doctor(commands)
    add_bench(commands)
    return parser
