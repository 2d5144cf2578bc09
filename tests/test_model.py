"""The network against the published one, and as a part of other people's pipelines."""

from __future__ import annotations

import io
import json
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from torch import nn

from scoat_fast import SCOATNet
from scoat_fast.bench.eager import EagerSCOATNet

FILES = sorted(GOLDEN.glob("published_*.npz"))


def load_golden(path):
    """A network with the golden weights, and the file."""
    file = np.load(path)
    state = {k.split("/", 1)[1]: torch.from_numpy(file[k]) for k in file.files if k.startswith(("param/", "buffer/"))}
    block = "res" if "conv0_0.downsample.0.weight" in state else "vgg"
    net = SCOATNet(int(file["channels"]), int(file["classes"]), int(file["width"]), block, bool(file["deep"]))
    net.load_state_dict(state, strict=True)
    return net, file, state


def outputs_of(net, x):
    output = net(x)
    return output if isinstance(output, list) else [output]


def golden(file, name):
    return torch.from_numpy(file[name])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_outputs_equal_the_published(path, dtype, bound):
    net, file, _ = load_golden(path)
    x = golden(file, "input").to(dtype)
    net.to(dtype)
    for mode in ("eval", "train"):
        net.train(mode == "train")
        for i, output in enumerate(outputs_of(net, x)):
            expected = golden(file, f"{mode}/output{i}")
            error = (output.double() - expected).abs().max()
            assert error <= bound * expected.abs().max().clamp(min=1), (mode, i)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_gradients_and_statistics_equal_the_published(path):
    net, file, _ = load_golden(path)
    net.double().train()
    x = golden(file, "input").double().requires_grad_()
    loss = sum(
        (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).mean() for y in outputs_of(net, x)
    )
    loss.backward()
    assert abs(loss.item() - float(file["train/loss"])) < 1e-12
    largest = max(np.abs(file[name]).max() for name in file.files if name.startswith("train/grad/"))
    for name, parameter in net.named_parameters():
        assert (parameter.grad - golden(file, f"train/grad/{name}")).abs().max() <= 1e-6 * largest, name
    grad_input = golden(file, "train/grad_input")
    assert (x.grad - grad_input).abs().max() <= 1e-6 * grad_input.abs().max()
    for name, buffer in net.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == 1, name
            continue
        expected = golden(file, f"train/buffer/{name}")
        assert (buffer - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1), name


def test_state_dict_has_the_published_names_and_shapes_in_order():
    published = json.loads((GOLDEN / "published_state_dict_w32.json").read_text())
    ours = {name: list(value.shape) for name, value in SCOATNet().state_dict().items()}
    assert list(ours.items()) == list(published.items())


