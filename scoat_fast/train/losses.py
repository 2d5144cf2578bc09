"""The losses of the paper's Table I. Each takes logits and is computed in float32, in float64 for such logits.

A mean over pixels is the mean of its processes' means; sums over a whole batch go through ``reduce``, which adds them
up over all processes, with gradients, where a batch is spread over several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6
FOCUS, BALANCE = 2.0, 0.25  # gamma and alpha of Lin et al.
Reduce = Callable[[Tensor], Tensor]


def _alone(sums: Tensor) -> Tensor:
    return sums


def mae_loss(logits: Tensor, target: Tensor, reduce: Reduce = _alone) -> Tensor:
    """Mean absolute error of the probabilities. ``logits``, ``target``: [N, C, H, W], the target in 0..1."""
    logits, target = _same(logits, target)
    return F.l1_loss(logits.sigmoid(), target)


def bce_loss(logits: Tensor, target: Tensor, reduce: Reduce = _alone) -> Tensor:
    """Binary cross-entropy, the mean over all pixels: the first term of equation 7.

    The paper prints ``log(sigma(1 - Y))`` for ``log(1 - sigma(Y))``, and applies a sigmoid to what it calls
    probabilities: here outputs are logits. ``literal_bce_loss`` is what is printed.
    """
    return F.binary_cross_entropy_with_logits(*_same(logits, target))


def literal_bce_loss(logits: Tensor, target: Tensor, reduce: Reduce = _alone) -> Tensor:
    """The first term of equation 7 to the letter: ``-log(sigma(1 - z))`` where there is no opacity.

    Its optimum for a pixel that is as often opacity as not lies at z = 0.5, not 0.
    """
    logits, target = _same(logits, target)
    return (target * F.softplus(-logits) + (1 - target) * F.softplus(logits - 1)).mean()


def focal_loss(logits: Tensor, target: Tensor, reduce: Reduce = _alone) -> Tensor:
    """Cross-entropy weighted by ``(1 - p_t)**2``, and by 0.25 where there is opacity, 0.75 elsewhere.

    T.-Y. Lin et al., Focal Loss for Dense Object Detection, equation 5, with the values of its section 4.
    """
    logits, target = _same(logits, target)
    probability = logits.sigmoid()
    wrong = probability + target - 2 * probability * target  # 1 - p_t
    weight = BALANCE * target + (1 - BALANCE) * (1 - target)
    return (weight * wrong**FOCUS * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).mean()


def dice_loss(logits: Tensor, target: Tensor, reduce: Reduce = _alone) -> Tensor:
    """One minus the soft Dice coefficient over the whole batch, with squares in the denominator (equation 7)."""
    logits, target = _same(logits, target)
    probability = logits.sigmoid()
    overlap, ours, theirs = reduce(
        torch.stack([(probability * target).sum(), probability.square().sum(), target.square().sum()])
    ).unbind()
    return 1 - (2 * overlap + EPSILON) / (ours + theirs + EPSILON)


def iou_loss(logits: Tensor, target: Tensor, reduce: Reduce = _alone) -> Tensor:
    """One minus the soft intersection over union over the whole batch.

    M. A. Rahman and Y. Wang, Optimizing Intersection-Over-Union in Deep Neural Networks for Image Segmentation: the
    union is the sum of ``p + t - p t``.
    """
    logits, target = _same(logits, target)
    probability = logits.sigmoid()
    overlap, both = reduce(torch.stack([(probability * target).sum(), (probability + target).sum()])).unbind()
    return 1 - (overlap + EPSILON) / (both - overlap + EPSILON)


def hybrid_loss(
    logits: Tensor, target: Tensor, reduce: Reduce = _alone, alpha: float = 0.5, bce: Callable = bce_loss
) -> Tensor:
    """Equation 7: binary cross-entropy plus ``alpha`` times the Dice loss."""
    return bce(logits, target, reduce) + alpha * dice_loss(logits, target, reduce)


def literal_hybrid_loss(logits: Tensor, target: Tensor, reduce: Reduce = _alone, alpha: float = 0.5) -> Tensor:
    """Equation 7 with its first term as it is printed, plus a constant."""
    return hybrid_loss(logits, target, reduce, alpha, literal_bce_loss)


LOSSES = {
    "mae": mae_loss,
    "iou": iou_loss,
    "bce": bce_loss,
    "dice": dice_loss,
    "focal": focal_loss,
    "bce-dice": hybrid_loss,
    "bce-dice-literal": literal_hybrid_loss,
}


def supervised(loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor | Sequence[Tensor], target: Tensor, on: str):
    """The loss on the heads of a network: on the ``mean`` of all, on the ``last``, or on one, counted from 1.

    Section III D of the paper. A network with one output has that alone. Raises ValueError for a head that is not
    there.
    """
    heads = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if on == "last":
        heads = heads[-1:]
    elif on != "mean":
        if not 1 <= int(on) <= len(heads):
            raise ValueError(f"the loss is wanted on head {on}, the network has {len(heads)}")
        heads = heads[int(on) - 1 : int(on)]
    return sum(loss(head, target) for head in heads) / len(heads)


def _same(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that the loss is computed in."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(dtype), target.to(dtype)
