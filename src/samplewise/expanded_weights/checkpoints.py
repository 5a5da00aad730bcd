"""Activation checkpoints in a wrapped call: the backward comes outside of it, and what it recomputes is recorded too."""

import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction, _CheckpointFrame

from samplewise.axes import tensors_in

from .recordings import LateRecording

Segment = Callable[..., Any]


def follow_checkpoints(recording: LateRecording, values: object, outside: Collection[_CheckpointFrame]) -> None:
    """Record the recomputation of the checkpoint that is running, and of those that the given tensors come from.

    Not of those `outside`, which ran before the call: they make the whole call again.
    """
    for frame in running_frames():
        if frame not in outside and not isinstance(frame.recompute_fn, _Recorded):
            frame.recompute_fn = _Recorded(recording, frame.recompute_fn)
    for x in tensors_in(values):
        node: Any = x.grad_fn
        if isinstance(node, CheckpointFunction._backward_cls) and not isinstance(node.run_function, _Recorded):  # type: ignore[attr-defined]  # noqa: SLF001
            node.run_function = _RecordedReentrant(recording, node.run_function, node)  # type: ignore[attr-defined]


def running_frames() -> Iterator[_CheckpointFrame]:
    """The frame of the non-reentrant checkpoint whose forward is running: it is where tensors are now saved."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # noqa: FBT003, SLF001
    cells = getattr(hooks[0], "__closure__", None) or () if hooks else ()
    yield from (cell.cell_contents for cell in cells if isinstance(cell.cell_contents, _CheckpointFrame))


class _Recorded:
    """A segment that runs under its recording."""

    def __init__(self, recording: LateRecording, segment: Segment) -> None:
        self.recording, self.segment = recording, segment

    def __call__(self, *args: Any) -> Any:
        with self.recording:
            return self.segment(*args)


class _RecordedReentrant(_Recorded):
    """A segment whose inputs are detached copies of those of the forward, and which has a backward of its own."""

    def __init__(self, recording: LateRecording, segment: Segment, node: Any) -> None:
        super().__init__(recording, segment)
        self.node = weakref.ref(node)

    def __call__(self, *args: Any) -> Any:
        self.recording.begin()
        node = self.node()
        assert node is not None
        copies = [x for x in args if isinstance(x, Tensor)]
        for copy, original in zip(copies, node.saved_tensors, strict=True):
            self.recording.declare(copy, self.recording.kind(original))
        return super().__call__(*args)
