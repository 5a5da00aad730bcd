"""Inner products of the patches that a convolution sees, from inner products of pixels: a kernel's taps only move them.

The Gram of pixels (sample by sample, position by position) costs T^2 c; that of patches, which repeat every pixel for each tap, T^2 c k^2.
Samples lie on the last axis, so that what is moved are long runs of memory.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from .buffers import scratch
from .factors import wide
from .products import bmm

Slices = tuple[slice, ...]
# In bytes, of a CPU.
_PAGE, _LINE = 4096, 64
# So few rows find room beside each other (measured: 8 are as fast one way as the other, 32 twice, 64 three times).
_FEW = 16


class Geometry(NamedTuple):
    """All of a convolution but its samples: what depends on it alone is found once."""

    shape: tuple[int, ...]  # of the weight, (c_out, c_in / groups, *kernel)
    sizes: tuple[int, ...]  # of the input
    space: tuple[int, ...]  # of the output
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


# size, stride and offset of a part of a contiguous tensor
Part = tuple[tuple[int, ...], tuple[int, ...], int]


class Stage(NamedTuple):
    """Moves along one axis of the image, on both sides of a Gram."""

    # of the result
    shape: tuple[int, ...]
    # where each move adds what lies where
    moves: tuple[tuple[Part, Part], ...]


class Phase(NamedTuple):
    """The pixels that some taps see at all positions, and how the taps move them, axis after axis."""

    pixels: Slices
    sizes: tuple[int, ...]
    stages: tuple[Stage, ...]


def patch_grams(input: Tensor, geometry: Geometry) -> Tensor:
    """`sum over channels and taps of patch[p] patch[q]` of images `(m, c, *sizes)`, `(t * t, m)` for t positions of the output."""
    # half precision is added up in float32
    m, space, like = len(input), geometry.space, wide(input[:0])
    total = scratch("patch grams", (*space, *space, m), like).zero_()
    for phase in phases(geometry, m):
        moved = samples_last(input[phase.pixels].flatten(2))
        for k, stage in enumerate(phase.stages, 1):
            into = total if k == len(phase.stages) else scratch(f"moved along {k}", stage.shape, like).zero_()
            for here, there in stage.moves:
                # parts and not slices, which would be an op for each axis
                into.as_strided(*here).add_(moved.as_strided(*there))
            moved = into
    return total.flatten(0, -2)


def samples_last(x: Tensor) -> Tensor:
    """The Grams of the columns of `(m, c, t)`, as `(t * t, m)`, in memory that the next ones overwrite."""
    (m, _, t), products = x.shape, bmm(x.mT, x, "gram")
    return scratch("gram, samples last", (t * t, m), products).copy_(_off_pages(products.view(m, t * t)).T)


def _off_pages(rows: Tensor) -> Tensor:
    """The same rows, none of them a multiple of a page from another: columns of such share a place in a CPU's cache."""
    m, size = rows.shape
    if rows.device.type != "cpu" or m < _FEW or size * rows.element_size() % _PAGE:
        return rows
    return scratch("gram, off pages", (m, size + _LINE // rows.element_size()), rows)[:, :size].copy_(rows)


@functools.lru_cache(maxsize=4096)
def phases(geometry: Geometry, m: int = 1) -> tuple[Phase, ...]:
    """The taps of a kernel by the pixels that they see: position p sees pixel `stride (p + move) + phase` along each axis.

    The stages' shapes and parts are those of Grams of m samples.
    """
    settings = zip(geometry.shape[2:], geometry.stride, geometry.padding, geometry.dilation, strict=True)
    found = []
    for some in itertools.product(*(_moves(*one).items() for one in settings)):
        pixels = [slice(phase, None, stride) for (phase, _), stride in zip(some, geometry.stride, strict=True)]
        sizes = tuple(len(range(size)[places]) for size, places in zip(geometry.sizes, pixels, strict=True))
        if all(sizes):
            stages = tuple(_stages(sizes, geometry.space, [moves for _, moves in some], m))
            found.append(Phase((slice(None), slice(None), *pixels), sizes, stages))
    return tuple(found)


def _moves(kernel: int, stride: int, padding: int, dilation: int) -> Mapping[int, Sequence[int]]:
    """The moves of a kernel's taps along one axis, by phase. Pixels outside of the image are zeros and left out."""
    moves: dict[int, list[int]] = {}
    for tap in range(kernel):
        move, phase = divmod(dilation * tap - padding, stride)
        moves.setdefault(phase, []).append(move)
    return moves


def _stages(sizes: Sequence[int], space: Sequence[int], moves: Sequence[Sequence[int]], m: int) -> Iterator[Stage]:
    d, now = len(space), list(sizes)
    for axis, steps in enumerate(moves):
        stays = steps == [0] and now[axis] == space[axis]
        if axis == d - 1 or not stays:
            overlaps, before = list(_overlaps(steps, space[axis], now[axis])), (*now, *now, m)
            now[axis] = space[axis]
            after = (*now, *now, m)
            parts = [(_part(after, axis, d, here), _part(before, axis, d, there)) for here, there in overlaps]
            yield Stage(after, tuple(parts))


def _overlaps(moves: Sequence[int], positions: int, pixels: int) -> Iterator[tuple[range, range]]:
    """For each move, the positions that see a pixel, and those pixels."""
    for move in moves:
        start, stop = max(0, -move), min(positions, pixels - move)
        if start < stop:
            yield range(start, stop), range(start + move, stop + move)


def _part(shape: tuple[int, ...], axis: int, d: int, places: range) -> Part:
    """The same places on an axis of the one image and of the other."""
    strides = tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
    sizes = tuple(len(places) if k in {axis, axis + d} else size for k, size in enumerate(shape))
    return sizes, strides, places.start * (strides[axis] + strides[axis + d])


def entries_moved(geometry: Geometry) -> int:
    """How many numbers `patch_grams` reads and writes for each sample, the products aside."""
    t = math.prod(geometry.space)
    moves = sum(1 + 3 * len(stage.moves) for phase in phases(geometry) for stage in phase.stages)
    return (3 + moves + 2 * len(phases(geometry))) * t * t
