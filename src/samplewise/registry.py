"""The two tables: a rule gives the factors of one op's parameters, an expansion rewrites an op in terms of others."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rule:
    """A registered rule: `function(grad, out, *op_arguments) -> {argument name: Factor}`."""

    function: Callable[..., Any]
    arguments: tuple[str, ...]
    saves: Mapping[str, Sequence[str]] | None
    # runs the op and gives with its result what else the rule saves, as its argument "statistics"
    run: Callable[..., tuple[Any, Sequence[torch.Tensor]]] | None = None
    # the gradient of the argument with the samples from that of the result, and from arguments that it has by their names
    back: Callable[..., torch.Tensor] | None = None
    # the calls it is for, by their arguments; others go another way
    when: Callable[[Mapping[str, Any]], bool] | None = None
    # the argument with the samples, as far as `back` is concerned; the first where nothing is said
    samples: str = ""
    # the op made of others, whose parameters meet the samples where derivatives of any order are followed
    apart: Callable[..., torch.Tensor] | None = None

    @functools.cached_property
    def takes_statistics(self) -> bool:
        """Whether the function has a place for what `run` gives beside the result."""
        return "statistics" in inspect.signature(self.function).parameters

    @functools.cached_property
    def saved_for_back(self) -> tuple[str, ...]:
        """The arguments whose values `back` needs."""
        return () if self.back is None else tuple(inspect.signature(self.back).parameters)[1:]

    def saved_for(self, shared: set[str]) -> set[str]:
        """The arguments whose values the gradients of the `shared` arguments need."""
        if self.saves is None:
            return {"out", *self.arguments} if _uses_out(self.function) else set(self.arguments)
        return {name for argument in shared for name in self.saves[argument]}

    def covers(self, arguments: Mapping[str, Any], shared: set[str], batched: set[str]) -> bool:
        """Whether the rule is for a call, and gives the gradients of all `shared` arguments with the samples in the `batched` ones."""
        if self.when is not None and not self.when(arguments):
            return False
        return self.saves is None or (shared <= set(self.saves) and not batched & set(self.saves))


@dataclass(frozen=True)
class Operation:
    """What is known of an overridable function, found once and cached."""

    name: str
    inplace: bool
    # the function's own source, free to be recorded inside; None for what reaches C++
    source: Callable[..., Any] | None
    # a property or method that gives no tensor: shape, dtype, size(), dim(), ...
    plain_property: bool
    # the places and names of the arguments that it writes to beside the first; -1 for one that is given by name only
    writes: tuple[tuple[int, str], ...] = ()
    # the names of the first argument
    first: tuple[str, ...] = ()

    def in_order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the first in its place, also where it was given by name."""
        name = None if args else next((x for x in self.first if x in kwargs), None)
        if name is None:
            return args, kwargs
        return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}

    def target(self, args: Sequence[Any]) -> Any:
        """What an in-place op changes."""
        return args[0] if self.inplace and args else None

    def others_written(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """What else the op changes."""
        given = (args[place] if 0 <= place < len(args) else kwargs.get(name) for place, name in self.writes)
        return [x for x in given if x is not None]


RULES: dict[str, Rule] = {}
EXPANSIONS: dict[str, Callable[..., Any]] = {}
# Functions that check their arguments and pass them on to an op: from a call's arguments, the op and its own arguments.
PASSED_ON: dict[Callable[..., Any], Callable[..., tuple[Callable[..., Any], tuple[Any, ...]]]] = {}
# Functions of our own that the recording sees as one op, and not through their source.
OPAQUE: set[str] = {"torch._tensor.Tensor.__dlpack__"}


def rule(
    op: Callable[..., Any],
    *,
    saves: Mapping[str, Sequence[str]] | None = None,
    run: Callable[..., tuple[Any, Sequence[torch.Tensor]]] | None = None,
    back: Callable[..., torch.Tensor] | None = None,
    when: Callable[[Mapping[str, Any]], bool] | None = None,
    samples: str = "",
    apart: Callable[..., torch.Tensor] | None = None,
) -> Callable[[Function], Function]:
    """Register the per-sample gradient of `op`'s parameters.

    The rule is called as `function(grad, out, *arguments)` with the arguments of `op` by its own names and defaults. Every
    tensor that depends on the samples, `grad` among them, comes with its rows first, `(n, ...)`; parameters come as they
    are. It returns a factor, or a function that makes it, per parameter: `{"weight": Outer(...), "bias": lambda: ...}`; what is
    no parameter in a call is not asked for. The op's samples must lie on axis 0 of its tensor arguments and of its result.

    Args:
        op: The function as users call it, such as `torch.ops.mylib.scale`.
        saves: For each argument with a gradient, the arguments whose values that gradient needs; others arrive as meta
            tensors. By default all tensor arguments are kept, and `out` too where the rule uses it.
        run: Called in place of `op`, with the same arguments: gives its result, and tensors that the op computes on the way, with rows
            where the first argument has them. The rule gets them as `statistics`, if `saves` names that, in the type that they have.
        back: The op's own backward, for an op with one result that has the samples in one argument alone: `back(grad, weight)` gives the
            gradient of that, from that of the result and from those of the op's arguments that it names, tensors before numbers.
            With `run` beside it, that is then called without a graph. In a recording with `create_graph=True` what it does is recorded
            itself, so that losses may be made of derivatives by the samples.
        when: Says of a call's arguments by name whether the rule is for it. Other calls go on as if there were no rule.
        samples: The argument that `back` gives the gradient of, by default the first.
        apart: The op made of others, called in place of it in a recording with `create_graph=True`: another way than `back` to
            derivatives by the samples.

    Raises:
        ValueError: If `op` already has a rule or an expansion.

    Example:
        >>> @rule(torch.ops.mylib.scale)                      # doctest: +SKIP
        ... def scale(grad, out, input, weight):
        ...     return {"weight": Dense(grad * input)}
    """
    key = _free_key(op)

    def register(function: Function) -> Function:
        arguments = tuple(
            name for name in list(inspect.signature(function).parameters)[2:] if run is None or name != "statistics"
        )
        RULES[key] = Rule(function, arguments, saves, run, back, when, samples or arguments[0], apart)
        return function

    return register


def expand(op: Callable[..., Any]) -> Callable[[Function], Function]:
    """Record calls of `op` through the decorated function, which computes the same from other ops.

    It may return NotImplemented to leave a call as it is. In-place forms of `op` are never rewritten.

    Args:
        op: The function as users call it.

    Raises:
        ValueError: If `op` already has a rule or an expansion.

    Example:
        >>> @expand(torch.ops.mylib.affine)                   # doctest: +SKIP
        ... def affine(input, weight, bias):
        ...     return input * weight + bias
    """
    key = _free_key(op)

    def register(function: Function) -> Function:
        EXPANSIONS[key] = function
        return function

    return register


def opaque(function: Function) -> Function:
    """Let the recording see a function of our own as one op."""
    OPAQUE.add(f"{function.__module__}.{function.__qualname__}")
    return function


@functools.cache
def operation(op: Callable[..., Any]) -> Operation:
    """The canonical name and nature of an overridable function: `torch.add`, `Tensor.add_` and `+` are all `add`."""
    getter = getattr(op, "__self__", None)
    if isinstance(getter, types.GetSetDescriptorType | types.MemberDescriptorType):
        name = getter.__name__
        if op.__name__ == "__set__" and name in _TENSOR_PROPERTIES:
            return Operation("set", inplace=True, source=None, plain_property=False)
        return Operation(name, inplace=False, source=None, plain_property=name not in _TENSOR_PROPERTIES)
    if isinstance(op, types.FunctionType) and not _wraps_method(op):
        key = f"{op.__module__}.{op.__qualname__}"
        known = key in RULES or key in EXPANSIONS or key in OPAQUE
        return Operation(key, inplace=False, source=None if known else through_source(op), plain_property=False)
    overloads = _overloads(op)
    raw = str(overloads[0].overloadpacket).removeprefix("aten.") if overloads else op.__name__
    written = {(place, argument.name) for overload in overloads for place, argument in _written_arguments(overload)}
    inplace = (
        (raw.endswith("_") and not raw.endswith("__")) or raw in _INPLACE_DUNDERS or any(place == 0 for place, _ in written)
    )
    writes = tuple(sorted((place, name) for place, name in written if place))
    name, first = raw if raw in _OWN_NAMES else raw.strip("_"), _first_names(overloads) if overloads else _FIRST
    if name in {"polygamma", "special_polygamma"}:
        # an order comes first
        first = ()
    return Operation(name, inplace, source=None, plain_property=raw in _PLAIN_METHODS, writes=writes, first=first)


@functools.cache
def through_source(function: types.FunctionType) -> Callable[..., Any]:
    """The same Python function, whose `has_torch_function` checks answer False: its inner calls reach the active mode."""
    checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**function.__globals__, **dict.fromkeys(checks, _never)}
    for name in function.__code__.co_names:
        # a private function next to it may hold the check, as for torch.meshgrid
        if name.startswith("_") and isinstance(scope.get(name), types.FunctionType) and scope[name] is not function:
            scope[name] = through_source(scope[name])
    # a wrapper such as F.max_pool2d keeps the functions it chooses from in its closure
    cells = function.__closure__ or ()
    closure = tuple(types.CellType() for _ in cells)
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    if scope.get(function.__name__) is function:
        # recursion stays inside
        scope[function.__name__] = copy
    for new, cell in zip(closure, cells, strict=True):
        # `Tensor.__rsub__` and its like have themselves in their closure
        new.cell_contents = copy if cell.cell_contents is function else _inner_source(cell.cell_contents)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _wraps_method(op: types.FunctionType) -> bool:
    """Whether a Python method stands in front of a C method of the same name and calls it: `Tensor.split`, `Tensor.pow`."""
    owner, _, name = op.__qualname__.partition(".")
    return owner in {"Tensor", "TensorBase"} and op.__module__ == "torch._tensor" and name in _C_METHODS


