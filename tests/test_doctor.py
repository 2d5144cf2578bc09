"""``scoat-fast doctor``: what it finds, prints and switches off."""

from __future__ import annotations

import json

import pytest
import torch

from scoat_fast import SCOATNet, doctor, ops
from scoat_fast import compile as compile_network
from scoat_fast.cli import EXIT_FAILED_CASES, EXIT_OK, EXIT_USAGE, main
from scoat_fast.ops import _verdict

native = pytest.importorskip("scoat_fast.ops.upsample.native_impl", exc_type=ImportError)
Y = torch.rand(1, 2, 3, 3)


@pytest.fixture(autouse=True)
def own_verdict(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _verdict.forget()
    yield
    _verdict.forget()


def examine(*options: str) -> int:
    return main(["doctor", "--device", "cpu", *options])


def test_a_well_machine(tmp_path, capsys):
    assert examine("--json", str(tmp_path / "found.json")) == EXIT_OK
    page = capsys.readouterr().out
    for op in ops.ALL:
        rows = [line.split() for line in page.splitlines()]
        assert any(row[:2] == [op.name, "cpu"] and row[-2:] == ["runs", "here"] for row in rows), page
    assert torch.__version__ in page
    assert "does not run on cpu tensors" in page
    found = json.loads((tmp_path / "found.json").read_text())
    rows = [f for f in found["findings"] if f["implementation"] == "cpu"]
    assert len(rows) == 3 * len(ops.ALL) + 1 + 3  # the gradient of a convolution, and the engine
    well = [f for f in rows if f["status"] == "ok"]
    assert len(well) == 3 * len(ops.ALL) + 1 + 1  # the engine on a CPU computes in float32 alone
    assert all(0 < f["error"] <= f["bound"] for f in well)
    assert found["switched_off"] == {}
    assert not _verdict.path().exists()


def slightly_wrong(y, row):
    return torch.nn.functional.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True) * 1.01


def broken(y, row):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(("kernel", "status"), [(slightly_wrong, "out of bounds"), (broken, "broken")])
def test_a_bad_kernel_is_switched_off_until_it_is_well(kernel, status, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(native, "forward", kernel)
        assert examine() == EXIT_FAILED_CASES
        assert f"upsample.cpu is switched off by scoat-fast doctor: {status} in float32" in capsys.readouterr().out
        choice = ops.explain("upsample", Y, [])
        assert choice.implementation == "reference"
        assert "switched off by scoat-fast doctor" in choice.refusals["cpu"]
        assert torch.equal(ops.upsample(Y), ops.ALL[0].stock(Y))
        assert ops.explain("channel_gate", torch.rand(1, 16, 2, 2), torch.rand(1, 16), torch.rand(16, 1), None)
        with ops.use_backend("cpu"), pytest.raises(RuntimeError, match="switched off"):
            ops.upsample(Y)
        assert examine("--quiet") == EXIT_FAILED_CASES  # it judges anew, and says only this
        assert capsys.readouterr().out.startswith("upsample.cpu is switched off")
    assert examine("--quiet") == EXIT_OK
    assert ops.explain("upsample", Y, []).implementation == "cpu"


def test_a_bad_backend_of_the_engine_is_switched_off(monkeypatch, capsys):
    from scoat_fast.engine import cpu

    net = SCOATNet(width=3)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "KERNEL_TO_POINTS", cpu.KERNEL_TO_POINTS * 1.01)
        assert examine() == EXIT_FAILED_CASES
        assert "engine.cpu is switched off by scoat-fast doctor: out of bounds in float32" in capsys.readouterr().out
    assert compile_network(net, size=16).backend == "reference"
    assert examine("--quiet") == EXIT_OK
    assert compile_network(net, size=16).backend == "cpu"


def test_a_verdict_holds_for_its_machine_and_versions_alone(monkeypatch):
    _verdict.path().parent.mkdir(parents=True)
    off = {"upsample.cpu": "is switched off"}
    _verdict.path().write_text(json.dumps({"another machine": off}))
    assert ops.explain("upsample", Y, []).implementation == "cpu"
    _verdict.forget()
    _verdict.path().write_text(json.dumps({"another machine": off, _verdict.machine("cpu"): off}))
    assert ops.explain("upsample", Y, []).implementation == "reference"
    assert examine("--quiet") == EXIT_OK
    assert json.loads(_verdict.path().read_text()) == {"another machine": off}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": 3}'])
def test_a_damaged_verdict_is_an_error_that_the_doctor_mends(text, capsys):
    _verdict.path().parent.mkdir(parents=True)
    _verdict.path().write_text(text)
    with pytest.raises(Exception, match=r"doctor.json: damaged; run scoat-fast doctor"):
        ops.upsample(Y)
    assert examine("--quiet") == EXIT_OK
    assert ops.explain("upsample", Y, []).implementation == "cpu"


def test_a_verdict_that_cannot_be_written_is_an_error(monkeypatch, capsys, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(native, "forward", slightly_wrong)
    assert examine("--quiet") == EXIT_USAGE
    assert "cache" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_costs_no_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "diagnose", None)
    assert examine("--json", str(tmp_path / "no" / "found.json")) == EXIT_USAGE
    assert "found.json: cannot be written: No such file" in capsys.readouterr().err


def test_a_switched_off_kernel_is_not_examined(monkeypatch, capsys):
    monkeypatch.setenv("SCOAT_FAST_DISABLE", "upsample.cpu")
    assert examine() == EXIT_OK
    assert "SCOAT_FAST_DISABLE=upsample.cpu" in capsys.readouterr().out
    assert doctor.diagnose("cpu")
