"""Where a parameter meets the samples: by a rule, as a contraction, entering row by row, or by the fallback."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .axes import NOBODY, Axis, Call, Lost, swapped, tensors_in
from .by_rule import bind, by_rule, placed, slots_of, tap
from .collecting import Source, Uses
from .contractions import CONTRACTIONS, Contraction, contract, rows_first
from .entering import (
    WRITTEN,
    Function,
    Recorder,
    assign,
    enter,
    enter_aligned,
    enter_whole,
    names_of,
    replaced,
    spread_target,
    write_beside,
)
from .errors import SampleAxisError, UnsupportedOpError
from .factors import Factor
from .fallback import fall_back
from .places import place
from .registry import RULES, Operation, Rule, operation
from .running import in_backward
from .sample_axis import ALIGNED, FIRST, INDEXING, LOSSES
from .taps import Grads, Tap, seen


def mix(recording: Recorder, func: Function, op: Operation, call: Call, shared: list[Tensor]) -> Any:
    """Run a call in which shared tensors meet batched ones, so that their per-sample gradients are collected."""
    if call.n <= 1:
        return enter_whole(recording, func, op, call, shared)
    refusal = _refusal(recording, call, shared)
    if refusal is not None:
        return _postponed(recording, func, op, call, shared, refusal)
    onto = bool(call.args) and any(call.args[0] is x for x in shared) and call.name in WRITTEN
    # one sample's rows that are written between those of a parameter leave these to the others
    if call.sample() is not None and not onto:
        return enter_whole(recording, func, op, call, shared)
    if onto and not op.inplace:
        out = write_beside(recording, func, call)
        if out is not NotImplemented:
            return out
    if op.inplace and any(call.args[0] is x for x in shared):
        spread_target(recording, call)
        shared = [x for x in shared if x is not call.args[0]]
    if call.kwargs.get("out") is not None:
        raise UnsupportedOpError(
            f"{call.name}: `out=` cannot be recorded with {names_of(recording, shared)}. Use the result instead."
        )
    return _meet(recording, func, op, call, shared) if shared else func(*call.args, **call.kwargs)


def _meet(recording: Recorder, func: Function, op: Operation, call: Call, shared: list[Tensor]) -> Any:
    """By what the table says of the op: row by row, by a rule, as a product, or by the fallback."""
    lookup = _lookup(call, shared)
    if lookup is not None:
        with recording:
            return _look_up(*lookup)
    if op.name == "setitem":
        return assign(recording, func, call, shared)
    if call.name in ALIGNED or _unreduced(call):
        return enter_aligned(recording, func, call, shared)
    rule = _rule_of(op, call)
    if rule is not None and rule.apart is not None and recording.create_graph and _of_one_type(call):
        with recording:
            return rule.apart(*call.args, **call.kwargs)
    if rule is not None:
        arguments = bind(rule, call)
        slots, own = list(slots_of(arguments)), {id(x) for x in shared}
        batched = {name for name, _, x in slots if isinstance(call.known[id(x)], Axis)}
        if rule.covers(arguments, {name for name, _, x in slots if id(x) in own}, batched):
            return by_rule(recording, func, call, rule, arguments, slots, shared)
    if op.name in CONTRACTIONS:
        return _contract(recording, func, op, call, shared)
    return fall_back(recording, func, op, call, shared)


def _rule_of(op: Operation, call: Call) -> Rule | None:
    """The op's rule, unless it wants the samples first and they are not, or runs the op itself, which is to write in place."""
    rule = RULES.get(op.name)
    if rule is None or (op.inplace and rule.run is not None):
        return None
    return None if call.name in FIRST and any(axis.dim for _, axis in call.placed()) else rule


def _of_one_type(call: Call) -> bool:
    """Whether an op has the type of all its operands, as ops that it may be made of have."""
    return len({x.dtype for x in call.tensors}) == 1 and not torch.is_autocast_enabled(call.tensors[0].device.type)


