"""Composite ops that reach C++ whole, rewritten in terms of ops that the recording follows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from samplewise.registry import expand


@expand(torch._C._VariableFunctions.broadcast_tensors)  # type: ignore[attr-defined]  # noqa: SLF001
def broadcast_tensors(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    return tuple(x.expand(shape) for x in tensors)


@expand(torch.Tensor.masked_fill)
def masked_fill(input: Tensor, mask: Tensor, value: object) -> Tensor:
    return torch.where(mask, value, input) if isinstance(value, Tensor) else NotImplemented


@expand(torch.prelu)
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    # slopes per channel, axis 1, or one for all
    slope = weight.reshape(-1, *[1] * (input.ndim - 2)) if weight.numel() > 1 else weight
    return torch.where(input > 0, input, slope * input)


@expand(torch.bilinear)
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return out if bias is None else out + bias
