"""What is here, whether it works, and files for other programs."""

from __future__ import annotations

import argparse
import json

from .arguments import EXIT_FAILED_CASES, EXIT_OK, path, size


def add_export(commands) -> None:
    command = commands.add_parser(
        "export",
        help="write a trained network as ONNX or as a program of torch.export",
        description="Writes FILE.onnx (one file, checked in ONNX Runtime; pip install 'scoat-fast[export]') or "
        "FILE.pt2 (for torch.export.load). The batch is dynamic; window, size and threshold stand in the file.",
    )
    command.set_defaults(run=export)
    command.add_argument("weights", metavar="WEIGHTS", help="shipped weights or a file")
    command.add_argument("-o", "--output", type=path, required=True, metavar="FILE", help="ends in .onnx or .pt2")
    command.add_argument("--size", type=size, metavar="N", help="of the slices (default: the weights' own)")


def export(args: argparse.Namespace) -> int:
    from ..export import export as run
    from ..pretrained import load

    error = run(load(args.weights), args.output, args.size)
    print(f"{args.output}: logits within {error:.1e} of the largest of the network's own")
    return EXIT_OK


def add_info(commands) -> None:
    command = commands.add_parser(
        "info", help="what is installed, and which weights ship", description="Prints versions, builds and weights."
    )
    command.set_defaults(run=info)
    command.add_argument("--json", action="store_true", help="for programs")


def info(args: argparse.Namespace) -> int:
    from .. import info as facts

    found = facts.info()
    print(json.dumps(found, indent=2) if args.json else facts.text(found))
    return EXIT_OK


def add_doctor(commands) -> None:
    command = commands.add_parser(
        "doctor",
        help="what this machine has, and whether the kernels compute what they should on it",
        description="Prints hardware, driver and versions, which kernels run here and why the others do not, and the "
        "error of each against float64. Kernels that are out of bounds are switched off on this machine, until doctor "
        "finds them well again. Exit code 3 if there are any.",
    )
    command.set_defaults(run=doctor)
    command.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="default: %(default)s")
    command.add_argument("--json", type=path, metavar="FILE", help="also write what was found here")
    command.add_argument("--quiet", action="store_true", help="print only what is switched off")


def doctor(args: argparse.Namespace) -> int:
    from ..doctor import run
    from ..segmentation.inference import find_device

    return EXIT_OK if run(find_device(args.device).type, args.json, args.quiet) else EXIT_FAILED_CASES
