"""Where the sample axis goes: one small function per family of ops, and tables that name their members.

An op that is in no table loses the axis; losing is always safe, because a parameter that meets a lost axis raises.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Size, Tensor

from .contractions import CONTRACTIONS
from .errors import MixedSamplesError, SampleAxisError
from .registry import RULES


@dataclass(frozen=True)
class Axis:
    """Axis `dim` carries the samples: `shape[dim] == outer * n * inner`, sample index in the middle."""

    dim: int
    outer: int = 1
    inner: int = 1

    def owners(self, n: int) -> Tensor:
        """The sample of each position, `(outer * n * inner,)`."""
        return torch.arange(n).repeat_interleave(self.inner).repeat(self.outer)

    def rows(self, x: Tensor) -> Tensor:
        """`x` with the rows of axis `dim` first and the rows of one sample consecutive, `(n * outer * inner, ...)`."""
        x = x.movedim(self.dim, 0)
        if self.outer == 1 or not x.shape[0]:
            return x
        return x.unflatten(0, (self.outer, -1, self.inner)).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class Lost:
    """The samples were brought together by `op`."""

    op: str
    # a plain sum or mean over samples, and nothing but linear arithmetic since: it still splits into samples
    linear: bool = False
    # every sample has the same weight in it: false for a mean with class weights or ignored targets
    uniform: bool = True


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

    def __post_init__(self) -> None:
        self.tensors = list(tensors_in(self.args[:1] if self.name in LENDING else (self.args, self.kwargs)))

    def get(self, position: int, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """An argument by position or keyword (numpy's `axis` counts as `dim`)."""
        if position < len(self.args):
            return self.args[position]
        alias = "axis" if name == "dim" else name
        return self.kwargs.get(name, self.kwargs.get(alias, default))

    def placed(self) -> list[tuple[Tensor, Axis]]:
        """The tensors that carry the sample axis, with the axis."""
        pairs = ((x, self.where(x)) for x in self.tensors)
        return [(x, axis) for x, axis in pairs if isinstance(axis, Axis)]


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


def follow(call: Call, out: Tensor) -> Where | None:
    """Where the sample axis of one result of `call` is; None where no argument carries it."""
    lost = [where for x in call.tensors if isinstance(where := call.where(x), Lost)]
    if lost:
        return _still_lost(call, lost)
    if call.name in FACTORIES or not call.placed():
        return None
    if call.name in MIXING:
        MIXING[call.name](call)
    moved = _move(call, out)
    if isinstance(moved, Axis):
        moved = _fit(call, moved, out)
    if isinstance(moved, Lost) and call.n == 1 and out.ndim:
        return Axis(0, 1, out.shape[0])
    return moved


def _move(call: Call, out: Tensor) -> Where:
    name = call.name.removeprefix("special_")
    if name in CONTRACTIONS:
        return contraction(call, out)
    if name in SEVERAL:
        return SEVERAL[name](call, out)
    x, axis = call.placed()[0]
    if name in SINGLE and x is call.tensors[0] and len(call.placed()) == 1:
        return SINGLE[name](call, x, axis, out)
    if call.name in RULES and all(axis.dim == 0 for _, axis in call.placed()):
        # a rule of a third party, whose op has its samples on axis 0
        return axis
    return Lost(call.name)


def _fit(call: Call, axis: Axis, out: Tensor) -> Where:
    """The axis with its inner size mended where the one sample of a batch was broadcast."""
    size = out.shape[axis.dim]
    if size == axis.outer * call.n * axis.inner:
        return axis
    return Axis(axis.dim, 1, size) if call.n == 1 else Lost(call.name)


def _still_lost(call: Call, lost: list[Lost]) -> Lost:
    """What arithmetic on a total leaves: sums and scalings stay linear in the samples, anything else does not."""
    carrying = [x for x in call.tensors if x.requires_grad]
    wheres = [call.where(x) for x in carrying]
    linear = all(isinstance(where, Lost) and where.linear for where in wheres) and call.name in LINEAR
    if call.name in {"mul", "multiply"}:
        linear = linear and len(carrying) <= 1
    if call.name in {"div", "divide", "true_divide"}:
        linear = linear and call.get(1, "other") not in carrying
    return Lost(lost[0].op, linear, all(item.uniform for item in lost))


# --- families with one tensor -------------------------------------------------------------------------------------------------

Single = Callable[[Call, Tensor, Axis, Tensor], Where]


def reshaped(call: Call, x: Tensor, axis: Axis, out: Tensor) -> Where:
    """Any order-preserving reshape: the sample index advances once every `inner * prod(shape[dim+1:])` elements."""
    return through_reshape(axis, call.n, x.shape, out.shape) or Lost(call.name)


def through_reshape(axis: Axis, n: int, old: Size, new: Size) -> Axis | None:
    """Where the sample axis is after an order-preserving reshape; None where it is lost."""
    step = axis.inner * math.prod(old[axis.dim + 1 :])
    if n == 0:
        return _empty_reshape(axis, step, new)
    if n == 1:
        return _single_reshape(step, new)
    below = 1
    for dim in reversed(range(len(new))):
        reach = new[dim] * below
        if reach > step:
            whole = step % below == 0 and reach % (step * n) == 0
            return Axis(dim, reach // (step * n), step // below) if whole else None
        below = reach
    return None


def _single_reshape(step: int, new: Size) -> Axis | None:
    """With one sample every axis is right; this takes the one that a batch of two would have, where the sizes tell."""
    below = [math.prod(new[dim + 1 :]) for dim in range(len(new))]
    exact = [dim for dim in range(len(new)) if below[dim] == step and new[dim] == 1]
    beyond = [dim for dim in range(len(new)) if below[dim] * new[dim] > step]
    dim = exact[0] if exact else beyond[-1] if beyond else 0
    return Axis(dim, 1, new[dim]) if len(new) else None


def _empty_reshape(axis: Axis, step: int, new: Size) -> Axis | None:
    zeros = [dim for dim, size in enumerate(new) if size == 0]
    below = math.prod(new[zeros[0] + 1 :]) if len(zeros) == 1 else 0
    return Axis(zeros[0], axis.outer, step // below) if below and step % below == 0 else None


def _dim(x: Tensor, dim: int, extra: int = 0) -> int:
    return dim % max(1, x.ndim + extra)


def _dims(x: Tensor, dims: object) -> set[int]:
    if dims is None or (isinstance(dims, tuple | list) and not dims):
        return set(range(x.ndim))
    return {_dim(x, int(d)) for d in (dims if isinstance(dims, tuple | list) else [dims])}  # type: ignore[call-overload]


def _ints(call: Call, start: int, name: str) -> tuple[int, ...]:
    """`op(x, 1, 2)`, `op(x, (1, 2))` or `op(x, dims=(1, 2))`."""
    rest = call.args[start:] or (call.kwargs.get(name, ()),)
    return tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest


def permuted(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    order = [_dim(x, d) for d in _ints(call, 1, "dims")]
    return Axis(order.index(axis.dim), axis.outer, axis.inner)


def swapped(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    names = ("axis0", "axis1") if call.name == "swapaxes" else ("dim0", "dim1")
    a, b = (_dim(x, call.get(k, name)) for k, name in enumerate(names, 1))
    return _swap(axis, a, b)


def _swap(axis: Axis, a: int, b: int) -> Axis:
    return Axis({a: b, b: a}.get(axis.dim, axis.dim), axis.outer, axis.inner)


def turned(_: Call, x: Tensor, axis: Axis, __: Tensor) -> Where:
    return _swap(axis, x.ndim - 1, x.ndim - 2) if x.ndim > 1 else axis


def reversed_dims(_: Call, x: Tensor, axis: Axis, __: Tensor) -> Where:
    return Axis(x.ndim - 1 - axis.dim, axis.outer, axis.inner)


def dims_moved(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    source, destination = call.get(1, "source"), call.get(2, "destination")
    probe = torch.empty(*range(1, x.ndim + 1), device="meta")
    return Axis(list(torch.movedim(probe, source, destination).shape).index(axis.dim + 1), axis.outer, axis.inner)


def squeezed(call: Call, x: Tensor, axis: Axis, out: Tensor) -> Where:
    dims = call.get(1, "dim")
    gone = {d for d in (range(x.ndim) if dims is None else _dims(x, dims)) if x.shape[d] == 1}
    if axis.dim in gone:
        return Lost(call.name) if call.n != 1 or not out.ndim else Axis(0, 1, out.shape[0])
    return _without(axis, gone)


def unsqueezed(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    dim = _dim(x, call.get(1, "dim"), extra=1)
    return Axis(axis.dim + (axis.dim >= dim), axis.outer, axis.inner)


def _without(axis: Axis, gone: Iterable[int]) -> Axis:
    return Axis(axis.dim - sum(d < axis.dim for d in gone), axis.outer, axis.inner)


def expanded(_: Call, x: Tensor, axis: Axis, out: Tensor) -> Where:
    return Axis(axis.dim + out.ndim - x.ndim, axis.outer, axis.inner)


def tiled(_: Call, x: Tensor, axis: Axis, out: Tensor) -> Where:
    dim = axis.dim + out.ndim - x.ndim
    times = out.shape[dim] // x.shape[axis.dim] if x.shape[axis.dim] else 1
    return Axis(dim, axis.outer * times, axis.inner)


def repeated_each(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    times, dim = call.get(1, "repeats"), call.get(2, "dim")
    if dim is None:
        return Lost(call.name)
    if _dim(x, dim) != axis.dim:
        return axis
    return Axis(axis.dim, axis.outer, axis.inner * times) if isinstance(times, int) else Lost(call.name)


def reduced(position: int = 1) -> Single:
    """A reduction over the dims at argument `position`."""

    def move(call: Call, x: Tensor, axis: Axis, out: Tensor) -> Where:
        dims = call.get(position, "dim")
        gone = _dims(x, None if isinstance(dims, bool) else dims)
        if axis.dim in gone:
            return Lost(call.name, linear=call.name in {"sum", "mean"})
        return axis if out.ndim == x.ndim else _without(axis, gone)

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
        dim = _dim(x, call.get(position, "dim", default))
        return Lost(call.name) if dim == axis.dim else _without(axis, [dim])

    return move


def flipped(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    return Lost(call.name) if axis.dim in _dims(x, _ints(call, 1, "dims")) else axis


def diagonal(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
    gone = {_dim(x, call.get(2, "dim1", 0)), _dim(x, call.get(3, "dim2", 1))}
    return Lost(call.name) if axis.dim in gone else _without(axis, gone)


def before_last(count: int | Callable[[Call, Tensor], int]) -> Single:
    """An op on the last `count` dims, row by row of the others."""

    def move(call: Call, x: Tensor, axis: Axis, _: Tensor) -> Where:
        last = count if isinstance(count, int) else count(call, x)
        return axis if axis.dim < x.ndim - last else Lost(call.name)

    return move


def first_only(call: Call, _: Tensor, axis: Axis, __: Tensor) -> Where:
    """An op whose samples lie on axis 0 by definition."""
    return axis if axis.dim == 0 else Lost(call.name)


def _normalized_dims(call: Call, _: Tensor) -> int:
    return len(call.get(1, "normalized_shape"))


def _padded_dims(call: Call, _: Tensor) -> int:
    return len(call.get(1, "pad")) // 2


def _after_channels(_: Call, x: Tensor) -> int:
    return x.ndim - 2


# --- families with several tensors --------------------------------------------------------------------------------------------

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
        return Lost(call.name) if dim is None or _dim(out, dim) == where.dim else where

    return move


def batch_dims(call: Call, out: Tensor) -> Where:
    """Attention: leading dims broadcast, the last two are its own."""
    where = broadcast(call, out)
    return where if isinstance(where, Axis) and where.dim < out.ndim - 2 else Lost(call.name)


def contraction(call: Call, out: Tensor) -> Where:
    """Matrix products and einsum: the letter of the sample axis, looked up in the result."""
    product = CONTRACTIONS[call.name](call.args, call.kwargs)
    found = {}
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
    where, dim = broadcast(call, out), _dim(out, call.get(1, "dim", 0))
    assert isinstance(where, Axis)
    return Lost(call.name) if where.dim == dim else where


def stacked(call: Call, out: Tensor) -> Where:
    placed = {axis for _, axis in call.placed()}
    if len(placed) > 1:
        raise SampleAxisError(
            _conflict(call, call.placed()[0][0], next(x for x, a in call.placed() if a != call.placed()[0][1]))
        )
    (axis,) = placed
    return Axis(axis.dim + (axis.dim >= _dim(out, call.get(1, "dim", 0))), axis.outer, axis.inner)


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
                call, item, axis if source == _dim_of(axis) else None, len(wide), place if together else 0
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


def _dim_of(where: Where | None) -> int | None:
    return where.dim if isinstance(where, Axis) else None


def _axis_of_index(call: Call, index: Tensor, axis: Axis | None, width: int, place: int) -> set[Any]:
    """The axes an index tensor brings to its place in the result; {None} where it scatters the samples."""
    own = call.where(index)
    shift = place + width - index.ndim
    found: set[Any] = {Axis(own.dim + shift, own.outer, own.inner)} if isinstance(own, Axis) else set()
    if axis is None:
        return found
    # x[arange(n), ...]: row i of the result takes row i of x
    rows = torch.arange(call.n, device=index.device)
    straight = [
        d for d in range(index.ndim) if index.shape[d] == call.n == index.numel() and index.flatten().equal(rows)
    ]
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
        return Lost(call.name) if axis.dim == gone else _without(axis, [gone])

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
    return Lost(call.name) if axis.dim == classes else _without(axis, [classes])


def similarity(call: Call, out: Tensor) -> Where:
    dim = call.get(2, "dim", 1) if call.name == "cosine_similarity" else -1
    ndim = max(x.ndim for x in call.tensors)
    wide = out.new_empty([1] * ndim)
    where = broadcast(call, wide)
    assert isinstance(where, Axis)
    if out.ndim == ndim:
        return where
    return Lost(call.name) if where.dim == dim % ndim else _without(where, [dim % ndim])


# --- ops that mix samples -----------------------------------------------------------------------------------------------------


def _batch_norm(call: Call) -> None:
    # torch.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
    if call.get(5, "training"):
        raise MixedSamplesError(
            "batch_norm: in training mode its statistics mix the samples of a batch, so no per-sample gradient exists. "
            "Call `model.eval()` to use the running statistics, or replace the layer by nn.GroupNorm or nn.LayerNorm."
        )


def _renormalised(_: Call) -> None:
    raise MixedSamplesError(
        "embedding: max_norm rescales rows of the weight in the forward pass, by the ids of the whole batch. "
        "Normalise the weight before the step (or in a parametrization) and leave max_norm unset."
    )


MIXING: dict[str, Callable[[Call], None]] = {"batch_norm": _batch_norm, "embedding_renorm": _renormalised}

# --- the tables ---------------------------------------------------------------------------------------------------------------

ELEMENTWISE = """
abs absolute acos acosh add addcdiv addcmul airy_ai alias alpha_dropout angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh
asin asinh atan atan2 atanh bernoulli bessel_j0 bessel_j1 bessel_y0 bessel_y1 bfloat16 bitwise_and bitwise_left_shift bitwise_not
bitwise_or bitwise_right_shift bitwise_xor bool bucketize byte cdouble ceil celu cfloat chalf char clamp clamp_max clamp_min clip clone
complex conj conj_physical contiguous copy copysign cos cosh cpu cuda deg2rad detach digamma div divide double dropout elu entr eq
erf erfc erfcx erfinv exp exp2 expit expm1 exponential fill fix float float_power floor floor_divide floordiv fmax fmin fmod frac gammainc gammaincc
gammaln gcd ge gelu greater greater_equal gt half hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 i0e i1 i1e igamma igammac imag
int invert isclose isfinite isinf isnan isneginf isposinf isreal lcm ldexp le leaky_relu lerp less less_equal lgamma log log10 log1p log2
log_ndtr log_normal log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit logsigmoid long lt and or xor iand ior
ixor masked_fill maximum mish mul multiply nan_to_num ndtr ndtri ne neg negative nextafter normal not_equal ones_like pin_memory
polar polygamma positive pow rad2deg rand_like randn_like randint_like random real reciprocal relu relu6 remainder requires_grad
resolve_conj resolve_neg round rrelu rrelu_with_noise rsqrt rsub selu sgn short sigmoid sign signbit silu sin sinc sinh softplus softshrink
softsign sqrt square sub subtract tan tanh tanhshrink threshold to true_divide trunc type type_as uniform where xlog1py xlogy zero
zeros_like empty_like full_like zeta minimum data subtract feature_dropout feature_alpha_dropout lshift rshift wait_tensor
""".split()

LINEAR = frozenset(
    """add sub subtract rsub neg negative positive mul multiply div divide true_divide sum mean view reshape squeeze unsqueeze flatten
    stack cat concat clone contiguous to float double half bfloat16 type expand view_as alias getitem data copy""".split()
)

SEVERAL: dict[str, Several] = {
    **dict.fromkeys(ELEMENTWISE, broadcast),
    **dict.fromkeys(["cat", "concat", "concatenate"], concatenated),
    "stack": stacked,
    "embedding": looked_up,
    "getitem": indexed,
    "scaled_dot_product_attention": batch_dims,
    "cdist": distances,
    **dict.fromkeys(
        ["gather", "scatter", "scatter_add", "scatter_reduce", "index_fill", "index_select"], broadcast_along(1)
    ),
    "take_along_dim": broadcast_along(2),
    "masked_scatter": lambda call, _: Lost(call.name),
    "cross": broadcast_along(2, -1),
    "linalg_cross": broadcast_along(2, -1),
    **dict.fromkeys(["cosine_similarity", "pairwise_distance"], similarity),
    **dict.fromkeys(["cross_entropy_loss", "nll_loss_nd", "nll_loss", "nll_loss2d"], class_loss),
    **dict.fromkeys(
        ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "kl_div"], elementwise_loss(2)
    ),
    **dict.fromkeys(["binary_cross_entropy", "hinge_embedding_loss"], elementwise_loss(3)),
    **dict.fromkeys(["binary_cross_entropy_with_logits", "margin_ranking_loss"], elementwise_loss(4)),
    "cosine_embedding_loss": elementwise_loss(4, gone=1),
    "poisson_nll_loss": elementwise_loss(5),
}

SINGLE: dict[str, Single] = {
    **dict.fromkeys(
        "view reshape flatten unflatten ravel view_as reshape_as unsafe_view view_as_real view_as_complex".split(),
        reshaped,
    ),
    "permute": permuted,
    **dict.fromkeys(["transpose", "swapaxes", "swapdims"], swapped),
    **dict.fromkeys(["t", "mT", "mH", "adjoint"], turned),
    **dict.fromkeys(["T", "H"], reversed_dims),
    **dict.fromkeys(["movedim", "moveaxis"], dims_moved),
    "squeeze": squeezed,
    "unsqueeze": unsqueezed,
    **dict.fromkeys(["expand", "expand_as", "broadcast_to"], expanded),
    **dict.fromkeys(["repeat", "tile"], tiled),
    "repeat_interleave": repeated_each,
    **dict.fromkeys(
        """sum mean prod amax amin any all argmax argmin logsumexp nansum nanmean var std var_mean std_mean count_nonzero median
        nanmedian mode max min aminmax""".split(),
        reduced(),
    ),
    **dict.fromkeys(["linalg_vector_norm", "norm", "kthvalue", "quantile", "nanquantile"], reduced(2)),
    **dict.fromkeys(
        ["softmax", "log_softmax", "safe_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"], along()
    ),
    **dict.fromkeys(["sort", "argsort", "glu"], along(1, -1)),
    "msort": along(99, 0),
    **dict.fromkeys(["topk", "diff"], along(2, -1)),
    "roll": along(2),
    **dict.fromkeys(
        ["split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"], along(2, 0)
    ),
    **dict.fromkeys(["narrow", "unfold"], along(1)),
    **dict.fromkeys("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft".split(), along(2, -1)),
    **dict.fromkeys(["select"], removed()),
    "unbind": removed(1, 0),
    "flip": flipped,
    "diagonal": diagonal,
    **dict.fromkeys(
        ["tril", "triu", "matrix_exp", "linalg_matrix_exp", "inverse", "linalg_inv", "det", "logdet"], before_last(2)
    ),
    **dict.fromkeys(
        ["linalg_det", "linalg_slogdet", "cholesky", "linalg_cholesky", "linalg_qr", "im2col", "col2im"], before_last(2)
    ),
    "diag_embed": before_last(1),
    "multinomial": before_last(1),
    "one_hot": before_last(0),
    "layer_norm": before_last(_normalized_dims),
    "rms_norm": before_last(_normalized_dims),
    **dict.fromkeys(["pad", "constant_pad_nd"], before_last(_padded_dims)),
    **dict.fromkeys(
        "avg_pool1d max_pool1d max_pool1d_with_indices adaptive_avg_pool1d adaptive_max_pool1d".split(), before_last(1)
    ),
    **dict.fromkeys(
        "avg_pool2d max_pool2d max_pool2d_with_indices adaptive_avg_pool2d adaptive_max_pool2d".split(), before_last(2)
    ),
    **dict.fromkeys(
        "avg_pool3d max_pool3d max_pool3d_with_indices adaptive_avg_pool3d adaptive_max_pool3d".split(), before_last(3)
    ),
    **dict.fromkeys("pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle".split(), before_last(3)),
    **dict.fromkeys(
        """upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
        upsample_trilinear3d _upsample_nearest_exact1d upsample_nearest_exact2d""".split(),
        before_last(_after_channels),
    ),
    **dict.fromkeys("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split(), first_only),
    **dict.fromkeys(["group_norm", "instance_norm", "batch_norm", "affine_grid_generator"], first_only),
}

# Ops whose operands align by broadcasting or by equal dims, so that a parameter can enter them row by row.
ALIGNED = frozenset([*ELEMENTWISE, "scaled_dot_product_attention", "cat", "concat", "concatenate", "stack"])

# Data movement without loss or repetition: every entry of the result is another entry of the operand (casts count as such).
MOVES = frozenset(
    """view reshape flatten unflatten ravel permute transpose swapaxes swapdims t mT T H mH adjoint movedim moveaxis squeeze unsqueeze
    select narrow split split_with_sizes chunk tensor_split unbind contiguous clone to float double half bfloat16 type alias view_as
    diagonal flip detach""".split()
)
EXPANDS = frozenset({"expand", "expand_as", "broadcast_to", "repeat"})
# The second tensor only lends its shape or type.
LENDING = frozenset({"type_as", "view_as", "reshape_as", "expand_as", "to"})
# The tensor only lends its type and device: the result is the same for all samples.
FACTORIES = frozenset({"new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "new_tensor"})
