"""Losses made of derivatives of the model by its inputs, against a batch-of-one loop: forces, differential equations, penalties."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import samplewise as sw
from net import Net, p
from samples import EXACT, SLOW
from samplewise import testing


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Softplus(), nn.Linear(6, 2))


def attention(s, x):
    h = s.norm(s.into(x.unflatten(1, (2, 2))) + s.place)
    # torch's fast attention has no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        return s.out(s.mix(h, h, h, need_weights=False)[0]).mean(1)


def tied(s, x):
    return (x @ s.w).tanh() @ s.w.t()


def cross(s, x):
    return torch.linalg.cross(x[:, :3].sin(), s.w)


def pair(s, x):
    return torch.einsum("ni,oij,nj->no", x.sin(), s.w, x.cos())


IMAGE = (2, 6, 5)
# name -> (model, shape of a sample)
MODELS = {
    "mlp": (mlp, (4,)),
    "one layer": (lambda: nn.Linear(4, 2), (4,)),
    "positions": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (3, 4)),
    "reused": (lambda: Net(lambda s, x: s.a(s.a(x).tanh()), a=nn.Linear(4, 4)), (4,)),
    "tied": (lambda: Net(tied, w=p(4, 3)), (4,)),
    "bare parameters": (
        lambda: Net(lambda s, x: (x * s.scale + s.shift).cos().square() @ s.w, scale=p(4), shift=p(4), w=p(4, 3)),
        (4,),
    ),
    "frozen in between": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5).requires_grad_(False), nn.Linear(5, 2)),
        (4,),
    ),
    "weight frozen, bias not": (
        lambda: Net(lambda s, x: s.b(F.linear(x, s.w.detach(), s.c).tanh()), w=p(5, 4), c=p(5), b=nn.Linear(5, 2)),
        (4,),
    ),
    "matrix on the left": (lambda: Net(lambda s, x: s.w @ (s.w @ x.mT).sin(), w=p(4, 4)), (3, 4)),
    "addmm": (
        lambda: Net(lambda s, x: torch.addmm(s.b, torch.addmm(s.b, x, s.w, beta=2, alpha=3).tanh(), s.w), w=p(4, 4), b=p(4)),
        (4,),
    ),
    "einsum": (
        lambda: Net(lambda s, x: torch.einsum("oti,nti->no", s.w, x.sin()).tanh() @ s.u, w=p(5, 3, 4), u=p(5, 2)),
        (3, 4),
    ),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)), (4,)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)), (4,)),
    "layer norm of positions": (
        lambda: nn.Sequential(nn.Tanh(), nn.LayerNorm((3, 4)), nn.Tanh(), nn.LayerNorm(4, bias=False), nn.Linear(4, 2)),
        (3, 4),
    ),
    "rms norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Tanh(), nn.Linear(6, 2)), (4,)),
    "prelu, bias alone": (lambda: Net(lambda s, x: s.a(x).square() * s.b, a=nn.PReLU(4), b=p(4)), (4,)),
    "critic": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4, 3, 3, stride=2),
            nn.Softplus(),
            nn.Flatten(),
            nn.Linear(12, 1),
        ),
        IMAGE,
    ),
    "normalised images": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2, padding="same"),
            nn.GroupNorm(2, 4),
            nn.SiLU(),
            nn.Conv2d(4, 4, 3, dilation=2, padding=2, groups=2),
            nn.InstanceNorm2d(4, affine=True),
            nn.Tanh(),
            nn.BatchNorm2d(4).eval(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        ),
        IMAGE,
    ),
    "transposed convolution": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), nn.Softplus(), nn.ConvTranspose2d(3, 1, 2)
        ),
        IMAGE,
    ),
    "convolutions of one and three dimensions": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Unflatten(1, (1, 3, 1)),
            nn.Conv3d(1, 2, (2, 1, 2)),
            nn.Softplus(),
            nn.Flatten(),
        ),
        (2, 7),
    ),
    "attention": (
        lambda: Net(
            attention,
            into=nn.Linear(2, 4),
            place=p(1, 2, 4),
            norm=nn.LayerNorm(4),
            mix=nn.MultiheadAttention(4, 2, batch_first=True),
            out=nn.Linear(4, 2),
        ),
        (4,),
    ),
    "recurrent": (lambda: Net(lambda s, x: s.a(x.unflatten(1, (2, 2)))[0], a=nn.GRU(2, 3, batch_first=True)), (4,)),
    "an op without a rule": (lambda: Net(cross, w=p(1, 3)), (4,)),
    "samples in two operands": (lambda: Net(pair, w=p(2, 4, 4)), (4,)),
    "bilinear": (lambda: Net(lambda s, x: s.a(x.sin(), x.cos()), a=nn.Bilinear(4, 4, 3)), (4,)),
    "samples added": (lambda: Net(lambda s, x: torch.addmm(x, x.sin(), s.w), w=p(4, 4)), (4,)),
    "loop over samples": (lambda: Net(lambda s, x: torch.stack([s.a(row).tanh() for row in x]), a=nn.Linear(4, 3)), (4,)),
}


def slope(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)[0]


def total(y: Tensor) -> Tensor:
    return y.flatten(1).sum(1)


def energy_and_forces(model, x):
    energy = total(model(x).square())
    return energy.cos() + total(slope(energy, x).square() * torch.arange(x[0].numel()).view_as(x[0]))


def of_the_sum(model, x):
    y = total(model(x).sin())
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square()


def second_derivatives(model, x):
    """The residual of a differential equation: `u'' + u u' = 0` along all coordinates together."""
    u = total(model(x).sin())
    first = slope(u, x)
    return (total(slope(total(first), x)) + u * total(first)).square()


def by_the_model(model, x):
    """A derivative that goes through the model again."""
    first = slope(total(model(x).square()), x)
    return total(model(x + 0.1 * first).sin())


LOSSES = {f.__name__: f for f in (energy_and_forces, of_the_sum, second_derivatives, by_the_model)}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.BatchNorm2d | nn.InstanceNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
    return model, torch.randn(3, *shape, dtype=torch.double)


def loop(model: nn.Module, x: Tensor, loss) -> dict[str, Tensor]:
    trained = {name: q for name, q in model.named_parameters() if q.requires_grad}
    rows = []
    for i in range(len(x)):
        one = x[i : i + 1].clone().requires_grad_()
        rows.append(
            torch.autograd.grad(loss(model, one).sum(), list(trained.values()), allow_unused=True, materialize_grads=True)
        )
    return {name: torch.stack(column) for name, column in zip(trained, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_loop(name, loss):
    model, x = build(name)
    wanted = loop(model, x, LOSSES[loss])
    with sw.record(model, create_graph=True) as rec:
        rec.backward(LOSSES[loss](model, x.clone().requires_grad_()))
    found = rec.grads()
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], msg=lambda text, key=key: f"{key}: {text}")
    squares = torch.stack([g.flatten(1).square().sum(1) for g in wanted.values()]).sum(0)
    torch.testing.assert_close(rec.norms(), squares.sqrt())
    assert any(g.abs().max() > 1e-6 for g in wanted.values())


class Forces(nn.Module):
    """Takes the derivative in its own forward."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 1))

    def forward(self, x):
        x = x.detach().requires_grad_()
        energy = self.energy(x).squeeze(1)
        return energy, -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def energies_and_forces(model, x):
    energy, forces = model(x)
    return energy.sin() + forces.square().sum(1)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_model_that_takes_the_derivative_itself(n):
    model, x = Forces().double(), torch.randn(n, 4, dtype=torch.double)
    with sw.record(model, create_graph=True) as rec:
        rec.backward(energies_and_forces(model, x))
    for key, rows in loop(model, x, energies_and_forces).items():
        torch.testing.assert_close(rec.grads()[key], rows)


