"""Training: data, loss, recipes, and runs that can be killed."""

from __future__ import annotations

import csv
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ASYMMETRIC, write_index
from dicom_series import write_series
from PIL import Image

from scoat_fast import BadInputError, SCOATNet
from scoat_fast.cli import EXIT_FAILED_CASES, EXIT_OK, EXIT_USAGE, main
from scoat_fast.imaging.window import LUNG, Window
from scoat_fast.pretrained import Pretrained, save
from scoat_fast.segmentation.inference import Segmenter
from scoat_fast.train import batches as batches_module
from scoat_fast.train import trainer
from scoat_fast.train.augment import augment
from scoat_fast.train.batches import Batches, Waiting
from scoat_fast.train.command import _processes
from scoat_fast.train.config import Stage, default_recipe, paper_recipe
from scoat_fast.train.data import COLUMNS, fold_patients, load, of_patients, read_index, split
from scoat_fast.train.evaluate import evaluate, table
from scoat_fast.train.losses import LOSSES, hybrid_loss, supervised

# Data


def test_index_and_split_by_patient(data):
    slices = read_index(data)
    assert len(slices) == 24
    train, held_out = split(slices, validate=["p2"], exclude=["p3"])
    assert {s.patient for s in held_out} == {"p2"}
    assert {s.patient for s in train} == {"p1", ""}
    assert len(train) + len(held_out) == 20
    with pytest.raises(ValueError, match="no slices of patient p9"):
        of_patients(slices, ["p9"])
    with pytest.raises(ValueError, match="cannot be both"):
        split(slices, ["p1"], ["p1"])


def test_folds_are_a_partition_of_the_patients(data):
    slices = read_index(data)
    folds = [fold_patients(slices, k, 3, seed=0) for k in range(3)]
    assert sorted(name for fold in folds for name in fold) == ["p1", "p2", "p3"]
    assert folds == [fold_patients(slices, k, 3, seed=0) for k in range(3)]
    assert {*fold_patients(slices, 0, 2, 0, exclude=["p2"]), *fold_patients(slices, 1, 2, 0, exclude=["p2"])} == {
        "p1",
        "p3",
    }
    with pytest.raises(ValueError, match="fold 4/3"):
        fold_patients(slices, 3, 3, 0)


