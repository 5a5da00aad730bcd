"""Calls of one quantity after another without a recording: what it came to is traced, and run again for every batch like the first."""

import copy
import functools
import itertools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from .captured import Captured, Pool, refuse_uncaptured
from .errors import UnsupportedOpError, of_type
from .running import in_transform, modes
from .streaming import Batch, LossFunction
from .surroundings import Surroundings, TooMuchError
from .trace import Trace, layout, memory
from .tracer import Reading, Tracer

Result = TypeVar("Result")
# What the key of a batch may hold as it is.
_PLAIN = frozenset({int, float, bool, str, bytes, type(None), torch.dtype, torch.device})
# Kinds of batches, and states of the model, whose traces are kept.
_MOST = 8
# Calls in a row that are recorded without a word.
_VAIN = 50


def traced(
    quantity: Callable[..., Result], model: nn.Module, loss_fn: LossFunction, *, capture: bool = False, **options: Any
) -> "Traced[Result]":
    """`quantity(model, loss_fn, batch, **options)` for one batch after another, without what a recording costs each time.

    The first three batches of a kind (shapes, types, devices) are recorded as ever; two of them are traced on the way, op by op, and where
    both took the same steps, every later batch runs these ops alone. It is `quantity` that is traced, so any of the one-call functions
    will do, and a function of your own that makes several quantities of one recording.

    A trace is made anew when the batch is of another kind, and when something changed that the model, `loss_fn` or the options can reach:
    training or evaluation, parameters, hooks, attributes, closures, globals of the user's own code, what other objects hold. Values of
    parameters, buffers and other tensors are read at every call, and random numbers drawn. But Python runs no more: what is printed is left
    out, and what comes from elsewhere (variables of installed packages, files, the clock) stays what it was. Where more can be reached than
    may be looked at in every call, or the next value of an iterator, each batch is recorded.

    Args:
        quantity: `per_sample_norms`, `clipped_grads`, `per_sample_grads`, or another function that is called as these are and gives
            tensors.
        model: Any module, unmodified.
        loss_fn: `loss_fn(model, batch) -> (n,)` losses.
        capture: Whether the ops of a trace are launched as a whole, as a CUDA graph, since a GPU is often faster than Python launches.
            Model and batch must be on one CUDA device. The graphs keep the memory of a step, and results are copied out of it (not
            where they are written into buffers of yours, by `out=`).
        options: Keyword arguments of `quantity`.

    Returns:
        A function of the batch: a tensor, or tuples, lists and dictionaries of tensors and numbers.

    Raises:
        UnsupportedOpError: At a call that another batch might make otherwise: a value of the batch is read (`.item()`, boolean masks,
            packed sequences), two batches took different steps, the model changes an attribute while it runs, random numbers are drawn
            twice (a checkpoint around dropout), or something outside of the model gets an ordinary gradient. With `capture`, also where
            something is on another device, the batch is written to, or CUDA refuses. Call `quantity` itself then. A yes or no that is
            computed from the batch alone, `if mask.all()`, is no obstacle: it is asked of every batch.
        TypeError: If a batch holds something else than tensors and plain values.

    Example:
        >>> from samplewise import per_sample_norms
        >>> model, batches = nn.Linear(3, 2), torch.randn(5, 4, 3)
        >>> norms = traced(per_sample_norms, model, lambda m, x: m(x).square().sum(1))
        >>> [norms(x).shape for x in batches][-1]
        torch.Size([4])
    """
    of_type("traced", model, "a model", nn.Module)
    of_type("traced", capture, "capture=True or False", bool)
    return Traced(functools.partial(quantity, model, loss_fn, **options), capture=capture)


@dataclass
class _Known:
    """What is known of one kind of batch in one state of the model."""

    # what the state consists of: while it is held, nothing else has its identity
    state: list[object]
    # one trace for each way that batches answer what is asked of them; and those of which a second one was the same
    first: dict[tuple[bool, ...], Trace] = field(default_factory=dict)
    sure: list[Trace | Captured] = field(default_factory=list)


