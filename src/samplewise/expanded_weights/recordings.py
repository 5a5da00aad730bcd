"""Recordings whose backward comes later, by the user's own call, and leaves `grad_sample` on the parameters."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import get_gradient_edge

from samplewise.attaching import UNSEEN, refuse_hooks
from samplewise.collecting import Collector, Shared, Source
from samplewise.errors import SamplewiseError, UnsupportedOpError
from samplewise.factors import Dense
from samplewise.recording import Recording
from samplewise.running import accumulates, in_transform, modes
from samplewise.taps import Factors, Grads


class LateRecording(Recording):
    """One forward; every backward that belongs to it ends by writing rows to the parameters."""

    # it comes when no mode is on
    sees_backwards = False

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        *,
        batch_size: int,
        batch_dim: int,
        loss_reduction: str,
    ) -> None:
        super().__init__(model, batch_size=batch_size, batch_dim=batch_dim, loss_reduction=loss_reduction)
        self.parameters = dict(parameters)  # type: ignore[arg-type]
        self.collector = Collector(self.parameters)
        self._running: weakref.ref[_Finish] | None = None
        # where the ordinary gradients of parameters that are watched would be accumulated
        self._ordinary: dict[str, Any] = {}

    def _watch(self) -> None:
        """By a hook on every parameter, and a look at the graph of every backward."""
        for name, parameter in self.parameters.items():
            self._ordinary[name] = get_gradient_edge(parameter).node
            self._handles.append(parameter.register_hook(self._guard(name)))

    def _look_for_unseen(self, losses: Tensor | Sequence[Tensor]) -> None:
        """The hooks do, for the backward comes when no mode sees it."""

    def _guard(self, name: str) -> Callable[[Tensor], None]:
        """A hook that refuses a gradient which would be accumulated in the parameter, not one that is only asked for."""
        node, recording = self._ordinary[name], weakref.ref(self)

        def refuse(_: Tensor) -> None:
            alive = recording()
            # outside the `with` block the model may be used as ever, until this recording's own backward
            if alive is not None and accumulates(node) and (alive in modes() or alive.belongs()):
                raise UnsupportedOpError(f"{name}: {UNSEEN}")

        return refuse

    def collect(self, factors: Factors, grads: Grads, saved: Sequence[Tensor]) -> None:
        """Take the factors, and see to it that they are written when this backward ends."""
        self.begin()
        super().collect(factors, grads, saved)

    def take(self, tensor: Tensor, rows: Tensor) -> None:
        """Take gradients `(n, *shape)` of a shared tensor that somebody else made."""
        if self.belongs():
            self.begin()
            kind = self.kind(tensor)
            assert isinstance(kind, Shared)
            self.collector.add(Source.of(tensor, kind), Dense(rows), [])

    def begin(self) -> None:
        """Start collecting for the outermost backward that now runs; a no-op until it ends."""
        if self._running is not None and self._running() is not None:
            return
        self.before_backward()
        self.collector.clear()
        finish = _Finish(self)
        # autograd owns the callback: it is gone when the backward has ended, with an error or without
        Variable._execution_engine.queue_callback(finish)  # noqa: SLF001
        self._running = weakref.ref(finish)

    def before_backward(self) -> None:
        """Look at the parameters before anything is collected for them: hooks on them may have come since the forward."""
        for name, parameter in self.parameters.items():
            refuse_hooks(name, parameter)
        # also after a backward that took the hooks off
        for name, node in self._ordinary.items():
            if accumulates(node):
                raise UnsupportedOpError(f"{name}: {UNSEEN}")

    def write(self) -> None:
        """Add the collected rows to the parameters' `grad_sample`."""
        raise NotImplementedError


class _Finish:
    """The end of a backward."""

    def __init__(self, recording: LateRecording) -> None:
        self.recording = recording
        self.keeps_graph: bool = torch._C._autograd._get_current_graph_task_keep_graph()  # noqa: SLF001

    def __call__(self) -> None:
        with torch.no_grad(), torch._C.DisableTorchFunction():  # noqa: SLF001
            self.recording.write()
        self.recording.collector.clear()
        if not self.keeps_graph:
            # another backward can come only from another part of the graph
            remove(self.recording._handles)  # noqa: SLF001


def refuse_transform(name: str) -> None:
    """Raise inside a transform of torch.func, which has gradients and batches of its own."""
    if in_transform():
        raise UnsupportedOpError(
            f"{name}: runs inside a transform of torch.func (vmap, grad, ...), where the samples cannot be followed to a later backward. "
            "Call it outside, with the whole batch"
        )


def remove(handles: list[Any]) -> None:
    """Take hooks off."""
    for handle in handles:
        handle.remove()
    handles.clear()


def add_rows(parameter: Tensor, rows: Tensor) -> None:
    """Set `parameter.grad_sample`, or add to what it is.

    Raises:
        RuntimeError: If it has the rows of another number of samples, which broadcasting might add all the same.
    """
    earlier = rows_of(parameter)
    if earlier is not None and earlier.shape != rows.shape:
        raise SamplewiseError(
            f"grad_sample: rows of shape {tuple(rows.shape)} cannot be added to those of shape {tuple(earlier.shape)} that the parameter "
            "has from another batch. Please clear out its grad_sample first, and use one batch size in one backward"
        )
    parameter.grad_sample = rows if earlier is None else earlier + rows  # type: ignore[attr-defined]


def rows_of(parameter: Tensor) -> Tensor | None:
    """The parameter's `grad_sample`, if it has one."""
    return getattr(parameter, "grad_sample", None)


def refuse_earlier_rows(parameters: Mapping[str, Tensor]) -> None:
    """Raise if a parameter still has rows, which those of another batch would be added to."""
    for name, parameter in parameters.items():
        if rows_of(parameter) is not None:
            raise SamplewiseError(
                f"call_for_per_sample_grads: '{name}' still has the grad_sample of an earlier call, and adding the rows of another "
                "batch will be incorrect for multiple calls without clearing gradients. Please clear out the grad_sample parameter "
                "of the module's parameters first, for instance `p.grad_sample = None`"
            )
