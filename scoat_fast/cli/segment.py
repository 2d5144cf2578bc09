"""Segmentation, and pages about its results."""

from __future__ import annotations

import argparse

from .arguments import EXIT_CODES, EXIT_FAILED_CASES, EXIT_OK, add_dtype, batch_size, numbers, path, positive


def add_segment(commands) -> None:
    command = commands.add_parser(
        "segment",
        help="segment CT volumes and slices",
        description="Segments NIfTI volumes, folders with DICOM series, zip archives of these, windowed PNG, "
        "JPEG, WebP or TIFF slices (each a case), and folders of all that. Writes CASE_mask.nii.gz (or .png), "
        "CASE_overlay.png, CASE.json and cases.csv.",
        epilog=EXIT_CODES,
    )
    command.set_defaults(run=segment)
    command.add_argument("inputs", nargs="+", type=path, metavar="INPUT", help="file or folder")
    command.add_argument("-o", "--output", type=path, required=True, metavar="OUT", help="folder for the results")
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
    command.add_argument("--lung", type=path, metavar="MASK", help="lung mask, or a folder of CASE.nii.gz (CASE.png)")
    command.add_argument("--save-probabilities", action="store_true", help="also CASE_probability.nii.gz (.png, 8 bit)")
    command.add_argument("--save-attention", action="store_true", help="also the six CASE_attention_xIJ.nii.gz (.png)")
    command.add_argument("--save-lungs", action="store_true", help="also CASE_lungs.nii.gz: 1 right, 2 left")
    command.add_argument(
        "--dicom-seg", action="store_true", help="also CASE_seg.dcm of DICOM series; it names the patient as they do"
    )
    command.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="default: %(default)s")
    command.add_argument("--devices", type=numbers, metavar="0,1", help="several GPUs, which share the cases")
    command.add_argument("--batch-size", type=batch_size, default="auto", metavar="N", help="slices at once, or auto")
    add_dtype(command)
    command.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="that read scans, and as many that write results: each holds a scan (default: half of the cores beside a "
        "GPU, else 1)",
    )
    command.add_argument("--num-parts", type=positive, default=1, metavar="N", help="of N machines, this one takes")
    command.add_argument("--part", type=positive, default=1, metavar="K", help="the Kth share of the cases (from 1)")
    command.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="ray: workers of a cluster (default: %(default)s)",
    )
    command.add_argument("--workers", type=positive, metavar="N", help="of Ray (default: all it has room for)")
    command.add_argument(
        "--worker-cpus", type=float, metavar="C", help="of each, also 0.5 (default: a GPU's share, else all)"
    )
    command.add_argument("--redo", action="store_true", help="also what an earlier run has done from the same input")
    command.add_argument("--quiet", action="store_true", help="no progress bars, no summaries")


def segment(args: argparse.Namespace) -> int:
    from ..segmentation.inference import Segmenter
    from ..segmentation.pipeline import Options, segment_files

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
        from ..segmentation.on_ray import Workers, segment_files_on_ray

        workers = Workers(args.workers, args.worker_cpus, args.device, args.batch_size, args.dtype)
        summary = segment_files_on_ray(args.inputs, args.output, args.weights, options, workers)
    else:
        devices = [args.device] if args.devices is None else [f"cuda:{number}" for number in args.devices]
        segmenters = [Segmenter(args.weights, device, args.batch_size, args.dtype) for device in devices]
        summary = segment_files(args.inputs, args.output, segmenters, options)
    return EXIT_OK if summary.all_well else EXIT_FAILED_CASES


def add_report(commands) -> None:
    command = commands.add_parser(
        "report",
        help="HTML pages of results: one of each case, one of all",
        description="Writes REPORT/index.html and REPORT/cases/CASE.html about the results that segment left in a "
        "folder. The pages need nothing but themselves.",
        epilog=EXIT_CODES,
    )
    command.set_defaults(run=report)
    command.add_argument("results", type=path, metavar="RESULTS", help="folder that segment wrote to")
    command.add_argument("-o", "--output", type=path, required=True, metavar="REPORT", help="folder for the pages")
    command.add_argument("--paths", action="store_true", help="show where the inputs lie, not only their names")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def report(args: argparse.Namespace) -> int:
    from ..report.cohort import write_report

    return EXIT_OK if write_report(args.results, args.output, args.paths, args.quiet) else EXIT_FAILED_CASES


def add_followup(commands) -> None:
    command = commands.add_parser(
        "followup",
        help="an HTML page of one patient over time",
        description="Writes a page about results of the same patient: mL, shares and their change, axial and coronal "
        "slices side by side; and the numbers as a table beside it. The scans are not registered.",
    )
    command.set_defaults(run=followup)
    command.add_argument("cases", nargs="+", metavar="DATE=CASE.json", help="as 2026-01-31=results/scan.json")
    command.add_argument("-o", "--output", type=path, required=True, metavar="FILE.html", help="and FILE.csv")


def followup(args: argparse.Namespace) -> int:
    from ..report.followup import write_followup

    write_followup(args.cases, args.output)
    return EXIT_OK
