"""Where rows go, by example: an op that only moves data is run on the owners of its elements.

It serves what no formula covers: joining and cutting along the sample axis, routing rows to experts and back, messages in graphs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .alignment import Several, through_index
from .axes import HOST, NOBODY, Axis, Call, Lost, Selection, Where, in_step_now, swapped, tensors_in, whole
from .movement import dim_of


def marks(call: Call, x: Tensor) -> Tensor:
    """The owner of every element, `x.shape`; `NOBODY` where it does not depend on the samples."""
    axis = call.where(x)
    return _marks(axis, x, call.n) if isinstance(axis, Axis) else torch.full((), NOBODY, device=x.device).expand(x.shape)


def _marks(axis: Axis, x: Tensor, n: int) -> Tensor:
    owners = axis.owners(n, x.device)
    return owners.reshape(-1, *[1] * (x.ndim - axis.dim - 1)).expand(x.shape) if x.ndim else owners.reshape(())


def axis_of(found: Tensor, n: int, op: str) -> Where | None:
    """The axis along which the owners of elements differ; None where nobody owns any, lost where there is no such axis."""
    if not found.numel():
        # no rows of nobody's: a part that no sample came to
        return Axis(found.shape.index(0), ragged=())
    if (found == NOBODY).all():
        return None
    for dim in range(max(1, found.ndim)):
        rows = found.movedim(dim, 0).flatten(1) if found.ndim > 1 else found.reshape(-1, 1)
        owners = rows.amax(1)
        if ((rows == owners[:, None]) | (rows == NOBODY)).all():
            return Axis.of_rows(dim, owners.cpu(), n)
    return Lost(op)


def agreed(first: Tensor, second: Tensor) -> Tensor | None:
    """The owners of elements that two tensors had; None where two samples claim one place."""
    differ = (first != second) & (first != NOBODY) & (second != NOBODY)
    return None if differ.any() else torch.maximum(first, second)


def moved(function: Callable[..., object]) -> Several:
    """An op without an index: its first argument, a tensor or several, is the data."""

    def move(call: Call, out: Tensor) -> Where | None:
        data = call.args[:1] or (call.kwargs.get("tensors", call.kwargs.get("input")),)
        if any(call.where(x) for x in call.tensors if not any(x is y for y in tensors_in(data))):
            return Lost(call.name)
        args, kwargs = swapped((call.args, call.kwargs), {id(x): marks(call, x) for x in tensors_in(data)})
        place = next((k for k, x in enumerate(call.results) if x is out), 0)
        found = tensors_in(function(*args, **kwargs))[place]
        where = axis_of(found, call.n, call.name)
        if not isinstance(where, Axis) or not any(axis.chosen for _, axis in call.placed()):
            return where
        if not _may_take(call, function, data, place):
            return Lost(call.name)
        keys, places = (
            _carried(call, function, data, place, where.dim, told) for told in (lambda c: c.keys, lambda c: c.places)
        )
        return replace(where, chosen=_joined_selection(call, keys, places))

    return move


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
            set(_by_row(call, function, data, place, {id(x): range(axis.size(call.n))}).flatten().tolist()) - {NOBODY}, call.n
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
    return tuple((found.flatten(1).amax(1) if found.ndim > 1 and found.numel() else found.flatten()).tolist())


def _by_row(
    call: Call, function: Callable[..., object], data: tuple[Any, ...], place: int, numbers: Mapping[int, Sequence[int]]
) -> Tensor:
    """The op on a number for each row of some operands, given by id."""
    new = {id(y): torch.full((), NOBODY, device=y.device).expand(y.shape) for y in tensors_in(data)}
    for x, axis in call.placed():
        if id(x) in numbers:
            rows = torch.tensor(list(numbers[id(x)]), dtype=torch.long, device=x.device)
            new[id(x)] = rows.reshape(-1, *[1] * (x.ndim - axis.dim - 1)).expand(x.shape)
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


def occurring(call: Call, _: Tensor) -> Where:
    """`nonzero`, and `where` with a condition alone: the places of the entries that hold, each its sample's."""
    x, axis = call.placed()[0]
    places = x.detach().nonzero()[:, axis.dim] if x.ndim else x.new_zeros(int(bool(x)), dtype=torch.long)
    return Axis.of_rows(0, axis.owners(call.n)[places.cpu()], call.n, Selection())


def picked(call: Call, _: Tensor) -> Where:
    """`masked_select(x, mask)`: the entries that a mask picks, in one row."""
    x, mask = call.args[0], call.get(1, "mask")
    if call.where(x) is None:
        return Lost(call.name)
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    where = mask.expand(shape)
    found = agreed(marks(call, x).expand(shape)[where], marks(call, mask).expand(shape)[where])
    axis = None if found is None else axis_of(found, call.n, call.name)
    return replace(axis, chosen=Selection()) if isinstance(axis, Axis) else Lost(call.name)


