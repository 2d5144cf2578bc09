"""The gradient of the weights of a 3x3 convolution on a CPU, against float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from scoat_fast import SCOATNet, winograd
from scoat_fast.convolutions import convolution, two_convolutions
from scoat_fast.ops import parity

pytestmark = pytest.mark.skipif(winograd.why_not_here() is not None, reason=f"{winograd.why_not_here()}")
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 4, 7),
    (1, 16, 16, 33, 18),
    (3, 70, 9, 6, 5),
    (2, 130, 33, 9, 26),
    (1, 8, 72, 16, 16),
    (2, 70, 9, 66, 65),
]


def made(n, channels, out, height, width) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of outputs, and inputs, with channels last."""
    torch.manual_seed(4)
    return tuple(
        torch.randn(n, count, height, width).contiguous(memory_format=torch.channels_last) for count in (out, channels)
    )


def stock(dy, x, dtype=torch.float32):
    shape = (dy.shape[1], x.shape[1], 3, 3)
    return torch.nn.grad.conv2d_weight(x.to(dtype), shape, dy.to(dtype), padding=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_gradient_within_rounding(shape):
    dy, x = made(*shape)
    error = (winograd.weight_gradient(dy, x) - stock(dy, x, torch.float64)).abs()
    assert (error <= winograd.rounding(dy, x)).all()


@pytest.mark.parametrize("shape", [(4, 16, 16, 128, 128), (1, 96, 16, 256, 256)], ids=str)
def test_over_many_pixels_it_is_as_near_to_float64_as_stock_pytorch(shape):
    """Sums over few of them stock PyTorch rounds less, on CPUs on which it adds in blocks."""
    dy, x = made(*shape)
    exact = stock(dy, x, torch.float64)
    error, stock_error = ((found - exact).abs().max() for found in (winograd.weight_gradient(dy, x), stock(dy, x)))
    assert error <= parity.SLACK * stock_error + parity.FLOOR * exact.abs().max()


def test_its_bits_depend_on_no_number_of_threads():
    dy, x = made(2, 70, 16, 64, 64)
    once = winograd.weight_gradient(dy, x)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(winograd.weight_gradient(dy, x), once)
    torch.set_num_threads(1)


@pytest.mark.parametrize("which", [0, 1], ids=["dy", "x"])
def test_nan_stays_nan(which):
    given = made(1, 3, 2, 32, 32)
    given[which][0, 1, 5, 6] = torch.nan
    found = winograd.weight_gradient(*given)
    assert (found[1] if which == 0 else found[:, 1]).isnan().all()
    assert not (found[0] if which == 0 else found[:, 0]).isnan().any()


def test_what_it_refuses(monkeypatch):
    _, x = made(1, 8, 2, 32, 32)
    assert winograd.why_not(x) is None
    assert winograd.why_not(x.double()) == "wants float32 on cpu, got float64 on cpu"
    assert winograd.why_not(x.to("meta")) == "wants float32 on cpu, got float32 on meta"
    assert winograd.why_not(x.contiguous()) == "wants channels to come last"
    assert winograd.why_not(FakeTensorMode().from_tensor(x)) == "wants a plain tensor"
    with FlopCounterMode(display=False):
        assert winograd.why_not(x) == "wants a plain tensor"
    with forward_ad.dual_level():
        assert winograd.why_not(x) == "is no standard operator, which a transform or a trace wants"
    assert "from 8 channels on, got 7" in winograd.why_not(made(1, 7, 2, 32, 32)[1])
    assert "got 49" in winograd.why_not(made(1, 8, 2, 28, 28)[1])
    monkeypatch.setenv("SCOAT_FAST_DISABLE", "convolution.cpu")
    assert "SCOAT_FAST_DISABLE" in winograd.why_not(x)


def test_an_extension_of_an_earlier_build_is_refused(monkeypatch):
    from scoat_fast import _C

    monkeypatch.delattr(_C.cpu, "weight_gradient")
    assert "was built before" in winograd.why_not_here()


def test_another_default_dtype_and_layout_change_nothing():
    dy, x = made(1, 8, 2, 32, 32)
    once = winograd.weight_gradient(dy, x)
    assert torch.equal(winograd.weight_gradient(dy.contiguous(), x), once)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(winograd.weight_gradient(dy, x), once)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def calls(monkeypatch) -> list:
    """How often the kernel was asked."""
    found = []

    def recorded(*given):
        found.append(1)
        return winograd.weight_gradient(*given)

    monkeypatch.setattr("scoat_fast.convolutions.weight_gradient", recorded)
    return found


@pytest.mark.parametrize("frozen", ["", "weight", "bias", "x"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_convolutions_take_it_where_channels_come_last(layout, frozen, calls):
    torch.manual_seed(4)
    spatial, pointwise = (nn.Conv2d(9, 3, side, padding=side // 2).to(memory_format=layout) for side in (3, 1))
    x = torch.randn(2, 9, 30, 31).contiguous(memory_format=layout)
    leaves = {"x": x, "weight": spatial.weight, "bias": spatial.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]

    def gradients(run):
        y = run(x)
        return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), wanted)

    expected = gradients(spatial)
    for run in (lambda x: convolution(x, spatial), lambda x: two_convolutions(x, spatial, pointwise)[0]):
        calls.clear()
        for found, one in zip(gradients(run), expected, strict=True):
            assert found.stride() == one.stride()
            torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5 * one.abs().max().item())
        assert len(calls) == (layout == torch.channels_last and frozen != "weight")


def test_gradients_of_gradients():
    torch.manual_seed(4)
    spatial = nn.Conv2d(8, 3, 3, padding=1)
    x = torch.randn(1, 8, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()

    def twice(run):
        (once,) = torch.autograd.grad(run(x).square().sum(), spatial.weight, create_graph=True)
        return torch.autograd.grad(once.square().sum(), (x, spatial.weight))

    for found, expected in zip(twice(lambda x: convolution(x, spatial)), twice(spatial), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_backwards_within_autocast(calls):
    torch.manual_seed(4)
    spatial = nn.Conv2d(8, 3, 3, padding=1)
    x = torch.randn(1, 8, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = torch.autograd.grad(spatial(x).square().sum(), (x, spatial.weight))
    y = convolution(x, spatial).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, (x, spatial.weight))
    for ours, one in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-5 * one.abs().max().item())
    assert len(calls) == 1


def test_what_stands_for_a_tensor_runs_in_stock_pytorch(calls):
    spatial = nn.Conv2d(8, 3, 3, padding=1)
    x = torch.randn(1, 8, 32, 32).contiguous(memory_format=torch.channels_last)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        convolution(mode.from_tensor(x).requires_grad_(), spatial).sum().backward()
    for each in torch.func.vmap(torch.func.grad(lambda x: convolution(x, spatial).square().sum()))(x[None]):
        assert each.shape == x.shape
    traced = make_fx(lambda x, w: torch.autograd.grad(convolution(x, spatial).square().sum(), spatial.weight))(x, x)
    (found,) = traced(x, x)
    (expected,) = torch.autograd.grad(spatial(x).square().sum(), spatial.weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not calls


def test_a_convolution_that_is_more_than_its_weight_is_called():
    x = torch.randn(1, 8, 32, 32).contiguous(memory_format=torch.channels_last)
    spatial = nn.Conv2d(8, 3, 3, padding=1)
    spatial.register_forward_hook(lambda module, given, y: 2 * y)
    assert torch.equal(convolution(x, spatial), 2 * F.conv2d(x, spatial.weight, spatial.bias, padding=1))
    reflecting = nn.Conv2d(8, 3, 3, padding=1, padding_mode="reflect")
    assert torch.equal(convolution(x, reflecting), reflecting(x))


def test_training_on_a_cpu_puts_channels_last_where_that_is_faster(monkeypatch):
    from scoat_fast.train.trainer import _fastest_layout

    cpu, stock = torch.device("cpu"), nn.Sequential(nn.Conv2d(8, 3, 3, padding=1))
    assert _fastest_layout(SCOATNet(width=3), cpu) == torch.channels_last
    assert _fastest_layout(stock, cpu) == torch.contiguous_format
    assert _fastest_layout(stock, torch.device("cuda")) == torch.channels_last
    monkeypatch.setenv("SCOAT_FAST_DISABLE", "convolution")
    assert _fastest_layout(SCOATNet(width=3), cpu) == torch.contiguous_format


@pytest.mark.parametrize("isa", ["avx2", "base"])
def test_narrower_instruction_sets(isa, tmp_path):
    code = (
        "import torch\n"
        "from scoat_fast import winograd\n"
        "torch.manual_seed(0)\n"
        "x, dy = (torch.randn(2, c, 21, 34).contiguous(memory_format=torch.channels_last) for c in (37, 20))\n"
        "exact = torch.nn.grad.conv2d_weight(x.double(), (20, 37, 3, 3), dy.double(), padding=1)\n"
        "error = (winograd.weight_gradient(dy, x) - exact).abs().max() / exact.abs().max()\n"
        "assert error < 3e-6, error\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"SCOAT_FAST_ISA": isa, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