def test_parameter_counts_and_checkpoint_size_of_the_paper():
    assert sum(p.numel() for p in SCOATNet().parameters()) == 10_208_723
    net = SCOATNet(in_channels=3, deep_supervision=True)
    assert sum(p.numel() for p in net.parameters()) == 10_210_230
    file = io.BytesIO()
    torch.save(net.state_dict(), file, _use_new_zipfile_serialization=False)
    # "39.08 M" in table III; 39.076 with the published code, whose file also lists modules without parameters
    assert file.tell() / 2**20 == pytest.approx(39.076, abs=2e-3)


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    net = SCOATNet(width=32)
    weight = net.conv2_1.conv1.weight
    assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.01)
    linear = net.conv3_1.ca.fc[0].weight
    assert linear.std().item() == pytest.approx((2 / linear.shape[1]) ** 0.5, rel=0.02)
    norms = torch.cat([m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    assert norms.mean().item() == pytest.approx(1, abs=2e-3)
    assert norms.std().item() == pytest.approx(0.02, rel=0.05)
    assert all((m.bias == 0).all() for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_module_prefix_is_accepted(net):
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    other = SCOATNet(width=3).eval()
    other.load_state_dict(state, strict=True)
    x = torch.rand(1, 1, 32, 32)
    torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("block", ["res", "vgg"])
def test_stem_goes_from_one_to_three_channels_and_back(block):
    one, three = (SCOATNet(channels, width=3, block=block).double().eval() for channels in (1, 3))
    x = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    three.load_state_dict(one.state_dict(), strict=True)
    torch.testing.assert_close(three(x.expand(-1, 3, -1, -1)), one(x))
    three = SCOATNet(3, width=3, block=block).double().eval()
    one.load_state_dict(three.state_dict(), strict=True)
    torch.testing.assert_close(one(x), three(x.expand(-1, 3, -1, -1)))


def test_a_stem_that_cannot_be_converted_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        SCOATNet(1, width=3).load_state_dict(SCOATNet(2, width=3).state_dict())


def test_loading_does_not_change_the_given_state(net):
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    keys = list(state)
    SCOATNet(3, width=3).load_state_dict(state)
    assert list(state) == keys
    assert state["module.conv0_0.conv1.weight"].shape[1] == 1


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (48, 31), (15, 64), (130, 128)])
def test_any_size_equals_the_padded_one(net, size):
    x = torch.rand(2, 1, *size)
    bottom, right = -size[0] % 16, -size[1] % 16
    padded = net(nn.functional.pad(x, (0, right, 0, bottom), mode="replicate"))
    y = net(x)
    assert y.shape == (2, 1, *size)
    torch.testing.assert_close(y, padded[:, :, : size[0], : size[1]], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_dtype(net, dtype):
    other = SCOATNet(width=3).eval()
    other.load_state_dict(net.state_dict())
    x = torch.rand(1, 1, 32, 32)
    y = other.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    scale = net(x).abs().max()
    assert (y.double() - net(x).double()).abs().max() < 0.1 * scale


def test_wrong_inputs_are_named(net):
    with pytest.raises(ValueError, match=r"wants \[N, 1, H, W\], got \(1, 3, 32, 32\)"):
        net(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="wants"):
        net(torch.rand(1, 32, 32))
    with pytest.raises(ValueError, match="wants"):
        net(torch.rand(1, 1, 0, 32))


def test_deep_supervision_can_be_switched():
    net = SCOATNet(width=3, deep_supervision=True).eval()
    x = torch.rand(1, 1, 32, 32)
    heads = net(x)
    assert len(heads) == 4
    net.deep_supervision = False
    torch.testing.assert_close(net(x), heads[3], rtol=0, atol=0)
    net.deep_supervision = True
    assert len(net(x)) == 4
    with pytest.raises(ValueError, match="one head"):
        SCOATNet(width=3).deep_supervision = True


def test_attention_maps_come_by_name(net):
    x = torch.rand(2, 1, 40, 56)
    y, maps = net(x, return_attention=True)
    torch.testing.assert_close(y, net(x), rtol=0, atol=0)
    assert list(maps) == ["x11", "x21", "x31", "x12", "x22", "x13"]
    for name, map in maps.items():
        level = int(name[1])
        assert map.shape == (2, 1, -(-40 // 2**level), -(-56 // 2**level))
        assert 0 <= map.min() <= map.max() <= 1
        assert map.std() > 0


def test_attention_maps_are_those_of_the_gates(net):
    seen = {}
    hooks = [
        getattr(net, f"att{i}_{j}").active.register_forward_hook(lambda m, a, y, n=f"x{i}{j}": seen.update({n: y}))
        for i, j in [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3)]
    ]
    _, maps = net(torch.rand(1, 1, 32, 32), return_attention=True)
    for hook in hooks:
        hook.remove()
    assert seen.keys() == maps.keys()
    for name, map in maps.items():
        torch.testing.assert_close(map, seen[name], rtol=0, atol=0)


def test_other_spellings():
    net = SCOATNet(spatial_dims=2, input_channels=3, classes=2, width=3)
    assert (net.in_channels, net.out_channels) == (3, 2)
    assert SCOATNet(num_classes=4, width=3).out_channels == 4
    with pytest.raises(ValueError, match="mean the same"):
        SCOATNet(classes=2, num_classes=3)
    with pytest.raises(ValueError, match="mean the same"):
        SCOATNet(out_channels=2, num_classes=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 2}, "width must be at least 3, got 2"),
        ({"spatial_dims": 3}, "spatial_dims must be 2, got 3"),
        ({"block": "dense"}, "block must be one of"),
        ({"equations": "other"}, "equations must be one of"),
        ({"in_channels": 0}, "at least one channel"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SCOATNet(**arguments)


def test_every_node_upsamples_its_input_once(net, monkeypatch):
    from scoat_fast import layers, model

    calls = []
    for module, name in ((layers, "upsample"), (layers, "spatial_gate")):
        original = getattr(module, name)

        def spy(y, *args, original=original, name=name, **kwargs):
            calls.append((name, y.shape[1]))
            return original(y, *args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    net(torch.rand(1, 1, 32, 32))
    gated = [("spatial_gate", 2 * 3 * 2**i) for i, _ in model.ATTENTION_NODES]
    projections = [("upsample", 3 * 2**i) for i, _ in model.ATTENTION_NODES]  # of half the channels, for the map
    assert sorted(calls) == sorted([*gated, *projections, *[("upsample", 6)] * 4])


def paper_block(block, x_c):
    """Equation 6 to the letter, from the parts of a gated block."""
    squeezed = x_c.mean((2, 3))
    x_v = torch.sigmoid(block.ca.fc[2](torch.relu(block.ca.fc[0](squeezed))))[:, :, None, None]
    convolved = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x_v * x_c))))))
    return convolved + torch.relu(block.downsample[1](block.downsample[0](x_c)))


