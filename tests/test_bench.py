"""The benchmark of the operations: what it says, and that a wrong result gets no number. Nothing here about speed."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import scoat_fast
from scoat_fast import clock, ops
from scoat_fast.bench import calls, check, machine, table
from scoat_fast.bench import cohort as cohort_bench
from scoat_fast.bench import train as bench_train
from scoat_fast.bench.chart import draw
from scoat_fast.bench.chart import table as table_of
from scoat_fast.bench.ops import Plan, passed, run
from scoat_fast.cli import EXIT_FAILED_CASES, EXIT_OK, EXIT_USAGE, main
from scoat_fast.errors import BadInputError, ScoatFastError
from scoat_fast.ops._samples import Maker, Sample

BY_NAME = {op.name: op for op in ops.ALL}
TOP = {"gpu", "driver", "cpu", "versions", "commit", "date", "copy_gb_per_s", "left_out", "rows"}
ROW = {
    "op", "implementation", "sample", "shape", "dtype", "layout", "direction", "batch", "ms", "gb_per_s",
    "share_of_copy", "error", "reason", "ratio_to_eager", "ratio_to_compile",
}  # fmt: skip
SMALL = {
    "upsample": lambda make, n: [("level 0", (make.normal(n, 3, 4, 5), [make.normal(n, 2, 8, 10)]))],
    "spatial_gate": lambda make, n: [
        ("level 1", (make.normal(n, 3, 4, 5), make.uniform(n, 1, 8, 10), [make.normal(n, 2, 8, 10)], True)),
    ],
    "channel_gate": lambda make, n: [
        ("level 1", (make.normal(n, 6, 5, 4), make.normal(8, 6), make.normal(6, 8), None)),
        ("level 1 means", (make.normal(n, 6, 5, 4), make.normal(8, 6), make.normal(6, 8), make.normal(n, 6).float())),
    ],
    "batch_norm_relu": lambda make, n: [
        ("level 0", (make.normal(n, 6, 5, 4) + 1, *make.uniform(2, 6).float(), make.normal(n, 6, 5, 4), 1e-5)),
    ],
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small samples in place of the network's own, and a short copy."""
    for name, make in SMALL.items():

        def real(dtype, device, batch=1, layout="contiguous", make=make):
            return (Sample(*sample) for sample in make(Maker(dtype, device, layout), batch))

        monkeypatch.setattr(importlib.import_module(f"scoat_fast.ops.{name}.samples"), "real", real)
    monkeypatch.setattr(clock, "FLUSH", 1 << 10)
    monkeypatch.setattr(clock, "COPIED", {"cpu": 1 << 12})


def plan(**options) -> Plan:
    return Plan(torch.device("cpu"), **{"seconds": 0.0, **options})


def sample(name: str, **options) -> Sample:
    return next(BY_NAME[name].samples("real", torch.float32, **options))


def has_kernels() -> bool:
    return calls.refusal(BY_NAME["upsample"], "cpu", sample("upsample", batch=0).args) is None


needs_kernels = pytest.mark.skipif("not has_kernels()", reason="the extension is not built")


def test_run_measures_every_case_and_saves_it(tmp_path, capsys):
    output = tmp_path / "ops.json"
    layouts = ("contiguous", "channels_last")
    result = run(plan(layouts=layouts, batches=(1, 2), dtypes=("float32", "bfloat16")), "abc", output)
    assert json.loads(output.read_text()) == result
    assert result.keys() >= TOP
    assert passed(result)
    assert result["commit"] == "abc" and result["copy_gb_per_s"] > 0
    implementations = 2 if has_kernels() else 1
    assert len(result["rows"]) == 5 * 2 * 2 * 2 * 2 * implementations
    printed = capsys.readouterr().out.splitlines()
    for row in result["rows"]:
        assert row.keys() == ROW
        assert row["reason"] is None, row
        assert row["ms"] > 0 and row["gb_per_s"] > 0 and row["ratio_to_eager"] > 0 and row["error"] < 0.1
        assert row["ratio_to_compile"] is None
        assert row["shape"][0] == row["batch"]
        assert table.line(row) in printed
    assert "CPU" in printed[0] and "torch" in printed[0]
    assert "copy" in printed[2]


