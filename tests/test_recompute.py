"""Training that makes its cheap activations again: the same gradients, to the bit, from less memory."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import scoat_fast.model
from scoat_fast import SCOATNet
from scoat_fast.bench.contenders import baseline_of
from scoat_fast.bench.memory import peak_bytes
from scoat_fast.recompute import forget, recomputing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made(**options) -> tuple[SCOATNet, torch.Tensor]:
    torch.manual_seed(3)
    return SCOATNet(width=4, **options).train().to(DEVICE), torch.rand(2, 1, 32, 48).to(DEVICE)


def gradients(net: SCOATNet, x: torch.Tensor, run=lambda net, x: net(x)) -> list[torch.Tensor]:
    net.zero_grad()
    run(net, x).float().square().mean().backward()
    return [parameter.grad.clone() for parameter in net.parameters()]


@pytest.fixture
def kept_all(monkeypatch):
    """The network as it is without recomputation, and what its gradients are then."""

    def run(net, x, **options):
        with monkeypatch.context() as patch:
            patch.setattr(scoat_fast.model, "recomputing", contextlib.nullcontext)
            return gradients(net, x, **options)

    return run


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options", [{}, {"block": "vgg"}, {"equations": "paper"}, {"out_channels": 2}], ids=lambda options: str(options)
)
def test_the_gradients_are_the_same_to_the_bit(options, layout, kept_all):
    net, x = made(**options)
    net, x = net.to(memory_format=layout), x.contiguous(memory_format=layout)
    assert same(gradients(net, x), kept_all(net, x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_step_takes_less_than_half_of_the_memory_of_stock_modules(layout):
    net, x = SCOATNet(width=16), torch.rand(1, 1, 128, 128)

    def peak(net):
        net = net.train().to(memory_format=layout)
        return peak_bytes(lambda: net(x).square().mean().backward(), x.device)

    assert 0.3 < peak(net) / peak(baseline_of(net)) < 0.5


def test_under_autocast(kept_all):
    def run(net, x):
        with torch.autocast(DEVICE, torch.bfloat16):
            return net(x)

    net, x = made()
    assert same(gradients(net, x, run=run), kept_all(net, x, run=run))


def test_beside_checkpoints_of_the_user(kept_all):
    net, x = made()
    running = {name: value.clone() for name, value in net.named_buffers()}
    wanted = kept_all(net, x)
    net.load_state_dict(running, strict=False)
    assert same(gradients(net, x, run=lambda net, x: checkpoint(net, x, use_reentrant=False)), wanted)


def test_hooks_that_are_there_already_see_all_that_is_kept(kept_all):
    """Of a checkpoint, or ``save_on_cpu``: two pairs of hooks are not called one after the other."""

    def bytes_packed(net):
        seen = {}

        def pack(kept):
            seen[kept.untyped_storage().data_ptr()] = kept.untyped_storage().nbytes()
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            net(x).sum().backward()
        return sum(seen.values())

    net, x = made()
    wanted = kept_all(net, x)
    assert bytes_packed(net) > 0.5 * bytes_packed(baseline_of(net).train().to(DEVICE))

    def run(net, x):
        with torch.autograd.graph.save_on_cpu():
            return net(x)

    assert same(gradients(net, x, run=run), wanted)


@pytest.mark.parametrize("place", [".bn1", ".ca", ".downsample", ".W_x", ".W_y", "conv1_1"])
def test_a_network_sharded_in_small_parts(place):
    """Weights of a part have no memory but in its own forward and backward pass."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(3)
    net, x = SCOATNet(width=4).double().train(), torch.rand(2, 1, 32, 48, dtype=torch.float64)
    wanted = gradients(net, x)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        for name, module in [*net.named_modules()]:
            if name.endswith(place):
                fully_shard(module, mesh=mesh)
        fully_shard(net, mesh=mesh)
        found = [grad.full_tensor() for grad in gradients(net, x)]
    finally:
        distributed.destroy_process_group()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_memory_that_was_taken_away_is_not_read():
    net, x = made()
    loss = net(x).mean()
    net.conv0_4.bn1.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"memory of \[4\] is needed for a gradient and was taken away"):
        loss.backward()


def test_in_inference_mode():
    net, x = made()
    with torch.inference_mode(), torch.enable_grad():
        assert not net(x).requires_grad
    with torch.inference_mode():
        frozen = SCOATNet(width=4).requires_grad_(False).eval().to(DEVICE)
    with torch.no_grad():
        wanted = frozen(x)
    assert torch.equal(frozen(x), wanted)  # where gradients are enabled, and none is wanted


def test_a_graph_that_is_run_twice_and_in_parts():
    net, x = made()
    loss = net(x).square().mean()
    last = list(net.conv0_4.parameters())
    partly = torch.autograd.grad(loss, last, retain_graph=True)
    whole = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(net.parameters()))
    assert same(whole, again)
    of = {id(parameter): grad for parameter, grad in zip(net.parameters(), whole, strict=True)}
    assert same(partly, [of[id(parameter)] for parameter in last])


def test_gradients_of_gradients(kept_all):
    def penalty(net, x):
        grads = torch.autograd.grad(net(x).square().mean(), list(net.parameters()), create_graph=True)
        return sum(grad.square().sum() for grad in grads)

    net, x = made()
    assert same(gradients(net.double(), x.double(), run=penalty), kept_all(net, x.double(), run=penalty))


def test_where_hooks_are_forbidden(kept_all):
    def run(net, x):
        with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
            return net(x)

    net, x = made()
    assert same(gradients(net, x, run=run), kept_all(net, x))


def test_weights_changed_before_the_backward_pass_are_refused():
    net, x = made()
    loss = net(x).mean()
    with torch.no_grad():
        net.conv0_4.bn1.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: torch.float32 \[4\] is at version"):
        loss.backward()


