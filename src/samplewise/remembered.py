"""What ops did to the sample axis, remembered by the shapes and axes of their arguments: most calls are like one before."""

from collections.abc import Callable, Container, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .axes import Axis
from .collecting import Shared
from .registry import Operation
from .sample_axis import KEEPS, SHAPED, SHAPED_ALONE

CONSTANT = "constant"
# More than a model has; with shapes that never come back memory must not grow.
_LIMIT = 20_000
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(...)})
_FOLLOWED: dict[Hashable, tuple[object, ...]] = {}


def key_of(
    op: Operation, n: int, args: Sequence[Any], kwargs: dict[str, Any], kind: Callable[[Tensor], object]
) -> Hashable | None:
    """All that decides where the samples of a call's results are, or None where more than shapes and plain patterns does.

    Values go with their types: True equals 1, but `x.std(True)` is over everything; tensors too: `x.view(dtype)` may change the shape.
    """
    several = op.name in (KEEPS if op.inplace else SHAPED)
    alone = several if op.inplace else op.name in SHAPED_ALONE
    if not several and not alone:
        return None
    parts: list[Any] = [op.name, op.inplace, n]
    count = _describe(args, kind, parts)
    if kwargs and count >= 0:
        parts += kwargs
        more = _describe(tuple(kwargs.values()), kind, parts)
        count = count + more if more >= 0 else more
    return tuple(parts) if count == 1 or (several and count > 1) else None


def key_of_meeting(
    name: str, n: int, args: Sequence[Any], kind: Callable[[Tensor], object], parameters: Container[int]
) -> Hashable | None:
    """All that decides how parameters themselves (by id) meet samples in a call, or None where more does."""
    parts: list[Any] = [name, n]
    count = 0
    for value in args:
        if isinstance(value, Tensor):
            what = _plain_kind(value, kind(value), parameters) if value.layout is torch.strided else None
            if what is None:
                return None
            if not count:
                device = value.device.type
                # an op may keep more on one device than on another
                parts += (value.device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
            parts += (what, value.shape, value.stride(), value.dtype, value.requires_grad)
            count += 1
        elif type(value) in _PLAIN:
            parts += (type(value), value)
        elif isinstance(value, (tuple, list)) and _PLAIN.issuperset(map(type, value)):
            parts += (*map(type, value), tuple(value))
        else:
            return None
    return tuple(parts) if count > 1 else None


def _describe(values: Sequence[Any], kind: Callable[[Tensor], object], parts: list[Any]) -> int:
    """Append what is to know of some arguments; the number of tensors among them, negative where more is needed."""
    count = 0
    for value in values:
        if isinstance(value, Tensor):
            what = _plain_kind(value, kind(value), ())
            if what is None:
                return -1
            parts += (what, value.shape, value.dtype)
            count += 1
        elif type(value) in _PLAIN:
            parts += (type(value), value)
        elif isinstance(value, tuple | list | slice):
            inner = (value.start, value.stop, value.step) if isinstance(value, slice) else value
            parts += (type(value), len(inner))
            more = _describe(inner, kind, parts)
            if more < 0:
                return more
            count += more
        else:
            return -1
    return count


def _plain_kind(value: Tensor, kind: object, parameters: Container[int]) -> object:
    """A kind that says all there is to know: a plain pattern of samples, a constant, one of the parameters; else None."""
    if type(kind) is Axis:
        return kind.pattern
    if type(kind) is Shared:
        return Shared if id(value) in parameters else None
    # a number given as a tensor may be an axis, and its value would count
    return kind if kind == CONSTANT and (value.ndim or value.is_floating_point()) else None


def recall(key: Hashable | None) -> tuple[object, ...] | None:
    """What the results of such a call were."""
    return None if key is None else _FOLLOWED.get(key)


def remember(key: Hashable, kinds: Sequence[object]) -> None:
    """Keep what the results of a call were, where that follows from shapes."""
    if all(kind == CONSTANT or (isinstance(kind, Axis) and kind.pattern is not None) for kind in kinds):
        if len(_FOLLOWED) >= _LIMIT:
            _FOLLOWED.clear()
        _FOLLOWED[key] = tuple(kinds)
