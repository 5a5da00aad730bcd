"""`ExpandedWeight` and the registry of its handlers; what no handler takes is run by the engine."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from samplewise.axes import Axis, tensors_in
from samplewise.collecting import Shared, leaves_of
from samplewise.errors import SamplewiseError, UnsupportedOpError
from samplewise.registry import Operation, operation
from samplewise.results import dense_in
from samplewise.sample_axis import ALIGNED, ELEMENTWISE, LOSSES
from samplewise.taps import Enter, Tap

from .recordings import LateRecording, add_rows, refuse_transform

Function = Callable[..., Any]
Handler = TypeVar("Handler", bound=type[torch.autograd.Function])
Result = TypeVar("Result")

_RECORDED = (Tap._backward_cls, Enter._backward_cls)  # noqa: SLF001
_ENTRY_BY_ENTRY = ALIGNED.union(ELEMENTWISE, LOSSES)

HANDLED_FUNCTIONS: dict[Function, type[torch.autograd.Function]] = {}


def implements_per_sample_grads(torch_function: Function) -> Callable[[Handler], Handler]:
    """Register the decorated `torch.autograd.Function` as the handler of a function under `ExpandedWeight`.

    The handler is called as `handler.apply(kwarg_names, torch_function, *args, *kwargs.values())`. Its forward usually ends
    in `forward_helper`, its backward calls `set_grad_sample_if_exists` for every weight and returns the input's gradient.
    It takes precedence over what this library does for the function.

    Args:
        torch_function: The function as users call it, such as `torch.nn.functional.linear`.

    Example:
        >>> @implements_per_sample_grads(torch.nn.functional.bilinear)            # doctest: +SKIP
        ... class BilinearPerSampleGrad(torch.autograd.Function): ...
    """

    def register(handler: Handler) -> Handler:
        HANDLED_FUNCTIONS[torch_function] = handler
        return handler

    return register


class ExpandedWeight(Tensor):
    """A trainable tensor whose gradient is wanted per sample: ops act as on the tensor itself.

    After `backward`, the tensor it was made of has `grad_sample`, `(n, *shape)`, and no `.grad`; several uses and several
    backwards add up. What is computed from ExpandedWeights alone is again one, of the same original tensors.

    Of other tensors the shape says whether they hold samples: n on axis 0, or on axis 1 after `set_batch_first(False)`. A
    constant of that shape, such as a mask, is refused where it meets the weight entry by entry and both have n there. In
    other ops it cannot be told from samples, and the rows would be wrong: in `constant @ weight`, `weight[order]`, and
    `constant + weight` with a weight of fewer axes. Give it a leading axis of 1, `(constant[None] @ weight)[0]`, or use
    `call_for_per_sample_grads`, which is shown the samples.

    Args:
        orig_weight: The tensor, `shape`; it must require grad.
        batch_size: n, which inputs must have too.
        loss_reduction: "sum", or "mean" to multiply the gradients by n.

    Raises:
        RuntimeError: If `orig_weight` is no tensor or needs no gradient; later, if an input does not fit.

    Example:
        >>> weight = torch.randn(3, 4, requires_grad=True)
        >>> out = torch.nn.functional.linear(torch.randn(5, 4), ExpandedWeight(weight, 5, "sum"))
        >>> out.sum().backward()
        >>> weight.grad_sample.shape
        torch.Size([5, 3, 4])
    """

    handled_functions = HANDLED_FUNCTIONS

    def __new__(cls, orig_weight: Tensor, batch_size: int, loss_reduction: str) -> Self:
        """Check the arguments; the new tensor has the values of `orig_weight`."""
        del batch_size
        if not isinstance(orig_weight, Tensor):
            raise SamplewiseError(f"Can only make Expanded Weights of Tensors, got {type(orig_weight).__name__}")
        if not orig_weight.requires_grad:
            raise SamplewiseError(
                "Can only build ExpandedWeights objects of tensors that requires_grad; freeze by passing it as is"
            )
        if loss_reduction not in ("sum", "mean"):
            raise SamplewiseError(f"Expected loss_reduction argument to be sum or mean, got {loss_reduction}")
        return Tensor._make_subclass(cls, orig_weight, True)  # noqa: FBT003, SLF001

    def __init__(self, orig_weight: Tensor, batch_size: int, loss_reduction: str) -> None:
        self.orig_weight = orig_weight
        self.batch_size = batch_size
        self.loss_reduction = loss_reduction
        self.batch_first = True
        self.allow_smaller_batches = False
        # where rows go; the tensors that a derived weight was computed from, itself for one that was not
        self.add_rows: Callable[[Tensor], None] = lambda rows: add_rows(orig_weight, rows)
        self.origins: tuple[Tensor, ...] = (orig_weight,)

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function by its handler, or else recorded by the engine."""
        del types
        kwargs = kwargs or {}
        handler = cls.handled_functions.get(func)
        if handler is not None:
            return handler.apply(tuple(kwargs), func, *args, *kwargs.values())
        if func in {Tensor.backward, torch.autograd.backward, torch.autograd.grad}:
            raise SamplewiseError(
                f"{func.__name__}: this tensor was computed from ExpandedWeights alone, so it is the same for all samples. Check that an "
                "input has their batch size on the axis that `set_batch_first` says"
            )
        if func in {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}:
            raise SamplewiseError(
                f"Expanded Weights encountered but cannot handle function {func.__name__}: the weight gets no ordinary gradient, and of "
                "one computed from it every use has a gradient of its own. Put the hook on a result of the layer, or change the rows"
            )
        if operation(func).plain_property:
            return func(*(unwrapped(arg) for arg in args))
        return recorded(func, args, dict(kwargs))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """The original weight and what was declared of it."""
        return f"ExpandedWeight({self.orig_weight}, batch_size={self.batch_size}, loss_reduction={self.loss_reduction!r})"

    def set_batch_first(self, is_batch_first: bool = True) -> None:  # noqa: FBT001, FBT002
        """Say whether inputs have their samples on axis 0, or on axis 1."""
        self.batch_first = is_batch_first

    def set_allow_smaller_batches(self, is_allow_smaller_batches: bool) -> None:  # noqa: FBT001
        """Say whether an input may have fewer than n samples: the first ones, the others then have zero rows."""
        self.allow_smaller_batches = is_allow_smaller_batches


