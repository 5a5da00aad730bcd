"""Every quantity of every factor class against its dense default, on both sides of every cost switch."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Size, Tensor

import samplewise as sw
from samplewise.convolution_costs import Ways
from samplewise.convolutional import Convolution
from samplewise.factors import Dense, Diagonal, Factor, Pulled, chunk_size
from samplewise.joined import Joined
from samplewise.outer import Outer, Rows
from samplewise.pixels import Geometry, _off_pages, patch_grams, samples_last
from samplewise.strategy import Strategy, using
from samplewise.sums import Sum, add

GENERATOR = torch.Generator().manual_seed(0)
Make = Callable[[int], Factor]


def x(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64).to(dtype)


def outer(g: int, t: int, o: int, i: int, *shape: int) -> Make:
    return lambda n: Outer(x(n, g, t, o), x(n, g, t, i), Size(shape or (g * o, i)))


def rows(t: int, v: int = 6, d: int = 5) -> Make:
    return lambda n: Rows(torch.randint(0, v, (n, t), generator=GENERATOR), x(n, t, d), Size((v, d)))


def dense(*shape: int) -> Make:
    return lambda n: Dense(x(n, *shape))


def convolution(
    dims: int, groups: int, c: int, o: int, k: int, size: int, stride: int = 1, pad: int = 0, dilation: int = 1
) -> Make:
    def make(n: int) -> Factor:
        out = (size + 2 * pad - dilation * (k - 1) - 1) // stride + 1
        shape = Size((o, c // groups, *[k] * dims))
        settings = ((stride,) * dims, (pad,) * dims, (dilation,) * dims, groups)
        return Convolution(x(n, o, *[out] * dims), x(n, c, *[size] * dims), shape, *settings)

    return make


def diagonal(dim: int, *shape: int) -> Make:
    def make(n: int) -> Factor:
        full = [*shape]
        full[dim] = 2 * n
        return Diagonal(x(*full), torch.arange(n).repeat(2), dim, n)

    return make


def pulled(make: Make, pull: Callable[[Tensor], Tensor], *shape: int, isometric: bool = True) -> Make:
    return lambda n: Pulled(make(n), pull, isometric, Size(shape))


def total(*makes: Make) -> Make:
    return lambda n: Sum(tuple(make(n) for make in makes))


def joined(*makes: Make) -> Make:
    return lambda n: add([make(n) for make in makes])


# gram side: t (o + i) <= o i; dense side otherwise; t = 1 apart
FACTORS: dict[str, Make] = {
    "dense": dense(6, 5),
    "dense scalar": dense(),
    "outer, one position": outer(1, 1, 6, 5),
    "outer, one position, groups": outer(2, 1, 3, 5),
    "outer, gram": outer(1, 2, 6, 5),
    "outer, gram at the switch": outer(1, 2, 4, 4),
    "outer, dense": outer(1, 9, 6, 5),
    "outer, dense just past the switch": outer(1, 3, 4, 4),
    "outer, gram, groups": outer(3, 1, 4, 5),
    "outer, groups": outer(2, 2, 6, 5),
    "outer, dense, groups": outer(2, 8, 3, 5),
    "outer, no positions": outer(1, 0, 6, 5),
    "outer, shaped": outer(1, 4, 6, 6, 2, 3, 6),
    "rows": rows(4),
    "rows, one": rows(1),
    "rows, many repeats": rows(30),
    "rows, none": rows(0),
    "conv1d, gram": convolution(1, 1, 8, 8, 3, 4),
    "conv1d, dense": convolution(1, 1, 2, 3, 2, 12),
    "conv2d, groups, gram": convolution(2, 2, 8, 12, 3, 4, pad=0),
    "conv2d, groups, dense": convolution(2, 2, 4, 2, 2, 9, stride=2, pad=1),
    "conv2d, dilation": convolution(2, 1, 2, 3, 2, 8, stride=2, pad=2, dilation=3),
    "conv2d, unused edge": convolution(2, 1, 2, 3, 2, 8, stride=3),
    "conv1d, dilation that the stride divides": convolution(1, 1, 3, 2, 3, 13, stride=2, pad=4, dilation=4),
    "conv1d, padding beyond the kernel": convolution(1, 2, 4, 4, 2, 3, pad=5),
    "conv2d, stride beyond the image": convolution(2, 1, 3, 2, 3, 2, stride=5, pad=1),
    "conv2d, kernel of one, stride": convolution(2, 1, 3, 4, 1, 5, stride=2, pad=1),
    "conv3d, stride, groups": convolution(3, 2, 2, 4, 3, 5, stride=2, pad=1),
    "depthwise": convolution(2, 4, 4, 8, 3, 6, pad=1),
    "conv3d": convolution(3, 1, 2, 3, 2, 4, pad=1),
    "diagonal": diagonal(0, 0, 5),
    "diagonal, middle": diagonal(1, 3, 0, 2),
    "diagonal, vector": diagonal(0, 0),
    "pulled, transposed": pulled(outer(1, 3, 6, 5), lambda grad: grad.mT, 5, 6),
    "pulled, scaled": pulled(outer(1, 3, 6, 5), lambda grad: 2 * grad.flatten(1), 30, isometric=False),
    "pulled rows": pulled(rows(4), lambda grad: grad.reshape(-1, 30), 30),
    "sum, tied": total(rows(4), outer(1, 3, 6, 5)),
    "sum, tied, gram": total(rows(3), outer(1, 1, 6, 5)),
    "sum, tied, repeats": total(outer(1, 9, 6, 5), rows(12)),
    "sum, two outers": total(outer(1, 2, 6, 5), outer(1, 3, 6, 5)),
    "sum, other blocks": total(outer(1, 2, 6, 5), outer(2, 2, 3, 5)),
    "sum, with dense": total(dense(6, 5), rows(2), outer(1, 1, 6, 5)),
    "sum, with pulled": total(pulled(outer(1, 3, 5, 6), lambda grad: grad.mT, 6, 5), rows(2)),
    "added outers": joined(outer(1, 2, 6, 5), outer(1, 3, 6, 5)),
    "added rows": joined(rows(2), rows(3)),
    "added mixed": joined(rows(2), dense(6, 5), outer(1, 3, 6, 5), dense(6, 5), outer(2, 2, 3, 5), rows(1)),
}
OTHERS = {
    "itself": None,
    "dense": dense,
    "outer, few": lambda *shape: outer(1, 1, 6, 5),
    "outer, many": lambda *shape: outer(1, 20, 6, 5),
    "outer, groups": lambda *shape: outer(2, 2, 3, 5),
    "rows": lambda *shape: rows(3),
    "sum": lambda *shape: total(rows(2), outer(1, 2, 6, 5)),
}


# itself and a dense one for every factor, the others where the shape is theirs
PAIRS = [(a, b) for a, make in FACTORS.items() for b in OTHERS if b in {"itself", "dense"} or make(1).shape == (6, 5)]


def flat(factor: Factor) -> Tensor:
    found = factor.to_dense()
    return found.reshape(factor.n, math.prod(factor.shape))


@pytest.mark.parametrize("n", [0, 1, 4])
@pytest.mark.parametrize("name", FACTORS)
def test_quantities_are_those_of_the_dense_gradient(name: str, n: int) -> None:
    factor = FACTORS[name](n)
    grads, weights, direction, matrix = flat(factor), x(n), x(*factor.shape), x(3, *factor.shape)
    close = torch.testing.assert_close
    assert factor.n == n
    assert factor.to_dense().shape == (n, *factor.shape)
    close(factor.sq_norms(), grads.square().sum(1))
    close(factor.weighted_sum(weights), (weights @ grads).reshape(factor.shape))
    close(factor.dot(direction), grads @ direction.flatten())
    close(factor.project(matrix), grads @ matrix.reshape(3, grads.shape[1]).T)
    close(factor.gram(factor), grads @ grads.T)
    close(factor.inner(factor), grads.square().sum(1))


@pytest.mark.parametrize("strategy", ["gram", "tile"])
@pytest.mark.parametrize("n", [0, 1, 4])
@pytest.mark.parametrize("name", FACTORS)
def test_norms_by_either_strategy(name: str, n: int, strategy: str) -> None:
    factor = FACTORS[name](n)
    with using(Strategy(strategy), graph=True):
        assert factor.algorithm in {strategy, "dense", "rows", "gram"}
        torch.testing.assert_close(factor.sq_norms(), flat(factor).square().sum(1))


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_patch_grams_are_those_of_the_patches(kernel: int, stride: int, padding: int, dilation: int) -> None:
    """With other settings along the other axis."""
    image = x(2, 3, 10, 5)
    settings = {"kernel_size": (kernel, 2), "stride": (stride, 2), "padding": (padding, 1), "dilation": (dilation, 1)}
    patches = torch.nn.functional.unfold(image, **settings)
    space = ((10 + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1, 3)
    geometry = Geometry((4, 3, kernel, 2), (10, 5), space, (stride, 2), (padding, 1), (dilation, 1), 1)
    for graph in (False, True):
        with torch.set_grad_enabled(graph):
            found = patch_grams(image, geometry)
        torch.testing.assert_close(found.T.reshape(2, patches.shape[2], -1), patches.mT @ patches)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 33])
@pytest.mark.parametrize("t", [1, 31, 32, 64])
def test_grams_lie_samples_last(t: int, n: int, dtype: torch.dtype) -> None:
    """32 and 64 positions make rows of whole pages, which are put apart where they are many."""
    columns = x(n, 3, t).to(dtype)
    with torch.no_grad():
        found = samples_last(columns).clone()
    torch.testing.assert_close(found, (columns.mT @ columns).reshape(n, t * t).T)
    rows = columns.new_empty(n, t * t)
    apart = n >= 16 and t * t * rows.element_size() % 4096 == 0
    assert (_off_pages(rows) is rows) != apart


@pytest.mark.parametrize("groups", [1, 2])
def test_a_fold_at_once_is_that_of_parts(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samplewise.factors._CACHED", 1)
    monkeypatch.setattr(
        "samplewise.convolutional.ways", lambda g, size, *_, **__: Ways(False, False, True, 0, math.prod(g.shape) * size)
    )
    images, grad = x(3, 4, 6, 5), x(3, 2, 6, 5)
    factor = Convolution(grad, images, Size((2, 4 // groups, 3, 3)), (1, 1), (1, 1), (1, 1), groups)
    with torch.no_grad():
        at_once = factor.to_dense()
        monkeypatch.setattr("samplewise.convolutional._AT_ONCE", 0)
        in_parts = factor.to_dense()
    torch.testing.assert_close(at_once, factor.unfold().to_dense())
    torch.testing.assert_close(at_once, in_parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [0, 1, 4])
@pytest.mark.parametrize("name", FACTORS)
def test_written_into_given_memory(name: str, n: int, dtype: torch.dtype) -> None:
    factor = FACTORS[name](n)
    wide = torch.full((n, *factor.shape, 2), torch.nan, dtype=dtype)
    for out in (wide[..., 0].contiguous(), wide[..., 0]):
        with torch.no_grad():
            assert factor.write(out) is out
        torch.testing.assert_close(out.reshape(n, -1) if n else out, flat(factor).to(dtype) if n else out)


@pytest.mark.parametrize("t", [1, 17, 32, 33, 65, 96, 97, 130, 300, 520])
def test_a_gram_in_blocks(t: int) -> None:
    factor = Outer(x(2, 2, t, 3), x(2, 2, t, 4), Size((6, 4)))
    with using(Strategy("gram")):
        torch.testing.assert_close(factor.sq_norms(), flat(factor).square().sum(1))


def test_norms_of_millions_of_entries_are_right_in_float32() -> None:
    """One long float32 sum is off by 1e-4 here."""
    grads = x(2, 3_000_001, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(Dense(grads).sq_norms(), grads.double().square().sum(1).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize(("name", "other"), PAIRS)
def test_products_of_two_factors(name: str, other: str, n: int) -> None:
    a = FACTORS[name](n)
    make = OTHERS[other]
    b = FACTORS[name](n) if make is None else make(*a.shape)(n)
    m = FACTORS[name](2) if make is None else make(*a.shape)(2)
    torch.testing.assert_close(a.inner(b), (flat(a) * flat(b)).sum(1))
    torch.testing.assert_close(b.inner(a), (flat(a) * flat(b)).sum(1))
    if a.shape == m.shape:
        torch.testing.assert_close(a.gram(m), flat(a) @ flat(m).T)
        torch.testing.assert_close(m.gram(a), flat(m) @ flat(a).T)


@pytest.mark.parametrize("rows_each", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name in FACTORS if "diagonal" not in name])
def test_regrouping_adds_consecutive_rows(name: str, rows_each: int) -> None:
    factor = FACTORS[name](2 * rows_each)
    regrouped = factor.regroup(2)
    wanted = factor.to_dense().reshape(2, rows_each, *factor.shape).sum(1)
    torch.testing.assert_close(regrouped.to_dense(), wanted)
    torch.testing.assert_close(regrouped.sq_norms(), wanted.reshape(2, -1).square().sum(1))
    torch.testing.assert_close(regrouped.weighted_sum(torch.tensor([2.0, -1.0]).double()), 2 * wanted[0] - wanted[1])
    assert FACTORS[name](0).regroup(0).to_dense().shape == (0, *factor.shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("t", [1, 3, 40])
def test_norms_of_half_precision_add_up_in_float32(t: int, dtype: torch.dtype) -> None:
    """Entries of 300: their squares overflow float16, and bfloat16 sums would stall at 256 equal terms."""
    big = torch.full((2, 1, t, 16), 300.0, dtype=dtype)
    outer_, rows_ = (
        Outer(big, torch.ones(2, 1, t, 40, dtype=dtype), Size((16, 40))),
        Rows(torch.zeros(2, t, dtype=torch.int64), big[:, 0], Size((4, 16))),
    )
    expected = torch.full((2,), float(16 * 40 * (300 * t) ** 2))
    for found, wanted in [
        (outer_.sq_norms(), expected),
        (rows_.sq_norms(), expected / 40),
        (Dense(big).sq_norms(), expected / 40 / t),
    ]:
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=0)
    direction = torch.ones(16, 40, dtype=dtype)
    torch.testing.assert_close(outer_.dot(direction), torch.full((2,), 300.0 * t * 640), rtol=2e-2, atol=0)
    assert Sum((outer_, outer_)).sq_norms().dtype == torch.float32
    assert outer_.gram(outer_).isfinite().all()
    conv = Convolution(
        torch.full((2, 4, 3, 3), 300.0, dtype=dtype),
        torch.ones(2, 4, 4, 4, dtype=dtype),
        Size((4, 4, 2, 2)),
        (1, 1),
        (0, 0),
        (1, 1),
        1,
    )
    torch.testing.assert_close(conv.sq_norms(), torch.full((2,), 64 * (9 * 300.0) ** 2), rtol=2e-2, atol=0)


def test_a_norm_that_cancels_is_not_negative() -> None:
    use = Outer(x(3, 1, 2, 6), x(3, 1, 2, 5), Size((6, 5)))
    minus = Rows(torch.arange(6).expand(3, 6), -use.to_dense(), Size((6, 5)))
    assert (Sum((use, minus)).sq_norms() >= 0).all()
    assert (Sum((use, minus)).sq_norms() < 1e-10).all()


def test_chunks_do_not_change_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {name: make(5) for name, make in FACTORS.items() if "dense" in name}
    norms = {name: factor.sq_norms() for name, factor in wanted.items()}
    monkeypatch.setattr("samplewise.factors._CACHED", 1)
    for name, factor in wanted.items():
        torch.testing.assert_close(factor.sq_norms(), norms[name])


@pytest.mark.parametrize("n", [0, 1, 4])
def test_small_gradients_side_by_side(n: int) -> None:
    """Of several types, shapes and none; what is large, structured or complex stays by itself."""
    small = {"a": x(n, 3), "b": x(n, 2, 1, 2), "scalar": x(n), "single": x(n, 5, dtype=torch.float32)}
    others = {"large": Dense(x(4, 5000)), "rows": rows(2)(n), "complex": Dense(x(n, 3).to(torch.complex128))}
    check_joined({name: Dense(grad) for name, grad in small.items()}, others, n)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_small_products_as_groups_of_one(n: int) -> None:
    """Of several sizes and types, with one position, several and none, alone of their size and not, with groups of their own."""
    small = {
        "one position": outer(1, 1, 6, 5)(n),
        "again": outer(1, 1, 6, 5)(n),
        "otherwise shaped": Outer(x(n, 1, 1, 6), x(n, 1, 1, 5), Size((5, 6))),
        "turned": outer(1, 1, 5, 6)(n),
        "positions": outer(1, 3, 8, 7)(n),
        "positions again": outer(1, 3, 8, 7)(n),
        "groups": outer(2, 3, 8, 7)(n),
        "no position": outer(1, 0, 4, 3)(n),
        "single": Outer(x(n, 1, 1, 6, dtype=torch.float32), x(n, 1, 1, 5, dtype=torch.float32), Size((6, 5))),
    }
    others = {
        "large": Outer(x(4, 1, 1, 5000), x(4, 1, 1, 6), Size((5000, 6))),
        "large gradient": outer(1, 1, 300, 300)(n),
        "tile": outer(1, 40, 3, 2)(n),
    }
    check_joined(small, others, n)


def test_products_of_many_positions_stay_alone() -> None:
    """Their inner products would be large together."""
    given = {"many": outer(1, 200, 2, 2)(3), "few": outer(1, 20, 2, 2)(3)}
    with using(Strategy("gram")):
        assert Joined.split(given)[1].keys() == {"many"}


def check_joined(small: dict[str, Factor], others: dict[str, Factor], n: int) -> None:
    """The small ones together are what each is alone, and the others stay; with a graph all do."""
    given = {**small, **others}
    assert Joined.split(given)[1] == given
    with torch.no_grad():
        joined, rest = Joined.split(given)
    assert rest == others
    weights, dense = x(n), {name: factor.to_dense() for name, factor in small.items()}
    for _ in range(2):
        torch.testing.assert_close(
            torch.stack([part.double() for part in joined.sq_norms()]).sum(0),
            sum(flat(factor).double().square().sum(1) for factor in small.values()),
        )
        sums = joined.weighted_sums(weights)
        assert sums.keys() == small.keys()
        for name, grad in dense.items():
            torch.testing.assert_close(sums[name], torch.einsum("n,n...->...", weights.to(grad.dtype), grad))


def test_nothing_side_by_side() -> None:
    joined, rest = Joined.split({})
    assert (joined.sq_norms(), joined.weighted_sums(x(3)), rest) == ([], {}, {})


def test_factors_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Dense(x(2)).grad = x(2)  # type: ignore[misc]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3,), (1,), (1,), (1,)),
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 2), (2, 1), (0, 2), (2, 1)),
        ((4, 4), (4, 4), (0, 0), (1, 1)),
        ((2, 1, 3), (1, 2, 1), (1, 0, 1), (1, 1, 2)),
    ],
)
def test_patches_in_runs_of_channels(
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    *,
    channels_last: bool,
) -> None:
    """What half precision takes on CUDA: the gradients by position, tap and channel."""
    sizes = (9, 8, 7)[: len(kernel)]
    images = x(5, 8, *sizes).half()
    images = images.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else images
    weight, settings = torch.empty(6, 8, *kernel), (stride, padding, dilation)
    grad = torch.randn_like(getattr(F, f"conv{len(kernel)}d")(images.float(), weight, None, *settings)).half()
    factor = Convolution(grad, images, weight.shape, *settings, 1)
    wanted = Convolution(grad.double(), images.double(), weight.shape, *settings, 1).to_dense()
    found = torch.einsum("ntk,not->nok", factor._runs_of_channels().double(), grad.double().flatten(2))
    torch.testing.assert_close(found, wanted.movedim(2, -1).reshape(found.shape))


class Pair(Factor):
    """Somebody's own, with its tensors in a way of its own."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts, self.shape = parts, parts[0].shape[1:]

    @property
    def n(self) -> int:
        return len(self.parts[0])

    def to_dense(self) -> Tensor:
        return self.parts[0] * self.parts[1]


def test_sums_of_any_factors_are_dense() -> None:
    terms = Pair(x(3, 4), x(3, 4)), Pair(x(3, 4), x(3, 4))
    with torch.no_grad():
        torch.testing.assert_close(add(terms).to_dense(), terms[0].to_dense() + terms[1].to_dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_uses_in_another_type_are_summed_in_the_parameters_own(dtype: torch.dtype) -> None:
    class Cast(torch.nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            return F.linear(F.linear(images.to(dtype), self.weight.to(dtype)).tanh(), self.weight.to(dtype))

    model, images = Cast(4, 4, bias=False), x(5, 3, 4)
    with sw.record(model) as rec:
        rec.backward(model(images).float().square().sum((1, 2)))
    for n, image in enumerate(images):
        (wanted,) = torch.autograd.grad(model(image[None]).float().square().sum(), [model.weight])
        torch.testing.assert_close(rec.grads()["weight"][n], wanted, rtol=1e-6, atol=1e-6)


def test_parts_keep_a_gpu_busy() -> None:
    sizes = {device: chunk_size(2**20, 300, torch.device(device)) for device in ("cpu", "cuda")}
    assert sizes == {"cpu": 2, "cuda": 100}
