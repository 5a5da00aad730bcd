"""An op without a rule: run sample by sample, each on its own copy of the parameter, vectorised where possible."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .axes import Axis, Call
from .collecting import Source, Uses
from .entering import Function, Recorder, enter, names_of, replaced, source_of, spreads
from .errors import MixedSamplesError, SampleAxisError, UnsupportedOpError
from .factors import Dense, Factor
from .registry import Operation
from .taps import Enter, Grads, seen

# what these do cannot be seen from a sample's own tensors
OF_MEMORY = frozenset({"as_strided", "as_strided_scatter", "as_strided_copy"})

_CANNOT_RUN = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)
# runs on random values, until only one layout of the samples is left
TRIALS = 3
# how far the same numbers may be apart, relative to their size: sums in another order, in these types
_ROUNDING = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.float32: 3e-3, torch.complex64: 3e-3}


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
    rows = [x for x in shared if spreads(recording, x, *call.placed()[0]) or _repeats(x, *call.placed()[0])]
    if rows and not _takes_whole(recording, func, call, shared):
        return _row_by_row(recording, func, call, rows)
    each = _each(recording, func, call, {id(x): _copies(recording, call, x) for x in shared}, shared)
    axis = _layout(recording, func, call, shared, plain, each.detach())
    if each.requires_grad:
        # an op's backward may make a view of what comes to it
        each.register_hook(Tensor.contiguous)
    out = _laid(each, axis)
    # in the memory order of the op's own result: a `view` may follow
    out = out.contiguous() if plain.is_contiguous() else out
    recording.declare(out, axis)
    return out


def _each(
    recording: Recorder,
    func: Function,
    call: Call,
    copies: Mapping[int, Tensor],
    shared: list[Tensor],
    values: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """The op's results for each sample alone, `(n, *shape)`; with other values of some operands, given by id."""
    values = values or {}
    pieces = {**copies, **{id(x): _per_sample(values.get(id(x), x), axis, call.n) for x, axis in call.placed()}}

    def one(*tensors: Tensor) -> Any:
        args, kwargs = replaced(call, dict(zip(pieces, tensors, strict=True)))
        return func(*args, **kwargs)

    try:
        each: Tensor = torch.func.vmap(one, randomness="different")(*pieces.values())
    except _CANNOT_RUN:
        each = _looped(recording, call, one, list(pieces.values()), shared)
    return each


def _repeats(x: Tensor, like: Tensor, axis: Axis) -> bool:
    """Whether a shared tensor has the same row for each row of `like`: repeated, or a copy of an expanded one."""
    if x.ndim != like.ndim or x.shape[axis.dim] != like.shape[axis.dim]:
        return False
    return torch.equal(x, x.narrow(axis.dim, 0, 1).expand_as(x))


def _takes_whole(recording: Recorder, func: Function, call: Call, shared: list[Tensor]) -> bool:
    """Whether the op does for each sample alone, with all of the shared tensors, what it does for the batch.

    A `scatter` that takes the first rows only does so where they are alike, but has no right gradient then: in trials they differ.
    """
    trials = [_tried(recording, func, call, shared, seed) for seed in range(TRIALS)]
    return all(tried is not None and bool(_outers(call, *tried)) for tried in trials)


def _row_by_row(recording: Recorder, func: Function, call: Call, shared: list[Tensor]) -> Any:
    """The op with shared tensors that have a row for each row of the samples as batched ones."""
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
    call.settled = True
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
    (uses,) = recording.collector.expect([source], call.name, "fallback")

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
    """`(n, *shape)`: what each sample has of `x`, its axis kept with `outer * inner` entries, in the memory order of `x`."""
    grouped: Tensor = axis.rows(x, n).unflatten(0, (n, axis.outer * axis.inner))
    pieces = grouped.movedim(1, axis.dim + 1)
    if x.layout != torch.strided:
        return pieces
    order = [0, *(dim + 1 for dim in _memory_order(x))]
    return pieces.permute(order).contiguous().permute([order.index(dim) for dim in range(pieces.ndim)])


def _memory_order(x: Tensor) -> list[int]:
    """The dims of a tensor from the outermost in memory to the innermost."""
    expanded = any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))
    return list(range(x.ndim)) if expanded or x.is_contiguous() else sorted(range(x.ndim), key=x.stride, reverse=True)


