"""The command line: one function a subcommand, no logic. Heavy imports stay inside the functions."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from . import __version__

LOSSES = ("mae", "iou", "bce", "dice", "focal", "bce-dice", "bce-dice-literal")
OPERATIONS = ("upsample", "spatial_gate", "channel_gate", "batch_norm_relu")
EXIT_OK, EXIT_USAGE, EXIT_FAILED_CASES, EXIT_INTERRUPTED = 0, 2, 3, 130
EXIT_CODES = """exit codes: 0 all went well; 2 the command itself could not run (its options, the weights, the output
folder); 3 some cases failed, the others are done; 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    from .errors import ScoatFastError

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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush at its end


def _interrupt(number: int, frame) -> None:
    """Ends the command as Ctrl-C does, so that nothing half-written stays behind."""
    raise KeyboardInterrupt


def segment(args: argparse.Namespace) -> int:
    from .segmentation.inference import Segmenter
    from .segmentation.pipeline import Options, segment_files

    options = Options(
        threshold=args.threshold,
        min_mm3=args.min_mm3,
        series=tuple(args.series),
        lung=args.lung,
        save_probabilities=args.save_probabilities,
        save_attention=args.save_attention,
        save_lungs=args.save_lungs,
        dicom_seg=args.dicom_seg,
        threads=args.threads,
        redo=args.redo,
        quiet=args.quiet,
        part=args.part,
        parts=args.num_parts,
    )
    if args.engine == "local" and (args.workers, args.worker_cpus) != (None, None):
        raise ValueError("--workers and --worker-cpus belong to --engine ray")
    if args.engine == "ray":
        if args.devices is not None:
            raise ValueError("--devices belongs to --engine local; Ray gives each of --workers a GPU")
        from .segmentation.on_ray import Workers, segment_files_on_ray

        workers = Workers(args.workers, args.worker_cpus, args.device, args.batch_size)
        summary = segment_files_on_ray(args.inputs, args.output, args.weights, options, workers)
    else:
        devices = [args.device] if args.devices is None else [f"cuda:{number}" for number in args.devices]
        segmenters = [Segmenter(args.weights, device, args.batch_size) for device in devices]
        summary = segment_files(args.inputs, args.output, segmenters, options)
    return EXIT_OK if summary.all_well else EXIT_FAILED_CASES


def report(args: argparse.Namespace) -> int:
    from .report.cohort import write_report

    return EXIT_OK if write_report(args.results, args.output, args.paths, args.quiet) else EXIT_FAILED_CASES


def followup(args: argparse.Namespace) -> int:
    from .report.followup import write_followup

    write_followup(args.cases, args.output)
    return EXIT_OK


def prepare(args: argparse.Namespace) -> int:
    from .imaging.window import Window
    from .train.prepare import Preparation
    from .train.prepare import prepare as run

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


def doctor(args: argparse.Namespace) -> int:
    from .doctor import run
    from .segmentation.inference import find_device

    return EXIT_OK if run(find_device(args.device).type, args.json, args.quiet) else EXIT_FAILED_CASES


def export(args: argparse.Namespace) -> int:
    from .export import export as run
    from .pretrained import load

    error = run(load(args.weights), args.output, args.size)
    print(f"{args.output}: logits within {error:.1e} of the largest of the network's own")
    return EXIT_OK


def info(args: argparse.Namespace) -> int:
    from . import info as facts

    found = facts.info()
    print(json.dumps(found, indent=2) if args.json else facts.text(found))
    return EXIT_OK


def bench_ops(args: argparse.Namespace) -> int:
    from .bench.ops import Plan, passed, run
    from .segmentation.inference import find_device

    plan = Plan(
        device=find_device(args.device),
        batches=args.batch,
        dtypes=args.dtype,
        layouts=args.layout,
        directions=args.direction,
        implementations=args.implementation,
        names=args.op,
        seconds=args.seconds,
    )
    return EXIT_OK if passed(run(plan, args.commit, args.output)) else EXIT_FAILED_CASES


def bench_model(args: argparse.Namespace) -> int:
    from .bench.model import passed, run
    from .segmentation.inference import find_device

    device = find_device(args.device)
    result = run(
        device,
        args.width,
        args.batch,
        args.size,
        args.seconds,
        args.compile,
        args.commit,
        args.output,
        args.details,
        args.autotune,
    )
    return EXIT_OK if passed(result) else EXIT_FAILED_CASES


