"""Products of matrices: into memory in use, in float32 where half precision comes in, by oneDNN, and by kernels of our own."""

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor

from .buffers import scratch
from .factors import HALF, wide
from .running import in_transform, only_watched, unrecorded

# In flop: below it oneDNN's calls cost more than the product.
_SMALL_PRODUCT = 4e6
# Rows beyond which torch's own product of weights and rows is as fast.
_FEW_ROWS = 16
# Subclasses of tensors have ways of their own to run an op, and may not know those here.
_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def operands(*given: Tensor) -> tuple[Tensor, ...]:
    """As `bmm` takes them: in float32 or better, except where there are units that multiply half precision and add up in float32."""
    first = given[0]
    if first.device.type == "cuda" and not torch.is_grad_enabled() and all(x.dtype is first.dtype for x in given):
        return given
    return tuple(wide(x) for x in given)


def bmm(a: Tensor, b: Tensor, slot: str) -> Tensor:
    """A batched product of operands, in float32 or better, into memory that the slot's next one overwrites."""
    if torch.is_grad_enabled():
        return a @ b
    if a.dtype in HALF:
        # by the units for it, which add up in float32
        product: Tensor = torch.bmm(a, b, out_dtype=torch.float32)
        return product
    return torch.bmm(a, b, out=scratch(slot, (a.shape[0], a.shape[1], b.shape[2]), a))


def tile(left: Tensor, right: Tensor) -> Tensor:
    """The gradients `left.mT @ right` of some samples, whose norms are taken: of bfloat16, whose range is that of float32, in that."""
    return torch.bmm(left.mT, right) if left.dtype is torch.bfloat16 else bmm(left.mT, right, "tile")


def weighted_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """`sum_n weights[n] rows[n]`, `(p,)`."""
    kernels = own_kernels(rows) if len(rows) <= _FEW_ROWS and rows.is_contiguous() else None
    return weights.to(rows.dtype) @ rows if kernels is None else kernels.weighted_rows(weights, rows)


def scaled(x: Tensor, weights: Tensor, slot: str | None = None) -> Tensor:
    """`weights[n] x[n]`, of `(n, ...)`; into memory that the slot's next one overwrites, where one is named."""
    kernels = own_kernels(x) if x.is_contiguous() else None
    if kernels is not None:
        rows: Tensor = kernels.scaled(weights, x.flatten(1))
        return rows.view(x.shape)
    scale = weights.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    if slot is None or torch.is_grad_enabled():
        return x * scale
    return torch.mul(x, scale, out=scratch(slot, x.shape, x))


def unobserved(*given: object) -> bool:
    """Whether nothing between torch and its kernels changes a call: no dispatch mode, compiler, subclass of tensors."""
    if (torch._C._len_torch_dispatch_stack() and not only_watched()) or torch.compiler.is_compiling():  # noqa: SLF001
        return False
    return not any(issubclass(kind, Tensor) for kind in set(map(type, given)) - _PLAIN)


def own_kernels(*given: Tensor) -> ModuleType | None:
    """Our own kernels, where they may take some tensors: of one type of half precision, on one GPU, and no graph is made."""
    first = given[0]
    if first.device.type != "cuda" or first.dtype not in HALF or torch.is_grad_enabled() or not unobserved(*given):
        return None
    kernels = None if in_transform() else _kernels(first.device, first.dtype)
    alike = all(x.numel() and x.dtype is first.dtype and x.device == first.device for x in given)
    return kernels if kernels is not None and alike and all(kernels.takes(x) for x in given) else None


def has_own_kernels(like: Tensor) -> bool:
    """Whether there are kernels of our own for the device and the type of a tensor."""
    if like.device.type != "cuda" or like.dtype not in HALF or in_transform() or not unobserved(like):
        return False
    return _kernels(like.device, like.dtype) is not None


def _kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    try:
        return _tried(device, dtype)
    except torch.OutOfMemoryError:
        # for the moment
        return None


@functools.cache
def _tried(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Our own kernels, where they run: Triton wants a C compiler on the machine, and a card that knows the type."""
    try:
        from . import kernels  # noqa: PLC0415  (Triton comes with torch for CUDA)
    except ImportError:
        return None
    try:
        with unrecorded():
            # the one that wants most of a card
            kernels.gram_norms(*torch.zeros(2, 1, 128, 64, device=device, dtype=dtype))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever a compiler raises)
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        warnings.warn(
            f"samplewise: Triton's kernels do not run on {device}, torch's serve in their stead ({reason})", stacklevel=3
        )
        return None
    return kernels


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
