"""What torch is doing in this thread: modes, transforms, a backward; and how our own arithmetic stays out of all that."""

import functools
import sys
from collections.abc import Sequence
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack


def modes() -> list[Any]:
    """The function modes of this thread, the recordings among them."""
    return torch.overrides._get_current_function_mode_stack()  # type: ignore[no-any-return]  # noqa: SLF001


def in_transform() -> bool:
    """Whether a transform of torch.func runs."""
    # the tracer of torch.compile functionalizes, and falls back to plain frames
    top = torch._C._functorch.peek_interpreter_stack()  # noqa: SLF001
    return top is not None and top.key() != torch._C._functorch.TransformType.Functionalize  # noqa: SLF001


def unwrapped(x: Tensor) -> Tensor:
    """The tensor that the transforms now running have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):  # noqa: SLF001
        x = torch._C._functorch.get_unwrapped(x)  # noqa: SLF001
    return x


def accumulates(node: Any) -> bool:
    """Whether the backward now running adds to the `.grad` of this leaf; `torch.autograd.grad` does not."""
    try:
        return torch._C._will_engine_execute_node(node)  # noqa: SLF001
    except RuntimeError:
        # the leaf itself is what `torch.autograd.grad` was asked for
        return False


def run_backward(losses: Tensor, ones: Tensor, *, retain_graph: bool) -> None:
    """What `torch.autograd.backward` comes to, whose checks would first import what torch knows of symbolic shapes, for a second."""
    how = {"keep_graph": retain_graph, "create_graph": False, "allow_unreachable": True, "accumulate_grad": True}
    _engine_run_backward((losses,), (ones,), inputs=(), **how)


class unrecorded:  # noqa: N801  (used as torch.no_grad is)
    """Our own arithmetic: no recording sees it, no autocast changes it, and a graph is built only if asked for.

    A class, and not a generator, because it is entered for every use of a parameter.
    """

    def __init__(self, *, graph: bool = False) -> None:
        self._graph = graph

    def __enter__(self) -> None:
        """Switch off."""
        self._functions = torch._C.DisableTorchFunction()  # noqa: SLF001
        self._functions.__enter__()
        self._before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(self._graph)  # noqa: SLF001
        self._casts = _without_autocast() if torch._C._is_any_autocast_enabled() else ()  # noqa: SLF001
        for cast in self._casts:
            cast.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """And on again."""
        for cast in reversed(self._casts):
            cast.__exit__(kind, error, trace)
        torch._C._set_grad_enabled(self._before)  # noqa: SLF001
        self._functions.__exit__(kind, error, trace)


def _without_autocast() -> Sequence[torch.autocast]:
    return [torch.autocast(device, enabled=False) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]


class Watching(TorchDispatchMode):
    """A mode that wants to hear of values which leave torch without an op."""

    def read(self, x: Tensor, how: str) -> None:
        """Hear of one."""


def only_watched() -> bool:
    """Whether all dispatch modes of this thread only watch."""
    return all(isinstance(mode, Watching) for mode in _get_current_dispatch_mode_stack())


def listed(x: Tensor) -> Any:
    """`x.tolist()`."""
    if torch._C._len_torch_dispatch_stack():  # noqa: SLF001
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, Watching):
                mode.read(x, "tolist")
    return x.tolist()


def in_backward() -> bool:
    """Whether a backward is running: what runs forward in it is a recomputation."""
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001


def hide_from_compiler() -> None:
    """Keep torch.compile from tracing our bookkeeping, with all that is remembered in it, where a compiled function is recorded."""
    rules = sys.modules.get("torch._dynamo.trace_rules")
    if rules is not None:
        _hide_from(rules)


@functools.cache
def _hide_from(rules: ModuleType) -> None:
    rules.add(__package__)
