"""The layers: what is fused is what the stock layers compute, and whatever somebody puts in their place is called."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from scoat_fast import SCOATNet
from scoat_fast.bench.eager import EagerSCOATNet
from scoat_fast.layers import ChannelAttention, norm_relu, pad_to_multiple


def by_stock(norm, x, residual=None):
    return F.relu(norm(x) if residual is None else norm(x) + residual)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-3}, {"affine": False},
                                     {"track_running_stats": False}], ids=str)  # fmt: skip
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_stock_layer_then_relu(options, with_residual, dtype):
    generator = torch.Generator().manual_seed(4)
    ours, stock = (nn.BatchNorm2d(5, **options).to(dtype) for _ in range(2))
    for parameter in (*stock.parameters(), *ours.parameters()):
        nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    for training in (True, True, False, True):
        ours.train(training), stock.train(training)
        x = torch.randn(3, 5, 7, 6, generator=generator, dtype=dtype) * 3 + 2
        residual = torch.randn(3, 5, 7, 6, generator=generator, dtype=dtype) if with_residual else None
        results = []
        for layer, run in ((ours, norm_relu), (stock, by_stock)):
            leaves = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
            y = run(layer, *leaves)
            (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
            results.append([y, *(t.grad for t in leaves), *(p.grad for p in layer.parameters())])
            layer.zero_grad()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-5)
        for name, value in stock.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)


class Wrapped(nn.Module):
    """As what checkpoints, shards or compiles a module."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *given):
        self.calls += 1
        return self.module(*given)


def stock_and_ours(**options):
    torch.manual_seed(3)
    ours = SCOATNet(width=4, **options).double()
    stock = EagerSCOATNet(width=4, **options).double()
    stock.load_state_dict(ours.state_dict())
    return ours, stock, torch.rand(2, 1, 32, 48, dtype=torch.float64)


