"""Calls of one quantity after another without a recording: what it came to is traced, and run again for every batch like the first."""

import functools
import itertools
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from .attaching import children_of
from .errors import UnsupportedOpError, of_type
from .running import in_transform, modes
from .streaming import Batch, LossFunction
from .tracer import Reading, Trace, Tracer

Result = TypeVar("Result")
# What the key of a batch may hold as it is.
_PLAIN = frozenset({int, float, bool, str, bytes, type(None), torch.dtype, torch.device})
# Kinds of batches, and states of the model, whose traces are kept.
_MOST = 8


def traced(quantity: Callable[..., Result], model: nn.Module, loss_fn: LossFunction, **options: Any) -> "Traced[Result]":
    """`quantity(model, loss_fn, batch, **options)` for one batch after another, without what a recording costs each time.

    The first three batches of a kind (shapes, types, devices) are recorded as ever; two of them are traced on the way, op by op, and where
    both took the same steps, every later batch runs these ops alone. It is `quantity` that is traced, so any of the one-call functions
    will do, and a function of your own that makes several quantities of one recording.

    A trace is made anew when the batch is of another kind or when the model is in another state: training or evaluation, other
    parameters, some of them frozen, an attribute or hook that is another one, a number that `loss_fn` takes from outside. Values of
    parameters, buffers and other tensors are read at every call, and random numbers drawn. But Python runs no more: what the model does
    beside its ops (prints, counts, hooks that look at something) is left out, and numbers that it takes from elsewhere stay what they were.

    Args:
        quantity: `per_sample_norms`, `clipped_grads`, `per_sample_grads`, or another function that is called as these are and gives
            tensors.
        model: Any module, unmodified.
        loss_fn: `loss_fn(model, batch) -> (n,)` losses.
        options: Keyword arguments of `quantity`.

    Returns:
        A function of the batch: a tensor, or tuples, lists and dictionaries of tensors and numbers.

    Raises:
        UnsupportedOpError: At a call that another batch might make otherwise: a value of the batch is read (`.item()`, boolean masks,
            packed sequences), two batches took different steps, the model changes an attribute while it runs, random numbers are drawn
            twice (a checkpoint around dropout), or something outside of the model gets an ordinary gradient. Call `quantity` itself
            then. A yes or no that is computed from the batch alone, `if mask.all()`, is no obstacle: it is asked of every batch.
        TypeError: If a batch holds something else than tensors and plain values.

    Example:
        >>> from samplewise import per_sample_norms
        >>> model, batches = nn.Linear(3, 2), torch.randn(5, 4, 3)
        >>> norms = traced(per_sample_norms, model, lambda m, x: m(x).square().sum(1))
        >>> [norms(x).shape for x in batches][-1]
        torch.Size([4])
    """
    of_type("traced", model, "a model", nn.Module)
    return Traced(functools.partial(quantity, model, loss_fn, **options), model, (quantity, loss_fn, *options.values()))


@dataclass
class _Known:
    """What is known of one kind of batch in one state of the model."""

    # what the state consists of: while it is held, nothing else has its identity
    state: list[object]
    # one trace for each way that batches answer what is asked of them; and those of which a second one was the same
    first: dict[tuple[bool, ...], Trace] = field(default_factory=dict)
    sure: list[Trace] = field(default_factory=list)


