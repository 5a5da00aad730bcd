"""What torch is doing in this thread: modes, transforms, a backward; and how our own arithmetic stays out of all that."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


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


@contextmanager
def unrecorded() -> Iterator[None]:
    """Our own arithmetic: no recording sees it, and no graph is built."""
    with torch._C.DisableTorchFunction(), torch.no_grad():  # noqa: SLF001
        if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
            yield
            return
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield


def in_backward() -> bool:
    """Whether a backward is running: what runs forward in it is a recomputation."""
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001