def bench_train(args: argparse.Namespace) -> int:
    from .bench.train import passed, run
    from .segmentation.inference import find_device

    device = find_device(args.device)
    result = run(
        device, args.width, args.batch, args.size, args.steps, args.seconds, args.compile, args.commit, args.output
    )
    return EXIT_OK if passed(result) else EXIT_FAILED_CASES


def bench_cohort(args: argparse.Namespace) -> int:
    from .bench.cohort import run, untrained

    result = run(
        args.scans,
        args.weights if args.untrained is None else untrained(*args.untrained),
        args.device,
        args.copies,
        args.rounds,
        args.seconds,
        args.commit,
        args.output,
        args.shape,
        args.threads,
    )
    return EXIT_OK if result["rows"][0]["reason"] is None else EXIT_FAILED_CASES


def bench_chart(args: argparse.Namespace) -> int:
    from .bench.chart import draw

    draw(args.results, args.output)
    return EXIT_OK


def evaluate(args: argparse.Namespace) -> int:
    from .study.evaluate import Outputs, Rules
    from .study.evaluate import evaluate as run

    outputs = Outputs(args.json, args.csv, args.figure)
    well = run(args.predicted, args.truth, Rules(args.empty, args.centre_of), outputs, args.quiet)
    return EXIT_OK if well else EXIT_FAILED_CASES


def study(args: argparse.Namespace) -> int:
    from .segmentation.inference import find_device
    from .study.run import PRESETS, Study, run
    from .train.command import precision

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


def figure3(args: argparse.Namespace) -> int:
    from .study.draw import figure3 as draw

    draw(args.results, args.network, args.loss, args.output)
    return EXIT_OK


def figure4(args: argparse.Namespace) -> int:
    from .study.draw import figure4 as draw

    draw(args.study, args.data, args.slices, args.networks, args.loss, args.output)
    return EXIT_OK


def figure5(args: argparse.Namespace) -> int:
    from .study.draw import figure5 as draw

    draw(args.weights, args.data, args.slices, args.output)
    return EXIT_OK


def figure6(args: argparse.Namespace) -> int:
    from .study.draw import figure6 as draw

    draw(args.cases, args.output)
    return EXIT_OK


def validate(args: argparse.Namespace) -> int:
    from .train.command import validate as run

    return run(args)


def train(args: argparse.Namespace) -> int:
    from .train.command import train as run

    return run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scoat-fast",
        description="SCOAT-Net: lung opacification on chest CT. Research only, never for clinical use.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_segment(commands)
    _add_report(commands)
    _add_followup(commands)
    _add_prepare(commands)
    _add_train(commands)
    _add_validate(commands)
    _add_evaluate(commands)
    _add_study(commands)
    _add_figure(commands)
    _add_export(commands)
    _add_info(commands)
    _add_doctor(commands)
    _add_bench(commands)
    return parser


