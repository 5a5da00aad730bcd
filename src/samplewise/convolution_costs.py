"""Which way leads to the weight gradients of a convolution sample by sample, and to their norms: what each costs, in seconds a sample."""

import functools
import math
from typing import NamedTuple

from .outer import gram_seconds
from .pixels import Geometry, entries_moved, phases
from .strategy import Rates

# Channels that a convolution's kernels work on at once: fewer cost as much.
LANES = 16
# The same of our own kernel for CUDA, of few or many outputs and of columns of a patch; what it takes to begin, in positions; and its
# flop/s, in those of batched products (measured on an H200: 0.26 to 0.42).
_FEW, _MANY, _BEGINNING, _OWN_KERNEL = 64, 128, 128, 0.3
# Passes over memory that jump from run to run, in those of one that does not (measured with 2 threads and AVX512).
_JUMPING = 2.5


class Ways(NamedTuple):
    """The cheapest ways."""

    # norms from inner products of positions, and not from gradients formed for the moment
    gram: bool
    # gradients by our own kernel
    own: bool
    # gradients by one convolution with the samples as groups, and not from patches
    folds: bool
    # what patches take for each sample in bytes, where gradients are formed from them, and what the gradients take
    patches: int
    gradients: int

    @property
    def tile(self) -> int:
        """What has to find room in the cache for each sample, in bytes."""
        return max(self.patches, self.gradients)


@functools.lru_cache(maxsize=4096)
def ways(geometry: Geometry, itemsize: int, rate: Rates, *, has_kernel: bool = False) -> Ways:
    """The cheapest ways for tensors of some size of numbers, at the rates of their device, which may have our own kernel."""
    fold = _fold_seconds(geometry, itemsize, rate)
    products = _unfold_seconds(geometry, itemsize, rate) + _flops(geometry) / rate.product
    alone = _own_seconds(geometry, rate) if has_kernel and geometry.groups == 1 else math.inf
    best = min(fold, products, alone)
    own, folds, gram = alone == best, fold == best < alone, _gram_seconds(geometry, itemsize, rate) <= best
    patches = 0 if folds else _patches(geometry) * itemsize
    return Ways(gram, own, folds, patches, math.prod(geometry.shape) * itemsize)


def is_pointwise(geometry: Geometry) -> bool:
    """Whether every position sees one pixel, in order: a linear layer."""
    return set(geometry.shape[2:]) == {1} and set(geometry.stride) == {1} and not any(geometry.padding)


def _fold_seconds(geometry: Geometry, itemsize: int, rate: Rates) -> float:
    """The flop at the rate of the ordinary gradient, and the result written and reordered."""
    inputs, outputs = geometry.shape[1], geometry.shape[0] // geometry.groups
    lanes = 1 if inputs == outputs == 1 else math.ceil(inputs / LANES) * LANES / inputs
    return _flops(geometry) * lanes / rate.convolution + 3 * math.prod(geometry.shape) * itemsize / rate.memory


def _own_seconds(geometry: Geometry, rate: Rates) -> float:
    """The flop of whole blocks."""
    outputs, columns = geometry.shape[0], math.prod(geometry.shape[1:])
    block = _FEW if outputs <= _FEW else _MANY
    area = math.ceil(outputs / block) * math.ceil(columns / block) * block**2
    return 2 * area * (math.prod(geometry.space) + _BEGINNING) / (_OWN_KERNEL * rate.product)


def _unfold_seconds(geometry: Geometry, itemsize: int, rate: Rates) -> float:
    """The patches written once and read once, with the strides of the copy."""
    return 0.0 if is_pointwise(geometry) else 4 * _patches(geometry) * itemsize / rate.memory


def _gram_seconds(geometry: Geometry, itemsize: int, rate: Rates) -> float:
    t, g, outputs = math.prod(geometry.space), geometry.groups, geometry.shape[0]
    if math.prod(geometry.shape[2:]) == 1:
        gram = gram_seconds((g, t, outputs // g, geometry.shape[1]), max(4, itemsize), rate)
        return _unfold_seconds(geometry, itemsize, rate) + gram
    pixels = sum(math.prod(phase.sizes) ** 2 for phase in phases(geometry))
    flops = 2 * outputs * t * t + 2 * g * geometry.shape[1] * pixels
    return flops / rate.product + _JUMPING * g * entries_moved(geometry) * itemsize / rate.memory


def _flops(geometry: Geometry) -> int:
    return 2 * math.prod(geometry.shape) * math.prod(geometry.space)


def _patches(geometry: Geometry) -> int:
    return geometry.groups * math.prod(geometry.shape[1:]) * math.prod(geometry.space)
