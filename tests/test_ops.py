"""The fused operations: every implementation against the definition in float64, and against each other."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from scoat_fast import ops
from scoat_fast.errors import ScoatFastError
from scoat_fast.ops import _backend, parity
from scoat_fast.ops._backend import why_not
from scoat_fast.ops.parity import map_tensors, outputs_and_gradients, tensors_of

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def implementations() -> list:
    """Every implementation that can run here, with its dtypes."""
    found = [("reference", DEVICE, (torch.float64, *FLOATS)), ("cpu", "cpu", FLOATS)]
    if CUDA:
        return [*found, ("triton", "cuda", FLOATS), ("cuda", "cuda", FLOATS)]
    return [*found, ("triton", "cpu", FLOATS[:2])]  # the interpreter is wrong in bfloat16


CASES = [
    pytest.param(op, name, device, dtype, id=f"{op.name}-{name}-{str(dtype)[6:]}")
    for op in ops.ALL
    for name, device, dtypes in implementations()
    for dtype in dtypes
]


def needs(op, name, args) -> None:
    reason = why_not(op.name, name, *args)
    if reason is not None and "cannot be loaded" in reason:
        pytest.skip(reason)


def assert_as_accurate(found: list[parity.Parity], what: str) -> None:
    """Ours is at most twice as far from float64 as stock torch in the same dtype."""
    for i, one in enumerate(found):
        assert one.holds, f"{what}, {i}: error {one.error:.2e}, stock torch {one.stock_error:.2e}"


@pytest.mark.parametrize(("op", "name", "device", "dtype"), CASES)
def test_as_accurate_as_stock_torch(op, name, device, dtype):
    for sample in op.samples("awkward", dtype, device):
        needs(op, name, sample.args)
        assert_as_accurate(parity.measure(op, name, sample), sample.name)


def test_parity_is_against_float64_and_sees_small_mistakes():
    op, sample = ops.ALL[0], next(iter(ops.ALL[0].samples("tiny", torch.float32, DEVICE)))
    exact = outputs_and_gradients(op.stock, map_tensors(sample.args, Tensor.double))
    ours = [x.float() for x in exact]
    assert all(one.holds for one in parity.compare(op, ours, sample))
    for i in range(len(ours)):
        for wrong in (1e-4, float("nan")):
            broken = [x.clone() for x in ours]
            broken[i].view(-1)[-1] += wrong
            assert not parity.compare(op, broken, sample)[i].holds


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_any_backward_takes_any_forward(op):
    """The saved tensors are the same for all implementations, so that one can run forward and another backward.

    Each sample goes around once, forward in one and backward in the next; every other sample the other way around.
    """
    names = [name for name, device, _ in implementations() if device == DEVICE]
    for k, sample in enumerate(op.samples("awkward", torch.float32, DEVICE)):
        around = names[:: 1 if k % 2 else -1]
        for forward, backward in zip(around, around[1:] + around[:1], strict=True):
            needs(op, forward, sample.args)
            needs(op, backward, sample.args)

            def call(*args, forward=forward):
                with ops.use_backend(forward):
                    return op.function(*args)

            with ops.use_backend(backward):
                ours = outputs_and_gradients(call, sample.args)
            assert_as_accurate(parity.compare(op, ours, sample), f"{sample.name}, {forward} then {backward}")


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_registration(op):
    for sample in op.samples("tiny", torch.float64, DEVICE):
        leaves = tensors_of(map_tensors(sample.args, lambda x: x.detach().requires_grad_()))

        def call(*tensors, sample=sample):
            given = iter(tensors)
            return op.function(*map_tensors(sample.args, lambda _: next(given)))

        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    for sample in op.samples("tiny", torch.float32, DEVICE):
        torch.library.opcheck(op.overload, map_tensors(sample.args, lambda x: x.requires_grad_()))


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_compiles_as_one_graph_with_dynamic_shapes(op):
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, dynamic=True, backend="aot_eager")
    for sample in op.samples("awkward", torch.float32, DEVICE):
        if 0 in sample.args[0].shape or 1 in sample.args[0].shape:
            continue  # sizes of 0 and 1 are compiled anew each; a few sizes show what is meant
        for ours, eager in zip(
            outputs_and_gradients(compiled, sample.args),
            outputs_and_gradients(op.function, sample.args),
            strict=True,
        ):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
            assert ours.stride() == eager.stride() or ours.numel() <= 1, sample.name


def test_statistics_of_a_batch_have_no_gradient():
    """Neither where kernels run nor where a transform gets standard operators."""
    x, scale = torch.randn(2, 3, 4, 5, device=DEVICE), torch.ones(3, device=DEVICE)
    _, mean, var = ops.batch_norm_relu(x.requires_grad_(), scale, scale)
    assert not mean.requires_grad and not var.requires_grad
    grad = torch.func.grad(lambda x: sum(y.sum() for y in ops.batch_norm_relu(x, scale, scale)[1:]))(x.detach())
    assert (grad == 0).all()


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_exported_programs_hold_standard_operators(op):
    class Module(torch.nn.Module):
        def forward(self, *args):
            return op.function(*args)

    for sample in op.samples("tiny", torch.float32, DEVICE):
        program = torch.export.export(Module(), tuple(sample.args))
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert called and not any("scoat_fast" in name for name in called), called
        for ours, eager in zip(
            torch.utils._pytree.tree_leaves(program.module()(*sample.args)),
            torch.utils._pytree.tree_leaves(op.function(*sample.args)),
            strict=True,
        ):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_for_convolutions(op, dtype):
    for sample in op.samples("tiny", torch.float32, DEVICE):
        with torch.autocast(DEVICE, dtype):
            output = outputs_and_gradients(op.function, sample.args)
        lowered = map_tensors(sample.args, lambda x: x.to(dtype) if x.ndim == 4 or op.name != "channel_gate" else x)
        if op.name == "channel_gate":  # the known means stay exact
            lowered = [*(x.to(dtype) for x in sample.args[:3]), sample.args[3]]
        if op.name == "batch_norm_relu":  # a normalisation keeps the dtype of its input, as stock torch's does
            lowered = sample.args
        expected = op.function(*lowered)
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert output[0].dtype == lowered[0].dtype
        torch.testing.assert_close(output[0], expected, rtol=0, atol=0)
        assert all(
            grad.dtype == x.dtype
            for grad, x in zip(output[-len(tensors_of(sample.args)) :], tensors_of(sample.args), strict=True)
        )


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_gradients_of_what_ran_before_autocast(op):
    """Within it, they are computed in the dtypes of the forward pass, as those of stock modules."""
    for sample in op.samples("tiny", torch.float32, DEVICE):
        leaves = [x.detach().requires_grad_() for x in tensors_of(sample.args)]
        rest = iter(leaves)
        output = op.function(*map_tensors(sample.args, lambda x, rest=rest: next(rest)))
        loss = (output[0] if isinstance(output, tuple) else output).square().sum()
        expected = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        for ours, one in zip(found, expected, strict=True):
            assert (ours is None and one is None) or torch.equal(ours, one), sample.name


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_doubles_stay_doubles_under_autocast(op):
    for sample in op.samples("tiny", torch.float64, DEVICE):
        with torch.autocast(DEVICE, torch.bfloat16):
            assert outputs_and_gradients(op.function, sample.args)[0].dtype == torch.float64


def each(op, dtype=torch.float32):
    return next(iter(op.samples("tiny", dtype, DEVICE))).args


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_mixed_dtypes_are_refused(op):
    args = list(each(op))
    other = 1 if op.name != "upsample" else 0
    args[other] = args[other].half()
    if op.name == "upsample":
        args[1] = [torch.randn(2, 1, 6, 4, device=DEVICE)]
    with pytest.raises(ValueError, match=r"must be torch\.\w+ on \w+"):
        op.function(*args)
    with pytest.raises(ValueError, match="floating"):
        op.function(*map_tensors(each(op), lambda x: x.int()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: ops.upsample(f(2, 3, 4)), r"upsample: y must be \[N, C, H, W\].*\(2, 3, 4\)"),
        (lambda f: ops.upsample(f(2, 3, 4, 0)), r"upsample: y must be"),
        (lambda f: ops.upsample(f(2, 3, 4, 4), [f(2, 1, 8, 7)]), r"row\[0\] must be \[2, C, 8, 8\].*\(2, 1, 8, 7\)"),
        (lambda f: ops.spatial_gate(f(2, 3, 4, 4), f(2, 3, 8, 8)), r"attention must be \[2, 1, 8, 8\]"),
        (lambda f: ops.spatial_gate(f(2, 3, 4, 4), f(2, 1, 8, 8), [f(1, 1, 8, 8)]), r"row\[0\] must be"),
        (lambda f: ops.channel_gate(f(2, 4, 3, 3), f(2, 5), f(5, 2)), r"\[R, 4\] and \[4, R\]"),
        (lambda f: ops.channel_gate(f(2, 4, 3, 3), f(2, 4), f(4, 2), f(2, 3)), r"means must be \[2, 4\]"),
        (lambda f: ops.channel_gate(f(2, 4, 3, 3), f(2, 4), f(4, 2), f(2, 4).double()), r"means must be .*float32"),
        (lambda f: ops.batch_norm_relu(f(2, 4, 3, 3), f(4), f(3)), r"weight and bias must be \[4\] .*\[4\] and \[3\]"),
        (lambda f: ops.batch_norm_relu(f(2, 4, 3, 3), f(4), f(4), f(2, 1, 3, 3)), r"residual must be \[2, 4, 3, 3\]"),
        (
            lambda f: ops.batch_norm_relu(f(2, 4, 3, 3), f(4), f(4), f(2, 4, 3, 3).half()),
            r"residual must be torch.float32",
        ),
        (lambda f: ops.batch_norm_relu(f(2, 4, 3, 3).half(), f(4), f(4).half()), r"bias must be torch.float32"),
        (lambda f: ops.batch_norm_relu(f(1, 4, 1, 1), f(4), f(4)), r"two values or more"),
    ],
)
def test_wrong_shapes_say_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda *size: torch.randn(size, device=DEVICE))


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_odd_strides_are_read_rightly_or_refused(op):
    """Transposed, expanded and stepped views: whatever runs, the result is that of a plain copy."""

    def views(x: Tensor):
        yield x.transpose(2, 3).contiguous().transpose(2, 3) if x.ndim == 4 else x
        yield torch.stack([x, x + 1], -1)[..., 0]
        yield x[:1].expand_as(x)

    for sample in op.samples("tiny", torch.float32, DEVICE):
        for number in range(3):
            odd = map_tensors(sample.args, lambda x: list(views(x))[number])  # noqa: B023
            plain = map_tensors(odd, lambda x: x.clone(memory_format=torch.contiguous_format))
            for a, b in zip(
                outputs_and_gradients(op.function, odd), outputs_and_gradients(op.function, plain), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def laid_out(kind: str, x: Tensor) -> Tensor:
    """[N, C, H, W] of random numbers, in memory as what pooling and slicing leave."""
    n, c, h, w = x.shape
    return {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "contiguous": lambda: x,
        "over pixels": lambda: x[:, :, :1, :1].contiguous().expand(n, c, h, w),  # of one channel, or a pooled one
        "over columns": lambda: x.contiguous(memory_format=torch.channels_last)[..., :1].expand(n, c, h, w),
        "over rows": lambda: x.contiguous(memory_format=torch.channels_last)[:, :, :1].expand(n, c, h, w),
        "of more": lambda: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, :c],
    }[kind]()


KINDS = ("channels_last", "contiguous", "over pixels", "over columns", "over rows", "of more")


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("kinds", [*itertools.product(KINDS[:2], KINDS)], ids=str)
def test_layouts_that_differ_are_read_rightly(kinds, channels):
    """Of what is concatenated, of both inputs of a layer, and of a gradient."""
    torch.manual_seed(0)
    main, other = kinds
    y, row = laid_out(main, torch.randn(2, 8, 3, 4)), laid_out(other, torch.randn(2, channels, 6, 8))
    x, residual = laid_out(main, torch.randn(2, channels, 6, 8)), laid_out(other, torch.randn(2, channels, 6, 8))
    attention, w1, w2 = torch.rand(2, 1, 6, 8), torch.randn(2, channels), torch.randn(channels, 2)
    weight, bias = torch.rand(channels), torch.randn(channels)
    named = {op.name: op for op in ops.ALL}
    for name, args in (
        ("upsample", (y, [row])),
        ("upsample", (y, [x, row])),
        ("spatial_gate", (y, attention, [row], True)),
        ("spatial_gate", (y, attention, [x, row], False)),
        ("channel_gate", (residual, w1, w2, None)),
        ("batch_norm_relu", (x, weight, bias, residual, 1e-5)),
        ("batch_norm_relu", (residual, weight, bias, x, 1e-5)),
    ):
        args, op = map_tensors(args, lambda x: x.to(DEVICE)), named[name]
        for kind in KINDS:
            found, exact = [], []
            for function, given, results in (
                (op.function, args, found),
                (op.stock, map_tensors(args, Tensor.double), exact),
            ):
                leaves = map_tensors(given, lambda x: x.detach().requires_grad_())
                outputs = function(*leaves)
                outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
                torch.manual_seed(1)
                grad = laid_out(kind, torch.randn(outputs[0].shape)).to(outputs[0])
                results += outputs + list(torch.autograd.grad(outputs[0], tensors_of(leaves), grad, allow_unused=True))
            for a, b in zip(found, exact, strict=True):
                torch.testing.assert_close(a, None if b is None else b.float(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("far", [(0, 0), (-1, -1), (slice(None), 0), (0, slice(None))], ids=str)
def test_statistics_keep_their_digits_where_some_pixels_lie_apart(far):
    """As the background of a slice does."""
    torch.manual_seed(0)
    x = (100 + 0.1 * torch.randn(2, 3, 96, 128)).to(DEVICE)
    x[:, :, far[0], far[1]] = 0
    _, mean, var = ops.batch_norm_relu(x, torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE))
    exact = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_expanded_gradients(op):
    """``sum().backward()`` sends a gradient of which all strides are 0."""
    for sample in op.samples("tiny", torch.float32, DEVICE):
        grads = []
        for function in (op.function, op.stock):
            leaves = map_tensors(sample.args, lambda x: x.detach().requires_grad_())
            outputs = function(*leaves)
            output = outputs[0] if isinstance(outputs, tuple) else outputs
            grads.append(torch.autograd.grad(output.sum(), tensors_of(leaves), allow_unused=True))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("op", "name", "device", "dtype"), CASES)
def test_a_nan_is_never_lost(op, name, device, dtype):
    for sample in op.samples("tiny", dtype, device):
        needs(op, name, sample.args)
        for i, x in enumerate(tensors_of(sample.args)):
            broken = map_tensors(sample.args, Tensor.clone)
            tensors_of(broken)[i].view(-1)[0] = float("nan")
            with ops.use_backend(name):
                output = op.function(*broken)
            assert torch.stack([y.isnan().any() for y in ([output] if isinstance(output, Tensor) else output)]).any(), i
            del x


def test_a_forced_backend_never_falls_back():
    y = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    for name in ("cpu", "cuda", "triton"):
        with ops.use_backend(name), pytest.raises(RuntimeError, match=f"upsample: {name} "):
            ops.upsample(y)
    with pytest.raises(ValueError, match="use_backend wants one of"), ops.use_backend("fast"):
        pass


def test_kernels_can_be_switched_off(monkeypatch):
    y = torch.randn(1, 2, 3, 3)
    usual = ops.explain("upsample", y, [])
    for text in ("all", "cpu", "upsample", "upsample.cpu", "triton, cpu"):
        monkeypatch.setenv("SCOAT_FAST_DISABLE", text)
        choice = ops.explain("upsample", y, [])
        assert choice.implementation == "reference"
        assert f"SCOAT_FAST_DISABLE={text}" in choice.refusals["cpu"]
        with ops.use_backend("cpu"), pytest.raises(RuntimeError, match="SCOAT_FAST_DISABLE"):
            ops.upsample(y)
    monkeypatch.setenv("SCOAT_FAST_DISABLE", "spatial_gate.cpu")
    assert ops.explain("upsample", y, []) == usual


@pytest.mark.parametrize("text", ["al", "upsample.cpuu", "cpu,upsampel", "reference", "cpu.upsample"])
def test_a_name_that_is_mistyped_switches_nothing_off_quietly(monkeypatch, text):
    assert set(_backend.OPERATIONS) == {op.name for op in ops.ALL} | {"convolution", "engine"}
    monkeypatch.setenv("SCOAT_FAST_DISABLE", text)
    wrong = text.split(",")[-1]
    for call in (
        lambda: ops.explain("upsample", torch.ones(1, 2, 3, 3), []),
        lambda: ops.upsample(torch.ones(1, 2, 3, 3)),
    ):
        with pytest.raises(ScoatFastError, match=f"SCOAT_FAST_DISABLE wants all, .* got '{wrong}'"):
            call()


def test_refusals_can_be_printed():
    y = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    choice = ops.explain("upsample", y, [])
    assert choice.implementation == "reference"
    assert choice.refusals["cpu"] in ("needs float32, float16 or bfloat16, got torch.float64",) or (
        "cannot be loaded" in choice.refusals["cpu"]
    )


def test_sums_do_not_depend_on_the_number_of_threads():
    y, attention = torch.randn(1, 16, 64, 64), torch.rand(1, 1, 128, 128)
    row = [torch.randn(1, 8, 128, 128)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.spatial_gate(y, attention, row, return_means=True))
    finally:
        torch.set_num_threads(before)
    for joined, means in results[1:]:
        assert torch.equal(joined, results[0][0])
        assert torch.equal(means, results[0][1])


def test_importing_the_operations_loads_no_kernels():
    code = "import sys, scoat_fast.ops; assert not {'triton', 'scoat_fast._C'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_that_no_cache_holds(dtype, layout):
    """On a CPU they are written past the caches; also where rows begin in the middle of a vector, and end in one."""
    make = torch.Generator().manual_seed(1)
    for whole, crop in (
        ((1, 260, 256, 256), (slice(None),) * 4),
        ((1, 261, 258, 256), (..., slice(1, None), slice(None))),
    ):
        x = torch.randn(whole, generator=make).to(dtype).contiguous(memory_format=layout)[crop]
        w1, w2 = (
            torch.randn(4, x.shape[1], generator=make).to(dtype),
            torch.randn(x.shape[1], 4, generator=make).to(dtype),
        )
        weight, bias = torch.rand(2, x.shape[1], generator=make) + 0.5
        for op, *args in ((ops.channel_gate, x, w1, w2), (ops.batch_norm_relu, x, weight, bias)):
            found = {}
            for name in ("cpu", "reference"):
                with ops.use_backend(name):
                    leaf = x.detach().requires_grad_()
                    result = op(leaf, *args[1:])
                    result = result if isinstance(result, Tensor) else result[0]
                    (gradient,) = torch.autograd.grad(result, leaf, x)
                    found[name] = result.detach(), gradient
            bound = 1e-5 if dtype == torch.float32 else 2e-2
            for ours, wanted in zip(*found.values(), strict=True):
                wrong = (ours - wanted).abs() > bound * wanted.abs().max()
                assert wrong.sum() < 16  # fewer than are written at once: ReLU's edge falls to either side
