"""A call by its rule: run, its results tapped, and what was decided of it remembered for calls like it."""

import contextlib
import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .axes import Axis, Call, swapped, tensors_in
from .collecting import Source, Uses
from .entering import Function, Recorder, names_of, replaced, source_of
from .errors import SampleAxisError, UnsupportedOpError
from .factors import Factor
from .products import unobserved
from .registry import PASSED_ON, RULES, Operation, Rule, operation
from .remembered import key_of_meeting
from .running import unrecorded
from .sample_axis import follow
from .taps import Grads, Tap, seen

# More than a model has; with shapes that never come back memory must not grow.
_MOST_MEETINGS = 20_000
# Below what notes graphs and views: a view of an op's own product is then nobody's view.
_PLAINLY = torch._C._AutoDispatchBelowADInplaceOrView  # noqa: SLF001
_AS_EVER = contextlib.nullcontext()
# (argument, place in its list, tensor) for every tensor among a rule's arguments
Slots = Sequence[tuple[str, int | None, Tensor]]


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor argument of a rule until the backward: where it is kept, and which axis has the rows."""

    place: int | Tensor  # among the saved tensors, or a meta tensor for a value the rule does not need
    axis: Axis | None
    # whether the rule takes it as it is: of the gradients' own type, not complex, with its rows in front
    straight: bool
    # whether it keeps a type of its own: what the op found, in better than half precision perhaps
    own_type: bool = False

    def filled(self, saved: Sequence[Tensor], n: int, dtype: torch.dtype) -> Tensor:
        """The tensor as the rule sees it."""
        tensor = saved[self.place] if isinstance(self.place, int) else self.place
        if self.straight:
            return tensor
        own = tensor.dtype
        if own is not dtype and own.is_floating_point and not self.own_type:
            # under autocast an op computes in another type than its arguments have
            tensor = tensor.to(dtype)
        if own.is_complex:
            # gradients are products with the conjugates of the other operands (the convention of torch.autograd)
            tensor = tensor.conj()
        return tensor if self.axis is None else self.axis.rows(tensor, n)


def bind(rule: Rule, call: Call) -> dict[str, Any]:
    """The arguments of a call by their names."""
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


def slots_of(arguments: Mapping[str, Any]) -> Iterator[tuple[str, int | None, Tensor]]:
    """(argument, place in its list, tensor) for every tensor among the arguments."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, None, value
        elif isinstance(value, list | tuple):
            yield from ((name, k, x) for k, x in enumerate(value) if isinstance(x, Tensor))


def by_rule(
    recording: Recorder, func: Function, call: Call, rule: Rule, arguments: dict[str, Any], slots: Slots, shared: list[Tensor]
) -> Any:
    """Run the op on detached parameters and tap its results."""
    args, kwargs = replaced(call, {id(x): seen(recording, x) for x in shared})
    axes, led_to = {id(x): axis for x, axis in call.placed()}, _own_input(recording, rule, arguments, slots, shared)
    out, statistics = _run(func, rule, args, kwargs, graph=led_to is None or recording.create_graph)
    if statistics and rule.takes_statistics:
        arguments = {**arguments, "statistics": statistics}
        slots = [*slots, *(("statistics", k, x) for k, x in enumerate(statistics))]
        axes.update((id(x), call.placed()[0][1]) for x in statistics)
    return tap(recording, call, rule, arguments, slots, axes, shared, out, led_to)


def _run(
    func: Function, rule: Rule, args: Sequence[Any], kwargs: Mapping[str, Any], *, graph: bool
) -> tuple[Any, Sequence[Tensor]]:
    """The op as its rule runs it, with a graph of its own or without; its result and statistics."""
    if rule.run is None:
        return func(*args, **kwargs), ()
    if graph:
        return rule.run(*args, **kwargs)
    with unrecorded(), _PLAINLY() if unobserved(*args) else _AS_EVER:
        return rule.run(*args, **kwargs)


def _own_input(
    recording: Recorder, rule: Rule, arguments: Mapping[str, Any], slots: Slots, shared: list[Tensor]
) -> Tensor | None:
    """The argument that the rule's own backward leads to, where that is all of the op's backward."""
    if rule.back is None or not (rule.run or recording.create_graph):
        return None
    first, own = arguments[rule.samples], {id(x) for x in shared}
    wanted = [x for _, _, x in slots if x.requires_grad and id(x) not in own]
    alone = len(wanted) == 1 and wanted[0] is first
    return first if alone and not torch.is_autocast_enabled(first.device.type) else None


