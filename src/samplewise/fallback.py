"""An op without a rule: run sample by sample, each on its own copy of the parameter, vectorised where possible."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .axes import Axis, Call
from .collecting import Source, Use
from .entering import Function, Recorder, names_of, replaced, source_of
from .errors import MixedSamplesError, UnsupportedOpError
from .factors import Dense, Factor
from .registry import Operation
from .taps import Enter, Grads


def fall_back(recording: Recorder, func: Function, op: Operation, call: Call, shared: list[Tensor]) -> Any:
    """An op without a rule: run it sample by sample, each on its own copy of the parameter, vectorised where possible."""
    if recording.fallback == "error":
        raise UnsupportedOpError(
            f"{call.name}: no rule gives the gradient of {names_of(recording, shared)}, and fallback='error' forbids the slow way. "
            "Register one with `samplewise.rule`, or allow the fallback."
        )
    if op.inplace:
        raise UnsupportedOpError(
            f"{call.name}: has no rule, and an in-place op cannot be run sample by sample. Use it out of place."
        )
    copies = [_copies(recording, call, x) for x in shared]
    batched = [(x, axis) for x, axis in call.placed()]
    stacks = [_per_sample(x, axis, call.n) for x, axis in batched]

    def one(*pieces: Tensor) -> Any:
        new = dict(zip([id(x) for x in [*shared, *(x for x, _ in batched)]], pieces, strict=True))
        args, kwargs = replaced(call, new)
        return func(*args, **kwargs)

    with torch.no_grad():
        plain = func(*call.args, **call.kwargs)
    if not isinstance(plain, Tensor):
        raise UnsupportedOpError(f"{call.name}: has no rule, and the fallback knows ops with one tensor as result only.")
    try:
        each = torch.func.vmap(one, randomness="different")(*copies, *stacks)
    except (RuntimeError, ValueError, NotImplementedError):
        each = _looped(recording, call, one, [*copies, *stacks], shared)
    return _joined(recording, call, plain, each, shared)


def _looped(recording: Recorder, call: Call, one: Callable[..., Tensor], stacks: list[Tensor], shared: list[Tensor]) -> Tensor:
    try:
        return torch.stack([one(*pieces) for pieces in zip(*stacks, strict=True)])
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise MixedSamplesError(
            f"{call.name}: cannot be run sample by sample ({error}), so the gradient of {names_of(recording, shared)} cannot be split "
            "over samples. Move the sample axis to a place that the op keeps, or register a rule with `samplewise.rule`."
        ) from error


def _copies(recording: Recorder, call: Call, tensor: Tensor) -> Tensor:
    """One copy of a shared tensor per sample, `(n, *shape)`, without memory of its own."""
    source = source_of(recording, tensor)
    uses = recording.collector.expect(source, call.name, "fallback")

    def factors(grads: Grads, _: Sequence[Tensor]) -> list[tuple[Source, list[Use], Factor]]:
        grad = grads[0]
        assert grad is not None
        return [(source, uses, Dense(grad))]

    copies = tensor.detach().expand(call.n, *tensor.shape)
    return Enter.run(recording, factors, recording.anchor, copies)


def _per_sample(x: Tensor, axis: Axis, n: int) -> Tensor:
    """`(n, *shape)`: what each sample has of `x`, its axis kept with `outer * inner` entries."""
    if axis.ragged is not None:
        raise UnsupportedOpError("the fallback cannot run packed rows sample by sample; pad the sequence, or register a rule")
    grouped: Tensor = axis.rows(x, n).unflatten(0, (n, axis.outer * axis.inner))
    return grouped.movedim(1, axis.dim + 1)


def _joined(recording: Recorder, call: Call, plain: Tensor, each: Tensor, shared: list[Tensor]) -> Tensor:
    """The samples' results put together as the op itself would; refused where they are not the op's."""
    differ = [d for d in range(plain.ndim) if plain.shape[d] != each.shape[d + 1]] if plain.ndim == each.ndim - 1 else []
    if len(differ) == 1:
        (dim,) = differ
        out = each.movedim(0, dim).flatten(dim, dim + 1)
        if out.shape == plain.shape and torch.allclose(out.detach(), plain, rtol=1e-3, atol=1e-4, equal_nan=True):
            recording.declare(out, Axis(dim, 1, each.shape[dim + 1]))
            return out
    raise MixedSamplesError(
        f"{call.name}: run sample by sample it gives something else than on the batch (shapes {tuple(each.shape)} and "
        f"{tuple(plain.shape)}), so the gradient of {names_of(recording, shared)} cannot be split over samples. Use an op that "
        "treats samples alike, or register a rule with `samplewise.rule`."
    )
