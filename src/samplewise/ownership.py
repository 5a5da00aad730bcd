"""Where rows go that are taken and written by an index: the owners of their elements go the same way.

It serves what no formula covers: routing rows to experts and back, messages in graphs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .alignment import Item, index_items, index_meets, through_index
from .axes import (
    NOBODY,
    Axis,
    Call,
    Lost,
    Selection,
    Where,
    differs_by_row,
    in_step_now,
    meets_by_place,
    same_order,
    tensors_in,
    whole,
)
from .movement import dim_of
from .running import listed


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


def occurring(call: Call, _: Tensor) -> Where:
    """`nonzero`, and `where` with a condition alone: the places of the entries that hold, each its sample's."""
    x, axis = call.placed()[0]
    places = x.detach().nonzero()[:, axis.dim] if x.ndim else x.new_zeros(int(bool(x)), dtype=torch.long)
    return Axis.of_rows(0, axis.owners(call.n)[places.cpu()], call.n, Selection.of_those(axis.chosen))


def picked(call: Call, _: Tensor) -> Where:
    """`masked_select(x, mask)`: the entries that a mask picks, in one row."""
    x, mask = call.args[0], call.get(1, "mask")
    if call.where(x) is None:
        return Lost(call.name)
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    where = mask.expand(shape)
    found = agreed(marks(call, x).expand(shape)[where], marks(call, mask).expand(shape)[where])
    axis = None if found is None else axis_of(found, call.n, call.name)
    chosen = next((own.chosen for _, own in call.placed() if own.chosen), None)
    return replace(axis, chosen=Selection.of_those(chosen)) if isinstance(axis, Axis) else Lost(call.name)


def gathered(call: Call, _: Tensor) -> Where | None:
    """`gather` and `take_along_dim`, where the index takes entries of the same sample."""
    x, index = call.args[0], call.get(2 if call.name == "gather" else 1, "index" if call.name == "gather" else "indices")
    dim = call.get(1 if call.name == "gather" else 2, "dim")
    if not isinstance(index, Tensor) or dim is None or x.ndim != index.ndim:
        return Lost(call.name)
    rows = next(((y, axis) for y, axis in call.placed() if axis.chosen), None)
    if rows is not None and not in_step_now() and _takes_by_place(call, x, index, dim_of(x, dim), *rows):
        return Lost(call.name)
    # without `gather`, take_along_dim broadcasts its operands
    shape = index.shape if call.name == "gather" else torch.take_along_dim(x.detach(), index, dim).shape
    owners = torch.take_along_dim(marks(call, x), index, dim) if call.name != "gather" else marks(call, x).gather(dim, index)
    found = agreed(owners, marks(call, index).expand(shape))
    where = Lost(call.name) if found is None else axis_of(found, call.n, call.name)
    return replace(where, chosen=rows[1].chosen) if isinstance(where, Axis) and rows is not None else where


def _takes_by_place(call: Call, x: Tensor, index: Tensor, dim: int, own: Tensor, axis: Axis) -> bool:
    """Whether entries are taken of rows that the data chose, or for them, by a constant of each, or over the rows."""
    if axis.dim == dim:
        return isinstance(call.where(x), Axis)
    cut = call.name == "gather" and index.shape[axis.dim] != own.shape[axis.dim]
    return cut or meets_by_place(call, axis, [(x, axis.dim), (index, axis.dim)])


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
    numbers = call.where(index)
    if filled and isinstance(numbers, Axis) and numbers.chosen is None:
        # no numbers of rows that the samples were found in: any row may be filled by any sample
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
    after = _put_back(call, index, source, write.after(call))
    return _settled(
        call, after, Placing(target, index, source, dim, lambda touched: touched.index_fill(dim, rows, 1), write.adds)
    )


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


@dataclass(frozen=True)
class Placing:
    """What an op writes where: along `dim`, entry by entry; `touch` fills the places with ones."""

    target: Tensor
    index: Tensor | None
    source: object
    dim: int
    touch: Callable[[Tensor], Tensor]
    adds: bool