def _add_segment(commands) -> None:
    command = commands.add_parser(
        "segment",
        help="segment CT volumes and slices",
        description="Segments NIfTI volumes, folders with DICOM series, zip archives of these, windowed PNG, "
        "JPEG, WebP or TIFF slices (each a case), and folders of all that. Writes CASE_mask.nii.gz (or .png), "
        "CASE_overlay.png, CASE.json and cases.csv.",
        epilog=EXIT_CODES,
    )
    command.set_defaults(run=segment)
    command.add_argument("inputs", nargs="+", type=_path, metavar="INPUT", help="file or folder")
    command.add_argument("-o", "--output", type=_path, required=True, metavar="OUT", help="folder for the results")
    command.add_argument("--weights", default="scoat-w16", help="shipped weights or a file (default: %(default)s)")
    command.add_argument("--threshold", type=float, metavar="P", help="of the probability (default: the weights' own)")
    command.add_argument("--min-mm3", type=float, default=0.0, metavar="V", help="leave out regions smaller than this")
    command.add_argument(
        "--series",
        nargs="+",
        default=(),
        metavar="S",
        help="numbers or UIDs of the DICOM series to take (default: all CT)",
    )
    command.add_argument("--lung", type=_path, metavar="MASK", help="lung mask, or a folder of CASE.nii.gz (CASE.png)")
    command.add_argument("--save-probabilities", action="store_true", help="also CASE_probability.nii.gz (.png, 8 bit)")
    command.add_argument("--save-attention", action="store_true", help="also the six CASE_attention_xIJ.nii.gz (.png)")
    command.add_argument("--save-lungs", action="store_true", help="also CASE_lungs.nii.gz: 1 right, 2 left")
    command.add_argument(
        "--dicom-seg", action="store_true", help="also CASE_seg.dcm of DICOM series; it names the patient as they do"
    )
    command.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="default: %(default)s")
    command.add_argument("--devices", type=_numbers, metavar="0,1", help="several GPUs, which share the cases")
    command.add_argument("--batch-size", type=_batch_size, default="auto", metavar="N", help="slices at once, or auto")
    command.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="that read scans, and as many that write results: each holds a scan (default: half of the cores beside a "
        "GPU, else 1)",
    )
    command.add_argument("--num-parts", type=_positive, default=1, metavar="N", help="of N machines, this one takes")
    command.add_argument("--part", type=_positive, default=1, metavar="K", help="the Kth share of the cases (from 1)")
    command.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="ray: workers of a cluster (default: %(default)s)",
    )
    command.add_argument("--workers", type=_positive, metavar="N", help="of Ray (default: all it has room for)")
    command.add_argument(
        "--worker-cpus", type=float, metavar="C", help="of each, also 0.5 (default: a GPU's share, else all)"
    )
    command.add_argument("--redo", action="store_true", help="also what an earlier run has done from the same input")
    command.add_argument("--quiet", action="store_true", help="no progress bars, no summaries")


def _add_report(commands) -> None:
    command = commands.add_parser(
        "report",
        help="HTML pages of results: one of each case, one of all",
        description="Writes REPORT/index.html and REPORT/cases/CASE.html about the results that segment left in a "
        "folder. The pages need nothing but themselves.",
        epilog=EXIT_CODES,
    )
    command.set_defaults(run=report)
    command.add_argument("results", type=_path, metavar="RESULTS", help="folder that segment wrote to")
    command.add_argument("-o", "--output", type=_path, required=True, metavar="REPORT", help="folder for the pages")
    command.add_argument("--paths", action="store_true", help="show where the inputs lie, not only their names")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_followup(commands) -> None:
    command = commands.add_parser(
        "followup",
        help="an HTML page of one patient over time",
        description="Writes a page about results of the same patient: mL, shares and their change, axial and coronal "
        "slices side by side; and the numbers as a table beside it. The scans are not registered.",
    )
    command.set_defaults(run=followup)
    command.add_argument("cases", nargs="+", metavar="DATE=CASE.json", help="as 2026-01-31=results/scan.json")
    command.add_argument("-o", "--output", type=_path, required=True, metavar="FILE.html", help="and FILE.csv")