def tap(
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
    """Tap the results of an op that ran; `input` is the argument that the rule's own backward leads to."""
    out = no_view(out) if isinstance(out, Tensor) else swapped(out, {id(x): no_view(x) for x in tensors_in(out)})
    outs = [out] if isinstance(out, Tensor) else [x for x in tensors_in(out) if x.is_floating_point() or x.is_complex()]
    places, own = [placed(recording, call, x, shared) for x in outs], {id(x) for x in shared}
    # the types of the gradients to come
    dtypes = {x.dtype for x in outs}
    wanted = [(name, k, x) for name, k, x in slots if id(x) in own]
    needed = rule.saved_for({name for name, _, _ in wanted}) | set(rule.saved_for_back if input is not None else ())
    found = "statistics" if rule.run is not None else None
    plain, held, saved = _held(recording, arguments, slots, needed, axes, dtypes, found)
    sources = [source_of(recording, x) for *_, x in wanted]
    back = None if input is None else tuple(_place(held[name]) for name in rule.saved_for_back if name in held)
    straight = {name: slot for name, slot in held.items() if isinstance(slot, Slot) and slot.straight}
    decision = Decision(
        call.name,
        call.n,
        rule,
        [(name, k) for name, k, _ in wanted],
        {name: slot.place for name, slot in straight.items() if isinstance(slot.place, int)},
        {name: slot.place for name, slot in straight.items() if isinstance(slot.place, Tensor)},
        {name: value for name, value in held.items() if name not in straight},
        places,
        back,
        keeps_out="out" in needed,
    )
    awaited = Awaited(decision, plain, sources)
    tapped = awaited.tap(recording, outs, saved, input)
    if isinstance(out, Tensor) and not decision.keeps_out:
        _remember(recording, call, awaited, held, len(saved))
    return tapped[0] if isinstance(out, Tensor) else swapped(out, dict(zip(map(id, outs), tapped, strict=True)))


@dataclass(frozen=True)
class Decision:
    """What is decided of a call by a rule, and holds for every call like it."""

    op: str
    n: int
    rule: Rule
    # the arguments with a gradient, with their places in a list
    wanted: Sequence[tuple[str, int | None]]
    # the tensors that the rule takes as they are: where they are among what is saved, or stand-ins
    kept: Mapping[str, int]
    stand_ins: Mapping[str, Tensor]
    # slots for the other arguments with tensors
    slots: Mapping[str, Any]
    # where the samples are in each result
    places: Sequence[Axis]
    # where the rule's own backward finds what it needs among what is saved; None where torch's is taken
    back: tuple[Any, ...] | None
    keeps_out: bool

    def rows(self, tensors: Grads) -> Grads:
        """The results, or their gradients, with the rows of the samples in front."""
        return [None if x is None else axis.rows(x, self.n) for x, axis in zip(tensors, self.places, strict=True)]

    def filled(self, saved: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """The arguments with tensors."""
        filled: dict[str, Any] = dict(self.stand_ins)
        for name, place in self.kept.items():
            filled[name] = saved[place]
        for name, value in self.slots.items():
            filled[name] = _filled(value, saved, self.n, dtype)
        return filled


class Awaited:
    """A call by a rule whose gradients are to come: all that is known of it but its tensors.

    They would outlive the graph, past every saved-tensor hook, so they come with the gradients: slots say which is which.
    """

    __slots__ = ("decision", "plain", "sources", "uses")

    def __init__(self, decision: Decision, plain: Mapping[str, Any], sources: Sequence[Source]) -> None:
        # `plain`: the arguments without tensors; `sources`: of the wanted ones
        self.decision, self.plain, self.sources = decision, plain, sources
        self.uses: Sequence[Uses] = ()  # of each source

    def tap(self, recording: Recorder, outs: list[Tensor], saved: list[Tensor], input: Tensor | None) -> list[Tensor]:
        """Tap the results; `input` is the argument that the rule's own backward leads to."""
        decided = self.decision
        self.uses = recording.collector.expect(self.sources, decided.op, "rule")
        kept = [*saved, *outs] if decided.keeps_out else saved
        back = None if decided.back is None else self.input_grad
        if back is not None and recording.create_graph:
            back = functools.partial(self.input_grad_again, recording)
        tapped = Tap.run(recording, self.factors, recording.anchor, outs, kept, input, back)
        for x, axis in zip(tapped, decided.places, strict=True):
            if not Tap.is_on(x):
                raise UnsupportedOpError(
                    f"{decided.op}: gave a {type(x).__name__}, a subclass of tensors whose gradient does not reach the recording, so that "
                    f"of {self._names()} would be missing. Give the model plain tensors: `x.as_subclass(torch.Tensor)`."
                )
            recording.declare(x, axis)
        return tapped

    def factors(self, grads: Grads, saved: Sequence[Tensor]) -> list[tuple[Source, Uses, Factor]]:
        """The factors of all uses."""
        decided = self.decision
        rows = decided.rows(grads)
        results = decided.rows(saved[-len(rows) :]) if decided.keeps_out else [None] * len(rows)
        first = grads[0] if grads[0] is not None else next(g for g in grads if g is not None)
        given = (rows[0], results[0]) if len(rows) == 1 else (rows, results)
        try:
            found = decided.rule.function(*given, **self.plain, **decided.filled(saved, first.dtype))
            return [
                (source, uses, _checked(decided, found, name, k, source))
                for (name, k), source, uses in zip(decided.wanted, self.sources, self.uses, strict=True)
            ]
        except NotImplementedError as error:
            raise UnsupportedOpError(f"{error} (parameter {self._names()})") from error

    def input_grad(self, grad: Tensor, saved: Sequence[Tensor]) -> Tensor:
        """The gradient of the input, by the rule's own backward."""
        rule, places = self.decision.rule, self.decision.back or ()
        assert rule.back is not None
        numbers = {name: self.plain[name] for name in rule.saved_for_back if name in self.plain} if self.plain else {}
        return rule.back(grad, *(saved[k] if type(k) is int else [saved[j] for j in k] for k in places), **numbers)

    def input_grad_again(self, recording: Recorder, grad: Tensor, saved: Sequence[Tensor]) -> Tensor:
        """The same by ops that may be recorded themselves."""
        return self.input_grad(recording.gradient_on(self.decision.places[0], grad), saved)

    def _names(self) -> str:
        return ", ".join(sorted(name for source in self.sources for name in source.names))


@dataclass(frozen=True)
class Meeting:
    """How a call is taken that is like one before: with tensors and plain values, given by position."""

    decision: Decision
    # the positions of the arguments that are parameters, as they are wanted
    shared: tuple[int, ...]
    # the positions of the arguments that are saved; after them come the statistics that the rule keeps
    saved: tuple[int, ...]
    statistics: int
    # the arguments without tensors, by name and position
    plain: tuple[tuple[str, int], ...]
    # the position of the argument that the rule's own backward leads to; None where torch's is taken
    led_to: int | None


_MEETINGS: dict[Hashable, Meeting] = {}


def as_before(recording: Recorder, func: Function, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a call by a rule that is like one before; NotImplemented for any other."""
    if op.source is not None and func in PASSED_ON:
        # it has no rule of its own, and what it checks held for the call before
        func, args = PASSED_ON[func](*args, **kwargs)
        op = operation(func)
    elif kwargs or op.inplace or op.name not in RULES:
        return NotImplemented
    meeting = _meeting_before(recording, op.name, args)
    return NotImplemented if meeting is None else _meet_again(recording, func, meeting, args)


def _meeting_before(recording: Recorder, name: str, args: tuple[Any, ...]) -> Meeting | None:
    """What was decided of a call like this one, of an op with a rule."""
    n = recording.n
    if n is None or n <= 1 or recording.create_graph or not torch.is_grad_enabled():
        return None
    found = _MEETINGS.get(key_of_meeting(name, n, args, recording.kind, recording.sources))
    return found if found is not None and found.decision.rule is RULES.get(name) else None


def _meet_again(recording: Recorder, func: Function, meeting: Meeting, args: tuple[Any, ...]) -> Any:
    """Run a call whose like was decided before."""
    values, sources = list(args), list[Source]()
    for k in meeting.shared:
        values[k] = args[k].detach()
        sources.append(recording.sources[id(args[k])])
    out, statistics = _run(func, meeting.decision.rule, values, {}, graph=meeting.led_to is None)
    if len(statistics) < meeting.statistics:
        # it kept more before
        return NotImplemented
    saved = [values[k] for k in meeting.saved]
    if meeting.statistics:
        saved += statistics[: meeting.statistics]
    awaited = Awaited(meeting.decision, {name: args[k] for name, k in meeting.plain}, sources)
    return awaited.tap(recording, [no_view(out)], saved, None if meeting.led_to is None else args[meeting.led_to])[0]


def _remember(recording: Recorder, call: Call, awaited: Awaited, held: Mapping[str, Any], saved: int) -> None:
    """Keep what was decided, if all that decided it is in the key."""
    decision = awaited.decision
    rule, (place,) = decision.rule, decision.places
    plain_place = place.ragged is None and place.chosen is None
    if call.kwargs or RULES.get(call.name) is not rule or recording.create_graph or not plain_place:
        return
    key = key_of_meeting(call.name, call.n, call.args, recording.kind, recording.sources)
    where = {name: k for k, name in enumerate(rule.arguments[: len(call.args)])}
    given = [name for name, k in where.items() if isinstance(call.args[k], Tensor)]
    own = sorted((slot.place, where[name]) for name in given if isinstance((slot := held[name]).place, int))
    statistics = held.get("statistics", ()) if rule.run is not None else ()
    kept = sum(isinstance(slot.place, int) for slot in statistics)
    # an argument given twice is kept once, and two that are not the same would be mistaken for it
    alike = len({place for place, _ in own}) < len(own)
    if key is None or alike or len(own) + kept != saved or not all(k is None and name in where for name, k in decision.wanted):
        return
    if len(_MEETINGS) >= _MOST_MEETINGS:
        _MEETINGS.clear()
    shared = [where[name] for name, _ in decision.wanted]
    plain = [(name, k) for name, k in where.items() if name not in held]
    led_to = None if decision.back is None else rule.arguments.index(rule.samples)
    _MEETINGS[key] = Meeting(decision, tuple(shared), tuple(k for _, k in own), kept, tuple(plain), led_to)


def _held(
    recording: Recorder,
    arguments: Mapping[str, Any],
    tensors: Slots,
    needed: set[str],
    axes: Mapping[int, Axis],
    dtypes: set[torch.dtype],
    found: str | None,
) -> tuple[dict[str, Any], dict[str, Any], list[Tensor]]:
    """A rule's arguments without tensors, the others with slots for them, and what has to be saved; parameters detached.

    `found`: the argument that the op itself found.
    """
    saved: list[Tensor] = []
    slots: dict[int, Slot] = {}
    for name, _, x in tensors:
        axis = axes.get(id(x))
        straight = (name == found or dtypes == {x.dtype}) and not x.is_complex() and (axis is None or axis.leads)
        if name in needed:
            slots[id(x)] = Slot(len(saved), axis, straight, own_type=name == found)
            # a derivative of the op's own backward meets the parameter itself
            saved.append(x if axis is not None or recording.create_graph else x.detach())
        elif id(x) not in slots:
            slots[id(x)] = Slot(_stand_in(x.shape, x.stride(), x.dtype), axis, straight)
    names = {name for name, _, _ in tensors}
    plain = {name: value for name, value in arguments.items() if name not in names}
    held = {name: swapped(value, slots) for name, value in arguments.items() if name in names}
    return plain, held, saved


@functools.lru_cache(maxsize=4096)
def _stand_in(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """For a tensor whose values a rule does not need."""
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _filled(value: Any, saved: Sequence[Tensor], n: int, dtype: torch.dtype) -> Any:
    if isinstance(value, Slot):
        return value.filled(saved, n, dtype)
    return type(value)([_filled(item, saved, n, dtype) for item in value]) if isinstance(value, list | tuple) else value


def _place(value: Any) -> Any:
    """Where an argument is kept, a tensor or a list of tensors."""
    return value.place if isinstance(value, Slot) else [slot.place for slot in value]


def no_view(out: Tensor) -> Tensor:
    """The same memory, known to autograd as a tensor of its own: in-place ops may follow a tap, but not on a view."""
    # a 3-D F.linear with bias returns a view of its 2-D product
    own: Tensor = torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out  # noqa: SLF001
    return own


def placed(recording: Recorder, call: Call, out: Tensor, shared: list[Tensor]) -> Axis:
    """Where the samples are in a result; refused where they are lost."""
    where = follow(call, out)
    if not isinstance(where, Axis):
        raise SampleAxisError(
            f"{call.name}: brings the samples together, so the gradient of {names_of(recording, shared)} cannot be split over them: "
            f"operands of shapes {', '.join(str(tuple(x.shape)) for x in call.tensors)}, samples on axis "
            f"{', '.join(str(axis.dim) for _, axis in call.placed())}. Move the sample axis to a place that the op keeps, "
            "or check `batch_dim`."
        )
    return where


def _checked(decided: Decision, found: Mapping[str, Any], name: str, place: int | None, source: Source) -> Factor:
    """What a rule found for one of the arguments that are wanted."""
    op, factor = decided.op, found.get(name)
    if place is not None and isinstance(factor, list):
        factor = factor[place]
    if callable(factor):
        factor = factor()
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
    return factor if factor.n == decided.n else factor.regroup(decided.n)
