"""Networks as files for other programs."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from scoat_fast import SCOATNet, export
from scoat_fast.cli import EXIT_OK, EXIT_USAGE, main
from scoat_fast.errors import OutputError, ScoatFastError


@torch.no_grad()
def logits(net, x: torch.Tensor) -> torch.Tensor:
    return net.eval()(x)


def test_onnx_is_one_file_with_all_that_a_user_of_it_needs(net, weights, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(["export", str(weights), "-o", str(tmp_path / "net.onnx")]) == EXIT_OK
    assert "net.onnx: logits within" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    said = session.get_modelmeta().custom_metadata_map
    assert (json.loads(said["window"]), said["size"], said["threshold"]) == ([-1250.0, 250.0], "48", "0.5")
    assert "not for clinical use" in said["note"]
    (given,), (answer,) = session.get_inputs(), session.get_outputs()
    assert given.name == "slices" and given.shape[1:] == [1, 48, 48] and answer.name == "logits"
    loaded = SCOATNet.from_pretrained(weights)
    for n in (1, 4):
        x = torch.rand(n, 1, 48, 48)
        (found,) = session.run(None, {"slices": x.numpy()})
        np.testing.assert_allclose(found, logits(loaded, x), atol=1e-4)


def test_a_program_comes_back(tmp_path):
    torch.manual_seed(0)
    net = SCOATNet(width=4, deep_supervision=True, in_channels=3)
    net.pretrained = export_facts()
    error = export.export(net, tmp_path / "net.pt2", size=32)
    assert 0 <= error < 1e-5
    facts = {export.FACTS: ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=facts).module()
    said = json.loads(facts[export.FACTS])
    assert (said["name"], said["window"], said["size"], said["licence"]) == ("mine", [-1000.0, 400.0], 32, "mine alone")
    x = torch.rand(5, 3, 32, 32)
    torch.testing.assert_close(program(x), logits(net, x)[-1])
    assert net.deep_supervision and len(logits(net, x)) == 4  # the network stays as it was


def export_facts():
    from scoat_fast.pretrained import Pretrained

    return Pretrained("mine", window=(-1000.0, 400.0), size=64, licence="mine alone")


def test_a_file_with_other_answers_is_not_written(net, tmp_path, monkeypatch):
    program = export._program

    def wrong(net, x, facts):
        data, run = program(net, x, facts)
        return data, lambda x: run(x) + 0.1

    monkeypatch.setattr(export, "_program", wrong)
    with pytest.raises(ScoatFastError, match="of the largest from the network's, allowed is"):
        export.export(net, tmp_path / "net.pt2", size=16)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(net, weights, tmp_path, monkeypatch, capsys):
    with pytest.raises(OutputError, match=r"ends in \.onnx or \.pt2"):
        export.export(net, tmp_path / "net.trt")
    assert main(["export", "nowhere", "-o", str(tmp_path / "net.pt2")]) == EXIT_USAGE
    assert "neither a weights file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(weights), "-o", str(tmp_path / "net.onnx")]) == EXIT_USAGE
    assert "ONNX needs onnxruntime: pip install 'scoat-fast[export]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
