"""What a model and functions take from around them: attributes, parameters, hooks, closures, globals; read anew as often as one asks."""

import functools
import gc
import itertools
import random
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

# Entries of one table, and tables that are no module's: beyond it too much would have to be looked at in every call.
_LONGEST, _MOST_TABLES = 4096, 4000
# Bytes of numbers in other memory than torch's.
_MOST_BYTES = 2**16
_NUMBERS = (int, float, complex, bool, str, bytes, type(None))
_OPS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)  # noqa: SLF001
_PLAIN = (*_NUMBERS, torch.dtype, torch.device, torch.Size, types.CodeType, *_OPS)
_MISSING = object()
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# Between tables: what moves from the end of one to the beginning of the next is somewhere else.
_END = (_MISSING,)


class TooMuchError(Exception):
    """More can be reached than may be looked at in every call."""


class Surroundings:
    """All that can be reached from some objects, as the identities of what is found there.

    Followed are modules, functions (what they close over, their defaults and attributes), methods, containers, the attributes of other
    objects, and of the user's own functions and classes also what they name: globals, variables of the user's modules. Not followed are
    globals of installed packages and of Python itself.
    """

    def __init__(self, *roots: object) -> None:
        self._roots = roots
        self._tables: list[Iterable[object]] = []
        self._last: tuple[int, ...] = ()
        self._state: list[object] = []
        self._tensors: list[Tensor] = []

    def now(self) -> tuple[tuple[int, ...], list[Tensor]]:
        """The identities, and the tensors among the objects."""
        self.state()
        return self._last, self._tensors

    def state(self) -> list[object]:
        """The objects that there are now. While the list is held, their identities are theirs.

        Raises:
            TooMuchError: If there are too many.
        """
        state = list(itertools.chain.from_iterable(self._tables))
        if not self._tables or tuple(map(id, state)) != self._last:
            # what else can be reached follows from these
            self._tables = _tables(self._roots)
            state = list(itertools.chain.from_iterable(self._tables))
            self._last, self._state = tuple(map(id, state)), state
            self._tensors = [x for x in state if isinstance(x, Tensor)]
        return self._state

    def release(self) -> None:
        """Let all go but the roots."""
        self._tables, self._last, self._state, self._tensors = [], (), [], []


