"""Composite ops that reach C++ whole, rewritten in terms of ops that the recording follows."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samplewise.registry import expand
from samplewise.running import listed


def _as_computed(op: Callable[..., Tensor], dims: Sequence[int], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Operands in the type that autocast has an op compute in, which the op tells by one number of each operand."""
    if not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    with torch._C.DisableTorchFunction(), torch.no_grad():  # noqa: SLF001
        dtype = op(*(x.new_zeros([1] * ndim) for x, ndim in zip(tensors, dims, strict=True))).dtype
    return [x.to(dtype) for x in tensors]


@expand(torch.Tensor.__deepcopy__)
def deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Any:
    if type(tensor) is not Tensor or not tensor.is_leaf or tensor.layout != torch.strided or vars(tensor):
        return NotImplemented
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


@expand(torch._C._VariableFunctions.broadcast_tensors)  # type: ignore[attr-defined]  # noqa: SLF001
def broadcast_tensors(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    return tuple(x.expand(shape) for x in tensors)


@expand(torch.Tensor.masked_fill)
def masked_fill(input: Tensor, mask: Tensor, value: object) -> Tensor:
    return torch.where(mask, value, input) if isinstance(value, Tensor) else NotImplemented


@expand(torch.prelu)
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    input, weight = _as_computed(torch.prelu, (1, 1), (input, weight))
    # slopes per channel, axis 1, or one for all
    slope = weight.reshape(-1, *[1] * (input.ndim - 2)) if weight.numel() > 1 else weight
    return torch.where(input > 0, input, slope * input)


@expand(torch.bilinear)
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    given = (input1, input2, weight) if bias is None else (input1, input2, weight, bias)
    a, b, w, *added = _as_computed(torch.bilinear, (2, 2, 3, 1)[: len(given)], given)
    with torch.autocast(input1.device.type, enabled=False):
        out = torch.einsum("...i,oij,...j->...o", a, w, b)
    return out + added[0] if added else out


@expand(torch._grouped_mm)  # noqa: SLF001
def grouped_mm(
    input: Tensor, mat2: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Any:
    # rows of the input up to each offset by the matrix of that group: experts of a mixture
    if offs is None or input.ndim != 2 or mat2.ndim != 3 or bias is not None:
        return NotImplemented
    ends = listed(offs)
    groups = [input[start:end] @ matrix for start, end, matrix in zip([0, *ends], ends, mat2.unbind(0), strict=False)]
    out = torch.cat([*groups, input[ends[-1] :] @ torch.zeros_like(mat2[0])])
    return out.to(out.dtype if out_dtype is None else out_dtype)


@expand(torch._C._nn.pad_sequence)  # noqa: SLF001
def pad_sequence(
    sequences: Sequence[Tensor], batch_first: bool = False, padding_value: float = 0.0, side: str = "right"
) -> Tensor:
    longest = max(x.shape[0] for x in sequences)
    gaps = [(0, longest - x.shape[0]) if side == "right" else (longest - x.shape[0], 0) for x in sequences]
    padded = [F.pad(x, [*[0] * (2 * x.ndim - 2), *gap], value=padding_value) for x, gap in zip(sequences, gaps, strict=True)]
    return torch.stack(padded, 0 if batch_first else 1)


@expand(torch.linalg.vecdot)
def vecdot(x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
    x, y = _as_computed(torch.linalg.vecdot, (1, 1), (x, y))
    return (x.conj() * y).sum(dim)


@expand(torch.linalg.multi_dot)
def multi_dot(tensors: Sequence[Tensor]) -> Tensor:
    product: Tensor = functools.reduce(torch.matmul, tensors)
    return product