def scattered_part(function: Callable[..., Tensor]) -> Several:
    """`slice_scatter` and its like: the second operand goes to a part of the first."""

    def move(call: Call, _: Tensor) -> Where | None:
        args, kwargs = swapped((call.args, call.kwargs), {id(x): marks(call, x).clone() for x in call.args[:2]})
        return axis_of(function(*args, **kwargs), call.n, call.name)

    return move


def gathered(call: Call, _: Tensor) -> Where | None:
    """`gather` and `take_along_dim`, where the index takes entries of the same sample."""
    x, index = call.args[0], call.get(2 if call.name == "gather" else 1, "index" if call.name == "gather" else "indices")
    dim = call.get(1 if call.name == "gather" else 2, "dim")
    if not isinstance(index, Tensor) or dim is None or x.ndim != index.ndim:
        return Lost(call.name)
    # without `gather`, take_along_dim broadcasts its operands
    shape = index.shape if call.name == "gather" else torch.take_along_dim(x.detach(), index, dim).shape
    owners = torch.take_along_dim(marks(call, x), index, dim) if call.name != "gather" else marks(call, x).gather(dim, index)
    found = agreed(owners, marks(call, index).expand(shape))
    return Lost(call.name) if found is None else axis_of(found, call.n, call.name)


@dataclass(frozen=True)
class Write:
    """What is written where: the owners of the target's elements and of what comes there, and how to read and write the place."""

    held: Tensor
    brought: Tensor | None
    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], Tensor]
    adds: bool

    def after(self, call: Call) -> Where | None:
        """Where the sample axis of the target is afterwards."""
        brought = agreed(self.brought, self.read(self.held)) if self.adds and self.brought is not None else self.brought
        if brought is None:
            return Lost(call.name)
        now = self.write(self.held.clone(), brought)
        # two samples written to one place
        return axis_of(now, call.n, call.name) if self.read(now).equal(brought) else Lost(call.name)


def _hidden(call: Call, index: Tensor, brought: Tensor | None) -> bool:
    """Whether what is written to places that the whole batch decided would not tell whose it is."""
    return isinstance(call.where(index), Lost) and (
        index.dtype == torch.bool or brought is None or bool((brought == NOBODY).any())
    )


def along_dim(call: Call, _: Tensor) -> Where | None:
    """`index_add`, `index_copy`, `index_reduce` and `index_fill`: rows of the source, or one value, go to rows of the target."""
    filled = call.name == "index_fill"
    names = ("input", "dim", "index", "value" if filled else "source")
    target, dim, index, source = (call.get(k, name) for k, name in enumerate(names))
    if not target.ndim or index.ndim > 1 or (not filled and source.ndim != target.ndim):
        return Lost(call.name)
    dim, rows = dim_of(target, dim), index.reshape(-1)
    there = torch.Size([*target.shape[:dim], len(rows), *target.shape[dim + 1 :]])
    mine = marks(call, index).reshape(-1, *[1] * (target.ndim - 1 - dim)).expand(there)
    brought = agreed(marks(call, source).expand(there), mine) if isinstance(source, Tensor) else mine
    if _hidden(call, index, brought):
        return Lost(call.name)
    write = Write(
        marks(call, target),
        brought,
        lambda held: held.index_select(dim, rows),
        lambda held, new: held.index_copy(dim, rows, new),
        adds=not filled and call.name != "index_copy",
    )
    return _put_back(call, index, source, write.after(call))


def _put_back(call: Call, index: Tensor, source: object, where: Where | None) -> Where | None:
    """Rows written to places that the batch decided are in order again if those are the places they came from."""
    if where is None:
        # nothing came
        return None
    own = call.where(source) if isinstance(source, Tensor) else None
    to = call.where(index)
    if isinstance(to, Axis) and isinstance(own, Axis):
        return where if isinstance(where, Lost) or to.in_step(own) else Lost(call.name)
    if isinstance(where, Lost) or not isinstance(to, Lost):
        return where
    places = own.chosen.places if isinstance(own, Axis) and own.chosen is not None and not own.chosen.picked else None
    if places is None or places.shape != index.shape:
        return replace(where, chosen=Selection(order=object()))
    back = places[index.cpu().argsort(stable=True)]
    return where if back.equal(back.sort()[0]) else replace(where, chosen=Selection(order=object()))


def scattered(call: Call, _: Tensor) -> Where | None:
    """`scatter`, `scatter_add`, `scatter_reduce`: elements of the source go to places along one dim."""
    target, dim, index = (call.get(k, name) for k, name in enumerate(("input", "dim", "index")))
    source = call.get(3, "src", call.kwargs.get("value"))
    mine = marks(call, index)
    if isinstance(source, Tensor) and source.ndim:
        mine_source = marks(call, source)[tuple(slice(size) for size in index.shape)]
        brought = agreed(mine_source, mine)
    else:
        brought = mine
    if _hidden(call, index, brought):
        return Lost(call.name)
    adds = call.name != "scatter" or call.kwargs.get("reduce") is not None
    write = Write(
        marks(call, target),
        brought,
        lambda held: held.gather(dim, index),
        lambda held, new: held.scatter(dim, index, new),
        adds,
    )
    return _put_back(call, index, source, write.after(call))