def test_slices_come_in_the_window_of_the_weights(data):
    slices = read_index(data)
    images, masks = load(slices, 40, LUNG, quiet=True)
    assert images.shape == masks.shape == (24, 1, 40, 40)
    stored = np.asarray(Image.open(data / "images/s0.png"))  # no window: as it is
    np.testing.assert_array_equal(images[0, 0, :, 2:38], stored)
    stored = np.asarray(Image.open(data / "images/s1.png")).astype(float)
    hu = Window(-1350, 150).invert(stored / 255)
    np.testing.assert_allclose(images[1, 0, :, 2:38], LUNG.apply(hu) * 255, atol=1)
    np.testing.assert_array_equal(masks[1, 0, :, 2:38], np.asarray(Image.open(data / "masks/s1.png")))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: [], "lists no slices"),
        (lambda rows: [{k: v for k, v in row.items() if k != "mask"} for row in rows], "lacks the columns mask"),
        (lambda rows: [rows[0] | {"image": "images/none.png"}], "'images/none.png' is not there"),
        (lambda rows: [rows[0] | {"window_low_hu": "x", "window_high_hu": "3"}], "could not convert"),
        (lambda rows: [rows[0] | {"window_low_hu": "9", "window_high_hu": "3"}], "low < high"),
        (lambda rows: [rows[0], rows[0]], "an id twice"),
        (lambda rows: [rows[0] | {"id": "p/s0"}], "can be the name of a file"),
    ],
)
def test_an_index_that_cannot_be_used_is_refused(data, tmp_path, change, reason):
    for kind in ("images", "masks"):
        (tmp_path / kind).symlink_to(data / kind)
    rows = list(csv.DictReader((data / "index.csv").open()))
    changed = change(rows)
    if changed:
        write_index(tmp_path, changed)
    else:
        (tmp_path / "index.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(BadInputError, match=reason):
        read_index(tmp_path)


def test_an_index_as_spreadsheets_save_it(data, tmp_path):
    """A blank before a patient's name makes no other patient, who could be trained on."""
    for kind in ("images", "masks"):
        (tmp_path / kind).symlink_to(data / kind)
    text = (data / "index.csv").read_text().replace(",p1,", ", p1,", 1).replace(",p2,", ",p2 ,", 1)
    (tmp_path / "index.csv").write_text(text, encoding="utf-8-sig")
    assert [slice.patient for slice in read_index(tmp_path)] == [slice.patient for slice in read_index(data)]


def test_a_mask_of_another_size_is_refused(data, tmp_path):
    Image.new("1", (5, 5)).save(tmp_path / "mask.png")
    with pytest.raises(BadInputError, match=r"a mask of \(40, 36\) is wanted"):
        replace(read_index(data)[0], mask=tmp_path / "mask.png").read(LUNG)


def test_augmentation_moves_image_and_mask_alike():
    masks = torch.zeros(16, 1, 64, 64)
    masks[:, :, 12:30, 20:44] = 1
    images, moved = augment(masks * 0.6 + 0.2, masks, torch.Generator().manual_seed(3))
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert 0 <= images.min() <= images.max() <= 1
    for image, mask, before in zip(images, moved, masks, strict=True):
        inside, outside = image[mask == 1], image[mask == 0]
        assert inside.mean() - outside.mean() > 0.2
        assert not torch.equal(mask, before)
        assert 0.5 < mask.sum() / before.sum() < 2
    again = augment(masks * 0.6 + 0.2, masks, torch.Generator().manual_seed(3))
    assert torch.equal(images, again[0])
    other = augment(masks * 0.6 + 0.2, masks, torch.Generator().manual_seed(4))
    assert not torch.equal(images, other[0])


# Loss and schedule


def by_definition(name: str, z: np.ndarray, y: np.ndarray) -> float:
    """Each loss in float64 as its paper writes it."""
    p = 1 / (1 + np.exp(-z))
    bce = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    dice = 1 - 2 * np.sum(y * p) / (np.sum(y**2) + np.sum(p**2))
    literal = -np.mean(y * np.log(p) + (1 - y) * np.log(1 / (1 + np.exp(-(1 - z)))))
    right, balance = np.where(y == 1, p, 1 - p), np.where(y == 1, 0.25, 0.75)
    return {
        "mae": np.mean(np.abs(p - y)),
        "iou": 1 - np.sum(y * p) / np.sum(y + p - y * p),
        "bce": bce,
        "dice": dice,
        "focal": np.mean(-balance * (1 - right) ** 2 * np.log(right)),
        "bce-dice": bce + 0.5 * dice,
        "bce-dice-literal": literal + 0.5 * dice,
    }[name]


@pytest.fixture
def logits():
    return torch.randn(4, 1, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3


@pytest.fixture
def target():
    return (torch.rand(4, 1, 7, 5, generator=torch.Generator().manual_seed(2)) > 0.6).double()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_their_definitions(name, logits, target):
    loss, expected = LOSSES[name], by_definition(name, logits.numpy(), target.numpy())
    assert loss(logits, target).item() == pytest.approx(expected, abs=1e-7)
    assert loss(logits.float(), target.byte()).item() == pytest.approx(expected, rel=1e-5)
    half = loss(logits.bfloat16(), target)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected, rel=3e-2)
    assert torch.autograd.gradcheck(lambda z: loss(z, target), logits.requires_grad_())


def test_losses_are_those_of_monai(logits, target):
    from monai.losses import DiceLoss, FocalLoss

    tiny = {"sigmoid": True, "batch": True, "smooth_nr": 1e-6, "smooth_dr": 1e-6}
    same = {
        "dice": DiceLoss(squared_pred=True, **tiny),
        "iou": DiceLoss(jaccard=True, **tiny),
        "focal": FocalLoss(gamma=2.0, alpha=0.25),
    }
    for name, theirs in same.items():
        assert LOSSES[name](logits, target).item() == pytest.approx(theirs(logits, target).item(), abs=1e-6)


def test_the_literal_equation_puts_an_even_pixel_off_the_middle():
    z = torch.linspace(-3, 3, 601, dtype=torch.float64)
    for name, optimum in (("bce-dice", 0.0), ("bce-dice-literal", 0.5)):
        loss = partial(LOSSES[name], alpha=0.0)
        even = [loss(torch.stack([at, at]), torch.tensor([0.0, 1.0])).item() for at in z]
        assert z[int(np.argmin(even))].item() == pytest.approx(optimum, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_gradients_where_nothing_is_to_be_found(name):
    logits = torch.full((2, 1, 8, 8), 0.1, requires_grad=True)
    loss = LOSSES[name](logits, torch.zeros(2, 1, 8, 8))
    loss.backward()
    assert loss.isfinite()
    assert (logits.grad > 0).all()


def test_supervision_of_heads(logits, target):
    heads = [logits, logits * 2, logits - 1]
    each = [hybrid_loss(head, target).item() for head in heads]
    wanted = {"mean": sum(each) / 3, "last": each[2], "1": each[0], "2": each[1], "3": each[2]}
    assert {on: supervised(hybrid_loss, heads, target, on).item() for on in wanted} == pytest.approx(wanted)
    assert supervised(hybrid_loss, logits, target, "mean").item() == each[0]
    with pytest.raises(ValueError, match="on head 4, the network has 3"):
        supervised(hybrid_loss, heads, target, "4")


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_a_batch_in_parts_are_those_of_the_whole(name, logits, target):
    """As each process sees it: its own part, the sums of both, and the mean of losses and gradients in the end."""
    from scoat_fast.train.trainer import Trainer

    loss, parts, sums = LOSSES[name], (slice(0, 2), slice(2, 4)), []
    whole = loss(logits.requires_grad_(), target)
    wanted = torch.autograd.grad(whole, logits)[0]
    for part in parts:
        loss(logits[part], target[part], lambda own: sums.append(own.detach()) or own)
    fabric = SimpleNamespace(world_size=2, all_reduce=lambda own, reduce_op: sum(sums))
    reduce = partial(Trainer._sum_over_processes, SimpleNamespace(fabric=fabric))
    losses = [loss(logits[part], target[part], reduce) for part in parts]
    torch.testing.assert_close(sum(losses) / 2, whole)
    torch.testing.assert_close(torch.autograd.grad(sum(losses) / 2, logits)[0], wanted)


def test_schedules():
    paper = paper_recipe().stages
    assert [stage.rate(0, 10) for stage in paper] == [1e-2, 1e-3]
    assert paper[0].rate(99, 10) == 1e-2
    assert paper[0].rate(100, 10) == pytest.approx(1e-3)
    assert paper[1].rate(499, 10) == pytest.approx(1e-7)
    stage = Stage(10, 1.0, warmup=5)
    rates = [stage.rate(step, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[5] == 1
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 1e-3
    assert default_recipe(7).stages[0].epochs == 7


# Batches


def test_batches_hold_what_was_loaded():
    images, masks = (torch.randint(top, (6, 1, 4, 4), dtype=torch.uint8) for top in (256, 2))
    batches = Batches(images, masks, torch.device("cpu"))
    chosen = torch.tensor([5, 0, 3])
    drawn = batches.draw(chosen, None)
    assert len(batches) == 6
    assert torch.equal(drawn[0], images[chosen] / 255) and torch.equal(drawn[1], masks[chosen].float())
    changed = batches.draw(chosen, torch.Generator().manual_seed(1))
    wanted = augment(*drawn, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(changed, wanted, strict=True))
    assert torch.equal(images[chosen] / 255, batches.draw(chosen, None)[0])  # no draw changes what lies there


def test_waiting_is_the_share_without_a_batch(monkeypatch):
    now = iter([10.0, 11.0, 14.0, 14.5, 20.0])
    monkeypatch.setattr(batches_module.time, "perf_counter", lambda: next(now))
    waiting = Waiting(torch.device("cpu"))
    assert waiting.share() == 0
    for _ in range(5):
        waiting.mark()
    assert waiting.share() == pytest.approx((1 + 0.5) / 10)


# Runs

TINY = ("--width", "3", "--size", "32", "--epochs", "2", "--validate", "p2", "--exclude", "p3", "--batch-size", "4",
        "--quiet", "--device", "cpu")  # fmt: skip


def train(data, folder, *more) -> int:
    return main(["train", str(data), "-o", str(folder), *TINY, *map(str, more)])


def weights_of(folder: Path) -> bytes:
    return (folder / "weights.safetensors").read_bytes()


def test_a_run_leaves_weights_logs_and_scores(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(data, run) == EXIT_OK
    net = SCOATNet.from_pretrained(run / "weights.safetensors")
    assert (net.width, net.pretrained.size, net.pretrained.window) == (3, 32, (-1250.0, 250.0))
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(0 < float(row["loss"]) < 5 and 0 <= float(row["dice"]) <= 1 for row in rows)
    assert all(0 < float(row["waiting"]) < 1 for row in rows)
    assert list((run / "tensorboard").iterdir())
    assert json.loads((run / "config.json").read_text())["validate"] == ["p2"]
    scores = json.loads((run / "validation.json").read_text())
    assert set(scores) == {"p2", "total"}
    assert "| p2 |" in capsys.readouterr().out
    before = weights_of(run)
    assert train(data, run) == EXIT_OK  # nothing is left to do
    assert weights_of(run) == before
    assert train(data, run, "--width", 4) == EXIT_USAGE
    assert "another config" in capsys.readouterr().err
    assert net.pretrained.name == f"scoat-w3 on {data.name}"
    assert net.pretrained.licence == ""


def test_the_same_seed_gives_the_same_weights(data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train(data, tmp_path / name, "--seed", seed, "--epochs", 1) == EXIT_OK
    nets = [SCOATNet.from_pretrained(tmp_path / name / "weights.safetensors").state_dict() for name in "abc"]
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])
    assert not torch.equal(nets[0]["final.weight"], nets[2]["final.weight"])


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    import scoat_fast.train.trainer as trainer
    trainer.CHECKPOINT_SECONDS = 0  # after every step
    step, seen = trainer.Trainer._train_step, []
    def counted(self, *args):
        seen.append(1)
        if len(seen) == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)
    trainer.Trainer._train_step = counted
    from scoat_fast.cli import main
    sys.exit(main(sys.argv[2:]))
    """
)


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_a_killed_run_goes_on_to_the_same_weights(data, tmp_path, recipe):
    """16 slices in batches of 4: the default recipe has 8 steps here, the paper's two stages have 16."""

    def attempt(name, kill_at):
        command = [sys.executable, "-c", KILLED, str(kill_at), "train", str(data), "-o", str(tmp_path / name), *TINY]
        return subprocess.run([*command, "--recipe", recipe], capture_output=True, timeout=120).returncode

    assert attempt("whole", 1000) == EXIT_OK
    for kill_at in (3, 4):  # in the first epoch, in the second
        assert attempt("killed", kill_at) == -signal.SIGKILL
        assert (tmp_path / "killed" / "checkpoint.pt").exists()
    assert attempt("killed", 1000) == EXIT_OK
    runs = [tmp_path / name for name in ("whole", "killed")]
    states = [SCOATNet.from_pretrained(run / "weights.safetensors").state_dict() for run in runs]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    whole, killed = ([row["loss"] for row in csv.DictReader((run / "metrics.csv").open())] for run in runs)
    assert whole == killed


def test_a_damaged_checkpoint_is_refused(data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"junk")
    assert train(data, tmp_path / "run") == EXIT_USAGE
    assert "checkpoint.pt: not a readable checkpoint" in capsys.readouterr().err
    torch.save({"net": {}}, tmp_path / "run" / "checkpoint.pt")
    assert train(data, tmp_path / "run") == EXIT_USAGE
    assert "checkpoint.pt: not a readable checkpoint" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_data(data, tmp_path, capsys):
    copied = tmp_path / "data"
    shutil.copytree(data, copied)
    assert train(copied, tmp_path / "run", "--epochs", 1) == EXIT_OK
    lines = (copied / "index.csv").read_text().splitlines()
    (copied / "index.csv").write_text("\n".join(lines[:-1]) + "\n")
    capsys.readouterr()
    assert train(copied, tmp_path / "run", "--epochs", 1) == EXIT_USAGE
    assert "changed since" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_pictures(data, tmp_path, capsys):
    copied = tmp_path / "data"
    shutil.copytree(data, copied)
    assert train(copied, tmp_path / "run", "--epochs", 1) == EXIT_OK
    for picture, mode in (("images/s2.png", "L"), ("masks/s2.png", "1")):  # s2 is held out, and s6 trained on
        for name in (picture, picture.replace("s2", "s6")):
            before = (copied / name).read_bytes()
            Image.new(mode, (36, 40)).save(copied / name)
            capsys.readouterr()
            assert train(copied, tmp_path / "run", "--epochs", 1) == EXIT_USAGE
            assert "changed since" in capsys.readouterr().err
            (copied / name).write_bytes(before)
    assert train(copied, tmp_path / "run", "--epochs", 1) == EXIT_OK


def test_a_run_goes_on_however_its_paths_are_spelled(data, weights, tmp_path, monkeypatch):
    assert train(data, tmp_path / "run", "--epochs", 1, "--init", weights) == EXIT_OK
    monkeypatch.chdir(data.parent)
    relative = os.path.relpath(weights, data.parent)
    assert train(data.name, tmp_path / "run", "--epochs", 1, "--init", relative) == EXIT_OK


def test_scores_are_those_of_the_file_that_was_written(data, tmp_path, monkeypatch):
    scored = []

    def recorded(segmenter, *more):
        scored.append(segmenter.stream.net.state_dict())
        return evaluate(segmenter, *more)

    monkeypatch.setattr("scoat_fast.train.evaluate.evaluate", recorded)
    assert train(data, tmp_path / "run", "--epochs", 1) == EXIT_OK
    written = SCOATNet.from_pretrained(tmp_path / "run" / "weights.safetensors").state_dict()
    assert all(torch.equal(scored[0][key], written[key]) for key in written)


def test_the_log_is_whole_when_a_run_was_killed_before_its_last_row(data, tmp_path):
    assert train(data, tmp_path / "run") == EXIT_OK
    log = tmp_path / "run" / "metrics.csv"
    whole = log.read_text()
    log.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert train(data, tmp_path / "run") == EXIT_OK
    assert log.read_text() == whole


@pytest.mark.parametrize(
    "option",
    ["--epochs 0", "--epochs -1", "--batch-size 0", "--size 5", "--size 0", "--validate ,", "--fold 3/2", "--seed -1",
     "--seed 4294967296", "--seed x"],
)  # fmt: skip
def test_options_out_of_range_are_refused(data, tmp_path, capsys, option):
    with pytest.raises(SystemExit) as stop:
        main(["train", str(data), "-o", str(tmp_path / "run"), *option.split()])
    assert stop.value.code == EXIT_USAGE
    assert f"argument {option.split()[0]}: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--batch-size 1 --size 16", "--size 16 wants two slices a step on each device, got --batch-size 1"),
        ("--batch-size 2 --size 16 --devices 2", "--size 16 wants two slices a step on each device"),
        ("--batch-size 3 --devices 2", "--batch-size must be a multiple of the 2 devices, got 3"),
    ],
)
def test_batches_that_devices_cannot_train_on_are_refused(data, tmp_path, capsys, options, reason):
    assert train(data, tmp_path / "run", *options.split()) == EXIT_USAGE
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_smallest_batches_and_slices_are_trained_on(data, tmp_path):
    assert train(data, tmp_path / "small", "--epochs", 1, "--size", 16, "--batch-size", 2) == EXIT_OK
    assert train(data, tmp_path / "single", "--epochs", 1, "--size", 17, "--batch-size", 1) == EXIT_OK


