"""Triton kernels for CUDA, where torch's own are more than a fifth from what the device can do (docs/gpu.md says by how much).

Each does what a function of torch alone does beside it: `outer.gram_norms`, and a product of weights and rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Places within a sample are counted in 32 bits.
_MOST = 2**31


def takes(x: Tensor) -> bool:
    """Whether the numbers of each row of `(n, ...)` lie near enough to each other."""
    return sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True)) < _MOST


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


def weighted_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """`sum_n weights[n] rows[n]`, `(p,)`, of `(n, p)` contiguous: read once, added up in float32."""
    n, p = rows.shape
    out = torch.empty(p, dtype=rows.dtype, device=rows.device)
    with torch.cuda.device(rows.device):
        _weighted_rows[triton.cdiv(p, 1024),](weights.contiguous(), rows, out, n, p, 1024)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _gram_norms(  # type: ignore[no-untyped-def]  # noqa: ANN202
    left,  # noqa: ANN001
    right,  # noqa: ANN001
    parts,  # noqa: ANN001
    t,  # noqa: ANN001
    o,  # noqa: ANN001
    i,  # noqa: ANN001
    pairs,  # noqa: ANN001
    left_m,  # noqa: ANN001
    left_t,  # noqa: ANN001
    left_o,  # noqa: ANN001
    right_m,  # noqa: ANN001
    right_t,  # noqa: ANN001
    right_i,  # noqa: ANN001
    block: tl.constexpr,
    step: tl.constexpr,
):
    m, pair = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    # the pairs (0, 0), (1, 0), (1, 1), (2, 0), ...: those above the diagonal are the same
    first = ((tl.sqrt(8.0 * pair + 1) - 1) / 2).to(tl.int32)
    second = pair - first * (first + 1) // 2
    rows, columns = first * block + tl.arange(0, block), second * block + tl.arange(0, block)
    lefts = _products(left + m.to(tl.int64) * left_m, rows, columns, t, o, left_t, left_o, block, step)
    rights = _products(right + m.to(tl.int64) * right_m, rows, columns, t, i, right_t, right_i, block, step)
    total = tl.sum(tl.sum(lefts * rights, 1), 0)
    tl.store(parts + tl.program_id(0), tl.where(first == second, total, 2 * total))


@triton.jit  # type: ignore[untyped-decorator]
def _products(x, rows, columns, t, size, by_row, by_column, block: tl.constexpr, step: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
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
def _weighted_rows(weights, rows, out, n, p, block: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < p
    total = tl.zeros((block,), tl.float32)
    here = rows + at
    for k in range(n):
        total += tl.load(weights + k).to(tl.float32) * tl.load(here, mask=inside, other=0.0).to(tl.float32)
        here += p
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