def test_lines_are_aligned():
    row = dict.fromkeys(ROW) | {"op": "upsample", "ms": 1.5, "error": 1e-3, "ratio_to_eager": 2.0}
    failed = row | {"ms": None, "reason": "result 0 is wrong"}
    head = table.head({**machine.facts(torch.device("cpu")), "copy_gb_per_s": 12.3}).splitlines()[-1]
    assert len(head) == len(table.line(row))
    assert table.line(failed).startswith(table.line(row).replace("1.500", "    -"))
    assert table.line(failed).endswith("no time: result 0 is wrong")


@needs_kernels
@pytest.mark.parametrize("wrong_by", [1e-3, torch.nan])
def test_a_wrong_result_gets_no_number(monkeypatch, wrong_by):
    from scoat_fast.ops import _native

    right = _native.up_forward

    def wrong(y, gate, out, *rest):
        right(y, gate, out, *rest)
        out[-1, -1, -1, -1] += wrong_by

    monkeypatch.setattr(_native, "up_forward", wrong)
    result = run(plan(names=("upsample",), directions=("forward",)))
    assert not passed(result)
    rows = result["rows"]
    assert [row["implementation"] for row in rows] == ["eager", "cpu"]
    assert rows[0]["ms"] is not None
    assert {rows[1][key] for key in ("ms", "gb_per_s", "share_of_copy", "ratio_to_eager")} == {None}
    assert "result 0" in rows[1]["reason"]
    assert rows[1]["error"] is None if wrong_by != wrong_by else rows[1]["error"] > 1e-5


@needs_kernels
def test_what_a_kernel_leaves_out_shows(monkeypatch):
    from scoat_fast.ops import _native

    monkeypatch.setattr(_native, "affine", lambda *args, **rest: None)
    rows = run(plan(names=("spatial_gate", "channel_gate"), directions=("forward",)))["rows"]
    assert all((row["ms"] is None) == (row["implementation"] == "cpu") for row in rows)


@needs_kernels
def test_a_failure_costs_no_other_row(monkeypatch, capsys):
    from scoat_fast.ops import _native

    def broken(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(_native, "up_forward", broken)
    rows = run(plan())["rows"]
    failed = [row for row in rows if row["ms"] is None]
    assert {(row["op"], row["direction"]) for row in failed} == {("upsample", "forward"), ("spatial_gate", "forward")}
    assert {row["reason"] for row in failed} == {"RuntimeError: out of luck"}
    assert "out of luck" in capsys.readouterr().out


def test_what_cannot_run_is_named_once(monkeypatch, capsys):
    monkeypatch.setenv("SCOAT_FAST_DISABLE", "cpu")
    result = run(plan())
    assert result["left_out"].keys() == {f"{name} cpu" for name in BY_NAME}
    assert {row["implementation"] for row in result["rows"]} == {"eager"}
    assert capsys.readouterr().out.count("channel_gate has no cpu here") == 1


def test_implementations_of_another_device_are_refused():
    with pytest.raises(ScoatFastError, match="on cpu the implementations are eager, compile, cpu, not triton"):
        run(plan(implementations=("triton",)))


@pytest.mark.parametrize("what", ["ops", "model", "train", "cohort no.nii"])
def test_an_output_that_cannot_be_written_shows_at_once(tmp_path, monkeypatch, capsys, what):
    monkeypatch.setattr(clock, "COPIED", {})
    monkeypatch.setattr(bench_train, "SCOATNet", None)
    monkeypatch.setattr(cohort_bench, "Segmenter", None)
    output = tmp_path / "missing" / "out.json"
    assert main(["bench", *what.split(), "--device", "cpu", "-o", str(output)]) == EXIT_USAGE
    assert "out.json: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "x"])
@pytest.mark.parametrize("what", ["ops", "cohort no.nii"])
def test_seconds_that_are_none_are_refused(capsys, what, seconds):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *what.split(), "--device", "cpu", "--seconds", seconds])
    assert stop.value.code == EXIT_USAGE
    assert f"argument --seconds: a number of seconds is wanted, got '{seconds}'" in capsys.readouterr().err


