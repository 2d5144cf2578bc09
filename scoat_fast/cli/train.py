"""From volumes with masks to weights and scores."""

from __future__ import annotations

import argparse

from .arguments import EXIT_CODES, EXIT_FAILED_CASES, EXIT_OK, LOSSES, fold, names, path, positive, seed, size


def add_prepare(commands) -> None:
    command = commands.add_parser(
        "prepare",
        help="make a folder of slices for training from volumes with masks",
        description="Cuts NIfTI volumes and DICOM series with NIfTI masks into the slices that train reads: images, "
        "masks and index.csv.",
        epilog=EXIT_CODES,
    )
    command.set_defaults(run=prepare)
    command.add_argument("images", nargs="+", type=path, metavar="IMAGES", help="volumes, or folders of them")
    command.add_argument("--masks", type=path, required=True, help="folder with VOLUME.nii.gz for each volume")
    command.add_argument("-o", "--output", type=path, required=True, metavar="DATA", help="folder to make")
    command.add_argument("--lungs", type=path, help="folder with lung masks, named in the same way")
    command.add_argument("--patients", type=path, metavar="CSV", help="columns volume, patient (default: one of each)")
    command.add_argument(
        "--window", type=float, nargs=2, default=(-1250.0, 250.0), metavar=("LOW", "HIGH"), help="in HU"
    )
    command.add_argument(
        "--empty-every", type=positive, default=1, metavar="N", help="take every Nth slice without opacity"
    )
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def prepare(args: argparse.Namespace) -> int:
    from ..imaging.window import Window
    from ..train.prepare import Preparation
    from ..train.prepare import prepare as run

    what = Preparation(
        images=args.images,
        masks=args.masks,
        output=args.output,
        lungs=args.lungs,
        patients=args.patients,
        window=Window(*args.window),
        empty_every=args.empty_every,
        quiet=args.quiet,
    )
    return EXIT_OK if run(what) else EXIT_FAILED_CASES


def add_train(commands) -> None:
    command = commands.add_parser(
        "train",
        help="train a network on a folder of slices",
        description="Trains on the folder DATA (index.csv, images, masks; see prepare). A run that was stopped goes on "
        "when the same command is given again.",
    )
    command.set_defaults(run=train)
    command.add_argument("data", type=path, metavar="DATA", help="folder with index.csv")
    command.add_argument("-o", "--output", type=path, required=True, metavar="RUN", help="folder of this run")
    command.add_argument("--recipe", choices=("default", "paper"), default="default", help="default: %(default)s")
    command.add_argument("--epochs", type=positive, help="of each stage of the recipe (default: 40, paper: 50)")
    command.add_argument("--batch-size", type=positive, default=8, help="slices a step, over all devices (default: 8)")
    command.add_argument("--width", type=int, default=16, help="channels on level 0 (default: %(default)s)")
    command.add_argument(
        "--size", type=size, default=256, help="slices are resized to SIZE x SIZE (default: %(default)s)"
    )
    command.add_argument("--block", choices=("res", "vgg"), default="res", help="default: %(default)s")
    command.add_argument(
        "--equations", choices=("published", "paper"), default="published", help="default: %(default)s"
    )
    command.add_argument("--one-head", action="store_true", help="no deep supervision")
    command.add_argument(
        "--loss", choices=LOSSES, default="bce-dice", help="of the paper's table I (default: %(default)s)"
    )
    command.add_argument(
        "--supervise", choices=("mean", "last"), default="mean", help="the loss on all heads, or on the last alone"
    )
    who = command.add_mutually_exclusive_group()
    who.add_argument("--validate", type=names, default=(), metavar="P,...", help="patients to validate on")
    who.add_argument("--fold", type=fold, metavar="K/N", help="validate on the K-th of N parts of the patients")
    command.add_argument("--exclude", type=names, default=(), metavar="P,...", help="patients to leave out altogether")
    command.add_argument("--init", default="", metavar="WEIGHTS", help="start from these weights, by name or path")
    command.add_argument("--name", default="", help="of the weights, in their file (default: width and data)")
    command.add_argument("--licence", default="", help="of the weights, in their file")
    command.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    command.add_argument(
        "--devices", type=positive, default=1, help="how many, each a process; or use torchrun (default: 1)"
    )
    command.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "32-true", "bf16-mixed"),
        help="auto: bfloat16 where the hardware computes in it, else float32",
    )
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def train(args: argparse.Namespace) -> int:
    from ..train.command import train as run

    return run(args)


def add_validate(commands) -> None:
    command = commands.add_parser(
        "validate",
        help="score weights on patients of a folder of slices",
        description="Segments slices as the segment command does, and compares them with their masks.",
    )
    command.set_defaults(run=validate)
    command.add_argument("data", type=path, metavar="DATA", help="folder with index.csv")
    command.add_argument("--weights", default="scoat-w16", help="shipped weights or a file (default: %(default)s)")
    command.add_argument("--patients", type=names, required=True, metavar="P,...", help="patients to score")
    command.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="default: %(default)s")
    command.add_argument("--json", type=path, metavar="FILE", help="also write the numbers here")
    command.add_argument("--overlays", type=path, metavar="DIR", help="also a contact sheet of each patient")
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def validate(args: argparse.Namespace) -> int:
    from ..train.command import validate as run

    return run(args)
