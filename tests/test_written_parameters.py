"""Tensors computed from parameters and written to afterwards: through views, through what they were made of, or by hooks."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samplewise as sw

N = 4


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.w, self.function = nn.Parameter(x(*shape, seed=1)), forward

    def forward(self, batch: Tensor) -> Tensor:
        return self.function(self, batch)


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).abs().square().flatten(1).sum(1)


def exact(model: nn.Module, batch: Tensor) -> None:
    """Every quantity, and the one-call functions, against the loop."""
    assert not sw.verify(model, losses, batch).failures
    rows = sw.per_sample_grads(model, losses, batch)
    flat = torch.cat([part.flatten(1) for part in rows.values()], 1)
    norms = torch.view_as_real(flat).flatten(1).norm(dim=1) if flat.is_complex() else flat.norm(dim=1)
    torch.testing.assert_close(sw.per_sample_norms(model, losses, batch), norms)


def written(change: Callable[[Tensor], object], make: Callable[[Tensor], Tensor] = torch.clone) -> Callable[..., Tensor]:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        w = make(model.w)
        change(w)
        return F.linear(batch, w)

    return forward


CHANGES = {
    "a row scaled": lambda w: w[0].mul_(3.0),
    "an entry": lambda w: w[0].__setitem__(1, 0.0),
    "a column": lambda w: w[:, 0].mul_(2.0),
    "an activation": lambda w: w[0].relu_(),
    "every other entry": lambda w: w.view(-1)[::2].mul_(2.0),
    "a row copied": lambda w: w[0].copy_(w[1].clone()),
    "the diagonal": lambda w: w.diagonal().zero_(),
    "a selected row": lambda w: w.select(0, 0).mul_(3.0),
    "entries set": lambda w: w.view(-1).__setitem__(slice(None, None, 6), 0.0),
    "a list of views": lambda w: torch._foreach_mul_([w[0]], 2.0),
    "twice": lambda w: (w[0].mul_(2.0), w[1:].sin_()),
    "a view of a view": lambda w: w.t()[0].exp_(),
}
MAKES = {
    "clone": torch.clone,
    "times": lambda w: w * 1.5,
    "contiguous": lambda w: w.t().contiguous(),
    "stacked": lambda w: torch.cat([w[:2], w[2:]]),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_derived_weight_written_through_a_view(change: Callable[[Tensor], object], make: Callable[[Tensor], Tensor]) -> None:
    exact(Net(written(change, make), 5, 5), x(N, 5))


def triangular(model: nn.Module, batch: Tensor) -> Tensor:
    lower = torch.zeros(5, 5, dtype=batch.dtype)
    lower.diagonal().copy_(model.w[0].exp())
    for i in range(1, 5):
        lower[i][:i] = model.w[i, :i]
    return batch @ lower


def used_before_and_after(model: nn.Module, batch: Tensor) -> Tensor:
    w = model.w.clone()
    first = F.linear(batch, w.clone())
    view = w[1:]
    w[0].mul_(2.0)
    view.mul_(0.5)
    return first + F.linear(batch, w) + F.linear(batch[:, :5], view).sum(1, keepdim=True)


@pytest.mark.parametrize("forward", [triangular, used_before_and_after])
def test_a_weight_put_together_in_place(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    exact(Net(forward, 5, 5), x(N, 5))


def test_samples_written_into_a_weight_are_still_seen() -> None:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        w = model.w.clone()
        w[0].copy_(batch[0].detach())
        return F.linear(batch, w)

    with pytest.raises(sw.SamplewiseError):
        sw.per_sample_norms(Net(forward, 5, 5), losses, x(N, 5))


def expanded(change: Callable[[Tensor], object], how: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        rows = how(model.w, len(batch))
        change(rows)
        return batch * rows

    return forward


@pytest.mark.parametrize(
    "change", [lambda q: q[:, :2].zero_(), lambda q: q[:, 0].mul_(2.0), lambda q: q.sin_(), lambda q: None]
)
@pytest.mark.parametrize(
    "how", [lambda w, n: w.repeat(n, 1), lambda w, n: w.expand(n, -1).clone(), lambda w, n: (w * 2).repeat(n, 1)]
)
def test_an_expansion_that_is_written_to(change: Callable[[Tensor], object], how: Callable[[Tensor, int], Tensor]) -> None:
    exact(Net(expanded(change, how), 1, 5), x(N, 5))


@pytest.mark.parametrize("change", [lambda a: a.mul_(3.0), lambda a: a[0].__setitem__(0, 5.0), lambda a: a.relu_()])
@pytest.mark.parametrize("use", [torch.mul, lambda a, b: torch.einsum("ni,ni->ni", a, b), torch.add])
def test_what_was_repeated_is_written_to_afterwards(
    change: Callable[[Tensor], object], use: Callable[[Tensor, Tensor], Tensor]
) -> None:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        origin = model.w.clone()
        rows = origin.repeat(len(batch), 1)
        change(origin)
        return use(batch, rows) + origin

    exact(Net(forward, 1, 5), x(N, 5))


@pytest.mark.parametrize("cast", [lambda w: w.to(torch.complex128), lambda w: w.type(torch.cdouble), lambda w: w.cdouble()])
@pytest.mark.parametrize("product", [torch.matmul, lambda a, w: torch.einsum("ni,io->no", a, w)])
def test_a_real_weight_used_as_a_complex_one(
    cast: Callable[[Tensor], Tensor], product: Callable[[Tensor, Tensor], Tensor]
) -> None:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return torch.fft.irfft(product(torch.fft.rfft(batch), cast(model.w)), n=5)

    exact(Net(forward, 3, 3), x(N, 5))


# --- hooks ------------------------------------------------------------------------------------------------------------------------


def doubled(grad: Tensor) -> Tensor:
    return 2 * grad


HOOKS = {
    "on the tensor": lambda e: e.register_hook(doubled),
    "before its node": lambda e: e.grad_fn.register_prehook(lambda grads: (2 * grads[0],)),
    "after its node": lambda e: e.grad_fn.register_hook(lambda given, _: tuple(g if g is None else 2 * g for g in given)),
}


@pytest.mark.parametrize(
    "how", [lambda w, n: w.expand(n, -1), lambda w, n: w.repeat(n, 1), lambda w, n: w.clone().expand(n, -1)]
)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_on_an_expansion(hook: Callable[[Tensor], object], late: bool, how: Callable[[Tensor, int], Tensor]) -> None:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        rows = how(model.w, len(batch))
        if not late:
            hook(rows)
        out = rows * batch
        if late:
            hook(rows)
        return out

    model = Net(forward, 1, 5)
    if not late:
        exact(model, x(N, 5))
        return
    for call in (sw.per_sample_norms, sw.per_sample_grads):
        with pytest.raises(sw.UnsupportedOpError, match="Register the hook before the use"):
            call(model, losses, x(N, 5))
    with sw.record(model) as rec:
        rec.backward(losses(model, x(N, 5)))
    with pytest.raises(sw.UnsupportedOpError, match="Register the hook before the use"):
        rec.norms()


# --- arguments that are written to ------------------------------------------------------------------------------------------------


def test_a_call_that_writes_is_not_taken_for_one_of_which_all_is_known() -> None:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        for _ in range(2):
            mantissa, exponent = torch.zeros(batch.shape, dtype=batch.dtype), torch.zeros(batch.shape, dtype=torch.int32)
            torch.ops.aten.frexp.Tensor_out(batch, mantissa=mantissa, exponent=exponent)
        return F.linear(batch - mantissa.mean(0), model.w)

    with pytest.raises(sw.SamplewiseError):
        sw.per_sample_grads(Net(forward, 6, 5), losses, x(N, 5))


# --- around the recording ---------------------------------------------------------------------------------------------------------


def test_a_hook_put_on_a_parameter_in_the_forward_is_refused() -> None:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        model.w.register_hook(doubled)
        return F.linear(batch, model.w)

    with pytest.raises(sw.UnsupportedOpError, match="has a hook on its gradient"):
        sw.per_sample_norms(Net(forward, 6, 5), losses, x(N, 5))


def on_the_node(model: nn.Module, batch: Tensor) -> Tensor:
    out = F.linear(batch, model.w)
    HOOKS["after its node"](out)
    return out


@pytest.mark.parametrize(
    "forward", [on_the_node, lambda m, b: F.conv1d(on_the_node(m, b)[:, None], torch.ones(1, 1, 1, dtype=b.dtype))]
)
def test_hooks_after_the_node_of_an_op_are_refused(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    for call in (sw.per_sample_norms, sw.per_sample_grads):
        with pytest.raises(sw.UnsupportedOpError, match="register_full_backward_hook"):
            call(Net(forward, 6, 5), losses, x(N, 5))


def test_module_hooks_of_the_old_kind_are_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU()).double()
    model[0].register_backward_hook(lambda _, grads, __: tuple(g if g is None else 2 * g for g in grads))
    with pytest.raises(sw.UnsupportedOpError, match="register_full_backward_hook"):
        sw.per_sample_norms(model, losses, x(N, 5))


@pytest.mark.parametrize("setting", [lambda w: w[0].fill_(0.1), lambda w: w[0].clamp_(-0.1, 0.1), lambda w: w.mul_(0.5)])
def test_a_parameter_set_in_the_forward(setting: Callable[[Tensor], object]) -> None:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            model.w.copy_(x(6, 5, seed=1))
            setting(model.w)
        return F.linear(batch, model.w)

    exact(Net(forward, 6, 5), x(N, 5))


def test_a_parameter_frozen_for_a_part_of_the_forward() -> None:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        model.w.requires_grad_(requires_grad=False)
        first = F.linear(batch, model.w)
        model.w.requires_grad_()
        return first * F.linear(batch, model.w)

    exact(Net(forward, 6, 5), x(N, 5))


def _with_data(value: Tensor) -> Tensor:
    other = torch.zeros_like(value)
    other.data = value * 1.0
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a transpose": lambda t: copy.deepcopy(t.t()).t(),
    "a parameter": lambda t: nn.Parameter(t, requires_grad=False),
    "data set": _with_data,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_of_samples(copied: Callable[[Tensor], Tensor]) -> None:
    exact(Net(lambda model, batch: F.linear(batch - copied(batch).sin(), model.w), 6, 5), x(N, 5))
    with pytest.raises(sw.SamplewiseError):
        sw.per_sample_norms(Net(lambda m, b: F.linear(b - copied(b).mean(0), m.w), 6, 5), losses, x(N, 5))


def gradient_inside(mix: Callable[[Tensor], Tensor], *, property: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        hidden = F.linear(batch, model.w).t()
        leaf = hidden.detach().requires_grad_()
        if property:
            leaf.sin().sum().backward()
            grad = leaf.grad
        else:
            (grad,) = torch.autograd.grad(leaf.sin().sum(), leaf)
        return (hidden - mix(grad)).t()

    return forward


@pytest.mark.parametrize("property", [False, True])
def test_gradients_taken_inside_have_their_samples_where_their_tensor_has_them(property: bool) -> None:
    exact(Net(gradient_inside(torch.sin, property=property), 6, 5), x(N, 5))
    mixing = gradient_inside(lambda g: g.mean(1, keepdim=True), property=property)
    with pytest.raises(sw.SamplewiseError):
        sw.per_sample_norms(Net(mixing, 6, 5), losses, x(N, 5))


def test_a_gradient_of_what_mixes_the_samples() -> None:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        leaf = batch.detach().requires_grad_()
        (grad,) = torch.autograd.grad((leaf - leaf.mean(0)).square().sum().square(), leaf)
        return F.linear(batch - grad, model.w)

    with pytest.raises(sw.SamplewiseError):
        sw.per_sample_norms(Net(forward, 6, 5), losses, x(N, 5))


@pytest.mark.parametrize("dim", [0, 1, -3, -2])
def test_the_samples_counted_from_the_end(dim: int) -> None:
    batch = x(N, 3, 5) if dim % 3 == 0 else x(3, N, 5)

    def sums(model: nn.Module, given: Tensor) -> Tensor:
        return model(given).square().movedim(dim, 0).flatten(1).sum(1)

    for model in (Net(lambda m, b: b * m.w, 5), Net(lambda m, b: F.linear(b, m.w), 6, 5)):
        found = sw.per_sample_grads(model, sums, batch, batch_dim=dim)
        for i, one in enumerate(batch.split(1, dim)):
            torch.testing.assert_close(found["w"][i], torch.autograd.grad(sums(model, one).sum(), model.w)[0])


BEFORE = {
    "a count": lambda y: (y != 0).sum(),
    "weights of classes": lambda y: torch.bincount(y.flatten(), minlength=6)[y].sum(1),
    "the largest": lambda y: y.max(),
    "in place": lambda y: torch.zeros(()).add_(y.double().mean()),
}


@pytest.mark.parametrize("statistic", BEFORE.values(), ids=BEFORE)
def test_statistics_of_the_labels_before_the_model_runs(statistic: Callable[[Tensor], Tensor]) -> None:
    labels = torch.randint(0, 6, (N, 3), generator=torch.Generator().manual_seed(0))

    def normalised(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        scale = statistic(batch[1])
        return F.cross_entropy(model(batch[0]).mT, batch[1], reduction="none").sum(1) / (scale + 1)

    with pytest.raises(sw.SamplewiseError):
        sw.per_sample_norms(Net(lambda m, b: F.linear(b, m.w), 6, 5), normalised, (x(N, 3, 5), labels))


def test_what_keeps_the_samples_apart_before_the_model_runs() -> None:
    labels = torch.randint(0, 6, (N, 3), generator=torch.Generator().manual_seed(0))

    def normalised(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        mask, flat = (batch[1] != 0).double(), batch[1].view(-1)
        counts, inputs = mask.sum(1) + 1, batch[0] / batch[0].norm(dim=-1, keepdim=True)
        each = F.cross_entropy(model(inputs).flatten(0, 1), flat, reduction="none").view_as(mask)
        return (each * mask).sum(1) / counts

    model = Net(lambda m, b: F.linear(b, m.w), 6, 5)
    assert not sw.verify(model, normalised, (x(N, 3, 5), labels)).failures
    norms = sw.per_sample_norms(model, normalised, (x(N, 3, 5), labels))
    alone = [
        torch.autograd.grad(normalised(model, (a, b)).sum(), model.w)[0].norm()
        for a, b in zip(x(N, 3, 5).split(1), labels.split(1), strict=True)
    ]
    torch.testing.assert_close(norms, torch.stack(alone))


def test_a_padding_row_has_no_gradient_whatever_comes() -> None:
    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 5, padding_idx=2).double()

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) / self.table(ids)

    model, ids = Divided(), torch.tensor([[2, 2], [2, 3], [1, 0]])
    found = sw.per_sample_grads(model, losses, ids)["table.weight"]
    for i, row in enumerate(ids.split(1)):
        wanted = torch.autograd.grad(losses(model, row).sum(), model.table.weight)[0]
        torch.testing.assert_close(found[i], wanted, equal_nan=True)


def test_bags_by_the_op_itself_have_no_padding_by_default() -> None:
    table, ids = nn.Parameter(x(7, 5)), torch.full((N, 3), 6)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return torch._embedding_bag(
            model.w, batch.reshape(-1), torch.arange(0, batch.numel(), 3), False, 0, False, None, False, -1
        )[0]

    with pytest.raises(sw.UnsupportedOpError):
        sw.per_sample_norms(Net(forward, *table.shape), losses, ids)


# --- a parameter for every sample, some of whose rows the samples replace -----------------------------------------------------------


def places(b: Tensor) -> Tensor:
    return (b[:, 0] > 0).nonzero()[:, 0]


def spread(p: Tensor, b: Tensor) -> Tensor:
    return p.expand(len(b), *p.shape).clone()


def assigned(t: Tensor, index: object, value: object) -> Tensor:
    t[index] = value
    return t


def everywhere(b: Tensor) -> Tensor:
    return places(b)[:, None].expand(-1, 4)


ROWS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "places set to a number": lambda t, b, _: assigned(t, places(b), 7.0),
    "places set to rows": lambda t, b, h: assigned(t, places(b), h[places(b)]),
    "a mask of rows": lambda t, b, _: assigned(t, b[:, 0] > 0, 7.0),
    "rows of a mask": lambda t, b, h: assigned(t, b[:, 0] > 0, h[b[:, 0] > 0]),
    "a mask of entries": lambda t, b, _: assigned(t, b[:, :1].expand(-1, 4) > 0, 7.0),
    "entries of rows": lambda t, b, _: assigned(t, (places(b), 1), 7.0),
    "the first sample's row": lambda t, b, h: assigned(t, 0, h[0]),
    "the first rows": lambda t, b, h: assigned(t, slice(1), h[:1]),
    "index_fill": lambda t, b, _: t.index_fill(0, places(b), 7.0),
    "index_copy": lambda t, b, h: t.index_copy(0, places(b), h[places(b)]),
    "index_add": lambda t, b, h: t.index_add(0, places(b), h[places(b)]),
    "index_put": lambda t, b, h: t.index_put((places(b),), h[places(b)]),
    "scatter": lambda t, b, h: t.scatter(0, everywhere(b), h[places(b)]),
    "scatter a number": lambda t, b, _: t.scatter(0, everywhere(b), 7.0),
    "scatter along features": lambda t, b, _: t.scatter(1, (b[:, :1] > 0).long(), b[:, :1]),
    "masked_scatter": lambda t, b, h: t.masked_scatter(b[:, :1] > 0, h[b[:, 0] > 0]),
    "index_fill_": lambda t, b, _: t.index_fill_(0, places(b), 7.0),
    "index_copy_": lambda t, b, h: t.index_copy_(0, places(b), h[places(b)]),
    "index_add_": lambda t, b, h: t.index_add_(0, places(b), h[places(b)]),
    "index_put_": lambda t, b, h: t.index_put_((places(b),), h[places(b)]),
    "scatter_": lambda t, b, h: t.scatter_(0, everywhere(b), h[places(b)]),
    "masked_fill_": lambda t, b, _: t.masked_fill_(b[:, :1] > 0, 7.0),
    "select_scatter": lambda t, b, h: t.select_scatter(h[0], 0, 0),
    "slice_scatter": lambda t, b, h: t.slice_scatter(h[:1], 0, 0, 1),
    "masked_scatter_": lambda t, b, h: t.masked_scatter_(b[:, :1].expand(-1, 4) > 0, h[b[:, 0] > 0]),
    "a view's row": lambda t, b, h: t[0].copy_(h[0]) * 0 + t,
    "added to rows": lambda t, b, h: assigned(t, places(b), t[places(b)] + h[places(b)]),
}
SIGNS = {"none": [-1, -1, -1, -1], "one": [-1, -1, 1, -1], "some": [1, -1, 1, -1], "all": [1, 1, 1, 1]}
# into a view of the target
UNKNOWN = {"a view's row"}


class Template(nn.Module):
    def __init__(self, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.b, self.w, self.change = nn.Parameter(x(4, seed=2)), nn.Parameter(x(3, 4, seed=3)), change

    def forward(self, batch: Tensor) -> Tensor:
        return self.change(spread(self.b, batch), batch, batch @ self.w) * batch[:, 1:2]


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("name", ROWS)
def test_rows_that_samples_leave_to_the_parameter(name: str, signs: str) -> None:
    """They are their samples': each has the gradient that the batch's own losses give it."""
    model, batch = Template(ROWS[name]), x(N, 3).abs() * torch.tensor(SIGNS[signs])[:, None]
    found = losses(model, batch)
    parameters = dict(model.named_parameters())
    each = [
        torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in found
    ]
    if name in UNKNOWN:
        with pytest.raises(sw.SamplewiseError):
            sw.per_sample_grads(model, losses, batch)
        return
    rows = sw.per_sample_grads(model, losses, batch)
    for key, *wanted in zip(parameters, *each, strict=True):
        torch.testing.assert_close(rows[key], torch.stack(wanted))


def test_places_in_another_order_are_refused() -> None:
    """A sample's row in another's place says nothing of whose the others are."""
    model = Template(lambda t, b, h: assigned(t, torch.tensor([2, 3]), h[:2]))
    with pytest.raises(sw.SamplewiseError):
        sw.per_sample_grads(model, losses, x(N, 3))


# --- a parameter's rows beside a sample's ---------------------------------------------------------------------------------------------

BESIDE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "after the first sample": lambda p, b, h: torch.cat([h[:1], p.expand(len(b) - 1, 4)]),
    "before the last sample": lambda p, b, h: torch.cat([p.expand(len(b) - 1, 4), h[-1:]]),
    "in a vstack": lambda p, b, h: torch.vstack([h[:1], p.expand(len(b) - 1, 4)]),
    "in a stack": lambda p, b, h: torch.stack([h[0]] + [p * 1 for _ in range(len(b) - 1)]),
    "moved there": lambda p, b, h: torch.roll(torch.cat([p.expand(len(b) - 1, 4), h[:1]]), 1, 0),
    "in a sample's place": lambda p, b, h: torch.cat([h[:1], p[None], h[2:]]),
    "in a sample's place in a stack": lambda p, b, h: torch.stack([h[0], p, *h[2:]]),
    "in the first place": lambda p, b, h: torch.cat([p[None], h[1:]]),
    "after those that are chosen": lambda p, b, h: torch.cat([h[places(b)], p.expand(len(b) - len(places(b)), 4)]),
    "set": lambda p, b, h: assigned(h * 1, 0, p),
    "set in chosen places": lambda p, b, h: assigned(h * 1, places(b), p),
    "set by a mask": lambda p, b, h: assigned(h * 1, b[:, 0] > 0, p),
    "all beside all": lambda p, b, h: torch.cat([p.expand(len(b), 4), h]).view(2, len(b), 4).prod(0),
    "a list for each sample": lambda p, b, h: torch.stack([torch.cat([p[None], row[None]]).sum(0) for row in h]),
}
EXACT = {"set", "set in chosen places", "set by a mask", "all beside all", "a list for each sample"}


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("name", BESIDE)
def test_rows_of_a_parameter_beside_those_of_samples(name: str, signs: str) -> None:
    """The gradients of the batch's own losses, or a refusal."""
    model, batch = Beside(BESIDE[name]), x(N, 3).abs() * torch.tensor(SIGNS[signs])[:, None]
    parameters = dict(model.named_parameters())
    each = [
        torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in losses(model, batch)
    ]
    try:
        rows = sw.per_sample_grads(model, losses, batch)
    except sw.SampleAxisError:
        assert name not in EXACT
        return
    for key, *wanted in zip(parameters, *each, strict=True):
        torch.testing.assert_close(rows[key], torch.stack(wanted))