@needs_kernels
@pytest.mark.parametrize("direction", calls.DIRECTIONS)
@pytest.mark.parametrize("name", BY_NAME)
def test_the_public_function_is_called_as_on_a_gpu(monkeypatch, name, direction):
    """With its own allocations: what runs on a GPU, run here."""
    monkeypatch.setattr(calls, "PREALLOCATED", {})
    op, args = BY_NAME[name], sample(name, batch=2).args
    grads = calls.gradients_of_outputs(op, args)
    truth = check.truth(op, direction, args, grads)
    for implementation in ("eager", "cpu"):
        with ops.use_backend(implementation if implementation == "cpu" else None):
            results = calls.call_of(op, implementation, direction, args, grads)()
        assert check.judge(results, truth).reason is None
    results[0].view(-1)[0] += 1
    assert check.judge(results, truth).reason is not None


@pytest.mark.parametrize("direction", calls.DIRECTIONS)
@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in check.MIXED])
def test_a_large_batch_is_checked_at_its_ends(monkeypatch, name, direction):
    monkeypatch.setattr(check, "CPU_ROOM", 0)
    op, args = BY_NAME[name], sample(name, batch=5).args
    grads = calls.gradients_of_outputs(op, args)
    truth = check.truth(op, direction, args, grads)
    assert not truth.whole and len(truth.exact[0]) == 2
    results = [x.clone() for x in calls.call_of(op, "eager", direction, args, grads)()]
    assert check.judge(results, truth).reason is None
    for place, seen in ((0, True), (2, False), (4, True)):
        wrong = [results[0].clone(), *results[1:]]
        wrong[0][place] += 1
        assert (check.judge(wrong, truth).reason is not None) == seen


def test_a_batch_whose_samples_depend_on_each_other_is_checked_as_a_whole(monkeypatch):
    monkeypatch.setattr(check, "CPU_ROOM", 0)
    op, args = BY_NAME["batch_norm_relu"], sample("batch_norm_relu", batch=5).args
    assert check.truth(op, "forward", args, calls.gradients_of_outputs(op, args)).whole


def test_bytes_by_hand():
    """Floats of 4 bytes; maps [2, 3, 4, 5] are upsampled to [2, 3, 8, 10]."""
    y, up, row, attention = 2 * 3 * 20 * 4, 2 * 3 * 80 * 4, 2 * 2 * 80 * 4, 2 * 80 * 4
    args = sample("upsample", batch=2).args
    assert calls.minimal_bytes("upsample", "forward", args) == y + row + (row + up)
    assert calls.minimal_bytes("upsample", "backward", args) == up + y
    args = sample("spatial_gate", batch=2).args
    assert calls.minimal_bytes("spatial_gate", "forward", args) == y + attention + row + (row + up)
    assert calls.minimal_bytes("spatial_gate", "backward", args) == (row + up) + y + attention + y + attention + row
    alone = (*args[:2], [], False)
    assert calls.minimal_bytes("spatial_gate", "forward", alone) == y + attention + up
    assert calls.minimal_bytes("spatial_gate", "backward", alone) == up + y + attention + y + attention
    without, known = (s.args for s in BY_NAME["channel_gate"].samples("real", torch.bfloat16, batch=2))
    x = 2 * 6 * 20 * 2
    assert calls.minimal_bytes("channel_gate", "forward", without) == x + x + x
    assert calls.minimal_bytes("channel_gate", "forward", known) == x + x
    assert calls.minimal_bytes("channel_gate", "backward", known) == x + x + x
    assert calls.minimal_bytes("channel_gate", "backward", without) == x + x + x + x