def gradients(net, x):
    net.zero_grad()
    y = net(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y, *(parameter.grad for parameter in net.parameters())]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "places", ["bn1 bn2 W_x.1", "downsample W_x W_y ca.fc", "conv1 W_x.0 W_y.0 downsample.0", "ca"]
)
def test_modules_that_somebody_wrapped_are_called(places, training):
    ours, stock, x = stock_and_ours()
    ours.train(training), stock.train(training)
    wrapped = []
    for place in places.split():
        for name, module in [*ours.named_modules()]:
            if f".{name}".endswith(f".{place}") and not name.startswith("final"):
                wrapped.append(Wrapped(module))
                ours.set_submodule(name, wrapped[-1])
    for a, b in zip(gradients(ours, x), gradients(stock, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    assert len(wrapped) > 5 and all(wrapper.calls == 1 for wrapper in wrapped)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_hooks_on_every_module_see_what_they_see_in_stock_pytorch(training):
    ours, stock, x = stock_and_ours()
    seen = ({}, {})
    for net, kept in zip((ours, stock), seen, strict=True):
        net.train(training)
        for name, module in net.named_modules():
            module.register_forward_hook(lambda module, given, y, name=name, kept=kept: kept.update({name: y}))
    for a, b in zip(gradients(ours, x), gradients(stock, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    assert {name for name, _ in ours.named_modules()} == seen[0].keys()
    common = [name for name in seen[0].keys() & seen[1].keys() if torch.is_tensor(seen[0][name])]
    assert len(common) > 100
    for name in common:
        torch.testing.assert_close(seen[0][name], seen[1][name], rtol=1e-7, atol=1e-8, msg=name)


def test_another_layer_than_a_projection_is_no_projection():
    """What it gives of an upsampled map is not the upsampled map of what it gives."""
    ours, stock, x = stock_and_ours()
    for net in (ours, stock):
        torch.manual_seed(5)
        for name, module in [*net.named_modules()]:
            if name.endswith("W_y.0"):
                wider = nn.Conv2d(module.in_channels, module.out_channels, 3, padding=1).double()
                net.set_submodule(name, wider)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-7, atol=1e-8)


class Doubled(nn.Linear):
    """As an adapter: more than its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("known", [True, False], ids=["means", "no means"])
def test_layers_of_excitation_that_are_replaced_or_hooked_are_called(known):
    torch.manual_seed(3)
    ours, x = ChannelAttention(32).double(), torch.rand(2, 32, 5, 7, dtype=torch.float64)
    nn.init.uniform_(ours.fc[0].weight)  # none of which is dead behind its ReLU
    means = x.mean((2, 3)) if known else None

    def expected():
        return x * ours.fc(x.mean((2, 3)))[:, :, None, None]

    torch.testing.assert_close(ours(x, means), expected())
    before, called = expected(), []
    hook = ours.fc.register_forward_hook(lambda module, given, y: called.append(y))
    ours(x, means)
    assert called
    hook.remove()
    prune.l1_unstructured(ours.fc[0], "weight", 0.5)  # a hook that makes the weight
    with torch.no_grad():
        ours.fc[0].weight_orig.mul_(3)
    torch.testing.assert_close(ours(x, means), expected())
    ours.fc[2].__class__ = Doubled
    torch.testing.assert_close(ours(x, means), expected())
    assert (expected() - before).abs().max() > 0.01
    ours.fc[2] = nn.Linear(2, 32).double()  # with a bias
    torch.testing.assert_close(ours(x, means), expected())
    ours.fc = nn.Sequential(nn.Linear(32, 32), nn.Sigmoid()).double()
    torch.testing.assert_close(ours(x, means), expected())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPUs")
def test_padding_compiles_for_sizes_that_change():
    def padded(x):
        return F.relu(pad_to_multiple(x, 16))[..., : x.shape[2], : x.shape[3]]

    torch.compiler.reset()
    compiled = torch.compile(padded, fullgraph=True)
    for shape in ((2, 1, 33, 20), (1, 1, 32, 48), (3, 1, 17, 40)):
        x = torch.randn(shape, requires_grad=True)
        torch.testing.assert_close(compiled(x), x.relu())
        compiled(x).sum().backward()
        torch.testing.assert_close(x.grad, (x > 0).float())


def test_a_normalisation_without_bias():
    layer, x = nn.BatchNorm2d(4), torch.randn(2, 4, 5, 7)
    layer.register_parameter("bias", None)
    torch.testing.assert_close(norm_relu(layer, x), by_stock(layer, x))


@pytest.mark.parametrize("buffers", [("running_mean", "running_var"), ("num_batches_tracked",)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_normalisation_without_some_of_its_statistics(buffers, momentum):
    layer, x = nn.BatchNorm2d(4, momentum=momentum), torch.randn(2, 4, 5, 7)
    for name in buffers:
        setattr(layer, name, None)
    stock = copy.deepcopy(layer)
    torch.testing.assert_close(norm_relu(layer, x), by_stock(stock, x))
    for a, b in zip(layer.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_one_value_a_channel_is_refused_in_training_alone():
    layer, x = nn.BatchNorm2d(4), torch.randn(1, 4, 1, 1)
    with pytest.raises(ValueError, match="two values or more"):
        norm_relu(layer, x)
    assert norm_relu(layer.eval(), x).shape == x.shape
    assert norm_relu(layer.train(), x[:0]).shape == x[:0].shape  # as the stock layer


def test_a_network_with_synchronised_statistics_keeps_its_relu():
    """``convert_sync_batchnorm`` puts other layers in the place of all."""
    net = SCOATNet(width=4, deep_supervision=True).eval()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    assert not any(type(module) is nn.BatchNorm2d for module in synchronised.modules())
    x = torch.randn(2, 1, 32, 48)
    for ours, theirs in zip(synchronised(x), net(x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_step_of_training_is_that_of_stock_modules(memory_format):
    """Loss, gradients and running statistics of the whole network: the same sums in float64, rounding in float32."""
    torch.manual_seed(5)
    stock = EagerSCOATNet(4).double()
    nets = [stock, SCOATNet(width=4).double(), SCOATNet(width=4)]
    x, target = torch.randn(2, 1, 48, 32), (torch.rand(2, 1, 48, 32) > 0.8).float()
    found = []
    for net in nets:
        net.load_state_dict(nets[0].state_dict()) if net is not stock else None
    for net in nets:
        net = net.train().to(memory_format=memory_format)
        dtype = next(net.parameters()).dtype
        logits = net(x.to(dtype).contiguous(memory_format=memory_format))
        F.binary_cross_entropy_with_logits(logits, target.to(dtype)).backward()
        gradient = torch.cat([parameter.grad.double().flatten() for _, parameter in sorted(net.named_parameters())])
        found.append((logits.double(), gradient, {name: buffer.double() for name, buffer in net.named_buffers()}))
    for (logits, gradient, buffers), tolerance in zip(found[1:], (1e-10, 1e-4), strict=True):
        torch.testing.assert_close(logits, found[0][0], rtol=tolerance, atol=tolerance)
        for name, buffer in buffers.items():
            torch.testing.assert_close(buffer, found[0][2][name], rtol=tolerance, atol=tolerance)
        # in float32 a pixel on the edge of ReLU may fall to its other side, here or in stock modules
        assert (gradient - found[0][1]).norm() <= 50 * tolerance * found[0][1].norm()
