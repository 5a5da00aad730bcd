"""Where the sample axis goes in ops on several tensors: broadcasting, products, indexing, losses.

Each function is one family of ops: `(call, out)` are the call and a result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .axes import Axis, Call, Lost, Where, whole
from .contractions import CONTRACTIONS
from .errors import SampleAxisError
from .movement import dim_of, without

Several = Callable[[Call, Tensor], Where]


def broadcast(call: Call, out: Tensor) -> Where:
    """Elementwise with broadcasting: dims align from the right, and all sample axes must fall on one place."""
    first: tuple[Tensor, Axis] | None = None
    for x, axis in call.placed():
        moved = axis.at(axis.dim + out.ndim - x.ndim)
        if first is None:
            first = (x, moved)
        elif moved != first[1]:
            raise SampleAxisError(_conflict(call, first[0], x))
    assert first is not None
    return first[1]


def chosen(call: Call, out: Tensor) -> Where:
    """`where(condition, a, b)`; with the condition alone it lists positions of the whole batch."""
    return broadcast(call, out) if len(call.args) + len(call.kwargs) > 1 else Lost(call.name)


def _conflict(call: Call, a: Tensor, b: Tensor) -> str:
    def show(x: Tensor) -> str:
        axis = call.where(x)
        assert isinstance(axis, Axis)
        return f"{tuple(x.shape)} with {axis}"

    return (
        f"{call.name}: the sample axes of two operands fall on different places after broadcasting: {show(a)} and {show(b)}. "
        "If one of them does not depend on the samples (a mask or table made outside the model), say so with "
        "`rec.constant(tensor)`; if its samples lie on another axis, with `rec.batched(tensor, dim)`."
    )


def broadcast_along(position: int, default: int | None = None) -> Several:
    """Several operands of equal dims, working along one: gather, scatter, cross."""

    def move(call: Call, out: Tensor) -> Where:
        where, dim = broadcast(call, out), call.get(position, "dim", default)
        assert isinstance(where, Axis)
        return Lost(call.name) if dim is None or dim_of(out, dim) == where.dim else where

    return move


def batch_dims(call: Call, out: Tensor) -> Where:
    """Attention: leading dims broadcast, the last two are its own."""
    where = broadcast(call, out)
    return where if isinstance(where, Axis) and where.dim < out.ndim - 2 else Lost(call.name)


def contraction(call: Call, out: Tensor) -> Where:
    """Matrix products and einsum: the letter of the sample axis, looked up in the result."""
    product = CONTRACTIONS[call.name](call.args, call.kwargs)
    found: dict[str, set[Axis]] = {}
    for x, names in zip(product.operands, product.letters, strict=True):
        axis = call.where(x)
        if isinstance(axis, Axis):
            found[names[axis.dim]] = {*found.get(names[axis.dim], ()), axis.at(0)}
    addend = None if product.addend is None else call.where(product.addend)
    if isinstance(addend, Axis) and product.addend is not None:
        name = product.result[addend.dim + out.ndim - product.addend.ndim]
        found[name] = {*found.get(name, ()), addend.at(0)}
    if len(found) != 1 or any(len(axes) > 1 for axes in found.values()):
        return Lost(call.name)
    ((letter, axes),) = found.items()
    return axes.pop().at(product.result.index(letter)) if letter in product.result else Lost(call.name)


def distances(call: Call, out: Tensor) -> Where:
    """`cdist`: rows of the first, `(..., p, d)`, against rows of the second, `(..., r, d)`."""
    placed = call.placed()
    x, axis = placed[0]
    if len(placed) == 1 and axis.dim == x.ndim - 2:
        return axis.at(out.ndim - (2 if x is call.tensors[0] else 1))
    return batch_dims(call, out)


def concatenated(call: Call, out: Tensor) -> Where:
    where, dim = broadcast(call, out), dim_of(out, call.get(1, "dim", 0))
    assert isinstance(where, Axis)
    return Lost(call.name) if where.dim == dim else where


def stacked(call: Call, out: Tensor) -> Where:
    placed = {axis for _, axis in call.placed()}
    if len(placed) > 1:
        raise SampleAxisError(
            _conflict(call, call.placed()[0][0], next(x for x, a in call.placed() if a != call.placed()[0][1]))
        )
    (axis,) = placed
    return axis.at(axis.dim + (axis.dim >= dim_of(out, call.get(1, "dim", 0))))


def looked_up(call: Call, _: Tensor) -> Where:
    """Embedding: the dims of the indices, then the embedding."""
    axis = call.where(call.get(1, "input"))
    return axis if isinstance(axis, Axis) and len(call.placed()) == 1 else Lost(call.name)


def selected(call: Call, _: Tensor) -> Where:
    """`index_select`: rows picked by an index keep their samples."""
    x, index = call.args[0], call.get(2, "index")
    axis, dim = call.where(x), dim_of(x, call.get(1, "dim"))
    if not isinstance(axis, Axis):
        return Lost(call.name)
    if dim != axis.dim:
        return axis if call.where(index) is None else Lost(call.name)
    return Axis.of_rows(dim, axis.owners(call.n)[index.cpu()], call.n)


def indexed(call: Call, out: Tensor) -> Where:
    """`x[index]` with integers, slices, None, Ellipsis and tensors."""
    return through_index(call, call.args[0], call.args[1], out)


@dataclass(frozen=True)
class _Item:
    """One entry of an index: what it takes from axis `source` (None adds an axis), and where its own samples are."""

    source: int
    taken: Any
    where: Where | None = None


def through_index(call: Call, x: Tensor, index: object, _: Tensor) -> Where:
    """Where the sample axis of `x[index]` is."""
    # integers are selected first, whatever stands between them
    items = [item for item in _full_index(call, x, index) if not isinstance(item.taken, int)]
    axis, picked = call.where(x), {item.source for item in items if item.taken is not None}
    if isinstance(axis, Axis) and axis.dim not in picked:
        return Lost(call.name)
    tensors = [k for k, item in enumerate(items) if isinstance(item.taken, Tensor)]
    width = max((items[k].taken.ndim for k in tensors), default=0)
    together = not tensors or tensors == list(range(tensors[0], tensors[-1] + 1))
    place, found = 0 if together else width, set[Axis | None]()
    for k, item in enumerate(items):
        mine = axis if isinstance(axis, Axis) and item.source == axis.dim and item.taken is not None else None
        if isinstance(item.taken, Tensor):
            found |= _axes_of_tensor(call, item, mine, (place if together else 0) + width - item.taken.ndim)
            place += width * (together and k == tensors[-1])
        else:
            found |= {_through_slice(call, item.taken, mine, place)} if mine else set()
            place += 1
    where = found.pop() if len(found) == 1 else None
    return where or Lost(call.name)


def _through_slice(call: Call, part: slice, axis: Axis, place: int) -> Axis:
    size = axis.size(call.n)
    whole = range(*part.indices(size)) == range(size)
    return axis.at(place) if whole else Axis.of_rows(place, axis.owners(call.n)[part], call.n)


def _axes_of_tensor(call: Call, item: _Item, axis: Axis | None, place: int) -> set[Axis | None]:
    """The axes that an index tensor, whose first dim is at `place` of the result, brings there; None: it scatters the samples."""
    index, own = item.taken, item.where
    found: set[Axis | None] = {own.at(own.dim + place)} if isinstance(own, Axis) else {None} if own and axis is None else set()
    if axis is None:
        return found
    # x[rows, ...]: each row taken keeps its sample
    lines = [dim for dim in range(index.ndim) if index.shape[dim] == index.numel()]
    owners = axis.owners(call.n)[index.flatten().cpu()]
    return found | {Axis.of_rows(lines[0] + place, owners, call.n) if lines else None}


def _full_index(call: Call, x: Tensor, index: object) -> list[_Item]:
    """Every entry of an index, with the ellipsis and the missing dims written out, and masks as the positions they take."""
    given = index if isinstance(index, tuple) else (index,)
    items = [_as_item(item) for item in given]
    own = {id(item) for item in given if isinstance(item, Tensor)}
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)
    hidden = x.ndim - sum(_consumed(item) for item in items)
    full: list[_Item] = []
    source = 0
    for item in items:
        if item is Ellipsis:
            full += [_Item(source + k, slice(None)) for k in range(hidden)]
            source += hidden
        elif _is_mask(item):
            full += _mask_items(call, item, source)
        else:
            full.append(_Item(source, item, call.where(item) if id(item) in own else None))
        source += _consumed(item)
    return full


def _mask_items(call: Call, mask: Tensor, source: int) -> list[_Item]:
    own, parts = call.where(mask), mask.nonzero(as_tuple=True)
    if isinstance(own, Axis):
        rows = Axis.of_rows(0, own.owners(call.n)[parts[own.dim].cpu()], call.n)
        return [_Item(source + k, part, rows) for k, part in enumerate(parts)]
    return [_Item(source + k, part, own) for k, part in enumerate(parts)]


def _as_item(item: object) -> Any:
    simple = item is None or item is Ellipsis or isinstance(item, slice | Tensor)
    return item if simple or (isinstance(item, int) and not isinstance(item, bool)) else torch.as_tensor(item)


def _is_mask(item: object) -> TypeGuard[Tensor]:
    return isinstance(item, Tensor) and item.dtype in {torch.bool, torch.uint8}


def _consumed(item: object) -> int:
    return item.ndim if _is_mask(item) else int(item is not None and item is not Ellipsis)


def written(call: Call) -> Where | None:
    """Where the sample axis of the target is after `target[index] = value`."""
    target, index, value = call.args
    if call.n <= 1 and any(call.where(x) for x in (target, value) if isinstance(x, Tensor)):
        return whole(target)
    held, brought = call.where(target), call.where(value) if isinstance(value, Tensor) else None
    if isinstance(held, Lost) or brought is None:
        return held
    if isinstance(brought, Lost):
        return brought
    part = target.detach()[index]
    moved = brought.at(brought.dim + part.ndim - value.ndim)
    if held is not None:
        return held if through_index(call, target, index, part) == moved else Lost("setitem")
    fits = [axis for axis in map(Axis, range(target.ndim)) if _seen_under(call, axis, part) == moved]
    return fits[0] if len(fits) == 1 else Lost("setitem")


def _seen_under(call: Call, axis: Axis, part: Tensor) -> Where:
    """Where the axis of `target[index]` would be if the target's were `axis`."""
    target, index, _ = call.args
    if target.shape[axis.dim] != call.n:
        return Lost("setitem")
    assumed = Call("getitem", (target, index), {}, call.n, lambda x: axis if x is target else call.where(x))
    return through_index(assumed, target, index, part)


