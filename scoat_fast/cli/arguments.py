"""What commands share: exit codes, and what their arguments may be."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

LOSSES = ("mae", "iou", "bce", "dice", "focal", "bce-dice", "bce-dice-literal")
OPERATIONS = ("upsample", "spatial_gate", "channel_gate", "batch_norm_relu")
EXIT_OK, EXIT_USAGE, EXIT_FAILED_CASES, EXIT_INTERRUPTED = 0, 2, 3, 130
EXIT_CODES = """exit codes: 0 all went well; 2 the command itself could not run (its options, the weights, the output
folder); 3 some cases failed, the others are done; 130 interrupted"""


def names(text: str) -> tuple[str, ...]:
    try:
        found = tuple(filter(None, next(csv.reader([text], skipinitialspace=True, strict=True), ())))
    except csv.Error:
        found = ()
    if not found:
        raise argparse.ArgumentTypeError(
            f"names with commas between them are wanted, in double quotes where one has a comma, got {text!r}"
        )
    return found


def losses(text: str) -> tuple[str, ...]:
    found = names(text)
    if not {*found} <= {*LOSSES}:
        raise argparse.ArgumentTypeError(f"losses of {', '.join(LOSSES)} are wanted, got {text!r}")
    return found


def numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(number) for number in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"different numbers of GPUs with commas between them are wanted, got {text!r}")
    return found


def one_or_both(*names: str):
    def parse(text: str) -> tuple[str, ...]:
        if text != "both" and text not in names:
            raise argparse.ArgumentTypeError(f"{', '.join(names)} or both is wanted, got {text!r}")
        return names if text == "both" else (text,)

    return parse


def positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"a positive number is wanted, got {text!r}")
    return int(text)


def duration(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"a number of seconds is wanted, got {text!r}")
    return found


def size(text: str) -> int:
    if not (text.isdecimal() and 16 <= int(text) <= 4096):
        raise argparse.ArgumentTypeError(f"a number within 16 to 4096 is wanted, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"a number within 0 to {2**32 - 1} is wanted, got {text!r}")
    return int(text)


def path(text: str) -> Path:
    if not text:  # an unset variable of a script; Path would take it for the current folder
        raise argparse.ArgumentTypeError("a path is wanted, got ''")
    return Path(text)


def batch_size(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def add_dtype(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the network (default: bfloat16 on GPUs that have it, float32 elsewhere; bfloat16 is faster on CPUs "
        "with AMX)",
    )


def fold(text: str) -> tuple[int, int]:
    number, _, folds = text.partition("/")
    if not (number.isdecimal() and folds.isdecimal() and 1 <= int(number) <= int(folds)):
        raise argparse.ArgumentTypeError(f"wanted K/N with 1 <= K <= N, got {text!r}")
    return int(number), int(folds)