def test_machine_facts():
    facts = machine.facts(torch.device("cpu"))
    assert facts["gpu"] is None and facts["driver"] is None
    assert "threads" in facts["cpu"] and len(facts["date"]) == 10
    assert facts["versions"]["torch"] == torch.__version__ and facts["versions"]["scoat_fast"]
    assert machine.facts(torch.device("cpu"), "abc")["commit"] == "abc"


def test_the_median_is_of_at_least_five_runs():
    count = []
    assert clock.median_ms(lambda: count.append(1), torch.device("cpu"), 0.0) > 0
    assert len(count) == 1 + clock.FEWEST


def results_file(path, **changes):
    row = dict.fromkeys(ROW) | {"batch": 1, "dtype": "float32", "layout": "contiguous", "implementation": "cpu"}
    row |= {"op": "upsample", "sample": "level 0", "direction": "forward", "ratio_to_eager": 2.0} | changes
    path.write_text(json.dumps({"gpu": None, "cpu": "any", "rows": [row]}))
    return path


def model_results(path, **changes):
    row = {"width": 32, "batch": 1, "size": 512, "dtype": "float32", "us_per_slice": 3e6} | changes
    row |= {"percent_of_floor": 12.0, "peak_mib": None}
    rows = [row | {"name": "eager float32"}, row | {"name": "engine cpu float32", "us_per_slice": 1e6}]
    rows[1] |= {"percent_of_floor": 36.0, "peak_mib": 700.0}
    rows.append(row | {"name": "engine triton bfloat16", "us_per_slice": None})
    path.write_text(json.dumps({"gpu": None, "cpu": "any", "rows": rows}))
    return path


def test_results_as_a_table(tmp_path):
    assert table_of(model_results(tmp_path / "model.json")).splitlines() == [
        "| | width, size, batch | ms a slice | slices/s | x eager | % of floor | peak MiB |",
        "|---|---|---|---|---|---|---|",
        "| eager float32 | 32, 512x512, 1 | 3000 | 0.333 | 1.00 | 12 | |",
        "| engine cpu float32 | 32, 512x512, 1 | 1000 | 1 | 3.00 | 36 | 700 |",
    ]
    with pytest.raises(BadInputError, match="wanted results of scoat-fast bench model"):
        table_of(results_file(tmp_path / "ops.json"))
    nothing = (
        model_results(tmp_path / "none.json").read_text().replace("3000000.0", "null").replace("1000000.0", "null")
    )
    (tmp_path / "none.json").write_text(nothing)
    with pytest.raises(BadInputError, match="got none"):
        table_of(tmp_path / "none.json")


def test_steps_of_training_are_checked_before_they_are_timed(tmp_path, monkeypatch):
    options = {"widths": (4,), "batches": (2,), "size": 32, "steps": 3, "seconds": 0.0}
    result = bench_train.run(torch.device("cpu"), **options, commit="abc", output=tmp_path / "train.json")
    assert json.loads((tmp_path / "train.json").read_text()) == result and result["commit"] == "abc"
    assert [row["name"] for row in result["rows"]][::2] == ["eager float32", "SCOATNet float32"]
    assert bench_train.passed(result)
    lines = table_of(tmp_path / "train.json").splitlines()
    assert len(lines) == 6 and lines[2].startswith("| eager float32 | 4, 32x32, 2 | ") and "| 1.00 |" in lines[2]
    draw(tmp_path / "train.json", tmp_path / "train.png")
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")
    for row in result["rows"]:
        assert row["ms_per_step"] > 0 and row["images_per_s"] == pytest.approx(2000 / row["ms_per_step"])
        assert len(row["losses"]) == 3 and row["losses"][0] == pytest.approx(result["rows"][0]["losses"][0], rel=1e-4)
        assert row["ratio_to_eager"] > 0 and row["error"] < 0.05
    for eager, ours in zip(result["rows"][:2], result["rows"][2:], strict=True):  # what is cheap to make is not kept
        assert 0.3 < ours["peak_mib"] / eager["peak_mib"] < 0.8
    monkeypatch.setattr(bench_train, "CURVE_BOUND", -1.0)
    rows = bench_train.run(torch.device("cpu"), **options)["rows"]
    assert [row["ms_per_step"] is None for row in rows] == [False, True, True, True]
    assert "losses lie" in rows[1]["reason"] and not bench_train.passed({"rows": rows})
    monkeypatch.setattr(bench_train, "BOUND", {torch.float32: -1.0})
    rows = bench_train.run(torch.device("cpu"), **options)["rows"]
    assert all("its gradient's error" in row["reason"] and row["losses"] is None for row in rows)