def _add_prepare(commands) -> None:
    command = commands.add_parser(
        "prepare",
        help="make a folder of slices for training from volumes with masks",
        description="Cuts NIfTI volumes and DICOM series with NIfTI masks into the slices that train reads: images, "
        "masks and index.csv.",
        epilog=EXIT_CODES,
    )
    command.set_defaults(run=prepare)
    command.add_argument("images", nargs="+", type=_path, metavar="IMAGES", help="volumes, or folders of them")
    command.add_argument("--masks", type=_path, required=True, help="folder with VOLUME.nii.gz for each volume")
    command.add_argument("-o", "--output", type=_path, required=True, metavar="DATA", help="folder to make")
    command.add_argument("--lungs", type=_path, help="folder with lung masks, named in the same way")
    command.add_argument("--patients", type=_path, metavar="CSV", help="columns volume, patient (default: one of each)")
    command.add_argument(
        "--window", type=float, nargs=2, default=(-1250.0, 250.0), metavar=("LOW", "HIGH"), help="in HU"
    )
    command.add_argument(
        "--empty-every", type=_positive, default=1, metavar="N", help="take every Nth slice without opacity"
    )
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_validate(commands) -> None:
    command = commands.add_parser(
        "validate",
        help="score weights on patients of a folder of slices",
        description="Segments slices as the segment command does, and compares them with their masks.",
    )
    command.set_defaults(run=validate)
    command.add_argument("data", type=_path, metavar="DATA", help="folder with index.csv")
    command.add_argument("--weights", default="scoat-w16", help="shipped weights or a file (default: %(default)s)")
    command.add_argument("--patients", type=_names, required=True, metavar="P,...", help="patients to score")
    command.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="default: %(default)s")
    command.add_argument("--json", type=_path, metavar="FILE", help="also write the numbers here")
    command.add_argument("--overlays", type=_path, metavar="DIR", help="also a contact sheet of each patient")
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_evaluate(commands) -> None:
    command = commands.add_parser(
        "evaluate",
        help="score masks against true ones",
        description="Compares masks case by case in the paper's metrics: of voxels (DSC, SEN, PPV, VA), and of "
        "connected regions within slices (RLP, RLR) and in space.",
        epilog=EXIT_CODES,
    )
    command.set_defaults(run=evaluate)
    command.add_argument("predicted", type=_path, metavar="PRED", help="a mask, or a folder of CASE_mask.nii.gz (.png)")
    command.add_argument("truth", type=_path, metavar="TRUTH", help="a mask, or a folder of CASE.nii.gz (.png)")
    command.add_argument("--json", type=_path, metavar="FILE", help="also write the numbers here")
    command.add_argument("--csv", type=_path, metavar="FILE", help="also write the table here")
    command.add_argument("--figure", type=_path, metavar="FILE", help="also draw a box plot (.png, .pdf, .svg)")
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


def _add_study(commands) -> None:
    command = commands.add_parser(
        "study",
        help="compare networks and losses by cross-validation, as in the paper's tables",
        description="Trains each network with each loss on all folds but one, and judges it on the patients left out. "
        "Writes OUT/tables.md after each run. A study that was stopped goes on when the same command is given again, "
        "and other networks and losses join what is there.",
    )
    command.set_defaults(run=study)
    command.add_argument("data", type=_path, metavar="DATA", help="folder with index.csv; see prepare")
    command.add_argument("-o", "--output", type=_path, required=True, metavar="OUT", help="folder of the study")
    command.add_argument("--preset", choices=("cpu", "gpu"), default="gpu", help="sizes (default: %(default)s)")
    command.add_argument(
        "--networks",
        type=_names,
        required=True,
        metavar="N,...",
        help="of fcn, deeplabv3, pspnet, attention-unet, unet, unet++, unet++-v1 to unet++-v3, unet++-res, scoat",
    )
    command.add_argument(
        "--losses",
        type=_losses,
        default=("bce-dice",),
        metavar="L,...",
        help=f"of {', '.join(LOSSES)} (default: bce-dice)",
    )
    command.add_argument("--folds", type=_positive, help="parts of the patients (default: cpu 3, gpu 5)")
    command.add_argument("--width", type=_positive, help="channels on level 0 (default: cpu 8, gpu 32)")
    command.add_argument("--size", type=_size, help="of the slices (default: cpu 128, gpu 512)")
    command.add_argument("--epochs", type=_positive, help="default: cpu 8, gpu 40")
    command.add_argument("--batch-size", type=_positive, default=8, help="slices a step (default: %(default)s)")
    command.add_argument("--exclude", type=_names, default=(), metavar="P,...", help="patients to leave out altogether")
    command.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_figure(commands) -> None:
    figures = commands.add_parser(
        "figure", help="the paper's figures 3 to 6 of your own results", description="Draws a .png, .pdf or .svg."
    ).add_subparsers(title="which", metavar="N", required=True)
    three = figures.add_parser("3", help="a box plot of the metrics", description="How the metrics spread over cases.")
    three.set_defaults(run=figure3)
    three.add_argument("results", type=_path, metavar="FILE.json", help="of evaluate, or study.json")
    three.add_argument("--network", default="scoat", help="of a study (default: %(default)s)")
    four = figures.add_parser("4", help="contours of networks", description="What networks found, beside the truth.")
    four.set_defaults(run=figure4)
    four.add_argument("study", type=_path, metavar="STUDY", help="folder of a study")
    four.add_argument("data", type=_path, metavar="DATA", help="the folder it was made from")
    four.add_argument("--networks", type=_names, required=True, metavar="N,...", help="a row for each")
    for command in (three, four):
        command.add_argument("--loss", choices=LOSSES, default="bce-dice", help="of a study (default: %(default)s)")
    five = figures.add_parser("5", help="attention maps", description="What a network found, and where it looked.")
    five.set_defaults(run=figure5)
    five.add_argument("data", type=_path, metavar="DATA", help="folder with index.csv")
    five.add_argument("--weights", default="scoat-w16", help="shipped weights or a file (default: %(default)s)")
    for command in (four, five):
        command.add_argument("--slices", type=_names, required=True, metavar="ID,...", help="of DATA's index.csv")
    six = figures.add_parser("6", help="one patient over time", description="Axial and coronal slices, with mL.")
    six.set_defaults(run=figure6)
    six.add_argument("cases", nargs="+", metavar="DATE=CASE.json", help="as for followup")
    for command in (three, four, five, six):
        command.add_argument("-o", "--output", type=_path, required=True, metavar="FILE", help=".png, .pdf or .svg")