def paper_attention(gate, x, y):
    """Equations 1 and 2 to the letter, from the parts of a gate."""
    up = nn.functional.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
    map = torch.sigmoid(gate.active[1](gate.active[0](torch.relu(gate.W_x(x)) + torch.relu(gate.W_y(up)))))
    return (1 + map) * up


@pytest.mark.parametrize("training", [False, True])
def test_equations_of_the_paper(net, training):
    paper = SCOATNet(width=3, equations="paper")
    paper.load_state_dict(net.state_dict(), strict=True)
    paper.double().train(training)
    x = torch.rand(2, 1, 32, 48, dtype=torch.float64)
    nodes = {(0, 0): paper.conv0_0(x)}
    for i in range(1, 5):
        nodes[i, 0] = getattr(paper, f"conv{i}_0")(nn.functional.max_pool2d(nodes[i - 1, 0], 2))
    for j in range(1, 5):
        for i in range(5 - j):
            row, below = [nodes[i, k] for k in range(j)], nodes[i + 1, j - 1]
            if i:
                gated = paper_attention(getattr(paper, f"att{i}_{j}"), row[-1], below)
                nodes[i, j] = paper_block(getattr(paper, f"conv{i}_{j}"), torch.cat([*row, gated], 1))
            else:
                up = nn.functional.interpolate(below, scale_factor=2, mode="bilinear", align_corners=True)
                nodes[i, j] = getattr(paper, f"conv0_{j}")(torch.cat([*row, up], 1))
    torch.testing.assert_close(paper(x), paper.final(nodes[0, 4]), rtol=0, atol=1e-12)
    if not training:
        assert (paper(x) - net(x.float()).double()).abs().max() > 1e-3


def test_metatensor_survives(net):
    monai = pytest.importorskip("monai.data")
    x = monai.MetaTensor(torch.rand(1, 1, 33, 47), affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])))
    y = net(x)
    assert isinstance(y, monai.MetaTensor)
    assert torch.equal(y.affine, x.affine)
    torch.testing.assert_close(y.as_tensor(), net(x.as_tensor()), rtol=0, atol=0)


def test_monai_inferers_run_it_on_volumes(net):
    inferers = pytest.importorskip("monai.inferers")
    volume = torch.rand(1, 1, 32, 48, 3)
    slices = inferers.SliceInferer(roi_size=(32, 48), spatial_dim=2, progress=False)(volume, net)
    for k in range(3):
        torch.testing.assert_close(slices[..., k], net(volume[..., k]))


def test_it_is_a_plain_module(net):
    import copy
    import pickle

    clone = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    x = torch.rand(1, 1, 32, 32)
    torch.testing.assert_close(clone(x), net(x), rtol=0, atol=0)
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), net(x))