def test_a_batch_without_an_exact_gradient_costs_no_other(capsys):
    batches, steps = (1, 2), 1
    rows = bench_train.run(torch.device("cpu"), (4,), batches, size=16, steps=steps, seconds=0.0)["rows"]
    assert [row["batch"] for row in rows] == [1] * 4 + [2] * 4
    assert all(row["reason"].startswith("ValueError: Expected more than 1 value per channel") for row in rows[:4])
    assert all(row["ms_per_step"] is row["ratio_to_eager"] is None for row in rows[:4])
    assert all(row["error"] > 0 for row in rows[4:])
    assert "no time: ValueError: Expected more than 1 value" in capsys.readouterr().out


def test_discs_are_there_to_be_found():
    images, masks = bench_train.slices(6, 64)
    assert images.shape == masks.shape == (6, 1, 64, 64) and images.min() >= 0 and images.max() <= 1
    assert (masks.sum((1, 2, 3)) > 0).all() and images[masks == 1].mean() > images[masks == 0].mean() + 0.3


def test_the_readme_says_what_the_results_say():
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, root / "benchmarks" / "report.py", "--check"], check=True)


def test_the_report_names_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    with pytest.raises(SystemExit, match=r"^report\.py: a study needs scipy: pip install 'scoat-fast\[study\]'$"):
        runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "report.py"), run_name="__main__")


def test_a_chart_names_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ScoatFastError, match=r"scoat-fast\[bench\]"):
        draw(results_file(tmp_path / "ops.json"), tmp_path / "ops.png")


def test_a_chart_wants_results(tmp_path):
    with pytest.raises(BadInputError, match="ratio to eager, got none"):
        draw(results_file(tmp_path / "ops.json", ratio_to_eager=None), tmp_path / "ops.png")
    (tmp_path / "ops.json").write_text("[]")
    with pytest.raises(BadInputError, match=r"ops\.json: wanted results"):
        draw(tmp_path / "ops.json", tmp_path / "ops.png")
    with pytest.raises(BadInputError):
        draw(tmp_path / "missing.json", tmp_path / "ops.png")
    (tmp_path / "ops.json").write_text('{"rows": []}')
    with pytest.raises(BadInputError, match="ratio to eager, got none"):
        draw(tmp_path / "ops.json", tmp_path / "ops.png")
    (tmp_path / "ops.json").write_text('{"rows": [{"share_of_engine": 0.9, "slices_per_s": 3.0}]}')
    with pytest.raises(BadInputError, match=r"ops\.json: wanted results of scoat-fast bench ops, model or train$"):
        draw(tmp_path / "ops.json", tmp_path / "ops.png")


