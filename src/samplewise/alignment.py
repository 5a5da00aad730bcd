"""Where the sample axis goes in ops on several tensors: broadcasting, products, indexing, losses.

Each function is one family of ops: `(call, out)` are the call and a result.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor

from .axes import Axis, Call, Lost, Where
from .contractions import CONTRACTIONS
from .errors import SampleAxisError
from .movement import dim_of, without

Several = Callable[[Call, Tensor], Where]


def broadcast(call: Call, out: Tensor) -> Where:
    """Elementwise with broadcasting: dims align from the right, and all sample axes must fall on one place."""
    first: tuple[Tensor, Axis] | None = None
    for x, axis in call.placed():
        moved = Axis(axis.dim + out.ndim - x.ndim, axis.outer, axis.inner)
        if first is None:
            first = (x, moved)
        elif moved != first[1] and call.n != 1:
            raise SampleAxisError(_conflict(call, first[0], x))
    assert first is not None
    return first[1]


def _conflict(call: Call, a: Tensor, b: Tensor) -> str:
    def show(x: Tensor) -> str:
        axis = call.where(x)
        assert isinstance(axis, Axis)
        return f"{tuple(x.shape)} with samples on axis {axis.dim}"

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
    found: dict[str, set[tuple[int, int]]] = {}
    for x, names in zip(product.operands, product.letters, strict=True):
        axis = call.where(x)
        if isinstance(axis, Axis):
            found[names[axis.dim]] = {*found.get(names[axis.dim], ()), (axis.outer, axis.inner)}
    addend = None if product.addend is None else call.where(product.addend)
    if isinstance(addend, Axis) and product.addend is not None:
        name = product.result[addend.dim + out.ndim - product.addend.ndim]
        found[name] = {*found.get(name, ()), (addend.outer, addend.inner)}
    if len(found) != 1 or any(len(groups) > 1 for groups in found.values()):
        return Lost(call.name)
    ((letter, groups),) = found.items()
    return Axis(product.result.index(letter), *groups.pop()) if letter in product.result else Lost(call.name)


def distances(call: Call, out: Tensor) -> Where:
    """`cdist`: rows of the first, `(..., p, d)`, against rows of the second, `(..., r, d)`."""
    placed = call.placed()
    x, axis = placed[0]
    if len(placed) == 1 and axis.dim == x.ndim - 2:
        return Axis(out.ndim - (2 if x is call.tensors[0] else 1), axis.outer, axis.inner)
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
    return Axis(axis.dim + (axis.dim >= dim_of(out, call.get(1, "dim", 0))), axis.outer, axis.inner)


def looked_up(call: Call, _: Tensor) -> Where:
    """Embedding: the dims of the indices, then the embedding."""
    axis = call.where(call.get(1, "input"))
    return axis if isinstance(axis, Axis) and len(call.placed()) == 1 else Lost(call.name)


def indexed(call: Call, out: Tensor) -> Where:
    """`x[index]` with integers, slices, None, Ellipsis and tensors."""
    return through_index(call, call.args[0], call.args[1], out)


def through_index(call: Call, x: Tensor, index: object, out: Tensor) -> Where:
    """Where the axis of `x[index]`, equal in shape to `out`, is."""
    items = _full_index(x, index)
    advanced = [k for k, (_, item) in enumerate(items) if isinstance(item, Tensor)]
    wide = torch.broadcast_shapes(*(items[k][1].shape for k in advanced)) if advanced else Size()
    together = not advanced or advanced == list(range(advanced[0], advanced[-1] + 1))
    found: set[Axis] = set()
    axis = call.where(x)
    place = 0 if together else len(wide)
    for k, (source, item) in enumerate(items):
        if isinstance(item, Tensor):
            found |= _axis_of_index(
                call, item, axis if isinstance(axis, Axis) and source == axis.dim else None, len(wide), place if together else 0
            )
            place += len(wide) * (together and k == advanced[-1])
        elif isinstance(axis, Axis) and source == axis.dim:
            if (
                not isinstance(item, slice)
                or len(range(*item.indices(x.shape[source]))) != x.shape[source]
                or (item.step or 1) != 1
            ):
                return Lost(call.name)
            found.add(Axis(place, axis.outer, axis.inner))
        place += item is None or isinstance(item, slice)
    return found.pop() if len(found) == 1 and None not in found else Lost(call.name)


def _axis_of_index(call: Call, index: Tensor, axis: Axis | None, width: int, place: int) -> set[Any]:
    """The axes an index tensor brings to its place in the result; {None} where it scatters the samples."""
    own = call.where(index)
    shift = place + width - index.ndim
    found: set[Any] = {Axis(own.dim + shift, own.outer, own.inner)} if isinstance(own, Axis) else set()
    if axis is None:
        return found
    # x[arange(n), ...]: row i of the result takes row i of x
    rows = torch.arange(call.n, device=index.device)
    straight = [d for d in range(index.ndim) if index.shape[d] == call.n == index.numel() and index.flatten().equal(rows)]
    return found | ({Axis(straight[0] + shift)} if straight and (axis.outer, axis.inner) == (1, 1) else {None})


def _full_index(x: Tensor, index: object) -> list[tuple[int, Any]]:
    """(source dim, item) for every entry of the index, with the ellipsis and the missing dims written out."""
    items = list(index) if isinstance(index, tuple) else [index]
    items = [torch.as_tensor(item, device=x.device) if isinstance(item, list) else item for item in items]
    used = sum(0 if item is None or item is Ellipsis else _consumed(item) for item in items)
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)
    full: list[tuple[int, Any]] = []
    source = 0
    for item in items:
        if item is Ellipsis:
            full += [(source + k, slice(None)) for k in range(x.ndim - used)]
            source += x.ndim - used
        elif isinstance(item, Tensor) and item.dtype in {torch.bool, torch.uint8}:
            full += [(source + k, part) for k, part in enumerate(item.nonzero(as_tuple=True))]
            source += item.ndim
        else:
            full.append((source, item))
            source += item is not None
    return full


def _consumed(item: object) -> int:
    return item.ndim if isinstance(item, Tensor) and item.dtype in {torch.bool, torch.uint8} else 1


def written(call: Call) -> Where | None:
    """Where the sample axis of the target is after `target[index] = value`."""
    target, index, value = call.args
    held, brought = call.where(target), call.where(value) if isinstance(value, Tensor) else None
    if isinstance(held, Lost) or brought is None:
        return held
    if isinstance(brought, Lost):
        return brought
    part = target.detach()[index]
    moved = Axis(brought.dim + part.ndim - value.ndim, brought.outer, brought.inner)
    if held is not None:
        return held if through_index(call, target, index, part) == moved or call.n == 1 else Lost("setitem")
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
    return Lost(call.name) if axis.dim == classes else without(axis, [classes])


def similarity(call: Call, out: Tensor) -> Where:
    dim = call.get(2, "dim", 1) if call.name == "cosine_similarity" else -1
    ndim = max(x.ndim for x in call.tensors)
    wide = out.new_empty([1] * ndim)
    where = broadcast(call, wide)
    assert isinstance(where, Axis)
    if out.ndim == ndim:
        return where
    return Lost(call.name) if where.dim == dim % ndim else without(where, [dim % ndim])