def _add_export(commands) -> None:
    command = commands.add_parser(
        "export",
        help="write a trained network as ONNX or as a program of torch.export",
        description="Writes FILE.onnx (one file, checked in ONNX Runtime; pip install 'scoat-fast[export]') or "
        "FILE.pt2 (for torch.export.load). The batch is dynamic; window, size and threshold stand in the file.",
    )
    command.set_defaults(run=export)
    command.add_argument("weights", metavar="WEIGHTS", help="shipped weights or a file")
    command.add_argument("-o", "--output", type=_path, required=True, metavar="FILE", help="ends in .onnx or .pt2")
    command.add_argument("--size", type=_size, metavar="N", help="of the slices (default: the weights' own)")


def _add_info(commands) -> None:
    command = commands.add_parser(
        "info", help="what is installed, and which weights ship", description="Prints versions, builds and weights."
    )
    command.set_defaults(run=info)
    command.add_argument("--json", action="store_true", help="for programs")


def _add_doctor(commands) -> None:
    command = commands.add_parser(
        "doctor",
        help="what this machine has, and whether the kernels compute what they should on it",
        description="Prints hardware, driver and versions, which kernels run here and why the others do not, and the "
        "error of each against float64. Kernels that are out of bounds are switched off on this machine, until doctor "
        "finds them well again. Exit code 3 if there are any.",
    )
    command.set_defaults(run=doctor)
    command.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="default: %(default)s")
    command.add_argument("--json", type=_path, metavar="FILE", help="also write what was found here")
    command.add_argument("--quiet", action="store_true", help="print only what is switched off")


