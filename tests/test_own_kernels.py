"""The places of our own CUDA kernels in factors and rules: on a CPU, with functions of torch in the kernels' stead."""

import sys
from collections import Counter
from types import ModuleType

import pytest
import torch
from torch import Size, Tensor, nn

import samplewise as sw
from samplewise import products
from samplewise.convolution_costs import Ways, ways
from samplewise.convolutional import Convolution
from samplewise.pixels import Geometry
from samplewise.strategy import Rates
from test_models import assert_rows, stacked

N = 3
H200 = Rates(542e12, 1.3e12, 0.0, 0.0, 0.0, 2.84e12, "cuda")


class InTorch:
    """What each kernel says that it does."""

    def __init__(self) -> None:
        self.calls = Counter[str]()

    def gram_norms(self, left: Tensor, right: Tensor) -> Tensor:
        self.calls["gram_norms"] += 1
        return (left.mT @ right).flatten(1).square().sum(1)

    def patch_products(self, grad, image, shape, stride, padding, dilation, out=None) -> Tensor:
        self.calls["patch_products"] += 1
        assert grad.is_contiguous()
        assert image.is_contiguous()
        zeros = [0] * len(stride)
        found = torch.stack(
            [
                torch.ops.aten.convolution_backward(
                    g[None], x[None], g.new_empty(shape), None, stride, padding, dilation, False, zeros, 1, [False, True, False]
                )[1]
                for g, x in zip(grad, image, strict=True)
            ]
        )
        if out is not None:
            assert out.is_contiguous()
            assert out.dtype == grad.dtype
            out.copy_(found)
        return found.flatten(1).square().sum(1)

    def norm_sums(self, grad, input, mean, rstd, *, by_position: bool) -> tuple[Tensor, Tensor]:
        self.calls["norm_sums"] += 1
        assert grad.stride() == input.stride()
        n, k, p = grad.shape
        mean, rstd = (
            x.reshape(n, 1, p) if by_position else x.repeat_interleave(k // x.shape[1], 1)[..., None] for x in (mean, rstd)
        )
        return (grad * (input - mean) * rstd).sum(2), grad.sum(2)

    def scaled(self, weights: Tensor, rows: Tensor) -> Tensor:
        self.calls["scaled"] += 1
        return weights[:, None] * rows


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> InTorch:
    made = InTorch()

    def own_kernels(*given: Tensor) -> InTorch | None:
        return made if not torch.is_grad_enabled() and len({x.device for x in given}) == 1 and not given[0].is_meta else None

    for module in ("products", "outer", "convolutional", "rules.normalization"):
        monkeypatch.setattr(f"samplewise.{module}.own_kernels", own_kernels)
    cheapest = Ways(gram=False, own=True, folds=False, patches=64, gradients=64)
    monkeypatch.setattr("samplewise.convolutional.ways", lambda *_, has_kernel: cheapest._replace(own=has_kernel))
    # some samples at a time
    monkeypatch.setattr("samplewise.factors._CACHED", 128)
    return made


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), padding=(1, 0), bias=False),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 3, 3, stride=2, padding=2, dilation=(1, 2)),
        nn.Unflatten(1, (3, 1)),
        nn.Conv3d(3, 2, (1, 2, 3), padding=(0, 1, 1)),
        nn.Flatten(2),
        nn.Conv1d(2, 5, 4, stride=3),
        nn.LayerNorm([5, 6]),
        nn.Flatten(),
        nn.Linear(30, 3),
    ).double()


def text() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 5)
    ).double()


class Turned(nn.Module):
    """Samples along the second axis, and norms of which one part alone is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.LayerNorm(4, dtype=torch.float64) for _ in range(3))
        self.second.weight.requires_grad_(False)
        self.third.bias.requires_grad_(False)
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.third(self.linear(self.second(self.linear(self.first(x)))).tanh()).transpose(0, 1)


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).flatten(1).square().sum(1)


PROBLEMS = [
    (images, torch.randn(N, 2, 6, 8, dtype=torch.float64)),
    (text, torch.arange(N * 5).view(N, 5) % 7),
    (Turned, torch.randn(N, 5, 4, dtype=torch.float64)),
]


@pytest.mark.parametrize(("make", "x"), PROBLEMS, ids=["images", "text", "turned"])
@pytest.mark.parametrize("strategy", ["auto", "gram", "tile", "store"])
def test_all_quantities(make, x, strategy: str, kernels: InTorch) -> None:
    model = make()
    rows = stacked(model, losses(model, x))
    flat = torch.cat([row.flatten(1) for row in rows.values()], 1)
    norms = flat.norm(dim=1)
    limit = norms.median().item()
    torch.testing.assert_close(sw.per_sample_norms(model, losses, x, strategy=strategy), norms)
    sums, found = sw.clipped_grads(model, losses, x, max_grad_norm=limit, strategy=strategy)
    torch.testing.assert_close(found, norms)
    weights = limit / norms.clamp_min(limit)
    assert_rows(sums, {name: torch.einsum("n,n...->...", weights, row) for name, row in rows.items()})
    assert_rows(sw.per_sample_grads(model, losses, x), rows)
    into = {name: torch.full_like(row, float("nan")) for name, row in rows.items()}
    sw.per_sample_grads(model, losses, x, out=into)
    assert_rows(into, rows)
    called = {
        "norm_sums": True,
        "scaled": strategy != "store" and make is not Turned,
        "gram_norms": make is text and strategy == "gram",
    }
    called["patch_products"] = make is images and strategy != "gram"
    assert {name for name, expected in called.items() if expected} <= kernels.calls.keys()


def test_a_graph_goes_by_torch(kernels: InTorch) -> None:
    """A factor that took a kernel once is still differentiable."""
    grad, image = torch.randn(N, 4, 6, 6).requires_grad_(), torch.randn(N, 2, 6, 6)
    factor = Convolution(grad, image, Size((4, 2, 3, 3)), (1, 1), (1, 1), (1, 1), 1)
    with torch.no_grad():
        norms = factor.sq_norms()
    assert kernels.calls["patch_products"]
    assert factor.to_dense().requires_grad
    torch.testing.assert_close(factor.sq_norms(), norms)
    assert factor.sq_norms().requires_grad


@pytest.mark.parametrize("make", [lambda rows: rows.mT.contiguous().mT, Tensor.float], ids=["strided", "float32"])
def test_rows_that_no_kernel_writes_to(make, kernels: InTorch) -> None:
    """Some at a time, by memory that it does."""
    grad, image = torch.randn(7, 4, 6, 6, dtype=torch.float64), torch.randn(7, 2, 6, 6, dtype=torch.float64)
    factor = Convolution(grad, image, Size((4, 2, 3, 3)), (1, 1), (1, 1), (1, 1), 1)
    out = make(torch.full((7, 4, 2, 3, 3), float("nan"), dtype=torch.float64))
    with torch.no_grad():
        factor.write(out)
    assert kernels.calls["patch_products"] > 1
    torch.testing.assert_close(out, factor.unfold().to_dense().to(out.dtype))


@pytest.fixture
def statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer norms in half precision find what they find on CUDA."""
    native = torch.native_layer_norm

    def as_on_cuda(x: Tensor, *args: object) -> tuple[Tensor, ...]:
        return native(x, *args)[0], *native(x.float(), args[0], None, None, 1e-5)[1:]

    monkeypatch.setattr("samplewise.rules.normalization.has_own_kernels", lambda _: True)
    monkeypatch.setattr(torch, "native_layer_norm", as_on_cuda)


