"""Several uses of one parameter: their factors put together, and gradients kept where that is leaner."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from .factors import Dense, Factor, Pulled, Single, flat
from .outer import Outer, Rows
from .products import weighted_rows
from .strategy import current


@dataclass(frozen=True)
class Sum(Factor):
    """Several uses of one parameter: tying, recurrence, reuse."""

    terms: tuple[Factor, ...]

    @property
    def shape(self) -> Size:  # type: ignore[override]
        return self.terms[0].shape

    @property
    def n(self) -> int:
        return self.terms[0].n

    @property
    def algorithm(self) -> str:
        outers = [term for term in self.terms if isinstance(term, Outer)]
        if not outers or not all(isinstance(term, Outer | Rows) for term in self.terms):
            return super().algorithm
        return max(outers, key=lambda term: term.left.numel() * term.right.shape[-1]).algorithm

    def regroup(self, n: int) -> "Sum":
        return Sum(tuple(term.regroup(n) for term in self.terms))

    def to_dense(self) -> Tensor:
        if torch.is_grad_enabled() or not all(isinstance(term, Outer | Rows | Dense) for term in self.terms):
            return sum((term.to_dense() for term in self.terms[1:]), self.terms[0].to_dense())
        # one place for all, of a type that holds each
        parts = _typed(tensors_of(self))
        holds = functools.reduce(torch.promote_types, (x.dtype for x in parts))
        return self.write(parts[0].new_empty(self.n, *self.shape, dtype=holds))

    def write(self, out: Tensor) -> Tensor:
        # rows of a table touch the least, so they come last
        first, *others = sorted(self.terms, key=lambda term: isinstance(term, Rows))
        first.write(out)
        for term in others:
            term.add_to(out)
        return out

    def sq_norms(self) -> Tensor:
        if _apart(self.terms):
            return torch.stack([term.sq_norms() for term in self.terms]).sum(0)
        if not all(isinstance(term, Outer | Rows | Sum) for term in self.terms):
            return super().sq_norms()
        # |E + H|^2 = |E|^2 + |H|^2 + 2 <E, H>
        cross = [a.inner(b) for k, a in enumerate(self.terms) for b in self.terms[:k]]
        squares = [term.sq_norms() for term in self.terms]
        return torch.stack([*squares, *(2 * c for c in cross)]).sum(0).clamp_min(0)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return torch.stack([term.weighted_sum(weights) for term in self.terms]).sum(0)

    def dot(self, direction: Tensor) -> Tensor:
        return torch.stack([term.dot(direction) for term in self.terms]).sum(0)

    def project(self, matrix: Tensor) -> Tensor:
        return torch.stack([term.project(matrix) for term in self.terms]).sum(0)


def add(factors: Sequence[Factor]) -> Factor:
    """One factor for the sum of several of equal shape; outer products and rows concatenate along their positions."""
    return factors[0] if len(factors) == 1 else _added(factors)


def _added(factors: Sequence[Factor]) -> Factor:
    outers: dict[tuple[int, ...], list[Outer]] = {}
    rows: list[Rows] = []
    dense: list[Tensor] = []
    singles: list[Single] = []
    others: list[Factor] = []
    for factor in factors:
        if isinstance(factor, Outer):
            outers.setdefault((factor.left.shape[1], factor.left.shape[3], factor.right.shape[3]), []).append(factor)
        elif isinstance(factor, Rows):
            rows.append(factor)
        elif isinstance(factor, Dense):
            dense.append(factor.grad)
        elif isinstance(factor, Single):
            singles.append(factor)
        else:
            others.append(factor)
    terms = [*(_join_outers(group) for group in outers.values()), *others]
    if rows:
        terms.append(_join_rows(rows))
    if len(singles) == 1:
        terms.append(singles[0])
    elif singles:
        dense.append(_join_singles(singles))
    if dense:
        terms.append(Dense(sum(dense[1:], dense[0])))
    return terms[0] if len(terms) == 1 else Sum(tuple(terms))


def _apart(terms: Sequence[Factor]) -> bool:
    """Whether the terms are gradients of parts of a parameter that share no element: the thirds of a packed weight."""
    regions = [term.region for term in terms if isinstance(term, Pulled) and term.isometric and term.region is not None]
    regions.sort(key=lambda region: region.start)
    return len(regions) == len(terms) and all(a.stop <= b.start for a, b in itertools.pairwise(regions))


class Kept(Dense):
    """Gradients of many numbers, formed once in place of a factor."""

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return weighted_rows(weights, flat(self.grad)).reshape(self.shape)


@dataclass
class Store:
    """Keeps gradients in place of factors, where that takes less memory, or less time within the budget."""

    # bytes of gradients kept so far that factors would not have taken
    spent: int = 0

    def worth(self, factor: Factor) -> bool:
        """Whether to keep the gradients themselves."""
        chosen, algorithm = current(), factor.algorithm
        if algorithm not in {"gram", "tile"} or chosen.name not in {"auto", "store"}:
            return False
        tensors = tensors_of(factor)
        size = factor.n * factor.shape.numel() * _typed(tensors)[0].element_size()
        lean = size <= sum(x.nbytes for x in tensors)
        # norms by tiles form the gradients anyway: kept, they need not be formed again for a weighted sum
        quick = algorithm == "tile" and self.spent + size <= chosen.memory_budget
        self.spent += size if quick and not lean else 0
        return lean or quick or chosen.name == "store"

    def kept(self, factor: Factor) -> Factor:
        """The gradients, as a factor."""
        return Kept(factor.to_dense())


def tensors_of(factor: Factor) -> list[Tensor]:
    """The tensors that a factor is made of."""
    if isinstance(factor, Sum):
        return [x for term in factor.terms for x in tensors_of(term)]
    if isinstance(factor, Pulled):
        return tensors_of(factor.factor)
    return [x for x in vars(factor).values() if isinstance(x, Tensor)]


def _typed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that have the type of gradients, unlike indices."""
    return [x for x in tensors if x.dtype != torch.long]


def _join_outers(outers: list[Outer]) -> Outer:
    if len(outers) == 1:
        return outers[0]
    left, right = torch.cat([f.left for f in outers], 2), torch.cat([f.right for f in outers], 2)
    return Outer(left, right, outers[0].shape)


def _join_rows(rows: list[Rows]) -> Rows:
    if len(rows) == 1:
        return rows[0]
    return Rows(torch.cat([f.index for f in rows], 1), torch.cat([f.value for f in rows], 1), rows[0].shape)


def _join_singles(singles: list[Single]) -> Tensor:
    dense = singles[0].to_dense()
    for single in singles[1:]:
        dense[single.sample] += single.grad
    return dense
