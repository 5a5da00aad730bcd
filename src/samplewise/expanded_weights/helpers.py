"""The functions that handlers are written with, under the names that programs import."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from samplewise.errors import SamplewiseError

from .tensor import ExpandedWeight, common_reduction, padded, unwrapped

Function = Callable[..., Any]


def standard_kwargs(kwarg_names: Sequence[str], expanded_args: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split what a handler receives into positional and keyword arguments: the last ones belong to `kwarg_names`.

    Example:
        >>> standard_kwargs(("bias",), ("input", "weight", "bias"))
        (('input', 'weight'), {'bias': 'bias'})
    """
    count = len(expanded_args) - len(kwarg_names)
    return tuple(expanded_args[:count]), dict(zip(kwarg_names, expanded_args[count:], strict=True))


def forward_helper(func: Function, expanded_args: Sequence[Any], expanded_kwargs: Mapping[str, Any]) -> Any:
    """Check a handler's arguments and run the function on the original weights.

    Args:
        func: The function.
        expanded_args: Its positional arguments; the first is the input, with its samples on axis 0.
        expanded_kwargs: Its keyword arguments.

    Returns:
        What `func` returns.

    Raises:
        RuntimeError: If the first argument is no batched tensor of the size that the ExpandedWeights were made for, or if
            these disagree on `loss_reduction`.
    """
    check_input(
        func, expanded_args[0], [x for x in (*expanded_args, *expanded_kwargs.values()) if isinstance(x, ExpandedWeight)]
    )
    return func(*unwrapped(tuple(expanded_args)), **unwrapped(dict(expanded_kwargs)))


def check_input(func: Function, x: object, weights: Sequence[ExpandedWeight]) -> None:
    """Raise unless `x` can be the input of a layer with these weights."""
    name = getattr(func, "__name__", str(func))
    if isinstance(x, ExpandedWeight):
        raise SamplewiseError(
            f"Expanded Weights do not support inputs that are also ExpandedWeights. Input must be a Tensor, got {type(x).__name__} "
            f"in function {name}"
        )
    if not isinstance(x, Tensor):
        raise SamplewiseError(
            f"Expanded Weights requires a Tensor as the first input to get the batch dimension, got {type(x).__name__} in function {name}"
        )
    if not x.ndim:
        raise SamplewiseError(f"Expanded Weights requires a batch dimension but got an input of size 0 in function {name}")
    if not x.shape[0]:
        raise SamplewiseError(
            f"0 is not a valid batch size for Expanded Weights but got input tensor of shape {tuple(x.shape)} in function {name}"
        )
    common_reduction(weights)
    for weight in weights:
        dim = 0 if weight.batch_first else 1
        refuse_size(func, x.shape[dim] if x.ndim > dim else None, weight)


def refuse_size(func: Function, size: int | None, weight: ExpandedWeight) -> None:
    """Raise unless an input of `size` samples fits the weight."""
    fewer = size is not None and size < weight.batch_size and weight.allow_smaller_batches
    if size != weight.batch_size and not fewer:
        raise SamplewiseError(
            f"Expected ExpandedWeights to have batch size matching input but got input batch size of {size} with ExpandedWeight of "
            f"batch size {weight.batch_size} in function {getattr(func, '__name__', func)}"
        )


def maybe_scale_by_batch_size(grad_sample: Tensor, expanded_weight: ExpandedWeight) -> Tensor:
    """The rows times n if the loss is a mean over samples, else as they are."""
    return grad_sample * expanded_weight.batch_size if expanded_weight.loss_reduction == "mean" else grad_sample


def set_grad_sample_if_exists(maybe_expanded_weight: object, per_sample_grad_fn: Callable[[Tensor], Tensor]) -> None:
    """Add `per_sample_grad_fn(weight)`, `(n, *shape)`, to the rows of an ExpandedWeight; nothing for what needs no gradient.

    Raises:
        RuntimeError: If the first argument is a plain tensor that requires grad.
    """
    weight = unpack_expanded_weight_or_tensor(maybe_expanded_weight)
    if isinstance(maybe_expanded_weight, ExpandedWeight):
        rows = maybe_scale_by_batch_size(per_sample_grad_fn(weight), maybe_expanded_weight)
        maybe_expanded_weight.add_rows(padded(rows, maybe_expanded_weight.batch_size))


def unpack_expanded_weight_or_tensor(
    maybe_expanded_weight: object,
    func: Callable[[Tensor], Any] = lambda x: x,
) -> Any:
    """`func` of the original weight, or of a plain tensor that needs no gradient; None for anything else.

    Raises:
        RuntimeError: If given a plain tensor that requires grad.
    """
    if isinstance(maybe_expanded_weight, ExpandedWeight):
        return func(maybe_expanded_weight.orig_weight)
    if not isinstance(maybe_expanded_weight, Tensor):
        return None
    refuse_mixture([maybe_expanded_weight] if maybe_expanded_weight.requires_grad else [])
    return func(maybe_expanded_weight)


def refuse_mixture(plain: Sequence[Tensor]) -> None:
    """Raise if there are plain trainable tensors beside ExpandedWeights."""
    if plain:
        raise SamplewiseError(
            "ExpandedWeights currently does not support a mixture of ExpandedWeight parameters and normal Parameters in one layer: "
            f"a plain tensor of shape {tuple(plain[0].shape)} requires grad. Expand it too, make it a parameter of the wrapped module, "
            "or freeze it"
        )


def sum_over_all_but_batch_and_last_n(tensor: Tensor, n_dims: int) -> Tensor:
    """Sum over the axes between the first and the last `n_dims`, `(n, ..., *last) -> (n, *last)`.

    Example:
        >>> import torch
        >>> sum_over_all_but_batch_and_last_n(torch.ones(2, 3, 4, 5), 1).shape
        torch.Size([2, 5])
    """
    between = tuple(range(1, tensor.ndim - n_dims))
    return tensor.sum(between) if between else tensor