def test_an_output_without_a_name_is_refused(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in ("segment in", "prepare in --masks masks", f"train {data}"):
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), "-o", ""])
        assert stop.value.code == EXIT_USAGE
        assert "argument -o/--output: a path is wanted, got ''" in capsys.readouterr().err


def test_init_starts_from_other_weights(data, tmp_path):
    torch.manual_seed(5)
    net = SCOATNet(width=3)
    save(net, tmp_path / "start.safetensors", Pretrained("start", size=32))
    from lightning_fabric import Fabric

    from scoat_fast.train.config import Config
    from scoat_fast.train.trainer import Trainer

    config = Config(str(data), default_recipe(1), width=3, size=32, init=str(tmp_path / "start.safetensors"))
    trainer = Trainer(config, tmp_path / "run", Fabric(accelerator="cpu", devices=1), quiet=True)
    started = trainer.plain_net.state_dict()
    for key, value in SCOATNet.from_pretrained(tmp_path / "start.safetensors").state_dict().items():
        for name in [key] if not key.startswith("final.") else [key.replace("final", f"final{j}") for j in range(1, 5)]:
            assert torch.equal(started[name], value), name


def test_init_takes_four_heads_and_refuses_another_width(data, tmp_path, capsys):
    save(SCOATNet(width=3, deep_supervision=True), tmp_path / "deep.safetensors", Pretrained("deep", size=32))
    assert train(data, tmp_path / "run", "--epochs", 1, "--init", tmp_path / "deep.safetensors") == EXIT_OK
    save(SCOATNet(width=4), tmp_path / "wide.safetensors", Pretrained("wide", size=32))
    capsys.readouterr()
    assert train(data, tmp_path / "other", "--init", tmp_path / "wide.safetensors") == EXIT_USAGE
    assert "wide.safetensors: does not fit a network of width 3" in capsys.readouterr().err