def _settled(call: Call, after: Where | None, put: Placing) -> Where | None:
    """What is known of the rows of a target that was written, where the data chose some of the rows concerned."""
    chosen = next((axis for _, axis in call.placed() if axis.chosen), None)
    if not isinstance(after, Axis) or chosen is None or in_step_now():
        return after
    assert put.index is not None
    own, to = call.where(put.target), call.where(put.index)
    source = put.source if isinstance(put.source, Tensor) and put.source.ndim else None
    brought = None if source is None else call.where(source)
    flat = put.index.ndim < put.target.ndim or call.name.startswith("index_")
    rows = next((where.dim for where in (own, brought) if isinstance(where, Axis)), None)
    if rows is None:
        rows = put.dim if flat or not isinstance(to, Axis) else to.dim
    if rows == put.dim and not (flat and to is None and listed(put.index) == list(range(put.target.shape[rows]))):
        return _placed_rows(call, after, to, [] if source is None else [(source, put.dim)], put)
    # each row has its own written, along another axis
    met = [y for y in (None if flat else put.index, source) if y is not None]
    cut = any(y.shape[rows] != put.target.shape[rows] for y in met)
    if cut or meets_by_place(call, chosen, [(y, rows) for y in met]):
        return Lost(call.name)
    if isinstance(own, Axis) and not chosen.in_step(own):
        return Lost(call.name)
    return Lost(call.name) if own is None and _rest_differs(call, rows, put) else replace(after, chosen=chosen.chosen)


def _placed_rows(call: Call, after: Axis, to: Where | None, met: list[tuple[Tensor, int]], put: Placing) -> Where:
    """Rows that go to places among the rows of the target."""
    own = call.where(put.target)
    held = own.chosen if isinstance(own, Axis) else None
    if isinstance(to, Lost):
        return after if after.chosen or held is None else replace(after, chosen=held)
    if to is None:
        # to constant places: by their own
        return Lost(call.name)
    among = to.chosen and to.chosen.among
    if to.chosen and meets_by_place(call, to, met):
        return Lost(call.name)
    if isinstance(own, Axis):
        return replace(after, chosen=held) if same_order(held, among) else Lost(call.name)
    return Lost(call.name) if among is not None and _rest_differs(call, put.dim, put) else replace(after, chosen=among)


def _rest_differs(call: Call, dim: int, put: Placing) -> bool:
    """Whether a constant that was written to had rows of its own, as far as that can be told afterwards."""
    target = put.target
    if call.name != "setitem" and not any(target is x for x in call.results):
        return differs_by_row(target, dim)
    if not target.numel():
        return False
    if put.adds or target.is_complex():
        return True
    values = torch.unique(target.detach(), return_inverse=True)[1]
    touched = put.touch(torch.zeros(target.shape, dtype=torch.long, device=target.device)) > 0
    most, least = values.masked_fill(touched, -1).amax(dim), values.masked_fill(touched, target.numel()).amin(dim)
    return bool((most > least).any())


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
    after = _put_back(call, index, source, write.after(call))
    dim = dim_of(target, dim)
    return _settled(call, after, Placing(target, index, source, dim, lambda touched: touched.scatter(dim, index, 1), adds))


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
    return _settled_mask(
        call, write.after(call), Placing(target, call.get(1, "mask"), source, 0, lambda x: _set(x, mask, 1), adds=False)
    )


def _settled_mask(call: Call, after: Where | None, put: Placing) -> Where | None:
    """What is known of the rows of a target that was written in the order of a mask."""
    if not isinstance(after, Axis) or in_step_now() or not any(axis.chosen for _, axis in call.placed()):
        return after
    assert put.index is not None
    mask = call.where(put.index)
    if not isinstance(mask, Axis) or not all(mask.in_step(axis) for _, axis in call.placed()):
        return Lost(call.name)
    differs = mask.chosen and call.where(put.target) is None and _rest_differs(call, after.dim, put)
    return Lost(call.name) if differs else replace(after, chosen=mask.chosen)


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
        uniform = all(isinstance(where, Lost) and where.uniform for where in others)
        return of_lost_view(call, replace(lost[0], linear=linear, uniform=uniform))
    if not any(wheres):
        return None
    call.forget_nobodys()
    return _assigned(call, target, index, value, adds=False) or Axis.of_nobody(target)


