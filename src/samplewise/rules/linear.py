"""The linear layer, and products with a matrix on the right, which are the same."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samplewise.factors import Dense, positions
from samplewise.outer import Outer
from samplewise.products import has_onednn, onednn_linear, unobserved
from samplewise.registry import rule
from samplewise.strategy import rates

# In flop: below it oneDNN's calls cost more than the product.
_SMALL_PRODUCT = 1e7


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Sequence[Tensor]]:
    """The op as one product: with weights that need no gradient, torch would run a product for each row of the batch."""
    if _by_onednn(input, weight, bias):
        return onednn_linear(input, weight, bias), ()
    if input.ndim <= 2 or input.is_contiguous() or weight.ndim != 2:
        return F.linear(input, weight, bias), ()
    out = F.linear(input.reshape(math.prod(input.shape[:-1]), input.shape[-1]), weight, bias)
    return out.reshape(*input.shape[:-1], weight.shape[0]), ()


def _linear_back(grad: Tensor, weight: Tensor) -> Tensor:
    """`grad_input[n,t,i] = sum_o grad[n,t,o] weight[o,i]`."""
    weight = weight.conj()
    if weight.ndim == 1:
        return grad[..., None] * weight
    if _by_onednn(grad, weight.mT):
        return onednn_linear(grad, weight.mT)
    if grad.ndim == 2:
        return grad @ weight
    return (grad.reshape(math.prod(grad.shape[:-1]), weight.shape[0]) @ weight).view(*grad.shape[:-1], weight.shape[1])


def _by_onednn(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether to run a linear layer by oneDNN: where that is faster, and a graph is neither built nor traced."""
    if weight.ndim != 2 or input.ndim < 2 or 2 * input.numel() * weight.shape[0] <= _SMALL_PRODUCT:
        return False
    if input.dtype is not torch.float32 or weight.dtype is not torch.float32:
        return False
    graph = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (input, weight, bias))
    if graph or not has_onednn(input) or rates(input).layer <= 1:
        return False
    if not unobserved(input, weight) or torch.is_autocast_enabled("cpu"):
        return False
    return bias is None or bias.shape == weight.shape[:1]


def _is_layer(arguments: Mapping[str, Any]) -> bool:
    """Whether a product is one of rows with a matrix, and what is added is one row at most."""
    input: Any = arguments.get("input")
    rows, matrix = arguments.get("mat1", input), arguments.get("mat2", arguments.get("other"))
    if not all(isinstance(x, Tensor) and x.layout == torch.strided for x in (input, rows, matrix)):
        return False
    numbers = [arguments.get(name, 1) for name in ("beta", "alpha")]
    plain = all(isinstance(x, int | float) for x in numbers) and (rows is input or input.ndim <= 1)
    return plain and matrix.ndim == 2 and rows.ndim >= 2


def _matmul(input: Tensor, other: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    return _linear(input, other.mT)


def _matmul_back(grad: Tensor, other: Tensor) -> Tensor:
    return _linear_back(grad, other.mT)


@rule(torch.linalg.matmul, saves={"other": ["input"]}, run=_matmul, back=_matmul_back, when=_is_layer)
@rule(torch.matmul, saves={"other": ["input"]}, run=_matmul, back=_matmul_back, when=_is_layer)
def matmul(grad: Tensor, out: None, input: Tensor, other: Tensor) -> dict[str, object]:
    # out[n,t,o] = sum_i input[n,t,i] other[i,o]
    return {"other": lambda: Outer(positions(input), positions(grad), other.shape)}


def _mm(input: Tensor, mat2: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    return _linear(input, mat2.mT)


def _mm_back(grad: Tensor, mat2: Tensor, alpha: float = 1) -> Tensor:
    return _linear_back(grad if alpha == 1 else grad * alpha, mat2.mT)


@rule(torch.mm, saves={"mat2": ["input"]}, run=_mm, back=_mm_back, when=_is_layer)
def mm(grad: Tensor, out: None, input: Tensor, mat2: Tensor) -> dict[str, object]:
    # out[n,o] = sum_i input[n,i] mat2[i,o]
    return {"mat2": lambda: Outer(positions(input), positions(grad), mat2.shape)}


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, beta: float = 1, alpha: float = 1) -> tuple[Tensor, Sequence[Tensor]]:
    if beta != 1 or alpha != 1:
        return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha), ()
    return _linear(mat1, mat2.mT, input)


@rule(
    torch.addmm,
    saves={"input": [], "mat2": ["mat1"]},
    run=_addmm,
    back=_mm_back,
    when=_is_layer,
    samples="mat1",
)
def addmm(
    grad: Tensor, out: None, input: Tensor, mat1: Tensor, mat2: Tensor, beta: float = 1, alpha: float = 1
) -> dict[str, object]:
    # out[n,o] = alpha sum_i mat1[n,i] mat2[i,o] + beta input[o]
    def times(number: float) -> Tensor:
        return positions(grad if number == 1 else grad * number)

    return {
        "input": lambda: _bias(times(beta), input),
        "mat2": lambda: Outer(positions(mat1), times(alpha), mat2.shape),
    }


@rule(F.linear, saves={"weight": ["input"], "bias": []}, run=_linear, back=_linear_back)
def linear(grad: Tensor, out: None, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> dict[str, object]:
    # out[n,t,o] = sum_i input[n,t,i] weight[o,i] + bias[o]
    g = positions(grad if weight.ndim == 2 else grad[..., None])
    return {"weight": lambda: Outer(g, positions(input), weight.shape), "bias": lambda: _bias(g, bias)}


def _bias(g: Tensor, bias: Tensor | None) -> Dense:
    """`sum_t g[n,t,o]`."""
    assert bias is not None
    if g.shape[2] == 1 and bias.shape == g.shape[3:]:
        return Dense(g.flatten(1))
    return Dense(_totals(g, bias))


def _totals(g: Tensor, bias: Tensor) -> Tensor:
    """Over positions, and over features where one number is added to all, `(n, *bias.shape)`."""
    totals = g.sum((1, 2))
    if bias.shape == totals.shape[1:]:
        return totals
    if bias.numel() == 1:
        return totals.sum(1).reshape(len(g), *bias.shape)
    return totals.reshape(len(g), *bias.shape) if bias.shape[-1:].numel() == bias.numel() == totals.shape[1] else totals
