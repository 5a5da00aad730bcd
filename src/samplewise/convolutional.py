"""The factor of convolutions: output gradients and inputs, kept as they are."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Size, Tensor

from .buffers import scratch
from .convolution_costs import LANES, Ways, is_pointwise, ways
from .factors import HALF, Dense, Factor, chunk_size, joined, squares, wide
from .outer import Outer, gram_norms
from .pixels import Geometry, patch_grams, samples_last
from .products import operands, own_kernels, scaled, tile
from .strategy import current, rates

# Gradients of so many bytes are formed by one convolution (a ResNet's clipped sums take 0.02 of a step less than by copied parts); what
# it orders for itself takes as much memory again.
_AT_ONCE = 2**25
# Numbers of half precision in the longest that is copied as one.
_IN_A_RUN = 4
# (what for, shape, of which type) -> memory to write into
Memory = Callable[[str, Sequence[int], Tensor], Tensor]
_WEIGHT_GRAD = torch.ops.aten.convolution_backward.default


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
    def geometry(self) -> Geometry:
        """All but the samples."""
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return Geometry(self.shape, self.input.shape[2:], self.grad.shape[2:], *settings)

    @functools.cached_property
    def ways(self) -> Ways:
        """The cheapest ways to norms and gradients."""
        has_kernel = own_kernels(self.grad, self.input) is not None
        return ways(self.geometry, self.grad.element_size(), rates(self.grad), has_kernel=has_kernel)

    @property
    def algorithm(self) -> str:
        name = current().name
        if name in {"gram", "tile"}:
            return name
        return "gram" if name == "auto" and self.ways.gram else "tile"

    def regroup(self, n: int) -> Factor:
        return self if n == self.n else Dense(self.to_dense()).regroup(n)

    def to_dense(self) -> Tensor:
        if self.n and (torch.is_grad_enabled() or (self.ways.folds and self.n * self.ways.gradients <= _AT_ONCE)):
            return self.folded() if self.ways.folds else self.unfold().to_dense()
        return self.write(self.grad.new_empty(self.n, *self.shape))

    def write(self, out: Tensor) -> Tensor:
        if not self.n:
            return out
        if self._own_kernels() is not None:
            return self._write_by_own_kernel(out)
        folds, straight = self.ways.folds, self._multiplies_into(out)
        # what is written once needs no place in the cache
        size = chunk_size(self.ways.patches if straight else self.ways.tile, self.n, out.device)
        for rows, part in zip(out.split(size), self._parts(size), strict=True):
            if folds:
                rows.copy_(part.folded())
            elif straight:
                part.unfolded(scratch).write(rows)
            else:
                products = _transposed_products(part.unfolded(scratch)).mT
                rows.copy_(products.reshape(rows.shape))
        return out

    def sq_norms(self) -> Tensor:
        if not self.n:
            return squares(self.to_dense())
        if self.algorithm == "gram":
            held = self.groups * math.prod(self.grad.shape[2:]) ** 2 * max(4, self.grad.element_size())
            return joined([part.gram_squares() for part in self._parts(chunk_size(held, self.n, self.grad.device))])
        if self._own_kernels() is not None:
            # it writes nothing of a sample's
            return self.by_own_kernel()
        return joined([part.tile_squares() for part in self._parts(chunk_size(self.ways.tile, self.n, self.grad.device))])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        # the smaller of the two is the cheaper to scale
        if self.grad.numel() <= self.input.numel():
            return self._weight_grad(scaled(self.grad, weights), self.input)
        return self._weight_grad(self.grad, scaled(self.input, weights))

    def dot(self, direction: Tensor) -> Tensor:
        convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[self.grad.ndim - 3]
        direction = direction.to(self.input.dtype)
        mapped = convolution(self.input, direction, None, self.stride, self.padding, self.dilation, self.groups)
        return (wide(mapped) * wide(self.grad)).flatten(1).sum(1)

    def unfold(self) -> Outer:
        """The same as outer products of the output gradient with the patches it saw."""
        return self.unfolded(_fresh)

    # --- norms of a few samples ---------------------------------------------------------------------------------------------

    def gram_squares(self) -> Tensor:
        """`sum_{p,q} (grad[p] · grad[q]) (patch[p] · patch[q])`, `(n,)`."""
        n, g = self.n, self.groups
        if math.prod(self.shape[2:]) == 1:
            return gram_norms(*operands(self._left(), self.unfolded(scratch).right))
        rows, images = operands(self.grad, self.input)
        if g > 1:
            rows, images = rows.unflatten(1, (g, -1)).flatten(0, 1), images.unflatten(1, (g, -1)).flatten(0, 1)
        products = patch_grams(images, self.geometry) * samples_last(rows.flatten(2))
        return products.sum(0) if g == 1 else products.sum(0).reshape(n, g).sum(1)

    def tile_squares(self) -> Tensor:
        """From the gradients, which the next ones overwrite, `(n,)`."""
        if self.ways.folds:
            return squares(self.folded())
        if self._in_runs_of_channels():
            # by position, tap and channel: the order does not matter to a norm
            return squares(tile(*operands(self._runs_of_channels(), self._left()[:, 0])).flatten(1))
        return squares(_transposed_products(self.unfolded(scratch)).reshape(self.n, -1))

    # --- two ways to the gradients of a few samples -------------------------------------------------------------------------

    def folded(self) -> Tensor:
        """By one convolution with the samples as groups, `(n, *shape)`."""
        grad, image = (x.reshape(1, -1, *x.shape[2:]) for x in (self.grad, self.input))
        return self._weight_grad(grad, image, self.n).reshape(self.n, *self.shape)

    def unfolded(self, memory: Memory) -> Outer:
        """As outer products; the patches are `(n, c_in * kernel, positions)`, copied in runs along the last axis of space."""
        x = self._padded(memory) if any(self.padding) else self.input.contiguous()
        windows = self._windows(x)
        patches = windows if is_pointwise(self.geometry) else memory("patches", windows.shape, windows).copy_(windows)
        right = patches.reshape(self.n, self.groups, math.prod(self.shape[1:]), math.prod(self.grad.shape[2:])).mT
        return Outer(self._left(), right, self.shape)

    def by_own_kernel(self, out: Tensor | None = None) -> Tensor:
        """Squared norms, `(n,)`; the gradients are written into `out`, `(n, *shape)`, if it is given."""
        kernels, settings = self._own_kernels(), (self.stride, self.padding, self.dilation)
        assert kernels is not None
        found: Tensor = kernels.patch_products(self.grad.contiguous(), self.input.contiguous(), self.shape, *settings, out)
        return found

    def _write_by_own_kernel(self, out: Tensor) -> Tensor:
        if out.is_contiguous() and out.dtype == self.grad.dtype:
            self.by_own_kernel(out)
            return out
        size = chunk_size(self.ways.gradients, self.n, out.device)
        for rows, part in zip(out.split(size), self._parts(size), strict=True):
            gradients = part.grad.new_empty(rows.shape)
            part.by_own_kernel(gradients)
            rows.copy_(gradients)
        return out

    def _own_kernels(self) -> ModuleType | None:
        """Our own kernels, where they are the cheapest way and no graph is built."""
        return own_kernels(self.grad, self.input) if self.ways.own else None

    def _in_runs_of_channels(self) -> bool:
        """Whether patches are copied in runs of channels: a GPU copies numbers of 8 bytes as fast as it does those of 2."""
        half = self.input.dtype in HALF and self.input.device.type == "cuda" and not torch.is_grad_enabled()
        return half and self.groups == 1 and not self.shape[1] % _IN_A_RUN and not is_pointwise(self.geometry)

    def _runs_of_channels(self) -> Tensor:
        """The patches as `(n, positions, kernel * c_in)`."""
        d = self.grad.ndim - 2
        channels_last = self.input.movedim(1, -1)
        wide_last = [0, 0, *itertools.chain.from_iterable((pad, pad) for pad in reversed(self.padding))]
        padded = torch.nn.functional.pad(channels_last, wide_last).contiguous().view(torch.int64)
        sample, *steps, one = padded.stride()
        moves = [step * stride for step, stride in zip(steps, self.stride, strict=True)]
        taps = [step * dilation for step, dilation in zip(steps, self.dilation, strict=True)]
        sizes = (self.n, *self.grad.shape[2:], *self.shape[2:], padded.shape[-1])
        patches = padded.as_strided(sizes, (sample, *moves, *taps, one)).contiguous()
        return patches.view(self.input.dtype).flatten(1 + d).flatten(1, d)

    def _multiplies_into(self, out: Tensor) -> bool:
        """Whether products of output gradients and patches go straight into the result: BLAS wants an even side last."""
        even = not self.ways.folds and math.prod(self.shape[1:]) % LANES == 0
        return even and out.is_contiguous() and out.dtype == self.grad.dtype

    def _left(self) -> Tensor:
        """The output gradient as the left of outer products, `(n, g, t, o)`."""
        return self.grad.reshape(self.n, self.groups, self.shape[0] // self.groups, math.prod(self.grad.shape[2:])).mT

    def _windows(self, x: Tensor) -> Tensor:
        """A view `(n, c_in, *kernel, *space)` of a padded input."""
        steps = [s * stride for s, stride in zip(x.stride()[2:], self.stride, strict=True)]
        spread = [s * dilation for s, dilation in zip(x.stride()[2:], self.dilation, strict=True)]
        sizes = (self.n, self.input.shape[1], *self.shape[2:], *self.grad.shape[2:])
        return x.as_strided(sizes, (*x.stride()[:2], *spread, *steps))

    def _padded(self, memory: Memory) -> Tensor:
        """The input with its zeros around, `(n, c_in, *space)`."""
        space = self.input.shape[2:]
        sizes = [size + 2 * pad for size, pad in zip(space, self.padding, strict=True)]
        inside = padded = memory("padded", (*self.input.shape[:2], *sizes), self.input).zero_()
        for dim, (size, pad) in enumerate(zip(space, self.padding, strict=True), 2):
            inside = inside.narrow(dim, pad, size)
        inside.copy_(self.input)
        return padded

    def _weight_grad(self, grad: Tensor, input: Tensor, folds: int = 1) -> Tensor:
        # never read; an expanded number would be copied into as much memory
        weight = grad.new_empty(self.shape[0] * folds, *self.shape[1:])
        zeros = [0] * (grad.ndim - 2)
        settings = (self.stride, self.padding, self.dilation, False, zeros, self.groups * folds)
        gradient: Tensor = _WEIGHT_GRAD(grad, input, weight, None, *settings, [False, True, False])[1]
        return gradient

    def _parts(self, size: int) -> Iterator["Convolution"]:
        if size >= self.n:
            yield self
            return
        settings = (self.shape, self.stride, self.padding, self.dilation, self.groups)
        for grad, x in zip(self.grad.split(size), self.input.split(size), strict=True):
            yield Convolution(grad, x, *settings)


def _transposed_products(outer: Outer) -> Tensor:
    """`(n * g, i, o)`: BLAS is faster with the wider side first, and with the even one last."""
    right, left = operands(outer.right, outer.left)
    return tile(right.flatten(0, 1), left.flatten(0, 1))


def _fresh(_: str, shape: Sequence[int], like: Tensor) -> Tensor:
    return like.new_empty(shape)