def _filled(call: Call, target: Tensor, mask: Any, value: Any) -> Axis | None:
    """Where the sample axis is after `target[mask] = 0`, which is an elementwise op; None where it takes a look at the places."""
    if not isinstance(value, int | float | complex) or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return None
    held, own = call.where(target), call.where(mask)
    if not isinstance(own, Axis) or own.pattern is None or mask.shape != target.shape[: mask.ndim]:
        return None
    return own if held is None or (isinstance(held, Axis) and held.pattern == own.pattern) else None


def _assigned(call: Call, target: Tensor, index: Any, value: Any, *, adds: bool) -> Where | None:
    filled = None if adds else _filled(call, target, index, value)
    if filled is not None:
        return filled
    part = target.detach()[index]
    after = _after_assignment(call, target, index, value, part, adds=adds)
    if not isinstance(after, Axis) or in_step_now() or not any(axis.chosen for _, axis in call.placed()):
        return after
    among = _constant_target(call, target)
    if index_meets(among, target, index):
        return Lost(call.name)
    items = index_items(call, target, index)
    by = next((item for item in items if item.where is not None), None)
    put = Placing(target, None, value, 0 if by is None else by.source, lambda x: _set(x, index, 1), adds)
    if by is None:
        return _in_whole_rows(call, after, items, part, put)
    rows, met = through_index(among, target, index, part), []
    if isinstance(value, Tensor) and isinstance(rows, Axis) and rows.dim + value.ndim >= part.ndim:
        met = [(value, rows.dim + value.ndim - part.ndim)]
    return _placed_rows(call, after, by.where, met, put)


def _in_whole_rows(call: Call, after: Axis, items: list[Item], part: Tensor, put: Placing) -> Where:
    """What is known of the rows of a target of which `target[index] = value` wrote constant places, the same in all rows."""
    own, value = call.where(put.target), put.source
    brought = call.where(value) if isinstance(value, Tensor) else None
    kept = [item for item in items if not isinstance(item.taken, int)]
    place = _rows_in_part(own, brought, kept, part, value)
    item = None if place is None else kept[place]
    if item is None or place is None or not isinstance(item.taken, slice):
        return Lost(call.name)
    chosen = next(axis for axis in (own, brought) if isinstance(axis, Axis) and axis.chosen)
    size = put.target.shape[item.source]
    met = [(value, place + value.ndim - part.ndim)] if isinstance(value, Tensor) and place + value.ndim >= part.ndim else []
    mixed = range(*item.taken.indices(size)) != range(size) or meets_by_place(call, chosen, met)
    if mixed or (isinstance(own, Axis) and not chosen.in_step(own)) or (own is None and _rest_differs(call, item.source, put)):
        return Lost(call.name)
    return replace(after, chosen=chosen.chosen)


def _rows_in_part(own: Where | None, brought: Where | None, kept: list[Item], part: Tensor, value: object) -> int | None:
    """Which dim of the part of a target has the rows of the target, or of the value, as far as slices took it."""
    if isinstance(own, Axis):
        place = next((k for k, item in enumerate(kept) if item.source == own.dim and item.taken is not None), None)
        # what tensors take goes to their first place, if that is not behind
        return (
            place
            if place is None or all(item.taken is None or isinstance(item.taken, slice) for item in kept[:place])
            else None
        )
    if not isinstance(brought, Axis) or not isinstance(value, Tensor) or any(isinstance(item.taken, Tensor) for item in kept):
        return None
    return brought.dim + part.ndim - value.ndim


def _after_assignment(call: Call, target: Tensor, index: Any, value: Any, part: Tensor, *, adds: bool) -> Where | None:
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


def _set(held: Tensor, index: Any, new: Tensor | int) -> Tensor:
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
    after = axis_of(owners, n, "an in-place op on a view") or Axis(0, ragged=(NOBODY,) * (base.shape[0] if base.ndim else 1))
    chosen = (held and held.chosen) or axis.chosen
    return replace(after, chosen=chosen) if isinstance(after, Axis) and after.chosen is None and chosen else after


def of_lost_view(call: Call, where: Where | None) -> Where | None:
    """What a view is after an in-place op; of some rows of those that the data chose, taken by place, the others know it too."""
    base = None if call.base is None else call.base[1]
    some = isinstance(where, Lost) and isinstance(base, Axis) and base.chosen and not in_step_now()
    return Lost("an in-place op on a view of some rows") if some else where
