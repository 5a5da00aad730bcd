"""The call wrapper: a module's forward, recorded, with `grad_sample` on its parameters after any later backward."""

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only

from samplewise.attaching import refuse_loss
from samplewise.axes import Axis, Lost
from samplewise.collecting import Shared
from samplewise.errors import SamplewiseError
from samplewise.results import dense_in
from samplewise.taps import Tap

from .checkpoints import follow_checkpoints, running_frames
from .handlers import PerSampleGrad, input_and_rest
from .helpers import refuse_mixture
from .recordings import LateRecording, add_rows, refuse_earlier_rows, refuse_transform, remove, rows_of
from .tensor import HANDLED_FUNCTIONS, ExpandedWeight

Function = Callable[..., Any]


def call_for_per_sample_grads(
    module: nn.Module, *, batch_size: int | None = None, loss_reduction: str = "sum", batch_first: bool = True
) -> Callable[..., Any]:
    """A module's forward after which `backward` leaves per-sample gradients on its parameters.

    The module runs as it is. After a backward that reaches its output, every trainable parameter has `grad_sample`,
    `(n, *shape)`, and no `.grad`; inputs get their ordinary gradients. The loss may be computed anywhere, but must be a sum
    or a mean over samples: use a sum where a mean would ignore or weigh targets.

    Args:
        module: Any module, unmodified.
        batch_size: n; by default the common size of all tensor arguments on the axis of the samples.
        loss_reduction: "sum"; or "mean" if the loss is a mean over samples, which multiplies the gradients by n.
        batch_first: Whether the arguments have their samples on axis 0, or on axis 1.

    Returns:
        A function with the signature and the result of the module's forward. Each call is one batch.

    Raises:
        RuntimeError: If an argument is not what it should be, if a parameter still has a `grad_sample` from before, or,
            when called, if the batch size is unclear or the samples cannot be told apart.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> call_for_per_sample_grads(model)(torch.randn(5, 4)).sum().backward()
        >>> model.weight.grad_sample.shape, model.weight.grad
        (torch.Size([5, 3, 4]), None)
    """
    if loss_reduction not in ("sum", "mean"):
        raise SamplewiseError(f"Expected loss_reduction argument to be sum or mean, got {loss_reduction}")
    if not isinstance(module, nn.Module):
        raise SamplewiseError(f"Module passed must be nn.Module, got {type(module).__name__}")
    if not (batch_size is None or isinstance(batch_size, int)):
        raise SamplewiseError(f"Batch size passed must be None or an integer, got {type(batch_size).__name__}")
    if batch_size is not None and batch_size < 1:
        raise SamplewiseError(f"Batch size must be positive, got {batch_size}")
    refuse_earlier_rows(dict(module.named_parameters()))
    dim = 0 if batch_first else 1

    @functools.wraps(module.forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        refuse_transform("call_for_per_sample_grads")
        size = _batch_size((args, kwargs), dim, batch_size)
        recording = _Wrapped(module, batch_size=size, batch_dim=dim, loss_reduction=loss_reduction)
        refuse_earlier_rows(recording.parameters)
        return recording.run(args, kwargs)

    return wrapper


def _batch_size(inputs: object, dim: int, given: int | None) -> int:
    """The common size of all inputs, or the given one if there are inputs of that size."""
    sizes = list(dict.fromkeys(_sizes(inputs, dim)))
    if given is not None:
        if sizes and given not in sizes:
            raise SamplewiseError(
                f"Expected ExpandedWeights to have batch size matching input but got input batch size of {sizes[0]} with ExpandedWeight of "
                f"batch size {given}"
            )
        return given
    if len(sizes) > 1:
        raise SamplewiseError(
            f"When computing batch size, found at least one input with batch size {sizes[0]} and one with batch size {sizes[1]}. Please "
            "specify it explicitly using the batch size kwarg in call_for_per_sample_grads"
        )
    if not sizes:
        raise SamplewiseError(
            "Unable to find a tensor in the passed args and kwargs that has the axis of the samples. They may not be pytree-able, so the "
            "batch size cannot be computed from the inputs. Please specify it explicitly"
        )
    return sizes[0]


def _sizes(inputs: object, dim: int) -> Iterator[int]:
    for x in tree_leaves(inputs, is_leaf=lambda value: isinstance(value, PackedSequence)):
        if isinstance(x, PackedSequence):
            yield int(x.batch_sizes[0])
        elif isinstance(x, Tensor) and x.ndim > dim:
            yield x.shape[dim]


class _Wrapped(LateRecording):
    """One call of a wrapped module."""

    def __init__(self, module: nn.Module, *, batch_size: int, batch_dim: int, loss_reduction: str) -> None:
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        super().__init__(module, parameters, batch_size=batch_size, batch_dim=batch_dim, loss_reduction=loss_reduction)
        # the rows that this call wrote last, and their versions
        self._written: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._outside = weakref.WeakSet(running_frames())

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module; only guards on its parameters stay until its graph is gone or its backward has run."""
        self.open()
        weakref.finalize(self, remove, self._handles)
        entrance = self._handles.pop()
        try:
            with self:
                out = self.model(*args, **kwargs)
        except BaseException:
            self.close()
            raise
        finally:
            entrance.remove()
        follow_checkpoints(self, out, self._outside)
        self._guard_kept()
        return tree_map_only(Tensor, self._checked, out)

    def _checked(self, out: Tensor) -> Tensor:
        """An output, through which no backward comes if what each sample contributes to it cannot be told apart."""
        try:
            if out.requires_grad:
                self._check_losses(out)
        except SamplewiseError as error:
            (out,) = Tap.run(self, _refusal("output", out, error), self.anchor, [out.clone()], [])
        return out

    def _guard_kept(self) -> None:
        """The same for tensors that the forward left elsewhere, such as a second loss that a module keeps."""
        for x, kind in self._kinds.items():
            try:
                if isinstance(kind, Lost) and x.requires_grad:
                    refuse_loss(self.kind(x), self.loss_reduction)
            except SamplewiseError as error:
                x.register_hook(self._if_mine(_refusal("tensor", x, error)))

    def _if_mine(self, refuse: Function) -> Callable[[Tensor], None]:
        recording = weakref.ref(self)

        def hook(_: Tensor) -> None:
            alive = recording()
            if alive is not None and alive.belongs():
                refuse()

        return hook

    def before_backward(self) -> None:
        """Refuse to add to rows other than those of this call, which are of the same samples."""
        super().before_backward()
        refuse_earlier_rows({name: p for name, p in self.parameters.items() if not self._wrote(name, rows_of(p))})

    def _wrote(self, name: str, rows: Tensor | None) -> bool:
        """Whether the rows are those that an earlier backward of this call left, as they were."""
        written, version = self._written.get(name, (None, 0))
        return rows is not None and written is not None and written() is rows and rows._version == version  # noqa: SLF001

    def write(self) -> None:
        """Add the rows of this backward; parameters that the loss did not reach have zeros."""
        factors = self.collected()
        for name, parameter in self.parameters.items():
            rows = (
                dense_in(name, factors[name], None) if name in factors else parameter.new_zeros(self.n or 0, *parameter.shape)
            )
            add_rows(parameter, rows.to(parameter.dtype))
            total = rows_of(parameter)
            assert total is not None
            self._written[name] = weakref.ref(total), total._version  # noqa: SLF001

    def __torch_function__(
        self, func: Function, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As the engine does, after the checks of the interface, unless a third party handles the function."""
        handler, kwargs = HANDLED_FUNCTIONS.get(func), kwargs or {}
        follow_checkpoints(self, (args, kwargs), self._outside)
        if handler is not None:
            x, rest = input_and_rest(args, kwargs)
            shared = [w for w in rest if isinstance(self.kind(w), Shared)]
            axis = self.where(x) if isinstance(x, Tensor) else None
            if shared and axis is not None:
                if issubclass(handler, PerSampleGrad):
                    handler.check(func, x, args, kwargs)
                    refuse_mixture([w for w in rest if w.is_leaf and w.requires_grad and not isinstance(self.kind(w), Shared)])
                elif axis in {Axis(0), Axis(1)}:
                    return self._handled(handler, func, args, kwargs, axis.dim)
        return super().__torch_function__(func, types, args, kwargs)

    def _handled(
        self, handler: type[torch.autograd.Function], func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], dim: int
    ) -> Any:
        """Run a third party's handler, with ExpandedWeights whose rows come to this recording."""

        def expanded(weight: Tensor) -> Tensor:
            if not isinstance(self.kind(weight), Shared):
                return weight
            new = ExpandedWeight(weight, self.n or 0, self.loss_reduction)
            new.add_rows = functools.partial(self.take, weight)
            new.set_batch_first(dim == 0)
            return new

        args, kwargs = tree_map_only(Tensor, expanded, (args, dict(kwargs)))
        out = handler.apply(tuple(kwargs), func, *args, *kwargs.values())
        return tree_map_only(Tensor, lambda x: self._tapped(x, dim), out)

    def _tapped(self, out: Tensor, dim: int) -> Tensor:
        """A handler's result, so that its backward counts as one of this recording."""
        if not out.requires_grad:
            return out
        (tapped,) = Tap.run(self, _no_factors, self.anchor, [out], [])
        self.declare(tapped, Axis(dim))
        return tapped


def _no_factors(*_: object) -> list[Any]:
    return []


def _refusal(what: str, x: Tensor, error: SamplewiseError) -> Callable[..., NoReturn]:
    """What to do when a gradient comes to a tensor that cannot be split over samples."""
    message = f"call_for_per_sample_grads, {what} of shape {tuple(x.shape)}: {error}"

    def refuse(*_: object) -> NoReturn:
        raise SamplewiseError(message)

    return refuse
