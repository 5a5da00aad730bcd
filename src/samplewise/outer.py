"""Factors of products: sums of outer products over positions, and the same with a one-hot left."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from .buffers import scratch
from .factors import Dense, Factor, chunk_size, joined, squares, wide
from .products import bmm, has_onednn, onednn_linear, operands, own_kernels, scaled, tile
from .strategy import Rates, current, rates

# Below it, in flop, the call itself costs more than the product.
_SMALL_PRODUCT = 1e8
# The flop/s of our own kernel for Grams, in those of batched products (measured on an H100).
_OWN_KERNEL = 0.65


@dataclass(frozen=True)
class Outer(Factor):
    """grad[n,g] = sum_t left[n,g,t] ⊗ right[n,g,t]: linear layers, contractions, and conv after unfold."""

    left: Tensor  # (n, g, t, o)
    right: Tensor  # (n, g, t, i)
    shape: Size  # of the parameter; g * o * i elements

    @property
    def n(self) -> int:
        return self.left.shape[0]

    @property
    def algorithm(self) -> str:
        (_, g, t, o), i, name = self.left.shape, self.right.shape[-1], current().name
        if t <= 1:
            return "gram"
        if name in {"gram", "tile"}:
            return name
        rate, itemsize = rates(self.left), self.left.element_size()
        gram = gram_seconds((g, t, o, i), max(4, itemsize), rate)
        # 2 t o i flop, written to cache and read once
        flops = 2 * t * o * i
        onednn = _onednn_seconds(flops, t * min(o, i) * itemsize, rate) if g == 1 else math.inf
        tile = g * (min(flops / rate.product, onednn) + 2 * o * i * itemsize / rate.memory)
        return "gram" if name == "auto" and gram <= tile else "tile"

    def regroup(self, n: int) -> "Outer":
        if self.n == n:
            return self
        return Outer(_rows_to_positions(self.left, n), _rows_to_positions(self.right, n), self.shape)

    def to_dense(self) -> Tensor:
        return self.write(self.left.new_empty(self.n, *self.shape)) if _writable(self) else _products(self)

    def write(self, out: Tensor) -> Tensor:
        if not _writable(self) or out.dtype != self.left.dtype or not out.is_contiguous():
            return super().write(out)
        (n, g, t, o), i = self.left.shape, self.right.shape[-1]
        blocks, left, right = out.view(n * g, o, i), self.left.reshape(n * g, t, o), self.right.reshape(n * g, t, i)
        if t == 1:
            torch.mul(left.mT, right, out=blocks)
        else:
            torch.bmm(left.mT, right, out=blocks)
        return out

    def sq_norms(self) -> Tensor:
        if self.left.shape[2] == 1:
            # Goodfellow 2015, arXiv:1510.01799: |a|^2 |g|^2
            (n, g, _, o), i = self.left.shape, self.right.shape[-1]
            if g == 1:
                return squares(self.left) * squares(self.right)
            each = squares(self.left.reshape(n * g, o)) * squares(self.right.reshape(n * g, i))
            return each.reshape(n, g).sum(1)
        if self.algorithm == "gram":
            # Ghost norm (Li et al. 2022, arXiv:2110.05679)
            return gram_norms(*operands(self.left, self.right))
        return joined([squares(part) for part in _tiles(*operands(self.left, self.right))])

    def inner(self, other: Factor) -> Tensor:
        if isinstance(other, Outer) and _same_blocks(self, other):
            (_, _, t, o), s, i = self.left.shape, other.left.shape[2], self.right.shape[-1]
            if t * s * (o + i) <= (t + s) * o * i:
                rows = wide(self.left) @ wide(other.left).mT
                return (rows * (wide(self.right) @ wide(other.right).mT)).sum((1, 2, 3))
        if isinstance(other, Rows):
            return other.inner(self)
        return super().inner(other)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        (n, g, t, o), i = self.left.shape, self.right.shape[-1]
        if g == 1:
            # one product over all samples and positions, as the ordinary gradient is
            return _summed(self.left.reshape(n, t, o), self.right.reshape(n, t, i), weights).reshape(self.shape)
        return torch.einsum("n,ngto,ngti->goi", weights.to(self.left.dtype), self.left, self.right).reshape(self.shape)

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

    @property
    def algorithm(self) -> str:
        return "rows"

    def regroup(self, n: int) -> "Rows":
        positions = self.index.numel() // n if n else 0
        return Rows(self.index.reshape(n, positions), self.value.reshape(n, positions, self.shape[-1]), self.shape)

    def to_dense(self) -> Tensor:
        dense = self.value.new_zeros(self.n * self.shape[0], self.shape[1])
        dense.index_add_(0, self._keys().flatten(), self.value.flatten(0, 1))
        return dense.reshape(self.n, *self.shape)

    def write(self, out: Tensor) -> Tensor:
        return self.add_to(out.zero_())

    def add_to(self, out: Tensor) -> Tensor:
        if out.dtype != self.value.dtype or not out.is_contiguous():
            return super().add_to(out)
        out.view(self.n * self.shape[0], self.shape[1]).index_add_(0, self._keys().flatten(), self.value.flatten(0, 1))
        return out

    def sq_norms(self) -> Tensor:
        # one row for each place in the order of the keys (sample, row of the table): equal keys stand together and share one
        keys, order = self._keys().flatten().sort()
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]
        place = torch.empty_like(order).index_copy_(0, order, first.cumsum(0) - 1)
        value = wide(self.value).flatten(0, 1)
        totals = torch.zeros_like(value).index_add_(0, place, value)
        samples = keys.new_zeros(len(keys)).index_copy(
            0, first.cumsum(0) - 1, keys.div(max(self.shape[0], 1), rounding_mode="floor")
        )
        return value.new_zeros(self.n).index_add_(0, samples, squares(totals))

    def inner(self, other: Factor) -> Tensor:
        if isinstance(other, Outer) and other.left.shape[1] == 1:
            # tied embedding and head: <E, H> = sum_{t,s} left[t, index[s]] (right[t] · value[s])
            t = other.left.shape[2]
            picked = other.left[:, 0].gather(2, self.index[:, None].expand(-1, t, -1))
            right, value = operands(other.right[:, 0], self.value)
            return (wide(picked) * bmm(right, value.mT, "tied")).sum((1, 2))
        if isinstance(other, Dense):
            picked = other.grad[torch.arange(self.n, device=self.index.device)[:, None], self.index]
            return (wide(picked) * wide(self.value)).sum((1, 2))
        return super().inner(other)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        values = scaled(self.value, weights).flatten(0, 1)
        return self.value.new_zeros(self.shape).index_add_(0, self.index.flatten(), values)

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
        """One number for each sample and row of the table, `(n, t)`."""
        samples = torch.arange(self.n, device=self.index.device)[:, None]
        return samples * self.shape[0] + self.index


def gram_seconds(sizes: tuple[int, int, int, int], itemsize: int, rate: Rates) -> float:
    """What norms by inner products of positions cost for each sample; `sizes` are g, t, o, i."""
    g, t, o, i = sizes
    if rate.device != "cpu":
        # by pairs of full blocks, which our own kernel does without writing Grams
        blocks = math.ceil(t / 128)
        return g * blocks * (blocks + 1) * 128**2 * (o + i) / (_OWN_KERNEL * rate.product)
    flops = g * t * (t + _block(t, rate.device)) * (o + i)
    # both Grams written, multiplied in place and summed
    return flops / rate.product + 4 * g * t * t * itemsize / rate.memory


def gram_norms(left: Tensor, right: Tensor) -> Tensor:
    """`sum_{t,s} (left[t] · left[s]) (right[t] · right[s])`, `(n,)`, by rows of blocks from the diagonal on: the rest is the same."""
    (n, g, t, _), block = left.shape, _block(left.shape[2], left.device.type)
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    kernels = own_kernels(left, right)
    if kernels is not None:
        alone: Tensor = kernels.gram_norms(left, right)
        return alone if g == 1 else alone.reshape(n, g).sum(1)
    total = wide(left.new_zeros(n * g))
    for start in range(0, t, block):
        rows = slice(start, start + block)
        products = bmm(left[:, rows], left[:, start:].mT, "gram, left")
        products *= bmm(right[:, rows], right[:, start:].mT, "gram, right")
        total.add_(products[..., :block].sum((1, 2)))
        if start + block < t:
            total.add_(products[..., block:].sum((1, 2)), alpha=2)
    return total if g == 1 else total.reshape(n, g).sum(1)


def _block(t: int, device: str) -> int:
    """Smaller ones save products, larger ones calls, and vector instructions want no rest (measured for t of 16 to 1024)."""
    if device != "cpu":
        return max(t, 1) if t <= 512 else 512
    if t <= 96:
        return max(t, 1) if t <= 32 else math.ceil(t / 2)
    return 48 if t < 512 else 128


def _tiles(left: Tensor, right: Tensor) -> Iterator[Tensor]:
    """The gradients of a few samples at a time, `(m, g * o, i)`, in memory that the next ones overwrite."""
    (n, g, t, o), i = left.shape, right.shape[-1]
    if g == 1 and n and _by_onednn(left, 2 * t * o * i, t * min(o, i)):
        for a, b in zip(left[:, 0], right[:, 0], strict=True):
            narrow, other = sorted((a, b), key=lambda x: x.shape[1])
            yield _by_linear_layer(narrow, other)[None]
        return
    size = chunk_size(g * o * i * max(4, left.element_size()), n, left.device)
    parts = [(left, right)] if size >= n else zip(left.split(size), right.split(size), strict=True)
    for a, b in parts:
        yield tile(a.flatten(0, 1), b.flatten(0, 1)).reshape(len(a), g * o, i)


def _summed(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """`sum_{n,t} weights[n] left[n,t] ⊗ right[n,t]`."""
    (n, t, o), i = left.shape, right.shape[2]
    wide_left = o > i
    # the narrower is the cheaper to turn, but then the product has to be turned too
    turns = n * t * (o - i) > o * i
    if _by_onednn(left, 2 * left.numel() * i, n * t * i + o * i if turns else n * t * o):
        first, other = (right, left) if turns else (left, right)
        each = weights.to(left.dtype)[:, None].expand(n, t).reshape(n * t)
        product = _by_linear_layer(first.flatten(0, 1), other.flatten(0, 1), each)
        return product.mT.contiguous() if turns else product
    # the narrower of the two is the cheaper to scale
    left, right = (left, scaled(right, weights, "scaled")) if wide_left else (scaled(left, weights, "scaled"), right)
    return left.flatten(0, 1).mT @ right.flatten(0, 1)


def _by_linear_layer(left: Tensor, right: Tensor, weights: Tensor | None = None) -> Tensor:
    """`sum_t weights[t] left[t] ⊗ right[t]` by oneDNN, the left transposed into memory in use, and scaled on the way."""
    turned = scratch("turned", left.mT.shape, left)
    turned = turned.copy_(left.mT) if weights is None else torch.mul(left.mT, weights, out=turned)
    return onednn_linear(turned, right.mT)


def _by_onednn(left: Tensor, flops: float, turned: int) -> bool:
    """Whether a product is faster by oneDNN, where so many numbers of it are transposed."""
    rate = rates(left)
    faster = _onednn_seconds(flops, turned * left.element_size(), rate) < flops / rate.product
    return faster and not torch.is_grad_enabled() and has_onednn(left)


def _onednn_seconds(flops: float, turned: int, rate: Rates) -> float:
    """What a product costs by oneDNN, with so many bytes transposed."""
    return flops / rate.onednn + turned / rate.turning if rate.onednn and flops > _SMALL_PRODUCT else math.inf


def _products(factor: Outer) -> Tensor:
    return (factor.left.mT @ factor.right).reshape(factor.n, *factor.shape)


def _writable(factor: Outer) -> bool:
    """Whether a product may be written into memory that is there already: not where a graph is built."""
    return not torch.is_grad_enabled() and factor.left.dtype == factor.right.dtype


def _rows_to_positions(x: Tensor, n: int) -> Tensor:
    rows = x.shape[0] // n if n else 1
    return x.reshape(n, rows, *x.shape[1:]).transpose(1, 2).flatten(2, 3)


def _same_blocks(a: Outer, b: Outer) -> bool:
    return a.left.shape[1::2] == b.left.shape[1::2] and a.right.shape[-1] == b.right.shape[-1]
