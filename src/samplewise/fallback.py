"""An op without a rule: run sample by sample, each on its own copy of the parameter, vectorised where possible."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .axes import Axis, Call
from .collecting import Source, Uses
from .entering import Function, Recorder, enter, names_of, replaced, source_of, spreads
from .errors import MixedSamplesError, UnsupportedOpError
from .factors import Dense, Factor
from .registry import Operation
from .taps import Enter, Grads, seen

# what these do cannot be seen from a sample's own tensors
OF_MEMORY = frozenset({"as_strided", "as_strided_scatter", "as_strided_copy"})


_CANNOT_RUN = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


def fall_back(recording: Recorder, func: Function, op: Operation, call: Call, shared: list[Tensor]) -> Any:
    """An op without a rule: run it sample by sample, each on its own copy of the parameter, vectorised where possible."""
    if recording.fallback == "error":
        raise UnsupportedOpError(
            f"{call.name}: no rule gives the gradient of {names_of(recording, shared)}, and fallback='error' forbids the slow way. "
            "Register one with `samplewise.rule`, or allow the fallback."
        )
    if op.inplace:
        return _in_two_steps(recording, op, call)
    if op.others_written(call.args, call.kwargs):
        raise UnsupportedOpError(
            f"{call.name}: writes to {', '.join(name for _, name in op.writes)}, and has no rule for "
            f"{names_of(recording, shared)}. Register one with `samplewise.rule`, or give the result back."
        )
    if op.name in OF_MEMORY:
        raise UnsupportedOpError(
            f"{call.name}: addresses memory, not axes, so what it does to one sample of {names_of(recording, shared)} is not known. Use "
            "an op on axes (narrow, unfold, slice_scatter)."
        )
    with torch.no_grad():
        plain = func(*call.args, **call.kwargs)
    if not isinstance(plain, Tensor):
        raise UnsupportedOpError(
            f"{call.name}: has no rule for {names_of(recording, shared)}, and the fallback runs ops with one tensor as result only. "
            "Register a rule with `samplewise.rule`, or compute the same from other ops."
        )
    _refuse_ragged(recording, call, shared)
    rows = [x for x in shared if spreads(recording, x, *call.placed()[0])]
    if rows and not _takes_whole(recording, func, call, shared, plain):
        return _row_by_row(recording, func, call, rows)
    each = _each(recording, func, call, {id(x): _copies(recording, call, x) for x in shared}, shared)
    return _joined(recording, call, plain, each, shared)


def _each(recording: Recorder, func: Function, call: Call, copies: Mapping[int, Tensor], shared: list[Tensor]) -> Tensor:
    """The op's results for each sample alone, `(n, *shape)`."""
    pieces = {**copies, **{id(x): _per_sample(x, axis, call.n) for x, axis in call.placed()}}

    def one(*tensors: Tensor) -> Any:
        args, kwargs = replaced(call, dict(zip(pieces, tensors, strict=True)))
        return func(*args, **kwargs)

    try:
        each: Tensor = torch.func.vmap(one, randomness="different")(*pieces.values())
    except _CANNOT_RUN:
        each = _looped(recording, call, one, list(pieces.values()), shared)
    return each


def _takes_whole(recording: Recorder, func: Function, call: Call, shared: list[Tensor], plain: Tensor) -> bool:
    """Whether the op does for each sample alone, with all of the shared tensors, what it does for the batch."""
    copies = {id(x): x.detach().expand(call.n, *x.shape) for x in shared}
    try:
        with torch.no_grad():
            return _put_together(call, plain, _each(recording, func, call, copies, shared)) is not None
    except MixedSamplesError:
        return False


def _row_by_row(recording: Recorder, func: Function, call: Call, shared: list[Tensor]) -> Any:
    """The op with shared tensors that were expanded over the samples as batched ones."""
    _, axis = call.placed()[0]
    args, kwargs = replaced(call, {id(x): enter(recording, call, x, axis, x.ndim, x.shape[axis.dim]) for x in shared})
    with recording:
        return func(*args, **kwargs)


def _in_two_steps(recording: Recorder, op: Operation, call: Call) -> Tensor:
    """An in-place op as the op out of place, and its result copied into the target."""
    plain = getattr(Tensor, op.name, None)
    if plain is None:
        raise UnsupportedOpError(
            f"{call.name}: has no rule for {names_of(recording, call.tensors)}, and an in-place op cannot be run sample by sample. Use "
            "it out of place."
        )
    with recording:
        # on a copy, for the op may keep its operand for the backward
        result = plain(call.tensors[0].clone(), *call.args[1:], **call.kwargs)
        written: Tensor = call.tensors[0].copy_(result)
    return written


