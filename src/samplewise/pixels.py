"""Inner products of the patches that a convolution sees, from inner products of pixels: a kernel's taps only move them.

The Gram of pixels (sample by sample, position by position) costs T^2 c; that of patches, which repeat every pixel for each tap, T^2 c k^2.
Samples lie on the last axis, so that what is moved are long runs of memory.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from .buffers import scratch
from .outer import bmm

# Passes over memory that jump from run to run, in those of one that does not (measured; 2 threads, AVX512).
_JUMPING = 2.5


@dataclass(frozen=True)
class Taps:
    """A kernel along one axis of space: position p of the output sees pixels `stride (p + move) + phase`."""

    stride: int
    # phase -> moves
    moves: dict[int, list[int]]

    @staticmethod
    def of(kernel: int, stride: int, padding: int, dilation: int) -> "Taps":
        """From the settings of a convolution; pixels outside of the image are zeros and left out."""
        moves: dict[int, list[int]] = {}
        for tap in range(kernel):
            move, phase = divmod(dilation * tap - padding, stride)
            moves.setdefault(phase, []).append(move)
        return Taps(stride, moves)


def patch_grams(input: Tensor, space: Sequence[int], taps: Sequence[Taps]) -> Tensor:
    """`sum over channels and taps of patch[p] patch[q]` of images `(m, c, *sizes)`, `(t * t, m)` for t positions in `space`."""
    grams = scratch("patch grams", (*space, *space, len(input)), input).zero_()
    for phases in itertools.product(*(axis.moves for axis in taps)):
        seen = [slice(phase, None, axis.stride) for axis, phase in zip(taps, phases, strict=True)]
        pixels = input[(slice(None), slice(None), *seen)]
        sizes, moves = pixels.shape[2:], [axis.moves[phase] for axis, phase in zip(taps, phases, strict=True)]
        if pixels.numel():
            _add_moved(grams, samples_last(pixels.flatten(2), "pixels").view(*sizes, *sizes, len(input)), moves)
    return grams.flatten(0, -2)


def samples_last(x: Tensor, slot: str) -> Tensor:
    """The Grams of the columns of `(m, c, t)`, as `(t * t, m)`."""
    grams = bmm(x.mT, x, slot).flatten(1).mT
    return scratch(f"{slot}, samples last", grams.shape, grams).copy_(grams)


def patch_grams_seconds(input: Tensor, space: Sequence[int], taps: Sequence[Taps], product: float, memory: float) -> float:
    """What `patch_grams`, and the Gram it meets, cost for each sample at rates of flop/s and bytes/s."""
    flops, passes = 0, 5
    for phases in itertools.product(*(axis.moves for axis in taps)):
        seen = [-(-(size - phase) // axis.stride) for size, phase, axis in zip(input.shape[2:], phases, taps, strict=True)]
        flops += 2 * input.shape[1] * math.prod(seen) ** 2
        passes += 2 + sum(1 + 3 * len(axis.moves[phase]) for axis, phase in zip(taps, phases, strict=True))
    return flops / product + _JUMPING * passes * math.prod(space) ** 2 * input.element_size() / memory


def _add_moved(total: Tensor, grams: Tensor, moves: Sequence[Sequence[int]]) -> None:
    """Add a Gram of pixels `(*sizes, *sizes, m)` to `total`, `(*space, *space, m)`, at all moves: axis after axis."""
    d = len(moves)
    for axis, steps in enumerate(moves):
        if axis < d - 1 and steps == [0] and grams.shape[axis] == total.shape[axis]:
            continue
        shape = list(grams.shape)
        shape[axis] = shape[axis + d] = total.shape[axis]
        moved = total if axis == d - 1 else scratch(f"moved along {axis}", shape, grams).zero_()
        for here, there in _overlaps(steps, total.shape[axis], grams.shape[axis]):
            moved[_on(axis, d, here)] += grams[_on(axis, d, there)]
        grams = moved


def _overlaps(moves: Sequence[int], positions: int, pixels: int) -> Iterator[tuple[slice, slice]]:
    """For each move, the positions that see a pixel, and those pixels."""
    for move in moves:
        start, stop = max(0, -move), min(positions, pixels - move)
        if start < stop:
            yield slice(start, stop), slice(start + move, stop + move)


def _on(axis: int, d: int, places: slice) -> tuple[slice, ...]:
    """The same places on an axis of the one image and of the other."""
    return tuple(places if k in {axis, axis + d} else slice(None) for k in range(2 * d))
