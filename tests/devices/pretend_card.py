"""A second device for machines without one: tensors that say they lie on a card, and refuse to be mixed as its do.

`with pretend_card():` whatever is brought to "card" computes in the processor as ever, but an operation that reads
from both memories fails, as it does on a real card: a number of dimension 0 and an index from the processor are
allowed, and copies are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "card"
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


class OnCard(Tensor):
    """A tensor in the card's memory; `held` holds its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls: type[OnCard], numbers: Tensor) -> OnCard:
        made: OnCard = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            layout=numbers.layout,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        made.held = numbers
        return made

    @property
    def data(self) -> Tensor:
        """What `parameter.data = ...` replaces: torch would leave `held` as it was."""
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        self.held = other.held if isinstance(other, OnCard) else other

    def untyped_storage(self) -> torch.UntypedStorage:
        """Where the numbers lie, by which those who write files find tensors that share them."""
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        """The numbers, brought here as a card would bring them."""
        return self.held.tolist()

    def storage(self) -> Any:
        """The same, by its old name."""
        return self.held.storage()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})


class Card(TorchDispatchMode):
    """Catches what is made on the card, or brought to it. operations: how many gave something that lies there."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _compute(func, args, kwargs or {})
        self.operations += isinstance(result, OnCard)
        return result


@contextlib.contextmanager
def pretend_card() -> Iterator[Card]:
    """Within it "card" is a device of this machine."""
    _register()
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    # Keeps shared weights shared when a module is brought there, as a card does.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with Card() as card:
            yield card
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapped)


@functools.cache
def _register() -> torch.library.Library:
    """Torch has room for one device that it does not know, and it stays for the life of the process."""
    _setup_privateuseone_for_python_backend(NAME)
    kernels = torch.library.Library("aten", "IMPL")
    for name, make in (("empty.memory_format", torch.empty), ("empty_strided", torch.empty_strided)):
        kernels.impl(name, functools.partial(_made, make), "PrivateUse1")
    kernels.impl("_copy_from", _copied, "PrivateUse1")
    return kernels


def _copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Between memories, where torch copies without asking a mode."""
    _inner(target).copy_(_inner(source))
    return target


def _inner(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, OnCard) else leaf


def _made(make: Callable[..., Tensor], *args: Any, **kwargs: Any) -> OnCard:
    """Where torch makes a tensor without asking a mode (`torch.tensor` does)."""
    return OnCard(make(*args, **{**kwargs, "device": "cpu", "pin_memory": False}))


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on what is inside, in the memory that it belongs to."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if not isinstance(tensor, OnCard)]
    on_card = any(isinstance(tensor, OnCard) for tensor in tensors)
    if on_card and func not in _COPIES:
        strays = here[:0] if func in _INDEXING and isinstance(args[0], OnCard) else [t for t in here if t.dim() > 0]
        if strays:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found {NAME} and {strays[0].device} "
                f"of shape {tuple(strays[0].shape)}"
            )
    wanted = kwargs.get("device")
    if wanted is not None:
        on_card = torch.device(wanted).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu") if on_card else wanted}
    elif func is torch.ops.aten.copy_.default:
        on_card = isinstance(args[0], OnCard)

    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    if func is torch.ops.aten._to_copy.default and wanted is not None:
        result = func(*inner_args, **{**inner_kwargs, "non_blocking": False})
    else:
        result = func(*inner_args, **inner_kwargs)
    if not on_card:
        return result
    wrapped = tree_map(lambda leaf: OnCard(leaf) if isinstance(leaf, Tensor) else leaf, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)
