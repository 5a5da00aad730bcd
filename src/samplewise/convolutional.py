"""The factor of convolutions: output gradients and inputs, kept as they are."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Size, Tensor

from .buffers import scratch
from .factors import Dense, Factor, chunk_size, squares, wide
from .outer import Outer, gram_norms, gram_seconds
from .pixels import Taps, patch_grams, patch_grams_seconds, samples_last
from .strategy import current, rates

# (what for, shape, of which type) -> memory to write into
Memory = Callable[[str, Sequence[int], Tensor], Tensor]
# Channels that a convolution's kernels work on at once: fewer cost as much.
_LANES = 16


@dataclass(frozen=True)
class Convolution(Factor):
    """grad[n] is the weight gradient of a convolution of `input[n]` with output gradient `grad[n]`."""

    grad: Tensor  # (n, c_out, *space)
    input: Tensor  # (n, c_in, *space), padded beforehand where the padding is not symmetric zeros
    shape: Size  # (c_out, c_in / groups, *kernel)
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def n(self) -> int:
        return self.grad.shape[0]

    @property
    def algorithm(self) -> str:
        name = current().name
        if name in {"gram", "tile"}:
            return name
        tile = min(self._fold_seconds(), self._unfold_seconds() + self._multiply_seconds())
        return "gram" if name == "auto" and self._gram_seconds() <= tile else "tile"

    def regroup(self, n: int) -> Factor:
        return self if n == self.n else Dense(self.to_dense()).regroup(n)

    def to_dense(self) -> Tensor:
        if torch.is_grad_enabled() and self.n:
            return self.folded() if self._folds() else self.unfold().to_dense()
        return self.write(self.grad.new_empty(self.n, *self.shape))

    def write(self, out: Tensor) -> Tensor:
        if not self.n:
            return out
        for rows, part in zip(out.split(self._chunk()), self._parts(self._chunk()), strict=True):
            rows.copy_(part.folded()) if self._folds() else part.unfolded(scratch).write(rows)
        return out

    def sq_norms(self) -> Tensor:
        if not self.n:
            return squares(self.to_dense())
        if self.algorithm == "gram":
            size = chunk_size(self.groups * self._positions() ** 2 * self.grad.element_size(), self.n)
            return torch.cat([part.gram_squares() for part in self._parts(size)])
        return torch.cat([part.tile_squares() for part in self._parts(self._chunk())])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scale = weights.to(self.grad.dtype).reshape(-1, *[1] * (self.grad.ndim - 1))
        # the smaller of the two is the cheaper to scale
        if self.grad.numel() <= self.input.numel():
            return self._weight_grad(self.grad * scale, self.input)
        return self._weight_grad(self.grad, self.input * scale)

    def dot(self, direction: Tensor) -> Tensor:
        convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[self.grad.ndim - 3]
        direction = direction.to(self.input.dtype)
        mapped = convolution(self.input, direction, None, self.stride, self.padding, self.dilation, self.groups)
        return (wide(mapped) * wide(self.grad)).flatten(1).sum(1)

    def unfold(self) -> Outer:
        """The same as outer products of the output gradient with the patches it saw."""
        return self.unfolded(_fresh)

    # --- two ways to the gradients of a few samples -------------------------------------------------------------------------

    def folded(self) -> Tensor:
        """By one convolution with the samples as groups, `(n, *shape)`."""
        folded = self._weight_grad(self.grad.flatten(0, 1)[None], self.input.flatten(0, 1)[None], self.n)
        return folded.reshape(self.n, *self.shape)

    def unfolded(self, memory: Memory) -> Outer:
        """As outer products; the patches are `(n, c_in * kernel, positions)`, copied in runs along the last axis of space."""
        n, g = self.n, self.groups
        x = self._padded(memory) if any(self.padding) else self.input.contiguous()
        windows = self._windows(x, x.stride())
        patches = windows if self._is_pointwise() else memory("patches", windows.shape, windows).copy_(windows)
        right = patches.reshape(n, g, math.prod(self.shape[1:]), self._positions()).mT
        return Outer(self._left(), right, self.shape)

    def gram_squares(self) -> Tensor:
        """`sum_{p,q} (grad[p] · grad[q]) (patch[p] · patch[q])`, `(n,)`."""
        n, g = self.n, self.groups
        if math.prod(self.shape[2:]) == 1:
            return gram_norms(wide(self._left()), wide(self.unfolded(scratch).right))
        rows = wide(self.grad).reshape(n * g, self.shape[0] // g, self._positions())
        images = wide(self.input).reshape(n * g, self.shape[1], *self.input.shape[2:])
        products = patch_grams(images, self.grad.shape[2:], self._taps()) * samples_last(rows, "output gradients")
        return products.sum(0).reshape(n, g).sum(1)

    def _taps(self) -> list[Taps]:
        settings = zip(self.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return [Taps.of(*one) for one in settings]

    def _left(self) -> Tensor:
        """The output gradient as the left of outer products, `(n, g, t, o)`."""
        return self.grad.reshape(self.n, self.groups, self.shape[0] // self.groups, self._positions()).mT

    def _windows(self, x: Tensor, strides: Sequence[int]) -> Tensor:
        """A view `(n, c_in, *kernel, *space)` of a padded input, whose strides are given as those of `(n, c_in, *space)`."""
        steps = [s * stride for s, stride in zip(strides[2:], self.stride, strict=True)]
        spread = [s * dilation for s, dilation in zip(strides[2:], self.dilation, strict=True)]
        return x.as_strided(
            (self.n, self.input.shape[1], *self.shape[2:], *self.grad.shape[2:]), (*strides[:2], *spread, *steps)
        )

    def _padded(self, memory: Memory) -> Tensor:
        """The input with its zeros around, `(n, c_in, *space)`."""
        space = self.input.shape[2:]
        sizes = [size + 2 * pad for size, pad in zip(space, self.padding, strict=True)]
        inside = padded = memory("padded", (*self.input.shape[:2], *sizes), self.input).zero_()
        for dim, (size, pad) in enumerate(zip(space, self.padding, strict=True), 2):
            inside = inside.narrow(dim, pad, size)
        inside.copy_(self.input)
        return padded

    def tile_squares(self) -> Tensor:
        if self._folds():
            return squares(self.folded())
        # the transposed product: BLAS is faster with the wider side first
        outer = self.unfolded(scratch)
        left, right = wide(outer.left).flatten(0, 1), wide(outer.right).flatten(0, 1)
        size = (len(left), right.shape[2], left.shape[2])
        tile = (
            torch.matmul(right.mT, left)
            if torch.is_grad_enabled()
            else torch.bmm(right.mT, left, out=scratch("tile", size, left))
        )
        return squares(tile.reshape(self.n, -1))

    def _weight_grad(self, grad: Tensor, input: Tensor, folds: int = 1) -> Tensor:
        weight = grad.new_empty(1).expand(self.shape[0] * folds, *self.shape[1:])
        zeros = [0] * (grad.ndim - 2)
        settings = (self.stride, self.padding, self.dilation, False, zeros, self.groups * folds)
        gradient: Tensor = torch.ops.aten.convolution_backward(grad, input, weight, None, *settings, [False, True, False])[1]
        return gradient

    # --- what they cost -----------------------------------------------------------------------------------------------------

    def _folds(self) -> bool:
        """Whether samples as groups of one convolution are the faster way."""
        return self._fold_seconds() <= self._unfold_seconds() + self._multiply_seconds()

    def _gram_seconds(self) -> float:
        if math.prod(self.shape[2:]) == 1:
            return self._unfold_seconds() + gram_seconds(self._left(), self.shape[1])
        rate, t = rates(self.grad), self._positions()
        patches = patch_grams_seconds(self.input, self.grad.shape[2:], self._taps(), rate.product, rate.memory)
        return 2 * self.shape[0] * t * t / rate.product + patches

    def _fold_seconds(self) -> float:
        """The flop at the rate of the ordinary gradient, and the result written and reordered."""
        rate, inputs = rates(self.grad), self.shape[1]
        outputs = self.shape[0] // self.groups
        lanes = 1 if inputs == outputs == 1 else math.ceil(inputs / _LANES) * _LANES / inputs
        flops = 2 * math.prod(self.shape) * self._positions() * lanes
        return flops / rate.convolution + 3 * math.prod(self.shape) * self.grad.element_size() / rate.memory

    def _unfold_seconds(self) -> float:
        """The patches written once and read once, with the strides of the copy."""
        return 0.0 if self._is_pointwise() else 4 * self._patch_bytes() / rates(self.grad).memory

    def _multiply_seconds(self) -> float:
        return 2 * math.prod(self.shape) * self._positions() / rates(self.grad).product

    def _positions(self) -> int:
        return math.prod(self.grad.shape[2:])

    def _is_pointwise(self) -> bool:
        return set(self.shape[2:]) == {1} and set(self.stride) == {1} and not any(self.padding)

    def _chunk(self) -> int:
        patches = 0 if self._folds() else self._patch_bytes() // 4
        return chunk_size(max(math.prod(self.shape) * self.grad.element_size(), patches), self.n)

    def _patch_bytes(self) -> int:
        return self.input.shape[1] * math.prod(self.shape[2:]) * self._positions() * self.grad.element_size()

    def _parts(self, size: int) -> Iterator["Convolution"]:
        for grad, x in zip(self.grad.split(size), self.input.split(size), strict=True):
            yield replace(self, grad=grad, input=x)


def _fresh(_: str, shape: Sequence[int], like: Tensor) -> Tensor:
    return like.new_empty(shape)
