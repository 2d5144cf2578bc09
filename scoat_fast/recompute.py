"""Activations that the backward pass makes again instead of keeping them.

A concatenation, its recalibrated copy and a normalised activation take one pass over memory to make, but as inputs of
convolutions they would be kept for the gradients of the weights: half of all memory that training needs. Within
``recomputing()`` a layer says how such a tensor is made (``forget``); whatever keeps it for the backward pass then
keeps the recipe instead. The idea is that of memory-efficient DenseNets (G. Pleiss et al., arXiv:1707.06990); PyTorch's
hooks for saved tensors carry it out, so that the convolutions are stock ones.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from .ops._backend import records

_local = threading.local()  # by the place in memory, .recipes of results and, while it lives, .kept of a tensor


def recomputing() -> contextlib.AbstractContextManager:
    """Within, what ``forget`` names is not kept for the backward pass.

    Changes nothing where no gradient is wanted, under ``torch.compile``, which decides by itself what to keep, where
    only standard operators are known (see ``stock_only``), and where hooks are forbidden
    (``torch.autograd.graph.disable_saved_tensors_hooks``) or there already: of a checkpoint, or ``save_on_cpu``, which
    would see nothing.
    """
    if not records():
        return contextlib.nullcontext()
    hooks = torch._C._autograd
    if not hooks._saved_tensors_hooks_is_enabled() or hooks._top_saved_tensors_default_hooks(False) is not None:
        return contextlib.nullcontext()
    return _recomputing()


@contextlib.contextmanager
def _recomputing():
    outer = getattr(_local, "recipes", None), getattr(_local, "kept", None)
    _local.recipes, _local.kept = {}, weakref.WeakValueDictionary()
    try:
        with torch.autograd.graph.saved_tensors_hooks(_kept, lambda kept: kept.use()):
            yield
    finally:
        _local.recipes, _local.kept = outer


def forget(result: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``result``, which ``make(*inputs)`` gives again, bit for bit; ``make`` then runs without gradients."""
    # else it only stands for a tensor
    plain = type(result).__torch_dispatch__ is Tensor.__torch_dispatch__ and not result.is_meta
    if plain and not torch.compiler.is_compiling():
        recipes = getattr(_local, "recipes", None)
        if recipes is not None:
            place = _place(result)
            recipes[place] = recipe = _Recipe(make, [_kept(each) for each in inputs], result)
            kept = _local.kept.pop(place, None)  # for good: what is given up leaves its place to others
            if kept is not None:  # by the operation that gave the result
                kept.give_up(recipe)
    return result


def _kept(tensor: Tensor) -> _Kept | _Recipe:
    """What stands for a tensor until the backward pass."""
    place = _place(tensor)
    recipe = _local.recipes.get(place)
    result = None if recipe is None else recipe.result()
    # memory is used again: what lies there is the result only while that lives, and lies there
    if result is None or _place(result) != place:
        _local.kept[place] = kept = _Kept(tensor)
        return kept
    recipe.uses += 1
    return recipe


def _place(tensor: Tensor) -> tuple:
    """Where in memory a tensor lies, as what, and at which version: once modified in place it is another."""
    layout = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    return tensor.untyped_storage()._cdata, *layout, _version(tensor)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # a weight made in inference mode has none


class _Kept:
    """A tensor kept as it is; modified in place, it is refused, as autograd refuses it where there are no hooks."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.version = tensor.detach(), _version(tensor)
        self.recipe: _Recipe | None = None

    def give_up(self, recipe: _Recipe) -> None:
        """From now on stands for what a recipe makes."""
        self.tensor, self.recipe = None, recipe
        recipe.uses += 1

    def use(self) -> Tensor:
        if self.recipe is not None:
            return self.recipe.use()
        if not self.tensor.untyped_storage().nbytes() and self.tensor.numel():
            raise RuntimeError(f"the memory of {list(self.tensor.shape)} is needed for a gradient and was taken away")
        if _version(self.tensor) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self.tensor.dtype} {list(self.tensor.shape)} is at version {self.tensor._version}, "
                f"expected is version {self.version}"
            )
        return self.tensor


class _Recipe:
    """A tensor that is made when it is first needed, and let go when it was needed as often as it was kept."""

    def __init__(self, make: Callable[..., Tensor], inputs: list[_Kept | _Recipe], result: Tensor):
        self.make, self.inputs, self.result, self.uses, self.used = make, inputs, weakref.ref(result), 0, 0
        device = result.device.type
        self.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.value: Tensor | None = None

    def use(self) -> Tensor:
        if self.value is None:
            with torch.no_grad(), torch.autocast(*self.autocast, cache_enabled=False):
                self.value = self.make(*(each.use() for each in self.inputs))
        value = self.value
        self.used += 1
        if self.used == self.uses:
            self.value, self.used = None, 0
        return value