class _Live:
    """A table that is made anew each time it is read."""

    def __init__(self, read: Callable[[], Iterable[object]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[object]:
        return iter(self._read())


class _Content:
    """A value that is told by what it is and not by its identity: the same object as long as it is equal."""

    def __init__(self, read: Callable[[], object]) -> None:
        self._read, self._last = read, read()

    def __iter__(self) -> Iterator[object]:
        found = self._read()
        if found != self._last:
            self._last = found
        return iter((self._last,))


def _tables(roots: Iterable[object]) -> list[Iterable[object]]:
    ahead, seen, modules = list(roots), set[int](), list[nn.Module]()
    found: list[Iterable[object]] = [tuple(roots), _Live(lambda: map(type, modules))]
    others = 0
    while ahead:
        one = ahead.pop()
        if id(one) in seen or isinstance(one, _PLAIN):
            continue
        seen.add(id(one))
        ahead.append(type(one))
        if isinstance(one, nn.Module):
            modules.append(one)
            # what counts of its own tables is among those below
            seen.update(id(table) for name, table in vars(one).items() if name in _OF_EVERY_MODULE)
        for table in _tables_of(one):
            entries = list(table)
            others += not isinstance(one, nn.Module | Tensor)
            if len(entries) > _LONGEST or others > _MOST_TABLES:
                raise TooMuchError
            found.append(table)
            ahead += entries
    return found


def _tables_of(one: object) -> list[Iterable[object]]:
    """What an object is made of, to be read again."""
    if (type(one).__module__ or "").startswith(f"{__package__}."):
        # our own, a trace that belongs to its model perhaps
        return []
    if isinstance(one, Tensor | types.ModuleType):
        return _attributes(one) if isinstance(one, Tensor) or not _is_installed(one.__name__) else []
    for kind, tables in _KINDS.items():
        if isinstance(one, kind):
            return tables(one)
    return [*_attributes(one), *_contents(one), _Live(lambda: gc.get_referents(one))]


def _of_class(one: type) -> list[Iterable[object]]:
    """What the user's own classes among its bases define."""
    spaces = [vars(base) for base in one.__mro__ if not _is_installed(base.__module__)]
    return [_Live(lambda: [value for space in spaces for value in space.values()])]


def _of_module(one: nn.Module) -> list[Iterable[object]]:
    named = (one._parameters, one._buffers, one._modules, vars(one))  # noqa: SLF001
    hooks = (one._forward_hooks, one._forward_pre_hooks, one._backward_hooks, one._backward_pre_hooks)  # noqa: SLF001
    with_kwargs = (one._forward_hooks_with_kwargs.keys(), one._forward_pre_hooks_with_kwargs.keys())  # noqa: SLF001
    unnamed: tuple[Iterable[object], ...] = (*(hook.values() for hook in hooks), *with_kwargs)
    tables: list[Iterable[object]] = [view for table in named for view in (table.keys(), table.values())]
    for table in unnamed:
        tables += [table, _END]
    return tables


def _attributes(one: object) -> list[Iterable[object]]:
    own = getattr(one, "__dict__", None)
    return [own.keys(), own.values()] if isinstance(own, dict) else []


def _entries(table: Mapping[Any, object]) -> list[Iterable[object]]:
    """Keys and values; of dictionaries as views of what is there now."""
    if isinstance(table, dict):
        return [table.keys(), table.values()]
    return [_Live(lambda: list(table.keys())), _Live(lambda: list(table.values()))]


def _contents(one: object) -> list[Iterable[object]]:
    """Numbers in memory that is not torch's, and the states of generators and iterators as far as they can be told."""
    if isinstance(one, random.Random):
        return [_Content(one.getstate)]
    if hasattr(one, "bit_generator"):
        # of numpy
        return [_Content(lambda: repr(one.bit_generator.state))]
    if hasattr(type(one), "__next__"):
        # a generator or another iterator, whose next value nobody knows
        return [_Live(lambda: (object(),))]
    try:
        view = memoryview(one)  # type: ignore[arg-type]
    except TypeError:
        return []
    except (ValueError, BufferError):
        # numbers that cannot be seen, of numpy's dates for example
        raise TooMuchError from None
    if view.nbytes > _MOST_BYTES:
        raise TooMuchError
    return [_Content(lambda: memoryview(one).tobytes())]  # type: ignore[arg-type]


def _of_function(function: types.FunctionType) -> list[Iterable[object]]:
    space = function.__globals__
    names = () if _is_installed(space.get("__name__")) else tuple(_names_in(function.__code__))

    def around() -> Iterator[object]:
        yield function.__code__
        for cell in function.__closure__ or ():
            yield _content(cell)
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        yield from _named(names, space)

    # what a decorator wraps is among the attributes
    return [_Live(lambda: list(around())), *_attributes(function)]


def _named(names: Iterable[str], space: Mapping[str, object]) -> Iterator[object]:
    """What the names in a function may stand for: globals, and variables of the user's modules, also of those that are imported in it."""
    spaces, package = [space], space.get("__package__")
    for within in spaces:
        for name in names:
            for value in (within.get(name, _MISSING), sys.modules.get(name), sys.modules.get(f"{package}.{name}")):
                if not isinstance(value, types.ModuleType):
                    yield value
                elif not _is_installed(value.__name__):
                    # of a module only what is named
                    yield value.__name__
                    spaces += [] if any(vars(value) is one for one in spaces) else [vars(value)]


def _names_in(code: types.CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function and in those written inside it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names_in(inner)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


@functools.lru_cache(maxsize=4096)
def _is_installed(module: str | None) -> bool:
    """Whether a module is Python's own, or of an installed package: such keep their variables to themselves."""
    name = module or ""
    # of what is no module, as `torch.ops.aten`, its package
    file = getattr(sys.modules.get(name) or sys.modules.get(name.partition(".")[0]), "__file__", None)
    if file is None:
        return name in sys.builtin_module_names or name == "builtins"
    folders = tuple(sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
    return file.startswith(folders) or name.startswith(f"{__package__}.")


_KINDS: dict[Any, Callable[[Any], list[Iterable[object]]]] = {
    nn.Module: _of_module,
    type: _of_class,
    types.FunctionType: _of_function,
    functools.partial: lambda one: [(one.func,), _Live(lambda: one.args), *_entries(one.keywords)],
    Mapping: lambda one: [*_entries(one), *_attributes(one)],
    (list, tuple, set, frozenset): lambda one: [one, *_attributes(one)],
    weakref.ref: lambda one: [_Live(lambda: (one(),))],
    ContextVar: lambda one: [_Live(lambda: (one.get(None),))],
}
