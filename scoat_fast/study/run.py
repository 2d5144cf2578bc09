"""Cross-validation of networks and losses: every run trained in the same way and judged on patients it never saw."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from .. import __version__
from ..errors import ScoatFastError
from ..files import make_folder, write_atomically, write_text
from ..imaging.grid import SQUARE_PIXELS, from_square, to_square
from ..imaging.window import Window
from ..train.config import Config, default_recipe
from ..train.data import Slice, data_digest, fold_patients, load, of_patients, read_index
from .metrics import Counts, count, scores
from .networks import build
from .tables import RESULT, Result, write_tables

STRIDE = 32  # of the ResNets: slices are a multiple of it
PREDICTIONS = "predictions"


@dataclass(frozen=True)
class Study:
    """What is compared, and how each run is trained: ``train.config.default_recipe``, from scratch.

    Patients are split into ``folds`` by ``seed``. No run chooses its weights by the patients it is judged on: it takes
    the average at the end.
    """

    networks: tuple[str, ...]
    losses: tuple[str, ...] = ("bce-dice",)
    folds: int = 5
    width: int = 32
    size: int = 512
    epochs: int = 40
    learning_rate: float = 2e-3
    batch_size: int = 8
    seed: int = 0
    exclude: tuple[str, ...] = ()
    precision: str = "32-true"


PRESETS = {  # hours on two cores; hours on a GPU
    # at a rate of 2e-3 so few steps leave the plain U-Net at nothing
    "cpu": {"width": 8, "size": 128, "epochs": 8, "folds": 3, "learning_rate": 1e-2},
    "gpu": {"width": 32, "size": 512, "epochs": 40, "folds": 5},
}


def run(study: Study, data: Path, output: Path, device: str, quiet: bool = False) -> None:
    """Does the runs that ``output`` lacks, and writes the tables after each.

    A run's folder, ``output/runs/NETWORK-LOSS-foldK``, holds the masks it predicted and ``result.json``. One that was
    stopped goes on from its checkpoint; one that was done is not done again.

    Raises:
        ScoatFastError: for a network or loss that is none, without its library, or where ``output`` holds a run that
            was trained otherwise, or on other data. BadInputError: for data that cannot be used.
    """
    try:
        from lightning_fabric import Fabric

        from ..train.trainer import CHECKPOINT
    except ImportError as error:
        raise ScoatFastError(f"a study needs the extra: pip install 'scoat-fast[study]' ({error})") from error
    if study.size % STRIDE:
        raise ScoatFastError(f"--size must be a multiple of {STRIDE}, got {study.size}")
    for name in study.networks:  # what cannot be built is told before hours have passed
        build(name, study.width)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    slices = read_index(data)
    loaded = _Loaded(slices)
    folds = [fold_patients(slices, fold, study.folds, study.seed, study.exclude) for fold in range(study.folds)]
    conditions = _conditions(study, data_digest(data, slices))
    for path in sorted((output / "runs").glob(f"*/{RESULT}")):
        _check(path, "conditions", conditions)
    for loss in study.losses:
        for network in study.networks:
            for fold, patients in enumerate(folds, 1):
                config = _config(study, data, network, loss, patients)
                folder = output / "runs" / f"{network}-{loss}-fold{fold}"
                if _is_done(folder, config):
                    continue
                if not quiet:
                    tqdm.write(f"{network}, {loss}, fold {fold} of {study.folds}")
                fabric = Fabric(accelerator=device, devices=1, precision=config.precision)
                result = _run(config, folder, of_patients(slices, patients), fabric, quiet, loaded)
                about = {"network": network, "loss": loss, "fold": fold, "folds": study.folds}
                made_by = {"scoat_fast": __version__, "device": device, "config": _described(config)}
                made_by["conditions"] = conditions
                write_text(folder / RESULT, json.dumps(about | made_by | asdict(result), indent=1) + "\n")
                (folder / CHECKPOINT).unlink()
                write_tables(output)
    write_tables(output)


def _config(study: Study, data: Path, network: str, loss: str, patients: Sequence[str]) -> Config:
    recipe = default_recipe(study.epochs)
    stages = tuple(replace(stage, learning_rate=study.learning_rate) for stage in recipe.stages)
    return Config(
        data=str(data),
        recipe=replace(recipe, stages=stages, batch_size=study.batch_size),
        network=network,
        width=study.width,
        size=study.size,
        loss=loss,
        exclude=tuple(sorted({*patients, *study.exclude})),
        seed=study.seed,
        precision=study.precision,
    )


def _described(config: Config) -> dict:
    return {name: value for name, value in json.loads(json.dumps(config.describe())).items() if name != "data"}


def _conditions(study: Study, data: str) -> dict:
    """What all runs of a study have in common: without it their results are not to be compared."""
    common = {name: value for name, value in asdict(study).items() if name not in ("networks", "losses")}
    return json.loads(json.dumps(common | {"data": data}))


def _is_done(folder: Path, config: Config) -> bool:
    """Whether a run has its result. Raises ScoatFastError where that was trained otherwise."""
    path = folder / RESULT
    if not path.exists():
        return False
    _check(path, "config", _described(config))
    return True


def _check(path: Path, what: str, wanted: dict) -> None:
    """Raises ScoatFastError unless a result was made so."""
    try:
        made = json.loads(path.read_bytes()).get(what, {})  # an older version's has no conditions
        changed = sorted(name for name in {*made, *wanted} if made.get(name) != wanted.get(name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ScoatFastError(f"{path}: not a readable result: {error!r}") from error
    if changed:
        raise ScoatFastError(
            f"{path.parent} holds a run with other options ({', '.join(changed)}): choose another folder, or the same"
        )


class _Loaded:
    """``train.data.load`` for the slices of all runs, which are decoded once."""

    def __init__(self, slices: Sequence[Slice]):
        self.slices = slices
        self.of: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, slices: Sequence[Slice], *how) -> tuple[Tensor, Tensor]:
        if not self.of:
            pairs = zip(*load(self.slices, *how), strict=True)
            self.of = {slice.id: pair for slice, pair in zip(self.slices, pairs, strict=True)}
        images, masks = zip(*(self.of[slice.id] for slice in slices), strict=True)
        return torch.stack(images), torch.stack(masks)


def _run(config: Config, folder: Path, held_out: Sequence[Slice], fabric, quiet: bool, loaded: _Loaded) -> Result:
    """Trains, and judges the outcome on the held-out slices."""
    from ..train.trainer import Trainer

    started = time.monotonic()
    own = {"build": lambda config: build(config.network, config.width), "load_slices": loaded}
    trainer = Trainer(config, folder, fabric, quiet=quiet, **own)
    net = trainer.fit().to(fabric.device)
    seconds = time.monotonic() - started
    counts: dict[str, Counts] = {}
    for slice in tqdm(held_out, "held-out slices", leave=False, disable=True if quiet else None):
        image, truth = slice.read(Window(*config.window))
        found = predict(net, image, config.size, fabric)
        picture = Image.fromarray(found)
        path = make_folder(folder / PREDICTIONS) / f"{slice.id}.png"
        write_atomically(path, lambda file, picture=picture: picture.save(file, format="PNG"))
        counts[slice.patient] = counts.get(slice.patient, Counts()) + count(found[None], truth[None])
    parameters = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    steps = trainer.steps_per_epoch * sum(stage.epochs for stage in config.recipe.stages)
    return Result(parameters, steps, seconds, {patient: scores(of) | asdict(of) for patient, of in counts.items()})


@torch.no_grad()
def predict(net: nn.Module, image: np.ndarray, size: int, fabric) -> np.ndarray:
    """The mask of one windowed slice [H, W] in 0..1, on its own grid: bool, where the probability is over 0.5."""
    square = to_square(torch.from_numpy(image)[None, None], SQUARE_PIXELS, size).to(fabric.device)
    with fabric.autocast():
        logits = net(square)
    answer: Tensor = logits[-1] if isinstance(logits, list) else logits
    return (from_square(answer.float().sigmoid(), image.shape, SQUARE_PIXELS)[0, 0] > 0.5).cpu().numpy()
