"""What a model and functions take from around them: attributes, parameters, hooks, closures, globals; read anew as often as one asks."""

import functools
import itertools
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Longer lists, and tables beyond so many in all, are told by their identity alone.
_LONGEST, _MOST_TABLES = 256, 20_000
_PLAIN = (
    int,
    float,
    complex,
    bool,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    Tensor,
    types.ModuleType,
    types.CodeType,
)
_EMPTY = object()
# between tables: what moves from the end of one to the beginning of the next is somewhere else
_END = (_EMPTY,)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Surroundings:
    """All that can be reached from some objects, as the identities of what is found there.

    Followed are modules, functions of the user's (what they close over, their globals, defaults and attributes), methods, dictionaries,
    lists and tuples, and the attributes of other objects. Functions and classes of installed packages are not.
    """

    def __init__(self, *roots: object) -> None:
        self._roots = roots
        self._tables: list[Iterable[object]] = []
        self._last: tuple[int, ...] = ()
        self._state: list[object] = []
        self._tensors: list[Tensor] = []

    def state(self) -> list[object]:
        """The objects that there are now. While the list is held, their identities are theirs."""
        state = list(itertools.chain.from_iterable(self._tables))
        if not self._tables or tuple(map(id, state)) != self._last:
            # what else can be reached follows from these
            self._tables = _tables(self._roots)
            state = list(itertools.chain.from_iterable(self._tables))
            self._last, self._state = tuple(map(id, state)), state
            self._tensors = [x for x in state if isinstance(x, Tensor)]
        return self._state

    def now(self) -> tuple[tuple[int, ...], list[Tensor]]:
        """The identities, and the tensors among the objects."""
        self.state()
        return self._last, self._tensors

    def release(self) -> None:
        """Let all go but the roots."""
        self._tables, self._last, self._state, self._tensors = [], (), [], []


class _Live:
    """A table that is made anew each time it is read."""

    def __init__(self, read: Callable[[], Iterable[object]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[object]:
        return iter(self._read())


def _tables(roots: Iterable[object]) -> list[Iterable[object]]:
    ahead, seen, modules = list(roots), set[int](), list[nn.Module]()
    found: list[Iterable[object]] = [tuple(roots), _Live(lambda: map(type, modules))]
    while ahead and len(found) < _MOST_TABLES:
        one = ahead.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, nn.Module):
            modules.append(one)
            # what counts of its own tables is among those below
            seen.update(id(table) for name, table in vars(one).items() if name in _OF_EVERY_MODULE)
        for table in _tables_of(one):
            found.append(table)
            ahead += [x for x in table if not isinstance(x, _PLAIN)]
    return found


def _tables_of(one: object) -> list[Iterable[object]]:
    """What an object is made of, to be read again."""
    if isinstance(one, nn.Module):
        named = (one._parameters, one._modules)  # noqa: SLF001
        hooks = (one._forward_hooks, one._forward_pre_hooks, one._backward_hooks, one._backward_pre_hooks)  # noqa: SLF001
        others = (one._buffers, vars(one), *hooks)  # noqa: SLF001
        return [*(view for table in named for view in _entries(table)), *(view for x in others for view in (x.values(), _END))]
    if isinstance(one, type):
        return [] if _is_installed(one.__module__) else [_Live(lambda: tuple(vars(one).values()))]
    if isinstance(one, types.FunctionType):
        return [] if _is_installed(one.__module__) else _of_function(one)
    if isinstance(one, types.MethodType):
        return [(one.__self__, one.__func__)]
    if isinstance(one, functools.partial):
        return [(one.func,), _Live(lambda: one.args), *_entries(one.keywords)]
    if isinstance(one, Mapping):
        return _entries(one) if len(one) <= _LONGEST else []
    if isinstance(one, list | tuple | set | frozenset):
        return [one] if len(one) <= _LONGEST else []
    own = getattr(one, "__dict__", None)
    return [_Live(lambda: (type(one),)), *_entries(own)] if isinstance(own, dict) else []


def _entries(table: Mapping[Any, object]) -> list[Iterable[object]]:
    """Keys and values, which are views of what is there now."""
    return [table.keys(), table.values()]


def _of_function(function: types.FunctionType) -> list[Iterable[object]]:
    names = tuple(_names_in(function.__code__))

    def around() -> Iterable[object]:
        yield function.__code__
        for cell in function.__closure__ or ():
            yield _content(cell)
        for name in names:
            yield function.__globals__.get(name, _EMPTY)
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()

    # what a decorator wraps is among the attributes
    return [_Live(around), *_entries(vars(function))]


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
        return _EMPTY


@functools.lru_cache(maxsize=4096)
def _is_installed(module: str | None) -> bool:
    """Whether a module is Python's own, or of an installed package: such keep their variables to themselves."""
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if file is None:
        return module not in {"__main__", None}
    return file.startswith(tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))) or (
        module or ""
    ).startswith(f"{__package__}.")