def _inner_source(value: object) -> object:
    return through_source(value) if isinstance(value, types.FunctionType) else value


# What torch's own functions call their first argument; "input" is the second where one of those before it is the first.
_FIRST = ("condition", "sorted_sequence", "input", "self", "tensors", "A", "log_probs")
_C_METHODS = frozenset(dir(torch._C.TensorBase))  # noqa: SLF001
_TENSOR_PROPERTIES = frozenset({"T", "mT", "H", "mH", "real", "imag", "data"})
_PLAIN_METHODS = frozenset(
    [
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "__len__"),
        *("is_contiguous", "is_floating_point", "is_complex", "get_device", "requires_grad_"),
    ]
)
# Not what the op without the underscore is: a padding of -1 means none, and not the last row.
_OWN_NAMES = frozenset({"_embedding_bag"})
_INPLACE_DUNDERS = frozenset({"__setitem__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"})


def _free_key(op: Callable[..., Any]) -> str:
    key = operation(op).name
    if key in RULES or key in EXPANSIONS:
        raise ValueError(
            f"{key} already has a rule or an expansion; each op has one place where its gradient is written. Another "
            "gradient needs an op of your own (`torch.library`)."
        )
    operation.cache_clear()
    return key


def _overloads(op: Any) -> list[Any]:
    """What an op of `torch.ops` may be; nothing for other functions."""
    kind = type(op).__name__
    if kind == "OpOverloadPacket":
        return [getattr(op, name) for name in op.overloads()]
    return [op] if kind == "OpOverload" else []


def _first_names(overloads: Sequence[Any]) -> tuple[str, ...]:
    return tuple({arguments[0].name: None for overload in overloads if (arguments := overload._schema.arguments)})  # noqa: SLF001


def _written_arguments(overload: Any) -> list[tuple[int, Any]]:
    arguments = enumerate(overload._schema.arguments)  # noqa: SLF001
    return [(-1 if x.kwarg_only else place, x) for place, x in arguments if x.alias_info is not None and x.alias_info.is_write]


def _uses_out(function: Callable[..., Any]) -> bool:
    return list(inspect.signature(function).parameters)[1] == "out"


def _never(*_: object) -> bool:
    return False