def expanded_in(values: object) -> list[ExpandedWeight]:
    """All ExpandedWeights in nested arguments."""
    return [x for x in tree_leaves(values) if isinstance(x, ExpandedWeight)]


def unwrapped(values: Result) -> Result:
    """The arguments with every ExpandedWeight replaced by its original weight."""
    return tree_map_only(ExpandedWeight, lambda x: x.orig_weight, values)  # type: ignore[no-any-return]


def is_batch_first(expanded_args_and_kwargs: Iterable[object]) -> bool | None:
    """Whether the ExpandedWeights among the arguments say that samples are on axis 0; None if there is none.

    Raises:
        RuntimeError: If they disagree.
    """
    said = {x.batch_first for x in expanded_args_and_kwargs if isinstance(x, ExpandedWeight)}
    if len(said) > 1:
        raise SamplewiseError(
            "Got conflicting batch_first arguments in the same layer. Call set_batch_first on all of its weights."
        )
    return said.pop() if said else None


def common_size(weights: Sequence[ExpandedWeight]) -> int:
    """The n of all the weights."""
    sizes = {weight.batch_size for weight in weights}
    if len(sizes) > 1:
        raise SamplewiseError(f"Expected ExpandedWeights to have the same batch size, got {', '.join(map(str, sorted(sizes)))}")
    return sizes.pop()


def common_reduction(weights: Sequence[ExpandedWeight]) -> str:
    """The loss reduction of all the weights."""
    said = {weight.loss_reduction for weight in weights}
    if len(said) > 1:
        raise SamplewiseError("Expected ExpandedWeights to all have the same loss_reduction argument but got sum and mean")
    return said.pop() if said else "sum"