class Traced(Generic[Result]):
    """A quantity of one batch after another. Made by `traced`."""

    def __init__(self, run: Callable[..., Result], model: nn.Module, outside: Iterable[object]) -> None:
        self._run, self._model, self._outside = run, model, list(outside)
        self._known: OrderedDict[Hashable, _Known] = OrderedDict()
        self._modules: list[nn.Module] = []
        self._children: list[int] = []
        # of the last state: the objects by id, and which of them are tensors
        self._held: tuple[tuple[int, ...], list[Tensor]] = ((), [])

    def __call__(self, batch: Batch) -> Result:
        """The quantity of a batch."""
        if _observed():
            return self._run(batch)
        tensors: list[Tensor] = []
        kind = _kind_of(batch, tensors)
        key = self._key(kind, tensors, self._state())
        known = self._known.get(key)
        if known is None:
            return self._record(batch, kind, tensors)
        self._known.move_to_end(key)
        for trace in known.sure:
            if trace.questions.fit(tensors):
                result: Result = trace(tensors)
                return result
        return self._trace(batch, tensors, known)

    def release(self) -> None:
        """Forget all traces, with the tensors that they hold: parameters, buffers and the like."""
        self._known.clear()
        self._modules, self._held = [], ((), [])

    def _record(self, batch: Batch, kind: Hashable, tensors: list[Tensor]) -> Result:
        """The first of its kind, in which everything is made that is made once: rates, tables that the model keeps."""
        result, state = self._run(batch), self._state()
        self._known.setdefault(self._key(kind, tensors, state), _Known(state))
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return result

    def _trace(self, batch: Batch, tensors: list[Tensor], known: _Known) -> Result:
        """The second and the third, of which traces are made."""
        tracer = Tracer(tensors)
        # of weights that were cast before, which would stay as they are
        torch.clear_autocast_cache()
        with Reading(tracer), tracer:
            result = self._run(batch)
        torch.clear_autocast_cache()
        trace = tracer.result(result)
        self._refuse_changes(known.state)
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
            known.sure = [*known.sure, trace][-_MOST:]
        return result

    def _state(self) -> list[object]:
        """The objects that decide what the model and the losses do, as far as they can be seen."""
        if not self._modules or children_of(self._modules) != self._children:
            self._modules = list(self._model.modules())
            self._children = children_of(self._modules)
        state: list[object] = []
        for held in self._tables():
            state += held.values()
        return state

    def _tables(self) -> list[Mapping[Any, object]]:
        tables = [held for module in self._modules for held in _tables_of(module)]
        return tables + [held for function in self._outside for held in _used_by(function)]

    def _key(self, kind: Hashable, tensors: Iterable[Tensor], state: list[object]) -> Hashable:
        """All that decides which steps are taken."""
        same = tuple(map(id, state))
        if same != self._held[0]:
            self._held = same, [x for x in state if isinstance(x, Tensor)]
        casts = [torch.is_autocast_enabled(x) and torch.get_autocast_dtype(x) for x in _AUTOCAST]
        how = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), *casts)
        return kind, tuple(map(_layout, tensors)), same, tuple(map(_layout, self._held[1])), how

    def _refuse_changes(self, before: list[object]) -> None:
        """Refuse a model that changes while it runs, which a trace would leave out."""
        after = self._state()
        changed = [k for k, (a, b) in enumerate(itertools.zip_longest(after, before)) if a is not b]
        if changed:
            names = [key for held in self._tables() for key in held]
            name = names[min(changed[0], len(names) - 1)]
            raise UnsupportedOpError(
                f"traced: '{name}' changed in the call, an attribute or a hook of the model or something that the loss uses, which a trace "
                "would leave out. Call the function itself, which records each batch."
            )


_AUTOCAST = ("cpu", "cuda")


def _layout(x: Tensor) -> Hashable:
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad, not x._backward_hooks  # noqa: SLF001


def _kind_of(value: object, tensors: list[Tensor]) -> Hashable:
    """What a batch is made of, but for its tensors, which are put into a list in their order."""
    if isinstance(value, Tensor) and value.layout == torch.strided:
        place = next((k for k, x in enumerate(tensors) if x is value), len(tensors))
        if place == len(tensors):
            tensors.append(value)
        return type(value), place
    if isinstance(value, Mapping):
        return type(value), *((key, _kind_of(item, tensors)) for key, item in value.items())
    if isinstance(value, tuple | list):
        return type(value), *(_kind_of(item, tensors) for item in value)
    if type(value) in _PLAIN:
        return type(value), value
    raise TypeError(
        f"traced: a batch is made of dense tensors and plain values, in tuples, lists and dictionaries, got a {type(value).__name__}. "
        "Give its tensors by themselves, or call the function itself, which records each batch."
    )


def _tables_of(module: nn.Module) -> Iterable[Mapping[Any, object]]:
    """What a module is and holds."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)  # noqa: SLF001
    return vars(module), module._parameters, module._buffers, module._modules, *hooks  # noqa: SLF001


def _used_by(function: object) -> Iterable[Mapping[Any, object]]:
    """What a function takes from outside: variables around it and globals, defaults, the object that it is a method of."""
    if isinstance(function, nn.Module):
        return [held for module in function.modules() for held in _tables_of(module)]
    if isinstance(function, functools.partial):
        given = dict(enumerate(function.args))
        return [given, function.keywords, *_used_by(function.func)]
    if isinstance(function, types.MethodType):
        return [*_used_by(function.__self__), *_used_by(function.__func__)]
    if not isinstance(function, types.FunctionType):
        return [vars(function)] if hasattr(function, "__dict__") else []
    names, code = function.__globals__, function.__code__
    cells = {
        name: cell.cell_contents
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
        if _is_filled(cell)
    }
    used = {name: names[name] for name in code.co_names if name in names}
    return [cells, used, dict(enumerate(function.__defaults__ or ())), function.__kwdefaults__ or {}]


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _observed() -> bool:
    """Whether more is going on here than a call: a recording, a trace, a transform, a compiler."""
    inside = torch._C._len_torch_dispatch_stack() or in_transform() or torch.compiler.is_compiling()  # noqa: SLF001
    return bool(inside) or torch.is_inference_mode_enabled() or not all(isinstance(mode, DeviceContext) for mode in modes())
