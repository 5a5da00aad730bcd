"""A parameter that meets the samples row by row: it becomes a batched tensor, and the op runs as it is."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Size, Tensor, nn

from .alignment import through_index
from .axes import NOBODY, Axis, Call, Lost, Where, swapped, whole
from .collecting import Collector, Shared, Source, Uses
from .errors import SampleAxisError, UnsupportedOpError
from .factors import Dense, Diagonal, Factor, Single
from .movement import dim_of
from .ownership import written
from .registry import Operation
from .sample_axis import ALIGNED, EXAMPLES, INNER, JOINS, WRITES, follow
from .taps import Collects, Enter, Grads, seen

Function = Callable[..., Any]

# Ops that leave what they do not write to as it was.
WRITTEN = WRITES | frozenset(EXAMPLES) | {"setitem", "masked_scatter"}


class Recorder(Collects, Protocol):
    """What a meeting needs of the recording it happens in."""

    model: nn.Module
    collector: Collector
    anchor: Tensor
    fallback: str
    # the batch size, once it is known
    n: int | None
    # of the parameters themselves, by id
    sources: dict[int, Source]

    def kind(self, tensor: Tensor) -> object:
        """What a tensor is: placed, lost, shared or constant."""

    def where(self, tensor: Tensor) -> Where | None:
        """Where its sample axis is."""

    def declare(self, tensor: Tensor, kind: Axis | Lost | Shared | str) -> None:
        """Say what it is."""

    def overwrite(self, tensor: Tensor, kind: Axis | Lost | Shared | str) -> None:
        """Say what it is after an in-place op."""

    def gradient_on(self, axis: Axis, grad: Tensor) -> Tensor:
        """A gradient on its way back, known to have its samples on an axis."""

    def __enter__(self) -> Any:
        """Record what runs."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /) -> Any:
        """No longer."""


def names_of(recording: Recorder, shared: list[Tensor]) -> str:
    """The parameters behind shared tensors, for a message."""
    names = {name for x in shared if isinstance(kind := recording.kind(x), Shared) for name in kind.names}
    return " and ".join(f"'{name}'" for name in sorted(names)) or "a parameter"