def _layout(recording: Recorder, func: Function, call: Call, shared: list[Tensor], plain: Tensor, each: Tensor) -> Axis:
    """Where the samples are in the op's result, by its values; refused where they are not what the op gives for each alone."""
    outers, told = _fitting(recording, func, call, shared, plain, each)
    dim = _axis_of_samples(plain, each, call.n)
    if not outers or dim is None:
        raise MixedSamplesError(
            f"{call.name}: run sample by sample it gives something else than on the batch (shapes {tuple(each.shape)} and "
            f"{tuple(plain.shape)}), so the gradient of {names_of(recording, shared)} cannot be split over samples. Use an op that "
            "treats samples alike (for a loss, reduction='none'), or register a rule with `samplewise.rule`."
        )
    rows = each.shape[dim + 1]
    ways = {(axis.outer, axis.inner) for _, axis in call.placed()}
    if len(outers) > 1 and len(ways) == 1:
        # samples that are alike, which all operands have in one way
        outers &= {outer for outer, inner in ways if outer * inner == rows}
    if not told or len(outers) != 1:
        raise SampleAxisError(
            f"{call.name}: which rows of its result of shape {tuple(plain.shape)} are whose cannot be told, for they are alike for all "
            f"samples, so the gradient of {names_of(recording, shared)} cannot be split over samples. Expected operands with samples in "
            f"one way, got {' and '.join(sorted({str(axis) for _, axis in call.placed()}))}. Give the samples an axis of their own, or "
            "register a rule with `samplewise.rule`."
        )
    (outer,) = outers
    return Axis(dim, outer, rows // outer)


def _fitting(
    recording: Recorder, func: Function, call: Call, shared: list[Tensor], plain: Tensor, each: Tensor
) -> tuple[set[int], bool]:
    """In how many blocks of all samples the result may have them, and whether its values can tell."""
    if not plain.numel():
        return _outers(call, plain, each), True
    operands = [x.detach() for x in call.tensors if x.is_floating_point() or x.is_complex()]
    outers = _outers(call, plain, each, max(map(_size, operands), default=0.0))
    for seed in range(TRIALS):
        # zero or tiny parameters, and samples that are alike, make all layouts look alike
        tried = _tried(recording, func, call, shared, seed) if outers else None
        if tried is None:
            # on values of its own only: those have to tell
            return outers & _outers(call, plain, each), not _alike(each, each.roll(1, 0))
        outers &= _outers(call, *tried)
        if len(outers) <= 1:
            break
    return outers, True


def _tried(recording: Recorder, func: Function, call: Call, shared: list[Tensor], seed: int) -> tuple[Tensor, Tensor] | None:
    """What the op gives for random operands, on the batch and for each sample alone; None where it does not run on them."""
    operands = {id(x): x for x in [*shared, *(x for x, _ in call.placed())]}
    devices = {x.device for x in call.tensors if x.is_cuda}
    try:
        # the op may draw, and the model's own numbers are to be those it has without a recording
        with torch.no_grad(), torch.random.fork_rng(devices):
            new = {key: _random(x, seed * len(operands) + k) for k, (key, x) in enumerate(operands.items())}
            args, kwargs = replaced(call, new)
            plain = func(*args, **kwargs)
            copies = {id(x): new[id(x)].expand(call.n, *x.shape) for x in shared}
            each = _each(recording, func, call, copies, shared, new)
    except _CANNOT_RUN:
        return None
    return (plain, each) if plain.isfinite().any() else None


def _random(x: Tensor, seed: int) -> Tensor:
    """A tensor like `x` with values that most ops take: positive and below one; whole numbers stay as they are."""
    if x.layout != torch.strided or not (x.is_floating_point() or x.is_complex()):
        return x.detach()
    order = _memory_order(x)
    generator = torch.Generator(x.device).manual_seed(seed)
    values = torch.rand([x.shape[dim] for dim in order], dtype=x.dtype, device=x.device, generator=generator)
    return values.mul_(0.5).add_(0.25).permute([order.index(dim) for dim in range(x.ndim)])


def _axis_of_samples(plain: Tensor, each: Tensor, n: int) -> int | None:
    """The axis of the op's result that is longer for the batch than for a sample."""
    if plain.ndim != each.ndim - 1:
        return None
    differ = [dim for dim in range(plain.ndim) if plain.shape[dim] != each.shape[dim + 1]]
    return differ[0] if len(differ) == 1 and plain.shape[differ[0]] == n * each.shape[differ[0] + 1] else None


def _outers(call: Call, plain: Tensor, each: Tensor, least: float = 0.0) -> set[int]:
    """In how many blocks of all samples the op's result may have them: each number for which the values fit."""
    dim = _axis_of_samples(plain, each, call.n)
    if dim is None:
        return set()
    rows = each.shape[dim + 1]
    # an op may put blocks around those of its operands, or rows into them
    known = {1, rows, *itertools.chain(*((axis.outer, rows // axis.inner) for _, axis in call.placed()))}
    return {
        outer
        for outer in known
        if outer and rows % outer == 0 and _alike(_laid(each, Axis(dim, outer, rows // outer)), plain, least)
    }


def _laid(each: Tensor, axis: Axis) -> Tensor:
    """The samples' results put together as the op does: (n, .., outer * inner, ..) -> (.., outer * n * inner, ..)."""
    blocks: Tensor = each.unflatten(axis.dim + 1, (axis.outer, axis.inner)).movedim(0, axis.dim + 1)
    return blocks.flatten(axis.dim, axis.dim + 2)


def _alike(a: Tensor, b: Tensor, least: float = 0.0) -> bool:
    """Whether two tensors are the same but for rounding, of numbers as large as theirs or `least`."""
    # under autocast the two may have run in different types
    if not any(x.is_floating_point() or x.is_complex() for x in (a, b)):
        return torch.equal(a, b)
    rounding = max(_ROUNDING.get(x.dtype, 3e-2) for x in (a, b))
    kind = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return torch.allclose(a.to(kind), b.to(kind), rtol=rounding, atol=rounding * max(_size(b), least), equal_nan=True)


def _size(x: Tensor) -> float:
    """The largest finite absolute value."""
    if not x.numel():
        return 0.0
    sizes = x.abs()
    return float(torch.where(sizes.isfinite(), sizes, 0).max())
