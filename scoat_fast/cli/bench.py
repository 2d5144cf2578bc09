"""Benchmarks."""

from __future__ import annotations

import argparse

from .arguments import (
    EXIT_CODES,
    EXIT_FAILED_CASES,
    EXIT_OK,
    OPERATIONS,
    add_dtype,
    duration,
    one_or_both,
    path,
    positive,
    size,
)


def add_bench(commands) -> None:
    benches = commands.add_parser(
        "bench", help="how fast the fused operations are on this machine", description="Measures, or draws."
    ).add_subparsers(title="what", metavar="WHAT", required=True)
    _add_ops(benches)
    _add_model(benches)
    _add_train(benches)
    _add_cohort(benches)
    _add_chart(benches)


def _add_ops(benches) -> None:
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
        "--batch", type=positive, nargs="+", metavar="N", help="slices at once (default: 1 8 32 on a GPU, else 1)"
    )
    command.add_argument(
        "--dtype",
        nargs="+",
        choices=("float32", "float16", "bfloat16"),
        help="default: bfloat16 on a GPU, else float32",
    )
    command.add_argument(
        "--layout",
        type=one_or_both("contiguous", "channels_last"),
        default="contiguous",
        metavar="contiguous|channels_last|both",
        help="default: %(default)s",
    )
    command.add_argument(
        "--direction",
        type=one_or_both("forward", "backward"),
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
    _add_measuring(command, seconds=0.5)


def bench_ops(args: argparse.Namespace) -> int:
    from ..bench.ops import Plan, passed, run
    from ..segmentation.inference import find_device

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


def _add_model(benches) -> None:
    command = benches.add_parser(
        "model",
        help="time the whole network",
        description="Times the published network in stock PyTorch, eager and compiled, SCOATNet with its kernels, the "
        "engine in each backend and, on CPUs where it is installed (pip install 'scoat-fast[bench]'), ONNX Runtime. "
        "Each is checked against float64 first; what fails gets no time, and the exit code is 3.",
        epilog=EXIT_CODES,
    )
    command.set_defaults(run=bench_model)
    _add_shapes(command)
    command.add_argument("--compile", action="store_true", help="torch.compile, too: minutes")
    command.add_argument(
        "--autotune", action="store_true", help="the engine with tiles tuned on this GPU, too: minutes"
    )
    command.add_argument("--details", action="store_true", help="also the engine's steps, and PyTorch's convolutions")
    _add_measuring(command, seconds=3.0)


def bench_model(args: argparse.Namespace) -> int:
    from ..bench.model import passed, run
    from ..segmentation.inference import find_device

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


def _add_train(benches) -> None:
    command = benches.add_parser(
        "train",
        help="time a step of training",
        description="Times forward pass, loss, backward pass and optimizer of the published network in stock PyTorch, "
        "eager and compiled, and of SCOATNet. Each is checked first: its gradient against float64, its losses against "
        "eager's. What fails gets no time, and the exit code is 3.",
        epilog=EXIT_CODES,
    )
    command.set_defaults(run=bench_train)
    _add_shapes(command)
    command.add_argument(
        "--steps", type=positive, default=50, metavar="N", help="of which losses are compared (default: 50)"
    )
    command.add_argument("--compile", action="store_true", help="torch.compile, too: minutes")
    _add_measuring(command, seconds=3.0)


def bench_train(args: argparse.Namespace) -> int:
    from ..bench.train import passed, run
    from ..segmentation.inference import find_device

    device = find_device(args.device)
    result = run(
        device, args.width, args.batch, args.size, args.steps, args.seconds, args.compile, args.commit, args.output
    )
    return EXIT_OK if passed(result) else EXIT_FAILED_CASES


def _add_cohort(benches) -> None:
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
    command.add_argument("scans", nargs="+", type=path, metavar="SCAN.nii.gz")
    command.add_argument("--copies", type=positive, default=10, metavar="N", help="of each scan (default: 10)")
    command.add_argument(
        "--shape", type=positive, nargs=3, metavar=("I", "J", "K"), help="resample the scans to so many voxels first"
    )
    command.add_argument("--rounds", type=positive, default=5, metavar="N", help="in turns with the rest (default: 5)")
    command.add_argument("--weights", default="scoat-w16", help="shipped weights or a file (default: %(default)s)")
    command.add_argument(
        "--untrained", type=positive, nargs=2, metavar=("WIDTH", "SIZE"), help="a network of this width instead"
    )
    command.add_argument("--threads", type=positive, metavar="N", help="as for segment")
    command.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="default: %(default)s")
    add_dtype(command)
    command.add_argument(
        "--seconds", type=duration, default=3.0, metavar="S", help="for the engine (default: %(default)s)"
    )
    command.add_argument("--commit", default="", help="what is measured, where there is no git")
    command.add_argument("-o", "--output", type=path, metavar="FILE", help="also write the numbers here, as JSON")


def bench_cohort(args: argparse.Namespace) -> int:
    from ..bench.cohort import run, untrained

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
        args.dtype,
    )
    return EXIT_OK if result["rows"][0]["reason"] is None else EXIT_FAILED_CASES


def _add_chart(benches) -> None:
    command = benches.add_parser(
        "chart",
        help="draw the results of bench ops or bench model",
        description="Draws how many times faster than eager torch everything is, at the largest batch of the results. "
        "Needs matplotlib: pip install 'scoat-fast[bench]'.",
    )
    command.set_defaults(run=bench_chart)
    command.add_argument("results", type=path, metavar="RESULTS.json")
    command.add_argument("-o", "--output", type=path, required=True, metavar="FILE.png")


def bench_chart(args: argparse.Namespace) -> int:
    from ..bench.chart import draw

    draw(args.results, args.output)
    return EXIT_OK


def _add_shapes(command: argparse.ArgumentParser) -> None:
    command.add_argument("--width", type=positive, nargs="+", default=[32], metavar="W", help="default: 32")
    command.add_argument("--batch", type=positive, nargs="+", default=[1], metavar="N", help="default: 1")
    command.add_argument("--size", type=size, default=512, help="of the slices (default: %(default)s)")


def _add_measuring(command: argparse.ArgumentParser, seconds: float) -> None:
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    command.add_argument(
        "--seconds", type=duration, default=seconds, metavar="S", help="for each row (default: %(default)s)"
    )
    command.add_argument("--commit", default="", help="what is measured, where there is no git")
    command.add_argument("-o", "--output", type=path, metavar="FILE", help="also write the numbers here, as JSON")
