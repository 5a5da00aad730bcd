"""The algebra: a factor is the per-sample gradient of one use of one parameter, unmaterialised.

Axis letters: n sample, m other sample, g group, t position, o output, i input, v row, d embedding, k projection.
Every quantity has a dense default, so that a new factor is right before it is fast.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Size, Tensor

# A fresh buffer above 32 MB costs page faults on CPU (2 GB/s instead of 10-30): dense work goes in chunks below it.
_CHUNK_BYTES = 32 * 2**20


class Factor(ABC):
    """Stands for a tensor `(n, *shape)`. Only `n`, `shape`, `regroup` and `to_dense` have no default."""

    shape: Size

    @property
    @abstractmethod
    def n(self) -> int:
        """The number of samples."""

    @abstractmethod
    def regroup(self, n: int) -> "Factor":
        """The same with consecutive rows joined into `n` samples: the gradient of a sample is the sum over its rows."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The gradients themselves, `(n, *shape)`."""

    def sq_norms(self) -> Tensor:
        """Squared Frobenius norms, `(n,)`, accumulated in float32 or better."""
        return flat(wide(self.to_dense())).square().sum(1)

    def inner(self, other: "Factor") -> Tensor:
        """Inner products sample by sample, `(n,)`."""
        return flat(wide(self.to_dense()) * wide(other.to_dense())).sum(1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """`sum_n weights[n] grad[n]`, of shape `shape`."""
        dense = self.to_dense()
        return (weights.to(dense.dtype) @ flat(dense)).reshape(self.shape)

    def dot(self, direction: Tensor) -> Tensor:
        """`<grad[n], direction>`, `(n,)`; `direction` has shape `shape`."""
        dense = wide(self.to_dense())
        return flat(dense) @ wide(direction).to(dense.dtype).flatten()

    def gram(self, other: "Factor") -> Tensor:
        """`<grad[n], other[m]>`, `(n, m)`."""
        return flat(wide(self.to_dense())) @ flat(wide(other.to_dense())).T

    def project(self, matrix: Tensor) -> Tensor:
        """`sum over shape of grad[n] matrix[k]`, `(n, k)`; `matrix` is `(k, *shape)`."""
        dense = wide(self.to_dense())
        return flat(dense) @ flat(wide(matrix).to(dense.dtype)).T


@dataclass(frozen=True)
class Dense(Factor):
    """The gradients themselves: norms, biases, scales, position tables, and whatever has no structure."""

    grad: Tensor  # (n, *shape)

    @property
    def shape(self) -> Size:  # type: ignore[override]
        return self.grad.shape[1:]

    @property
    def n(self) -> int:
        return self.grad.shape[0]

    def regroup(self, n: int) -> "Dense":
        rows = self.grad.shape[0] // n if n else 1
        return self if rows == 1 else Dense(self.grad.reshape(n, rows, *self.shape).sum(1))

    def to_dense(self) -> Tensor:
        return self.grad


@dataclass(frozen=True)
class Outer(Factor):
    """grad[n,g] = sum_t left[n,g,t] ⊗ right[n,g,t]: linear layers, contractions, and conv after unfold."""

    left: Tensor  # (n, g, t, o)
    right: Tensor  # (n, g, t, i)
    shape: Size  # of the parameter; g * o * i elements

    @property
    def n(self) -> int:
        return self.left.shape[0]

    def regroup(self, n: int) -> "Outer":
        if self.n == n:
            return self
        return Outer(_rows_to_positions(self.left, n), _rows_to_positions(self.right, n), self.shape)

    def to_dense(self) -> Tensor:
        return (self.left.mT @ self.right).reshape(self.n, *self.shape)

    def sq_norms(self) -> Tensor:
        left, right = wide(self.left), wide(self.right)
        (_, _, t, o), i = left.shape, right.shape[-1]
        if t == 1:
            # Goodfellow 2015, arXiv:1510.01799: |a|^2 |g|^2
            return (left.square().sum((-1, -2)) * right.square().sum((-1, -2))).sum(1)
        if t * (o + i) <= o * i:
            # Ghost norm (Li et al. 2022, arXiv:2110.05679): n t^2 (o + i) flops against n t o i dense.
            return _gram_inner(left, right, left, right)
        return torch.cat([dense.square().sum((1, 2, 3)) for dense in _dense_chunks(left, right)])

    def inner(self, other: Factor) -> Tensor:
        if isinstance(other, Outer) and _same_blocks(self, other):
            (_, _, t, o), s, i = self.left.shape, other.left.shape[2], self.right.shape[-1]
            if t * s * (o + i) <= (t + s) * o * i:
                return _gram_inner(wide(self.left), wide(self.right), wide(other.left), wide(other.right))
        if isinstance(other, Rows):
            return other.inner(self)
        return super().inner(other)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scale = weights.to(self.left.dtype)[:, None, None, None]
        left, right = self.left, self.right
        # the narrower of the two is the cheaper to scale
        left, right = (left * scale, right) if left.shape[3] <= right.shape[3] else (left, right * scale)
        if left.shape[1] == 1:
            # one product over all samples and positions, as the ordinary gradient is
            return (left.flatten(0, 2).mT @ right.flatten(0, 2)).reshape(self.shape)
        return torch.einsum("ngto,ngti->goi", left, right).reshape(self.shape)

    def dot(self, direction: Tensor) -> Tensor:
        (_, g, _, o), i = self.left.shape, self.right.shape[-1]
        left, right = wide(self.left), wide(self.right)
        mapped = right @ direction.to(right.dtype).reshape(g, o, i).mT
        return (mapped * left).sum((1, 2, 3))

    def gram(self, other: Factor) -> Tensor:
        if isinstance(other, Outer) and _same_blocks(self, other):
            (_, _, t, o), s, i = self.left.shape, other.left.shape[2], self.right.shape[-1]
            # pairwise positions n m t s (o + i) flops against forming both, (n + m) t o i, and their product, n m o i
            if t * s * (o + i) <= o * i:
                left = torch.einsum("ngto,mgso->nmgts", wide(self.left), wide(other.left))
                right = torch.einsum("ngti,mgsi->nmgts", wide(self.right), wide(other.right))
                return (left * right).sum((2, 3, 4))
        return super().gram(other)


@dataclass(frozen=True)
class Rows(Factor):
    """grad[n, index[n,t]] += value[n,t]: an `Outer` with a one-hot left, made by embeddings."""

    index: Tensor  # (n, t)
    value: Tensor  # (n, t, d)
    shape: Size  # (v, d)

    @property
    def n(self) -> int:
        return self.index.shape[0]

    def regroup(self, n: int) -> "Rows":
        positions = self.index.numel() // n if n else 0
        return Rows(self.index.reshape(n, positions), self.value.reshape(n, positions, self.shape[-1]), self.shape)

    def to_dense(self) -> Tensor:
        dense = self.value.new_zeros(self.n * self.shape[0], self.shape[1])
        dense.index_add_(0, self._keys(), self.value.flatten(0, 1))
        return dense.reshape(self.n, *self.shape)

    def sq_norms(self) -> Tensor:
        keys, place = self._keys().unique(return_inverse=True)
        value = wide(self.value).flatten(0, 1)
        totals = value.new_zeros(len(keys), self.shape[1]).index_add_(0, place, value)
        samples = keys.div(max(self.shape[0], 1), rounding_mode="floor")
        return value.new_zeros(self.n).index_add_(0, samples, totals.square().sum(1))

    def inner(self, other: Factor) -> Tensor:
        if isinstance(other, Outer) and other.left.shape[1] == 1:
            # tied embedding and head: <E, H> = sum_{t,s} left[t, index[s]] (right[t] · value[s])
            t = other.left.shape[2]
            picked = other.left[:, 0].gather(2, self.index[:, None].expand(-1, t, -1))
            return (wide(picked) * (wide(other.right[:, 0]) @ wide(self.value).mT)).sum((1, 2))
        if isinstance(other, Dense):
            picked = other.grad[torch.arange(self.n, device=self.index.device)[:, None], self.index]
            return (wide(picked) * wide(self.value)).sum((1, 2))
        return super().inner(other)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scaled = self.value * weights.to(self.value.dtype)[:, None, None]
        return self.value.new_zeros(self.shape).index_add_(0, self.index.flatten(), scaled.flatten(0, 1))

    def dot(self, direction: Tensor) -> Tensor:
        value = wide(self.value)
        return (direction.to(value.dtype)[self.index] * value).sum((1, 2))

    def gram(self, other: Factor) -> Tensor:
        if not isinstance(other, Rows):
            return super().gram(other)
        same = self.index[:, None, :, None] == other.index[None, :, None, :]
        values = torch.einsum("ntd,msd->nmts", wide(self.value), wide(other.value))
        return (same * values).sum((2, 3))

    def _keys(self) -> Tensor:
        samples = torch.arange(self.n, device=self.index.device)[:, None]
        return (samples * self.shape[0] + self.index).flatten()


@dataclass(frozen=True)
class Diagonal(Factor):
    """grad[n] is zero except at the positions of one axis that sample n owns: a shared tensor with the sample axis."""

    grad: Tensor  # (*shape)
    owners: Tensor  # (shape[dim],): the sample of each position on axis dim
    dim: int
    samples: int

    @property
    def shape(self) -> Size:  # type: ignore[override]
        return self.grad.shape

    @property
    def n(self) -> int:
        return self.samples

    def regroup(self, n: int) -> Factor:
        if n != self.samples:
            raise AssertionError("a diagonal names its owners itself")
        return self

    def to_dense(self) -> Tensor:
        mine = self.owners == torch.arange(self.samples, device=self.grad.device)[:, None]
        return self.grad * self._on_axis(mine)

    def sq_norms(self) -> Tensor:
        return self._per_owner(wide(self.grad).square())

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.grad * self._on_axis(weights.to(self.grad.dtype)[self.owners][None])[0]

    def dot(self, direction: Tensor) -> Tensor:
        return self._per_owner(wide(self.grad) * direction)

    def _on_axis(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), *[rows.shape[1] if d == self.dim else 1 for d in range(self.grad.ndim)])

    def _per_owner(self, values: Tensor) -> Tensor:
        totals = values.movedim(self.dim, 0).flatten(1).sum(1) if values.ndim > 1 else values
        return totals.new_zeros(self.samples).index_add_(0, self.owners, totals)


