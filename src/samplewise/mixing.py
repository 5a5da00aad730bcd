"""Where a parameter meets the samples: by a rule, as a contraction, entering row by row, or by the fallback."""

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .axes import NOBODY, Axis, Call, Lost, swapped, tensors_in
from .collecting import Source, Use
from .contractions import CONTRACTIONS, Contraction, contract, rows_first
from .entering import (
    Function,
    Recorder,
    assign,
    enter,
    enter_aligned,
    enter_whole,
    names_of,
    replaced,
    source_of,
    spread_target,
)
from .errors import SampleAxisError, UnsupportedOpError
from .factors import Factor
from .fallback import fall_back
from .places import place
from .registry import RULES, Operation, Rule, operation
from .remembered import key_of_meeting
from .running import in_backward, unrecorded
from .sample_axis import ALIGNED, FIRST, INDEXING, LOSSES, follow
from .taps import Grads, Tap, seen


def mix(recording: Recorder, func: Function, op: Operation, call: Call, shared: list[Tensor]) -> Any:
    """Run a call in which shared tensors meet batched ones, so that their per-sample gradients are collected."""
    if call.n <= 1:
        return enter_whole(recording, func, op, call, shared)
    refusal = _refusal(recording, call, shared)
    if refusal is not None:
        return _postponed(recording, func, op, call, shared, refusal)
    if call.sample() is not None:
        return enter_whole(recording, func, op, call, shared)
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
    rule = RULES.get(op.name)
    if rule is not None and not (call.name in FIRST and any(axis.dim for _, axis in call.placed())):
        arguments = _bind(rule, call)
        slots, own = list(_slots(arguments)), {id(x) for x in shared}
        batched = {name for name, _, x in slots if isinstance(call.known[id(x)], Axis)}
        if rule.covers({name for name, _, x in slots if id(x) in own}, batched):
            return _by_rule(recording, func, call, rule, arguments, slots, shared)
    if op.name in CONTRACTIONS:
        return _contract(recording, func, call, shared)
    return fall_back(recording, func, op, call, shared)


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

    def factors(_: Grads, __: Sequence[Tensor]) -> list[tuple[Source, list[Use], Factor]]:
        raise SampleAxisError(message)

    outs = [x for x in tensors_in(out) if x.is_floating_point() or x.is_complex()]
    own = [_no_view(x) for x in outs]
    tapped = Tap.run(recording, factors, recording.anchor, own, []) if own else []
    for x in tapped:
        recording.declare(x, Lost(call.name, refused=message))
    return swapped(out, dict(zip(map(id, outs), tapped, strict=True)))


# More than a model has; with shapes that never come back memory must not grow.
_MOST_MEETINGS = 20_000
# (argument, place in its list, tensor) for every tensor among a rule's arguments
Slots = Sequence[tuple[str, int | None, Tensor]]


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor argument of a rule until the backward: where it is kept, and which axis has the rows."""

    place: int | Tensor  # among the saved tensors, or a meta tensor for a value the rule does not need
    axis: Axis | None

    def filled(self, saved: Sequence[Tensor], n: int, dtype: torch.dtype) -> Tensor:
        """The tensor as the rule sees it."""
        tensor = saved[self.place] if isinstance(self.place, int) else self.place
        own = tensor.dtype
        if own is not dtype and own.is_floating_point:
            # under autocast an op computes in another type than its arguments have
            tensor = tensor.to(dtype)
        if own.is_complex:
            # gradients are products with the conjugates of the other operands (the convention of torch.autograd)
            tensor = tensor.conj()
        return tensor if self.axis is None else self.axis.rows(tensor, n)


def _bind(rule: Rule, call: Call) -> dict[str, Any]:
    if len(call.args) > len(rule.arguments):
        raise UnsupportedOpError(
            f"{call.name}: called with {len(call.args)} arguments, its rule knows {', '.join(rule.arguments)}. Add the others "
            "to the rule, with the op's own names and defaults."
        )
    arguments = {**dict(zip(rule.arguments, call.args, strict=False)), **call.kwargs}
    unknown = set(arguments) - set(rule.arguments)
    if unknown:
        raise UnsupportedOpError(
            f"{call.name}: its rule does not know the argument {', '.join(sorted(unknown))}. Add it to the rule, with the op's own name "
            "and default."
        )
    return arguments


def _slots(arguments: Mapping[str, Any]) -> Iterator[tuple[str, int | None, Tensor]]:
    """(argument, place in its list, tensor) for every tensor among the arguments."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, None, value
        elif isinstance(value, list | tuple):
            yield from ((name, k, x) for k, x in enumerate(value) if isinstance(x, Tensor))


