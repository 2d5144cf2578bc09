"""The ``train`` subcommand: options to a config, and the run."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import ScoatFastError
from ..files import check_output, make_folder, write_text

SMALLEST = 16  # the side of slices that are one pixel on the network's lowest level


def train(args: argparse.Namespace) -> int:
    """Trains as the command line says."""
    try:
        from lightning_fabric import Fabric

        from .trainer import Trainer
    except ImportError as error:
        raise ScoatFastError(f"training needs the extra: pip install 'scoat-fast[train]' ({error})") from error
    from ..segmentation.inference import Segmenter, find_device
    from .config import RECIPES, Config
    from .data import fold_patients, read_index

    devices, machines = _processes(args.devices)
    _check_batch(args, devices * machines)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    recipe = RECIPES[args.recipe](**({} if args.epochs is None else {"epochs": args.epochs}))
    patients = args.validate
    if args.fold:
        fold, folds = args.fold
        patients = tuple(fold_patients(read_index(args.data), fold - 1, folds, args.seed, args.exclude))
    device = find_device(args.device).type
    config = Config(
        data=str(args.data),
        recipe=replace(recipe, batch_size=args.batch_size),
        width=args.width,
        size=args.size,
        block=args.block,
        equations=args.equations,
        deep_supervision=not args.one_head,
        loss=args.loss,
        supervise=args.supervise,
        validate=patients,
        exclude=args.exclude,
        init=args.init,
        seed=args.seed,
        precision=precision(device) if args.precision == "auto" else args.precision,
    )
    fabric = Fabric(accelerator=device, devices=devices, num_nodes=machines, precision=config.precision)
    fabric.launch()
    Trainer(config, args.output, fabric, args.name, args.licence, args.quiet).fit()
    if patients and fabric.is_global_zero:
        written = Segmenter(args.output / "weights.safetensors", device)
        _validate(written, args.data, patients, args.output / "validation.json", args.quiet)
    return 0


def validate(args: argparse.Namespace) -> int:
    """Scores weights as the command line says."""
    from ..segmentation.inference import Segmenter

    overlays = make_folder(args.overlays) if args.overlays else None
    if args.json:
        check_output(args.json)
    _validate(Segmenter(args.weights, args.device), args.data, args.patients, args.json, args.quiet, overlays)
    return 0


def _validate(
    segmenter, data: Path, patients: Sequence[str], path: Path | None, quiet: bool, overlays: Path | None = None
) -> None:
    from .data import of_patients, read_index
    from .evaluate import evaluate, table

    metrics = evaluate(segmenter, of_patients(read_index(data), patients), quiet, overlays)
    if path is not None:
        write_text(path, json.dumps(metrics, indent=2) + "\n")
    print(table(metrics))


def _processes(devices: int) -> tuple[int, int]:
    """How many on each machine, and how many machines: as torchrun started them, else ``devices`` on this one."""
    if not (torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()):
        return devices, 1
    here, everywhere = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if devices not in (1, here):
        raise ScoatFastError(f"torchrun started {here} processes on this machine, --devices says {devices}")
    return here, everywhere // here


def _check_batch(args: argparse.Namespace, devices: int) -> None:
    """Refuses batches that cannot be spread over the devices, or normalised on each."""
    if args.batch_size % devices:  # their gradients are averaged as equals
        raise ScoatFastError(f"--batch-size must be a multiple of the {devices} devices, got {args.batch_size}")
    if args.size == SMALLEST and args.batch_size == devices:  # a single pixel a channel on the lowest level
        raise ScoatFastError(
            f"--size {SMALLEST} wants two slices a step on each device, got --batch-size {args.batch_size}"
        )


def precision(device: str) -> str:
    """bfloat16 where the hardware computes in it: emulated, it is a hundred times slower than float32."""
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))
    return "bf16-mixed" if native else "32-true"
