"""Weights files: what is kept, and what is refused."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from scoat_fast import SCOATNet, WeightsError
from scoat_fast.pretrained import Pretrained, load, save, shipped


def metadata_of(path):
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))["__metadata__"]


def resave(weights, path, change=lambda state: state, **metadata):
    """The weights with something changed."""
    save_file(change(load_file(weights)), path, metadata_of(weights) | metadata)
    return path


def test_saved_and_loaded(net, weights):
    other = SCOATNet.from_pretrained(weights)
    assert other.pretrained == Pretrained("test", size=48)
    assert not other.training
    for name, value in net.state_dict().items():
        loaded = other.state_dict()[name]
        assert loaded.dtype == value.dtype
        torch.testing.assert_close(loaded, value.half().float() if value.ndim > 1 else value, rtol=0, atol=0)


def test_metadata_is_readable_by_anyone_and_equal_weights_are_equal_files(net, weights, tmp_path):
    metadata = metadata_of(weights)
    assert (metadata["width"], metadata["size"], metadata["threshold"]) == ("3", "48", "0.5")
    assert json.loads(metadata["window"]) == [-1250, 250]
    for k in range(5):
        save(net, tmp_path / f"{k}.safetensors", net.pretrained)
        assert (tmp_path / f"{k}.safetensors").read_bytes() == weights.read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_channels": 3, "out_channels": 2, "deep_supervision": True},
        {"block": "vgg", "equations": "paper"},
        {"width": 5},
    ],
)
def test_any_network_goes_through_a_file(arguments, tmp_path):
    net = SCOATNet(**{"width": 3} | arguments).eval()
    save(net, tmp_path / "w.safetensors", Pretrained("any", window=(-1000.0, 400.0), size=64, threshold=0.4))
    other = load(tmp_path / "w.safetensors")
    assert (other.in_channels, other.out_channels, other.width, other.block, other.equations, other.has_heads) == (
        net.in_channels, net.out_channels, net.width, net.block, net.equations, net.has_heads,
    )  # fmt: skip
    assert other.pretrained == Pretrained("any", window=(-1000.0, 400.0), size=64, threshold=0.4)


@pytest.mark.parametrize(
    "wrap", [dict, lambda state: {f"module.{k}": v for k, v in state.items()}], ids=["plain", "module"]
)
def test_state_dicts_saved_by_torch_are_read(net, tmp_path, wrap):
    torch.save(wrap(net.state_dict()), tmp_path / "published.pth")
    other = SCOATNet.from_pretrained(tmp_path / "published.pth")
    x = torch.rand(1, 1, 32, 32)
    torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", shipped())
def test_shipped_weights_load(name):
    net = SCOATNet.from_pretrained(name)
    assert net.pretrained.name == name
    assert "CC BY-NC-SA 4.0" in net.pretrained.licence


def test_an_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(WeightsError, match="neither a weights file nor one of the shipped weights"):
        SCOATNet.from_pretrained("scoat-w9000")


class Malicious:
    """A pickle that would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_that_run_code_are_refused(tmp_path):
    for legacy in (True, False):
        torch.save(
            {"final.weight": Malicious(tmp_path / "owned")},
            tmp_path / "evil.pth",
            _use_new_zipfile_serialization=legacy,
        )
        with pytest.raises(WeightsError, match=r"evil\.pth: refused, damaged or more than plain tensors"):
            SCOATNet.from_pretrained(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def truncated(weights, path):
    path.write_bytes(weights.read_bytes()[:-100])


def flipped_header(weights, path):
    path.write_bytes(b"\xff" * 16 + weights.read_bytes()[16:])


def huge_header(weights, path):
    path.write_bytes(struct.pack("<Q", 10**9) + weights.read_bytes()[8:])


def empty(weights, path):
    path.write_bytes(b"")


def with_nan(weights, path):
    def change(state):
        state["conv2_1.conv1.weight"][0, 0, 0, 0] = float("nan")
        return state

    resave(weights, path, change)


def with_infinity(weights, path):
    resave(weights, path, lambda state: state | {"final.bias": torch.tensor([float("inf")])})


def negative_variance(weights, path):
    resave(weights, path, lambda state: state | {"conv0_0.bn1.running_var": -torch.ones(3)})


def wrong_shape(weights, path):
    resave(weights, path, lambda state: state | {"conv4_0.conv2.weight": torch.zeros(3, 3, 3, 3)})


def complex_tensor(weights, path):
    resave(weights, path, lambda state: state | {"final.bias": torch.zeros(1, dtype=torch.complex64)})


def integers(weights, path):
    resave(weights, path, lambda state: state | {"final.weight": torch.zeros(1, 3, 3, 3, dtype=torch.int8)})


def float8(weights, path):
    resave(weights, path, lambda state: state | {"final.bias": torch.zeros(1).to(torch.float8_e4m3fn)})


def infinite_as_float32(weights, path):
    resave(weights, path, lambda state: state | {"final.bias": torch.tensor([1e300], dtype=torch.float64)})


def deep_json(weights, path):
    resave(weights, path, window="[" * 100_000)


def missing_tensor(weights, path):
    resave(weights, path, lambda state: {k: v for k, v in state.items() if k != "att1_2.W_x.0.weight"})


def unknown_tensor(weights, path):
    resave(weights, path, lambda state: state | {"extra": torch.zeros(1)})


def not_a_scoatnet(weights, path):
    save_file({"weight": torch.zeros(3)}, path)


def other_width_said(weights, path):
    resave(weights, path, width="4000")


def odd_window(weights, path):
    resave(weights, path, window="[100, -100]")


def odd_size(weights, path):
    resave(weights, path, size="1000000000")


def odd_threshold(weights, path):
    resave(weights, path, threshold="high")


def odd_json(weights, path):
    resave(weights, path, window="{")


def newer_format(weights, path):
    resave(weights, path, format="scoat_fast 99")


@pytest.mark.parametrize(
    "damage",
    [
        truncated, flipped_header, huge_header, empty, with_nan, with_infinity, negative_variance, wrong_shape,
        complex_tensor, integers, float8, infinite_as_float32, deep_json,
        missing_tensor, unknown_tensor, not_a_scoatnet, other_width_said, odd_window, odd_size, odd_threshold, odd_json,
        newer_format,
    ],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_damaged_weights_are_refused_with_one_clear_error(weights, tmp_path, damage):
    path = tmp_path / "bad.safetensors"
    damage(weights, path)
    with pytest.raises(WeightsError, match=r"bad\.safetensors: ") as error:
        SCOATNet.from_pretrained(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"PK\x03\x04" + b"\0" * 50])
def test_damaged_pickles_are_refused(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"bad\.pth: refused"):
        SCOATNet.from_pretrained(tmp_path / "bad.pth")


@pytest.mark.parametrize(
    "change",
    [lambda value: value.to("meta"), lambda value: torch.zeros(1).expand(value.shape)],
    ids=["meta", "one value for all"],
)
def test_tensors_without_all_of_their_values_are_refused(net, tmp_path, change):
    state = net.state_dict()
    torch.save(state | {"final.weight": change(state["final.weight"])}, tmp_path / "bad.pt")
    with pytest.raises(WeightsError, match=r"bad\.pt: final\.weight does not hold all of its values"):
        SCOATNet.from_pretrained(tmp_path / "bad.pt")


def test_a_name_that_no_file_can_have_is_refused():
    with pytest.raises(WeightsError, match="neither a weights file nor one of the shipped weights"):
        SCOATNet.from_pretrained("scoat\0w16")


def test_a_small_file_cannot_make_a_large_network(tmp_path):
    """Its first and last convolution are those of 2.6 GiB of weights."""
    save_file(
        {"conv0_0.conv1.weight": torch.zeros(256, 1, 3, 3), "final.weight": torch.zeros(1, 256, 3, 3)},
        tmp_path / "bad.safetensors",
    )
    code = """
import resource, sys
from scoat_fast import SCOATNet, WeightsError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kiB
before = peak()
try:
    SCOATNet.from_pretrained(sys.argv[1])
except WeightsError as error:
    print(error)
sys.exit(peak() - before > 300_000)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "bad.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "bad.safetensors: these are not the weights of a SCOATNet" in result.stdout


def test_loading_draws_no_random_numbers_and_copies_what_it_read(net, weights, tmp_path):
    before = torch.get_rng_state()
    other = SCOATNet.from_pretrained(weights)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.requires_grad and p.is_leaf and p.is_contiguous() for p in other.parameters())
    shared = torch.zeros(3)
    state = net.state_dict()
    torch.save(state | {f"conv0_0.bn{k}.bias": shared for k in (1, 2)}, tmp_path / "shared.pt")
    other = SCOATNet.from_pretrained(tmp_path / "shared.pt")
    assert other.conv0_0.bn1.bias.data_ptr() != other.conv0_0.bn2.bias.data_ptr()


def test_a_pickle_of_something_else_is_refused(tmp_path):
    torch.save([1, 2, 3], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="a state dict is wanted"):
        SCOATNet.from_pretrained(tmp_path / "list.pth")
