"""Convolutions and transposed convolutions in one to three dimensions."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from samplewise.convolutional import Convolution
from samplewise.factors import Dense, Factor
from samplewise.registry import rule


def _convolution_back(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """The transposed convolution, to the input with its zeros around."""
    space, kernel = input.shape[2:], weight.shape[2:]
    steps, spread = _per_dim(stride, len(kernel)), _per_dim(dilation, len(kernel))
    sides = _sides(padding, kernel, spread)
    # what no position reaches, where the stride leaves some out
    rest = [
        size + sum(side) - (at - 1) * step - d * (k - 1) - 1
        for size, side, at, step, d, k in zip(space, sides, grad.shape[2:], steps, spread, kernel, strict=True)
    ]
    transposed = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[len(kernel) - 1]
    padded: Tensor = transposed(grad, weight, None, steps, 0, rest, groups, spread)
    for dim, (size, (before, _)) in enumerate(zip(space, sides, strict=True), 2):
        padded = padded.narrow(dim, before, size)
    return padded


def _transposed_back(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """The convolution, at the positions of the input."""
    convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[weight.ndim - 3]
    found: Tensor = convolution(grad, weight, None, stride, padding, dilation, groups)
    # an output_padding beyond the stride makes room for more
    for dim, size in enumerate(input.shape[2:], 2):
        found = found.narrow(dim, 0, size)
    return found


@rule(torch.conv1d, saves={"weight": ["input"], "bias": []}, back=_convolution_back)
@rule(torch.conv2d, saves={"weight": ["input"], "bias": []}, back=_convolution_back)
@rule(torch.conv3d, saves={"weight": ["input"], "bias": []}, back=_convolution_back)
def convolution(
    grad: Tensor,
    out: None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> dict[str, object]:
    if grad.is_complex():
        raise NotImplementedError("convolution: complex tensors have no rule; convolve real and imaginary parts")
    # out[n,o,p] = sum_{i,k} input[n,i,stride p + dilation k - padding] weight[o,i,k] + bias[o]
    return {
        "weight": lambda: _weight(grad, input, weight, stride, padding, dilation, groups),
        "bias": lambda: Dense(grad.flatten(2).sum(2)),
    }


@rule(torch.conv_transpose1d, saves={"weight": ["input"], "bias": []}, back=_transposed_back)
@rule(torch.conv_transpose2d, saves={"weight": ["input"], "bias": []}, back=_transposed_back)
@rule(torch.conv_transpose3d, saves={"weight": ["input"], "bias": []}, back=_transposed_back)
def transposed_convolution(
    grad: Tensor,
    out: None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> dict[str, object]:
    if grad.is_complex():
        raise NotImplementedError("transposed convolution: complex tensors have no rule; convolve real and imaginary parts")
    # out[n,o,stride p + dilation k - padding] += sum_i input[n,i,p] weight[i,o,k]: the convolution that maps grad to input's grad
    return {
        "weight": lambda: _transposed_weight(grad, input, weight, stride, padding, dilation, groups),
        "bias": lambda: Dense(grad.flatten(2).sum(2)),
    }


def _transposed_weight(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Factor:
    dims = weight.ndim - 2
    steps, pads, spread = _per_dim(stride, dims), _per_dim(padding, dims), _per_dim(dilation, dims)
    # as far as the kernel reaches from the last input; an output_padding beyond it has the bias only
    reach = [(input.shape[d + 2] - 1) * steps[d] + spread[d] * (weight.shape[d + 2] - 1) + 1 for d in range(dims)]
    if any(grad.shape[d + 2] + 2 * pads[d] - reach[d] >= steps[d] for d in range(dims)):
        grad = F.pad(grad, [p for size in reversed(pads) for p in (size, size)])
        for d in range(dims):
            grad = grad.narrow(d + 2, 0, reach[d])
        pads = (0,) * dims
    return Convolution(input, grad, weight.shape, steps, pads, spread, groups)


def _weight(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Factor:
    kernel = weight.shape[2:]
    steps, spread = _per_dim(stride, len(kernel)), _per_dim(dilation, len(kernel))
    sides = _sides(padding, kernel, spread)
    if any(before != after for before, after in sides):
        # an even kernel: torch pads the far side more
        input, sides = F.pad(input, list(itertools.chain(*reversed(sides)))), [(0, 0)] * len(kernel)
    pads = tuple(before for before, _ in sides)
    return Convolution(grad, input, weight.shape, steps, pads, spread, groups)


def _sides(padding: int | str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """The zeros before and after each axis."""
    if not isinstance(padding, str):
        return [(pad, pad) for pad in _per_dim(padding, len(kernel))]
    return [_same_sides(k, d) if padding == "same" else (0, 0) for k, d in zip(kernel, dilation, strict=True)]


def _per_dim(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * dims if len(sizes) == 1 else sizes


def _same_sides(kernel: int, dilation: int) -> tuple[int, int]:
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2
