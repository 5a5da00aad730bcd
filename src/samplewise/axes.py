"""What it means that an axis carries the samples, and a call of an op with its tensors' axes."""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .running import listed


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows whose number or order the data decided: a mask, a sort. Taking some of them by their place would mix the samples."""

    # what they were sorted by, in that order: rows of one key stand together, and may be taken together
    keys: tuple[int, ...] | None = None
    # the places they had before they were sorted, while that is known
    places: Tensor | None = None
    # the sort they were put in order by, which to use again is not the way back, or what else changed their order; None for rows in order
    order: object = None
    # whether they were picked before they were sorted: places are among those picked
    picked: bool = False
    # of numbers of rows: what there is to say of the rows that they number
    among: "Selection | None" = None

    def part(self, rows: slice) -> "Selection":
        """What is known of some of the rows."""
        places = None if self.places is None else self.places[rows]
        return Selection(
            self.keys and self.keys[rows],
            places,
            self.order and (object() if places is None else self.order),
            self.picked,
            self.among,
        )

    def before(self) -> "Selection | None":
        """What there was to say before the rows were sorted."""
        return Selection(among=self.among) if self.picked else None

    def moved(self) -> "Selection":
        """What is left to say of rows that went to other places."""
        return Selection(order=self.order and object(), picked=self.picked, among=self.among)

    def repeated(self) -> "Selection":
        """What is known of several copies of the rows: their places are not told from one another."""
        return replace(self, places=None)

    @staticmethod
    def of_those(chosen: "Selection | None") -> "Selection":
        """What there is to say of rows that the data picked among such, and of their numbers."""
        order = chosen and chosen.order
        return Selection(order=order, picked=order is not None, among=chosen)

    def may_take(self, places: Iterable[int], axis: "Axis", n: int) -> bool:
        """Whether rows at some places are told from the others by their own keys, and not by the other samples."""
        taken, rows = set(places), axis.size(n)
        if not taken or len(taken) == rows or in_step_now():
            return True
        if self.keys is None or not self.keys or rows % len(self.keys):
            return False
        inner, count = (axis.inner, len(self.keys)) if len(self.keys) < rows else (1, rows)
        classes: dict[tuple[int, ...], bool] = {}
        for row in range(rows):
            key = (self.keys[row // inner % count % len(self.keys)], row % inner, row // (inner * count))
            if classes.setdefault(key, row in taken) != (row in taken):
                return False
        return True


_TRUST = threading.local()
# where what is known of the samples is kept, whatever the default device is
HOST = torch.device("cpu")


def in_step_now() -> bool:
    """Whether `in_step` holds."""
    return getattr(_TRUST, "depth", 0) > 0


@contextmanager
def in_step() -> Iterator[None]:
    """While rows are taken by place in step with their own lengths: packing sequences and padding them."""
    _TRUST.depth = getattr(_TRUST, "depth", 0) + 1
    try:
        yield
    finally:
        _TRUST.depth -= 1


# the owner of a row that does not depend on the samples
NOBODY = -1


@dataclass(frozen=True)
class Axis:
    """Axis `dim` carries the samples: `shape[dim] == outer * n * inner`, sample index in the middle.

    Where the rows of a sample follow no such pattern (packed sequences), `ragged` names the sample of each row, or `NOBODY`.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    ragged: tuple[int, ...] | None = None
    # set where the data decided which rows these are
    chosen: Selection | None = field(default=None, compare=False)

    @staticmethod
    def of_rows(dim: int, owners: Tensor, n: int, chosen: Selection | None = None) -> "Axis":
        """The axis whose rows belong to the given samples, `(rows,)`, as a pattern where there is one."""
        times, rest = divmod(owners.numel(), n) if n else (0, 1)
        for axis in [Axis(dim, times, chosen=chosen), Axis(dim, 1, times, chosen=chosen)] if times and not rest else []:
            # rows that nobody has written yet fit any pattern: what is claimed of a constant is checked when it meets others
            if ((axis.owners(n) == owners) | (owners == NOBODY)).all():
                return axis
        return Axis(dim, ragged=tuple(listed(owners)), chosen=chosen)

    @staticmethod
    def of_sample(sample: int, x: Tensor) -> "Axis":
        """The axis of a tensor that is one sample's as a whole."""
        return Axis(0, ragged=(sample,) * (x.shape[0] if x.ndim else 1))

    @staticmethod
    def of_nobody(x: Tensor) -> "Axis | None":
        """What a tensor is that nobody owns: a constant, unless its history would look like something unknown."""
        return Axis(0, ragged=(NOBODY,) * (x.shape[0] if x.ndim else 1)) if x.requires_grad else None

    @functools.cached_property
    def pattern(self) -> tuple[int, int, int] | None:
        """All there is to know, in numbers that hash faster than an axis; None where that is more."""
        return (self.dim, self.outer, self.inner) if self.ragged is None and self.chosen is None else None

    @property
    def one_row_each(self) -> bool:
        """Whether no sample has two rows."""
        return self.outer == self.inner == 1 and (self.ragged is None or len(set(self.ragged)) == len(self.ragged))

    @property
    def nobodys(self) -> bool:
        """Whether no row belongs to any sample, as far as there are rows."""
        return bool(self.ragged) and set(self.ragged or ()) == {NOBODY}

    @property
    def sample(self) -> int | None:
        """The one sample that every row belongs to, as far as it belongs to any."""
        owners = set(self.ragged or ()) - {NOBODY}
        return owners.pop() if len(owners) == 1 else None

    def may_take(self, places: Iterable[int], n: int) -> bool:
        """Whether rows may be taken by their place."""
        return self.chosen is None or self.chosen.may_take(places, self, n)

    def in_step(self, other: "Axis") -> bool:
        """Whether rows that meet row by row are in one order, as far as the data changed it."""
        return same_order(self.chosen, other.chosen)

    def __str__(self) -> str:
        """For messages."""
        if self.ragged is not None:
            order = ", ".join(map(str, self.ragged[:8])) + ", ..." * (len(self.ragged) > 8)
            return f"samples on axis {self.dim}, in the order {order}"
        groups = [f"{self.outer} blocks of all samples"] * (self.outer > 1) + [f"{self.inner} rows each"] * (self.inner > 1)
        return f"samples on axis {self.dim}" + (f" ({', '.join(groups)})" if groups else "")

    def means(self, other: "Axis", n: int) -> bool:
        """Whether both say the same of a tensor, perhaps by different axes: that it is one sample's as a whole."""
        owners = set(self.ragged or ())
        return self == other or n == 1 or (len(owners) == 1 and NOBODY not in owners and owners == set(other.ragged or ()))

    @property
    def leads(self) -> bool:
        """Whether a tensor with these rows is what `rows` makes of it."""
        return self.dim == 0 and self.outer == 1 and self.ragged is None

    def at(self, dim: int) -> "Axis":
        """The same samples on another axis."""
        return self if dim == self.dim else replace(self, dim=dim)

    def owners(self, n: int, device: torch.device = HOST) -> Tensor:
        """The sample of each row, `(shape[dim],)`."""
        if self.ragged is not None:
            return torch.tensor(self.ragged, dtype=torch.long, device=device)
        # made where it is needed: a copy to another device would wait for that
        return torch.arange(n, device=device)[:, None].expand(n, self.inner).reshape(n * self.inner).repeat(self.outer)

    def size(self, n: int) -> int:
        """The number of rows."""
        return self.outer * n * self.inner if self.ragged is None else len(self.ragged)

    def rows(self, x: Tensor, n: int) -> Tensor:
        """`x` with the rows of axis `dim` first and those of one sample consecutive, equally many for each.

        `(n * outer * inner, ...)`; with ragged rows every sample is filled up to the longest by rows of zeros.
        """
        if self.dim:
            x = x.movedim(self.dim, 0)
        if self.ragged is not None:
            return self._padded(x, n)
        if self.outer == 1 or not x.shape[0]:
            return x
        grouped: Tensor = x.unflatten(0, (self.outer, -1, self.inner))
        return grouped.transpose(0, 1).flatten(0, 2)

    def _padded(self, x: Tensor, n: int) -> Tensor:
        if x.is_meta:
            # a stand-in, of which a rule uses the shape at most
            return x.new_empty(n * max(map((self.ragged or ()).count, range(n)), default=0), *x.shape[1:])
        owners = self.owners(n, x.device)
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
    # a list of places or values that occur in the batch: one entry of it is no more than a Python number
    listed: bool = False
    # what to say if a gradient is asked of it: a parameter had met it
    refused: str | None = None
    # an order of rows that a sort found, and, for one by integers, what they were in that order
    order: object = field(default=None, compare=False)
    keys: tuple[int, ...] | None = field(default=None, compare=False)

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
    look: Callable[[Tensor], Where | None]
    # of an in-place op on a view: the tensor it is a view of, and what that was before
    base: tuple[Tensor, object] | None = None
    tensors: list[Tensor] = field(init=False)
    # all tensors of the result, in order, once the op has run
    results: list[Tensor] = field(init=False, default_factory=list)
    # where the tensors are, by id: an in-place op changes it, so each is looked up once
    known: dict[int, Where | None] = field(init=False, default_factory=dict)
    # those that nobody owns, whose history has no parameter
    unowned: set[int] = field(init=False, default_factory=set)
    # whether it has been said already what the results are
    settled: bool = field(init=False, default=False)
    _placed: list[tuple[Tensor, Axis]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.name in {"max", "min"} and isinstance(self.get(1, "other"), Tensor):
            self.name += "imum"
        # `x.new_zeros(...)`: the tensor only lends its type and device
        own = self.args[1:] if self.name.startswith("new_") else self.args[:1] if self.name in LENDING else self.args
        self.tensors = tensors_in(own if self.name in LENDING or not self.kwargs else (own, self.kwargs))

    def where(self, x: Tensor) -> Where | None:
        """Where the sample axis of a tensor is; None for what does not depend on the samples."""
        key = id(x)
        if key not in self.known:
            self.known[key] = self.look(x)
        return self.known[key]

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword (`axis` and `dimension` count as `dim`)."""
        if position < len(self.args):
            return self.args[position]
        aliases = (name, "axis", "dimension") if name == "dim" else (name,)
        return next((self.kwargs[alias] for alias in aliases if alias in self.kwargs), default)

    def take(self, new: Mapping[int, Tensor], axis: Callable[[Tensor], Where | None]) -> None:
        """Let others, whose axes are known, take the places of some tensors, by id, before the op has run."""
        self.args, self.kwargs = swapped((self.args, self.kwargs), new)
        self.tensors = [new.get(id(x), x) for x in self.tensors]
        self.known.update((id(x), axis(x)) for x in new.values())
        self._placed = None

    def declare(self, x: Tensor, axis: "Axis") -> None:
        """Let a tensor be a batched one, before the op has run."""
        self.known[id(x)], self._placed = axis, None

    def forget_nobodys(self) -> bool:
        """Take tensors that nobody owns for the constants they are; whether there are any."""
        found = [x for x in self.tensors if isinstance(where := self.where(x), Axis) and where.ragged and where.nobodys]
        if found:
            self.known.update((id(x), None) for x in found)
            self.unowned |= {id(x) for x in found}
            self._placed = None
        return bool(found)

    def placed(self) -> list[tuple[Tensor, Axis]]:
        """The tensors that carry the sample axis, with the axis."""
        if self._placed is None:
            pairs = [(x, self.where(x)) for x in self.tensors]
            self._placed = [(x, axis) for x, axis in pairs if isinstance(axis, Axis)]
        return self._placed

    def sample(self) -> int | None:
        """The one sample that all batched operands belong to as a whole, if there is one."""
        placed = self.placed()
        if not placed or placed[0][1].ragged is None:
            return None
        owners = {axis.sample for _, axis in placed}
        return owners.pop() if len(owners) == 1 else None


def same_order(a: Selection | None, b: Selection | None) -> bool:
    """Whether rows are in one order, as far as the data changed it."""
    return (a and a.order) is (b and b.order) or in_step_now()


def differs_by_row(x: Tensor, dim: int) -> bool:
    """Whether a constant has something else for each row, which rows in an order of the data would meet by their place."""
    if x.layout != torch.strided:
        return True
    if x.shape[dim] < 2 or not x.stride(dim):
        return False
    # rows of a parameter may have one value, and still have gradients of their own
    return is_parameter(x) or not x.equal(x.narrow(dim, 0, 1).expand_as(x))


def is_parameter(x: Tensor) -> bool:
    """Whether a constant has a gradient, or might."""
    return x.requires_grad or isinstance(x, torch.nn.Parameter)


def meets_by_place(call: Call, axis: Axis, met: Iterable[tuple[Tensor, int]]) -> bool:
    """Whether rows that the data chose are beside constants with rows of their own, or rows in another order, on the given dims."""
    if in_step_now():
        return False
    for x, dim in met:
        where = call.where(x)
        # where no sample has two rows, the samples tell whether the orders agree
        told = isinstance(where, Axis) and axis.one_row_each and axis.at(dim) == where
        if isinstance(where, Axis) and where.dim == dim and not told and not axis.in_step(where):
            return True
        if where is None and differs_by_row(x.detach() if id(x) in call.unowned else x, dim):
            return True
    return False


def whole(x: Tensor) -> Axis:
    """With one sample or none, all of a tensor is that sample's: there is nothing to follow."""
    return Axis(0, 1, x.shape[0]) if x.ndim else Axis(0)


_NESTED = (tuple, list, dict, slice)


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str, *default: Any) -> Any:
    """An argument of a call, given by its place or by its name; without a default it must be there."""
    return args[place] if place < len(args) else kwargs.get(name, *default) if default else kwargs[name]


def tensors_in(value: object) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    found: list[Tensor] = []
    _gather(value, found)
    return found


def _gather(value: object, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, tuple | list):
        for item in value:
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, _NESTED):
                _gather(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _gather(item, found)
    elif isinstance(value, slice):
        _gather((value.start, value.stop, value.step), found)


def swapped(value: Any, new: Mapping[int, Any]) -> Any:
    """Nested tuples, lists and dictionaries with some tensors, given by id, replaced."""
    if isinstance(value, Tensor):
        return new.get(id(value), value)
    if isinstance(value, tuple | list):
        return type(value)(
            [
                new.get(id(item), item)
                if isinstance(item, Tensor)
                else swapped(item, new)
                if isinstance(item, _NESTED)
                else item
                for item in value
            ]
        )
    if isinstance(value, dict):
        return {key: swapped(item, new) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(swapped(item, new) for item in (value.start, value.stop, value.step)))
    return value


# The second tensor only lends its shape or type.
LENDING = frozenset({"type_as", "view_as", "reshape_as", "expand_as", "to"})
