"""The handlers of the layers that torch's Expanded Weights know: their checks, and the engine for all the rest."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samplewise.axes import Axis, tensors_in
from samplewise.errors import SamplewiseError
from samplewise.remembered import CONSTANT

from .convolution import conv_picker
from .helpers import check_input, refuse_mixture, refuse_size, standard_kwargs
from .tensor import ExpandedWeight, expanded_in, implements_per_sample_grads, is_batch_first, recorded

Function = Callable[..., Any]


class PerSampleGrad(torch.autograd.Function):
    """A layer whose first argument is the input, and whose other tensors have no sample axis.

    Called as torch's handlers are, `apply(kwarg_names, function, *args, *kwargs.values())`. The backward is the engine's.
    """

    @classmethod
    def apply(cls, kwarg_names: Sequence[str], func: Function, *expanded_args_and_kwargs: Any) -> Any:
        """Run the layer; its weights get their `grad_sample` in the backward."""
        args, kwargs = standard_kwargs(kwarg_names, expanded_args_and_kwargs)
        x, rest = input_and_rest(args, kwargs)
        if isinstance(x, Tensor) and not isinstance(x, ExpandedWeight):
            cls.check(func, x, args, kwargs)
        weights = expanded_in(rest)
        check_input(func, x, weights)
        plain = [w for w in rest if not isinstance(w, ExpandedWeight)]
        refuse_mixture([w for w in plain if w.requires_grad])
        dim = 0 if is_batch_first(weights) else 1
        return recorded(func, args, kwargs, kinds=[(x, Axis(dim)), *((w, CONSTANT) for w in plain)], size=x.shape[dim])

    @classmethod
    def check(cls, func: Function, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise if the input has no axis for the samples."""


def input_and_rest(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, list[Tensor]]:
    """A layer's input, and the other tensors among its arguments."""
    x = args[0] if args else kwargs.get("input")
    return x, [w for w in (*args, *kwargs.values()) if isinstance(w, Tensor) and w is not x]


@implements_per_sample_grads(F.linear)
class LinearPerSampleGrad(PerSampleGrad):
    """`F.linear`: input `(n, ..., i)`."""

    @classmethod
    def check(cls, func: Function, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse an input of rank 0 or 1."""
        del func, args, kwargs
        if x.ndim <= 1:
            raise SamplewiseError(
                f"Input does not have a batch dimension. Expanded Weights expected input of at least rank 2, got of rank {x.ndim}"
            )


@implements_per_sample_grads(F.conv1d)
@implements_per_sample_grads(F.conv2d)
@implements_per_sample_grads(F.conv3d)
class ConvPerSampleGrad(PerSampleGrad):
    """`F.conv1d`, `F.conv2d` and `F.conv3d`: input `(n, c, *space)`."""

    @classmethod
    def check(cls, func: Function, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse an input without samples."""
        del args, kwargs
        wanted = conv_picker(func, 3, 4, 5)
        if x.ndim != wanted:
            raise SamplewiseError(
                f"Expanded Weights only support convolution with batched input, got {func.__name__} with an unbatched input of dim "
                f"{x.ndim}, expected input of dim {wanted}"
            )


@implements_per_sample_grads(F.embedding)
class EmbeddingPerSampleGrad(PerSampleGrad):
    """`F.embedding`: input `(n, ...)`, of at least two axes."""

    @classmethod
    def check(cls, func: Function, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse an input of one axis."""
        del func, args, kwargs
        if x.ndim == 1:
            raise SamplewiseError(
                f"Expanded Weights needs an input with a batch size, got a 1D tensor of shape {tuple(x.shape)}. "
                "Give one id per sample as (n, 1)"
            )


@implements_per_sample_grads(F.layer_norm)
class LayerNormPerSampleGrad(PerSampleGrad):
    """`F.layer_norm`: input `(n, ..., *normalized_shape)`."""

    @classmethod
    def check(cls, func: Function, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse to normalise over the samples."""
        del func
        shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        if x.ndim <= len(shape):
            raise SamplewiseError(
                "Expanded Weights: Layer norm should not normalize over batch dimension for per sample gradient computations but got that "
                f"normalized shape, {tuple(shape)}, matched input shape, {tuple(x.shape)}"
            )


@implements_per_sample_grads(F.group_norm)
class GroupNormPerSampleGrad(PerSampleGrad):
    """`F.group_norm`: input `(n, c, ...)`."""


@implements_per_sample_grads(F.instance_norm)
class InstanceNormPerSampleGrad(PerSampleGrad):
    """`F.instance_norm`: input `(n, c, *space)`."""


_OPS = torch._C._VariableFunctions  # noqa: SLF001


@implements_per_sample_grads(_OPS.lstm)
@implements_per_sample_grads(_OPS.gru)
@implements_per_sample_grads(_OPS.rnn_tanh)
@implements_per_sample_grads(_OPS.rnn_relu)
class RecurrentPerSampleGrad(PerSampleGrad):
    """`torch.lstm` and its kin: their own layout says where the samples are.

    A packed sequence has its rows in the order in which it was packed: a function sees no other.
    """

    @classmethod
    def apply(cls, kwarg_names: Sequence[str], func: Function, *expanded_args_and_kwargs: Any) -> Any:
        """Run the layers; their weights get their `grad_sample` in the backward."""
        args, kwargs = standard_kwargs(kwarg_names, expanded_args_and_kwargs)
        # (input, hx, params, ..., batch_first) or, packed, (data, batch_sizes, hx, params, ...)
        packed = not isinstance(args[2], list)
        x, states = args[0], args[2] if packed else args[1]
        sizes = args[1].tolist() if packed else []
        dim = 0 if packed or args[-1] else 1
        owners = torch.cat([torch.arange(size, device="cpu") for size in sizes]) if packed else None
        n = sizes[0] if packed else x.shape[dim]
        axis = Axis(dim) if owners is None else Axis.of_rows(0, owners, n)
        for weight in expanded_in(args):
            refuse_size(func, n, weight)
        kinds: list[tuple[Tensor, Axis | str]] = [(x, axis), *((h, Axis(1)) for h in tensors_in(states))]
        # whatever their shapes
        kinds += ((w, CONSTANT) for w in args[3 if packed else 2] if not isinstance(w, ExpandedWeight))
        if packed:
            kinds.append((args[1], CONSTANT))
        return recorded(func, args, kwargs, kinds=kinds, size=n)
