"""Ops without a rule find the samples of their result also where its values are zero, tiny or alike; against each sample alone."""

import functools

import pytest
import torch
from torch import Tensor, nn

import samplewise as sw
from samplewise import fallback

N, D = 3, 4


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Rows(nn.Module):
    """An op on a parameter and rows `(k, D)`, with a result of k rows."""

    def __init__(self, op, parameter: Tensor, layout=lambda h: h):
        super().__init__()
        self.op, self.layout, self.p = op, layout, nn.Parameter(parameter)

    def forward(self, h: Tensor) -> Tensor:
        return self.op(self.p, self.layout(h)).flatten(1)


def same(model: Rows, batch: Tensor, **options) -> set[str]:
    """The recording's gradients are those of each sample alone, where rows of one value have targets of their own; how they came."""
    rows = model.layout(torch.arange(N)[:, None])[:, 0]
    targets = x(len(rows), 1, seed=5).to(batch.dtype)
    with sw.record(model, batch_size=N, **options) as rec:
        (model(batch) - targets).square().sum().backward()
    alone = [(model(batch[i : i + 1]) - targets[rows == i]).square().sum() for i in range(N)]
    wanted = torch.stack([torch.autograd.grad(loss, model.p)[0] for loss in alone])
    size = float(wanted[wanted.isfinite()].abs().max())
    torch.testing.assert_close(rec.grads()["p"], wanted, rtol=1e-7, atol=1e-9 * size, equal_nan=True)
    return {how for row in rec.coverage().rows for how in row.how}


# --- whose rows are whose ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "samples": lambda h: h,
    "blocks": lambda h: h.repeat(2, 1),
    "rows": lambda h: h.repeat_interleave(2, 0),
    "both": lambda h: h.repeat_interleave(2, 0).repeat(2, 1),
    "other blocks": lambda h: torch.cat([h, h.flip(1)]),
    "other rows": lambda h: torch.stack([h, h.flip(1)], 1).flatten(0, 1),
}


def places(h: Tensor) -> Tensor:
    return h.argsort(1)


def triangles(h: Tensor) -> Tensor:
    return h[:, :, None] * h[:, None, :].tril() + 3 * torch.eye(D, dtype=h.dtype)


def on_steps(p: Tensor, h: Tensor) -> Tensor:
    steps = torch.conv_tbc(torch.stack([h, 2 * h, h.flip(1)]), p, p.new_zeros(2), 1)
    # the backward of conv_tbc wants its gradient contiguous, also without a recording
    return steps.exp().sum((0, 2))[:, None]


OPS = {
    "table[a, b]": ((D, D, D), lambda p, h: p[places(h)[:, 0], places(h)[:, 1]]),
    "table[:, a]": ((D, D), lambda p, h: p[:, places(h)[:, 0]].T),
    "index_select": ((D, D), lambda p, h: torch.index_select(p, 1, places(h)[:, 0]).T),
    "take": ((D * D,), lambda p, h: torch.take(p, D * places(h))),
    "take_along_dim": ((1, D), lambda p, h: torch.take_along_dim(p.expand(len(h), D), places(h), 1)),
    "take_along_dim over samples": ((D, D), lambda p, h: torch.take_along_dim(p, places(h)[:, :1].T, 1).T),
    "gather": ((D,), lambda p, h: p.expand(len(h), D).gather(1, places(h))),
    "gather of a multiple": ((D,), lambda p, h: (2 * p.expand(len(h), D)).gather(1, places(h))),
    "conv_tbc": ((3, D, 2), on_steps),
    "cdist": ((5, D), lambda p, h: torch.cdist(h, p)),
    "diagonal einsum": ((D, D), lambda p, h: torch.einsum("bi,ii->bi", h, p)),
    "solve_triangular": ((D, D), lambda p, h: torch.linalg.solve_triangular(p + 3 * torch.eye(D), h.T, upper=True).T),
    "solve_triangular of samples": ((D, 2), lambda p, h: torch.linalg.solve_triangular(triangles(h), p, upper=False)),
    "cross": ((1, 3), lambda p, h: torch.linalg.cross(h[:, :3], p)),
}
VALUES = {"zero": 0.0, "tiny": 1e-6, "random": 1.0}
DATA = {"random": x(N, D), "alike": x(1, D).repeat(N, 1), "zero": torch.zeros(N, D, dtype=torch.float64)}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_rows_whose_values_are_alike(op, layout, value, data):
    shape, function = OPS[op]
    same(Rows(function, VALUES[value] * x(*shape, seed=3), LAYOUTS[layout]), DATA[data])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_digits_do_not_hide_the_layout(layout, kind):
    model = Rows(OPS["table[a, b]"][1], torch.zeros(D, D, D), LAYOUTS[layout]).to(kind)
    same(model, x(N, D).to(kind))


