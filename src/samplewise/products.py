"""Products of matrices into memory in use, and by oneDNN, which on some CPUs is faster than the BLAS."""

import functools

import torch
from torch import Tensor

from .buffers import scratch

# In flop: below it oneDNN's calls cost more than the product.
_SMALL_PRODUCT = 4e6


def bmm(a: Tensor, b: Tensor, slot: str) -> Tensor:
    """A batched product, into memory that the slot's next one overwrites."""
    if torch.is_grad_enabled():
        return a @ b
    return torch.bmm(a, b, out=scratch(slot, (a.shape[0], a.shape[1], b.shape[2]), a))


def has_onednn(like: Tensor) -> bool:
    """Whether oneDNN has a linear layer for tensors of this device and dtype, and is not switched off."""
    fits = like.dtype is torch.float32 and like.device.type == "cpu"
    return fits and _built_in() and torch._C._get_mkldnn_enabled()  # noqa: SLF001


@functools.cache
def _built_in() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`input @ weight.T + bias` by oneDNN, which reads a bias without its strides."""
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        weight = weight.contiguous()
    return _linear_pointwise(input.contiguous(), weight, _in_a_row(bias))


def _linear_pointwise(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")  # noqa: SLF001
    return product


def _in_a_row(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


class RepeatedProduct:
    """`rows @ weight.T + bias` for many small matrices, for which oneDNN wants the weight in another order: a third to all of the time."""

    def __init__(self, weight: Tensor, rows: int, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, _in_a_row(bias)
        packs = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and has_onednn(weight)
        worth = 2 * rows * weight.numel() > _SMALL_PRODUCT
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows) if packs and worth else None  # noqa: SLF001

    def of(self, rows: Tensor) -> Tensor:
        """The product."""
        if self._packed is None:
            return torch.nn.functional.linear(rows, self._weight, self._bias)
        return _linear_pointwise(rows.contiguous(), self._packed, self._bias)

    def plus(self, rows: Tensor, addend: Tensor) -> Tensor:
        """The product and a matrix."""
        if self._packed is None:
            product = torch.addmm(addend, rows, self._weight.t())
            return product if self._bias is None else product.add_(self._bias)
        operands = rows.contiguous(), addend.contiguous(), self._packed, self._bias
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(*operands, "add")  # noqa: SLF001
        return total
