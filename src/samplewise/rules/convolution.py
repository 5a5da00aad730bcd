"""Convolutions in one to three dimensions."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from samplewise.factors import Convolution, Dense, Factor
from samplewise.registry import rule


@rule(torch.conv1d, saves={"weight": ["input"], "bias": []})
@rule(torch.conv2d, saves={"weight": ["input"], "bias": []})
@rule(torch.conv3d, saves={"weight": ["input"], "bias": []})
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
    if isinstance(padding, str):
        sides = [_same_sides(k, d) if padding == "same" else (0, 0) for k, d in zip(kernel, spread, strict=True)]
        if any(before != after for before, after in sides):
            # an even kernel: torch pads the far side more
            input, sides = F.pad(input, list(itertools.chain(*reversed(sides)))), [(0, 0)] * len(kernel)
        pads = tuple(before for before, _ in sides)
    else:
        pads = _per_dim(padding, len(kernel))
    return Convolution(grad, input, weight.shape, steps, pads, spread, groups)


def _per_dim(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * dims if len(sizes) == 1 else sizes


def _same_sides(kernel: int, dilation: int) -> tuple[int, int]:
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2
