"""The training loop. A run is a function of its config alone, so one that was killed goes on as if it had not been.

All that is random is drawn from the seed and the number of the step. What else a run needs is in the checkpoint:
weights, optimizer, average, best weights and history.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric, seed_everything
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .. import winograd
from ..errors import BadInputError, ScoatFastError, WeightsError
from ..files import make_folder, write_atomically, write_csv, write_text
from ..imaging.window import Window
from ..layers import PlainBlock
from ..model import SCOATNet
from ..pretrained import Pretrained, load, save
from .batches import Batches, Waiting
from .config import Config, Stage
from .data import Slice, data_digest, digest, read_index, split
from .data import load as load_slices
from .losses import LOSSES, supervised

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_SECONDS = 300  # how much work a killed run loses at most, beside the step at hand
GOLDEN_RATIO = 0x9E3779B97F4A7C15  # spreads neighbouring seeds and steps over all 64 bits


@dataclass
class Progress:
    """Where a run stands, and what it has seen."""

    stage: int = 0
    epoch: int = 0  # of the stage
    step: int = 0  # of the epoch
    losses: list[float] = field(default_factory=list)  # of the epoch
    history: list[dict] = field(default_factory=list)  # a row an epoch
    seconds: float = 0.0
    waiting: float = 0.0  # share of the epoch's time, since it was begun or resumed
    best_dice: float = -1.0


class Trainer:
    """Trains a network as ``config`` says; keeps everything in ``folder``.

    ``name`` and ``licence`` go into the weights; the name is that of the width and the data where none is given.
    ``build`` makes another network than SCOATNet from the config: [N, 1, S, S] to logits of that shape, or a list of
    such. No weights are written for it, which only ``SCOATNet.from_pretrained`` could read. ``load_slices`` stands
    in for ``data.load``.

    The folder receives ``config.json``, ``checkpoint.pt``, ``metrics.csv``, TensorBoard events, and in the end
    ``weights.safetensors``. If it holds a checkpoint of the same config and data, the run goes on from there,
    wherever the data lies by now.

    Raises:
        BadInputError: for data or a checkpoint that cannot be used.
        ScoatFastError: if the folder belongs to a run with another config or other data, or a loss is not finite.
    """

    def __init__(
        self,
        config: Config,
        folder: str | Path,
        fabric: Fabric,
        name: str = "",
        licence: str = "",
        quiet: bool = False,
        build: Callable[[Config], nn.Module] | None = None,
        load_slices: Callable[..., tuple[Tensor, Tensor]] = load_slices,
    ):
        name = name or f"scoat-w{config.width} on {Path(config.data).resolve().name}"
        self.facts = Pretrained(name, config.window, config.size, licence=licence)
        self.config, self.folder, self.fabric, self.quiet = config, Path(folder), fabric, quiet
        self.window, recipe = Window(*config.window), config.recipe
        train, self.validation = split(read_index(config.data), config.validate, config.exclude)
        if len(train) < recipe.batch_size:
            raise BadInputError(
                config.data, f"{len(train)} slices to train on, fewer than one batch of {recipe.batch_size}"
            )
        self.inputs = _digests(config, [*train, *self.validation])
        quiet = quiet or fabric.global_rank > 0
        self.batches = Batches(*load_slices(train, config.size, self.window, quiet), fabric.device)
        self.held_out = load_slices(self.validation, config.size, self.window, quiet) if self.validation else None
        self.steps_per_epoch = len(train) // recipe.batch_size

        seed_everything(config.seed, verbose=False)
        net = build(config) if build else _scoat_net(config, config.deep_supervision)
        self.loss = partial(LOSSES[config.loss], reduce=self._sum_over_processes)
        if config.init:
            _initialise(net, config.init)
        self.layout = _fastest_layout(net, fabric.device)
        net = net.to(memory_format=self.layout)
        if fabric.world_size > 1 and fabric.device.type == "cuda":
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        self.plain_net = net
        self.average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay), use_buffers=True)
        self.average.to(fabric.device)
        self.best = _copy(net.state_dict())
        self.progress = Progress()
        self._new_stage()
        self._resume()

    def fit(self) -> nn.Module:
        """Trains to the end of the last stage, writes the weights and returns them as a network on the CPU."""
        progress, recipe = self.progress, self.config.recipe
        while progress.stage < len(recipe.stages):
            stage = recipe.stages[progress.stage]
            while progress.epoch < stage.epochs:
                self._train_epoch(stage)
                dice = self._validate()
                self._finish_epoch(stage, dice)
            progress.stage, progress.epoch, progress.best_dice = progress.stage + 1, 0, -1.0
            if progress.stage < len(recipe.stages):
                self.plain_net.load_state_dict(self.best)
                self._new_stage()
            self._save_checkpoint()
        return self._export()

    def _train_epoch(self, stage: Stage) -> None:
        progress, started = self.progress, time.monotonic()
        order = torch.randperm(len(self.batches), generator=self._generator(progress.epoch, -1))
        silent = self.quiet or not self.fabric.is_global_zero
        bar = tqdm(
            range(progress.step, self.steps_per_epoch),
            f"epoch {progress.epoch + 1}/{stage.epochs}",
            self.steps_per_epoch,
            initial=progress.step,
            disable=True if silent else None,
            leave=False,
        )
        self.net.train()
        waiting, before = Waiting(self.fabric.device), None
        waiting.mark()
        for step in bar:
            rate = stage.rate(progress.epoch * self.steps_per_epoch + step, self.steps_per_epoch)
            loss = self._train_step(order, step, rate, waiting)
            if before is not None:
                self._note(before)  # while the device works on this step
            before = loss
            if progress.losses:
                bar.set_postfix(loss=f"{sum(progress.losses) / len(progress.losses):.4f}", dice=self._last_dice())
            if step + 1 == self.steps_per_epoch or time.monotonic() - started > CHECKPOINT_SECONDS:
                self._note(before)
                before, progress.seconds = None, progress.seconds + time.monotonic() - started
                started = time.monotonic()
                if step + 1 < self.steps_per_epoch:
                    self._save_checkpoint()
        progress.waiting = waiting.share()

    def _note(self, loss: Tensor) -> None:
        """Takes down the loss of a step, for which it waits. Raises ScoatFastError for one that is not finite."""
        value, progress = loss.item(), self.progress
        progress.step += 1
        if not value < float("inf"):
            raise ScoatFastError(f"the loss became {value} in epoch {progress.epoch + 1}, step {progress.step}")
        progress.losses.append(value)

    def _train_step(self, order: Tensor, step: int, rate: float, waiting: Waiting) -> Tensor:
        recipe, size = self.config.recipe, self.config.recipe.batch_size
        generator = self._generator(self.progress.epoch, step) if recipe.augment else None
        images, masks = self.batches.draw(order[step * size : (step + 1) * size], generator)
        waiting.mark()
        # every process draws the whole batch and takes its share, so that their number changes nothing
        share = slice(self.fabric.global_rank, None, self.fabric.world_size)
        images = images[share].contiguous(memory_format=self.layout)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = supervised(self.loss, self.net(images), masks[share], self.config.supervise)
        self.fabric.backward(loss)
        if recipe.clip_norm:
            self.fabric.clip_gradients(self.net, self.optimizer, max_norm=recipe.clip_norm, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if recipe.ema_decay:
            self.average.update_parameters(self.plain_net)
        waiting.mark()
        return self.fabric.all_reduce(loss.detach(), reduce_op="mean")

    @torch.no_grad()
    def _validate(self) -> float | None:
        """The Dice of all held-out patients' pixels together, at the training resolution."""
        if self.held_out is None:
            return None
        net = self._current().eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.fabric.device)
        share = slice(self.fabric.global_rank, None, self.fabric.world_size)
        images, masks = (t[share] for t in self.held_out)
        for batch, target in zip(*(part.split(self.config.recipe.batch_size) for part in (images, masks)), strict=True):
            batch, target = batch.to(self.fabric.device).float() / 255, target.to(self.fabric.device).bool()
            with self.fabric.autocast():
                logits = net(batch.contiguous(memory_format=self.layout))
            predicted = (logits[-1] if isinstance(logits, list) else logits) > 0
            sums += torch.stack([(predicted & target).sum(), predicted.sum(), target.sum()])
        overlap, ours, theirs = self.fabric.all_reduce(sums, reduce_op="sum").tolist()
        return 2 * overlap / (ours + theirs) if ours + theirs else 1.0

    def _finish_epoch(self, stage: Stage, dice: float | None) -> None:
        progress = self.progress
        row = {
            "stage": progress.stage + 1,
            "epoch": progress.epoch + 1,
            "rate": stage.rate((progress.epoch + 1) * self.steps_per_epoch - 1, self.steps_per_epoch),
            "loss": sum(progress.losses) / len(progress.losses),
            "dice": "" if dice is None else dice,
            "seconds": round(progress.seconds, 1),
            "waiting": round(progress.waiting, 4),
        }
        progress.history.append(row)
        if dice is None or dice > progress.best_dice:
            progress.best_dice = progress.best_dice if dice is None else dice
            self.best = _copy(self._current().state_dict())
        progress.epoch, progress.step, progress.losses, progress.seconds = progress.epoch + 1, 0, [], 0.0
        self._save_checkpoint()
        if self.fabric.is_global_zero:
            self._write_log()

    def _write_log(self) -> None:
        write_csv(self.folder / "metrics.csv", list(self.progress.history[-1]), self.progress.history)
        number, row = len(self.progress.history), self.progress.history[-1]
        with SummaryWriter(self.folder / "tensorboard", purge_step=number) as board:
            for name in ("loss", "dice", "rate"):
                if row[name] != "":
                    board.add_scalar(name, row[name], number)
        if not self.quiet:
            tqdm.write(
                f"stage {row['stage']} epoch {row['epoch']}: loss {row['loss']:.4f}, dice {self._last_dice()}, "
                f"waiting {row['waiting']:.1%}"
            )

    def _save_checkpoint(self) -> None:
        if not self.fabric.is_global_zero:  # and nobody waits: the processes' clocks differ, so may their calls
            return
        state = {
            "config": self.config.describe(),
            "inputs": self.inputs,
            "progress": vars(self.progress),
            "net": self.plain_net.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
        }
        write_atomically(self.folder / CHECKPOINT, lambda file: torch.save(state, file))

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            if self.fabric.is_global_zero:
                make_folder(self.folder)
                write_text(self.folder / "config.json", json.dumps(self.config.describe(), indent=2) + "\n")
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            config, inputs = state["config"], state["inputs"]
        except Exception as error:  # whatever a damaged zip or pickle raises
            raise BadInputError(path, f"not a readable checkpoint: {error}") from error
        if inputs != self.inputs:
            raise ScoatFastError(
                f"the index, images or masks of {self.config.data} or the weights to start from changed since "
                f"{self.folder} was begun"
            )
        if _comparable(config, inputs) != _comparable(self.config.describe(), inputs):
            raise ScoatFastError(
                f"{self.folder} holds a run with another config; choose another folder, or the same options"
            )
        self.progress = Progress(**state["progress"])
        self.best = state["best"]
        self.average.load_state_dict(state["average"])
        self.plain_net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.progress.history and self.fabric.is_global_zero:
            self._write_log()  # its last row is missing, should the run have been killed just before

    def _export(self) -> nn.Module:
        if not isinstance(self._current(), SCOATNet):
            return self._current().cpu().eval()
        net = _scoat_net(self.config, deep_supervision=False)
        net.load_state_dict(_last_head(_copy(self._current().state_dict())))
        if self.fabric.is_global_zero:
            save(net, self.folder / "weights.safetensors", self.facts)
        net.pretrained = self.facts
        return net.eval()

    def _new_stage(self) -> None:
        recipe = self.config.recipe
        optimizer = torch.optim.AdamW(self.plain_net.parameters(), 1e-3, weight_decay=recipe.weight_decay)
        self.net, self.optimizer = self.fabric.setup(self.plain_net, optimizer)
        self.average.n_averaged.zero_()

    def _current(self) -> nn.Module:
        """The network to judge and to ship."""
        return self.average.module if self.config.recipe.ema_decay else self.plain_net

    def _generator(self, epoch: int, step: int) -> torch.Generator:
        number = ((self.config.seed * 1000 + self.progress.stage) * 100_000 + epoch) * 1_000_000 + step + 1
        return torch.Generator().manual_seed(number * GOLDEN_RATIO % 2**63)

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        """The sums of all processes, of which this one's part carries the gradient."""
        processes = self.fabric.world_size
        if processes == 1:
            return sums
        total = self.fabric.all_reduce(sums.detach().clone(), reduce_op="sum")
        # a value of nothing; its gradient counts once for each process, since theirs are averaged afterwards
        return total + processes * (sums - sums.detach())

    def _last_dice(self) -> str:
        dice = self.progress.history[-1]["dice"] if self.progress.history else ""
        return "-" if dice == "" else f"{dice:.4f}"