@pytest.mark.parametrize("results", [results_file, model_results])
def test_chart(tmp_path, results):
    pytest.importorskip("matplotlib")
    draw(results(tmp_path / "results.json"), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_eager_baseline_is_the_published_network():
    from conftest import GOLDEN
    from test_model import golden, load_golden

    from scoat_fast.bench.eager import EagerSCOATNet

    path = GOLDEN / "published_w8_c1_in1.npz"
    net, file, state = load_golden(path)
    eager = EagerSCOATNet(net.width)
    eager.load_state_dict(state, strict=True)
    x = golden(file, "input").double()
    for mode in ("eval", "train"):
        expected = golden(file, f"{mode}/output0")
        output = eager.double().train(mode == "train")(x)
        assert (output - expected).abs().max() <= 1e-10 * expected.abs().max().clamp(min=1)


def test_model_rows_are_checked_before_they_are_timed(tmp_path, monkeypatch, capsys):
    from scoat_fast.bench import contenders, model

    monkeypatch.setattr(clock, "FLUSH", 1 << 10)
    monkeypatch.setattr(clock, "COPIED", {"cpu": 1 << 12})
    path = tmp_path / "model.json"
    where = {"device": torch.device("cpu"), "widths": (3,), "size": 32, "seconds": 0.01}
    result = model.run(**where, batches=(2,), output=path, details=True)
    assert model.passed(result)
    assert json.loads(path.read_text()) == result
    names = [contender.name for contender in contenders.contenders(torch.device("cpu"), compile=False)]
    assert [row["name"] for row in result["rows"]] == names
    assert {"eager float32", "SCOATNet float32", "engine reference float32"} <= set(names)
    for row in result["rows"]:
        assert row["us_per_slice"] > 0 and row["percent_of_floor"] > 0
        assert row["ms_per_batch"] == pytest.approx(row["us_per_slice"] * row["batch"] / 1000)
        assert row["error"] < {"float32": 1e-5, "bfloat16": 0.1}[row["dtype"]]
        assert {"name", "width", "batch", "dtype", "us_per_slice", "peak_mib", "error"} <= row.keys()
        assert (row["peak_mib"] is None) == row["name"].startswith("ONNX")
    peaks = {row["name"]: row["peak_mib"] for row in result["rows"]}
    held = scoat_fast.compile(model.SCOATNet(width=3), backend="reference", batch_sizes=(2,), size=32).memory_bytes
    assert held / 2**20 <= peaks["engine reference float32"] and peaks["eager float32"] > 0
    backends = Counter(row["backend"] for row in result["steps"])
    amx = contenders.engines(torch.device("cpu")).get(torch.bfloat16, ())
    assert backends == {"cpu": 59} | dict.fromkeys(amx, 55)  # level 0 is upsampled on the way in
    assert len(result["convolutions"]) == 20
    assert all(row["us_per_slice"] > 0 for part in ("steps", "convolutions") for row in result[part])
    for row in result["steps"]:
        assert row["percent_of_floor"] == pytest.approx(100 * row["floor_us"] / row["us_per_slice"])

    everyone = model.contenders

    class Wrong(model.SCOATNet):
        def forward(self, x):
            return super().forward(x) * 1.01

    monkeypatch.setattr(model, "SCOATNet", Wrong)
    monkeypatch.setattr(model, "contenders", lambda *which: (c for c in everyone(*which) if "ONNX" not in c.name))
    result = model.run(**where)
    assert not model.passed(result)
    wrong = [row for row in result["rows"] if row["name"].startswith("SCOATNet")]
    assert all(row["us_per_slice"] is None and "allowed is" in row["reason"] for row in wrong)
    assert "no time: its error is 1.0e-02" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "reason"), [("__call__", "its error is"), ("mask", "the Dice of its mask with its")]
)
def test_a_model_row_is_checked_in_every_slice_and_its_mask(monkeypatch, method, reason):
    from scoat_fast.bench import contenders, model

    run = getattr(contenders.Engine, method)
    x, net = torch.rand(3, 1, 32, 32), model.SCOATNet(width=3).eval()
    exact = contenders.baseline_of(net).double()(x.double()).detach()
    contender = contenders.Contender("engine", torch.float32, contenders._engine("reference", torch.float32))
    assert model.measure(contender, net, x, exact, 0.0)["reason"] is None

    def broken(self, batch, *rest):
        found = run(self, batch, *rest)
        found[1:] = 0
        return found

    monkeypatch.setattr(contenders.Engine, method, broken)
    row = model.measure(contender, net, x, exact, 0.0)
    assert row["us_per_slice"] is None and reason in row["reason"]