def test_training_learns_what_is_to_be_found(data, tmp_path):
    """Bright squares on grey: the loss must fall within a few epochs."""
    assert train(data, tmp_path / "run", "--epochs", 8, "--recipe", "paper", "--one-head") == EXIT_OK
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert float(rows[-1]["loss"]) < 0.75 * float(rows[0]["loss"])


PLAIN_NETWORK = """
import sys
from functools import partial
from torch import nn
from scoat_fast.cli import main
from scoat_fast.train import trainer

def plain(config):
    return nn.Sequential(nn.Conv2d(1, 4, 5, padding=2), nn.ReLU(), nn.Conv2d(4, 1, 5, padding=2))

trainer.Trainer = partial(trainer.Trainer, build=plain)
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def losses_of(folder: Path) -> list[float]:
    return [float(row["loss"]) for row in csv.DictReader((folder / "metrics.csv").open())]


def test_two_processes_train_as_one(data, tmp_path, monkeypatch):
    """As torchrun starts them, a network that normalises nothing has the losses that the whole batch gives: they differ
    from the second epoch on where gradients are not exchanged. BatchNorm would see each half on a CPU.
    """
    script = tmp_path / "plain.py"
    script.write_text(PLAIN_NETWORK)
    options = [
        "--size",
        "32",
        "--epochs",
        "4",
        "--batch-size",
        "4",
        "--quiet",
        "--device",
        "cpu",
        "--precision",
        "32-true",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command = list(map(str, [*torchrun, "train", data, "-o", tmp_path / "two", *options]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == EXIT_OK, done.stderr
    monkeypatch.setattr(trainer, "Trainer", trainer.Trainer)  # as it is to be again
    runpy.run_path(str(script))
    assert main(["train", str(data), "-o", str(tmp_path / "one"), *options]) == EXIT_OK
    one, two = (losses_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(set(one)) == 4
    assert two == pytest.approx(one, rel=1e-5)


def test_two_devices_train_quietly(data, tmp_path):
    command = [sys.executable, "-m", "scoat_fast.cli", "train", str(data), "-o", str(tmp_path / "two"), *TINY]
    result = subprocess.run([*command, "--epochs", "1", "--devices", "2"], capture_output=True, text=True, timeout=300)
    assert result.returncode == EXIT_OK, result.stderr
    assert result.stderr == ""  # the libraries' warnings with it
    assert len(losses_of(tmp_path / "two")) == 1


def test_what_torchrun_started_is_what_trains(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert _processes(1) == _processes(2) == (2, 3)
    assert train(data, tmp_path / "run", "--devices", 4) == EXIT_USAGE
    assert "torchrun started 2 processes on this machine, --devices says 4" in capsys.readouterr().err
    assert train(data, tmp_path / "run", "--batch-size", 8) == EXIT_USAGE
    assert "a multiple of the 6 devices, got 8" in capsys.readouterr().err


# Scores


class Oracle(Segmenter):
    """Answers with what it is told."""

    def __init__(self, net, answers):
        super().__init__(net)
        self.answers = iter(answers)

    def mask(self, slices, spacing):
        return next(self.answers)[None].astype(np.uint8)


def test_scores_by_hand(data, net):
    slices = sorted((s for s in read_index(data) if s.patient in ("p1", "p2")), key=lambda s: s.patient)
    truths = [s.read(LUNG)[1] for s in slices]
    answers = []
    for slice, truth in zip(slices, truths, strict=True):
        answer = truth.copy() if slice.patient == "p1" else np.zeros_like(truth)
        if slice.patient == "p1" and not truth.any():
            answer[0, :5] = True
        answers.append(answer)
    scores = evaluate(Oracle(net, answers), slices, quiet=True)
    truth = sum(t.sum() for s, t in zip(slices, truths, strict=True) if s.patient == "p1")
    alarms = sum(not t.any() for s, t in zip(slices, truths, strict=True) if s.patient == "p1")
    assert alarms > 0
    assert scores["p1"]["Dice"] == pytest.approx(2 * truth / (2 * truth + 5 * alarms))
    assert scores["p1"]["sensitivity"] == 1
    assert scores["p1"]["precision"] == pytest.approx(truth / (truth + 5 * alarms))
    assert scores["p1"]["false alarms"] == alarms
    assert scores["p2"]["Dice"] == scores["p2"]["sensitivity"] == 0
    assert scores["p2"]["precision"] is None
    both = 2 * truth + 5 * alarms + sum(t.sum() for s, t in zip(slices, truths, strict=True) if s.patient == "p2")
    assert scores["total"]["Dice"] == pytest.approx(2 * truth / both)
    assert "| p2 |" in table(scores)


def test_validate_command(data, weights, tmp_path, capsys):
    arguments = ["validate", str(data), "--weights", str(weights), "--patients", "p1,p3", "--quiet"]
    more = ["--json", str(tmp_path / "scores.json"), "--overlays", str(tmp_path / "sheets")]
    assert main([*arguments, *more]) == EXIT_OK
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["p1.png", "p3.png"]
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {"p1", "p3", "total"}
    assert "| total |" in capsys.readouterr().out
    assert main(["validate", str(data), "--weights", str(weights), "--patients", "p7"]) == EXIT_USAGE
    folder = shutil.copytree(data, tmp_path / "data")
    index = (data / "index.csv").read_text().replace(",p1,", ",total,")
    (folder / "index.csv").write_text(index)
    assert main(["validate", str(folder), "--weights", str(weights), "--patients", "total"]) == EXIT_USAGE
    assert "cannot be called 'total'" in capsys.readouterr().err


@pytest.mark.parametrize("patient", ["../p1", "p/1"])
def test_sheets_want_patients_that_can_be_names_of_files(data, weights, tmp_path, capsys, monkeypatch, patient):
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "index.csv").write_text((data / "index.csv").read_text().replace(",p1,", f",{patient},"))
    arguments = ["validate", str(folder), "--weights", str(weights), "--patients", patient, "--quiet"]
    assert main(arguments) == EXIT_OK
    monkeypatch.setattr(Segmenter, "mask", None)
    assert main([*arguments, "--overlays", str(tmp_path / "sheets")]) == EXIT_USAGE
    assert f"patient {patient!r}: a name is wanted that can be the name of a file" in capsys.readouterr().err


def test_a_patient_whose_name_has_a_comma(data, weights, tmp_path, capsys):
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "index.csv").write_text((data / "index.csv").read_text().replace(",p1,", ',"Doe, J",'))
    arguments = ["validate", str(folder), "--weights", str(weights), "--quiet", "--patients"]
    assert main([*arguments, 'p2, "Doe, J"']) == EXIT_OK
    assert "| Doe, J |" in capsys.readouterr().out
    for nobody in ("", ",", "\n", '"Doe, J'):
        with pytest.raises(SystemExit):
            main([*arguments, nobody])


def test_scores_that_cannot_be_written_cost_no_work(data, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Segmenter, "mask", None)
    arguments = ["validate", str(data), "--weights", str(weights), "--patients", "p1"]
    assert main([*arguments, "--json", str(tmp_path / "no" / "scores.json")]) == EXIT_USAGE
    assert "scores.json: cannot be written: No such file" in capsys.readouterr().err


# Prepare


def test_sheets_of_a_patient_with_slices_of_two_sizes(data, weights, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    for kind in ("images", "masks"):
        path = folder / kind / "s0.png"
        picture = Image.open(path)
        picture.resize((30, 50)).save(path)
    arguments = ["validate", folder, "--weights", weights, "--patients", "p1", "--overlays", tmp_path / "sheets"]
    assert main([str(argument) for argument in (*arguments, "--quiet")]) == EXIT_OK
    assert (tmp_path / "sheets" / "p1.png").exists()


def test_prepare_makes_what_train_reads(phantom, tmp_path, capsys):
    images, masks, lungs = (tmp_path / name for name in ("images", "masks", "lungs"))
    for folder in (images, masks, lungs):
        folder.mkdir()
    opacity = (phantom > -500) & (phantom < -300)
    opacity[:, :, :2] = False
    nib.save(nib.Nifti1Image(phantom, ASYMMETRIC), images / "a.nii.gz")
    write_series(images / "b", phantom.transpose(2, 1, 0).astype(float))
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = 39
    for name, affine in (("a", ASYMMETRIC @ flip), ("b", np.array(ASYMMETRIC))):
        voxels = opacity[::-1] if name == "a" else opacity  # a mask may be stored the other way round
        if name == "b":
            affine[:3, 3] = [30, 20, 100]  # where write_series puts it
        nib.save(nib.Nifti1Image(voxels.astype(np.uint8), affine), masks / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image((voxels < 1).astype(np.uint8), affine), lungs / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image(phantom, ASYMMETRIC), images / "without_mask.nii.gz")
    (tmp_path / "patients.csv").write_text("\ufeffvolume,patient\na,p1\nb,p2\nwithout_mask,p3\n")
    command = ["prepare", images, "--masks", masks, "--lungs", lungs, "--patients", tmp_path / "patients.csv",
               "-o", tmp_path / "data", "--empty-every", 2, "--quiet"]  # fmt: skip
    assert main([str(a) for a in command]) == EXIT_FAILED_CASES
    assert "no mask without_mask.nii.gz" in capsys.readouterr().err
    slices = read_index(tmp_path / "data")
    assert [s.id for s in slices if s.patient == "p1"] == ["a_z000", "a_z002", "a_z003", "a_z004"]
    assert len(slices) == 8
    for slice in slices:
        k = int(slice.id[-1])
        image, mask = slice.read(LUNG)
        shown = phantom[:, :, k].T
        # the pixels 0.8 x 0.9 mm become square ones of 0.8
        assert image.shape == mask.shape == (36, round(40 * 0.9 / 0.8))
        columns = np.minimum(((np.arange(45) + 0.5) * 0.8 / 0.9).astype(int), 39)
        np.testing.assert_array_equal(mask, opacity[:, :, k].T[:, columns])
        assert np.abs(image - ((shown + 1250) / 1500).clip(0, 1)[:, columns]).mean() < 0.03
    assert main([str(a) for a in command]) == EXIT_USAGE
    assert "already holds an index.csv" in capsys.readouterr().err
    (tmp_path / "data" / "index.csv").unlink()
    assert main([str(a) for a in command]) == EXIT_USAGE
    assert "images already holds files" in capsys.readouterr().err


def test_prepare_wants_a_patient_for_each_volume(phantom, tmp_path, capsys):
    nib.save(nib.Nifti1Image(phantom, ASYMMETRIC), tmp_path / "a.nii.gz")
    (tmp_path / "masks").mkdir()
    nib.save(nib.Nifti1Image((phantom > 0).astype(np.uint8), ASYMMETRIC), tmp_path / "masks" / "a.nii.gz")
    for rows in ("A,p1\n", "a,\n", "a\n"):
        (tmp_path / "patients.csv").write_text(f"volume,patient\n{rows}")
        command = ["prepare", tmp_path / "a.nii.gz", "--masks", tmp_path / "masks", "-o", tmp_path / "data", "--quiet",
                   "--patients", tmp_path / "patients.csv"]  # fmt: skip
        assert main([str(a) for a in command]) == EXIT_USAGE
        assert "names no patient for the volume a" in capsys.readouterr().err
    (tmp_path / "patients.csv").write_text("volume,patient\na,p1\n a, p1\na,p2\n")
    assert main([str(a) for a in command]) == EXIT_USAGE
    assert "the volume a has two patients, p1 and p2" in capsys.readouterr().err
    (tmp_path / "patients.csv").write_text("volume,patient\n a, p1\na,p1 \n")
    assert main([str(a) for a in command]) == EXIT_OK
    assert {slice.patient for slice in read_index(tmp_path / "data")} == {"p1"}


def test_prepare_refuses_pixels_that_segmentation_refuses(phantom, tmp_path, capsys):
    affine = ASYMMETRIC @ np.diag([20.0, 1, 1, 1])
    (tmp_path / "masks").mkdir()
    nib.save(nib.Nifti1Image(phantom, affine), tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image((phantom > 300).astype(np.uint8), affine), tmp_path / "masks" / "a.nii.gz")
    command = ["prepare", tmp_path / "a.nii.gz", "--masks", tmp_path / "masks", "-o", tmp_path / "data", "--quiet"]
    assert main([str(a) for a in command]) == EXIT_USAGE
    assert "pixels of 0.05 to 20 mm are wanted" in capsys.readouterr().err


def test_prepare_refuses_what_is_no_mask_of_the_volume(phantom, tmp_path, capsys):
    opacity = ((phantom > -500) & (phantom < -300)).astype(np.float32)
    nib.save(nib.Nifti1Image(phantom, ASYMMETRIC), tmp_path / "a.nii.gz")
    (tmp_path / "masks").mkdir()
    for voxels, affine, reason in [
        (opacity[:-1], ASYMMETRIC, "the grid of a.nii.gz is wanted"),
        (opacity, ASYMMETRIC + np.eye(4)[3] * np.array([[0], [0], [9], [0]]), "lies elsewhere"),
        (phantom, ASYMMETRIC, "a mask is wanted"),
        (opacity * 0.5, ASYMMETRIC, "a mask is wanted"),
        (np.where(opacity, np.nan, 0), ASYMMETRIC, "a mask is wanted"),
        (opacity * 0 + 1, ASYMMETRIC, "every voxel is set"),
    ]:
        nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "masks" / "a.nii.gz")
        command = ["prepare", tmp_path / "a.nii.gz", "--masks", tmp_path / "masks", "-o", tmp_path / "data", "--quiet"]
        assert main([str(a) for a in command]) == EXIT_USAGE
        error = capsys.readouterr().err
        assert reason in error
        assert "no volume could be used" in error
