"""Helper functions of convolutions, under the names that programs import."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Size, Tensor

from samplewise.convolutional import Convolution
from samplewise.errors import SamplewiseError

from .helpers import standard_kwargs

Choice = TypeVar("Choice")
Function = Callable[..., Any]
IntOrInts = int | Sequence[int]


def conv_picker(func: Function, conv1d: Choice, conv2d: Choice, conv3d: Choice) -> Choice:
    """The argument that belongs to `func`, one of `F.conv1d`, `F.conv2d` and `F.conv3d`."""
    return {F.conv1d: conv1d, F.conv2d: conv2d, F.conv3d: conv3d}[func]


def conv_args_and_kwargs(
    kwarg_names: Sequence[str], expanded_args_and_kwargs: Sequence[Any]
) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """What a handler of a convolution receives, as `(input, weight)` and all other arguments by name."""
    args, kwargs = standard_kwargs(kwarg_names, expanded_args_and_kwargs)
    return conv_normalizer(*args, **kwargs)


def conv_normalizer(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """The arguments of a convolution as `(input, weight)` and all others by name."""
    return (input, weight), {"bias": bias, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


def conv_input_for_string_padding(
    func: Function, padding_style: str, input: Tensor, dilation: IntOrInts, kernel_size: Sequence[int]
) -> Tensor:
    """The input padded with zeros as `padding="same"` or `"valid"` asks."""
    return (
        input
        if padding_style == "valid"
        else F.pad(input, int_padding_for_string_padding(func, padding_style, dilation, kernel_size))
    )


def int_padding_for_string_padding(
    func: Function, padding_style: str, dilation: IntOrInts, kernel_size: Sequence[int]
) -> list[int]:
    """The padding that "same" or "valid" means, as `F.pad` takes it: two numbers per axis, the last axis first.

    Raises:
        RuntimeError: If `padding_style` is neither.
    """
    dims = conv_picker(func, 1, 2, 3)
    if padding_style == "valid":
        return [0, 0] * dims
    if padding_style != "same":
        raise SamplewiseError(f"got padding type of {padding_style}, only accept 'same' or 'valid'")
    dilations = [dilation] * dims if isinstance(dilation, int) else dilation
    pairs = [conv_padding_for_same(d, k) for d, k in zip(dilations, kernel_size, strict=True)]
    return [size for pair in reversed(pairs) for size in pair]


def conv_padding_for_same(dilation: int, kernel_size: int) -> tuple[int, int]:
    """The zeros before and after one axis that keep its length at stride 1."""
    total = dilation * (kernel_size - 1)
    return total // 2, total - total // 2


def conv_unfold_weight_grad_sample(
    input: Tensor,
    grad_output: Tensor,
    weight_shape: Size,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    func: Function,
) -> Tensor:
    """Per-sample weight gradients of a convolution, `(n, *weight_shape)`."""
    del kernel_size, func
    return _weight_rows(input, grad_output, weight_shape, stride, padding, dilation, groups)


def conv_group_weight_grad_sample(
    input: Tensor,
    grad_output: Tensor,
    weight_shape: Size,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    batch_size: int,
    func: Function,
) -> Tensor:
    """Per-sample weight gradients of a convolution without groups, `(n, *weight_shape)`."""
    del batch_size, func
    return _weight_rows(input, grad_output, weight_shape, stride, padding, dilation, 1)


def _weight_rows(
    input: Tensor,
    grad: Tensor,
    shape: Size,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return Convolution(grad, input, Size(shape), tuple(stride), tuple(padding), tuple(dilation), groups).to_dense()


def unfold3d(
    tensor: Tensor,
    kernel_size: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The blocks that a 3-D convolution sees, `(n, c, d, h, w) -> (n, c * prod(kernel_size), t)`; `F.unfold` for volumes.

    Raises:
        ValueError: If `tensor` is not of rank 5.

    Example:
        >>> import torch
        >>> unfold3d(torch.ones(2, 3, 4, 4, 4), (2, 2, 2), (0, 0, 0), (2, 2, 2), (1, 1, 1)).shape
        torch.Size([2, 24, 8])
    """
    if tensor.ndim != 5:
        raise ValueError(f"unfold3d: input tensor must be of the shape (n, c, d, h, w), got {tuple(tensor.shape)}")
    blocks = F.pad(tensor, [size for p in reversed(padding) for size in (p, p)])
    for axis, (k, step, gap) in enumerate(zip(kernel_size, stride, dilation, strict=True), 2):
        blocks = blocks.unfold(axis, gap * (k - 1) + 1, step)[..., ::gap]
    # (n, c, *out, *kernel) -> (n, c * kernel, out)
    return blocks.permute(0, 1, 5, 6, 7, 2, 3, 4).flatten(5).flatten(1, 4)
