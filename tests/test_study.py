"""The paper's study: networks, cross-validation, tables and figures."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PATIENTS
from PIL import Image
from test_segment import run

from scoat_fast import SCOATNet
from scoat_fast.cli import EXIT_OK, EXIT_USAGE
from scoat_fast.layers import ResidualBlock
from scoat_fast.pretrained import Pretrained, save
from scoat_fast.study.metrics import METRICS
from scoat_fast.study.networks import (
    NETWORKS,
    AttentionGate,
    PyramidAttention,
    ResidualAttention,
    UNetPlusPlus,
    build,
)  # fmt: skip
from scoat_fast.study.tables import PAPER, TABLE_2, TABLE_3, tables

LIBRARIES = {"fcn": "torchvision", "deeplabv3": "torchvision", "pspnet": "segmentation_models_pytorch"}


@pytest.fixture(params=NETWORKS)
def network(request):
    if request.param in LIBRARIES:
        pytest.importorskip(LIBRARIES[request.param], reason="pip install 'scoat-fast[networks]'")
    torch.manual_seed(3)
    return build(request.param, 16)


def test_networks_give_logits_of_the_size_of_their_input(network):
    out = network.train()(torch.randn(2, 1, 64, 96))
    heads = out if isinstance(out, list) else [out]
    assert len(heads) in (1, 4) and all(head.shape == (2, 1, 64, 96) for head in heads)
    sum(head.square().mean() for head in heads).backward()
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    assert [name for name, weight in trained.items() if weight.grad is None] == []
    idle = [name for name, weight in trained.items() if weight.grad.abs().sum() == 0]
    assert all(name.endswith("bias") for name in idle)  # one before a BatchNorm changes nothing


@pytest.mark.parametrize(
    ("net", "printed"),
    [
        (lambda: SCOATNet(3, 1, 32, deep_supervision=True), 39.08),
        (lambda: UNetPlusPlus(32, 3), 35.02),
        (lambda: UNetPlusPlus(32, 3, attend_to_node=ResidualAttention), 53.43),
        (lambda: UNetPlusPlus(32, 3, attend=AttentionGate), 37.63),
        (lambda: UNetPlusPlus(32, 3, attend_to_node=PyramidAttention), 35.05),
    ],
    ids=["scoat", "unet++", "v1", "v2", "v3"],
)
def test_checkpoints_are_of_the_size_that_table_three_prints(net, printed):
    """Its "Params" are MiB of a file in the format before PyTorch 1.6."""
    file = io.BytesIO()
    torch.save(net().state_dict(), file, _use_new_zipfile_serialization=False)
    assert len(file.getvalue()) / 2**20 == pytest.approx(printed, abs=0.01)


def unet_plus_plus(net: UNetPlusPlus, x: torch.Tensor) -> list[torch.Tensor]:
    """The nodes one after the other, as in the figure of its paper."""

    def node(name, *parts):
        return getattr(net, f"conv{name}")(torch.cat(parts, 1))

    def up(y):
        return F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)

    x00 = node("0_0", x)
    x10 = node("1_0", F.max_pool2d(x00, 2))
    x01 = node("0_1", x00, up(x10))
    x20 = node("2_0", F.max_pool2d(x10, 2))
    x11 = node("1_1", x10, up(x20))
    x02 = node("0_2", x00, x01, up(x11))
    x30 = node("3_0", F.max_pool2d(x20, 2))
    x21 = node("2_1", x20, up(x30))
    x12 = node("1_2", x10, x11, up(x21))
    x03 = node("0_3", x00, x01, x02, up(x12))
    x40 = node("4_0", F.max_pool2d(x30, 2))
    x31 = node("3_1", x30, up(x40))
    x22 = node("2_2", x20, x21, up(x31))
    x13 = node("1_3", x10, x11, x12, up(x22))
    x04 = node("0_4", x00, x01, x02, x03, up(x13))
    return [net.final1(x01), net.final2(x02), net.final3(x03), net.final4(x04)]


@pytest.mark.parametrize("block", [None, ResidualBlock])
def test_unet_plus_plus_is_its_figure(block):
    torch.manual_seed(1)
    net = UNetPlusPlus(4, **({} if block is None else {"block": block})).double().eval()
    x = torch.randn(2, 1, 32, 48, dtype=torch.float64)
    for ours, theirs in zip(net(x), unet_plus_plus(net, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_attention_weights_what_it_should():
    torch.manual_seed(2)
    x, below = torch.randn(2, 4, 9, 7, dtype=torch.float64), torch.randn(2, 8, 9, 7, dtype=torch.float64)
    gate = AttentionGate(4).double().eval()
    gated, same = gate(x, below)
    assert same is below
    weight = (gated / x).mean(1, keepdim=True)
    torch.testing.assert_close(gated, x * weight) and ((weight > 0) & (weight < 1)).all()
    for attention in (PyramidAttention(4), ResidualAttention(4)):
        attention = attention.double().eval()
        trunk = attention.trunk(x) if isinstance(attention, ResidualAttention) else x
        ratio = attention(x) / trunk
        assert ((ratio > 1) & (ratio < 2)).all()
    assert (ratio - ratio.mean(1, keepdim=True)).abs().max() > 1e-3  # each channel by its own


def test_networks_that_cannot_be_built_say_why(data, tmp_path, capsys, monkeypatch):
    assert run("study", data, "-o", tmp_path / "out", "--networks", "unet,resnet") == EXIT_USAGE
    assert "a network of fcn, deeplabv3" in capsys.readouterr().err
    monkeypatch.setitem(NETWORKS, "fcn", lambda width: (_ for _ in ()).throw(RuntimeError("operator nms is not there")))
    assert run("study", data, "-o", tmp_path / "out", "--networks", "unet,fcn") == EXIT_USAGE
    assert "fcn needs pip install 'scoat-fast[study,networks]': operator nms" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("study", data, "-o", tmp_path / "out", "--networks", "unet", "--size", 48) == EXIT_USAGE
    assert "a multiple of 32" in capsys.readouterr().err


TINY = ("--width", 3, "--size", 32, "--epochs", 1, "--folds", 2, "--batch-size", 4, "--quiet")


@pytest.fixture(scope="module")
def studied(data, tmp_path_factory) -> Path:
    """Two networks with one loss, and one of them with another."""
    out = tmp_path_factory.mktemp("study")
    assert run("study", data, "-o", out, "--networks", "unet++-v2,scoat", *TINY) == EXIT_OK
    assert run("study", data, "-o", out, "--networks", "scoat", "--losses", "iou", *TINY) == EXIT_OK
    return out


def test_every_patient_is_judged_by_runs_that_never_saw_it(data, studied):
    results = [json.loads(path.read_text()) for path in (studied / "runs").glob("*/result.json")]
    assert len(results) == 6
    for result in results:
        assert {*result["patients"]} == {*result["config"]["exclude"]} and result["steps"] > 0
        assert result["config"]["validate"] == []  # nor chose its weights by it
    for network, loss in (("scoat", "bce-dice"), ("scoat", "iou"), ("unet++-v2", "bce-dice")):
        folds = [result["patients"] for result in results if (result["network"], result["loss"]) == (network, loss)]
        assert sorted(name for fold in folds for name in fold) == sorted({*PATIENTS} - {""})
    some = next(iter(results[0]["patients"].values()))
    assert {*METRICS} <= {*some} and some["true"] > 0
    predicted = sorted((studied / "runs").glob("scoat-iou-fold*/predictions/*.png"))
    assert len(predicted) == sum(patient != "" for patient in PATIENTS) * 4
    assert Image.open(predicted[0]).size == (36, 40)


def test_a_study_does_only_what_is_missing_and_the_same_again(data, studied, tmp_path, capsys):
    out = shutil.copytree(studied, tmp_path / "out")
    lost = out / "runs" / "scoat-iou-fold2" / "result.json"
    before = json.loads(lost.read_text())["patients"]
    shutil.rmtree(lost.parent)
    times = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/result.json")}
    assert run("study", data, "-o", out, "--networks", "scoat", "--losses", "bce-dice,iou", *TINY) == EXIT_OK
    assert json.loads(lost.read_text())["patients"] == before
    assert times == {path: path.stat().st_mtime_ns for path in times} and len(times) == 5
    assert (out / "tables.md").read_text() == (studied / "tables.md").read_text()
    assert run("study", data, "-o", out, "--networks", "scoat", *TINY, "--epochs", 2) == EXIT_USAGE
    assert "holds a run with other options (epochs)" in capsys.readouterr().err
    for options in (("--networks", "unet", "--epochs", 2), ("--networks", "unet", "--folds", 3)):
        assert run("study", data, "-o", out, *TINY, *options) == EXIT_USAGE  # nor one beside it
        assert "holds a run with other options (" in capsys.readouterr().err
    corrected = shutil.copytree(data, tmp_path / "data")
    mask = corrected / "masks" / "s1.png"
    Image.fromarray(~np.asarray(Image.open(mask))).save(mask)
    assert run("study", corrected, "-o", out, "--networks", "scoat", *TINY) == EXIT_USAGE
    assert "holds a run with other options (data)" in capsys.readouterr().err


def test_tables_have_means_intervals_and_a_paired_test(studied):
    text = (studied / "tables.md").read_text()
    runs = json.loads((studied / "study.json").read_text())["runs"]
    dice = [row["DSC"] for run in runs if (run["network"], run["loss"]) == ("unet++-v2", "bce-dice")
            for row in run["patients"].values()]  # fmt: skip
    line = next(line for line in text.splitlines() if line.startswith("| AttentionV2 |"))
    assert f"| {100 * math.fsum(dice) / 3:.1f}" in line
    assert text.count("other data, not comparable") == 3
    assert "| IoU | 88.10 | 86.36 |" in text and "| AttentionV2 | 88.01 | 87.14 |" in text


def test_tables_of_known_numbers(tmp_path):
    """Eight patients on which one network is better by 0.1 each: two signs of 256 are as far from 0."""
    rows = {f"p{k}": dict.fromkeys(METRICS, 0.5 + k / 100) for k in range(8)}
    worse = {name: {**row, "DSC": row["DSC"] - 0.1} for name, row in rows.items()}
    runs = [
        {"network": name, "loss": "bce-dice", "fold": 1, "folds": 1, "parameters": 2**18, "patients": patients}
        for name, patients in (("scoat", rows), ("unet", worse))
    ]
    runs.append({**runs[0], "network": "fcn", "folds": 2})  # not on all its folds
    (tmp_path / "study.json").write_text(json.dumps({"runs": runs}))
    text = tables(tmp_path / "study.json")
    assert "| U-Net | 1.00 | 43.5 (" in text and f"| {2 / 256:.3f} |" in text and "FCN" not in text
    low, high = re.search(r"\| SCOAT-Net \| 1.00 \| 53.5 \((.*?) to (.*?)\)", text).groups()
    assert 51 < float(low) < 53.5 < float(high) < 56
    runs += [{**runs[0], "loss": "bce-dice-literal"}, {**runs[1], "loss": "dice"}]
    (tmp_path / "study.json").write_text(json.dumps({"runs": runs}))
    *_, rest = tables(tmp_path / "study.json").split("In none of the paper's tables; means over 8 ")
    assert "| SCOAT-Net, BCE-Dice (equation 7 as printed) | 1.00 | 53.5 (" in rest
    assert "| U-Net, Dice | 1.00 | 43.5 (" in rest and "paper's" not in rest
    runs.append({**runs[1], "network": "unet++", "patients": {"p0": worse["p0"]}})
    (tmp_path / "study.json").write_text(json.dumps({"runs": runs}))
    with pytest.raises(ValueError, match="judged on different patients"):
        tables(tmp_path / "study.json")
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(ValueError, match="not the results of a study"):
        tables(tmp_path / "study.json")


def test_the_paper_has_a_row_for_each_of_its_networks():
    assert {*TABLE_2, *TABLE_3} - {*PAPER} == {"unet++-res"} and {*TABLE_2, *TABLE_3} == {*NETWORKS}


def test_figures_of_a_study(data, studied, tmp_path, capsys):
    ids = ",".join(path.stem for path in sorted((studied / "runs").glob("scoat-iou-fold1/predictions/*.png"))[:2])
    for name, *arguments in (
        ("3.png", "3", studied / "study.json", "--loss", "iou"),
        ("4.png", "4", studied, data, "--networks", "scoat,unet++-v2", "--slices", ids),
        ("5.png", "5", data, "--slices", ids),
        ("4.pdf", "4", studied, data, "--networks", "scoat", "--slices", ids),
        ("5.svg", "5", data, "--slices", ids, "--weights", next(studied.glob("runs/scoat-iou-fold1/weights*"))),
    ):
        for again in ("", "again"):  # equal input, equal bytes
            assert run("figure", *arguments, "-o", tmp_path / f"{again}{name}") == EXIT_OK
        assert (tmp_path / name).read_bytes() == (tmp_path / f"again{name}").read_bytes()
    published = SCOATNet(3, 1, 3, deep_supervision=True).eval()
    save(published, tmp_path / "heads.safetensors", Pretrained("test", size=32))
    weights = ("--weights", tmp_path / "heads.safetensors")
    assert run("figure", "5", data, "--slices", ids, *weights, "-o", tmp_path / "5.png") == EXIT_OK
    colours = np.asarray(Image.open(tmp_path / "4.png").convert("RGB")).reshape(-1, 3).astype(int)
    assert (np.ptp(colours, axis=1) > 100).any()  # contours in red or cyan
    for reason, *arguments in (
        ("has no slice s99", "4", studied, data, "--networks", "scoat", "--slices", "s99"),
        ("0 predictions of unet with", "4", studied, data, "--networks", "unet", "--slices", ids),
        ("no run of unet with bce-dice", "3", studied / "study.json", "--network", "unet"),
        ("neither what evaluate", "3", data / "index.csv"),
    ):
        assert run("figure", *arguments, "-o", tmp_path / "no.png") == EXIT_USAGE
        assert reason in capsys.readouterr().err
    assert run("figure", "3", studied / "study.json", "-o", tmp_path / "no.jpg") == EXIT_USAGE
    assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize("cases", [{"a": 1}, {"a": {"DSC": "x"}}, []])
def test_figure_three_names_a_file_that_is_no_result(cases, tmp_path, capsys):
    (tmp_path / "j.json").write_text(json.dumps({"cases": cases}))
    assert run("figure", "3", tmp_path / "j.json", "-o", tmp_path / "3.png") == EXIT_USAGE
    assert "j.json: neither what evaluate --json wrote nor a study.json" in capsys.readouterr().err


def test_figure_six_of_the_example(tmp_path, capsys):
    example = Path(__file__).parents[1] / "examples" / "ct.nii.gz"
    for visit in ("a", "b"):
        assert run("segment", example, "-o", tmp_path / visit, "--quiet") == EXIT_OK
    given = [f"2026-0{k}-01={tmp_path / visit / 'ct.json'}" for k, visit in enumerate(("a", "b"), 1)]
    assert run("figure", 6, *given, "-o", tmp_path / "6.png") == EXIT_OK
    assert Image.open(tmp_path / "6.png").size[0] > 400
    assert run("figure", 6, given[0], "-o", tmp_path / "6.png") == EXIT_USAGE
    assert "two or more different dates" in capsys.readouterr().err


def test_a_study_without_its_extra_says_what_it_needs(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    assert run("study", data, "-o", tmp_path / "out", "--networks", "scoat", *TINY) == EXIT_USAGE
    assert "pip install 'scoat-fast[study]'" in capsys.readouterr().err


def test_data_that_cannot_be_studied(data, tmp_path, capsys):
    assert run("study", tmp_path, "-o", tmp_path / "out", "--networks", "scoat", *TINY) == EXIT_USAGE
    assert "index.csv" in capsys.readouterr().err
    assert run("study", data, "-o", tmp_path / "out", "--networks", "scoat", *TINY, "--folds", 9) == EXIT_USAGE
    assert "only 3 patients" in capsys.readouterr().err
