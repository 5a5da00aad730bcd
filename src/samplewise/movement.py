"""Where the sample axis goes in ops on one tensor: reshapes, permutations, reductions, slices.

Each function is one family of ops: `(call, x, axis, out)` are the call, its tensor, the tensor's sample axis and a result.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor

from .axes import Axis, Call, Lost, Where, in_step_now

Single = Callable[[Call, Tensor, Axis, Tensor], Where]


def reshaped(call: Call, x: Tensor, axis: Axis, out: Tensor) -> Where:
    """Any order-preserving reshape: the sample index advances once every `inner * prod(shape[dim+1:])` elements."""
    if isinstance(call.get(1, "dtype"), torch.dtype):
        return Lost(call.name)
    if axis.ragged is not None:
        return Lost(call.name)
    there = through_reshape(axis, call.n, x.shape, out.shape)
    if there is None or axis.chosen is None or there.size(call.n) == axis.size(call.n):
        return replace(there, chosen=axis.chosen) if there else Lost(call.name)
    # rows in an order that the data decided have no places to be split into
    return replace(there, chosen=axis.chosen.moved()) if in_step_now() else Lost(call.name)


def through_reshape(axis: Axis, n: int, old: Size, new: Size) -> Axis | None:
    """Where the sample axis is after an order-preserving reshape; None where it is lost."""
    step = axis.inner * math.prod(old[axis.dim + 1 :])
    below = 1
    if not step:
        # no elements: there is nothing to attribute
        return axis if old[: axis.dim + 1] == new[: axis.dim + 1] else None
    for dim in reversed(range(len(new))):
        reach = new[dim] * below
        if reach > step:
            whole = step % below == 0 and reach % (step * n) == 0
            return Axis(dim, reach // (step * n), step // below) if whole else None
        below = reach
    return None


def dim_of(x: Tensor, dim: int, extra: int = 0) -> int:
    return dim % max(1, x.ndim + extra)


def _dims(x: Tensor, dims: Any) -> set[int]:
    if dims is None or (isinstance(dims, tuple | list) and not dims):
        return set(range(x.ndim))
    listed = dims if isinstance(dims, tuple | list | range) else [dims]
    return {dim_of(x, int(d)) for d in listed}


def _ints(call: Call, start: int, name: str) -> tuple[int, ...]:
    """`op(x, 1, 2)`, `op(x, (1, 2))` or `op(x, dims=(1, 2))`."""
    rest = call.args[start:] or (call.kwargs.get(name, ()),)
    return tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest


def permuted(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    order = [dim_of(x, d) for d in _ints(call, 1, "dims")]
    return axis.at(order.index(axis.dim))


def swapped(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    names = ("axis0", "axis1") if call.name == "swapaxes" else ("dim0", "dim1")
    a, b = (dim_of(x, call.get(k, name)) for k, name in enumerate(names, 1))
    return _swap(axis, a, b)


def _swap(axis: Axis, a: int, b: int) -> Axis:
    return axis.at({a: b, b: a}.get(axis.dim, axis.dim))


def turned(_: Call, x: Tensor, axis: Axis, __: Tensor) -> Where:
    return _swap(axis, x.ndim - 1, x.ndim - 2) if x.ndim > 1 else axis


def reversed_dims(_: Call, x: Tensor, axis: Axis, __: Tensor) -> Where:
    return axis.at(x.ndim - 1 - axis.dim)


def dims_moved(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    source, destination = call.get(1, "source"), call.get(2, "destination")
    probe = torch.empty(*range(1, x.ndim + 1), device="meta")
    return axis.at(list(torch.movedim(probe, source, destination).shape).index(axis.dim + 1))


def squeezed(call: Call, x: Tensor, axis: Axis, out: Tensor) -> Where:
    dims = call.get(1, "dim")
    gone = {d for d in (range(x.ndim) if dims is None else _dims(x, dims)) if x.shape[d] == 1}
    if axis.dim in gone:
        # one number of one sample's, of which is known what it was
        sole = axis.sample if axis.chosen is not None and not out.ndim else None
        return Lost(call.name) if sole is None else replace(Axis.of_sample(sole, out), chosen=axis.chosen)
    return without(axis, gone)


def unsqueezed(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    dim = dim_of(x, call.get(1, "dim"), extra=1)
    return axis.at(axis.dim + (axis.dim >= dim))


def without(axis: Axis, gone: Iterable[int]) -> Axis:
    return axis.at(axis.dim - sum(d < axis.dim for d in gone))


def expanded(_: Call, x: Tensor, axis: Axis, out: Tensor) -> Where:
    return axis.at(axis.dim + out.ndim - x.ndim)


def tiled(_: Call, x: Tensor, axis: Axis, out: Tensor) -> Where:
    dim = axis.dim + out.ndim - x.ndim
    times = out.shape[dim] // x.shape[axis.dim] if x.shape[axis.dim] else 1
    chosen = axis.chosen and (axis.chosen if times == 1 else axis.chosen.repeated())
    if axis.ragged is not None:
        return replace(axis, dim=dim, ragged=axis.ragged * times, chosen=chosen)
    return replace(axis, dim=dim, outer=axis.outer * times, chosen=chosen)


def repeated_each(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    times, dim = call.get(1, "repeats"), call.get(2, "dim")
    if dim is None:
        return Lost(call.name)
    if dim_of(x, dim) != axis.dim:
        return axis
    whole = isinstance(times, int) and axis.ragged is None
    return replace(axis, inner=axis.inner * times, chosen=axis.chosen and axis.chosen.repeated()) if whole else Lost(call.name)


def quantiles(call: Call, x: Tensor, axis: Axis, out: Tensor) -> Where:
    """A reduction that puts several results of a row on a new first axis."""
    several = isinstance(call.get(1, "q"), Tensor) and call.get(1, "q").ndim == 1
    where = reduced(2)(call, x, axis, out[0] if several and len(out) else out)
    return where.at(where.dim + several) if isinstance(where, Axis) else where


def reduced(position: int = 1, default: int | None = None) -> Single:
    """A reduction over the dims at argument `position`, by default over all."""

    def move(call: Call, x: Tensor, axis: Axis, out: Tensor) -> Where:
        dims = call.get(position, "dim", call.kwargs.get("other", default))
        if isinstance(dims, Tensor):
            # torch takes a tensor for a number
            return Lost(call.name)
        gone = _dims(x, None if isinstance(dims, bool) else dims)
        if axis.dim in gone:
            return Lost(call.name, linear=call.name in {"sum", "mean"})
        return axis if out.ndim == x.ndim else without(axis, gone)

    return move


def along(position: int = 1, default: int | None = None) -> Single:
    """An op that works along one or several dims and keeps the others."""

    def move(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
        dims = call.get(position, "dim", call.kwargs.get("dims", default))
        return Lost(call.name) if axis.dim in _dims(x, dims) else axis

    return move


def removed(position: int = 1, default: int = 0) -> Single:
    """An op that takes one dim away: select, unbind."""

    def move(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
        dim = dim_of(x, call.get(position, "dim", default))
        return Lost(call.name) if dim == axis.dim else without(axis, [dim])

    return move


def all_but(position: int, default: tuple[int, ...] | None, name: str = "dim") -> Single:
    """An op along several dims, by default those at `default`, or all."""

    def move(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
        dims, sizes = call.get(position, name), call.get(1, "s")
        if dims is None and sizes is not None:
            dims = range(-len(sizes), 0)
        return Lost(call.name) if axis.dim in _dims(x, default if dims is None else dims) else axis

    return move


def flipped(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    return Lost(call.name) if axis.dim in _dims(x, _ints(call, 1, "dims")) else axis


def diagonal(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    gone = {dim_of(x, call.get(2, "dim1", 0)), dim_of(x, call.get(3, "dim2", 1))}
    return Lost(call.name) if axis.dim in gone else without(axis, gone)


def before_last(count: int | Callable[[Call, Tensor], int]) -> Single:
    """An op on the last `count` dims, row by row of the others."""

    def move(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
        last = count if isinstance(count, int) else count(call, x)
        return axis if axis.dim < x.ndim - last else Lost(call.name)

    return move


def first_only(call: Call, _: Tensor, axis: Axis, __: Tensor) -> Where:
    """An op whose samples lie on axis 0 by definition."""
    return axis if axis.dim == 0 else Lost(call.name)


def normalized_dims(call: Call, _: Tensor) -> int:
    return len(call.get(1, "normalized_shape"))


def padded(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    """Padding, from the last dim backwards."""
    pads = list(call.get(1, "pad"))
    own = pads[2 * (x.ndim - 1 - axis.dim) :][:2]
    return Lost(call.name) if any(own) else axis


def last_diagonal(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    """`diag_embed` onto the last two dims."""
    plain = (call.get(2, "dim1", -2), call.get(3, "dim2", -1)) == (-2, -1)
    return axis if plain and axis.dim < x.ndim - 1 else Lost(call.name)


def after_channels(_: Call, x: Tensor) -> int:
    return x.ndim - 2