class Beside(Template):
    def forward(self, batch: Tensor) -> Tensor:
        return self.change(self.b, batch, batch @ self.w) * batch[:, 1:2]


# Found in review: what enters as one sample's row was followed as nobody's, which any pattern fits.
FOREIGN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "over rows that joined": lambda p, b, h: assigned(torch.cat([h[:1], p.expand(len(b) - 1, 4)]), slice(1, None), p),
    "over another's row": lambda p, b, h: assigned(assigned(h * 1, 0, h[1]), 0, p),
    "over rows in another order": lambda p, b, h: assigned(h[[1, 2, 0, 3]] * 1, torch.tensor([1, 2, 0, 3]), p.expand(4, 4) * 1),
    "over all rows": lambda p, b, h: assigned(h * 1, None, p).sum(0) * h,
    "one sample's, out of place": lambda p, b, h: h[0].index_copy(0, torch.arange(4), p) * h,
    "one sample's, scattered": lambda p, b, h: h[:1].scatter(0, torch.zeros(1, 4, dtype=torch.long), p[None]) * h,
    "in two steps": lambda p, b, h: (h * 1).index_copy_(0, torch.zeros(4, dtype=torch.long), p.expand(4, 4)),
    "added in two steps": lambda p, b, h: (h * 1).index_add_(0, torch.zeros(4, dtype=torch.long), p.expand(4, 4)),
    "one entry": lambda p, b, h: assigned(h * 1, (0, 0), p[0]),
    "beside one row": lambda p, b, h: torch.where(h[:1] > 0, p.expand(4, 4), h),
    "beside the row of a mask": lambda p, b, h: (p.expand(4, 4) * 1).masked_fill(h[:1] > 0, h[1, 1].detach()) * h,
    "beside one row of a product": lambda p, b, h: torch.addcmul(p.expand(4, 4) * 1, h[:1], h),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_parameter_where_rows_are_not_their_samples(name: str, create_graph: bool) -> None:
    model, batch = Beside(FOREIGN[name]), x(N, 3)
    losses(model, batch)
    with pytest.raises(sw.SamplewiseError), sw.record(model, create_graph=create_graph) as rec:
        rec.backward(losses(model, batch))