class Traced(Generic[Result]):
    """A quantity of one batch after another. Made by `traced`."""

    def __init__(self, run: functools.partial[Result], *, capture: bool = False) -> None:
        self._pool = Pool() if capture else None
        self._run, self._around = run, Surroundings(run.func, *run.args, run.keywords)
        self._known: OrderedDict[Hashable, _Known] = OrderedDict()
        # calls in a row of which none was like one before
        self._in_vain = 0
        self._lock = threading.RLock()

    def __call__(self, batch: Batch) -> Result:
        """The quantity of a batch."""
        if _observed():
            return self._run(batch)
        tensors: list[Tensor] = []
        kind = _kind_of(batch, tensors)
        # as they are now: the call may change them
        kind = kind, tuple(map(layout, tensors)), _shared(tensors)
        if any(x.device.type not in _DEVICES for x in tensors):
            # whose generators are not looked after
            return self._run(batch)
        with self._lock:
            return self._known_or_new(batch, kind, tensors)

    def __reduce__(self) -> tuple[Callable[..., "Traced[Result]"], tuple[object, ...]]:
        """Copies have traces of their own."""
        return functools.partial(Traced, capture=self._pool is not None), (self._run,)

    def _known_or_new(self, batch: Batch, kind: Hashable, tensors: list[Tensor]) -> Result:
        try:
            key = self._key(kind)
        except TooMuchError:
            return self._unwatched(batch)
        known = self._known.get(key)
        if known is None:
            return self._record(batch, kind)
        self._in_vain = 0
        self._known.move_to_end(key)
        for trace in known.sure:
            if trace.fits(tensors):
                result: Result = trace(tensors)
                return result
        return self._trace(batch, tensors, known)

    def release(self) -> None:
        """Forget all traces, with the tensors that they hold: parameters, buffers and the like."""
        with self._lock:
            self._known.clear()
            self._around.release()

    def _key(self, kind: Hashable) -> Hashable:
        """All that decides which steps are taken."""
        same, held = self._around.now()
        casts = [torch.is_autocast_enabled(x) and torch.get_autocast_dtype(x) for x in _DEVICES]
        how = (
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_num_threads(),
            *casts,
        )
        return kind, same, tuple(map(layout, held)), how

    def _record(self, batch: Batch, kind: Hashable) -> Result:
        """The first of its kind, in which everything is made that is made once: rates, tables that the model keeps."""
        self._in_vain += 1
        if self._in_vain == _VAIN:
            warnings.warn(
                f"traced: {_VAIN} calls in a row were of kinds that had not been seen, or found something else that the model or losses "
                "use (a number that changes from step to step, perhaps: a tensor that is written to would do), so each was recorded.",
                stacklevel=4,
            )
        result = self._run(batch)
        try:
            self._known.setdefault(self._key(kind), _Known(self._around.state()))
        except TooMuchError:
            return result
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return result

    def _unwatched(self, batch: Batch) -> Result:
        """A call whose surroundings are too large to be looked at each time."""
        if self._in_vain < _VAIN:
            self._in_vain = _VAIN
            warnings.warn(
                "traced: the model or the losses reach more objects (a data set, long lists) than can be looked at in every call, so each "
                "call is recorded. Let the losses use what they need by itself.",
                stacklevel=4,
            )
        return self._run(batch)

    def _trace(self, batch: Batch, tensors: list[Tensor], known: _Known) -> Result:
        """The second and the third, of which traces are made."""
        # a tensor that is used from outside too is another one there
        fed = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
        batch = _with(batch, dict(zip(map(id, tensors), fed, strict=True)))
        tracer = Tracer(fed, self._around.now()[1])
        # of weights that were cast before, which would stay as they are
        torch.clear_autocast_cache()
        with Reading(tracer), tracer:
            result = self._run(batch)
        torch.clear_autocast_cache()
        trace = tracer.result(result)
        self._refuse_changes(known.state)
        if self._pool is not None:
            refuse_uncaptured(trace, fed)
        first = known.first.pop(trace.questions.answers, None)
        step = None if first is None else first.differs(trace)
        if step is not None:
            raise UnsupportedOpError(
                f"traced: two batches of one kind took different steps: {step}. The model or the loss decides by something that is neither "
                "in the shapes of the batch nor in the model. Call the function itself, which records each batch."
            )
        if first is None:
            known.first = {**dict(list(known.first.items())[-_MOST:]), trace.questions.answers: trace}
        else:
            known.sure = [*known.sure, trace if self._pool is None else Captured(trace, self._pool)][-_MOST:]
        return result

    def _refuse_changes(self, before: list[object]) -> None:
        """Refuse a model that changes while it runs, which a trace would leave out."""
        try:
            after = self._around.state()
        except TooMuchError:
            after = []
        if after is before or (len(after) == len(before) and all(a is b for a, b in zip(after, before, strict=True))):
            return
        place = next(k for k, (a, b) in enumerate(itertools.zip_longest(after, before)) if a is not b)
        found = type(after[place]).__name__ if place < len(after) else "nothing"
        raise UnsupportedOpError(
            f"traced: an attribute or a hook of the model, or something else that it or the losses use, changed in the call (to {found}), "
            "which a trace would leave out. Call the function itself, which records each batch."
        )


