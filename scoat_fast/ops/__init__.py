"""The three fused operations: one folder each, the same files in every folder (``op.py`` first)."""

from ._backend import Choice, disabled, explain, use_backend
from ._register import Operation
from .channel_gate.op import OPERATION as _channel_gate
from .channel_gate.op import channel_gate
from .spatial_gate.op import OPERATION as _spatial_gate
from .spatial_gate.op import spatial_gate
from .upsample.op import OPERATION as _upsample
from .upsample.op import upsample

ALL: tuple[Operation, ...] = (_upsample, _spatial_gate, _channel_gate)

__all__ = [
    "ALL",
    "Choice",
    "Operation",
    "channel_gate",
    "disabled",
    "explain",
    "spatial_gate",
    "upsample",
    "use_backend",
]
