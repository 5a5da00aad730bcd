"""The algebra: a factor is the per-sample gradient of one use of one parameter, unmaterialised.

Axis letters: n sample, m other sample, g group, t position, o output, i input, v row, d embedding, k projection.
Every quantity has a dense default, so that a new factor is right before it is fast.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Size, Tensor

# Dense work goes in chunks: on a CPU such as stay in its cache, elsewhere such as keep the device busy.
_CACHED, _BUSY = 5 * 2**19, 2**27
_PIECE = 4096
HALF = frozenset({torch.float16, torch.bfloat16})


class Factor:
    """Stands for a tensor `(n, *shape)`. Only `n`, `shape`, `regroup` and `to_dense` have no default."""

    shape: Size

    @property
    def n(self) -> int:
        """The number of samples."""
        _lacking(self, "n")

    @property
    def structure(self) -> str:
        """What it is, for the coverage report."""
        return type(self).__name__

    @property
    def algorithm(self) -> str:
        """How norms are found, for the coverage report: from the gradients themselves, "dense", unless said otherwise."""
        return "dense"

    def regroup(self, n: int) -> "Factor":  # noqa: ARG002
        """The same with consecutive rows joined into `n` samples: the gradient of a sample is the sum over its rows."""
        _lacking(self, "regroup")

    def to_dense(self) -> Tensor:
        """The gradients themselves, `(n, *shape)`."""
        _lacking(self, "to_dense")

    def write(self, out: Tensor) -> Tensor:
        """Write the gradients themselves into `out`, `(n, *shape)`; returns it."""
        return out.copy_(self.to_dense())

    def add_to(self, out: Tensor) -> Tensor:
        """Add the gradients themselves to `out`, `(n, *shape)`; returns it."""
        return out.add_(self.to_dense())

    def sq_norms(self) -> Tensor:
        """Squared Frobenius norms, `(n,)`, accumulated in float32 or better."""
        return squares(self.to_dense())

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


def _lacking(factor: Factor, name: str) -> NoReturn:
    raise NotImplementedError(
        f"{type(factor).__name__}: a factor has a `shape` and defines `n`, `regroup` and `to_dense`; this one lacks `{name}`."
    )


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
class Diagonal(Factor):
    """grad[n] is zero except at the positions of one axis that sample n owns: a shared tensor with the sample axis."""

    grad: Tensor  # (*shape)
    owners: Tensor  # (shape[dim],): the sample of each position on axis dim
    dim: int
    samples: int
    # one position for each sample, in their order
    in_order: bool = False

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

    @property
    def algorithm(self) -> str:
        return self.factor.algorithm if self.isometric else super().algorithm

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.pull(self.factor.weighted_sum(weights)[None])[0] if self.linear else super().weighted_sum(weights)


def positions(x: Tensor) -> Tensor:
    """`(n, ..., o)` as one group of positions, `(n, 1, t, o)`."""
    return x.reshape(x.shape[0], 1, math.prod(x.shape[1:-1]), x.shape[-1])


def flat(x: Tensor) -> Tensor:
    """`(n, ...)` as a matrix of n rows."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def squares(x: Tensor) -> Tensor:
    """Squared norms of the rows of `(n, ...)`, `(n,)`, in float32 or better."""
    rows = flat(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x)
    if torch.is_grad_enabled():
        return wide(rows).square().sum(1)
    # reads the rows once and writes nothing; on a CPU in pieces, because in float32 one long sum is off by 1e-3 at 25 million entries
    wider, body = torch.float32 if x.dtype in HALF else None, rows.shape[1] // _PIECE * _PIECE
    if not body or x.device.type != "cpu":
        short: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=wider)
        return short.square()
    pieces = torch.linalg.vector_norm(rows[:, :body].unflatten(1, (-1, _PIECE)), dim=2, dtype=wider)
    rest = torch.linalg.vector_norm(rows[:, body:], dim=1, dtype=wider).square()
    total: Tensor = pieces.square().sum(1) + rest
    return total


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """What was found for some samples at a time, for all of them; or what stands side by side along another axis."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def wide(x: Tensor) -> Tensor:
    """The same values in a type that sums safely: float32 for half precision, real and imaginary parts for complex."""
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj())
    return x.float() if x.dtype in HALF else x


def chunk_size(bytes_per_sample: int, n: int, device: torch.device) -> int:
    """How many of n samples to work on at once: about equally many in each chunk."""
    most = max(1, (_CACHED if device.type == "cpu" else _BUSY) // max(1, bytes_per_sample))
    return math.ceil(n / math.ceil(n / most)) if n else 1


def expanded(x: Tensor) -> bool:
    """Whether entries of a tensor share memory."""
    return not x.is_contiguous() and any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))


def unexpanded(x: Tensor) -> Tensor:
    """With memory for each entry, so that it can be written to."""
    return x.clone(memory_format=torch.contiguous_format) if expanded(x) else x


def meeting(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The names of two tensors that share memory, or reach over each other's other than side by side."""
    for cluster in _clusters(tensors):
        first, second, *_ = cluster
        pair = meeting({name: x[0] for name, x in cluster.items()}) if _side_by_side(cluster) else (first, second)
        if pair is not None:
            return pair
    return None


def _clusters(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Those that reach over the same memory; the first two do so in each."""
    spans = sorted((x.data_ptr(), x.data_ptr() + _reach(x), name) for name, x in tensors.items() if x.numel() and not x.is_meta)
    clusters, end = list[dict[str, Tensor]](), 0
    for start, stop, name in spans:
        if start >= end:
            clusters.append({})
        clusters[-1][name], end = tensors[name], max(end, stop)
    return (cluster for cluster in clusters if len(cluster) > 1)


def _reach(x: Tensor) -> int:
    """The bytes from the first entry to the end of the last."""
    if x.is_contiguous():
        return x.nbytes
    return x.itemsize * (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)))


def _side_by_side(cluster: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are columns of one matrix: they meet if their first rows do."""
    rows = {x.stride(0) * x.itemsize if x.ndim else 0 for x in cluster.values()}
    if len(rows) != 1 or 0 in rows:
        return False
    ends = [(x.data_ptr(), x.data_ptr() + _reach(x[0])) for x in cluster.values()]
    return max(end for _, end in ends) - min(start for start, _ in ends) <= rows.pop()
