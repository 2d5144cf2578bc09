"""What a training run does, as plain data: recipes, and the choices around them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from ..imaging.window import LUNG


@dataclass(frozen=True)
class Stage:
    """A part of a schedule, with an optimizer of its own.

    ``cosine``: after ``warmup`` steps the rate falls along a half cosine to 0. ``step``: it is divided by ten after
    every ten epochs.
    """

    epochs: int
    learning_rate: float
    schedule: str = "cosine"
    warmup: int = 0

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from the start of the stage."""
        if self.schedule == "step":
            return self.learning_rate * 0.1 ** (step // steps_per_epoch // 10)
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.epochs * steps_per_epoch - self.warmup, 1)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Recipe:
    """How to train: stages one after the other, each from the best weights of the one before."""

    stages: tuple[Stage, ...]
    batch_size: int = 8
    weight_decay: float = 0.0
    augment: bool = False
    ema_decay: float = 0.0  # 0: no average
    clip_norm: float = 0.0  # 0: no clipping


def default_recipe(epochs: int = 40) -> Recipe:
    """AdamW with a cosine schedule, augmentation and an exponential average of the weights."""
    return Recipe((Stage(epochs, 2e-3, "cosine", 100),), weight_decay=1e-2, augment=True, ema_decay=0.99, clip_norm=1.0)


def paper_recipe(epochs: int = 50) -> Recipe:
    """Section IV A: Adam at 1e-2, then again at 1e-3, divided by ten every ten epochs."""
    return Recipe((Stage(epochs, 1e-2, "step"), Stage(epochs, 1e-3, "step")))


RECIPES = {"default": default_recipe, "paper": paper_recipe}


@dataclass(frozen=True)
class Config:
    """A whole run: two runs with equal configs on one machine give equal weights."""

    data: str
    recipe: Recipe = field(default_factory=default_recipe)
    network: str = "scoat"
    width: int = 16
    size: int = 256
    block: str = "res"
    equations: str = "published"
    deep_supervision: bool = True
    loss: str = "bce-dice"  # of losses.LOSSES
    supervise: str = "mean"  # or "last": which heads the loss looks at
    window: tuple[float, float] = (LUNG.low, LUNG.high)
    validate: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    init: str = ""  # weights to start from
    seed: int = 0
    precision: str = "32-true"

    def describe(self) -> dict:
        """Plain data, as it is written beside the weights and compared when a run goes on."""
        return asdict(self)
