"""The four fused operations: one folder each, the same files in every folder (``op.py`` first)."""

from ._backend import Choice, disabled, explain, use_backend
from ._register import Operation
from .batch_norm_relu.op import OPERATION as _batch_norm_relu
from .batch_norm_relu.op import batch_norm_relu
from .channel_gate.op import OPERATION as _channel_gate
from .channel_gate.op import channel_gate
from .spatial_gate.op import OPERATION as _spatial_gate
from .spatial_gate.op import spatial_gate
from .upsample.op import OPERATION as _upsample
from .upsample.op import upsample

ALL: tuple[Operation, ...] = (_upsample, _spatial_gate, _channel_gate, _batch_norm_relu)

__all__ = [
    "ALL",
    "Choice",
    "Operation",
    "batch_norm_relu",
    "channel_gate",
    "disabled",
    "explain",
    "spatial_gate",
    "upsample",
    "use_backend",
]