@pytest.mark.parametrize("times", [1, 2])
def test_blocks_that_the_op_makes(times):
    batch, targets = x(N, D), x(2, N, times, 1, seed=5)
    model = Rows(lambda p, h: torch.kron(p, h.repeat_interleave(times, 0)), torch.zeros(2, 1, dtype=torch.float64))
    with sw.record(model) as rec:
        (model(batch).view(2, N, times, D) - targets).square().sum().backward()
    alone = [(model(batch[i : i + 1]).view(2, times, D) - targets[:, i]).square().sum() for i in range(N)]
    torch.testing.assert_close(rec.grads()["p"], torch.stack([torch.autograd.grad(loss, model.p)[0] for loss in alone]))


# --- what mixes the samples -------------------------------------------------------------------------------------------------------


@functools.cache
def third_party():
    """Ops of a third party that add the parameter's part to its input: by each sample alone, by all, and only for its own values."""
    library = torch.library.Library("fallback", "FRAGMENT")

    def normed(weight: Tensor, h: Tensor) -> Tensor:
        return h + (h - h.mean(0)) * weight

    def noisy(weight: Tensor, h: Tensor) -> Tensor:
        return h * weight + 0 * torch.rand(2)[0]

    def picky(weight: Tensor, h: Tensor) -> Tensor:
        if weight.any():
            raise ValueError("zeros only")
        return h + 0 * weight.sin()

    def picky_and_tiny(weight: Tensor, h: Tensor) -> Tensor:
        return 1e-9 * (picky(weight, h) - h.mean(0))

    for function in (normed, noisy, picky, picky_and_tiny):
        library.define(f"{function.__name__}(Tensor weight, Tensor h) -> Tensor")
        library.impl(function.__name__, function, "CompositeImplicitAutograd")
    return library, torch.ops.fallback


@pytest.mark.parametrize("value", VALUES)
def test_a_part_that_is_zero_now_mixes_all_the_same(value):
    model = Rows(third_party()[1].normed, VALUES[value] * x(D))
    with pytest.raises(sw.MixedSamplesError, match=r"normed: .* something else than on the batch .* 'p'"):
        same(model, x(N, D))


def test_an_op_that_runs_on_no_other_values():
    model = Rows(third_party()[1].picky, torch.zeros(D, dtype=torch.float64))
    assert same(model, x(N, D)) == {"fallback"}
    with pytest.raises(sw.SampleAxisError, match=r"picky: .* alike for all samples"):
        same(model, DATA["alike"])
    mixing = Rows(third_party()[1].picky_and_tiny, torch.zeros(D, dtype=torch.float64))
    with pytest.raises(sw.MixedSamplesError, match=r"picky_and_tiny: .* something else than on the batch"):
        same(mixing, x(N, D))


def test_trials_draw_no_numbers_of_the_model(monkeypatch):
    model, drawn = Rows(third_party()[1].noisy, x(D)), []
    for trials in (3, 0):
        monkeypatch.setattr(fallback, "TRIALS", trials)
        torch.manual_seed(0)
        same(model, x(N, D))
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)