def _by_rule(
    recording: Recorder, func: Function, call: Call, rule: Rule, arguments: dict[str, Any], slots: Slots, shared: list[Tensor]
) -> Any:
    """Run the op on detached parameters and tap its results."""
    args, kwargs = replaced(call, {id(x): seen(recording, x) for x in shared})
    axes, led_to = {id(x): axis for x, axis in call.placed()}, _own_input(recording, rule, arguments, slots, shared)
    if rule.run is None:
        out = func(*args, **kwargs)
    else:
        with torch.set_grad_enabled(led_to is None):
            out, statistics = rule.run(*args, **kwargs)
        if statistics:
            arguments = {**arguments, "statistics": statistics}
            slots = [*slots, *(("statistics", k, x) for k, x in enumerate(statistics))]
            axes.update((id(x), call.placed()[0][1]) for x in statistics)
    return _tap(recording, call, rule, arguments, slots, axes, shared, out, led_to)


def _own_input(
    recording: Recorder, rule: Rule, arguments: Mapping[str, Any], slots: Slots, shared: list[Tensor]
) -> Tensor | None:
    """The argument that the rule's own backward leads to, where that is all of the op's backward."""
    first, own = arguments[rule.arguments[0]], {id(x) for x in shared}
    if rule.back is None or recording.create_graph or torch.is_autocast_enabled(first.device.type):
        return None
    wanted = [x for _, _, x in slots if x.requires_grad and id(x) not in own]
    return first if len(wanted) == 1 and wanted[0] is first else None


def _tap(
    recording: Recorder,
    call: Call,
    rule: Rule,
    arguments: dict[str, Any],
    slots: Slots,
    axes: Mapping[int, Axis],
    shared: list[Tensor],
    out: Any,
    input: Tensor | None = None,
) -> Any:
    out = _no_view(out) if isinstance(out, Tensor) else swapped(out, {id(x): _no_view(x) for x in tensors_in(out)})
    outs = [out] if isinstance(out, Tensor) else [x for x in tensors_in(out) if x.is_floating_point() or x.is_complex()]
    places, own = [_placed(recording, call, x, shared) for x in outs], {id(x) for x in shared}
    wanted = [(name, k, x) for name, k, x in slots if id(x) in own]
    needed = rule.saved_for({name for name, _, _ in wanted}) | set(rule.saved_for_back if input is not None else ())
    plain, held, saved = _held(recording, arguments, slots, needed, axes)
    sources = [(name, k, source_of(recording, x)) for name, k, x in wanted]
    keeps_out = "out" in needed
    back = () if input is None else tuple(held[name].place for name in rule.saved_for_back)
    tapped = _tapped(
        recording, call.name, call.n, rule, plain, held, saved, sources, outs, places, input, back, keeps_out=keeps_out
    )
    if isinstance(out, Tensor) and not keeps_out:
        _remember(recording, call, rule, held, saved, sources, places[0], None if input is None else back)
    return tapped[0] if isinstance(out, Tensor) else swapped(out, dict(zip(map(id, outs), tapped, strict=True)))


Sources = Sequence[tuple[str, int | None, Source]]


