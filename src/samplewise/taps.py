"""The two places where a recording touches the autograd graph: an op's results, and a parameter that enters row by row."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from .collecting import Source, Uses, leaves_of
from .errors import UnsupportedOpError
from .factors import Factor

Grads = Sequence[Tensor | None]
# (gradients of the results, saved tensors) -> the factor of each use
Factors = Callable[[Grads, Sequence[Tensor]], list[tuple[Source, Uses, Factor]]]
# (gradient of the result, saved tensors) -> gradient of the op's input
Back = Callable[[Tensor, Sequence[Tensor]], Tensor]


class Collects(Protocol):
    """What a tap needs of a recording."""

    # whether the gradients are to be differentiated again
    create_graph: bool

    def awaits(self, grads: Grads) -> bool:
        """Whether the backward that brings these gradients belongs to the recording."""

    def follows(self, *, possible: bool) -> bool:
        """Whether an op's own backward is to run as recorded ops now, if it is made of such: derivatives of it may become losses."""

    def collect(self, factors: Factors, grads: Grads, saved: Sequence[Tensor]) -> None:
        """Take the factors of gradients that are awaited; inside `aside`."""

    def aside(self) -> AbstractContextManager[None]:
        """Arithmetic that no recording sees."""


class Tap(torch.autograd.Function):
    """Identity on an op's results; its backward hands their gradients to the recording.

    `mark_dirty` lets in-place ops follow. What the rule needs is kept by `save_for_backward`, so that version checks, saved-tensor
    hooks and release after the backward hold as in plain PyTorch. An op that ran without a graph has its own backward here, to its
    one input: that saves the op's node. Where gradients may be differentiated again it has both, and one of them is taken.
    """

    @staticmethod
    def run(
        recording: Collects,
        factors: Factors,
        anchor: Tensor,
        outs: list[Tensor],
        saved: list[Tensor],
        input: Tensor | None = None,
        back: Back | None = None,
    ) -> list[Tensor]:
        """Tap results; `anchor` requires grad, so that each of them does."""
        apply: Callable[..., Any] = Tap.apply if torch.compiler.is_compiling() else _APPLY
        tapped = apply(recording, factors, anchor, input, back, saved, *outs)
        return list(tapped) if len(outs) > 1 else [tapped]

    @staticmethod
    def is_on(out: Tensor) -> bool:
        """Whether a tapped result's gradient will come by the tap: ops of a subclass may have led its graph past it."""
        return type(out) is Tensor or isinstance(out.grad_fn, Tap._backward_cls)

    @staticmethod
    def forward(
        ctx: Any,
        recording: Collects,
        factors: Factors,
        _: Tensor,
        __: Tensor | None,
        back: Back | None,
        saved: list[Tensor],
        *outs: Tensor,
    ) -> Any:
        """Pass results on."""
        ctx.mark_dirty(*outs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.recording, ctx.factors, ctx.back = recording, factors, back
        return outs if len(outs) > 1 else outs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Collect, and pass the gradients through."""
        recording, back, saved = ctx.recording, ctx.back, ctx.saved_tensors
        _refuse_second(recording)
        awaited, passed = recording.awaits(grads), None
        leads = back is not None and ctx.needs_input_grad[3] and grads[0] is not None
        with recording.aside():
            if awaited:
                recording.collect(ctx.factors, grads, saved)
            if leads and not recording.create_graph:
                passed = back(grads[0], saved)
        if recording.create_graph and not recording.follows(possible=back is not None):
            # by the graph that the op has there beside
            back = None
        elif recording.create_graph and leads:
            passed = back(grads[0], saved)
        through = grads if back is None else [None] * len(grads)
        return None, None, None, passed, None, None, *through


# `apply` without the look for what transforms of torch.func left behind: none runs where a recording is active
_APPLY: Callable[..., Any] = super(torch.autograd.Function, Tap).apply


class Enter(torch.autograd.Function):
    """Identity on a detached shared tensor that meets the samples row by row; what comes back are its rows' gradients."""

    @staticmethod
    def run(recording: Collects, factors: Factors, anchor: Tensor, tensor: Tensor) -> Tensor:
        """Let a tensor enter."""
        entered: Tensor = Enter.apply(recording, factors, anchor, tensor)  # type: ignore[no-untyped-call]
        return entered

    @staticmethod
    def forward(ctx: Any, recording: Collects, factors: Factors, _: Tensor, tensor: Tensor) -> Tensor:
        """Pass the tensor on."""
        ctx.recording, ctx.factors = recording, factors
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Collect; only a derivative of what was collected goes further."""
        recording = ctx.recording
        _refuse_second(recording)
        if recording.awaits((grad,)):
            with recording.aside():
                recording.collect(ctx.factors, (grad,), ())
        else:
            recording.follows(possible=False)
        return None, None, None, grad if ctx.needs_input_grad[3] else None


class Seen(torch.autograd.Function):
    """Identity on a shared tensor at a use that the recording saw, so that uses it did not see can be told from it."""

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        """Pass the tensor on."""
        return tensor.view_as(tensor)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        """Pass the gradient on."""
        return grad


def seen(recording: Collects, tensor: Tensor) -> Tensor:
    """A shared tensor as an op may use it: without its ordinary gradient, unless that is to be differentiated again."""
    if not recording.create_graph:
        return tensor.detach()
    attached: Tensor = Seen.apply(tensor)  # type: ignore[no-untyped-call]
    return attached


def unseen_leaves(losses: Tensor) -> list[Tensor]:
    """The leaves of a graph that are reached otherwise than through a use that the recording saw."""
    return leaves_of(losses, until=_SEEN_NODES)


def _refuse_second(recording: Collects) -> None:
    # Grad mode is on in a backward with create_graph=True only. The op ran on detached parameters: what the gradient that passes
    # here owes to them has no graph, whether or not anything else in it has one.
    if torch.is_grad_enabled() and not recording.create_graph:
        raise UnsupportedOpError(
            "backward: create_graph=True runs through a recorded use of a parameter, and the path of a second derivative through "
            "it would be missing. Say `record(..., create_graph=True)`, or take the derivative with create_graph=False."
        )


def _refuse_hook_after(_: Any, __: Callable[..., Any]) -> None:
    # what would run after the op's own backward, and see or change the gradients of its parameters
    raise UnsupportedOpError(
        "record: a hook that runs after the backward of an op (`h.grad_fn.register_hook`, a module's `register_backward_hook`) would not "
        "see the gradients of the op's parameters here. Use `h.register_hook` or `register_full_backward_hook`."
    )


Tap._backward_cls.register_hook = _refuse_hook_after  # type: ignore[attr-defined]  # noqa: SLF001
_SEEN_NODES = (Seen._backward_cls, Enter._backward_cls)  # noqa: SLF001
