"""What is known of tensors, by identity, forgotten when they are."""

import weakref
from collections.abc import Iterator
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

    def items(self) -> Iterator[tuple[Tensor, Value]]:
        """All that is known of tensors that there still are."""
        for key, noted in list(self._noted.items()):
            tensor = noted()
            if tensor is not None:
                yield tensor, self._values[key]

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        self._values[id(tensor)] = value
        self._noted[id(tensor)] = weakref.ref(tensor)