def _tapped(
    recording: Recorder,
    op: str,
    n: int,
    rule: Rule,
    plain: dict[str, Any],
    slots: Mapping[str, Any],
    saved: list[Tensor],
    sources: Sources,
    outs: list[Tensor],
    places: list[Axis],
    input: Tensor | None = None,
    back: tuple[int, ...] = (),
    *,
    keeps_out: bool = False,
) -> list[Tensor]:
    """Tap the results of a call, with its arguments apart: plain values, and slots for tensors.

    The closure must not hold its tensors: they would outlive the graph, past every saved-tensor hook.
    """
    uses = [recording.collector.expect(source, op, "rule") for *_, source in sources]
    count = len(outs)

    def factors(grads: Grads, saved: Sequence[Tensor]) -> list[tuple[Source, list[Use], Factor]]:
        rows = [None if g is None else axis.rows(g, n) for g, axis in zip(grads, places, strict=True)]
        results = [axis.rows(x, n) for x, axis in zip(saved[-count:], places, strict=True)] if keeps_out else [None] * count
        dtype = next(g.dtype for g in grads if g is not None)
        filled = {name: _filled(value, saved, n, dtype) for name, value in slots.items()}
        single = count == 1
        try:
            found = rule.function(rows[0] if single else rows, results[0] if single else results, **plain, **filled)
        except NotImplementedError as error:
            names = ", ".join(sorted(name for *_, source in sources for name in source.names))
            raise UnsupportedOpError(f"{error} (parameter {names})") from error
        return [
            (source, use, _checked(op, found, name, k, source).regroup(n))
            for (name, k, source), use in zip(sources, uses, strict=True)
        ]

    def own(grad: Tensor, saved: Sequence[Tensor]) -> Tensor:
        assert rule.back is not None
        with unrecorded():
            return rule.back(grad, *(saved[k] for k in back))

    kept = [*saved, *outs] if keeps_out else saved
    tapped = Tap.run(recording, factors, recording.anchor, outs, kept, input, None if input is None else own)
    for x, axis in zip(tapped, places, strict=True):
        if not Tap.is_on(x):
            names = ", ".join(sorted(name for *_, source in sources for name in source.names))
            raise UnsupportedOpError(
                f"{op}: gave a {type(x).__name__}, a subclass of tensors whose gradient does not reach the recording, so that of {names} "
                "would be missing. Give the model plain tensors: `x.as_subclass(torch.Tensor)`."
            )
        recording.declare(x, axis)
    return tapped


@dataclass(frozen=True)
class Meeting:
    """What was decided of a call by a rule, for all calls like it: with tensors and plain values, given by position."""

    rule: Rule
    n: int
    # the arguments that are parameters, by name and position
    shared: tuple[tuple[str, int], ...]
    # the positions of the arguments that are saved; after them come the statistics that the rule keeps
    saved: tuple[int, ...]
    statistics: int
    # the arguments without tensors, by name and position, and slots for the others
    plain: tuple[tuple[str, int], ...]
    slots: Mapping[str, Any]
    place: Axis
    # where the rule's own backward finds what it needs among what is saved; None where torch's is taken
    back: tuple[int, ...] | None


_MEETINGS: dict[Hashable, Meeting] = {}


def meeting_before(recording: Recorder, op: Operation, args: tuple[Any, ...], n: int | None) -> Meeting | None:
    """What was decided of a call like this one, of an op with a rule."""
    if n is None or n <= 1 or recording.create_graph or not torch.is_grad_enabled():
        return None
    found = _MEETINGS.get(key_of_meeting(op.name, n, args, recording.kind, recording.sources))
    return found if found is not None and found.rule is RULES[op.name] else None


def meet_again(recording: Recorder, func: Function, op: Operation, meeting: Meeting, args: tuple[Any, ...]) -> Any:
    """Run a call whose like was decided before."""
    values, rule = list(args), meeting.rule
    for _, k in meeting.shared:
        values[k] = args[k].detach()
    out: Any
    statistics: Sequence[Tensor] = ()
    if rule.run is None:
        out = func(*values)
    else:
        with torch.set_grad_enabled(meeting.back is None):
            out, statistics = rule.run(*values)
    plain = {name: args[k] for name, k in meeting.plain}
    saved = [*(values[k] for k in meeting.saved), *statistics[: meeting.statistics]]
    sources = [(name, None, recording.sources[id(args[k])]) for name, k in meeting.shared]
    led_to, back = (None, ()) if meeting.back is None else (args[0], meeting.back)
    outs, places = [_no_view(out)], [meeting.place]
    return _tapped(recording, op.name, meeting.n, rule, plain, meeting.slots, saved, sources, outs, places, led_to, back)[0]


def _remember(
    recording: Recorder,
    call: Call,
    rule: Rule,
    held: Mapping[str, Any],
    saved: list[Tensor],
    sources: Sources,
    place: Axis,
    back: tuple[int, ...] | None,
) -> None:
    """Keep what was decided, if all that decided it is in the key."""
    if (
        call.kwargs
        or RULES.get(call.name) is not rule
        or recording.create_graph
        or place.ragged is not None
        or place.chosen is not None
    ):
        return
    key = key_of_meeting(call.name, call.n, call.args, recording.kind, recording.sources)
    where = {name: k for k, name in enumerate(rule.arguments[: len(call.args)])}
    given = [name for name, k in where.items() if isinstance(call.args[k], Tensor)]
    own = sorted((slot.place, where[name]) for name in given if isinstance((slot := held[name]).place, int))
    statistics = held.get("statistics", ()) if rule.run is not None else ()
    kept = sum(isinstance(slot.place, int) for slot in statistics)
    if key is None or len(own) + kept != len(saved) or not all(k is None and name in where for name, k, _ in sources):
        return
    if len(_MEETINGS) >= _MOST_MEETINGS:
        _MEETINGS.clear()
    shared, plain = [(name, where[name]) for name, *_ in sources], [(name, k) for name, k in where.items() if name not in held]
    _MEETINGS[key] = Meeting(rule, call.n, tuple(shared), tuple(k for _, k in own), kept, tuple(plain), held, place, back)


