"""What only a GPU can show; the same behaviour as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ASYMMETRIC
from test_model import FILES, golden, load_golden, outputs_of

from scoat_fast import SCOATNet
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
    np.testing.assert_allclose(on_gpu.probabilities, on_cpu.probabilities, atol=5e-3)  # TF32 convolutions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains(dtype):
    net = SCOATNet(width=8, deep_supervision=True).cuda().to(memory_format=torch.channels_last)
    x = torch.rand(2, 1, 64, 64, device="cuda")
    with torch.autocast("cuda", dtype):
        loss = sum(y.float().square().mean() for y in net(x))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
