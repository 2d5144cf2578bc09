"""Two convolutions of one tensor: what two stock modules give, also to those who differentiate or change them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

from scoat_fast.convolutions import two_convolutions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made(dtype: torch.dtype, **options) -> tuple[torch.Tensor, nn.Conv2d, nn.Conv2d]:
    torch.manual_seed(6)
    convs = [nn.Conv2d(5, 3, side, padding=side // 2, dtype=dtype, device=DEVICE, **options) for side in (3, 1)]
    return torch.randn(2, 5, 6, 7, dtype=dtype, device=DEVICE, requires_grad=True), *convs


def stock(x, spatial, pointwise):
    return spatial(x), pointwise(x)


def results(run, x, spatial, pointwise) -> list[torch.Tensor]:
    """Both outputs and all gradients that are wanted."""
    wanted = [each for each in (x, *spatial.parameters(), *pointwise.parameters()) if each.requires_grad]
    outputs = run(x, spatial, pointwise)
    loss = sum((y.float() * torch.linspace(-1, k, y.numel(), device=DEVICE).view_as(y)).sum()
               for k, y in enumerate(outputs, 2))  # fmt: skip
    return [*outputs, *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 1e-2),
                                          (torch.bfloat16, 5e-2)], ids=str)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
def test_they_are_the_stock_modules(dtype, bound, layout, options):
    x, *convs = made(dtype, **options)
    convs = [conv.to(memory_format=layout) for conv in convs]
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    found, wanted = results(two_convolutions, x, *convs), results(stock, x, *convs)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    for a, b in zip(found[2:], wanted[2:], strict=True):
        assert a.dtype == b.dtype and (DEVICE == "cuda" or a.stride() == b.stride())
        torch.testing.assert_close(a, b, rtol=bound, atol=bound * b.abs().max().item())


@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (3, 5, 1, 4), (2, 5, 4, 1), (0, 5, 4, 4)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_small_and_empty_tensors(shape, layout):
    _, *convs = made(torch.float64)
    x = torch.randn(shape, dtype=torch.float64, device=DEVICE).contiguous(memory_format=layout).requires_grad_()
    torch.testing.assert_close(results(two_convolutions, x, *convs), results(stock, x, *convs))


@pytest.mark.parametrize("frozen", ["x", "spatial.weight", "pointwise.bias", "all but x"])
def test_what_wants_no_gradient_gets_none(frozen):
    x, spatial, pointwise = made(torch.float64)
    leaves = {"x": x, **{f"spatial.{name}": each for name, each in spatial.named_parameters()},
              **{f"pointwise.{name}": each for name, each in pointwise.named_parameters()}}  # fmt: skip
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == "x" if frozen == "all but x" else name != frozen)
    given = x, spatial, pointwise
    torch.testing.assert_close(results(two_convolutions, *given), results(stock, *given))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=str)
def test_many_gradients_at_once(used, layout):
    x, *convs = made(torch.float64)
    convs = [conv.to(memory_format=layout) for conv in convs]
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    outputs = two_convolutions(x, *convs)
    outputs = [outputs[i] for i in used]
    inputs = [x, *convs[0].parameters(), *convs[1].parameters()]
    given = [torch.randn(3, *y.shape, dtype=y.dtype, device=DEVICE) for y in outputs]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    together = torch.autograd.grad(outputs, inputs, given, is_grads_batched=True, **options)
    for k in range(3):
        alone = torch.autograd.grad(outputs, inputs, [many[k] for many in given], **options)
        torch.testing.assert_close([many[k] for many in together], list(alone))


def test_gradients_of_gradients():
    x, *convs = made(torch.float64)
    parameters = [parameter for conv in convs for parameter in conv.parameters()]

    def run(x, w3, b3, w1, b1):
        for conv, weight, bias in zip(convs, (w3, w1), (b3, b1), strict=True):
            del conv.weight, conv.bias
            conv.weight, conv.bias = weight, bias
        return two_convolutions(x, *convs)

    given = [x[:1, :, :3, :2].detach().clone().requires_grad_(), *(p.detach().requires_grad_() for p in parameters)]
    assert torch.autograd.gradcheck(run, given) and torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize("outside", [False, True])
def test_under_autocast(outside):
    """The backward pass runs in the dtypes of the forward pass, within autocast or not."""

    def run(of):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=not outside):
            outputs = of(x, *convs)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=outside):
            return [*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)]

    x, *convs = made(torch.float32)
    leaves = [x, *(parameter for conv in convs for parameter in conv.parameters())]
    for a, b in zip(run(two_convolutions), run(stock), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5 if outside else 2e-2, atol=1e-4 if outside else 2e-2)


def test_modules_that_are_more_than_their_weights_are_called():
    x, spatial, pointwise = made(torch.float32)
    reflecting = nn.Conv2d(5, 3, 3, padding=1, padding_mode="reflect").to(DEVICE)
    for replaced in ((spatial, nn.Identity()), (reflecting, pointwise), (nn.Sequential(spatial, nn.ReLU()), pointwise)):
        for a, b in zip(two_convolutions(x, *replaced), stock(x, *replaced), strict=True):
            assert torch.equal(a, b)
    spatial.register_forward_hook(lambda module, given, y: 2 * y)
    prune.l1_unstructured(pointwise, "weight", 0.5)  # a hook that makes the weight
    with torch.no_grad():
        pointwise.weight_orig.add_(1)
    for a, b in zip(two_convolutions(x, spatial, pointwise), stock(x, spatial, pointwise), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", ["forward", "_conv_forward"])
def test_modules_whose_methods_somebody_replaced_are_called(method):
    x, spatial, pointwise = made(torch.float32)
    original = getattr(pointwise, method)
    setattr(pointwise, method, lambda *given: 2 * original(*given))
    for a, b in zip(two_convolutions(x, spatial, pointwise), stock(x, spatial, pointwise), strict=True):
        assert torch.equal(a, b)


def test_hooks_on_all_modules_are_called():
    x, *convs = made(torch.float32)
    with register_module_forward_hook(lambda module, given, y: 2 * y):
        for a, b in zip(two_convolutions(x, *convs), stock(x, *convs), strict=True):
            assert torch.equal(a, b)
