"""Scores of masks, and comparisons of networks."""

from __future__ import annotations

import argparse

from .arguments import EXIT_CODES, EXIT_FAILED_CASES, EXIT_OK, LOSSES, losses, names, path, positive, seed, size


def add_evaluate(commands) -> None:
    command = commands.add_parser(
        "evaluate",
        help="score masks against true ones",
        description="Compares masks case by case in the paper's metrics: of voxels (DSC, SEN, PPV, VA), and of "
        "connected regions within slices (RLP, RLR) and in space.",
        epilog=EXIT_CODES,
    )
    command.set_defaults(run=evaluate)
    command.add_argument("predicted", type=path, metavar="PRED", help="a mask, or a folder of CASE_mask.nii.gz (.png)")
    command.add_argument("truth", type=path, metavar="TRUTH", help="a mask, or a folder of CASE.nii.gz (.png)")
    command.add_argument("--json", type=path, metavar="FILE", help="also write the numbers here")
    command.add_argument("--csv", type=path, metavar="FILE", help="also write the table here")
    command.add_argument("--figure", type=path, metavar="FILE", help="also draw a box plot (.png, .pdf, .svg)")
    command.add_argument(
        "--empty",
        choices=("score", "skip"),
        default="score",
        help="a ratio of nothing to nothing: 1 where neither mask has anything, else 0; or left out (default: score)",
    )
    command.add_argument(
        "--centre-of",
        choices=("prediction", "truth"),
        default="prediction",
        help="a true region is found if it holds a predicted one's centre, or if its own was predicted (default: "
        "%(default)s)",
    )
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def evaluate(args: argparse.Namespace) -> int:
    from ..study.evaluate import Outputs, Rules
    from ..study.evaluate import evaluate as run

    outputs = Outputs(args.json, args.csv, args.figure)
    well = run(args.predicted, args.truth, Rules(args.empty, args.centre_of), outputs, args.quiet)
    return EXIT_OK if well else EXIT_FAILED_CASES


def add_study(commands) -> None:
    command = commands.add_parser(
        "study",
        help="compare networks and losses by cross-validation, as in the paper's tables",
        description="Trains each network with each loss on all folds but one, and judges it on the patients left out. "
        "Writes OUT/tables.md after each run. A study that was stopped goes on when the same command is given again, "
        "and other networks and losses join what is there.",
    )
    command.set_defaults(run=study)
    command.add_argument("data", type=path, metavar="DATA", help="folder with index.csv; see prepare")
    command.add_argument("-o", "--output", type=path, required=True, metavar="OUT", help="folder of the study")
    command.add_argument("--preset", choices=("cpu", "gpu"), default="gpu", help="sizes (default: %(default)s)")
    command.add_argument(
        "--networks",
        type=names,
        required=True,
        metavar="N,...",
        help="of fcn, deeplabv3, pspnet, attention-unet, unet, unet++, unet++-v1 to unet++-v3, unet++-res, scoat",
    )
    command.add_argument(
        "--losses",
        type=losses,
        default=("bce-dice",),
        metavar="L,...",
        help=f"of {', '.join(LOSSES)} (default: bce-dice)",
    )
    command.add_argument("--folds", type=positive, help="parts of the patients (default: cpu 3, gpu 5)")
    command.add_argument("--width", type=positive, help="channels on level 0 (default: cpu 8, gpu 32)")
    command.add_argument("--size", type=size, help="of the slices (default: cpu 128, gpu 512)")
    command.add_argument("--epochs", type=positive, help="default: cpu 8, gpu 40")
    command.add_argument("--batch-size", type=positive, default=8, help="slices a step (default: %(default)s)")
    command.add_argument("--exclude", type=names, default=(), metavar="P,...", help="patients to leave out altogether")
    command.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def study(args: argparse.Namespace) -> int:
    from ..segmentation.inference import find_device
    from ..study.run import PRESETS, Study, run
    from ..train.command import precision

    device = find_device(args.device).type
    given = {name: getattr(args, name) for name in ("folds", "width", "size", "epochs")}
    plan = Study(
        networks=args.networks,
        losses=args.losses,
        batch_size=args.batch_size,
        seed=args.seed,
        exclude=args.exclude,
        precision=precision(device),
        **PRESETS[args.preset] | {name: value for name, value in given.items() if value is not None},
    )
    run(plan, args.data, args.output, device, args.quiet)
    print((args.output / "tables.md").read_text())
    return EXIT_OK


def add_figure(commands) -> None:
    figures = commands.add_parser(
        "figure", help="the paper's figures 3 to 6 of your own results", description="Draws a .png, .pdf or .svg."
    ).add_subparsers(title="which", metavar="N", required=True)
    three = figures.add_parser("3", help="a box plot of the metrics", description="How the metrics spread over cases.")
    three.set_defaults(run=figure3)
    three.add_argument("results", type=path, metavar="FILE.json", help="of evaluate, or study.json")
    three.add_argument("--network", default="scoat", help="of a study (default: %(default)s)")
    four = figures.add_parser("4", help="contours of networks", description="What networks found, beside the truth.")
    four.set_defaults(run=figure4)
    four.add_argument("study", type=path, metavar="STUDY", help="folder of a study")
    four.add_argument("data", type=path, metavar="DATA", help="the folder it was made from")
    four.add_argument("--networks", type=names, required=True, metavar="N,...", help="a row for each")
    for command in (three, four):
        command.add_argument("--loss", choices=LOSSES, default="bce-dice", help="of a study (default: %(default)s)")
    five = figures.add_parser("5", help="attention maps", description="What a network found, and where it looked.")
    five.set_defaults(run=figure5)
    five.add_argument("data", type=path, metavar="DATA", help="folder with index.csv")
    five.add_argument("--weights", default="scoat-w16", help="shipped weights or a file (default: %(default)s)")
    for command in (four, five):
        command.add_argument("--slices", type=names, required=True, metavar="ID,...", help="of DATA's index.csv")
    six = figures.add_parser("6", help="one patient over time", description="Axial and coronal slices, with mL.")
    six.set_defaults(run=figure6)
    six.add_argument("cases", nargs="+", metavar="DATE=CASE.json", help="as for followup")
    for command in (three, four, five, six):
        command.add_argument("-o", "--output", type=path, required=True, metavar="FILE", help=".png, .pdf or .svg")


def figure3(args: argparse.Namespace) -> int:
    from ..study.draw import figure3 as draw

    draw(args.results, args.network, args.loss, args.output)
    return EXIT_OK


def figure4(args: argparse.Namespace) -> int:
    from ..study.draw import figure4 as draw

    draw(args.study, args.data, args.slices, args.networks, args.loss, args.output)
    return EXIT_OK


def figure5(args: argparse.Namespace) -> int:
    from ..study.draw import figure5 as draw

    draw(args.weights, args.data, args.slices, args.output)
    return EXIT_OK


def figure6(args: argparse.Namespace) -> int:
    from ..study.draw import figure6 as draw

    draw(args.cases, args.output)
    return EXIT_OK
