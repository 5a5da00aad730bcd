"""What is known of tensors, by identity, forgotten when they are."""

import weakref
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class Notes(Generic[Value]):
    """A dictionary with tensors as keys that does not keep them alive.

    A weak reference tells whether a note is of the tensor that has this identity now: one that is gone left it to another. A tensor that
    autograd alone still holds keeps its identity.
    """

    def __init__(self) -> None:
        # two dictionaries, and not one of pairs: the garbage collector has fewer objects to look at
        self._values: dict[int, Value] = {}
        self._noted: dict[int, weakref.ref[Tensor]] = {}

    def get(self, tensor: Tensor) -> Value | None:
        """What is known, or None."""
        noted = self._noted.get(id(tensor))
        return None if noted is None or noted() is None else self._values[id(tensor)]

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        self._values[id(tensor)] = value
        self._noted[id(tensor)] = weakref.ref(tensor)