def test_an_empty_batch():
    model = Forces().double()
    with sw.record(model, create_graph=True) as rec:
        rec.backward(energies_and_forces(model, torch.zeros(0, 4, dtype=torch.double)))
    assert {key: tuple(rows.shape) for key, rows in rec.grads().items()} == {
        key: (0, *q.shape) for key, q in model.named_parameters()
    }


def test_samples_on_another_axis():
    torch.manual_seed(0)
    model, x = mlp().double(), torch.randn(5, 3, 4, dtype=torch.double)

    def each(model, x):
        u = model(x).square().sum((0, 2))
        return slope(u, x).square().sum((0, 2))

    wanted = loop(model, x.transpose(0, 1), lambda m, one: each(m, one.transpose(0, 1)))
    with sw.record(model, batch_dim=1, create_graph=True) as rec:
        rec.backward(each(model, x.requires_grad_()))
    for key, rows in wanted.items():
        torch.testing.assert_close(rec.grads()[key], rows)


@pytest.mark.parametrize("name", ["mlp", "tied", "layer norm", "critic", "weight norm", "bare parameters"])
def test_quantities_may_be_differentiated_again(name):
    model, x = build(name)
    trained = {key: q for key, q in model.named_parameters() if q.requires_grad}
    with sw.record(model, create_graph=True) as rec:
        rec.backward(energy_and_forces(model, x.clone().requires_grad_()))
        penalty = rec.norms().square().sum()
    found = torch.autograd.grad(penalty, list(trained.values()), allow_unused=True, materialize_grads=True)
    wanted = [torch.zeros_like(q) for q in trained.values()]
    for i in range(len(x)):
        loss = energy_and_forces(model, x[i : i + 1].clone().requires_grad_()).sum()
        first = torch.autograd.grad(loss, list(trained.values()), create_graph=True, allow_unused=True, materialize_grads=True)
        square = torch.stack([g.square().sum() for g in first]).sum()
        second = torch.autograd.grad(square, list(trained.values()), allow_unused=True, materialize_grads=True)
        wanted = [a + b for a, b in zip(wanted, second, strict=True)]
    for key, a, b in zip(trained, found, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, key=key: f"{key}: {text}")


