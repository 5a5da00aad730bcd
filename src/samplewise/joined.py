"""Small gradients of many parameters, taken together: a call for each of them would cost more than their arithmetic."""

from collections.abc import Iterable, Mapping

import torch
from torch import Size, Tensor

from .factors import Dense, Factor, flat, joined
from .outer import Outer
from .sums import tensors_of

# In elements; beyond it a call's own cost does not count, which is longer in coming where calls are launched on another device.
_SMALL, _SMALL_ELSEWHERE = 2**14, 2**20
# Of the gradient of a product, which is formed for sums only.
_SMALL_PRODUCT = 2**16
# All that factors have in common which are taken as one.
Kind = tuple[object, ...]


class Joined:
    """Factors of small gradients: dense ones side by side, products of one size as groups of one product."""

    def __init__(self) -> None:
        # in elements, of all memory that is kept for them: small factors may be parts of large tensors
        self.size = 0
        self._factors: dict[Kind, dict[str, Factor]] = {}
        # one for all of a kind, once that was asked for
        self._as_one: dict[Kind, Factor] = {}

    @staticmethod
    def split(factors: Mapping[str, Factor]) -> tuple["Joined", dict[str, Factor]]:
        """The small ones, and the others."""
        small = Joined()
        return small, {name: factor for name, factor in factors.items() if not small.take(name, factor)}

    def take(self, name: str, factor: Factor) -> bool:
        """Take the factor of a parameter, if it is a small one. With a graph each stays by itself: parts cannot be changed in place."""
        kind = None if torch.is_grad_enabled() else _kind_of(factor)
        if kind is None:
            return False
        self._factors.setdefault(kind, {})[name] = factor
        self._as_one.pop(kind, None)
        self.size += sum(x.untyped_storage().nbytes() // x.itemsize for x in tensors_of(factor))
        return True

    def sq_norms(self) -> list[Tensor]:
        """Squared norms over all parameters of a kind, `(n,)` each."""
        return [self._of(kind).sq_norms() for kind in self._factors]

    def weighted_sums(self, weights: Tensor) -> dict[str, Tensor]:
        """`sum_n weights[n] grad[n]` for each parameter, of its shape: parts of one tensor for each kind."""
        sums: dict[str, Tensor] = {}
        for kind, factors in self._factors.items():
            total = self._of(kind).weighted_sum(weights)
            del self._as_one[kind]
            parts = total.split([_length(factor) for factor in factors.values()])
            sums |= {
                name: part.reshape(factor.shape).detach() for (name, factor), part in zip(factors.items(), parts, strict=True)
            }
        return sums

    def _of(self, kind: Kind) -> Factor:
        if kind not in self._as_one:
            self._as_one[kind] = _as_one(self._factors[kind].values())
        return self._as_one[kind]


def _kind_of(factor: Factor) -> Kind | None:
    """What others have to share with a factor to be taken with it; None if it is no small one."""
    if isinstance(factor, Dense):
        grad = factor.grad
        return (grad.device, grad.dtype) if grad.is_floating_point() and grad.numel() <= _most(grad) else None
    if not isinstance(factor, Outer) or not factor.left.is_floating_point() or factor.shape.numel() > _SMALL_PRODUCT:
        return None
    left, right = factor.left, factor.right
    (n, g, t, _), most = left.shape, _most(left)
    # with the inner products of all positions
    small = left.numel() + right.numel() <= most and n * g * t * t <= most
    return (
        (left.shape[2:], right.shape[3], left.device, left.dtype, right.dtype) if small and factor.algorithm == "gram" else None
    )


def _most(like: Tensor) -> int:
    return _SMALL if like.is_cpu else _SMALL_ELSEWHERE


def _as_one(factors: Iterable[Factor]) -> Factor:
    """The gradients of all, side by side."""
    dense, products = [x for x in factors if isinstance(x, Dense)], [x for x in factors if isinstance(x, Outer)]
    if dense:
        return Dense(joined([flat(factor.grad) for factor in dense], 1))
    left, right = joined([factor.left for factor in products], 1), joined([factor.right for factor in products], 1)
    return Outer(left, right, Size((left.shape[1], left.shape[3], right.shape[3])))


def _length(factor: Factor) -> int:
    """How long a factor's part of all is."""
    return factor.left.shape[1] if isinstance(factor, Outer) else factor.shape.numel()