@dataclass(frozen=True)
class Single(Factor):
    """grad[n] is zero except for one sample: made by an op that ran on that sample alone."""

    grad: Tensor  # (*shape)
    sample: int
    samples: int

    @property
    def shape(self) -> Size:  # type: ignore[override]
        return self.grad.shape

    @property
    def n(self) -> int:
        return self.samples

    def regroup(self, n: int) -> Factor:
        if n != self.samples:
            raise AssertionError("a single names its sample itself")
        return self

    def to_dense(self) -> Tensor:
        dense = self.grad.new_zeros(self.samples, *self.shape)
        dense[self.sample] = self.grad
        return dense

    def sq_norms(self) -> Tensor:
        return self._alone(wide(self.grad).square().sum())

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.grad * weights[self.sample].to(self.grad.dtype)

    def dot(self, direction: Tensor) -> Tensor:
        return self._alone((wide(self.grad) * direction).sum())

    def _alone(self, value: Tensor) -> Tensor:
        return torch.nn.functional.pad(value[None], [self.sample, self.samples - self.sample - 1])


@dataclass(frozen=True)
class Pulled(Factor):
    """The gradient of a parameter whose derived tensor has gradient `factor`: weight norm, slices, transposes, casts."""

    factor: Factor
    # (m, *factor.shape) -> (m, *shape), row by row
    pull: Callable[[Tensor], Tensor]
    # every entry of the derived tensor is another entry of the parameter: norms carry over
    isometric: bool
    shape: Size
    # the memory of the parameter that the derived tensor is a view of, as a range of elements
    region: range | None = None
    # a hook on the derived tensor may make it otherwise
    linear: bool = True

    @property
    def n(self) -> int:
        return self.factor.n

    def regroup(self, n: int) -> "Pulled":
        return replace(self, factor=self.factor.regroup(n))

    def to_dense(self) -> Tensor:
        return self.pull(self.factor.to_dense())

    def sq_norms(self) -> Tensor:
        return self.factor.sq_norms() if self.isometric else super().sq_norms()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.pull(self.factor.weighted_sum(weights)[None])[0] if self.linear else super().weighted_sum(weights)


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

    def regroup(self, n: int) -> "Sum":
        return Sum(tuple(term.regroup(n) for term in self.terms))

    def to_dense(self) -> Tensor:
        return sum((term.to_dense() for term in self.terms[1:]), self.terms[0].to_dense())

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