def elementwise_loss(reduction: int, *, gone: int | None = None) -> Several:
    """A loss per element; `reduction` is the position of its reduction code (0 none, 1 mean, 2 sum)."""

    def move(call: Call, out: Tensor) -> Where:
        if call.get(reduction, "reduction", 1) != 0:
            return Lost(call.name, linear=True)
        x, axis = call.placed()[0]
        if gone is None or x.ndim < 2:
            return broadcast(call, out)
        return Lost(call.name) if axis.dim == gone else without(axis, [gone])

    return move


def class_loss(call: Call, _: Tensor) -> Where:
    """Cross entropy and negative log likelihood: input (n, c, ...), target (n, ...)."""
    logits, target, weight = call.args[0], call.get(1, "target"), call.get(2, "weight")
    if call.get(3, "reduction", 1) != 0:
        ignored = not target.is_floating_point() and bool((target == call.get(4, "ignore_index", -100)).any())
        mean = call.get(3, "reduction", 1) == 1
        return Lost(call.name, linear=True, uniform=not (mean and (weight is not None or ignored)))
    axis = call.where(logits)
    if not isinstance(axis, Axis):
        return call.placed()[0][1]
    classes = 1 if logits.ndim > 1 else 0
    if axis.dim == classes:
        return Lost(call.name)
    where, labels = without(axis, [classes]), call.where(target)
    if isinstance(labels, Axis) and labels != (axis if target.is_floating_point() else where):
        raise SampleAxisError(_conflict(call, logits, target))
    return where


def similarity(call: Call, out: Tensor) -> Where:
    dim = call.get(2, "dim", 1) if call.name == "cosine_similarity" else -1
    ndim = max(x.ndim for x in call.tensors)
    wide = out.new_empty([1] * ndim)
    where = broadcast(call, wide)
    assert isinstance(where, Axis)
    if out.ndim == ndim:
        return where
    return Lost(call.name) if where.dim == dim % ndim else without(where, [dim % ndim])