def recorded(
    func: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    kinds: Iterable[tuple[Tensor, Axis | str]] = (),
    size: int | None = None,
) -> Any:
    """Run a function with ExpandedWeights among its arguments.

    `kinds` says what other arguments are, where their shape could be misread; `size` is the number of samples, by default
    that of the weights.
    """
    refuse_transform(func.__name__)
    weights = expanded_in((args, kwargs))
    recording = _Direct(weights, common_size(weights) if size is None else size)
    for tensor, kind in kinds:
        recording.declare(tensor, kind)
    try:
        with recording:
            out = func(*unwrapped(args), **unwrapped(kwargs))
    except UnsupportedOpError as error:
        raise UnsupportedOpError(f"Expanded Weights encountered but cannot handle function {func.__name__}: {error}") from error
    return tree_map_only(Tensor, recording.expanded, out)


class _Direct(LateRecording):
    """One function called with ExpandedWeights."""

    # what is not expanded has the samples on the declared axis: that is the interface
    trusts_shapes = True

    def __init__(self, weights: Sequence[ExpandedWeight], size: int) -> None:
        unique = {id(origin): origin for weight in weights for origin in weight.origins}
        names = {key: f"weight {place} of shape {tuple(unique[key].shape)}" for place, key in enumerate(unique)}
        origins = {names[key]: origin for key, origin in unique.items()}
        dim = 0 if is_batch_first(weights) else 1
        # the mean is undone at the end: it was taken over the samples that each weight was made for, not over fewer
        super().__init__(nn.Module(), origins, batch_size=size, batch_dim=dim, loss_reduction="sum")
        self.like, self._open = weights[0], True
        self._reduction, self._sizes = common_reduction(weights), dict[str, int]()
        for weight in weights:
            own = frozenset(names[id(origin)] for origin in weight.origins)
            self._sizes.update(dict.fromkeys(own, weight.batch_size))
            self.declare(weight.orig_weight, Shared(own, isometric=weight.orig_weight is weight.origins[0]))

    def _run(self, func: Function, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As ever, unless a constant may be taken for samples."""
        if op.name in _ENTRY_BY_ENTRY:
            self._refuse_own_rows(op.name, tensors_in((args, kwargs)))
        return super()._run(func, op, args, kwargs)

    def _refuse_own_rows(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Refuse a weight with rows of its own where the samples of a tensor, of which only the shape speaks, would be."""
        places = [(x, where) for x in tensors if isinstance(where := self.where(x), Axis)]
        if self.n == 1 or any(_is_recorded(x) for x, _ in places):
            return
        weights = [w for w in tensors if isinstance(self.kind(w), Shared)]
        for x, axis, w in ((x, axis, w) for x, axis in places for w in weights):
            dim = axis.dim + w.ndim - x.ndim
            if dim >= 0 and w.shape[dim] == x.shape[axis.dim] and w.stride(dim):
                raise UnsupportedOpError(
                    f"{name}: a tensor of shape {tuple(x.shape)} may be a batch of {self.n} samples, or a constant, such as a "
                    f"mask of a weight of shape {tuple(w.shape)}. Give a constant a leading axis of 1, `(weight * mask[None])[0]`, or "
                    "use call_for_per_sample_grads, which is shown the samples"
                )

    def expanded(self, out: Tensor) -> Tensor:
        """A result of the function: an ExpandedWeight if it is the same for all samples."""
        kind = self.kind(out)
        if not isinstance(kind, Shared):
            return out
        derived = ExpandedWeight(out, self.like.batch_size, self.like.loss_reduction)
        derived.set_batch_first(self.like.batch_first)
        derived.set_allow_smaller_batches(self.like.allow_smaller_batches)
        derived.origins = tuple(self.parameters[name] for name in sorted(kind.names))
        return derived

    def write(self) -> None:
        """Add the rows, the missing samples last."""
        for name, factor in self.collected().items():
            parameter, size = self.parameters[name], self._sizes[name]
            # a lower precision, of autocast, is that of the op alone
            rows = dense_in(name, factor, None).to(parameter.dtype)
            add_rows(parameter, padded(rows * size if self._reduction == "mean" else rows, size))


def _is_recorded(x: Tensor) -> bool:
    """Whether a tensor was computed with ExpandedWeights, and so has samples: its history goes on behind a recorded op."""
    return len(leaves_of(x)) > len(leaves_of(x, until=_RECORDED))


def padded(rows: Tensor, size: int) -> Tensor:
    """Rows of the first samples, with zeros for the others, `(size, *shape)`."""
    missing = size - len(rows)
    return rows if missing <= 0 else torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