def test_ordinary_gradients_of_such_a_loss_are_right_outside():
    model, x = build("critic")
    with sw.record(model, create_graph=True):
        inside = energy_and_forces(model, x.clone().requires_grad_())
        y, later = (x.clone().requires_grad_() for _ in range(2))
        u = total(model(later).square())
    outside = slope(u, later).square().sum()
    (inside.sum() + outside).backward()
    u = total(model(y).square())
    plain = energy_and_forces(model, x.clone().requires_grad_()).sum() + slope(u, y).square().sum()
    for q, wanted in zip(model.parameters(), torch.autograd.grad(plain, list(model.parameters())), strict=True):
        torch.testing.assert_close(q.grad, wanted)


def half(model, x):
    with torch.autocast("cpu"):
        return of_the_sum(model, x)


REFUSED = {
    "autocast": (mlp, half),
    "directions that mix samples": (
        mlp,
        lambda m, x: total(torch.autograd.grad(y := m(x), x, y.softmax(0), create_graph=True)[0].square()),
    ),
    "directions in another order": (
        mlp,
        lambda m, x: total(torch.autograd.grad(y := m(x), x, y.flip(0), create_graph=True)[0].square()),
    ),
    "directions in another order, of the samples alone": (
        mlp,
        lambda m, x: slope(torch.autograd.grad(m(x), x, x[:, :2].flip(0), create_graph=True)[0].square().sum(), x).sum(1),
    ),
    "one sample's direction for all": (
        mlp,
        lambda m, x: total(torch.autograd.grad(y := m(x), x, y[:1].expand_as(y), create_graph=True)[0].square()),
    ),
    "directions of samples for outputs": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        lambda m, x: total(torch.autograd.grad((y := m(x)).sum(0), x, y.sum(1), create_graph=True)[0].square()),
    ),
    "directions on another axis": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        lambda m, x: total(torch.autograd.grad(y := m(x), x, y.t(), create_graph=True)[0].square()),
    ),
    "a sum that mixes samples": (
        mlp,
        lambda m, x: total(torch.autograd.grad(m(x).square().sum().sin(), x, create_graph=True)[0].square()),
    ),
    "one number for all samples": (
        mlp,
        lambda m, x: (
            m(x).sum(1)
            * torch.autograd.grad(m(x * (t := torch.ones((), dtype=x.dtype, requires_grad=True))).sum(), t, create_graph=True)[
                0
            ]
        ),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_seen_or_mixes_is_refused(name):
    make, loss = REFUSED[name]
    model, x = make().double(), torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    with pytest.raises(sw.SamplewiseError), sw.record(model, create_graph=True) as rec:
        rec.backward(loss(model, x))


def test_a_derivative_after_the_backward_may_not_become_a_loss():
    model, x = mlp().double(), torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    refused = pytest.raises(sw.UnsupportedOpError, match="create_graph=True was taken inside the recording")
    with refused, sw.record(model, create_graph=True) as rec:
        u = total(model(x).square())
        rec.backward(u)
        rec.backward(total(slope(u, x).square()))


def test_directions_of_each_samples_own():
    model, x = mlp().double(), torch.randn(3, 4, dtype=torch.double)

    def each(model, x):
        y = model(x)
        return total(torch.autograd.grad([y, y.sum()], x, [y.cos() * x[:, :2], None], create_graph=True)[0].square())

    with sw.record(model, create_graph=True) as rec:
        rec.backward(each(model, x.clone().requires_grad_()))
    for key, rows in loop(model, x, each).items():
        torch.testing.assert_close(rec.grads()[key], rows)


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(3), lambda: nn.GroupNorm(2, 4), lambda: nn.BatchNorm1d(4).eval()])
def test_norms_have_the_type_that_they_have_in_plain_torch(make):
    norm, x = make(), torch.randn(2, 4, 3).bfloat16()
    with sw.record(norm, create_graph=True), torch.autocast("cpu", enabled=False):
        assert norm(x).dtype is torch.bfloat16
    with torch.autocast("cpu"):
        plain = norm(x)
        with sw.record(norm, create_graph=True):
            assert norm(x).dtype is plain.dtype