_DEVICES = ("cpu", "cuda")


def _kind_of(value: object, tensors: list[Tensor]) -> Hashable:
    """What a batch is made of, but for its tensors, which are put into a list in their order."""
    if isinstance(value, Tensor) and value.layout == torch.strided:
        place = next((k for k, x in enumerate(tensors) if x is value), len(tensors))
        if place == len(tensors):
            tensors.append(value)
        return type(value), place
    if isinstance(value, Mapping):
        own = {
            key: x for key, x in getattr(value, "__dict__", {}).items() if not key.startswith("_") and x is not value.get(key)
        }
        own.pop("data", None)
        if all(type(x) in _PLAIN for x in own.values()):
            return type(value), repr(own), *((key, _kind_of(item, tensors)) for key, item in value.items())
    if isinstance(value, tuple | list) and not getattr(value, "__dict__", None):
        return type(value), *(_kind_of(item, tensors) for item in value)
    if type(value) in _PLAIN:
        # as it is written: zero has two signs
        return type(value), repr(value)
    raise TypeError(
        f"traced: a batch is made of dense tensors and plain values, in tuples, lists and dictionaries, got a {type(value).__name__}. "
        "Give its tensors by themselves, or call the function itself, which records each batch."
    )


def _shared(tensors: Iterable[Tensor]) -> Hashable:
    """Which tensors are in the same memory."""
    cells = list(map(memory, tensors))
    return tuple(map(cells.index, cells))


def _with(value: Any, new: Mapping[int, Tensor]) -> Any:
    """The batch with other tensors in the place of its own, by id."""
    if isinstance(value, Tensor):
        return new[id(value)]
    if isinstance(value, Mapping):
        made: Any = copy.copy(value)
        for key, item in value.items():
            made[key] = _with(item, new)
        return made
    if isinstance(value, tuple | list):
        items = [_with(item, new) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _observed() -> bool:
    """Whether more is going on here than a call: a recording, a trace, a transform, a compiler."""
    inside = torch._C._len_torch_dispatch_stack() or in_transform() or torch.compiler.is_compiling()  # noqa: SLF001
    hooked = _has_any_global_hook() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # noqa: FBT003, SLF001
    checked = torch.is_anomaly_enabled() or torch.is_inference_mode_enabled() or forward_ad._current_level >= 0  # noqa: SLF001
    return bool(inside) or hooked or checked or not all(isinstance(mode, DeviceContext) for mode in modes())