# --- sources with a row for each sample -------------------------------------------------------------------------------------------


def columns(h: Tensor) -> Tensor:
    return torch.tensor([0, 2]).expand(len(h), 2)


WRITES = {
    "scatter": lambda p, h: h.scatter(1, columns(h), p.expand(len(h), 2)),
    "scatter at places of the samples": lambda p, h: h.scatter(1, places(h)[:, :2], p.expand(len(h), 2)),
    "scatter of a multiple": lambda p, h: h.scatter(1, columns(h), 2 * p.expand(len(h), 2)),
    "scatter_": lambda p, h: h.clone().scatter_(1, columns(h), p.expand(len(h), 2)),
    "scatter_add": lambda p, h: h.scatter_add(1, columns(h), p.expand(len(h), 2)).sin(),
    "scatter_add_": lambda p, h: h.clone().scatter_add_(1, columns(h), p.expand(len(h), 2)).sin(),
    **{
        f"scatter_reduce by {by}": lambda p, h, by=by: h.scatter_reduce(1, columns(h), p.expand(len(h), 2), by).sin()
        for by in ("sum", "prod", "mean", "amax", "amin")
    },
    "slice_scatter": lambda p, h: torch.slice_scatter(h, p.expand(len(h), -1), 1, 0, 2),
    "index_copy": lambda p, h: h.index_copy(1, torch.tensor([0, 2]), p.expand(len(h), -1)),
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", WRITES)
def test_an_expanded_source(op, layout, value):
    assert same(Rows(WRITES[op], VALUES[value] * x(2, seed=3), LAYOUTS[layout]), x(N, D)) == {"rows"}


@pytest.mark.parametrize("value", VALUES)
def test_as_many_codes_as_samples_are_no_rows_of_theirs(value):
    assert same(Rows(lambda p, h: torch.cdist(h, p.expand(N, D)), VALUES[value] * x(1, D)), x(N, D)) == {"fallback"}


# --- the order in memory ----------------------------------------------------------------------------------------------------------


@functools.cache
def particular():
    """An op of a third party that makes views, of its operand and of the gradient that comes to it."""
    library = torch.library.Library("particular", "FRAGMENT")

    class Merged(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h, weight):
            ctx.save_for_backward(h, weight)
            return (h.view(-1, h.shape[2]) * weight).view(h.shape)

        @staticmethod
        def backward(ctx, grad):
            h, weight = ctx.saved_tensors
            return grad * weight, (grad.view(-1, h.shape[2]) * h.view(-1, h.shape[2])).sum(0)

    library.define("merged(Tensor h, Tensor weight) -> Tensor")
    library.impl("merged", Merged.apply, "CompositeImplicitAutograd")
    return library, torch.ops.particular.merged


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operands_and_gradients_are_in_the_order_that_the_model_has(layout):
    def op(p: Tensor, h: Tensor) -> Tensor:
        # (steps, rows, D), and a gradient in that order
        return particular()[1](torch.stack([h, h.cos()]), p).exp().sum((0, 2))[:, None]

    assert same(Rows(op, x(D), LAYOUTS[layout]), x(N, D)) == {"fallback"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_operand_keeps_an_order_of_its_own(layout):
    # channels last, of which the op makes a view
    def op(p: Tensor, h: Tensor) -> Tensor:
        images = h.view(-1, 1, 2, 2).expand(-1, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        return third_party_last()[1](images, p)

    # of samples that are alike, so that the trials tell
    assert same(Rows(op, x(6), LAYOUTS[layout]), DATA["alike"]) == {"fallback"}


@functools.cache
def third_party_last():
    library = torch.library.Library("last", "FRAGMENT")
    library.define("last(Tensor h, Tensor weight) -> Tensor")
    library.impl("last", lambda h, weight: h.permute(0, 2, 3, 1).view(len(h), 2, 6) * weight, "CompositeImplicitAutograd")
    return library, torch.ops.last.last