def replaced(call: Call, new: Mapping[int, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with some tensors, given by id, replaced."""
    args, kwargs = swapped((call.args, call.kwargs), new)
    return args, kwargs


def source_of(recording: Recorder, tensor: Tensor) -> Source:
    """The use of a shared tensor here and now."""
    known = recording.sources.get(id(tensor))
    if known is not None:
        return known
    kind = recording.kind(tensor)
    assert isinstance(kind, Shared)
    recording.collector.note_hooks(tensor)
    return Source.of(tensor, kind)


def enter_whole(recording: Recorder, func: Function, op: Operation, call: Call, shared: list[Tensor]) -> Any:
    """One sample, of a batch of one or picked from a larger: the whole gradient is that sample's, whatever the op."""
    new = {id(x): _sole(recording, call, x) for x in shared}
    if op.inplace and id(call.args[0]) in new:
        _overwrite(recording, call, new.pop(id(call.args[0])))
    return _with(recording, func, call, new, followed=call.name in WRITTEN and call.n > 1)


def _with(recording: Recorder, func: Function, call: Call, new: Mapping[int, Tensor], *, followed: bool) -> Any:
    """The call with what entered, with which the rows of the result are followed where the others do not tell them."""
    if followed:
        call.take(new, recording.where)
        return func(*call.args, **call.kwargs)
    args, kwargs = replaced(call, new)
    return func(*args, **kwargs)


def settle(call: Call, shared: Sequence[Tensor]) -> None:
    """Let what is put beside samples' rows, without a graph, count as what it enters as where there is one."""
    sample, placed = call.sample(), call.placed()
    if call.n <= 1 or not placed or call.name not in WRITTEN or any(call.args[0] is x for x in shared):
        return
    x, axis = placed[0]
    if sample is not None or (call.name in JOINS and _puts_beside(call, x, axis)):
        for other in shared:
            call.declare(other, axis if sample is None else Axis.of_sample(sample, other))


def _sole(recording: Recorder, call: Call, tensor: Tensor) -> Tensor:
    source, n, sample = source_of(recording, tensor), call.n, call.sample() if call.n > 1 else None
    (uses,) = recording.collector.expect([source], call.name, "rows")

    def factors(grads: Grads, _: Sequence[Tensor]) -> list[tuple[Source, Uses, Factor]]:
        grad = grads[0]
        assert grad is not None
        # an embedding may have asked for a sparse one
        dense = grad.to_dense() if grad.is_sparse else grad
        return [(source, uses, Dense(dense[None][:n]) if sample is None else Single(dense, sample, n))]

    entered = Enter.run(recording, factors, recording.anchor, seen(recording, tensor))
    recording.declare(entered, whole(entered) if sample is None else Axis.of_sample(sample, entered))
    return entered


def _overwrite(recording: Recorder, call: Call, entered: Tensor) -> None:
    """Let the shared target of an in-place op hold its values as a batched tensor."""
    target = call.args[0]
    if target.is_leaf or target._is_view():  # noqa: SLF001
        raise UnsupportedOpError(
            f"{call.name}: writes batched values in place into {names_of(recording, [target])}, which all samples share. "
            "Expand and clone it over the samples and write into all of that (not a view of it), or write out of place."
        )
    target.detach_()
    target.copy_(entered)
    where = recording.where(entered)
    assert where is not None
    recording.overwrite(target, where)


def enter_aligned(recording: Recorder, func: Function, call: Call, shared: list[Tensor]) -> Any:
    """An op whose operands align from the right: its own broadcasting gives every sample its gradient."""
    x, axis = max(call.placed(), key=lambda pair: pair[0].shape[pair[1].dim] if pair[0].ndim else 0)
    ndim = max(t.ndim for t in call.tensors)
    frame = axis.at(axis.dim + ndim - x.ndim)
    if call.name in INNER and frame.dim >= ndim - INNER[call.name]:
        raise SampleAxisError(
            f"{call.name}: the samples lie on axis {axis.dim} of an operand of shape {tuple(x.shape)}, which the op mixes, so the gradient "
            f"of {names_of(recording, shared)} cannot be split over them. Move the samples to a leading axis."
        )
    beside = call.name in JOINS and _puts_beside(call, x, axis)
    if beside and axis.chosen:
        raise SampleAxisError(
            f"{call.name}: joins samples that the data put into an order with {names_of(recording, shared)} along the sample axis (axis "
            f"{axis.dim}). Join along another axis, with the parameter expanded over the samples."
        )
    new = {id(s): enter(recording, call, s, frame, ndim, x.shape[axis.dim]) for s in shared}
    return _with(recording, func, call, new, followed=beside)


def _puts_beside(call: Call, x: Tensor, axis: Axis) -> bool:
    """Whether rows come beside samples' rows, and not to them."""
    along = call.name != "stack" and dim_of(x, call.get(1, "dim", 0)) == axis.dim
    return along or any(own.sample is not None for _, own in call.placed())


def assign(recording: Recorder, func: Function, call: Call, shared: list[Tensor]) -> Any:
    """`target[index] = value` with a shared value."""
    target, index, value = call.args
    part = target.detach()[index]
    where = through_index(call, target, index, part)
    if not isinstance(where, Axis) or where.dim >= part.ndim or not any(value is x for x in shared):
        raise SampleAxisError(
            f"setitem: {names_of(recording, shared)} is written to places that do not follow the samples of a target of shape "
            f"{tuple(target.shape)}. Write to whole samples (`x[:, k] = p`), or use torch.where."
        )
    entered = enter(recording, call, value, where, part.ndim, part.shape[where.dim])
    return _with(recording, func, call, {id(value): entered}, followed=True)


def spread_target(recording: Recorder, call: Call) -> None:
    """Make the shared target of an in-place op batched, as far as it has a place for every sample: its rows enter one by one."""
    target = call.args[0]
    axis = _target_axis(call)
    if axis is None:
        raise UnsupportedOpError(
            f"{call.name}: writes batched values in place into {names_of(recording, [target])}, of shape {tuple(target.shape)}, which "
            "all samples share. Expand and clone it over the samples and write there, or write out of place."
        )
    before = target.clone()
    kind = recording.kind(target)
    assert isinstance(kind, Shared)
    recording.declare(before, kind)
    _overwrite(recording, call, enter(recording, call, before, axis, target.ndim, target.shape[axis.dim]))
    if call.name in WRITTEN:
        # of which rows will be left as they are
        call.declare(target, axis)


def write_beside(recording: Recorder, func: Function, call: Call) -> Any:
    """A call that writes to a copy of its shared target, into which it enters row by row first; NotImplemented where it has no rows."""
    target, *rest = call.args
    axis = _target_axis(call)
    if axis is None:
        return NotImplemented
    entered = enter(recording, call, target, axis, target.ndim, target.shape[axis.dim])
    with recording:
        return func(entered, *rest, **call.kwargs)


def _target_axis(call: Call) -> Axis | None:
    """Along which axis the shared target of an op has a place for every sample, if there is one."""
    target = call.args[0]
    if call.name == "masked_scatter" and torch.broadcast_shapes(target.shape, call.get(1, "mask").shape) != target.shape:
        # the result is larger than the target
        return None
    if call.name == "setitem":
        axis = written(call)
    elif call.name in WRITTEN:
        axis = follow(call, target)
    else:
        axis = _aligned_axis(call, target)
    axis = _whole(axis, call.n)
    return axis if isinstance(axis, Axis) and target.shape[axis.dim] == axis.size(call.n) else None


def _whole(axis: Where | None, n: int) -> Where | None:
    """An axis of which nobody's rows, where nothing is written, are those of the samples in their order: theirs enter as well."""
    if not isinstance(axis, Axis) or NOBODY not in (axis.ragged or ()):
        return axis
    owners = axis.ragged or ()
    fits = len(owners) == n and all(owner in {NOBODY, row} for row, owner in enumerate(owners))
    # rows that the data put into an order say nothing of those between them
    return Axis(axis.dim) if fits and axis.chosen is None else None


def _aligned_axis(call: Call, target: Tensor) -> Axis | None:
    x, axis = call.placed()[0]
    dim = axis.dim + target.ndim - x.ndim
    return axis.at(dim) if call.name in ALIGNED | {"masked_fill"} and dim >= 0 else None


def enter(recording: Recorder, call: Call, tensor: Tensor, axis: Axis, ndim: int, rows: int) -> Tensor:
    """A shared tensor as a batched one, aligned from the right in `ndim` dims with `rows` rows on `axis.dim`."""
    value, dim = _like_a_number(call, seen(recording, tensor)), axis.dim - (ndim - tensor.ndim)
    has_rows = dim >= 0
    if not has_rows:
        value, dim = value.reshape(*[1] * -dim, *value.shape), 0
    placed = axis.at(dim)
    origin, kind = tensor, recording.kind(tensor)
    assert isinstance(kind, Shared)
    own = has_rows and value.shape[dim] == rows
    if value.shape[dim] != rows and (call.name in JOINS or value.shape[dim] != 1):
        raise SampleAxisError(
            f"{call.name}: joins samples with {names_of(recording, [tensor])} along the sample axis (axis {dim}, {rows} rows and "
            f"{value.shape[dim]}). Join along another axis, with the parameter expanded over the samples."
        )
    before = kind.unexpanded and kind.unexpanded[0]
    if own and before is not None and _expands_along(before, value, dim) and recording.collector.bypass(tensor, kind.names):
        origin = before
    source = source_of(recording, origin)
    (uses,) = recording.collector.expect([source], call.name, "rows")
    diagonal = own and origin is tensor
    # the closure holds no tensor and no call
    n, shape, below = call.n, origin.shape, value.ndim - origin.ndim

    def factors(grads: Grads, _: Sequence[Tensor]) -> list[tuple[Source, Uses, Factor]]:
        grad = grads[0]
        assert grad is not None
        if diagonal:
            owners = placed.owners(n, grad.device)
            return [(source, uses, Diagonal(grad.reshape(source.shape), owners, dim, n, placed == Axis(dim)))]
        rest = [*[1] * below, *shape]
        del rest[dim]
        dense = _sum_to(placed.rows(grad, n), Size(rest))
        return [(source, uses, Dense(dense.reshape(len(dense), *source.shape)).regroup(n))]

    value = value if own else value.expand(*value.shape[:dim], rows, *value.shape[dim + 1 :])
    entered: Tensor = Enter.run(recording, factors, recording.anchor, value)
    recording.declare(entered, placed)
    return entered


def spreads(recording: Recorder, tensor: Tensor, like: Tensor, axis: Axis) -> bool:
    """Whether a shared tensor was expanded over the samples, from one row for all of them, as `like` has them on `axis`."""
    kind = recording.kind(tensor)
    own = tensor.ndim == like.ndim and tensor.shape[axis.dim] == like.shape[axis.dim]
    origin = kind.unexpanded[0] if own and isinstance(kind, Shared) and kind.unexpanded else None
    return origin is not None and _expands_along(origin, tensor, axis.dim)


def _like_a_number(call: Call, value: Tensor) -> Tensor:
    """A tensor without dims does not decide the type of a result; with a row for each sample it would."""
    others = [x.dtype for x in call.tensors if x.ndim and x.is_floating_point()]
    if value.ndim or not others or not value.is_floating_point():
        return value
    return value.to(functools.reduce(torch.promote_types, others))


def _expands_along(tensor: Tensor, value: Tensor, dim: int) -> bool:
    """Whether `value` is `tensor` expanded (not tiled), on `dim` among others."""
    padded = [*[1] * (value.ndim - tensor.ndim), *tensor.shape]
    return padded[dim] == 1 and all(own in {1, size} for own, size in zip(padded, value.shape, strict=True))


def _sum_to(grad: Tensor, shape: Size) -> Tensor:
    """Sum a gradient `(n, *larger)` over the dims that `shape`, of as many dims, has as 1."""
    dims = [k for k, (size, own) in enumerate(zip(grad.shape[1:], shape, strict=True), 1) if own == 1 and size != 1]
    return grad.sum(dims, keepdim=True) if dims else grad
