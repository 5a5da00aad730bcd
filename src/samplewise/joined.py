"""Small gradients of many parameters, side by side: a call for each of them would cost more than their arithmetic."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .factors import Dense, Factor, flat, squares

# In elements; beyond it a call's own cost does not count, which is longer in coming where calls are launched on another device.
_SMALL, _SMALL_ELSEWHERE = 2**14, 2**20
Kind = tuple[torch.device, torch.dtype]


class Joined:
    """Dense factors, in one tensor `(n, all their elements)` for each device and type."""

    def __init__(self) -> None:
        self._groups: dict[Kind, dict[str, Tensor]] = {}
        # the groups side by side, once they were asked for
        self._rows: dict[Kind, Tensor] = {}

    @staticmethod
    def split(factors: Mapping[str, Factor]) -> tuple["Joined", dict[str, Factor]]:
        """The small ones, and the others."""
        joined = Joined()
        return joined, {name: factor for name, factor in factors.items() if not joined.take(name, factor)}

    def take(self, name: str, factor: Factor) -> bool:
        """Take the factor of a parameter, if it is a small one. With a graph each stays by itself: parts cannot be changed in place."""
        if torch.is_grad_enabled() or not isinstance(factor, Dense):
            return False
        grad = factor.grad
        if grad.numel() > (_SMALL if grad.device.type == "cpu" else _SMALL_ELSEWHERE) or not grad.is_floating_point():
            return False
        kind = grad.device, grad.dtype
        self._groups.setdefault(kind, {})[name] = grad
        self._rows.pop(kind, None)
        return True

    def sq_norms(self) -> list[Tensor]:
        """Squared norms over all parameters of a group, `(n,)` each."""
        return [squares(self._side_by_side(kind)) for kind in self._groups]

    def weighted_sums(self, weights: Tensor) -> dict[str, Tensor]:
        """`sum_n weights[n] grad[n]` for each parameter, of its shape: parts of one tensor."""
        sums: dict[str, Tensor] = {}
        for kind, group in self._groups.items():
            rows = self._side_by_side(kind)
            del self._rows[kind]
            total = weights.to(rows.dtype) @ rows
            parts = total.split([grad.shape[1:].numel() for grad in group.values()])
            sums |= {name: part.view(grad.shape[1:]) for (name, grad), part in zip(group.items(), parts, strict=True)}
        return sums

    def _side_by_side(self, kind: Kind) -> Tensor:
        if kind not in self._rows:
            rows = [flat(grad) for grad in self._groups[kind].values()]
            self._rows[kind] = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
        return self._rows[kind]
