"""What is handed to the user: norms from squared norms, weights that clip, gradients in memory of their own."""

from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

from .errors import of_type
from .factors import Factor, unexpanded
from .sums import tensors_of


def clipping_weights(norms: Tensor, max_grad_norm: float) -> Tensor:
    """`min(1, max_grad_norm / norms)`; a zero norm gives 1."""
    check_limit(max_grad_norm)
    if max_grad_norm >= torch.finfo(norms.dtype).max:
        # infinite in the type of the norms: a quotient of two infinities is no number
        return torch.ones_like(norms)
    return max_grad_norm / norms.clamp_min(max_grad_norm)


def check_limit(max_grad_norm: float) -> None:
    """Refuse a limit that is not positive."""
    of_type("clipping", max_grad_norm, "max_grad_norm as a number", Real, Tensor)
    if not max_grad_norm > 0:
        raise ValueError(f"clipping: max_grad_norm must be positive, got {max_grad_norm}")


def total_norms(squares: list[Tensor], n: int, like: Tensor) -> Tensor:
    """The norm over all parameters from the squared norms of some of them at a time."""
    return root(torch.stack(squares or [like.new_zeros(n)]).sum(0))


def root(squares: Tensor) -> Tensor:
    """The square root, with derivative zero at zero as a norm has it."""
    if not torch.is_grad_enabled():
        # inner products of positions may leave a little less than zero
        return squares.clamp_min(0).sqrt()
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), squares.clamp_min(0))


def dense_in(name: str, factor: Factor, out: Mapping[str, Tensor] | None) -> Tensor:
    """All gradients of one parameter, in the tensor given for it, if there is one, or else in memory of their own."""
    if out is not None:
        return factor.write(out[name])
    dense = factor.to_dense()
    # autograd hands one tensor to several places, the user's hooks among them
    cells = dense.untyped_storage()._cdata  # noqa: SLF001
    shared = any(x.untyped_storage()._cdata == cells for x in tensors_of(factor))  # noqa: SLF001
    return dense.clone() if shared else dense


def as_autograd_has_it(found: Tensor | None, p: Tensor, *leading: int) -> Tensor:
    """Sums (None for zeros) in the parameter's type, laid out as autograd lays a gradient out, which fused optimizers take for granted.

    With leading axes rows of gradients, in memory of their own.
    """
    if found is None:
        return p.new_zeros((*leading, *p.shape)) if leading else gradient_like(p).zero_()
    x = found.to(p.dtype)
    if leading or x.stride() == p.stride():
        return unexpanded(x)
    like = gradient_like(p)
    return unexpanded(x) if x.stride() == like.stride() else like.copy_(x)


def gradient_like(p: Tensor) -> Tensor:
    """Memory for a gradient: laid out as the parameter, if that is dense, or else in a row."""
    like = torch.empty_like(p.detach())
    return like if like.stride() == p.stride() else torch.empty(p.shape, dtype=p.dtype, device=p.device)
