"""Where the sample axis goes, against the truth: perturb one sample of the inputs and see which entries of the result change."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import samplewise
from samplewise.errors import SamplewiseError
from samplewise.recording import Recording
from samplewise.sample_axis import Axis, Lost

SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
Op = Callable[..., object]
Placed = tuple[Tensor, Axis | None]
BAD_CALL = (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError)


# --- the truth ----------------------------------------------------------------------------------------------------------------


def results(op: Op, tensors: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    return [x for x in tree_leaves(op(*[x.clone() for x in tensors])) if isinstance(x, Tensor)]


def perturbed(x: Tensor, axis: Axis | None, n: int, sample: int) -> Tensor:
    if axis is None:
        return x.clone()
    mine = (axis.owners(n) == sample).reshape(-1, *[1] * (x.ndim - axis.dim - 1))
    if x.dtype == torch.bool:
        return x ^ mine
    if x.dtype == torch.int64:
        return torch.where(mine, x.roll(1, -1) if x.shape[-1] > 1 and axis.dim < x.ndim - 1 else 1 - x.clamp(0, 1), x)
    return torch.where(mine, x + torch.rand(x.shape, dtype=x.dtype) + 0.3, x)


def changed(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        return torch.ones(a.shape, dtype=torch.bool)
    return ~((a == b) | (a.isnan() & b.isnan()))


def flows(op: Op, placed: list[Placed], n: int, sample: int, place: int, others: Tensor) -> Tensor:
    """Whether a gradient flows to `sample` from entries of others: the truth where rows are picked by data."""
    tensors = [x.clone().requires_grad_(x.is_floating_point()) for x, _ in placed]
    inputs = [x * 1 if x.requires_grad else x for x in tensors]
    torch.manual_seed(0)
    try:
        out = [x for x in tree_leaves(op(*inputs)) if isinstance(x, Tensor)][place]
    except BAD_CALL:
        # torch itself forbids the op where gradients flow
        assume(False)
    if not out.requires_grad:
        return torch.zeros_like(others)
    leaves = [(x, axis) for x, (_, axis) in zip(tensors, placed, strict=True) if x.requires_grad and axis is not None]
    grads = torch.autograd.grad(out[others].sum(), [x for x, _ in leaves], materialize_grads=True)
    mine = [g.movedim(axis.dim, 0)[axis.owners(n) == sample] for g, (_, axis) in zip(grads, leaves, strict=True)]
    return others & any(bool(g.any()) for g in mine)


def predictions(op: Op, placed: list[Placed], n: int) -> list[tuple[Tensor, object]]:
    recording = Recording(nn.Module(), batch_size=n)
    torch.manual_seed(0)
    tensors = [x.clone() for x, _ in placed]
    for x, (_, axis) in zip(tensors, placed, strict=True):
        recording.declare(x, "constant" if axis is None else axis)
    with recording:
        outs = op(*tensors)
    return [(x, recording.where(x)) for x in tree_leaves(outs) if isinstance(x, Tensor)]


def check(op: Op, placed: list[Placed], n: int) -> str:
    """'right', 'lost' or 'refused'; an AssertionError where the prediction is wrong."""
    try:
        tensors = [x for x, _ in placed]
        results(op, tensors)
    except BAD_CALL:
        assume(False)
    try:
        found = predictions(op, placed, n)
    except SamplewiseError:
        return "refused"
    if n <= 1:
        # parameters enter whole then: nothing has to be followed
        return "right"
    for out, where in found:
        if isinstance(where, Axis):
            # a number that is one sample's has its one row on axis 0
            shape = out.shape if out.ndim else (1,)
            assert 0 <= where.dim < len(shape), f"{where} in {tuple(out.shape)}"
            assert shape[where.dim] == where.size(n), f"{where} in {tuple(out.shape)}"
    for sample in range(n):
        moved = results(op, [perturbed(x, axis, n, sample) for x, axis in placed])
        plain = results(op, tensors)
        for place, (out, where) in enumerate(found):
            said = f"result {place} of shape {tuple(out.shape)}: {where}"
            if where is None:
                assert not changed(plain[place], moved[place]).any(), f"{said}, but depends on sample {sample}"
            elif isinstance(where, Axis):
                others = (
                    (where.owners(n) != sample).reshape(-1, *[1] * (out.ndim - where.dim - 1))
                    if out.ndim
                    else where.owners(n)[0] != sample
                )
                others = others.expand(out.shape)
                touched = (
                    changed(plain[place], moved[place]) if where.ragged is None else flows(op, placed, n, sample, place, others)
                )
                assert not (touched & others).any(), f"{said}, but sample {sample} is elsewhere too"
    return "lost" if any(isinstance(where, Lost) for _, where in found) else "right"


# --- drawing ------------------------------------------------------------------------------------------------------------------


def draw_placed(data: st.DataObject, least: int = 1, most: int = 4, kind: str = "float") -> tuple[int, Tensor, Axis]:
    n = data.draw(st.sampled_from([3, 2, 3, 1, 0]), "n")
    ndim, sizes = data.draw(st.integers(least, most), "ndim"), st.sampled_from([1, 2, 3, 4])
    shape, dim = [data.draw(sizes) for _ in range(ndim)], data.draw(st.integers(0, ndim - 1), "dim")
    outer, inner = data.draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2), (2, 3)]), "outer, inner")
    shape[dim] = outer * n * inner
    return n, filled(shape, kind), Axis(dim, outer, inner)


def filled(shape: list[int], kind: str = "float") -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape) + len(shape))
    if kind == "ids":
        return torch.randint(0, 2, shape, generator=generator)
    if kind == "mask":
        return torch.rand(shape, generator=generator) > 0.5
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def one_of(data: st.DataObject, choices: list) -> object:
    return choices[data.draw(st.integers(0, len(choices) - 1), "choice")]


def dim_of(data: st.DataObject, x: Tensor, extra: int = 0) -> int:
    return data.draw(st.integers(-x.ndim - extra, x.ndim + extra - 1), "an axis")


def dims_of(data: st.DataObject, x: Tensor) -> tuple[int, ...]:
    chosen = data.draw(st.lists(st.integers(0, x.ndim - 1), unique=True, min_size=1), "axes")
    return tuple(d - x.ndim * data.draw(st.booleans()) for d in chosen)


def factorised(data: st.DataObject, total: int) -> list[int]:
    shape = []
    while total > 1 and len(shape) < 4:
        divisor = data.draw(st.sampled_from([k for k in range(1, total + 1) if total % k == 0]), "a size")
        shape.append(divisor)
        total //= divisor
    return [*shape, total]


def reshape(data: st.DataObject, x: Tensor) -> Op:
    shape = factorised(data, x.numel()) if x.numel() else [*x.shape, 1]
    how = data.draw(st.sampled_from(["reshape", "view", "star", "free"]))
    if how == "free" and x.numel():
        shape[data.draw(st.integers(0, len(shape) - 1))] = -1
    return (
        (lambda t: t.view(shape))
        if how == "view"
        else (lambda t: t.reshape(*shape))
        if how == "star"
        else lambda t: t.reshape(shape)
    )


def flatten(data: st.DataObject, x: Tensor) -> Op:
    start, end = sorted(data.draw(st.integers(0, x.ndim - 1)) for _ in range(2))
    return data.draw(
        st.sampled_from([lambda t: t.flatten(start, end), lambda t: torch.flatten(t, start_dim=start), torch.ravel])
    )


def unflatten(data: st.DataObject, x: Tensor) -> Op:
    dim = dim_of(data, x)
    sizes = factorised(data, x.shape[dim]) if x.shape[dim] else [0, 2]
    return lambda t: t.unflatten(dim, sizes)


def permute(data: st.DataObject, x: Tensor) -> Op:
    order = data.draw(st.permutations(range(x.ndim)))
    return data.draw(
        st.sampled_from([lambda t: t.permute(order), lambda t: t.permute(*order), lambda t: torch.permute(t, dims=order)])
    )


def transpose(data: st.DataObject, x: Tensor) -> Op:
    a, b = dim_of(data, x), dim_of(data, x)
    choices = [
        lambda t: t.transpose(a, b),
        lambda t: t.swapaxes(axis0=a, axis1=b),
        lambda t: torch.transpose(t, dim0=a, dim1=b),
        lambda t: t.mT,
        lambda t: t.T,
        lambda t: t.t(),
        lambda t: t.adjoint(),
        lambda t: t.transpose_(a, b),
        lambda t: t.t_(),
        lambda t: t.swapdims_(a, b),
    ]
    return one_of(data, choices)


def movedim(data: st.DataObject, x: Tensor) -> Op:
    source, target = dims_of(data, x), data.draw(st.permutations(range(x.ndim)))
    a, b = dim_of(data, x), dim_of(data, x)
    choices = [lambda t: t.movedim(a, b), lambda t: t.moveaxis(source, target[: len(source)]), lambda t: torch.movedim(t, a, b)]
    return one_of(data, choices)


def squeeze(data: st.DataObject, x: Tensor) -> Op:
    dim, dims = dim_of(data, x), dims_of(data, x)
    choices = [
        lambda t: t.squeeze(),
        lambda t: t.squeeze(dim),
        lambda t: t.squeeze(dims),
        lambda t: torch.squeeze(t, dim=dim),
        lambda t: t.squeeze_(),
        lambda t: t.squeeze_(dim),
        lambda t: t.squeeze_(dims),
    ]
    return one_of(data, choices)


def unsqueeze(data: st.DataObject, x: Tensor) -> Op:
    dim = dim_of(data, x, 1)
    return data.draw(
        st.sampled_from([lambda t: t.unsqueeze(dim), lambda t: torch.unsqueeze(t, dim=dim), lambda t: t.unsqueeze_(dim)])
    )


def expand(data: st.DataObject, x: Tensor) -> Op:
    extra = data.draw(st.lists(st.integers(1, 3), max_size=2))
    shape = [data.draw(st.integers(1, 3)) if size == 1 else data.draw(st.sampled_from([size, -1])) for size in x.shape]
    whole = [*extra, *(own if own == -1 else size for own, size in zip(shape, shape, strict=True))]
    solid = torch.zeros(
        [*extra, *(size if own == -1 else own for own, size in zip(shape, x.shape, strict=True))], dtype=torch.float64
    )
    choices = [
        lambda t: t.expand(whole),
        lambda t: t.expand(*whole),
        lambda t: t.expand_as(solid),
        lambda t: torch.broadcast_to(t, solid.shape),
        lambda t: torch.broadcast_tensors(t, solid),
    ]
    return one_of(data, choices)


def repeat(data: st.DataObject, x: Tensor) -> Op:
    times = data.draw(st.lists(st.integers(1, 3), min_size=x.ndim, max_size=x.ndim + 1))
    few, dim, k = times[: data.draw(st.integers(1, len(times)))], dim_of(data, x), times[0]
    choices = [
        lambda t: t.repeat(times),
        lambda t: t.repeat(*times),
        lambda t: t.tile(few),
        lambda t: torch.tile(t, dims=few),
        lambda t: t.repeat_interleave(k, dim),
        lambda t: torch.repeat_interleave(t, k, dim=dim),
        lambda t: t.repeat_interleave(k),
    ]
    return one_of(data, choices)


def index_items(data: st.DataObject, x: Tensor) -> tuple[object, ...]:
    """Random basic and advanced indices, together and apart."""
    items: list[object] = []
    width = data.draw(st.sampled_from([1, 2, 3, 4]))
    for size in x.shape[: data.draw(st.integers(0, x.ndim))]:
        pick = [data.draw(st.integers(-size, size - 1)) if size else 0 for _ in range(width)]
        start, stop = data.draw(st.sampled_from([(None, None), (0, None), (None, size), (1, None), (None, -1), (0, 1)]))
        choices = [
            slice(None),
            slice(start, stop),
            slice(None, None, 2),
            pick[0],
            torch.tensor(pick),
            list(pick),
            np.array(pick),
            tuple(pick),
            torch.tensor([[p] for p in pick]),
            torch.tensor(pick[0]),
            filled([size], "mask"),
            np.int64(pick[0]),
            torch.arange(size),
            torch.arange(size)[:, None],
        ]
        items.append(one_of(data, choices))
    for _ in range(data.draw(st.integers(0, 2))):
        items.insert(data.draw(st.integers(0, len(items))), None)
    place = data.draw(st.integers(0, 2 * len(items) + 1))
    if place <= len(items):
        items.insert(place, Ellipsis)
    return tuple(items)


def getitem(data: st.DataObject, x: Tensor) -> Op:
    index = index_items(data, x)
    if len(index) == 1 and data.draw(st.booleans()):
        return lambda t: t[index[0]]
    return lambda t: t[index]


def pieces(data: st.DataObject, x: Tensor) -> Op:
    dim, k = dim_of(data, x), data.draw(st.integers(1, 3))
    sizes = [k, max(0, x.shape[dim] - k)]
    choices = [
        lambda t: t.split(k, dim),
        lambda t: t.split(sizes, dim),
        lambda t: torch.split(t, k, dim=dim),
        lambda t: t.chunk(k, dim),
        lambda t: torch.chunk(t, chunks=k, dim=dim),
        lambda t: t.tensor_split(k, dim),
        lambda t: t.unbind(dim),
        torch.unbind,
        lambda t: t.split(k),
        lambda t: t.chunk(2),
        lambda t: t.hsplit([1]),
        lambda t: t.vsplit([1]),
        tuple,
        lambda t: t.split_with_sizes(sizes, dim),
        lambda t: t.tensor_split([1], dim=dim),
        lambda t: t.unsafe_chunk(k, dim),
    ]
    return one_of(data, choices)


def take(data: st.DataObject, x: Tensor) -> Op:
    dim, size = dim_of(data, x), x.shape
    length = data.draw(st.integers(0, max(0, size[dim])))
    index = torch.tensor([data.draw(st.integers(0, max(0, size[dim] - 1))) for _ in range(data.draw(st.integers(1, 4)))])
    whole = filled(list(size), "ids").clamp_max(max(0, size[dim] - 1))
    few = whole[tuple(slice(0, max(1, s - 1)) for s in size)]
    choices = [
        lambda t: t.narrow(dim, 0, length),
        lambda t: t.select(dim, 0),
        lambda t: torch.select(t, dim=dim, index=-1),
        lambda t: t.index_select(dim, index),
        lambda t: t.gather(dim, whole),
        lambda t: t.gather(dim, few),
        lambda t: t.unfold(dim, 1, 1),
        lambda t: t.unfold(dimension=dim, size=min(2, size[dim]), step=1),
        lambda t: t.take_along_dim(whole, dim),
        lambda t: t.take(index),
        lambda t: t.take_along_dim(whole),
        lambda t: t.index_fill(dim, index, 2.0),
        lambda t: t.scatter(dim, whole, 1.5),
        lambda t: t.scatter_add(dim, whole, torch.ones(size, dtype=t.dtype)),
        lambda t: t.masked_select(filled(list(size), "mask")),
        lambda t: t.index_add(dim, index, t.index_select(dim, index)),
        lambda t: t.index_copy(dim, index[:1], t.index_select(dim, index[:1])),
        lambda t: t.narrow_copy(dim, 0, length),
        lambda t: t.select_scatter(t.select(dim, 0), dim, 0),
    ]
    return one_of(data, choices)


def diagonals(data: st.DataObject, x: Tensor) -> Op:
    a, b = dim_of(data, x), dim_of(data, x)
    choices = [
        lambda t: t.diagonal(0, a, b),
        lambda t: t.diagonal(),
        lambda t: t.diag_embed(),
        lambda t: torch.diag_embed(t, 0, 0, 1),
        lambda t: t.diag_embed(dim1=0, dim2=-1),
        lambda t: t.diag(),
        lambda t: t.tril(),
        lambda t: t.triu(1),
        lambda t: t.diagflat(),
        lambda t: torch.diagonal(t, dim1=a, dim2=b),
        torch.linalg.diagonal,
        lambda t: t.trace(),
        torch.vander,
    ]
    return one_of(data, choices)


def reduce(data: st.DataObject, x: Tensor) -> Op:
    dim, dims, keep = dim_of(data, x), dims_of(data, x), data.draw(st.booleans())
    q = torch.tensor(data.draw(st.sampled_from([0.3, [0.2], [0.1, 0.6, 0.9], [0.1, 0.5]])), dtype=torch.float64)
    choices = [
        lambda t: t.sum(dim),
        lambda t: t.sum(dims, keepdim=keep),
        lambda t: t.sum(),
        lambda t: torch.sum(t, dim=dims),
        lambda t: t.sum(axis=dim),
        lambda t: t.mean(dim, keep),
        lambda t: t.mean(),
        lambda t: t.prod(dim),
        lambda t: t.amax(dims, keep),
        lambda t: t.amin(),
        lambda t: t.max(dim),
        lambda t: t.min(dim, keepdim=keep),
        lambda t: t.max(),
        lambda t: t.argmax(dim),
        lambda t: t.argmin(),
        lambda t: t.any(dim),
        lambda t: t.logsumexp(dims, keep),
        lambda t: t.var(dim),
        lambda t: t.var(dims, keepdim=keep),
        lambda t: torch.var_mean(t, dim),
        lambda t: t.std(),
        lambda t: t.std(unbiased=False),
        lambda t: t.var(False),
        lambda t: t.norm(),
        lambda t: t.norm(2, dim),
        lambda t: t.norm(dim=dims, keepdim=keep),
        lambda t: torch.linalg.vector_norm(t, 2, dims),
        lambda t: torch.linalg.norm(t, dim=dim),
        lambda t: t.median(dim),
        lambda t: t.median(),
        lambda t: t.mode(dim),
        lambda t: t.mode(),
        lambda t: t.kthvalue(1, dim),
        lambda t: t.kthvalue(1),
        lambda t: t.quantile(q, dim),
        lambda t: torch.quantile(t, q, dim=dim, keepdim=keep),
        lambda t: t.quantile(0.3),
        lambda t: t.nanmean(dim),
        lambda t: t.nansum(dims),
        lambda t: torch.count_nonzero(t, dim),
        lambda t: torch.aminmax(t, dim=dim),
        lambda t: t.sum(()),
        lambda t: t.mean(dims, keepdim=True),
        lambda t: torch.std_mean(t, dims, keepdim=keep),
        torch.linalg.matrix_norm,
        lambda t: t.max(torch.zeros(())),
        lambda t: t.all(),
        lambda t: torch.max(t, torch.zeros(t.shape, dtype=t.dtype)),
        lambda t: t.dist(torch.zeros_like(t)),
        lambda t: t.renorm(2, dim, 0.1),
    ]
    return one_of(data, choices)


def along(data: st.DataObject, x: Tensor) -> Op:
    dim, dims, k = dim_of(data, x), dims_of(data, x), data.draw(st.integers(1, 2))
    choices = [
        lambda t: t.softmax(dim),
        lambda t: F.softmax(t, dim=dim),
        lambda t: F.log_softmax(t, dim),
        lambda t: F.softmin(t, dim),
        lambda t: t.cumsum(dim),
        lambda t: t.cumprod(dim),
        lambda t: t.cummax(dim),
        lambda t: t.logcumsumexp(dim),
        lambda t: t.sort(dim),
        lambda t: t.sort(),
        lambda t: t.msort(),
        lambda t: t.sort(stable=True, dim=dim),
        lambda t: t.argsort(dim),
        lambda t: t.topk(k, dim),
        lambda t: t.topk(1),
        lambda t: t.flip(dims),
        lambda t: t.flip(*dims),
        lambda t: torch.flip(t, dims=dims),
        lambda t: t.fliplr(),
        lambda t: t.flipud(),
        lambda t: t.roll(k, dim),
        lambda t: t.roll(1),
        lambda t: torch.roll(t, (1,) * len(dims), dims=dims),
        lambda t: t.rot90(),
        lambda t: t.diff(1, dim),
        lambda t: t.diff(),
        lambda t: F.glu(t, dim),
        lambda t: F.normalize(t, dim=dim),
        lambda t: torch.fft.fft(t, dim=dim),
        torch.fft.rfft,
        lambda t: t.unique(),
        lambda t: t.nonzero(),
        torch.fft.fftn,
        lambda t: F.gumbel_softmax(t, dim=dim),
        lambda t: torch.trapezoid(t, dim=dim),
        lambda t: torch.gradient(t, dim=dim),
        lambda t: torch.cross(t, t.cos()),
        lambda t: torch.linalg.cross(t, t.cos(), dim=dim),
        lambda t: torch.cross(t, t.cos(), dim),
        lambda t: t.softmax(dim).cumsum_(dim),
        lambda t: F.one_hot((t > 0).long(), 2),
        torch.corrcoef,
        torch.cov,
        lambda t: torch.histc(t, 3),
        torch.combinations,
        lambda t: torch.bucketize(t, torch.zeros(2, dtype=t.dtype)),
        lambda t: torch.searchsorted(torch.zeros(2, dtype=t.dtype), t),
        lambda t: torch.searchsorted(t.sort(-1)[0].contiguous(), t.cos().contiguous()),
    ]
    return one_of(data, choices)


def elementwise(data: st.DataObject, x: Tensor) -> Op:
    shape = [data.draw(st.sampled_from([size, size, 1])) for size in x.shape][data.draw(st.integers(0, x.ndim)) :]
    if data.draw(st.booleans()):
        shape = (
            [data.draw(st.integers(1, 3)) for _ in range(x.ndim - len(shape) + 1)] + shape if len(shape) == x.ndim else shape
        )
    c, mask = filled(shape), filled(shape, "mask")
    choices = [
        lambda t: t + c,
        lambda t: c - t,
        lambda t: t * 2,
        lambda t: 1 / (t * t + 1),
        lambda t: torch.where(mask, t, c),
        lambda t: t.masked_fill(mask, 0.0),
        lambda t: t.clamp(-1, 1),
        lambda t: t.maximum(c),
        lambda t: torch.lerp(t, c, 0.3),
        lambda t: F.dropout(t, 0.5),
        F.gelu,
        lambda t: t > c,
        lambda t: t.relu_(),
        lambda t: t.add_(1),
        lambda t: t.clone().mul_(c[..., :1]),
        lambda t: t.to(torch.float32),
        lambda t: t.type_as(c),
        lambda t: t.float(),
        torch.zeros_like,
        lambda t: t.new_zeros(t.shape),
        lambda t: t.detach(),
        lambda t: t.contiguous(),
        lambda t: F.leaky_relu(t, inplace=True),
        lambda t: torch.addcmul(t, t, c),
        lambda t: torch.addcdiv(t, t, c.square() + 1, value=2),
        lambda t: t.zero_(),
        lambda t: t.fill_(2.0),
        lambda t: t.copy_(c),
        lambda t: torch.stack([t, t]),
        lambda t: t.data,
        lambda t: torch.tensor(t.tolist()) if t.numel() else t,
        lambda t: t.bernoulli_(0.5),
        lambda t: t**2,
        lambda t: 2**t,
        lambda t: torch.logaddexp(t, c),
        lambda t: torch.atan2(c, t),
        lambda t: t.masked_scatter(mask, c),
        lambda t: F.alpha_dropout(t, 0.5),
        lambda t: torch.isclose(t, t + c),
        lambda t: torch.rsub(t, c),
        lambda t: torch.add(t, c, alpha=2),
        lambda t: torch.add(t, 1, out=torch.empty_like(t)),
    ]
    return one_of(data, choices)


def layers(data: st.DataObject, x: Tensor) -> Op:
    """Ops on the last dims, rows of constants, pooling, padding."""
    last = x.shape[-1]
    w, k = filled([2, last]), data.draw(st.integers(1, x.ndim))
    pads = data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=2 * x.ndim).filter(lambda p: len(p) % 2 == 0))
    channels = x.shape[1] if x.ndim > 1 else 1
    kernel = filled([2, channels, *[1] * (x.ndim - 2)])
    unbatched = filled([2, x.shape[0], *[1] * (x.ndim - 1)])
    choices = [
        lambda t: F.linear(t, w),
        lambda t: t @ w.T,
        lambda t: torch.tensordot(t, w, ([-1], [1])),
        lambda t: torch.inner(t, w),
        lambda t: F.layer_norm(t, t.shape[-k:]),
        lambda t: F.rms_norm(t, t.shape[-k:]),
        lambda t: F.group_norm(t, 1),
        F.instance_norm,
        lambda t: F.pad(t, pads),
        lambda t: F.pad(t, (1, 1), mode="circular"),
        lambda t: F.pad(t, (1, 1), mode="replicate"),
        lambda t: F.max_pool1d(t, 1),
        lambda t: F.avg_pool2d(t, 1),
        lambda t: F.adaptive_avg_pool1d(t, 1),
        lambda t: F.max_pool2d(t, 1, return_indices=True),
        lambda t: F.adaptive_max_pool2d(t, 1),
        lambda t: F.interpolate(t, scale_factor=2),
        lambda t: F.unfold(t, 1),
        lambda t: [F.conv1d, F.conv2d][t.ndim - 3](t, kernel),
        lambda t: [F.conv1d, F.conv2d, F.conv3d][t.ndim - 2](t, unbatched),
        lambda t: F.pixel_shuffle(t, 2),
        lambda t: F.lp_pool1d(t, 2, 1),
        lambda t: torch.cdist(t, w),
        lambda t: torch.cdist(w, t),
        lambda t: t.unsqueeze(-1) @ t.unsqueeze(-2),
        lambda t: F.channel_shuffle(t, 1),
        lambda t: t.mT @ t,
        lambda t: torch.einsum("...i,oi->...o", t, w),
        lambda t: torch.einsum("...i,oi->o...", t, w),
        lambda t: torch.einsum("i...,i...->...", t, t),
        lambda t: F.cosine_similarity(t, w[0], dim=-1),
        lambda t: F.cosine_similarity(t, t + 1, dim=0),
        lambda t: F.pairwise_distance(t, w[0]),
        lambda t: F.pixel_unshuffle(t, 1),
        lambda t: F.fold(t, (1, 1), 1),
        lambda t: F.unfold(t, 2),
        lambda t: F.local_response_norm(t, 2),
        lambda t: F.max_pool3d(t, 1),
        lambda t: F.batch_norm(t, filled([channels]), filled([channels]).abs()),
        lambda t: torch.linalg.inv(t @ t.mT + torch.eye(t.shape[-2], dtype=t.dtype)),
        torch.linalg.qr,
        torch.linalg.svdvals,
        lambda t: torch.kron(t, w),
        lambda t: torch.meshgrid(t, w[0], indexing="ij"),
        lambda t: torch.cartesian_prod(t, t),
        lambda t: torch.block_diag(t, t),
        lambda t: t.ger(w[0]),
        lambda t: torch.outer(w[0], t),
    ]
    return one_of(data, choices)


UNARY = {
    f.__name__: f
    for f in (
        reshape,
        flatten,
        unflatten,
        permute,
        transpose,
        movedim,
        squeeze,
        unsqueeze,
        expand,
        repeat,
        getitem,
        pieces,
        take,
        diagonals,
        reduce,
        along,
        elementwise,
        layers,
    )
}
EXAMPLES = {"getitem": 400, "reshape": 200, "reduce": 250, "along": 200, "elementwise": 200, "layers": 250, "take": 150}


@pytest.mark.parametrize("family", UNARY)
@pytest.mark.filterwarnings("ignore")
def test_one_op_moves_the_axis_to_where_the_samples_are(family: str) -> None:
    @settings(SETTINGS, max_examples=EXAMPLES.get(family, 80))
    @given(st.data())
    def attack(data: st.DataObject) -> None:
        n, x, axis = draw_placed(data)
        check(UNARY[family](data, x), [(x, axis)], n)

    attack()


@pytest.mark.filterwarnings("ignore")
@settings(SETTINGS, max_examples=300)
@given(st.data())
def test_chains_of_ops(data: st.DataObject) -> None:
    n, x, axis = draw_placed(data)
    ops, current = [], x
    for _ in range(data.draw(st.integers(2, 4), "length")):
        op = UNARY[data.draw(st.sampled_from(sorted(UNARY)))](data, current)
        try:
            outs = results(op, [current])
        except BAD_CALL:
            continue
        outs = [out for out in outs if out.is_floating_point() and out.ndim]
        if not outs:
            break
        k = data.draw(st.integers(0, len(outs) - 1))
        ops.append((op, k))
        current = outs[k].double()

    def chain(t: Tensor) -> Tensor:
        for op, k in ops:
            found = [out for out in tree_leaves(op(t)) if isinstance(out, Tensor) and out.is_floating_point() and out.ndim]
            t = found[k].double()
        return t

    check(chain, [(x, axis)], n)


def picks(x: Tensor, size: int) -> Tensor:
    """Indices that depend on the data."""
    return (x > 0).long().clamp_max(max(0, size - 1))


def second(data: st.DataObject, n: int, x: Tensor, axis: Axis) -> Placed:
    """A second operand: constant, with the samples on the same place after broadcasting, or anywhere else."""
    how = data.draw(st.sampled_from(["aligned", "constant", "elsewhere", "same shape"]), "second operand")
    if how == "same shape":
        return filled(list(x.shape)), axis
    shape = [data.draw(st.sampled_from([size, size, 1])) for size in x.shape]
    drop = data.draw(st.integers(0, axis.dim if how == "aligned" else x.ndim - 1))
    shape[axis.dim] = x.shape[axis.dim]
    shape = shape[drop:]
    if how == "aligned":
        return filled(shape), Axis(axis.dim - drop, axis.outer, axis.inner)
    places = [d for d, size in enumerate(shape) if size == n]
    if how == "elsewhere" and places:
        return filled(shape), Axis(data.draw(st.sampled_from(places)))
    return filled(shape), None


BINARY: dict[str, Op] = {
    "add": lambda a, b: a + b,
    "mul_": lambda a, b: a.mul_(b),
    "where": lambda a, b: torch.where(a > b, a, b),
    "lerp": lambda a, b: torch.lerp(a, b, 0.5),
    "max": torch.max,
    "addcmul": lambda a, b: torch.addcmul(b, a, b),
    "cat0": lambda a, b: torch.cat([a, b]),
    "cat-1": lambda a, b: torch.cat((b, a), -1),
    "cat1": lambda a, b: torch.cat([a, b, a], dim=1),
    "stack0": lambda a, b: torch.stack([a, b]),
    "stack-1": lambda a, b: torch.stack((a, b), dim=-1),
    "hstack": lambda a, b: torch.hstack([a, b]),
    "vstack": lambda a, b: torch.vstack([a, b]),
    "dstack": lambda a, b: torch.dstack([a, b]),
    "matmul": lambda a, b: a @ b,
    "matmulT": lambda a, b: a @ b.mT,
    "mTmatmul": lambda a, b: a.mT @ b,
    "rmatmul": lambda a, b: b @ a,
    "inner": torch.inner,
    "outer": torch.outer,
    "tensordot": lambda a, b: torch.tensordot(a, b, 1),
    "tensordot0": lambda a, b: torch.tensordot(a, b, ([0], [0])),
    "linear": F.linear,
    "dot": torch.dot,
    "mv": torch.mv,
    "kron": torch.kron,
    "bmm": torch.bmm,
    "bmmT": lambda a, b: torch.bmm(a, b.mT),
    "baddbmm": lambda a, b: torch.baddbmm(a, a, b),
    "addmm": lambda a, b: torch.addmm(a, b, b.mT),
    "einsum outer": lambda a, b: torch.einsum("...i,...j->...ij", a, b),
    "einsum keep": lambda a, b: torch.einsum("ab,ab->a", a, b),
    "einsum swap": lambda a, b: torch.einsum("ab,bc->ca", a, b),
    "einsum implicit": lambda a, b: torch.einsum("ab,bc", a, b),
    "einsum dots": lambda a, b: torch.einsum("a...,a...->...a", a, b),
    "einsum list": lambda a, b: torch.einsum(a, [0, 1], b, [0, 2], [2, 0]),
    "multi_dot": lambda a, b: torch.linalg.multi_dot([a, b, a]),
    "chain_matmul": torch.chain_matmul,
    "sdpa": lambda a, b: F.scaled_dot_product_attention(a, b, b),
    "sdpa mask": lambda a, b: F.scaled_dot_product_attention(a, a, a, attn_mask=b @ b.mT),
    "cdist": torch.cdist,
    "cosine": F.cosine_similarity,
    "cosine-1": lambda a, b: F.cosine_similarity(a, b, dim=-1),
    "pairwise": lambda a, b: F.pairwise_distance(a, b, keepdim=True),
    "mse none": lambda a, b: F.mse_loss(a, b, reduction="none"),
    "mse": F.mse_loss,
    "kl": lambda a, b: F.kl_div(a, b, reduction="none"),
    "bce": lambda a, b: F.binary_cross_entropy_with_logits(a, b.sigmoid(), reduction="none"),
    "cosine loss": lambda a, b: F.cosine_embedding_loss(a, b, b[:, 0].sign(), reduction="none"),
    "ce soft": lambda a, b: F.cross_entropy(a, b.softmax(1), reduction="none"),
    "copy_": lambda a, b: a.copy_(b),
    "expand_as": lambda a, b: b.expand_as(a),
    "view_as": lambda a, b: a.view_as(b),
    "broadcast": torch.broadcast_tensors,
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv1d per sample": lambda a, b: F.conv1d(a.flatten(0, 1)[None], b.flatten(0, 1)[:, None], groups=a.shape[0] * a.shape[1]),
    "embedding": lambda a, b: F.embedding(picks(b, a.shape[0]), a),
    "gather": lambda a, b: a.gather(-1, picks(b, a.shape[-1])),
    "gather0": lambda a, b: a.gather(0, picks(b, a.shape[0])),
    "take_along_dim": lambda a, b: torch.take_along_dim(a, picks(b, a.shape[-1]), -1),
    "index_select": lambda a, b: a.index_select(0, picks(b.flatten(), len(a))),
    "index": lambda a, b: a[picks(b, len(a))],
    "index1": lambda a, b: a[:, picks(b, a.shape[1])],
    "index_fill": lambda a, b: a.index_fill(0, picks(b.flatten()[:2], len(a)), 3.0),
    "index_fill1": lambda a, b: a.index_fill(1, picks(b.flatten(), a.shape[1]), 3.0),
    "index_fill whole": lambda a, b: b.index_fill(0, picks(a[:, 0], len(b)), 3.0),
    "index_add": lambda a, b: a.index_add(0, picks(b[:, 0].flatten()[: len(b)], len(a)), b),
    "mask": lambda a, b: a[b > 0],
    "masked_fill": lambda a, b: a.masked_fill(b > 0, 1.0),
    "masked_select": lambda a, b: a.masked_select(b > 0),
    "masked_scatter": lambda a, b: a.masked_scatter(a > 0, b),
    "scatter": lambda a, b: a.scatter(-1, picks(a, a.shape[-1]), b),
    "scatter_add": lambda a, b: torch.zeros_like(a).scatter_add(0, picks(b, a.shape[0]), b),
    "one hot": lambda a, b: b.scatter(1, (a[:, :1] > 0).long() * (b.shape[1] > 1), 1.0),
    "cross": torch.cross,
    "linalg.cross": torch.linalg.cross,
    "searchsorted": lambda a, b: torch.searchsorted(a.sort(-1)[0], b),
    "bucketize": lambda a, b: torch.bucketize(b, a.flatten().sort()[0]),
    "polar": lambda a, b: torch.polar(a.abs(), b),
    "complex": torch.complex,
    "bilinear": lambda a, b: F.bilinear(a, b, filled([2, a.shape[-1], b.shape[-1]])),
    "add out": lambda a, b: torch.add(a, b, out=torch.empty(0, dtype=a.dtype)),
    "solve": lambda a, b: torch.linalg.solve(a @ a.mT + torch.eye(a.shape[-2], dtype=a.dtype), b),
    "triplet": lambda a, b: F.triplet_margin_loss(a, b, a.flip(-1), reduction="none"),
    "huber": lambda a, b: F.huber_loss(a, b, reduction="none"),
    "tril mask": lambda a, b: (a + b).tril(),
    "batch matrix": lambda a, b: a.unsqueeze(-1) @ b.unsqueeze(-2),
    "meshgrid": lambda a, b: torch.meshgrid(a, b, indexing="ij"),
    "vecdot": torch.linalg.vecdot,
    "grid": lambda a, b: torch.addr(a @ b.mT, a[:, 0], b[:, 0]),
    "clamp": lambda a, b: a.clamp(min=b),
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.filterwarnings("ignore")
def test_two_operands(name: str) -> None:
    @settings(SETTINGS, max_examples=25)
    @given(st.data())
    def attack(data: st.DataObject) -> None:
        n, x, axis = draw_placed(data, least=1, most=3 if name not in {"sdpa", "conv2d"} else 4)
        other = second(data, n, x, axis)
        operands = [(x, axis), other]
        if data.draw(st.booleans(), "swap"):
            operands.reverse()
        check(BINARY[name], operands, n)

    attack()


@pytest.mark.filterwarnings("ignore")
@settings(SETTINGS, max_examples=400)
@given(st.data())
def test_writing_through_an_index(data: st.DataObject) -> None:
    n, x, axis = draw_placed(data, most=3)
    index = index_items(data, x)
    try:
        part = x[index]
    except BAD_CALL:
        assume(False)
    shape = [data.draw(st.sampled_from([size, size, 1])) for size in part.shape][data.draw(st.integers(0, part.ndim)) :]
    places = [d for d, size in enumerate(shape) if size == n]
    brought = Axis(data.draw(st.sampled_from(places))) if places and data.draw(st.booleans()) else None
    held = data.draw(st.sampled_from([axis, None]))

    def assign(target: Tensor, value: Tensor) -> Tensor:
        target[index] = value
        return target

    check(assign, [(x, held), (filled(shape), brought)], n)


@pytest.mark.filterwarnings("ignore")
@settings(SETTINGS, max_examples=300)
@given(st.data())
def test_views_written_in_place_are_seen_through_their_base(data: st.DataObject) -> None:
    """What is written through a view, or into the base of one, changes the other too."""
    n, x, axis = draw_placed(data, most=3)
    held = data.draw(st.sampled_from([axis, None]))
    moves = [reshape, permute, transpose, unsqueeze, getitem, expand, pieces]
    op, turn = data.draw(st.sampled_from(moves))(data, x), data.draw(st.sampled_from(["view", "base", "sibling"]))
    try:
        view = results(op, [x])[0]
    except BAD_CALL:
        assume(False)
    written = view if turn != "base" else x
    places = [d for d, size in enumerate(written.shape) if size == n]
    brought = Axis(data.draw(st.sampled_from(places))) if places else None

    def run(base: Tensor, value: Tensor) -> list[Tensor]:
        target, sibling = tree_leaves(op(base))[0], base.view(base.shape)
        (target if turn != "base" else base).copy_(value)
        return [base, target, sibling, sibling * 1, base.view(base.shape)]

    check(run, [(x, held), (filled(list(written.shape)), brought)], n)


def test_nothing_plain_is_lost() -> None:
    """Lost is always safe; these ops must not lose the axis all the same."""
    lost = [name for name, (shape, axis, op) in PLAIN.items() if check(op, [(filled(shape), axis)], N) != "right"]
    assert not lost


N, T, D = 3, 3, 4
FIRST, SECOND = ([N, T, D], Axis(0)), ([T, N, D], Axis(1))
MERGED, TURNED = ([N * T, D], Axis(0, 1, T)), ([T * N, D], Axis(0, T, 1))
PLAIN: dict[str, tuple[list[int], Axis, Op]] = {
    "flatten": (*FIRST, lambda x: x.flatten(0, 1)),
    "unflatten": (*MERGED, lambda x: x.view(N, T, D)),
    "flatten second": (*SECOND, lambda x: x.reshape(-1, D)),
    "unflatten second": (*TURNED, lambda x: x.view(T, N, D)),
    "heads": (*FIRST, lambda x: x.view(N, T, 2, 2).transpose(1, 2)),
    "heads second": (*SECOND, lambda x: x.view(T, N * 2, 2).transpose(0, 1)),
    "heads back": ([N * 2, T, 2], Axis(0, 1, 2), lambda x: x.transpose(0, 1).reshape(T * N, D)),
    "windows": ([N, 4, 4, 2], Axis(0), lambda x: x.view(N, 2, 2, 2, 2, 2).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 2)),
    "roll": ([N, 4, 4, 2], Axis(0), lambda x: torch.roll(x, (1, -1), (1, 2))),
    "T": ([D, N], Axis(1), lambda x: x.T),
    "select": (*FIRST, lambda x: x[:, 0]),
    "last": (*FIRST, lambda x: x[:, -1]),
    "slice": (*FIRST, lambda x: x[..., 1:]),
    "none": (*FIRST, lambda x: x[:, None]),
    "rows": (*FIRST, lambda x: x[torch.arange(N), torch.tensor([0, 2, 1])]),
    "list": (*FIRST, lambda x: x[:, [0, 2, 1]]),
    "tensor index": (*FIRST, lambda x: x[:, torch.tensor([0, 2])]),
    "mask index": (*FIRST, lambda x: x[:, torch.tensor([True, False, True])]),
    "full mask": (*FIRST, lambda x: x[:, torch.ones(T, dtype=torch.bool)]),
    "split": (*FIRST, lambda x: x.split(2, -1)),
    "chunk": (*FIRST, lambda x: x.chunk(2, -1)),
    "unbind": (*FIRST, lambda x: x.unbind(1)),
    "stack": (*FIRST, lambda x: torch.stack([x, x], 1)),
    "cat": (*FIRST, lambda x: torch.cat([x, x], 1)),
    "sum": (*FIRST, lambda x: x.sum(1)),
    "mean": (*FIRST, lambda x: x.mean((1, 2))),
    "max": (*FIRST, lambda x: x.max(-1)),
    "norm": (*FIRST, lambda x: x.norm(dim=-1)),
    "std": (*FIRST, lambda x: x.std(-1)),
    "argmax": (*FIRST, lambda x: x.argmax(-1)),
    "softmax": (*FIRST, lambda x: x.softmax(-1)),
    "cumsum": (*FIRST, lambda x: x.cumsum(1)),
    "sort": (*FIRST, lambda x: x.sort()),
    "topk": (*FIRST, lambda x: x.topk(2)),
    "flip": (*FIRST, lambda x: x.flip(1)),
    "gram": (*FIRST, lambda x: x @ x.mT),
    "einsum": (*FIRST, lambda x: torch.einsum("nid,njd->nij", x, x)),
    "bmm": (*FIRST, lambda x: torch.bmm(x, x.transpose(1, 2))),
    "repeat": (*FIRST, lambda x: x.repeat(1, 2, 1)),
    "repeat n": (*FIRST, lambda x: x.repeat(2, 1, 1)),
    "interleave": (*FIRST, lambda x: x.repeat_interleave(2, 0)),
    "expand": ([N, 1, D], Axis(0), lambda x: x.expand(2, N, 5, D)),
    "squeeze": ([N, 1, D], Axis(0), lambda x: x.squeeze(1)),
    "squeeze_": ([N, 1, D], Axis(0), lambda x: x.squeeze_(1)),
    "unsqueeze_": (*FIRST, lambda x: x.unsqueeze_(-1)),
    "transpose_": (*FIRST, lambda x: x.transpose_(0, 1)),
    "movedim": (*FIRST, lambda x: x.movedim(0, 1)),
    "gather": (*FIRST, lambda x: x.gather(1, torch.zeros(N, 1, D, dtype=torch.int64))),
    "pad": (*FIRST, lambda x: F.pad(x, (1, 1))),
    "interpolate": (*FIRST, lambda x: F.interpolate(x, scale_factor=2)),
    "pool": (*FIRST, lambda x: F.adaptive_avg_pool1d(x, 1)),
    "unfold": ([N, 2, 4, 4], Axis(0), lambda x: F.unfold(x, 2)),
    "fold": ([N, 4, 4], Axis(0), lambda x: F.fold(x, (2, 2), 1)),
    "layer norm": (*SECOND, lambda x: F.layer_norm(x, (D,))),
    "conv": (*FIRST, lambda x: F.conv1d(x, torch.ones(2, T, 1, dtype=x.dtype))),
    "patches": ([N, 2, 4, 4], Axis(0), lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2)),
    "dropout": (*FIRST, lambda x: F.dropout(x, 0.5)),
    "masked_fill": (*FIRST, lambda x: x.masked_fill(torch.ones(T, D, dtype=torch.bool).tril(), 0.0)),
    "index_select": (*FIRST, lambda x: x.index_select(1, torch.tensor([0, 2]))),
    "index_select n": (*FIRST, lambda x: x.index_select(1, torch.tensor([0, 2, 1]))),
    "attention": ([N, 2, T, D], Axis(0), lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
    "attention merged": ([N * 2, T, D], Axis(0, 1, 2), lambda x: F.scaled_dot_product_attention(x, x, x)),
    "cosine": (*FIRST, lambda x: F.cosine_similarity(x, x + 1, dim=-1)),
    "cdist": (*FIRST, lambda x: torch.cdist(x, x)),
    "searchsorted": (*FIRST, lambda x: torch.searchsorted(torch.linspace(-1, 1, D, dtype=x.dtype), x)),
    "searchsorted merged": (*MERGED, lambda x: torch.searchsorted(torch.linspace(-1, 1, D, dtype=x.dtype), x, right=True)),
    "searchsorted by name": (*FIRST, lambda x: torch.searchsorted(input=x, sorted_sequence=torch.zeros(2, dtype=x.dtype))),
    "searchsorted own": (*FIRST, lambda x: torch.searchsorted(x.sort(-1)[0], x[..., :2])),
    "tril": (*FIRST, lambda x: x.tril()),
    "fake_quantize": (*FIRST, lambda x: torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -8, 8)),
    "fake_quantize by tensors": (
        *FIRST,
        lambda x: torch.fake_quantize_per_tensor_affine(
            x.float(), torch.tensor(0.1), torch.tensor(1, dtype=torch.int32), -8, 8
        ),
    ),
    "max const": (*FIRST, lambda x: torch.max(x, torch.zeros(1, dtype=x.dtype))),
    "where": (*FIRST, lambda x: torch.where(x > 0, x, 0.0)),
    "normalize": (*FIRST, lambda x: F.normalize(x, dim=-1)),
    "glu": (*FIRST, F.glu),
    "logsumexp": (*FIRST, lambda x: x.logsumexp(-1)),
    "one hot": (*FIRST, lambda x: F.one_hot((x > 0).long(), 2)),
    "ce": ([N, D], Axis(0), lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2]), reduction="none")),
    "ce merged": (
        *MERGED,
        lambda x: F.cross_entropy(x, torch.zeros(N * T, dtype=torch.int64), reduction="none").view(N, T).mean(1),
    ),
    "new_zeros": (*FIRST, lambda x: torch.cat([x.new_zeros(N, 1, D), x], 1)),
}


_ZEROS = torch.zeros(D, N, dtype=torch.int64)
# losses that take features over the axis on which the samples lie: their totals are no sums of samples
TAKEN_OVER_SAMPLES = {
    "triplet": lambda x: F.triplet_margin_loss(x, x.cos(), x.sin()),
    "triplet sum": lambda x: F.triplet_margin_loss(x, x.cos(), x.sin(), reduction="sum"),
    "cosine embedding": lambda x: F.cosine_embedding_loss(x, x.cos(), torch.ones(D)),
    "multi margin": lambda x: F.multi_margin_loss(x, _ZEROS[:, 0]),
    "multilabel margin": lambda x: F.multilabel_margin_loss(x, _ZEROS),
    "multilabel margin, one row": lambda x: F.multilabel_margin_loss(x[0], _ZEROS[0]),
    "cross entropy": lambda x: F.cross_entropy(x, _ZEROS[:, 0]),
    "cross entropy, one row": lambda x: F.cross_entropy(x[0], _ZEROS[0, 0]),
    "ctc in time": lambda x: F.ctc_loss(x.T[:, None].log_softmax(-1), torch.ones(1, 2), [N], [2]),
    "mse across": lambda x: F.mse_loss(x[:N], x[:N].T),
    "cosine embedding of one row": lambda x: F.cosine_embedding_loss(x[0], x[1], torch.ones(())),
    "triplet of one row": lambda x: F.triplet_margin_loss(x[0], x[1], x[2]),
    "entries of a buffer": lambda x: _filled_up(x.sum(), x.sum() ** 2).sum(),
    "pairs of samples, gated": lambda x: ((x[:, 1:] - x[:, :-1]) * (x[:, 1:] > x[:, :-1])).sum(),
    "an axis as a tensor": lambda x: (x[:N] * x[:N].transpose(torch.tensor(0), torch.tensor(1))).sum(),
    "a flipped axis as a tensor": lambda x: x.sum(torch.tensor(1)).square().sum(),
}


def _filled_up(*values: Tensor) -> Tensor:
    buffer = torch.zeros(len(values), dtype=values[0].dtype)
    for k, value in enumerate(values):
        buffer[k] = value
    return buffer


@pytest.mark.parametrize("name", TAKEN_OVER_SAMPLES)
def test_totals_of_losses_across_samples_are_refused(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, D).double()
    with samplewise.record(model), pytest.raises(SamplewiseError):
        TAKEN_OVER_SAMPLES[name](model(filled([N, 2])).T).backward()


@pytest.mark.parametrize(
    "shapes", [((3, 0), (3, 0, 4)), ((3, 0, 4), (3, 0)), ((3, 5, 0), (3, 0)), ((3, 0), (0, 4)), ((3, 0), (0,))]
)
def test_empty_tensors_are_reshaped(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Where there are no elements the samples stay on an axis that is still there, and are lost with it."""
    before, after = shapes
    with Recording(nn.Linear(1, 1), batch_size=3) as recording:
        x = torch.zeros(before)
        recording.declare(x, Axis(0))
        where = recording.where(x.reshape(after))
    assert where == Axis(0) if after[0] == 3 else isinstance(where, Lost)