def test_what_is_forgotten_lives_as_long_as_it_is_needed():
    calls, x, w = [], torch.rand(5, requires_grad=True), torch.rand(5, requires_grad=True)

    def double(x):
        calls.append(weakref.ref(result := 2 * x))
        return result

    with recomputing():
        y = forget(2 * x, double, x)
        first = weakref.ref(y)
        loss = (y * w).sum() + (y**2).sum()
        other = (w * 3).exp()  # may lie where a forgotten tensor lay: it is not that
    del y
    gc.collect()
    assert first() is None and not calls
    (loss + other.sum()).backward()
    assert len(calls) == 1 and calls[0]() is None  # made once for both that keep it, and gone
    torch.testing.assert_close(x.grad, 2 * w.detach() + 8 * x.detach())
    torch.testing.assert_close(w.grad, 2 * x.detach() + 3 * (3 * w.detach()).exp())


def test_what_an_operation_keeps_of_its_own_result_is_forgotten_too():
    x, calls = torch.rand(5, requires_grad=True), []

    def make(x):
        calls.append(1)
        return x.exp()

    with recomputing():
        y = forget(x.exp(), make, x)  # exp keeps its result
        memory = StorageWeakRef(y.untyped_storage())
        loss = y.square().sum()
    del y
    assert memory.expired()
    loss.backward()
    assert len(calls) == 1  # for both
    torch.testing.assert_close(x.grad, 2 * (2 * x.detach()).exp())


def test_memory_of_what_an_operation_gave_up_is_not_mistaken_when_it_is_used_again():
    w, terms = torch.zeros(1000, requires_grad=True), []
    with recomputing():
        for k in [*range(10)] * 30:
            y = forget((w + k).exp(), lambda w, k=k: (w + k).exp(), w)  # exp keeps its result
            terms.append(y.sum() / torch.tensor(float(k)).exp())
            y = other = None
            other = forget(w + k, lambda w, k=k: w + k, w)  # nothing does, and it may lie where y lay
    del other
    sum(terms).backward()
    torch.testing.assert_close(w.grad, torch.full((1000,), 300.0))


@pytest.mark.parametrize("change", ["mul_", "dropout", "view", "no_grad", "data"])
def test_results_that_somebody_changed_in_place_are_no_longer_what_a_recipe_makes(change, kept_all):
    def hook(module, given, output):
        if change == "mul_":
            output.mul_(0.5)
        elif change == "dropout":
            torch.manual_seed(1)
            F.dropout(output, 0.5, inplace=True)
        elif change == "view":
            output[:, ::2].mul_(0.5)
        elif change == "no_grad":
            with torch.no_grad():
                output.mul_(0.5)
        else:
            output.data = output.data * 0.5

    net, x = made()
    for gate in (net.conv1_1.ca, net.conv2_2.ca):
        gate.register_forward_hook(hook)
    assert same(gradients(net, x), kept_all(net, x))


def test_what_was_kept_before_a_change_in_place_is_refused():
    x = torch.rand(5, requires_grad=True)
    with recomputing():
        y = x * 1
        loss = y.square().sum()
        forget(y.mul_(2), lambda x: 2 * x, x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_memory_that_a_living_result_left_is_not_mistaken():
    w = torch.ones(5, requires_grad=True)
    with recomputing():
        y = forget(w + 1, lambda w: w + 1, w)
        other = y.data
        y.data = torch.zeros(5)
        other.numpy()[:] = 7  # as whoever gets the memory next writes to it
        loss = (w * other).sum()
    loss.backward()
    assert torch.equal(w.grad, torch.full((5,), 7.0))


def test_memory_read_as_another_dtype_is_not_mistaken():
    w = torch.full((5,), 3.0, dtype=torch.float16, requires_grad=True)
    with recomputing():
        y = forget(w * 1, lambda w: w * 1, w)
        other = y.detach().view(torch.bfloat16)
        loss = (w.bfloat16() * other).sum()
    loss.backward()
    assert torch.equal(w.grad, other.half()) and other[0] == 32


def test_weights_that_are_drawn_anew_whenever_they_are_asked_for(kept_all):
    class Noise(nn.Module):
        def forward(self, weight):
            return weight + torch.rand_like(weight)

    def run(net, x):
        torch.manual_seed(2)
        return net(x)

    net, x = made()
    parametrize.register_parametrization(net.conv0_0.bn1, "weight", Noise())
    assert same(gradients(net, x, run=run), kept_all(net, x, run=run))


def test_memory_that_is_used_again_is_not_mistaken():
    """A forgotten tensor that nothing keeps leaves its address to others."""
    w = torch.ones(1000, requires_grad=True)
    with recomputing():
        terms = []
        for k in range(20):
            forget(w + k, lambda w: w * float("nan"), w)  # dropped at once
            terms.append((w * k).square().sum())
    sum(terms).backward()
    torch.testing.assert_close(w.grad, torch.full((1000,), 2.0 * sum(k * k for k in range(20))))


def test_what_only_stands_for_tensors_is_trained_too():
    """Their memory cannot be read: kernels that make an activation again would end the process."""
    with FakeTensorMode():
        net = SCOATNet(width=3).train()
        net(torch.empty(1, 1, 32, 32)).sum().backward()
    assert all(isinstance(parameter.grad, FakeTensor) for parameter in net.parameters())


def test_tensors_with_more_to_them_are_made_again():
    """A subclass that only adds to a tensor, as MONAI's do."""

    class Named(torch.Tensor):
        pass

    net, x = made()

    def peak(x):
        return peak_bytes(lambda: net(x).sum().backward(), x.device)

    peak(x)
    assert peak(x.as_subclass(Named)) <= 1.1 * peak(x)