def _lookup(call: Call, shared: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """`table[index]` or `table.index_select(0, index)` with a shared table and a batched index, if the call is one."""
    if call.name not in INDEXING or len(shared) > 1 or not call.args or call.args[0] is not shared[0]:
        return None
    index = call.get(1, "dim")
    if call.name == "index_select":
        index = call.get(2, "index") if index == 0 else None
    index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    whole = isinstance(index, Tensor) and index.dtype not in {torch.bool, torch.uint8}
    return (shared[0], index) if whole and isinstance(call.where(index), Axis) else None


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    rows = table if table.ndim == 2 else table.reshape(table.shape[0], -1)
    found = torch.embedding(rows, torch.where(index < 0, index + table.shape[0], index))
    return found if table.ndim == 2 else found.reshape(*index.shape, *table.shape[1:])


def _unreduced(call: Call) -> bool:
    """A loss per element, whose operands align like those of any elementwise op."""
    return call.name in LOSSES and call.get(LOSSES[call.name], "reduction", 1) == 0


def _refusal(recording: Recorder, call: Call, shared: list[Tensor]) -> SampleAxisError | None:
    """Why a meeting cannot be split over samples, if so."""
    for x in call.tensors:
        where = call.where(x)
        if isinstance(where, Lost):
            return SampleAxisError(
                f"{call.name}: the sample axis of an operand of shape {tuple(x.shape)} was lost in {where.op}, so the gradient of "
                f"{names_of(recording, shared)} cannot be split over samples. Keep the samples apart until after this op (concatenate "
                "features instead of samples, or run two views one after the other); if you know where the samples are, say so "
                "with `rec.batched(tensor, dim)`."
            )
        if isinstance(where, Axis) and where.ragged and NOBODY in where.ragged and call.sample() is None:
            return SampleAxisError(
                f"{call.name}: some rows of an operand of shape {tuple(x.shape)} belong to no sample (padding, or rows of a buffer that "
                f"nothing was written to), so the gradient of {names_of(recording, shared)} cannot be split over samples. Say whose they "
                "are with `rec.batched(tensor, dim, owners=...)`."
            )
    return None


def _postponed(
    recording: Recorder, func: Function, op: Operation, call: Call, shared: list[Tensor], refusal: SampleAxisError
) -> Any:
    """Run an op whose gradient cannot be split over samples; refuse when one arrives, for it may be a logged number only."""
    args, kwargs = replaced(call, {id(x): x.detach() for x in shared})
    # a recomputation has to save what the first pass did
    if op.inplace or call.kwargs.get("out") is not None or in_backward():
        raise refusal
    first = [where.refused for x in call.tensors if isinstance(where := call.where(x), Lost) and where.refused]
    message = first[0] if first else f"{refusal} This happened {place(recording.model)}."
    out = func(*args, **kwargs)

    def factors(_: Grads, __: Sequence[Tensor]) -> list[tuple[Source, Uses, Factor]]:
        raise SampleAxisError(message)

    outs = [x for x in tensors_in(out) if x.is_floating_point() or x.is_complex()]
    # a tap writes to its tensor, as autograd sees it, and the op's own backward may need the result
    own = [x.clone() for x in outs]
    tapped = Tap.run(recording, factors, recording.anchor, own, []) if own else []
    for x in tapped:
        recording.declare(x, Lost(call.name, refused=message))
    return swapped(out, dict(zip(map(id, outs), tapped, strict=True)))


def _contract(recording: Recorder, func: Function, op: Operation, call: Call, shared: list[Tensor]) -> Any:
    """A matrix product, einsum and the like: outer products of the result's gradient with the other operands."""
    product = CONTRACTIONS[call.name](call.args, call.kwargs)
    several = recording.create_graph and recording.fallback == "allow" and len(_wanted(product, shared)) > 1
    if several or any(len(set(names)) < len(names) for names in product.letters):
        # each sample with a copy of its own has all derivatives
        return fall_back(recording, func, op, call, shared)
    letter, axis, rows = _sample_letter(recording, call, product, shared)
    new: dict[int, Tensor] = {}
    if product.addend is not None and any(product.addend is x for x in shared):
        frame = axis.at(product.result.index(letter))
        new[id(product.addend)] = enter(recording, call, product.addend, frame, len(product.result), rows)
    for x, names in zip(product.operands, product.letters, strict=True):
        if any(x is s for s in shared) and letter in names and x.shape[names.index(letter)] == rows:
            own = axis.at(names.index(letter))
            new[id(x)] = enter(recording, call, x, own, x.ndim, rows)
    rest = [x for x in shared if id(x) not in new]
    args, kwargs = replaced(call, {**new, **{id(x): seen(recording, x) for x in rest}})
    out = func(*args, **kwargs)
    if not rest:
        return out
    operands = [new.get(id(x), x) for x in product.operands]
    axes = {
        id(x): axis.at(names.index(letter))
        for x, names in zip(operands, product.letters, strict=True)
        if letter in names and x.shape[names.index(letter)] == rows and not any(x is r for r in rest)
    }
    # parameters, and what broadcasts over the samples, stay as they are
    letters = [
        rows_first(names, letter) if id(x) in axes else names for x, names in zip(operands, product.letters, strict=True)
    ]
    wanted = _wanted(product, shared) if recording.create_graph else []
    to = wanted[0] if len(wanted) == 1 else -1
    arguments = {
        "equation": (*letters, rows_first(product.result, letter)),
        "operands": operands,
        "given": (*product.letters, product.result),
        "to": to,
        "alpha": product.alpha,
    }
    led_to = None if to < 0 else operands[to]
    return tap(recording, call, RULES[operation(contract).name], arguments, list(slots_of(arguments)), axes, rest, out, led_to)


def _wanted(product: Contraction, shared: list[Tensor]) -> list[int]:
    """The operands with samples that have a gradient, -1 for what is added; none under autocast, where types are others."""
    if torch.is_autocast_enabled(product.operands[0].device.type):
        return []
    others = [*enumerate(product.operands), *([] if product.addend is None else [(-1, product.addend)])]
    return [k for k, x in others if x.requires_grad and not any(x is s for s in shared)]


def _sample_letter(recording: Recorder, call: Call, product: Contraction, shared: list[Tensor]) -> tuple[str, Axis, int]:
    """The letter of the sample axis, how samples lie on it, and its size."""
    for x, names in zip(product.operands, product.letters, strict=True):
        axis = call.where(x)
        if isinstance(axis, Axis):
            letter, size = names[axis.dim], x.shape[axis.dim]
            break
    else:
        assert product.addend is not None
        axis = call.where(product.addend)
        assert isinstance(axis, Axis)
        letter = product.result[axis.dim + len(product.result) - product.addend.ndim]
        size = product.addend.shape[axis.dim]
    if letter not in product.result:
        shape = [1] * len(product.result)
        placed(recording, call, call.tensors[0].new_empty(shape), shared)
    return letter, axis, size