@pytest.mark.usefixtures("statistics")
def test_a_call_may_keep_less_than_one_like_it(kernels: InTorch, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of a layer norm with statistics does not hold for one without."""
    model, x = nn.LayerNorm(6).half(), torch.randn(N, 4, 6).half()
    kept = sw.per_sample_grads(model, losses, x)["weight"]
    taken = kernels.calls["norm_sums"]
    monkeypatch.setattr("samplewise.rules.normalization.has_own_kernels", lambda _: False)
    torch.testing.assert_close(sw.per_sample_grads(model, losses, x)["weight"], kept, rtol=1e-2, atol=1e-2)
    assert taken == kernels.calls["norm_sums"] == 1


@pytest.mark.usefixtures("statistics")
def test_statistics_keep_their_type(kernels: InTorch) -> None:
    """On CUDA those of a layer norm in half precision are float32; rounded, they would be off where numbers are far from zero."""
    model, x = nn.LayerNorm(64).half(), (30 + 0.2 * torch.randn(N, 5, 64)).half()
    found = sw.per_sample_grads(model, losses, x)["weight"]
    wide = nn.LayerNorm(64).double()
    wanted = stacked(wide, losses(wide, x.double()))["weight"]
    assert kernels.calls["norm_sums"]
    assert (found.double() - wanted).norm() < 2e-3 * wanted.norm()


def test_gradients_of_half_precision_into_float32_do_not_overflow() -> None:
    """Written where they are wide, they are formed so."""
    grad, image = torch.full((2, 16, 2, 2), 200.0).half(), torch.full((2, 32, 2, 2), 200.0).half()
    factor = Convolution(grad, image, Size((16, 32, 1, 1)), (1, 1), (0, 0), (1, 1), 1)
    out = torch.empty(2, 16, 32, 1, 1)
    with torch.no_grad():
        factor.write(out)
    torch.testing.assert_close(out, torch.full_like(out, 4 * 200.0**2))


@pytest.mark.parametrize(
    ("shape", "size", "stride", "groups", "way"),
    [
        ((64, 64, 3, 3), 32, 1, 1, "own"),
        ((64, 3, 3, 3), 32, 1, 1, "own"),
        ((128, 128, 3, 3), 16, 1, 1, "own"),
        ((512, 512, 3, 3), 4, 1, 1, "gram"),
        ((64, 1, 3, 3), 32, 1, 64, "folds"),
        ((64, 64, 3, 3), 32, 1, 2, "patches"),
    ],
)
def test_the_way_of_a_convolution_on_a_gpu(shape: tuple[int, ...], size: int, stride: int, groups: int, way: str) -> None:
    """What an H200 takes least time for; without our kernel it is never that."""
    out = (size - 1) // stride + 1
    geometry = Geometry(shape, (size, size), (out, out), (stride, stride), (1, 1), (1, 1), groups)
    found = ways(geometry, 2, H200, has_kernel=True)
    assert ("gram" if found.gram else "own" if found.own else "folds" if found.folds else "patches") == way
    assert not ways(geometry, 2, H200).own


@pytest.mark.parametrize("runs", [True, False])
def test_kernels_that_do_not_run_are_not_used(monkeypatch: pytest.MonkeyPatch, *, runs: bool) -> None:
    """Where Triton finds no compiler, or a card has not enough memory for a block."""
    module = ModuleType("samplewise.kernels")
    module.gram_norms = InTorch().gram_norms if runs else lambda *_: 1 / 0
    monkeypatch.setitem(sys.modules, "samplewise.kernels", module)
    monkeypatch.setattr(sw, "kernels", module, raising=False)
    # not from what is remembered
    found = products._tried.__wrapped__
    if runs:
        assert found(torch.device("cpu"), torch.bfloat16) is module
        return
    with pytest.warns(
        UserWarning, match=r"do not run on cpu, torch's serve in their stead \(ZeroDivisionError: division by zero\)"
    ):
        assert found(torch.device("cpu"), torch.bfloat16) is None
