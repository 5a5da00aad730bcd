"""Where rows go, by example: an op that only moves data is run on the owners of its elements.

It serves what no formula covers: joining and cutting along the sample axis.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .alignment import Several
from .axes import HOST, NOBODY, Axis, Call, Lost, Selection, Where, in_step_now, is_parameter, swapped, tensors_in
from .ownership import axis_of, marks
from .running import listed

# an entry that may differ from row to row
_FREE = -(2**40)


def moved(function: Callable[..., object], operands: int = 1) -> Several:
    """An op without an index: its first arguments, tensors or several in one, are the data."""

    def move(call: Call, out: Tensor) -> Where | None:
        data = call.args[:operands] or (call.kwargs.get("tensors", call.kwargs.get("input")),)
        if any(call.where(x) for x in call.tensors if not any(x is y for y in tensors_in(data))):
            return Lost(call.name)
        args, kwargs = swapped((call.args, call.kwargs), {id(x): marks(call, x).contiguous() for x in tensors_in(data)})
        place = next((k for k, x in enumerate(call.results) if x is out), 0)
        found = tensors_in(function(*args, **kwargs))[place]
        where = axis_of(found, call.n, call.name)
        if not isinstance(where, Axis) or not any(axis.chosen for _, axis in call.placed()):
            return where
        if not _may_take(call, function, data, place) or not _alike(call, function, data, place, found, where):
            return Lost(call.name)
        keys, places = (
            _carried(call, function, data, place, where.dim, told) for told in (lambda c: c.keys, lambda c: c.places)
        )
        return replace(where, chosen=_joined_selection(call, keys, places))

    return move


def _alike(call: Call, function: Callable[..., object], data: tuple[Any, ...], place: int, owners: Tensor, where: Axis) -> bool:
    """Whether each row is made of the same entries of rows in one order, and of the same constants."""
    if where.sample is not None or in_step_now() or not owners.numel():
        # nothing is another sample's
        return True
    placed = [(x, axis) for x, axis in call.placed() if axis.sample is None]
    mine = _rows(_run(call, function, data, place, {id(x): torch.full(x.shape, k) for k, (x, _) in enumerate(placed)}), where)
    from_two = ((mine != NOBODY) & (mine != mine.amax(1, keepdim=True))).any()
    if from_two and not all(placed[0][1].in_step(axis) for _, axis in placed):
        return False
    new = {id(x): _entries(x, call.where(x)) for x in tensors_in(data)}
    # rows of one sample that its own tensor brings may be anything
    new.update((id(x), torch.full(x.shape, _FREE)) for x, axis in call.placed() if axis.sample is not None)
    found = _rows(_run(call, function, data, place, new), where)
    found = found[(_rows(owners, where) != NOBODY).any(1) & (found != _FREE).all(1)]
    return found.equal(found[:1].expand_as(found))


def _rows(found: Tensor, where: Axis) -> Tensor:
    """`(rows, entries)`."""
    found = found.movedim(where.dim, 0) if found.ndim else found[None]
    return found.flatten(1) if found.ndim > 1 else found[:, None]


def _entries(x: Tensor, axis: Where | None) -> Tensor:
    """A number for each entry: of samples its place within a row, of constants one for each value, of a parameter one for each."""
    if isinstance(axis, Axis) and x.ndim:
        row = (*x.shape[: axis.dim], 1, *x.shape[axis.dim + 1 :])
        return torch.arange(math.prod(row), device=x.device).reshape(row).expand(x.shape).contiguous()
    if not is_parameter(x) and not x.is_complex():
        values: Tensor = torch.unique(x, return_inverse=True)[1]
        return -1 - values
    # equal where they are one entry in memory
    places = [torch.arange(size, device=x.device) * step for size, step in zip(x.shape, x.stride(), strict=True)]
    total = torch.zeros((), dtype=torch.long, device=x.device)
    for k, steps in enumerate(places):
        total = total + steps.reshape(-1, *[1] * (x.ndim - k - 1))
    return -1 - total


def _joined_selection(call: Call, keys: tuple[int, ...] | None, places: tuple[int, ...] | None) -> Selection:
    """What is known of rows of several operands: the sort they are in by, if they all are, and none was picked beside it."""
    chosen = [axis.chosen or Selection() for _, axis in call.placed()]
    orders = {id(own.order): own.order for own in chosen}
    if places is not None and len(orders) == 1 and chosen[0].order is not None and len({own.picked for own in chosen}) == 1:
        return Selection(keys, torch.tensor(places, dtype=torch.long, device=HOST), chosen[0].order, chosen[0].picked)
    return Selection(keys, order=object() if any(own.order for own in chosen) else None)


def _may_take(call: Call, function: Callable[..., object], data: tuple[Any, ...], place: int) -> bool:
    """Whether the rows that an op takes of those that the data chose may be told by their place."""
    return all(
        axis.may_take(
            set(listed(_by_row(call, function, data, place, {id(x): range(axis.size(call.n))}).flatten())) - {NOBODY}, call.n
        )
        for x, axis in call.placed()
        if axis.chosen is not None
    )


def _carried(
    call: Call,
    function: Callable[..., object],
    data: tuple[Any, ...],
    place: int,
    dim: int,
    told: Callable[[Selection], Sequence[int] | Tensor | None],
) -> tuple[int, ...] | None:
    """What the resulting rows were sorted by, or where they came from, if that is known of every operand."""
    numbers: dict[int, list[int]] = {}
    for x, axis in call.placed():
        own = None if axis.chosen is None else told(axis.chosen)
        if own is None or len(own) != axis.size(call.n):
            return None
        numbers[id(x)] = [int(k) for k in own]
    found = _by_row(call, function, data, place, numbers).movedim(dim, 0)
    return tuple(listed(found.flatten(1).amax(1) if found.ndim > 1 and found.numel() else found.flatten()))


def _by_row(
    call: Call, function: Callable[..., object], data: tuple[Any, ...], place: int, numbers: Mapping[int, Sequence[int]]
) -> Tensor:
    """The op on a number for each row of some operands, given by id."""
    new: dict[int, Tensor] = {}
    for x, axis in call.placed():
        if id(x) in numbers:
            rows = torch.tensor(list(numbers[id(x)]), dtype=torch.long, device=x.device)
            spread = rows.reshape(-1, *[1] * (x.ndim - axis.dim - 1)) if x.ndim else rows.reshape(())
            new[id(x)] = spread.expand(x.shape)
    return _run(call, function, data, place, new)


def _run(call: Call, function: Callable[..., object], data: tuple[Any, ...], place: int, given: Mapping[int, Tensor]) -> Tensor:
    """The op on tensors for some operands, given by id, and nobody's for the others."""
    new = {id(y): torch.full(y.shape, NOBODY, device=y.device) for y in tensors_in(data)}
    new.update((id(y), given[id(y)].to(y.device).contiguous()) for y in tensors_in(data) if id(y) in given)
    args, kwargs = swapped((call.args, call.kwargs), new)
    return tensors_in(function(*args, **kwargs))[place]


def reshaped_alike(call: Call, out: Tensor) -> Where:
    """A reshape of rows that follow no pattern."""
    x, axis = call.placed()[0]
    same = axis.ragged is not None and x.numel() == out.numel()
    there = axis_of(marks(call, x).reshape(out.shape), call.n, call.name) if same else None
    if not isinstance(there, Axis):
        return Lost(call.name)
    if axis.chosen is None or there.size(call.n) == axis.size(call.n):
        return replace(there, chosen=axis.chosen)
    return replace(there, chosen=axis.chosen.moved()) if in_step_now() else Lost(call.name)
