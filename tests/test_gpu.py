"""What only a GPU can show; the same behaviour as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ASYMMETRIC
from test_model import FILES, golden, load_golden, outputs_of

from scoat_fast import SCOATNet, ops
from scoat_fast.segmentation.inference import Segmenter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_published_outputs_in_float64(path):
    net, file, _ = load_golden(path)
    net.double().cuda().eval()
    for i, output in enumerate(outputs_of(net, golden(file, "input").double().cuda())):
        expected = golden(file, f"eval/output{i}")
        assert (output.cpu() - expected).abs().max() <= 1e-10 * expected.abs().max().clamp(min=1)


def test_probabilities_agree_with_the_cpu(net, phantom):
    on_gpu = Segmenter(net, "cuda").segment(phantom, affine=ASYMMETRIC)
    on_cpu = Segmenter(net, "cpu").segment(phantom, affine=ASYMMETRIC)
    # bfloat16 there: in stock PyTorch its probabilities are up to 0.009 from those of float32
    np.testing.assert_allclose(on_gpu.probabilities, on_cpu.probabilities, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains(dtype):
    net = SCOATNet(width=8, deep_supervision=True).cuda().to(memory_format=torch.channels_last)
    x = torch.rand(2, 1, 64, 64, device="cuda")
    with torch.autocast("cuda", dtype):
        loss = sum(y.float().square().mean() for y in net(x))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


KERNELS = ("triton", "cuda")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_kernels_are_captured_in_a_cuda_graph(op, name):
    for sample in op.samples("tiny", torch.float32, "cuda"):
        with ops.use_backend(name), torch.no_grad():
            op.function(*sample.args)  # compiled and loaded outside the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = op.function(*sample.args)
            sample.args[0].normal_()
            graph.replay()
            expected = op.function(*sample.args)
        for ours, eager in zip(as_tuple(captured), as_tuple(expected), strict=True):
            assert torch.equal(ours, eager)


def as_tuple(output):
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 40 << 30, reason="needs 40 GiB of GPU memory"
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", KERNELS)
def test_tensors_of_more_than_two_to_the_31_elements(name, layout):
    """The last slice of a large batch, forwards and backwards, is what it is alone."""
    n, c, size = 33, 256, 256
    y = torch.empty(n, c, size, size, dtype=torch.bfloat16, device="cuda", memory_format=layout).normal_()
    attention = torch.rand(n, 1, 2 * size, 2 * size, dtype=torch.bfloat16, device="cuda")
    w1, w2 = (torch.randn(size, dtype=torch.bfloat16, device="cuda") for size in ((16, c), (c, 16)))
    assert 4 * y.numel() > 2**31

    def run(y, attention):
        y, attention = y.detach().requires_grad_(), attention.detach().requires_grad_()
        with ops.use_backend(name):
            gated, means = ops.spatial_gate(y, attention, return_means=True)
            out = ops.channel_gate(gated, w1, w2, means)
            grads = torch.autograd.grad(out, (y, attention), torch.ones_like(out))
        return [x[-1:].clone() for x in (out, means, *grads)]

    alone = run(y[-1:].clone(memory_format=layout), attention[-1:].clone())
    for ours, expected in zip(run(y, attention), alone, strict=True):
        assert torch.equal(ours, expected)
