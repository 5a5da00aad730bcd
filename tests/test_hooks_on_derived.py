"""Hooks on tensors that are computed from parameters, and on their nodes, whenever they come: gradients pulled back pass through them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samplewise as sw

N, T, D = 4, 3, 5


def twice(grad: Tensor) -> Tensor:
    return 2 * grad


def clipped(grad: Tensor) -> Tensor:
    return grad.clamp(-0.1, 0.1)


# (the derived tensor, what is done to a gradient) -> a hook is set
SET: dict[str, Callable[[Tensor, Callable[[Tensor], Tensor]], object]] = {
    "tensor": lambda q, change: q.register_hook(change),
    "node": lambda q, change: q.grad_fn.register_hook(lambda grads, _: tuple(g if g is None else change(g) for g in grads)),
    "node, before": lambda q, change: q.grad_fn.register_prehook(lambda grads: tuple(change(g) for g in grads)),
}
PLACES = torch.tensor([1, 0, 1])
# parameter, samples -> derived tensor; and how both meet
DERIVED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "places (T,)": (lambda w, x: F.embedding(PLACES, w), lambda x, q: x * q),
    "places (1, T)": (lambda w, x: F.embedding(PLACES[None], w), lambda x, q: x * q),
    "places (n, T)": (lambda w, x: F.embedding(PLACES.expand(len(x), T), w), lambda x, q: x * q),
    "transposed": (lambda w, x: w.t(), lambda x, q: x @ q),
    "transposed layer": (lambda w, x: w.t().contiguous().t(), F.linear),
    "scaled": (lambda w, x: w * 2, F.linear),
}


class Model(nn.Module):
    def __init__(self, name: str, set_hook: Callable[..., object], change: Callable[[Tensor], Tensor], late: bool) -> None:
        super().__init__()
        self.weight, self.late = nn.Parameter(torch.randn(7, D, dtype=torch.float64)), late
        self.derive, self.meet = DERIVED[name]
        self.hook = lambda q: set_hook(q, change)

    def forward(self, x: Tensor) -> Tensor:
        q = self.derive(self.weight, x)
        if not self.late:
            self.hook(q)
        out = self.meet(x, q)
        if self.late:
            self.hook(q)
        return out


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).tanh().square().flatten(1).sum(1)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("change", [twice, clipped])
@pytest.mark.parametrize("kind", SET)
@pytest.mark.parametrize("name", DERIVED)
def test_they_see_every_samples_gradient(name: str, kind: str, change: Callable[[Tensor], Tensor], *, late: bool) -> None:
    torch.manual_seed(0)
    model, x = Model(name, SET[kind], change, late), torch.randn(N, T, D, dtype=torch.float64)
    rows = torch.stack([torch.autograd.grad(losses(model, x[i : i + 1]).sum(), model.weight)[0] for i in range(N)])
    norms = rows.flatten(1).norm(dim=1)
    with sw.record(model) as rec:
        rec.backward(losses(model, x))
    torch.testing.assert_close(rec.grads()["weight"], rows)
    torch.testing.assert_close(rec.norms(), norms)
    torch.testing.assert_close(rec.weighted_sum(norms)["weight"], torch.einsum("n,nij->ij", norms, rows))
    torch.testing.assert_close(sw.per_sample_norms(model, losses, x), norms)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_a_module_that_changes_its_gradient() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, D, dtype=torch.float64)
            self.table.register_backward_hook(lambda _, grads, __: (2 * grads[0],))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table(PLACES)

    model, x = Table(), torch.randn(N, T, D, dtype=torch.float64)
    rows = [torch.autograd.grad(losses(model, x[i : i + 1]).sum(), model.table.weight)[0] for i in range(N)]
    torch.testing.assert_close(sw.per_sample_grads(model, losses, x)["table.weight"], torch.stack(rows))
    torch.testing.assert_close(sw.per_sample_norms(model, losses, x), torch.stack([row.norm() for row in rows]))