def positions(x: Tensor) -> Tensor:
    """`(n, ..., o)` as one group of positions, `(n, 1, t, o)`."""
    return x.reshape(x.shape[0], 1, math.prod(x.shape[1:-1]), x.shape[-1])


def flat(x: Tensor) -> Tensor:
    """`(n, ...)` as a matrix of n rows."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def wide(x: Tensor) -> Tensor:
    """The same values in a type that sums safely: float32 for half precision, real and imaginary parts for complex."""
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj())
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x


def _rows_to_positions(x: Tensor, n: int) -> Tensor:
    rows = x.shape[0] // n if n else 1
    return x.reshape(n, rows, *x.shape[1:]).transpose(1, 2).flatten(2, 3)


def _same_blocks(a: Outer, b: Outer) -> bool:
    return a.left.shape[1::2] == b.left.shape[1::2] and a.right.shape[-1] == b.right.shape[-1]


def _gram_inner(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> Tensor:
    return ((left @ other_left.mT) * (right @ other_right.mT)).sum((1, 2, 3))


def chunk_size(bytes_per_sample: int) -> int:
    """How many samples' dense gradients stay in one buffer that is cheap to make."""
    return max(1, _CHUNK_BYTES // max(1, bytes_per_sample))


def _dense_chunks(left: Tensor, right: Tensor) -> Iterator[Tensor]:
    size = chunk_size(left.shape[1] * left.shape[3] * right.shape[3] * left.element_size())
    for a, b in zip(left.split(size), right.split(size), strict=True):
        yield a.mT @ b


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