def test_exports_to_onnx_in_standard_operators(net):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    x = torch.rand(1, 1, 32, 48)
    model = torch.onnx.export(net, (x,), dynamo=True, verbose=False).model_proto
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model)
    (output,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    expected = net(x).detach()
    assert (torch.from_numpy(output) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_trace_is_for_any_size_and_needs_nothing_of_ours(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(net, torch.rand(2, 1, 32, 48))
    assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} == {"aten", "prim"}
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for size in ((2, 1, 32, 48), (1, 1, 50, 70), (3, 1, 17, 1)):
        x = torch.rand(size)
        torch.testing.assert_close(loaded(x), net(x), rtol=1e-4, atol=1e-4)


def test_the_older_onnx_exporter(net):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    file, free = io.BytesIO(), {0: "n", 2: "h", 3: "w"}
    options = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": free, "y": free}}
    torch.onnx.export(net, (torch.rand(1, 1, 32, 48),), file, dynamo=False, **options)
    assert {node.domain for node in onnx.load_from_string(file.getvalue()).graph.node} == {""}
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    x = torch.rand(2, 1, 50, 70)
    (output,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), net(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_many_gradients_at_once(layout):
    torch.manual_seed(2)
    net = SCOATNet(width=8).to(memory_format=layout).eval()
    y = net(torch.rand(2, 1, 33, 48))
    given = torch.randn(2, *y.shape)
    together = torch.autograd.grad(y, list(net.parameters()), given, is_grads_batched=True, retain_graph=True)
    for k in range(2):
        alone = torch.autograd.grad(y, list(net.parameters()), given[k], retain_graph=True)
        largest = max(grad.abs().max() for grad in alone)
        for many, one in zip(together, alone, strict=True):
            torch.testing.assert_close(many[k], one, rtol=1e-3, atol=1e-5 * largest.item())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_transforms_of_torch_func(layout):
    """Gradients, those of each sample, an ensemble, and a derivative forwards."""
    torch.manual_seed(3)
    net, x = SCOATNet(width=3).double().eval(), torch.rand(2, 1, 16, 32, dtype=torch.float64)
    x = x.contiguous(memory_format=layout)
    weights = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def total(weights, x):
        return torch.func.functional_call(net, weights, (x,)).square().sum()

    total(dict(net.named_parameters()), x).backward()
    expected = {name: parameter.grad for name, parameter in net.named_parameters()}
    apart = torch.func.vmap(torch.func.grad(total), (None, 0))(weights, x[:, None])
    for name, grad in torch.func.grad(total)(weights, x).items():
        torch.testing.assert_close(grad, expected[name])
        torch.testing.assert_close(apart[name].sum(0), expected[name])
    others = {name: 1.1 * value for name, value in weights.items()}
    both = torch.func.vmap(total, (0, None))({name: torch.stack([weights[name], others[name]]) for name in weights}, x)
    torch.testing.assert_close(both, torch.stack([total(weights, x), total(others, x)]))
    direction = torch.rand_like(x)
    _, forwards = torch.func.jvp(lambda x: total(weights, x), (x,), (direction,))
    along = x.clone().requires_grad_()
    total(weights, along).backward()
    torch.testing.assert_close(forwards, (along.grad * direction).sum())


def test_traces_and_transforms_under_autocast(net):
    x = torch.rand(1, 1, 32, 48)
    stock = EagerSCOATNet(net.width).eval()
    stock.load_state_dict(net.state_dict())
    found = []
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as PyTorch wants it for traces
        expected = net(x)
        traced = torch.jit.trace(net, x)(x)
        assert (traced - expected).abs().max() <= 0.02 * expected.abs().max()
        for each in (net, stock):
            weights = {name: parameter.detach() for name, parameter in each.named_parameters()}
            total = partial(lambda each, weights: torch.func.functional_call(each, weights, (x,)).float().sum(), each)
            found.append(torch.func.grad(total)(weights))
    assert found[0].keys() == found[1].keys()
    gap, size = (sum(value.square().sum() for value in values) for values in (
        [found[0][name] - grad for name, grad in found[1].items()], found[1].values(),
    ))  # fmt: skip
    assert gap.sqrt() <= 0.05 * size.sqrt()


def test_on_the_meta_device():
    with torch.device("meta"):
        net, x = SCOATNet(width=4), torch.rand(2, 1, 33, 48)
    net(x).sum().backward()
    assert net.conv0_0.conv1.weight.grad.is_meta and net(x).shape == x.shape


def test_compiles_as_one_graph_with_dynamic_shapes(net):
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 1, 32, 48), (3, 1, 64, 32)):
        x = torch.rand(size)
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-4)


def test_trains_the_same_with_and_without_kernels():
    """Gradients of the whole network in float32, from the kernels and from stock operators, against float64."""
    from scoat_fast import ops

    torch.manual_seed(3)
    net = SCOATNet(width=4, deep_supervision=True)
    x, gradients = torch.rand(2, 1, 48, 32), {}
    for name, backend, dtype in (
        ("ours", None, torch.float32),
        ("stock", "reference", torch.float32),
        ("exact", "reference", torch.float64),
    ):
        net.to(dtype).zero_grad()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        with ops.use_backend(backend):
            sum(y.square().mean() for y in net(x.to(dtype))).backward()
        gradients[name] = torch.cat([p.grad.double().flatten() for p in net.parameters()])
    ours, stock = ((gradients[name] - gradients["exact"]).norm() for name in ("ours", "stock"))
    assert ours <= 2 * stock + 1e-6 * gradients["exact"].norm()
