"""Linear layers with their own backward, by oneDNN and by torch: the same numbers either way, compared with a loop in float64."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import samplewise as sw
from samplewise import products, strategy
from samplewise.rules import linear
from samplewise.strategy import Rates

N = 4


@pytest.fixture(params=[0.0, 2.0], ids=["torch", "onednn"])
def faster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rates by which one of the two is faster, at any size; what oneDNN was asked for."""
    rates, asked = Rates(1e11, 1e11, 0.0, 0.0, request.param, 1e10), []
    monkeypatch.setattr(strategy, "_MEASURED", {})
    monkeypatch.setattr(strategy, "calibrate", lambda *_: rates)
    monkeypatch.setattr(strategy, "_UNMEASURED", {"cpu": rates})
    monkeypatch.setattr(linear, "_SMALL_PRODUCT", 0.0)
    monkeypatch.setattr(linear, "onednn_linear", lambda *args: asked.append("product") or products.onednn_linear(*args))
    return asked if request.param and products.has_onednn(torch.zeros(1)) else ["none"]


class Layers(nn.Module):
    """Two linear layers around `between`, whose result the loss takes."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh, *, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6, bias=bias), nn.Linear(6, 3, bias=bias)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().reshape(len(x), -1).sum(1)


def plain_sums(model: nn.Module, x: Tensor) -> Tensor:
    """Whose gradient is expanded from one number."""
    return model(x).flatten(1).sum(1)


def exact(model: nn.Module, loss_fn: Callable[[nn.Module, Tensor], Tensor], x: Tensor, times: int = 2) -> None:
    """A call that is decided, and one that is remembered."""
    wide = copy.deepcopy(model).double()
    trained = {name: p for name, p in wide.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(loss_fn(wide, x[k : k + 1].double()).sum(), list(trained.values())) for k in range(len(x))]
    wanted = dict(zip(trained, map(torch.stack, zip(*rows, strict=True)), strict=True))
    for _ in range(times):
        found = sw.per_sample_grads(model, loss_fn, x)
        assert set(found) == set(wanted)
        for name, grad in found.items():
            torch.testing.assert_close(grad.double(), wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def inputs(*shape: int) -> Tensor:
    return torch.randn(N, *shape)


INPUTS = {
    "a matrix": lambda: inputs(5),
    "positions": lambda: inputs(7, 5),
    "two axes of positions": lambda: inputs(2, 3, 5),
    "transposed": lambda: torch.randn(5, N).t(),
    "transposed positions": lambda: inputs(5, 7).mT,
    "every other": lambda: torch.randn(2 * N, 7, 10)[::2, :, ::2],
    "expanded": lambda: inputs(1, 5).expand(N, 7, 5),
    "no positions": lambda: inputs(0, 5),
}


@pytest.mark.parametrize("loss_fn", [squares, plain_sums])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_in_any_layout(faster: list[str], kind: str, loss_fn: Callable[..., Tensor], *, bias: bool) -> None:
    torch.manual_seed(0)
    exact(Layers(bias=bias), loss_fn, INPUTS[kind]())
    assert faster or kind == "no positions"


def test_both_passes_are_by_the_faster(faster: list[str]) -> None:
    asked = len(faster)
    with sw.record(model := Layers()) as rec:
        out = squares(model, inputs(5))
        assert len(faster) - asked in {0, 2}
        # the first layer's input wants no gradient
        rec.backward(out)
        assert len(faster) - asked in {0, 3}


def test_the_graph_has_no_other_node_than_the_tap(faster: list[str]) -> None:
    with sw.record(model := Layers(between=lambda h: h)):
        node = model(inputs(5)).grad_fn
        assert type(node).__name__ == "TapBackward"
        assert "TapBackward" in {type(before).__name__ for before, _ in node.next_functions}


def test_layers_in_odd_memory(faster: list[str]) -> None:
    """A weight that is a transposed view, a result that an in-place op follows, and one that is cut."""
    model = Layers(between=lambda h: h.relu_())
    model.second.weight = nn.Parameter(torch.randn(6, 3).t())
    exact(model, squares, inputs(7, 5))
    exact(Layers(between=lambda h: h.mT.contiguous().mT), squares, inputs(7, 5))
    exact(Layers(between=lambda h: torch.cat([h[..., 3:], h[..., :3]], -1)), squares, inputs(7, 5))


class Products(nn.Module):
    """The same layers, written as products with a matrix on the right: GPT-2's `Conv1D` and its like."""

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product = product
        self.first, self.second = nn.Parameter(torch.randn(5, 6) / 3), nn.Parameter(torch.randn(6, 3) / 3)
        self.biases = nn.ParameterList([torch.randn(6), torch.randn(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.product(torch.tanh(self.product(x, self.first, self.biases[0])), self.second, self.biases[1])


def as_matrix(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


PRODUCTS = {
    "matmul": lambda x, w, b: x @ w + b,
    "mm": lambda x, w, b: torch.mm(as_matrix(x), w).reshape(*x.shape[:-1], len(b)) + b,
    "addmm": lambda x, w, b: torch.addmm(b, as_matrix(x), w).reshape(*x.shape[:-1], len(b)),
    "addmm, scaled": lambda x, w, b: torch.addmm(b, as_matrix(x), w, beta=0.5, alpha=-2).reshape(*x.shape[:-1], len(b)),
    "addmm, numbers by position": lambda x, w, b: torch.addmm(b, as_matrix(x), w, beta=2).reshape(*x.shape[:-1], len(b)),
    "addmm of a row": lambda x, w, b: torch.addmm(b[None], as_matrix(x), w).reshape(*x.shape[:-1], len(b)),
    "addmm_": lambda x, w, b: (
        as_matrix(x).new_ones(x.shape[:-1].numel(), len(b)).addmm_(as_matrix(x), w).reshape(*x.shape[:-1], -1) + b
    ),
    "matmul of a part": lambda x, w, b: x[..., 1:] @ w[1:] + b,
    "matmul by a transposed": lambda x, w, b: (x @ w.clone().t().contiguous().t()) + b,
}


# an empty tensor that is reshaped to a matrix is refused
EVERY = [(kind, name) for kind in INPUTS for name in PRODUCTS if kind != "no positions" or "mm" not in name]


@pytest.mark.parametrize("loss_fn", [squares, plain_sums])
@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_products(faster: list[str], kind: str, name: str, loss_fn: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    exact(Products(PRODUCTS[name]), loss_fn, INPUTS[kind]())


@pytest.mark.parametrize("name", ["matmul", "mm", "addmm"])
def test_products_are_by_the_faster(faster: list[str], name: str) -> None:
    model = Products(PRODUCTS[name])
    for _ in range(2):
        asked = len(faster)
        with sw.record(model) as rec:
            rec.backward(squares(model, inputs(7, 5)))
        assert len(faster) - asked in {0, 3}
        assert [row.structure for row in rec.coverage().rows[:2]] == [("Outer",)] * 2


class Called(nn.Module):
    """A function of parameters and samples."""

    def __init__(self, function: Callable[..., Tensor], *parameters: Tensor) -> None:
        super().__init__()
        self.function, self.given = function, nn.ParameterList(parameters)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.given)


def test_products_that_are_no_layers_go_another_way() -> None:
    """A matrix on the left, one that is derived, a table of rows that is added; samples on the axis that is summed are refused."""
    exact(Called(lambda x, w: w @ x, torch.randn(2, 7)), squares, inputs(7, 5))
    exact(Called(lambda x, w: x @ w[0], torch.randn(2, 5, 3)), squares, inputs(7, 5))
    exact(Called(lambda x, b, w: torch.addmm(b, x, w), torch.randn(1, 3), torch.randn(5, 3)), squares, inputs(5))
    model = Called(lambda x, w: x @ w, torch.randn(N, 3))
    with sw.record(model, batch_size=N, batch_dim=1), pytest.raises(sw.SampleAxisError, match="brings the samples together"):
        model(torch.randn(2, N))


@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
def test_sparse_constants(layout: str) -> None:
    """They have no strides, or no layers in them."""
    turn = {"csr": Tensor.to_sparse_csr, "csc": Tensor.to_sparse_csc, "coo": Tensor.to_sparse}[layout]
    table = turn(torch.randn(5, 5, dtype=torch.float64).relu())
    x, w = torch.randn(N, 5, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    for function in (
        lambda x, w: (table @ x.mT).mT @ w,
        lambda x, w: torch.mm(table, x.mT).mT @ w,
        lambda x, w: x @ (table @ w),
    ):
        exact(Called(function, w), squares, x)


@pytest.mark.parametrize("product", [torch.matmul, torch.linalg.matmul])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (5,)])
def test_names_in_another_order(product: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        out = product(other=w, input=x)
        return out.transpose(0, 1) if out.ndim > 2 else out

    exact(Called(function, torch.randn(shape)), squares, inputs(5))


@pytest.mark.parametrize("alpha", [2j, 1 - 3j, True, -2, 0.5])
def test_complex_products(alpha: complex) -> None:
    """By the convention of torch.autograd: products with conjugates."""

    def complexes(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.complex128)

    model, x = Called(lambda x, b, w: torch.addmm(b, x, w, alpha=alpha), complexes(6), complexes(5, 6)), complexes(N, 5)

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return torch.view_as_real(model(x)).sin().flatten(1).sum(1)

    rows = [torch.autograd.grad(losses(model, x[k : k + 1]).sum(), list(model.parameters())) for k in range(N)]
    for _ in range(2):
        found = sw.per_sample_grads(model, losses, x)
        torch.testing.assert_close(list(found.values()), list(map(torch.stack, zip(*rows, strict=True))))


BIASES = {
    "every other": lambda: nn.Parameter(torch.randn(12)[::2]),
    "a column": lambda: nn.Parameter(torch.randn(6, 2)[:, 0]),
    "the end": lambda: nn.Parameter(torch.randn(12)[6:]),
}


@pytest.mark.parametrize("kind", BIASES)
def test_biases_in_any_layout(faster: list[str], kind: str) -> None:
    """Of which oneDNN would read what lies beside them."""
    torch.manual_seed(0)
    model = Layers()
    model.first.bias = BIASES[kind]()
    exact(model, squares, inputs(7, 5))


@pytest.mark.parametrize("cut", ["a column", "one number for all"])
def test_biases_cut_from_a_parameter(faster: list[str], cut: str) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            bias = self.both[:, -1] if cut == "a column" else self.both[0, :1].expand(4)
            return F.linear(x, self.both[:, :-1], bias)

    torch.manual_seed(0)
    exact(Packed(), squares, inputs(7, 5))


class Function(nn.Module):
    """`F.linear` with arguments of its own."""

    def __init__(self, weight: Tensor, bias: Tensor | None, frozen: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.before = nn.Linear(5, 6)
        self.weight = nn.Parameter(weight, requires_grad="weight" not in frozen)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad="bias" not in frozen)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.before(x), self.weight, self.bias)


@pytest.mark.parametrize(
    ("weight", "bias", "frozen"),
    [
        ((3, 6), (3,), ()),
        ((3, 6), (1,), ()),
        ((3, 6), (1, 1), ()),
        ((3, 6), (1, 3), ()),
        ((3, 6), (), ()),
        ((3, 6), None, ()),
        ((6,), None, ()),
        ((3, 6), (3,), ("weight",)),
        ((3, 6), (3,), ("bias",)),
        ((3, 6), (3,), ("weight", "bias")),
        ((0, 6), (0,), ()),
    ],
)
def test_arguments(faster: list[str], weight: tuple[int, ...], bias: tuple[int, ...] | None, frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    for shape in ((5,), (7, 5)):
        model = Function(torch.randn(weight), None if bias is None else torch.randn(bias), frozen)
        exact(model, squares, inputs(*shape))


def test_the_gradient_of_an_input_is_there_as_ever(faster: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Layers(), inputs(7, 5).requires_grad_()
    (wanted,) = torch.autograd.grad(squares(model, x).sum(), x)
    for _ in range(2):
        x.grad = None
        with sw.record(model) as rec:
            rec.backward(squares(model, x))
        torch.testing.assert_close(x.grad, wanted)
    # and in between, by the same remembered decisions
    exact(model, squares, x.detach())


def test_a_constant_with_a_gradient_of_its_own_keeps_it(faster: list[str]) -> None:
    """One that is no parameter of the model: a weight with a trained bias, once with and once without a gradient."""
    torch.manual_seed(0)
    model, weight, x = nn.Module(), torch.randn(3, 5), inputs(7, 5).requires_grad_()
    model.bias = nn.Parameter(torch.randn(3))

    def losses() -> Tensor:
        return F.linear(x, weight, model.bias).square().flatten(1).sum(1)

    for wants in (False, True, False, True):
        weight.requires_grad_(wants).grad = x.grad = None
        wanted = torch.autograd.grad(losses().sum(), [x, weight] if wants else [x])
        x.grad = weight.grad = None
        with sw.record(model, batch_size=N) as rec:
            rec.batched(x, 0)
            rec.backward(losses())
        torch.testing.assert_close(x.grad, wanted[0])
        if wants:
            torch.testing.assert_close(weight.grad, wanted[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(faster: list[str], *, reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = Layers(), inputs(7, 5)
    wanted = sw.per_sample_grads(copy.deepcopy(model).double(), squares, x.double())
    for _ in range(3):
        with sw.record(model) as rec:
            out = checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
            rec.backward(out.square().flatten(1).sum(1))
        for name, grad in rec.grads().items():
            torch.testing.assert_close(grad.double(), wanted[name], rtol=1e-4, atol=1e-5)


def test_half_precision_is_as_exact_as_its_own_loop(faster: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Layers(), inputs(7, 5)

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return squares(model, x)

    wanted = [torch.autograd.grad(losses(model, x[k : k + 1]).sum(), list(model.parameters())) for k in range(N)]
    for _ in range(2):
        found = sw.per_sample_grads(model, losses, x)
        for grad, rows in zip(found.values(), zip(*wanted, strict=True), strict=True):
            torch.testing.assert_close(grad, torch.stack(rows), rtol=0.05, atol=0.05)


def test_second_derivatives(faster: list[str]) -> None:
    """Which go through torch's own backward."""
    torch.manual_seed(0)
    model, x = Layers(), inputs(5)

    def penalty(weight: Tensor, model: nn.Module, x: Tensor) -> Tensor:
        out = torch.func.functional_call(model, {"first.weight": weight}, (x,))
        (grad,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
        return grad.square().sum()

    with sw.record(model, create_graph=True) as rec:
        rec.backward(squares(model, x))
        norms = rec.grads()["first.weight"].square().flatten(1).sum(1)
    found = torch.autograd.grad(norms.sum(), model.first.weight)[0]
    wide = copy.deepcopy(model).double()
    weight = wide.first.weight
    total = sum(penalty(weight, wide, x[k : k + 1].double()) for k in range(N))
    torch.testing.assert_close(found.double(), torch.autograd.grad(total, weight)[0], rtol=1e-3, atol=1e-4)


def test_onednn_switched_off_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_SMALL_PRODUCT", 0.0)
    monkeypatch.setattr(linear, "onednn_linear", lambda *_: pytest.fail("used"))
    with torch.backends.mkldnn.flags(enabled=False):
        exact(Layers(), squares, inputs(7, 5))


def test_a_weight_changed_before_the_backward_is_refused(faster: list[str]) -> None:
    with sw.record(model := Layers()) as rec:
        out = squares(model, inputs(5))
        with torch.no_grad():
            model.second.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            rec.backward(out)


class Tagged(Tensor):
    """A subclass, which keeps through torch's ops."""


def test_subclasses_are_left_to_torch(faster: list[str]) -> None:
    x, weight = inputs(7, 5), torch.randn(3, 5)
    known = faster != ["none"]
    for kinds, expected in (((Tensor, Tensor), known), ((Tagged, Tensor), False), ((Tensor, Tagged), False)):
        operands = [operand.as_subclass(kind) for operand, kind in zip((x, weight), kinds, strict=True)]
        assert linear._by_onednn(*operands) == expected


def test_inputs_of_a_subclass_are_refused(faster: list[str]) -> None:
    model, x = nn.Linear(5, 3), inputs(5)
    with (
        sw.record(model) as rec,
        pytest.raises(sw.UnsupportedOpError, match=r"^linear: gave a Tagged.*bias, weight.*as_subclass"),
    ):
        rec.backward(squares(model, x.as_subclass(Tagged)))


# --- memory of results --------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two layers whose results are added: the same gradient arrives at both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("spread", [False, True])
def test_gradients_of_biases_have_memory_of_their_own(*, spread: bool) -> None:
    """Though with one position for each sample they are what arrived, and in both layers the same, or one number for all."""
    model, x = Branches(), torch.randn(4, 3)

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        return m(x).sum(1) if spread else m(x).square().sum(1)

    with sw.record(model) as rec:
        out = losses(model, x)
        rec.backward(out)
    norms, streamed = rec.norms(), sw.per_sample_grads(model, losses, x)
    for grads in (rec.grads(), streamed):
        before = grads["second.bias"].clone()
        grads["first.bias"].mul_(3)
        torch.testing.assert_close(grads["second.bias"], before)
        torch.testing.assert_close(grads["first.bias"], 3 * before)
    torch.testing.assert_close(rec.norms(), norms)
    assert {row.structure for row in rec.coverage().rows if row.parameter.endswith("bias")} == {("Dense",)}
