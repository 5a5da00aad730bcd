"""Per-sample gradients that can be differentiated again, against functions of the batch-of-one loop built with create_graph."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import samplewise as sw
from net import Net, p


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(7, 6), p(1, 4, 6)
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, ids):
        h = self.embed(ids) + self.position
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + self.out((q @ k.mT).softmax(-1) @ v)
        return h @ self.embed.weight.t()


X, IMAGES, IDS = torch.randn(3, 4), torch.randn(3, 2, 6, 6), torch.randint(0, 7, (3, 4))
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), X),
    "reused": (lambda: Net(lambda s, x: s.a(s.a(x).tanh()), a=nn.Linear(4, 4)), X),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.GroupNorm(3, 3), nn.Conv2d(3, 2, 2, groups=1), nn.Flatten()),
        IMAGES,
    ),
    "transposed convolution": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Softplus()), IMAGES),
    "attention, tied": (Attention, IDS),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)), X),
    "bare parameters": (lambda: Net(lambda s, x: (x * s.w).cos() @ s.m + s.b * s.b, w=p(4), m=p(4, 3), b=p(3)), X),
    "recurrent": (lambda: Net(lambda s, x: s.a(x.unflatten(1, (2, 2)))[0], a=nn.GRU(2, 3, batch_first=True)), X),
    "fallback": (lambda: Net(lambda s, x: torch.linalg.cross(x[:, :3], s.w).square(), w=p(1, 3)), X),
    "loop over samples": (lambda: Net(lambda s, x: torch.stack([s.a(row).tanh() for row in x]), a=nn.Linear(4, 3)), X),
}


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().flatten(1).sum(1)


def build(name: str) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    make, x = MODELS[name]
    model = make().double()
    return model, x.double() if x.is_floating_point() else x, {n: q for n, q in model.named_parameters() if q.requires_grad}


def loop(model: nn.Module, x: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = [
        torch.autograd.grad(losses(model, x[i : i + 1]).sum(), list(parameters.values()), create_graph=True)
        for i in range(len(x))
    ]
    return {name: torch.stack(column) for name, column in zip(parameters, zip(*rows, strict=True), strict=True)}


def recorded(model: nn.Module, x: Tensor) -> sw.Record:
    with sw.record(model, create_graph=True) as rec:
        rec.backward(losses(model, x))
    return rec


def squares(rows: dict[str, Tensor]) -> Tensor:
    return torch.stack([r.square().flatten(1).sum(1) for r in rows.values()]).sum(0)


# name -> (of a record, of the loop's rows), each a scalar
DIRECTION = torch.Generator()
PENALTIES: dict[str, tuple[Callable[[sw.Record], Tensor], Callable[[dict[str, Tensor]], Tensor]]] = {
    "gradients": (
        lambda rec: sum(g.cos().sum() for g in rec.grads().values()),
        lambda g: sum(r.cos().sum() for r in g.values()),
    ),
    "norms": (lambda rec: (rec.norms() - 1).square().sum(), lambda g: (squares(g).sqrt() - 1).square().sum()),
    "weighted sum": (
        lambda rec: sum(s.sin().sum() for s in rec.weighted_sum(torch.tensor([1.0, -2, 3]).double()).values()),
        lambda g: sum((torch.tensor([1.0, -2, 3]).double() @ r.flatten(1)).sin().sum() for r in g.values()),
    ),
    "dot": (
        lambda rec: rec.dot({name: torch.ones_like(g[0]) for name, g in rec.grads().items()}).sin().sum(),
        lambda g: torch.stack([r.flatten(1).sum(1) for r in g.values()]).sum(0).sin().sum(),
    ),
    "gram": (
        lambda rec: rec.gram().sin().sum(),
        lambda g: torch.stack([r.flatten(1) @ r.flatten(1).T for r in g.values()]).sum(0).sin().sum(),
    ),
}


@pytest.mark.parametrize("quantity", PENALTIES)
@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_a_penalty(name, quantity):
    model, x, parameters = build(name)
    ours, theirs = PENALTIES[quantity]
    found = torch.autograd.grad(ours(recorded(model, x)), list(parameters.values()), allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(
        theirs(loop(model, x, parameters)), list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    for key, a, b in zip(parameters, found, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, key=key: f"{key}: {text}")
    assert any(b.abs().max() > 1e-6 for b in wanted)


@pytest.mark.parametrize("name", ["mlp", "attention, tied", "weight norm"])
def test_hessian_vector_products_of_each_sample(name):
    model, x, parameters = build(name)
    direction = {key: torch.randn_like(q) for key, q in parameters.items()}
    dots, values = recorded(model, x).dot(direction), list(parameters.values())
    for i in range(len(x)):
        found = torch.autograd.grad(dots[i], values, retain_graph=True)
        first = torch.autograd.grad(losses(model, x[i : i + 1]).sum(), values, create_graph=True)
        wanted = torch.autograd.grad(sum((g * direction[key]).sum() for key, g in zip(parameters, first, strict=True)), values)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["mlp", "convolution", "attention, tied", "recurrent"])
def test_numerically(name):
    model, x, parameters = build(name)
    step = {key: 1e-5 * torch.randn_like(q) for key, q in parameters.items()}
    found = torch.autograd.grad(recorded(model, x).norms().sum(), list(parameters.values()))
    slope = sum((g * step[key]).sum() for key, g in zip(parameters, found, strict=True))
    sides = []
    for sign in (1, -2):
        for key, q in parameters.items():
            q.data.add_(step[key], alpha=sign)
        sides.append(recorded(model, x).norms().sum().detach())
    torch.testing.assert_close((sides[0] - sides[1]) / 2, slope.detach(), rtol=1e-5, atol=1e-12)


def test_a_training_step_with_a_penalty_leaves_ordinary_gradients():
    model, x, parameters = build("mlp")
    with sw.record(model, create_graph=True) as rec:
        each = losses(model, x)
        rec.backward(each)
        (each.mean() + rec.norms().square().mean()).backward()
    found = {key: q.grad for key, q in parameters.items()}
    wanted = torch.autograd.grad(
        losses(model, x).mean() + squares(loop(model, x, parameters)).mean(), list(parameters.values())
    )
    for a, b in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert rec.norms().requires_grad


def test_the_same_numbers_as_without():
    for name in MODELS:
        model, x, _ = build(name)
        with sw.record(model) as rec:
            rec.backward(losses(model, x))
        again = recorded(model, x).grads()
        for key, rows in rec.grads().items():
            assert not rows.requires_grad
            torch.testing.assert_close(again[key], rows)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum(0)


def test_a_sample_without_a_gradient_has_a_derivative_of_zero():
    w = p(2)
    model, x = Net(lambda s, x: (x * s.w).square(), w=w).double(), torch.tensor([[1.0, 2.0], [0.0, 0.0]]).double()
    with sw.record(model, create_graph=True) as rec:
        rec.backward(model(x).sum(1))
    for found in (rec.norms().sum(), rec.norms(by="parameter")["w"].sum(), rec.clipped_sum(0.5)["w"].sum()):
        assert torch.autograd.grad(found, model.w, retain_graph=True)[0].isfinite().all()
    alone = torch.autograd.grad((model(x[:1])).sum(), model.w, create_graph=True)[0].norm()
    torch.testing.assert_close(torch.autograd.grad(rec.norms().sum(), model.w)[0], torch.autograd.grad(alone, model.w)[0])


def test_what_it_cannot_do_raises():
    model = Net(lambda s, x: F.linear(Double.apply(x, s.w), s.v), w=p(4), v=p(3, 4)).double()
    with (
        pytest.raises(sw.UnsupportedOpError, match="w: an ordinary gradient reached this parameter"),
        sw.record(model, create_graph=True) as rec,
    ):
        rec.backward(losses(model, X.double()))
    model = nn.Linear(4, 3).double()
    with pytest.raises(sw.UnsupportedOpError, match=r"by `rec.backward\(losses\)` only"), sw.record(model, create_graph=True):
        losses(model, X.double()).sum().backward()
    with pytest.raises(sw.UnsupportedOpError, match=r"record\(..., create_graph=True\)"), sw.record(model):
        losses(model, X.double()).sum().backward(create_graph=True)


def squares_of_slopes(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(losses(model, x).sum(), x, create_graph=True)[0].square().sum(1)


@pytest.mark.parametrize("each", [losses, squares_of_slopes])
@pytest.mark.parametrize("quantity", [None, sw.Record.norms, sw.Record.gram])
def test_recordings_do_not_outlive_their_results(quantity, each):
    """Their graph holds them, and the garbage collector sees no cycle through autograd."""
    model, batch = (
        nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 2)).double(),
        torch.randn(3, 4).double(),
    )

    def step():
        with sw.record(model, create_graph=True) as rec:
            rec.backward(each(model, batch))
        found = None if quantity is None else quantity(rec).sum()
        alive = weakref.ref(rec._recording)
        del rec
        if found is not None:
            found.backward()
        model.zero_grad()
        return alive

    step()
    alive = step()
    gc.collect()
    assert alive() is None