def _add_bench(commands) -> None:
    benches = commands.add_parser(
        "bench", help="how fast the fused operations are on this machine", description="Measures, or draws."
    ).add_subparsers(title="what", metavar="WHAT", required=True)
    command = benches.add_parser(
        "ops",
        help="time every implementation of every operation",
        description="Checks each implementation of each operation against float64 on the network's own shapes at "
        "512x512, then times it beside eager torch and torch.compile. What fails its check gets no time, and the exit "
        "code is 3.",
        epilog=EXIT_CODES,
    )
    command.set_defaults(run=bench_ops)
    command.add_argument("--op", nargs="+", choices=OPERATIONS, help="default: all")
    command.add_argument(
        "--batch", type=_positive, nargs="+", metavar="N", help="slices at once (default: 1 8 32 on a GPU, else 1)"
    )
    command.add_argument(
        "--dtype",
        nargs="+",
        choices=("float32", "float16", "bfloat16"),
        help="default: bfloat16 on a GPU, else float32",
    )
    command.add_argument(
        "--layout",
        type=_one_or_both("contiguous", "channels_last"),
        default="contiguous",
        metavar="contiguous|channels_last|both",
        help="default: %(default)s",
    )
    command.add_argument(
        "--direction",
        type=_one_or_both("forward", "backward"),
        default="both",
        metavar="forward|backward|both",
        help="default: %(default)s",
    )
    command.add_argument(
        "--implementation",
        nargs="+",
        choices=("eager", "compile", "triton", "cuda", "cpu"),
        help="default: all that the device has, but on a CPU without compile, which takes minutes",
    )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    command.add_argument("--seconds", type=float, default=0.5, metavar="S", help="for each row (default: %(default)s)")
    command.add_argument("--commit", default="", help="what is measured, where there is no git")
    command.add_argument("-o", "--output", type=_path, metavar="FILE", help="also write the numbers here, as JSON")
    command = benches.add_parser(
        "model",
        help="time the whole network",
        description="Times the published network in stock PyTorch, eager and compiled, SCOATNet with its kernels, the "
        "engine in each backend and, on CPUs where it is installed (pip install 'scoat-fast[bench]'), ONNX Runtime. "
        "Each is checked against float64 first; what fails gets no time, and the exit code is 3.",
        epilog=EXIT_CODES,
    )
    command.set_defaults(run=bench_model)
    command.add_argument("--width", type=_positive, nargs="+", default=[32], metavar="W", help="default: 32")
    command.add_argument("--batch", type=_positive, nargs="+", default=[1], metavar="N", help="default: 1")
    command.add_argument("--size", type=_size, default=512, help="of the slices (default: %(default)s)")
    command.add_argument("--compile", action="store_true", help="torch.compile, too: minutes")
    command.add_argument(
        "--autotune", action="store_true", help="the engine with tiles tuned on this GPU, too: minutes"
    )
    command.add_argument("--details", action="store_true", help="also the engine's steps, and PyTorch's convolutions")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    command.add_argument("--seconds", type=float, default=3.0, metavar="S", help="for each row (default: %(default)s)")
    command.add_argument("--commit", default="", help="what is measured, where there is no git")
    command.add_argument("-o", "--output", type=_path, metavar="FILE", help="also write the numbers here, as JSON")
    command = benches.add_parser(
        "train",
        help="time a step of training",
        description="Times forward pass, loss, backward pass and optimizer of the published network in stock PyTorch, "
        "eager and compiled, and of SCOATNet. Each is checked first: its gradient against float64, its losses against "
        "eager's. What fails gets no time, and the exit code is 3.",
        epilog=EXIT_CODES,
    )
    command.set_defaults(run=bench_train)
    command.add_argument("--width", type=_positive, nargs="+", default=[32], metavar="W", help="default: 32")
    command.add_argument("--batch", type=_positive, nargs="+", default=[1], metavar="N", help="default: 1")
    command.add_argument("--size", type=_size, default=512, help="of the slices (default: %(default)s)")
    command.add_argument(
        "--steps", type=_positive, default=50, metavar="N", help="of which losses are compared (default: 50)"
    )
    command.add_argument("--compile", action="store_true", help="torch.compile, too: minutes")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    command.add_argument("--seconds", type=float, default=3.0, metavar="S", help="for each row (default: %(default)s)")
    command.add_argument("--commit", default="", help="what is measured, where there is no git")
    command.add_argument("-o", "--output", type=_path, metavar="FILE", help="also write the numbers here, as JSON")
    command = benches.add_parser(
        "cohort",
        help="time many scans, from files to files",
        description="Makes a cohort of copies of the scans, segments it as scoat-fast segment does, and compares the "
        "speed with the engine's own, with what the host does where a network costs nothing, and with a plain loop of "
        "nibabel and eager PyTorch. Another answer than the loop's gets no number, and the exit code is 3. Rounds of "
        "100 cases and more also tell how the memory grows. Linux only: it looks at its own memory there.",
        epilog=EXIT_CODES,
    )
    command.set_defaults(run=bench_cohort)
    command.add_argument("scans", nargs="+", type=_path, metavar="SCAN.nii.gz")
    command.add_argument("--copies", type=_positive, default=10, metavar="N", help="of each scan (default: 10)")
    command.add_argument(
        "--shape", type=_positive, nargs=3, metavar=("I", "J", "K"), help="resample the scans to so many voxels first"
    )
    command.add_argument("--rounds", type=_positive, default=5, metavar="N", help="in turns with the rest (default: 5)")
    command.add_argument("--weights", default="scoat-w16", help="shipped weights or a file (default: %(default)s)")
    command.add_argument(
        "--untrained", type=_positive, nargs=2, metavar=("WIDTH", "SIZE"), help="a network of this width instead"
    )
    command.add_argument("--threads", type=_positive, metavar="N", help="as for segment")
    command.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="default: %(default)s")
    command.add_argument(
        "--seconds", type=float, default=3.0, metavar="S", help="for the engine (default: %(default)s)"
    )
    command.add_argument("--commit", default="", help="what is measured, where there is no git")
    command.add_argument("-o", "--output", type=_path, metavar="FILE", help="also write the numbers here, as JSON")
    command = benches.add_parser(
        "chart",
        help="draw the results of bench ops or bench model",
        description="Draws how many times faster than eager torch everything is, at the largest batch of the results. "
        "Needs matplotlib: pip install 'scoat-fast[bench]'.",
    )
    command.set_defaults(run=bench_chart)
    command.add_argument("results", type=_path, metavar="RESULTS.json")
    command.add_argument("-o", "--output", type=_path, required=True, metavar="FILE.png")