def test_float8_must_find_the_same_pixels():
    from scoat_fast.bench import contenders, model
    from scoat_fast.engine.layout import FLOAT8

    exact = torch.linspace(-0.1, 1, 64).view(1, 1, 8, 8).double()
    contender = contenders.Contender("engine", FLOAT8, None)
    assert model.wrong(contender, 0.01, exact + 0.01, exact, None) is None
    assert "the Dice of its mask is" in model.wrong(contender, 0.4, exact - 0.4, exact, None)


# Cohorts


def test_a_cohort_is_timed_beside_the_engine_and_a_plain_loop(ct, weights, tmp_path, capsys, monkeypatch):
    file = tmp_path / "cohort.json"
    arguments = ["bench", "cohort", str(ct), "--copies", "3", "--rounds", "2", "--seconds", "0", "--device", "cpu"]
    assert main([*arguments, "--weights", str(weights), "-o", str(file), "--commit", "abc"]) == EXIT_OK
    result = json.loads(file.read_text())
    assert (result["cases"], result["slices"], result["shape"], result["commit"]) == (4, 24, [40, 36, 6], "abc")
    cohort, engine, host, loop = result["rows"]
    assert host["name"] == "the host alone" and host["slices_per_s"] > 0
    assert cohort["dice"] == 1.0 and cohort["reason"] is None
    assert cohort["share_of_engine"] == pytest.approx(cohort["slices_per_s"] / engine["slices_per_s"])
    assert cohort["ratio_to_loop"] == pytest.approx(cohort["slices_per_s"] / loop["slices_per_s"])
    assert 0 <= cohort["waited_for_reading"] < 1 and 0 <= cohort["waited_for_writing"] < 1 and cohort["peak_mib"] > 50
    assert "4 cases of 40 x 36 x 6" in capsys.readouterr().out
    assert table_of(file).splitlines()[0] == "| 4 scans of 6 slices | slices/s | x loop |"
    assert main([*arguments, "--weights", str(weights), "-o", str(file), "--dtype", "bfloat16"]) == EXIT_OK
    rounded = json.loads(file.read_text())
    assert (result["dtype"], rounded["dtype"]) == ("float32", "bfloat16")
    assert rounded["rows"][0]["dice"] >= cohort_bench.ROUNDED_DICE
    monkeypatch.setattr(cohort_bench, "DICE", 1.1)  # another answer
    assert main([*arguments, "--weights", str(weights), "-o", str(file)]) == EXIT_FAILED_CASES
    first = json.loads(file.read_text())["rows"][0]
    assert first["slices_per_s"] is first["share_of_engine"] is first["ratio_to_loop"] is None
    assert "Dice of 1.0000, wanted is 1.1" in first["reason"]


def test_a_cohort_of_scans_of_another_shape_and_an_untrained_network(ct, tmp_path):
    file = tmp_path / "cohort.json"
    arguments = ["--copies", "1", "--rounds", "1", "--seconds", "0", "--device", "cpu", "-o", str(file)]
    made = ["--shape", "50", "44", "9", "--untrained", "3", "32", "--threads", "2"]
    assert main(["bench", "cohort", str(ct), *arguments, *made]) == EXIT_OK
    result = json.loads(file.read_text())
    assert (result["cases"], result["slices"], result["shape"], result["size"]) == (1, 9, [50, 44, 9], 32)


def test_a_cohort_of_bad_scans_is_an_error(ct, weights, tmp_path, capsys):
    ct.write_bytes(ct.read_bytes()[:500])
    assert main(["bench", "cohort", str(ct), "--weights", str(weights)]) == EXIT_USAGE
    assert "truncated or damaged" in capsys.readouterr().err
    assert main(["bench", "cohort", str(tmp_path / "no.nii"), "--weights", str(weights)]) == EXIT_USAGE
    assert "cannot be copied: No such file" in capsys.readouterr().err


def test_memory_growth_is_that_of_the_whole():
    memory = cohort_bench._Memory()
    memory._seen = [100] * 10 + [200] * 10 + [250] * 10 + [300] * 10
    assert (memory.peak, memory.growth) == (300, 200)