def _scoat_net(config: Config, deep_supervision: bool) -> SCOATNet:
    return SCOATNet(1, 1, config.width, config.block, deep_supervision, config.equations)


def _fastest_layout(net: nn.Module, device: torch.device) -> torch.memory_format:
    """On a CPU, stock PyTorch is slow with channels last: it takes two to three times as long for the weights."""
    ours = winograd.why_not_here() is None and any(isinstance(module, PlainBlock) for module in net.modules())
    return torch.channels_last if device.type != "cpu" or ours else torch.contiguous_format


def _digests(config: Config, slices: Sequence[Slice]) -> dict[str, str]:
    """What a run reads, as digests: with other data it would not be the same run. Raises BadInputError."""
    digests = {"data": data_digest(config.data, slices)}
    if Path(config.init).is_file():
        digests["init"] = digest([Path(config.init)])
    return digests


def _initialise(net: SCOATNet, source: str) -> None:
    """Takes the weights of ``source``, its last head for all heads of ``net``. Raises WeightsError."""
    state = _last_head(load(source).state_dict())
    heads = [name for name, _ in net.named_children() if name.startswith("final")]
    for part in ("weight", "bias"):
        value = state.pop(f"final.{part}")
        state.update({f"{head}.{part}": value for head in heads})
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(source, f"does not fit a network of width {net.width} and block {net.block}") from error


def _last_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a network with four heads as that of one with its last head alone."""
    if "final4.weight" not in state:
        return state
    kept = {key: value for key, value in state.items() if not key.startswith(("final1.", "final2.", "final3."))}
    return {key.replace("final4.", "final."): value for key, value in kept.items()}


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in state.items()}


def _comparable(config: dict, inputs: dict[str, str]) -> dict:
    """A config as plain data, without the spelling of the paths whose contents ``inputs`` tells."""
    return {key: value for key, value in json.loads(json.dumps(config)).items() if key not in inputs}