def _looped(recording: Recorder, call: Call, one: Callable[..., Tensor], stacks: list[Tensor], shared: list[Tensor]) -> Tensor:
    try:
        return torch.stack([one(*pieces) for pieces in zip(*stacks, strict=True)])
    except _CANNOT_RUN as error:
        raise MixedSamplesError(
            f"{call.name}: cannot be run sample by sample ({error}), so the gradient of {names_of(recording, shared)} cannot be split "
            "over samples. Move the sample axis to a place that the op keeps, or register a rule with `samplewise.rule`."
        ) from error


def _copies(recording: Recorder, call: Call, tensor: Tensor) -> Tensor:
    """One copy of a shared tensor per sample, `(n, *shape)`, without memory of its own."""
    source = source_of(recording, tensor)
    uses = recording.collector.expect(source, call.name, "fallback")

    def factors(grads: Grads, _: Sequence[Tensor]) -> list[tuple[Source, Uses, Factor]]:
        grad = grads[0]
        assert grad is not None
        return [(source, uses, Dense(grad))]

    copies = seen(recording, tensor).expand(call.n, *tensor.shape)
    return Enter.run(recording, factors, recording.anchor, copies)


def _refuse_ragged(recording: Recorder, call: Call, shared: list[Tensor]) -> None:
    if any(axis.ragged is not None for _, axis in call.placed()):
        raise UnsupportedOpError(
            f"{call.name}: samples have different numbers of rows, which the fallback cannot run sample by sample, so the gradient of "
            f"{names_of(recording, shared)} cannot be split over them. Pad the samples to one length, or register a rule with "
            "`samplewise.rule`."
        )


def _per_sample(x: Tensor, axis: Axis, n: int) -> Tensor:
    """`(n, *shape)`: what each sample has of `x`, its axis kept with `outer * inner` entries."""
    grouped: Tensor = axis.rows(x, n).unflatten(0, (n, axis.outer * axis.inner))
    return grouped.movedim(1, axis.dim + 1)


def _joined(recording: Recorder, call: Call, plain: Tensor, each: Tensor, shared: list[Tensor]) -> Tensor:
    """The samples' results put together as the op itself would; refused where they are not the op's."""
    found = _put_together(call, plain, each)
    if found is None:
        raise MixedSamplesError(
            f"{call.name}: run sample by sample it gives something else than on the batch (shapes {tuple(each.shape)} and "
            f"{tuple(plain.shape)}), so the gradient of {names_of(recording, shared)} cannot be split over samples. Use an op that "
            "treats samples alike (for a loss, reduction='none'), or register a rule with `samplewise.rule`."
        )
    out, axis = found
    recording.declare(out, axis)
    return out


def _put_together(call: Call, plain: Tensor, each: Tensor) -> tuple[Tensor, Axis] | None:
    differ = [d for d in range(plain.ndim) if plain.shape[d] != each.shape[d + 1]] if plain.ndim == each.ndim - 1 else []
    (dim,) = differ if len(differ) == 1 else (0,)
    for outer in sorted({1, *(axis.outer for _, axis in call.placed())}) if len(differ) == 1 else ():
        rows = each.shape[dim + 1]
        if rows % outer:
            continue
        # (n, .., outer * inner, ..) -> (.., outer * n * inner, ..)
        out: Tensor = each.unflatten(dim + 1, (outer, rows // outer)).movedim(0, dim + 1).flatten(dim, dim + 2)
        if out.shape == plain.shape and _alike(out.detach(), plain):
            # in the memory order of the op's own result: a `view` may follow
            return (out.contiguous() if plain.is_contiguous() else out), Axis(dim, outer, rows // outer)
    return None


def _alike(a: Tensor, b: Tensor) -> bool:
    # under autocast the two may have run in different types
    types = {a.dtype, b.dtype}
    loose = 30.0 if types & {torch.bfloat16, torch.float16} else 1.0
    kind = torch.promote_types(a.dtype, b.dtype)
    return torch.allclose(a.to(kind), b.to(kind), rtol=1e-3 * loose, atol=1e-4 * loose, equal_nan=True)
