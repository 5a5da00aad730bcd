"""What it means that an axis carries the samples, and a call of an op with its tensors' axes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """Axis `dim` carries the samples: `shape[dim] == outer * n * inner`, sample index in the middle.

    Where the rows of a sample follow no such pattern (packed sequences), `ragged` names the sample of each row.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    ragged: tuple[int, ...] | None = None

    @staticmethod
    def of_rows(dim: int, owners: Tensor, n: int) -> "Axis":
        """The axis whose rows belong to the given samples, `(rows,)`, as a pattern where there is one."""
        if n and owners.numel() % n == 0 and owners.equal(torch.arange(n).repeat(owners.numel() // n)):
            return Axis(dim, owners.numel() // n)
        return Axis(dim, ragged=tuple(owners.tolist()))

    def __str__(self) -> str:
        """For messages."""
        if self.ragged is not None:
            order = ", ".join(map(str, self.ragged[:8])) + ", ..." * (len(self.ragged) > 8)
            return f"samples on axis {self.dim}, in the order {order}"
        groups = [f"{self.outer} blocks of all samples"] * (self.outer > 1) + [f"{self.inner} rows each"] * (self.inner > 1)
        return f"samples on axis {self.dim}" + (f" ({', '.join(groups)})" if groups else "")

    def at(self, dim: int) -> "Axis":
        """The same samples on another axis."""
        return self if dim == self.dim else Axis(dim, self.outer, self.inner, self.ragged)

    def owners(self, n: int) -> Tensor:
        """The sample of each row, `(shape[dim],)`."""
        if self.ragged is not None:
            return torch.tensor(self.ragged, dtype=torch.long)
        return torch.arange(n).repeat_interleave(self.inner).repeat(self.outer)

    def size(self, n: int) -> int:
        """The number of rows."""
        return self.outer * n * self.inner if self.ragged is None else len(self.ragged)

    def rows(self, x: Tensor, n: int) -> Tensor:
        """`x` with the rows of axis `dim` first and those of one sample consecutive, equally many for each.

        `(n * outer * inner, ...)`; with ragged rows every sample is filled up to the longest by rows of zeros.
        """
        x = x.movedim(self.dim, 0)
        if self.ragged is not None:
            return self._padded(x, n)
        if self.outer == 1 or not x.shape[0]:
            return x
        grouped: Tensor = x.unflatten(0, (self.outer, -1, self.inner))
        return grouped.transpose(0, 1).flatten(0, 2)

    def _padded(self, x: Tensor, n: int) -> Tensor:
        owners = self.owners(n).to(x.device)
        counts = torch.bincount(owners, minlength=n)
        longest = int(counts.max()) if n else 0
        order = owners.argsort(stable=True)
        place = torch.arange(len(owners), device=x.device) - (counts.cumsum(0) - counts)[owners[order]]
        padded = x.new_zeros(n * longest, *x.shape[1:])
        return padded.index_copy(0, owners[order] * longest + place, x[order])


@dataclass(frozen=True)
class Lost:
    """The samples were brought together by `op`."""

    op: str
    # a plain sum or mean over samples, and nothing but linear arithmetic since: it still splits into samples
    linear: bool = False
    # every sample has the same weight in it: false for a mean with class weights or ignored targets
    uniform: bool = True

    def __str__(self) -> str:
        """For messages."""
        return f"{self.op} brought the samples together, or hid where they are"


Where = Axis | Lost


@dataclass
class Call:
    """One call of an op: its arguments, its result, and where the sample axis of each tensor is."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    n: int
    where: Callable[[Tensor], Where | None]
    tensors: list[Tensor] = field(init=False)
    _placed: list[tuple[Tensor, Axis]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.name in {"max", "min"} and isinstance(self.get(1, "other"), Tensor):
            self.name += "imum"
        # `x.new_zeros(...)`: the tensor only lends its type and device
        own = self.args[1:] if self.name.startswith("new_") else self.args[:1] if self.name in LENDING else self.args
        self.tensors = list(tensors_in(own if self.name in LENDING else (own, self.kwargs)))

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword (numpy's `axis` counts as `dim`)."""
        if position < len(self.args):
            return self.args[position]
        alias = "axis" if name == "dim" else name
        return self.kwargs.get(name, self.kwargs.get(alias, default))

    def placed(self) -> list[tuple[Tensor, Axis]]:
        """The tensors that carry the sample axis, with the axis."""
        if self._placed is None:
            pairs = ((x, self.where(x)) for x in self.tensors)
            self._placed = [(x, axis) for x, axis in pairs if isinstance(axis, Axis)]
        return self._placed


def whole(x: Tensor) -> Axis:
    """With one sample or none, all of a tensor is that sample's: there is nothing to follow."""
    return Axis(0, 1, x.shape[0]) if x.ndim else Axis(0)


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step))


def swapped(value: Any, new: Mapping[int, Any]) -> Any:
    """Nested tuples, lists and dictionaries with some tensors, given by id, replaced."""
    if isinstance(value, Tensor):
        return new.get(id(value), value)
    if isinstance(value, tuple | list):
        items = [swapped(item, new) for item in value]
        return type(value)(items)
    if isinstance(value, dict):
        return {key: swapped(item, new) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(swapped(item, new) for item in (value.start, value.stop, value.step)))
    return value


# The second tensor only lends its shape or type.
LENDING = frozenset({"type_as", "view_as", "reshape_as", "expand_as", "to"})
