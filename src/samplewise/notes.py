"""What is known of tensors, by identity, forgotten when they are."""

import weakref
from functools import partial
from typing import Any, Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class Notes(Generic[Value]):
    """A dictionary with tensors as keys that does not keep them alive.

    The weak references only tell when a tensor is gone and are never followed: a tensor that autograd alone still holds keeps its
    identity.
    """

    def __init__(self) -> None:
        self._values: dict[int, Value] = {}
        self._watch: dict[int, Any] = {}
        self._self = weakref.ref(self)

    def get(self, tensor: Tensor) -> Value | None:
        """What is known, or None."""
        return self._values.get(id(tensor))

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        key = id(tensor)
        if key not in self._watch:
            self._watch[key] = weakref.ref(tensor, partial(_forget, self._self, key))
        self._values[key] = value


def _forget(notes: Any, key: int, _: object) -> None:
    alive = notes()
    if alive is not None:
        del alive._values[key], alive._watch[key]  # noqa: SLF001