def test_a_derivative_through_a_checkpoint_is_refused():
    model, x = mlp().double(), torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    refused = pytest.raises(sw.UnsupportedOpError, match="a derivative taken through a checkpoint")
    with refused, sw.record(model, create_graph=True) as rec:
        u = checkpoint(model, x, use_reentrant=False)
        rec.backward(total(slope(total(u), x).square()))


def test_without_create_graph_the_error_says_what_to_do():
    model, x = mlp().double(), torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    with pytest.raises(sw.UnsupportedOpError, match=r"record\(..., create_graph=True\)"), sw.record(model) as rec:
        rec.backward(of_the_sum(model, x))


def of_all_inputs(call: nn.Module, inputs: list[Tensor], dim: int) -> Tensor:
    """Losses made of the derivatives by all inputs of an op, whose results a model of `testing` brings together in one number."""
    wanted = [x for x in inputs if x.requires_grad]
    found = torch.autograd.grad(call(*inputs), wanted, create_graph=True, allow_unused=True)
    real = [g.movedim(dim, 0) for g in found if g is not None and not g.is_complex()]
    each = [(g * (g.cos() + 1.5)).reshape(len(g), -1).sum(1) for g in real]
    return torch.stack(each).sum(0)


def one_by_one(call: nn.Module, inputs: list[Tensor], sample: testing.Sample) -> list[Tensor]:
    rows = []
    for i in range(sample.n):
        alone = [testing._input(x.narrow(sample.batch_dim, i, 1)) for x in inputs]
        args, kwargs = testing._swapped(
            (sample.args, dict(sample.kwargs)), dict(zip(map(id, testing._batched(sample)), alone, strict=True))
        )
        single = testing._Call(call.op, testing.Sample(args, kwargs, 1, sample.batch_dim, sample.constant))
        losses = of_all_inputs(single, alone, sample.batch_dim).sum()
        rows.append(torch.autograd.grad(losses, list(call.parameters()), allow_unused=True, materialize_grads=True))
    return [torch.stack([g.to_dense() if g.is_sparse else g for g in column]) for column in zip(*rows, strict=True)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("op", "sample"),
    [
        pytest.param(op, call, id=f"{op.__name__}-{k}")
        for op, calls in [*EXACT, *SLOW]
        for k, call in enumerate(calls)
        if call.n
    ],
)
def test_every_op_and_option(op, sample):
    call, inputs = testing._Call(op, sample), [testing._input(x) for x in testing._batched(sample)]
    try:
        wanted = one_by_one(call, inputs, sample)
    except (RuntimeError, IndexError, ValueError) as error:
        pytest.skip(f"torch has no such derivative: {error}")
    with sw.record(call, batch_size=sample.n, batch_dim=sample.batch_dim, create_graph=True) as rec:
        for key in sample.constant:
            rec.constant(sample.kwargs[key] if isinstance(key, str) else sample.args[key])
        if not all(x.numel() for x in inputs):
            pytest.skip("there is nothing to differentiate by")
        rec.backward(of_all_inputs(call, inputs, sample.batch_dim))
    for found, expected in zip(rec.grads().values(), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