def _held(
    recording: Recorder,
    arguments: Mapping[str, Any],
    tensors: Slots,
    needed: set[str],
    axes: Mapping[int, Axis],
) -> tuple[dict[str, Any], dict[str, Any], list[Tensor]]:
    """A rule's arguments without tensors, the others with slots for them, and what has to be saved; parameters detached."""
    saved: list[Tensor] = []
    slots: dict[int, Slot] = {}
    for name, _, x in tensors:
        axis = axes.get(id(x))
        if name in needed:
            slots[id(x)] = Slot(len(saved), axis)
            saved.append(x if axis is not None else seen(recording, x))
        elif id(x) not in slots:
            slots[id(x)] = Slot(_stand_in(x.shape, x.stride(), x.dtype), axis)
    names = {name for name, _, _ in tensors}
    plain = {name: value for name, value in arguments.items() if name not in names}
    held = {name: swapped(value, slots) for name, value in arguments.items() if name in names}
    return plain, held, saved


@functools.lru_cache(maxsize=4096)
def _stand_in(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """For a tensor whose values a rule does not need."""
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _filled(value: Any, saved: Sequence[Tensor], n: int, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_filled(item, saved, n, dtype) for item in value)
    return value.filled(saved, n, dtype) if isinstance(value, Slot) else value


def _no_view(out: Tensor) -> Tensor:
    """The same memory, known to autograd as a tensor of its own: in-place ops may follow a tap, but not on a view."""
    # a 3-D F.linear with bias returns a view of its 2-D product
    own: Tensor = torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out  # noqa: SLF001
    return own


def _placed(recording: Recorder, call: Call, out: Tensor, shared: list[Tensor]) -> Axis:
    where = follow(call, out)
    if not isinstance(where, Axis):
        raise SampleAxisError(
            f"{call.name}: brings the samples together, so the gradient of {names_of(recording, shared)} cannot be split over them: "
            f"operands of shapes {', '.join(str(tuple(x.shape)) for x in call.tensors)}, samples on axis "
            f"{', '.join(str(axis.dim) for _, axis in call.placed())}. Move the sample axis to a place that the op keeps, "
            "or check `batch_dim`."
        )
    return where


def _checked(op: str, found: Mapping[str, Any], name: str, place: int | None, source: Source) -> Factor:
    factor = found.get(name)
    factor = factor[place] if isinstance(factor, list) and place is not None else factor
    factor = factor() if callable(factor) else factor
    if not isinstance(factor, Factor):
        raise UnsupportedOpError(
            f"{op}: its rule gives no factor for '{name}' ({', '.join(sorted(source.names))}), got {type(factor).__name__}. "
            "Return {'" + name + "': Factor} from the rule, or freeze the parameter."
        )
    if factor.shape != source.shape:
        raise UnsupportedOpError(
            f"{op}: its rule gives '{name}' ({', '.join(sorted(source.names))}) a gradient of shape {tuple(factor.shape)}, expected "
            f"{tuple(source.shape)}. Return a factor of the parameter's own shape, summed over what the op broadcasts."
        )
    return factor


def _contract(recording: Recorder, func: Function, call: Call, shared: list[Tensor]) -> Any:
    """A matrix product, einsum and the like: outer products of the result's gradient with the other operands."""
    product = CONTRACTIONS[call.name](call.args, call.kwargs)
    if any(len(set(names)) < len(names) for names in product.letters):
        return fall_back(recording, func, Operation(call.name, inplace=False, source=None, plain_property=False), call, shared)
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
    arguments = {"equation": (*letters, rows_first(product.result, letter)), "operands": operands, "alpha": product.alpha}
    return _tap(recording, call, RULES[operation(contract).name], arguments, list(_slots(arguments)), axes, rest, out)


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
        _placed(recording, call, call.tensors[0].new_empty(shape), shared)
    return letter, axis, size
