"""The two small products between the means and the scales of the channels, shared by all implementations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def excite(means: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """[N, C], [R, C], [C, R] -> scales [N, C] of the dtype of ``means``."""
    return torch.sigmoid(F.linear(F.relu(F.linear(means, w1.to(means.dtype))), w2.to(means.dtype)))


def excite_backward(dscale: Tensor, means: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the means, w1 and w2 from that of the scales; the last two in the dtypes of the weights."""
    first, second = w1.to(means.dtype), w2.to(means.dtype)
    hidden = F.relu(F.linear(means, first))
    scale = torch.sigmoid(F.linear(hidden, second))
    dlogit = dscale * scale * (1 - scale)
    dhidden = (dlogit @ second) * (hidden > 0)
    return dhidden @ first, (dhidden.T @ means).to(w1.dtype), (dlogit.T @ hidden).to(w2.dtype)
