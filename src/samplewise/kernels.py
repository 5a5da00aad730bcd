"""Triton kernels for CUDA, where torch's own are more than a fifth from what the device can do (docs/gpu.md says by how much).

Each does in one pass what functions of torch do beside it: Grams and their product, the weight gradients of a convolution without patches
in memory, the sums that scale and shift of a norm have as gradients, rows times weights, and products of weights and rows. They are ops
of torch, so that traces and profilers hear of them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_OPS = torch.library.Library("samplewise", "FRAGMENT")
# Places within a sample are counted in 32 bits.
_MOST = 2**31
# Numbers that a program of a pass over memory works on at once.
_PASS = 4096


def op(schema: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Make an op of torch of a function, by the schema of its arguments and results."""

    def made(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        name = function.__name__
        _OPS.define(name + schema)
        _OPS.impl(name, function, "CompositeExplicitAutograd")
        called = getattr(torch.ops.samplewise, name).default

        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            result: Result = called(*args, **kwargs)
            return result

        return call

    return made


def takes(x: Tensor) -> bool:
    """Whether the numbers of each row of `(n, ...)` lie near enough to each other, and would in a row of their own."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return max(reach, math.prod(x.shape[1:])) < _MOST


@op("(Tensor left, Tensor right) -> Tensor")
def gram_norms(left: Tensor, right: Tensor) -> Tensor:
    """`sum_{t,s} (left[t] · left[s]) (right[t] · right[s])`, `(m,)` in float32, of `(m, t, o)` and `(m, t, i)` in half precision.

    Each pair of blocks of positions is one program: both Grams stay in its registers, and nothing of size t by t is written.
    """
    m, t, o = left.shape
    block = min(128, max(16, triton.next_power_of_2(t)))
    blocks = triton.cdiv(t, block)
    pairs = blocks * (blocks + 1) // 2
    parts = torch.empty(m, pairs, dtype=torch.float32, device=left.device)
    sizes = (t, o, right.shape[2], pairs)
    with torch.cuda.device(left.device):
        _gram_norms[m * pairs,](
            left,
            right,
            parts,
            *sizes,
            *left.stride(),
            *right.stride(),
            block,
            64,
            num_warps=8 if block == 128 else 4,
            num_stages=4,
        )
    return parts.sum(1)


@op("(Tensor grad, Tensor image, int[] shape, int[] stride, int[] padding, int[] dilation, Tensor(a!)? out=None) -> Tensor")
def patch_products(
    grad: Tensor,
    image: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out: Tensor | None = None,
) -> Tensor:
    """`sum_p grad[n,o,p] patch[n,p,j]` for each channel and tap j: the weight gradients of a convolution, and no patch is written.

    Args:
        grad: `(n, o, *space)` contiguous, of one to three axes of space, in half precision.
        image: `(n, c, *sizes)` contiguous, of the same type.
        shape: Of the gradients, `(o, c, *kernel)`.
        stride: Along each axis, as are padding and dilation.
        padding: Zeros around the image.
        dilation: Between taps.
        out: `(n, *shape)` contiguous, for the gradients; without it they are not written.

    Returns:
        Their squared norms, `(n,)` in float32.
    """
    (n, o, *space), (_, c, *sizes), columns = grad.shape, image.shape, math.prod(shape[1:])
    # measured on an H200: without a pipeline for few outputs, which leaves room for more programs at once
    block, block_p, warps, stages = (64, 64, 4, 1) if o <= 64 else (128, 32, 8, 3)
    blocks = triton.cdiv(o, block) * triton.cdiv(columns, block)
    parts = torch.empty(n, blocks, dtype=torch.float32, device=grad.device)
    settings = (*_three(stride, 1), *_three(padding, 0), *_three(dilation, 1))
    with torch.cuda.device(grad.device):
        _patch_products[n * blocks,](
            *(grad, image, grad if out is None else out, parts, o, math.prod(space), columns, blocks, c),
            *(*_three(space, 1)[1:], *_three(sizes, 1), *_three(shape[2:], 1), *settings),
            *(block, block_p, len(space) == 3, out is not None),
            num_warps=warps,
            num_stages=stages,
        )
    if out is not None:
        torch.autograd.graph.increment_version(out)
    return parts.sum(1)


def _three(values: Sequence[int], other: int) -> tuple[int, ...]:
    """The same along three axes of space."""
    return (*[other] * (3 - len(values)), *values)


@op("(Tensor grad, Tensor input, Tensor mean, Tensor rstd, *, bool by_position) -> (Tensor, Tensor)")
def norm_sums(grad: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, *, by_position: bool) -> tuple[Tensor, Tensor]:
    """`sum_p grad[n,k,p] (input[n,k,p] - mean) rstd` and `sum_p grad[n,k,p]`, `(n, k)`: the gradients of a norm's scale and shift.

    Args:
        grad: `(n, k, p)` in half precision.
        input: The same, with the same strides.
        mean: Of what is standardised together: `(n, p)` numbers by position, or else `(n, g)`, for each of g groups of neighbouring k.
        rstd: The reciprocals of its deviations.
        by_position: Which of the two.
    """
    n, k, p = grad.shape
    block_p = min(128, triton.next_power_of_2(p))
    block_k = min(_PASS // block_p, triton.next_power_of_2(k))
    blocks, means = triton.cdiv(k, block_k), mean.numel() // n
    scale, shift = (torch.empty(n, k, dtype=grad.dtype, device=grad.device) for _ in range(2))
    with torch.cuda.device(grad.device):
        _norm_sums[n * blocks,](
            *(grad, input, mean.contiguous(), rstd.contiguous(), scale, shift),
            *(k, p, blocks, *grad.stride(), means, 1 if by_position else k // means),
            *(by_position, block_k, block_p),
        )
    return scale, shift


@op("(Tensor weights, Tensor rows) -> Tensor")
def scaled(weights: Tensor, rows: Tensor) -> Tensor:
    """`weights[n] rows[n]`, of `(n, p)` contiguous."""
    (n, p), out = rows.shape, torch.empty_like(rows)
    blocks = triton.cdiv(p, _PASS)
    with torch.cuda.device(rows.device):
        _scaled[n * blocks,](weights.contiguous(), rows, out, p, blocks, _PASS)
    return out


@op("(Tensor weights, Tensor rows) -> Tensor")
def weighted_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """`sum_n weights[n] rows[n]`, `(p,)`, of `(n, p)` contiguous: read once, added up in float32."""
    n, p = rows.shape
    out = torch.empty(p, dtype=rows.dtype, device=rows.device)
    with torch.cuda.device(rows.device):
        _weighted_rows[triton.cdiv(p, 1024),](weights.contiguous(), rows, out, n, p, 1024)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _gram_norms(  # type: ignore[no-untyped-def]
    left,
    right,
    parts,
    t,
    o,
    i,
    pairs,
    left_m,
    left_t,
    left_o,
    right_m,
    right_t,
    right_i,
    block: tl.constexpr,
    step: tl.constexpr,
):
    m, pair = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    # the pairs (0, 0), (1, 0), (1, 1), (2, 0), ...: those above the diagonal are the same
    first = ((tl.sqrt(8.0 * pair + 1) - 1) / 2).to(tl.int32)
    # a root may be a little off
    first -= (first * (first + 1) // 2 > pair).to(tl.int32)
    first += ((first + 1) * (first + 2) // 2 <= pair).to(tl.int32)
    second = pair - first * (first + 1) // 2
    rows, columns = first * block + tl.arange(0, block), second * block + tl.arange(0, block)
    lefts = _products(left + m.to(tl.int64) * left_m, rows, columns, t, o, left_t, left_o, block, step)
    rights = _products(right + m.to(tl.int64) * right_m, rows, columns, t, i, right_t, right_i, block, step)
    total = tl.sum(lefts * rights)
    tl.store(parts + tl.program_id(0), tl.where(first == second, total, 2 * total))


@triton.jit  # type: ignore[untyped-decorator]
def _products(x, rows, columns, t, size, by_row, by_column, block: tl.constexpr, step: tl.constexpr):  # type: ignore[no-untyped-def]
    """Inner products of some rows of a matrix with others."""
    total = tl.zeros((block, block), tl.float32)
    for start in range(0, size, step):
        at = start + tl.arange(0, step)
        inside = (at < size)[None, :]
        a = tl.load(x + rows[:, None] * by_row + at[None, :] * by_column, mask=(rows < t)[:, None] & inside, other=0.0)
        b = tl.load(x + columns[:, None] * by_row + at[None, :] * by_column, mask=(columns < t)[:, None] & inside, other=0.0)
        total = tl.dot(a, tl.trans(b), total)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _patch_products(  # type: ignore[no-untyped-def]
    grad,
    image,
    out,
    parts,
    outputs,
    positions,
    columns,
    blocks,
    channels,
    out_height,
    out_width,
    depth,
    height,
    width,
    kernel_d,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    padding_d,
    padding_h,
    padding_w,
    dilation_d,
    dilation_h,
    dilation_w,
    size: tl.constexpr,
    block_p: tl.constexpr,
    deep: tl.constexpr,
    written: tl.constexpr,
):
    n, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    across = tl.cdiv(columns, size)
    o, j = (block // across) * size + tl.arange(0, size), (block % across) * size + tl.arange(0, size)
    # j counts the taps of a channel by depth, height and width; a tap sees the pixel of its move, and of the position
    row, plane = j // kernel_w, j // (kernel_w * kernel_h)
    move_w, move_h = (j % kernel_w) * dilation_w - padding_w, (row % kernel_h) * dilation_h - padding_h
    move_d, c = (plane % kernel_d) * dilation_d - padding_d, plane // kernel_d
    of_column = ((c * depth + move_d) * height + move_h) * width + move_w
    grad += n * outputs * positions
    image += n * channels * depth * height * width
    total = tl.zeros((size, size), tl.float32)
    for start in range(0, positions, block_p):
        p = start + tl.arange(0, block_p)
        w, h = (p % out_width) * stride_w, ((p // out_width) % out_height) * stride_h
        d = (p // (out_width * out_height)) * stride_d
        there, of_position = (p < positions)[None, :], (d * height + h) * width + w
        grads = tl.load(grad + o[:, None] * positions + p[None, :], mask=(o < outputs)[:, None] & there, other=0.0)
        # around the image there are zeros
        there = there & (j < columns)[:, None]
        there = there & _within(move_h, h, height) & _within(move_w, w, width)
        if deep:
            there = there & _within(move_d, d, depth)
        # positions last: neighbouring ones lie next to each other in memory, and taps do not
        patches = tl.load(image + (of_column[:, None] + of_position[None, :]), mask=there, other=0.0)
        total = tl.dot(grads, tl.trans(patches), total)
    tl.store(parts + tl.program_id(0), tl.sum(total * total))
    if written:
        place = out + n * outputs * columns + o[:, None] * columns + j[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=(o < outputs)[:, None] & (j < columns)[None, :])


@triton.jit
def _within(moves, places, size):  # type: ignore[no-untyped-def]
    """Which pixels are in the image, along one axis: those before its begin are, without a sign, far beyond its end."""
    return (moves[:, None] + places[None, :]).to(tl.uint32, bitcast=True) < size


@triton.jit  # type: ignore[untyped-decorator]
def _norm_sums(  # type: ignore[no-untyped-def]
    grad,
    input,
    mean,
    rstd,
    scale,
    shift,
    size,
    positions,
    blocks,
    by_n,
    by_k,
    by_p,
    means,
    common,
    by_position: tl.constexpr,
    block_k: tl.constexpr,
    block_p: tl.constexpr,
):
    n, k = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * block_k + tl.arange(0, block_k)
    start = n * by_n
    mean += n * means
    rstd += n * means
    scales, shifts = tl.zeros((block_k, block_p), tl.float32), tl.zeros((block_k, block_p), tl.float32)
    for first in range(0, positions, block_p):
        p = first + tl.arange(0, block_p)
        inside = (k < size)[:, None] & (p < positions)[None, :]
        place = k[:, None] * by_k + p[None, :] * by_p
        g = tl.load(grad + start + place, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(input + start + place, mask=inside, other=0.0).to(tl.float32)
        if by_position:
            x -= tl.load(mean + p, mask=p < positions, other=0.0).to(tl.float32)[None, :]
            x *= tl.load(rstd + p, mask=p < positions, other=0.0).to(tl.float32)[None, :]
        else:
            x -= tl.load(mean + k // common, mask=k < size, other=0.0).to(tl.float32)[:, None]
        scales += g * x
        shifts += g
    total = tl.sum(scales, 1)
    if not by_position:
        total *= tl.load(rstd + k // common, mask=k < size, other=0.0).to(tl.float32)
    tl.store(scale + n * size + k, total.to(scale.dtype.element_ty), mask=k < size)
    tl.store(shift + n * size + k, tl.sum(shifts, 1).to(shift.dtype.element_ty), mask=k < size)


@triton.jit  # type: ignore[untyped-decorator]
def _scaled(weights, rows, out, p, blocks, block: tl.constexpr):  # type: ignore[no-untyped-def]
    n, at = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    start, inside = n.to(tl.int64) * p, at < p
    numbers = tl.load(rows + start + at, mask=inside, other=0.0).to(tl.float32) * tl.load(weights + n).to(tl.float32)
    tl.store(out + start + at, numbers.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _weighted_rows(weights, rows, out, n, p, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < p
    total = tl.zeros((block,), tl.float32)
    here = rows + at
    for k in range(n):
        total += tl.load(weights + k).to(tl.float32) * tl.load(here, mask=inside, other=0.0).to(tl.float32)
        here += p
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
