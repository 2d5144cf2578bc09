"""A trained network as a file for other programs: ONNX, or a program of ``torch.export``."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from .errors import OutputError, ScoatFastError
from .files import write_atomically
from .model import SCOATNet

BOUND = 1e-4  # of the largest logit: how far the file's answers may be from the network's
NOTE = (
    "SCOAT-Net, lung opacification on chest CT. Research only, not for clinical use. Input: slices [N, channels, H, W] "
    "of the size that is named here, HU clipped to the window and brought to 0..1, spine down. Output: logits."
)
FACTS = "scoat_fast.json"  # in a program of torch.export


def export(net: SCOATNet, path: str | Path, size: int | None = None) -> float:
    """Writes a network with ``pretrained`` facts as ``.onnx`` (one file, standard operators) or ``.pt2``.

    The batch is dynamic, height and width are fixed. What the network wants of its input (window, size, threshold)
    stands in the file: as metadata of ONNX, or in ``scoat_fast.json`` beside the program (``extra_files`` of
    ``torch.export.load``). The file is run and compared with the network before it appears.

    Args:
        size: height and width of the input; by default those of the weights.

    Returns:
        The largest difference of two logits, as a share of the largest logit.

    Raises:
        OutputError: for another suffix, or if the file cannot be written.
        ScoatFastError: if a library is missing, or the file's answers are too far from the network's.
    """
    path = Path(path)
    kinds = {".onnx": _onnx, ".pt2": _program}
    if path.suffix not in kinds:
        raise OutputError(path, f"a file that ends in {' or '.join(kinds)} is wanted")
    size = net.pretrained.size if size is None else size
    net = _single(net)
    facts = {**asdict(net.pretrained), "size": size, "note": NOTE}
    data, run = kinds[path.suffix](net, torch.rand(2, net.in_channels, size, size), facts)
    error = max(_error(net, run, torch.rand(n, net.in_channels, size, size)) for n in (1, 3))
    if not error <= BOUND:
        raise ScoatFastError(
            f"{path}: its logits are {error:.1e} of the largest from the network's, allowed is {BOUND}"
        )
    write_atomically(path, lambda file: file.write(data))
    return error


def _single(net: SCOATNet) -> SCOATNet:
    """A copy in evaluation mode that gives its last head alone."""
    import copy

    net = copy.deepcopy(net).float().cpu().eval()
    net.deep_supervision = False
    return net


@torch.no_grad()
def _error(net: SCOATNet, run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    expected = net(x)
    found = run(x)
    if found.shape != expected.shape:
        raise ScoatFastError(f"the file answers with {tuple(found.shape)}, the network with {tuple(expected.shape)}")
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _onnx(net: SCOATNet, x: Tensor, facts: dict) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, what torch exports with
    except ImportError as error:
        raise ScoatFastError(f"ONNX needs {error.name}: pip install 'scoat-fast[export]'") from error
    quiet = logging.getLogger("torch.onnx")
    before = quiet.level
    quiet.setLevel(logging.ERROR)  # it misses torchvision, which nothing here needs
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            model = torch.onnx.export(
                net,
                (x,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["slices"],
                output_names=["logits"],
                verbose=False,
            ).model_proto
    finally:
        quiet.setLevel(before)
    for name, value in facts.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value if isinstance(value, str) else json.dumps(value)
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda x: torch.from_numpy(session.run(None, {"slices": x.numpy()})[0])


def _program(net: SCOATNet, x: Tensor, facts: dict) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={FACTS: json.dumps(facts)})
    data = file.getvalue()
    return data, torch.export.load(io.BytesIO(data)).module()
