"""Weights with what belongs to them: safetensors files, and the ones that ship with the package."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from .errors import WeightsError
from .files import write_atomically
from .imaging.window import LUNG
from .model import SCOATNet
from .weights import shipped

FORMAT = "scoat_fast 1"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Pretrained:
    """What a trained network wants of its input, and how to read its output."""

    name: str
    window: tuple[float, float] = (LUNG.low, LUNG.high)  # HU that become 0 and 1
    size: int = 512  # slices are resized to size x size
    threshold: float = 0.5  # of the probability
    licence: str = ""


def save(net: SCOATNet, path: str | Path, facts: Pretrained) -> None:
    """Writes ``net`` as safetensors: convolutions and linears in float16, what normalises in float32."""
    state = {
        key: (value.half() if value.ndim > 1 else value).detach().cpu().contiguous()
        for key, value in net.state_dict().items()
    }
    metadata = {"format": FORMAT, **_network(net), **asdict(facts)}
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    write_atomically(path, lambda file: file.write(_sorted_header(to_bytes(state, text))))


def _network(net: SCOATNet) -> dict:
    """The constructor's arguments of ``net``."""
    return {
        "in_channels": net.in_channels,
        "out_channels": net.out_channels,
        "width": net.width,
        "block": net.block,
        "deep_supervision": net.has_heads,
        "equations": net.equations,
    }


def _sorted_header(data: bytes) -> bytes:
    """safetensors writes metadata in an order that changes from run to run; equal weights shall be equal files."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def load(name_or_path: str | Path) -> SCOATNet:
    """See ``SCOATNet.from_pretrained``. Also reads state dicts saved with ``torch.save``, but never runs their code."""
    path = shipped().get(str(name_or_path))
    if path is None:
        path = Path(name_or_path)
        try:
            path.open("rb").close()
        except (FileNotFoundError, ValueError) as error:  # ValueError: no file can have that name
            known = ", ".join(shipped())
            raise WeightsError(path, f"neither a weights file nor one of the shipped weights {known}") from error
        except OSError as error:
            raise WeightsError(path, f"cannot be read: {error.strerror}") from error
    state, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickle(path), {})
    state = {key.removeprefix("module."): value for key, value in state.items()}
    _check_kinds(path, state)
    network, facts = _facts(path, state, metadata)
    state = {key: value.detach().to(_kept(key), copy=True).contiguous() for key, value in state.items()}
    _check_values(path, state)
    try:
        with torch.device("meta"):  # no memory before names and shapes are known to fit, and no random numbers
            net = SCOATNet(**network)
        net.load_state_dict(state, assign=True)
    except (RuntimeError, ValueError, TypeError) as error:
        raise WeightsError(path, f"these are not the weights of a SCOATNet: {str(error)[:300]}") from error
    net.pretrained = facts
    return net.eval()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(path, f"damaged, or not a safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle that wants to run code, or whatever a damaged file raises
        raise WeightsError(path, f"refused, damaged or more than plain tensors ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in state.items()):
        raise WeightsError(path, "a state dict is wanted, from names to tensors")
    return state


def _kept(key: str) -> torch.dtype:
    """The type of a network's own tensor of that name."""
    return torch.int64 if key.endswith("num_batches_tracked") else torch.float32


def _check_kinds(path: Path, state: dict[str, Tensor]) -> None:
    for key, value in state.items():
        wanted = (torch.int64,) if _kept(key) == torch.int64 else FLOATS
        if value.layout != torch.strided or value.dtype not in wanted:
            raise WeightsError(path, f"{key} is a tensor of kind {value.dtype}, {value.layout}")
        if value.is_meta or value.untyped_storage().nbytes() < value.nbytes:
            raise WeightsError(path, f"{key} does not hold all of its values")


def _check_values(path: Path, state: dict[str, Tensor]) -> None:
    for key, value in state.items():
        if not value.isfinite().all():
            raise WeightsError(path, f"{key} holds NaN or values that are infinite in float32")
        if key.endswith("running_var") and (value < 0).any():
            raise WeightsError(path, f"{key} holds a negative variance")


def _facts(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> tuple[dict, Pretrained]:
    """The constructor's arguments, from the tensors' own shapes, and what the metadata says beside them."""
    heads = "final4.weight" in state
    stem, head = state.get("conv0_0.conv1.weight"), state.get("final4.weight" if heads else "final.weight")
    if stem is None or head is None or stem.ndim != 4 or head.ndim != 4:
        raise WeightsError(path, "these are not the weights of a SCOATNet: no first or last convolution")
    network = {
        "in_channels": stem.shape[1],
        "out_channels": head.shape[0],
        "width": stem.shape[0],
        "block": "res" if "conv0_0.downsample.0.weight" in state else "vgg",
        "deep_supervision": heads,
        "equations": "published",
    }
    if "format" not in metadata:
        return network, Pretrained(name=path.stem)
    try:
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {FORMAT!r} is wanted, got {metadata['format']!r}")
        said = {key: _parse(metadata[key], type(value)) for key, value in network.items()}
        network["equations"] = said["equations"]  # which the tensors do not show
        if said != network:
            raise ValueError(f"the metadata says {said}, the tensors {network}")
        low, high = (float(hu) for hu in json.loads(metadata["window"]))
        facts = Pretrained(
            name=metadata["name"],
            window=(low, high),
            size=_parse(metadata["size"], int),
            threshold=_parse(metadata["threshold"], float),
            licence=metadata["licence"],
        )
        if not (-10_000 < low < high < 10_000 and 0 < facts.threshold < 1 and 16 <= facts.size <= 4096):
            raise ValueError(f"window {low}, {high}, threshold {facts.threshold} or size {facts.size} is out of range")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(path, f"its metadata cannot be used: {type(error).__name__} {error}") from error
    return network, facts


def _parse(text: str, kind: type):
    value = text if kind is str else json.loads(text)
    if not isinstance(value, kind):
        raise TypeError(f"a {kind.__name__} is wanted, got {text!r}")
    return value