def put(call: Call, _: Tensor) -> Where | None:
    """`index_put(target, indices, values)`."""
    target, index, value = (call.get(k, name) for k, name in enumerate(("input", "indices", "values")))
    adds = bool(call.get(3, "accumulate", default=False))
    return _assigned(call, target, tuple(index), value, adds=adds)


def masked_put(call: Call, out: Tensor) -> Where | None:
    """`masked_scatter(target, mask, source)`: the source's elements in order, so that each must be its own sample's."""
    target, mask, source = (call.get(k, name) for k, name in enumerate(("input", "mask", "source")))
    mask, held = mask.expand(out.shape), marks(call, target).expand(out.shape)
    coming, mine = marks(call, source).flatten()[: int(mask.sum())], marks(call, call.get(1, "mask")).expand(out.shape)[mask]
    if (mine != NOBODY).any() and not coming.equal(mine):
        return Lost(call.name)
    write = Write(held, agreed(coming, mine), lambda kept: kept[mask], lambda kept, new: _set(kept, mask, new), adds=False)
    return write.after(call)


def written(call: Call) -> Where | None:
    """Where the sample axis of the target is after `target[index] = value`."""
    target, index, value = call.args
    if call.n <= 1 and any(call.where(x) for x in (target, value) if isinstance(x, Tensor)):
        return whole(target)
    wheres = [call.where(x) for x in call.tensors]
    lost = [where for x in (target, value) if isinstance(x, Tensor) and isinstance(where := call.where(x), Lost)]
    if lost:
        others = [where for x in tensors_in((target, value)) if (where := call.where(x)) is not None]
        plain = not any(call.where(x) for x in tensors_in((index,)))
        linear = plain and all(isinstance(where, Lost) and where.linear for where in others)
        return replace(lost[0], linear=linear, uniform=all(isinstance(where, Lost) and where.uniform for where in others))
    if not any(wheres):
        return None
    call.forget_nobodys()
    return _assigned(call, target, index, value, adds=False) or Axis.of_nobody(target)


def _assigned(call: Call, target: Tensor, index: Any, value: Any, *, adds: bool) -> Where | None:
    part = target.detach()[index]
    held = call.where(target)
    brought = call.where(value) if isinstance(value, Tensor) else None
    # rows of nobody's may become somebody's
    if isinstance(held, Axis) and NOBODY not in (held.ragged or ()):
        there = through_index(call, target, index, part)
        if there == held and not any(call.where(x) for x in tensors_in((index,))) and brought is None:
            return held
        if isinstance(brought, Axis) and there == brought.at(brought.dim + part.ndim - value.ndim):
            return held
    own = through_index(_constant_target(call, target), target, index, part)
    mine = _marks(own, part, call.n) if isinstance(own, Axis) else torch.full((), NOBODY, device=part.device).expand(part.shape)
    coming = marks(call, value) if isinstance(value, Tensor) else mine
    if coming.ndim > part.ndim:
        coming = coming.reshape(coming.shape[coming.ndim - part.ndim :])
    brought_there = agreed(coming.expand(part.shape), mine)
    if any(_hidden(call, x, brought_there) for x in tensors_in(index)):
        return Lost(call.name)
    write = Write(
        marks(call, target),
        brought_there,
        lambda kept: kept[index],
        lambda kept, new: _set(kept, index, new),
        adds,
    )
    after = write.after(call)
    # those at places that the batch decided first
    by = sorted((x for x in tensors_in(index) if call.where(x) is not None), key=lambda x: isinstance(call.where(x), Axis))
    return _put_back(call, by[0], value, after) if by else after


def _constant_target(call: Call, target: Tensor) -> Call:
    """The same call with a target that nobody owns: what the index alone says of its places."""
    return Call("getitem", (target, call.args[1]), {}, call.n, lambda x: None if x is target else call.where(x))


def _set(held: Tensor, index: Any, new: Tensor) -> Tensor:
    held[index] = new
    return held


def of_base(base: Tensor, held: Axis | None, view: Tensor, axis: Axis, n: int) -> Where:
    """Where the sample axis of a tensor is after a view of it was written."""
    if n <= 1:
        return whole(base)
    if 0 in base.stride() or base.dtype != view.dtype:
        return Lost("an in-place op on a view")
    owners = torch.empty_strided(base.shape, base.stride(), dtype=torch.long, device=base.device)
    owners.copy_(_marks(held, base, n) if held is not None else torch.full((), NOBODY, device=base.device))
    place = owners.as_strided(view.shape, view.stride(), view.storage_offset() - base.storage_offset())
    place.copy_(_marks(axis, view, n))
    return axis_of(owners, n, "an in-place op on a view") or Axis(0, ragged=(NOBODY,) * (base.shape[0] if base.ndim else 1))
