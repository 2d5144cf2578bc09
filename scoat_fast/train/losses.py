"""The hybrid loss of equation 7."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6


def dice_loss(logits: Tensor, target: Tensor, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """One minus the soft Dice coefficient over the whole batch, with squares in the denominator (equation 7).

    Args:
        logits, target: [N, C, H, W], any float dtype; the target in 0..1.
        reduce: sums a tensor over all processes, with gradients, when a batch is spread over several.
    """
    probability = logits.float().sigmoid()
    target = target.float()
    overlap, ours, theirs = reduce(
        torch.stack([(probability * target).sum(), probability.square().sum(), target.square().sum()])
    ).unbind()
    return 1 - (2 * overlap + EPSILON) / (ours + theirs + EPSILON)


def hybrid_loss(
    outputs: Tensor | Sequence[Tensor],
    target: Tensor,
    alpha: float = 0.5,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """Binary cross-entropy plus ``alpha`` times the Dice loss; the mean over heads under deep supervision.

    The paper prints ``log(sigma(1 - Y))`` for ``log(1 - sigma(Y))``, and applies a sigmoid to what it calls
    probabilities: here the outputs are logits, in both terms.
    """
    heads = [outputs] if isinstance(outputs, Tensor) else outputs
    losses = [
        F.binary_cross_entropy_with_logits(head.float(), target.float()) + alpha * dice_loss(head, target, reduce)
        for head in heads
    ]
    return sum(losses) / len(losses)
