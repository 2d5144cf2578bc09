"""Convolutions with a backward pass of their own.

Two of one tensor that is made again for the backward pass (see ``recompute``): stock convolutions would hold that
tensor, the widest of the network, and both of its gradients at once, at the very moment when the most is kept. Here it
is let go before its one gradient is made, to which the 1x1 convolution adds its part in place.

On a CPU, where channels come last, the gradients of 3x3 weights are not stock PyTorch's (see ``winograd``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops._backend import records, without_autocast
from .winograd import weight_gradient, why_not

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
METHODS = ("forward", "_conv_forward")


def convolution(x: Tensor, spatial: nn.Module) -> Tensor:
    """``spatial(x)``, a 3x3 convolution with a border of one zero: [N, C, H, W] -> [N, D, H, W].

    A module that somebody has put in its place, hung hooks on or given another method is called.
    """
    if not records() or why_not(x) is not None:
        return spatial(x)
    if torch.is_autocast_enabled(x.device.type) or not _runs_here(spatial, 3):
        return spatial(x)
    return _Convolution.apply(x, spatial.weight, spatial.bias)


def two_convolutions(x: Tensor, spatial: nn.Module, pointwise: nn.Module) -> tuple[Tensor, Tensor]:
    """``spatial(x), pointwise(x)``, a 3x3 convolution with a border of one zero and a 1x1 convolution.

    [N, C, H, W] -> [N, D, H, W] each. Modules that somebody has put in their place, hung hooks on or given another
    method are called.
    """
    if not records() or not _runs_here(spatial, 3) or not _runs_here(pointwise, 1):
        return spatial(x), pointwise(x)
    return _TwoConvolutions.apply(x, spatial.weight, spatial.bias, pointwise.weight, pointwise.bias)


def is_itself(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of a kind, and nobody has hung hooks on it or replaced its methods."""
    changed = any(getattr(module, name) for name in HOOKS) or any(name in module.__dict__ for name in METHODS)
    return type(module) is kind and not changed


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nobody sees it when a module's weights are used and it is not called: no hooks on all modules, either."""
    return is_itself(module, kind) and not any(getattr(nn.modules.module, f"_global{name}") for name in HOOKS)


def is_plain(module: nn.Module, side: int) -> bool:
    """Whether a convolution has so long a side, and keeps height and width with a border of zeros."""
    options = module.kernel_size, module.padding, module.stride, module.dilation, module.groups, module.padding_mode
    return options == ((side, side), (side // 2, side // 2), (1, 1), (1, 1), 1, "zeros")


def _runs_here(module: nn.Module, side: int) -> bool:
    return is_untouched(module, nn.Conv2d) and is_plain(module, side)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(dy.device.type):
            x, weight = ctx.saved_tensors
            of_x, *wanted = ctx.needs_input_grad
            dx = F.conv_transpose2d(dy, weight, padding=1) if of_x else None
            return dx, *_of_weights(dy, x, weight, wanted)


class _TwoConvolutions(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, w3: Tensor, b3: Tensor | None, w1: Tensor, b1: Tensor | None) -> tuple[Tensor, Tensor]:
        return F.conv2d(x, w3, b3, padding=1), F.conv2d(x, w1, b1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, w3, _, w1, _ = inputs
        ctx.save_for_backward(x, w3, w1)

    @staticmethod
    def backward(ctx, dy3: Tensor, dy1: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(dy3.device.type):  # dtypes are those of the forward pass
            x, w3, w1 = (tensor.to(dy3.dtype) for tensor in ctx.saved_tensors)
            n, c, h, w = x.shape
            of_x, *wanted = ctx.needs_input_grad
            if _is_batched(dy3) or _is_batched(dy1):
                first, *of_w3 = _stock(dy3, x, w3, of_x, wanted[:2])
                second, *of_w1 = _stock(dy1, x, w1, of_x, wanted[2:])
                return first + second if of_x else None, *of_w3, *of_w1
            of_weights = *_of_weights(dy3, x, w3, wanted[:2]), *_of_weights(dy1, x, w1, wanted[2:])
            del x
            if not of_x:
                return None, *of_weights
            dx = F.conv_transpose2d(dy3, w3, padding=1)
            dx.view(n, c, h * w).baddbmm_(w1.flatten(1).t().expand(n, -1, -1), dy1.flatten(2))
            return dx, *of_weights


def _of_weights(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    """The gradients of the weight and the bias of a convolution that keeps height and width."""
    # that of weights cannot be differentiated again, for which gradients are enabled here
    ours = weight.shape[2] == 3 and wanted[0] and not torch.is_grad_enabled() and not _is_batched(dy)
    if ours and dy.dtype == torch.float32 and why_not(x) is None:
        return [torch.empty_like(weight).copy_(weight_gradient(dy, x)), dy.sum((0, 2, 3)) if wanted[1] else None]
    return _stock(dy, x, weight, False, wanted)[1:]


def _stock(dy: Tensor, x: Tensor, weight: Tensor, of_x: bool, wanted: list[bool]) -> list[Tensor | None]:
    padding = [side // 2 for side in weight.shape[2:]]
    return torch.ops.aten.convolution_backward(
        dy, x, weight, weight.shape[:1], [1, 1], padding, [1, 1], False, [0, 0], 1, [of_x, *wanted]
    )


def _is_batched(dy: Tensor) -> bool:
    """Whether a gradient stands for many (``is_grads_batched``), which standard operators alone can take."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(dy)