def _add_train(commands) -> None:
    command = commands.add_parser(
        "train",
        help="train a network on a folder of slices",
        description="Trains on the folder DATA (index.csv, images, masks; see prepare). A run that was stopped goes on "
        "when the same command is given again.",
    )
    command.set_defaults(run=train)
    command.add_argument("data", type=_path, metavar="DATA", help="folder with index.csv")
    command.add_argument("-o", "--output", type=_path, required=True, metavar="RUN", help="folder of this run")
    command.add_argument("--recipe", choices=("default", "paper"), default="default", help="default: %(default)s")
    command.add_argument("--epochs", type=_positive, help="of each stage of the recipe (default: 40, paper: 50)")
    command.add_argument("--batch-size", type=_positive, default=8, help="slices a step, over all devices (default: 8)")
    command.add_argument("--width", type=int, default=16, help="channels on level 0 (default: %(default)s)")
    command.add_argument(
        "--size", type=_size, default=256, help="slices are resized to SIZE x SIZE (default: %(default)s)"
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
    who.add_argument("--validate", type=_names, default=(), metavar="P,...", help="patients to validate on")
    who.add_argument("--fold", type=_fold, metavar="K/N", help="validate on the K-th of N parts of the patients")
    command.add_argument("--exclude", type=_names, default=(), metavar="P,...", help="patients to leave out altogether")
    command.add_argument("--init", default="", metavar="WEIGHTS", help="start from these weights, by name or path")
    command.add_argument("--name", default="", help="of the weights, in their file (default: width and data)")
    command.add_argument("--licence", default="", help="of the weights, in their file")
    command.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    command.add_argument(
        "--devices", type=_positive, default=1, help="how many, each a process; or use torchrun (default: 1)"
    )
    command.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "32-true", "bf16-mixed"),
        help="auto: bfloat16 where the hardware computes in it, else float32",
    )
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if not names:
        raise argparse.ArgumentTypeError(f"names with commas between them are wanted, got {text!r}")
    return names


def _losses(text: str) -> tuple[str, ...]:
    names = _names(text)
    if not {*names} <= {*LOSSES}:
        raise argparse.ArgumentTypeError(f"losses of {', '.join(LOSSES)} are wanted, got {text!r}")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"different numbers of GPUs with commas between them are wanted, got {text!r}")
    return numbers


def _one_or_both(*names: str):
    def parse(text: str) -> tuple[str, ...]:
        if text != "both" and text not in names:
            raise argparse.ArgumentTypeError(f"{', '.join(names)} or both is wanted, got {text!r}")
        return names if text == "both" else (text,)

    return parse


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"a positive number is wanted, got {text!r}")
    return int(text)


def _size(text: str) -> int:
    if not (text.isdecimal() and 16 <= int(text) <= 4096):
        raise argparse.ArgumentTypeError(f"a number within 16 to 4096 is wanted, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"a number within 0 to {2**32 - 1} is wanted, got {text!r}")
    return int(text)


def _path(text: str) -> Path:
    if not text:  # an unset variable of a script; Path would take it for the current folder
        raise argparse.ArgumentTypeError("a path is wanted, got ''")
    return Path(text)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _fold(text: str) -> tuple[int, int]:
    fold, _, folds = text.partition("/")
    if not (fold.isdecimal() and folds.isdecimal() and 1 <= int(fold) <= int(folds)):
        raise argparse.ArgumentTypeError(f"wanted K/N with 1 <= K <= N, got {text!r}")
    return int(fold), int(folds)


if __name__ == "__main__":
    sys.exit(main())
