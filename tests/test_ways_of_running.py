"""Ways in which a model is run, other than forward and backward: what is recorded stays exact, or is refused with a reason.

What a recording leaves behind, and its messages, are in test_recording.py.
"""

import concurrent.futures
import copy
import io
import itertools
import pickle
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import CheckpointError, checkpoint, checkpoint_sequential

import samplewise as sw

N = 3


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


class Net(nn.Module):
    """A forward as a function of the module and its inputs; tensors given are parameters."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)
        self.double()

    def forward(self, *args):
        return self.function(self, *args)


def values(out):
    return (out * (out.cos() + 1.5)).flatten(1).sum(1)


def squares(model, batch):
    return values(model(batch))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def convolutional():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3, stride=2))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(12, 2)).double()


def recurrent():
    torch.manual_seed(0)
    return Net(lambda self, x: self.head(self.rnn(x)[0][:, -1]), rnn=nn.LSTM(4, 3, 2, batch_first=True), head=nn.Linear(3, 2))


def attentive():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)
    return nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 2)).double()


KINDS = {
    "mlp": (mlp, normal(N, 4)),
    "convolutional": (convolutional, normal(N, 2, 6, 6)),
    "recurrent": (recurrent, normal(N, 5, 4)),
    "attentive": (attentive, normal(N, N, 4)),
}


@pytest.fixture(params=KINDS)
def kind(request):
    make, batch = KINDS[request.param]
    return make(), batch.clone()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def alone(model, batch, losses=squares):
    """The truth: every sample run on its own, from the same state, by an ordinary backward."""
    rows = []
    for i in range(len(batch)):
        one = copy.deepcopy(model)
        losses(one, batch[i : i + 1]).sum().backward()
        rows.append({name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for name, p in trained(one).items()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def entries(model, losses):
    """The truth where samples cannot be run alone: the gradient of each entry of the losses."""
    names = trained(model)
    rows = [
        torch.autograd.grad(loss, list(names.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in losses
    ]
    return {name: torch.stack(grads) for name, grads in zip(names, zip(*rows, strict=True), strict=True)}


def recorded(model, batch, losses=squares, **options):
    with sw.record(model, **options) as rec:
        rec.backward(losses(model, batch))
    return rec


def agree(rec, wanted, **tolerances):
    found = rec.grads()
    assert list(found) == list(wanted)
    for name, rows in wanted.items():
        torch.testing.assert_close(found[name], rows, msg=lambda text, name=name: f"{name}: {text}", **tolerances)
    return rec


def exact(model, batch, losses=squares, **options):
    wanted = alone(model, batch, losses)
    rec = agree(recorded(model, batch, losses, **options), wanted)
    assert untouched(model)
    return rec


def untouched(model):
    """No hook, mode or gradient is left."""
    hooks = [m._forward_pre_hooks for m in model.modules()] + [p._backward_hooks for p in model.parameters()]
    return not (
        any(hooks) or any(p.grad is not None for p in model.parameters()) or torch.overrides._get_current_function_mode_stack()
    )


# --- checkpoints ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_whole_model_under_a_checkpoint(kind, reentrant):
    model, batch = kind
    outer = Net(lambda self, x: checkpoint(self.model, self.scale * x, use_reentrant=reentrant), model=model, scale=normal(1))
    plain = Net(lambda self, x: self.model(self.scale * x), model=model, scale=outer.scale.detach())
    agree(recorded(outer, batch), alone(plain, batch))
    assert untouched(outer)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_chain_of_checkpoints(reentrant):
    body = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)) for _ in range(4)))
    model = Net(
        lambda self, x: checkpoint_sequential(self.body, 2, self.first(x), use_reentrant=reentrant),
        body=body,
        first=nn.Linear(4, 4),
    )
    exact(model, normal(N, 5, 4))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_dropout_draws_the_numbers_of_the_plain_run(reentrant):
    """Under a checkpoint also when it is run again."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.3, inplace=True), nn.ReLU(), nn.Linear(8, 2)
    )
    model = Net(
        lambda self, x: (
            self.body(self.first(x)) if reentrant is None else checkpoint(self.body, self.first(x), use_reentrant=reentrant)
        ),
        body=body,
        first=nn.Linear(4, 4),
    )
    plain = Net(lambda self, x: self.body(self.first(x)), body=model.body, first=model.first)
    batch = normal(N, 6, 4)
    torch.manual_seed(5)
    wanted = entries(plain, squares(plain, batch))
    torch.manual_seed(5)
    agree(recorded(model, batch), wanted)
    torch.manual_seed(6)
    assert not torch.allclose(recorded(model, batch).grads()["body.0.weight"], wanted["body.0.weight"])


def test_a_weight_computed_under_a_checkpoint():
    model = Net(
        lambda self, x: F.linear(x, checkpoint(torch.sin, self.weight, use_reentrant=False) * self.scale),
        weight=normal(2, 4),
        scale=normal(2, 1),
    )
    exact(model, normal(N, 4))


def test_nested_checkpoints():
    """The inner one's input is made again in the backward, by a checkpoint that the recording cannot see into."""
    model = Net(
        lambda self, x: checkpoint(
            lambda h: checkpoint(self.b, self.a(h).tanh(), use_reentrant=False), self.first(x), use_reentrant=False
        ),
        first=nn.Linear(4, 4),
        a=nn.Linear(4, 5),
        b=nn.Linear(5, 2),
    )
    with pytest.raises(
        (sw.SampleAxisError, CheckpointError), match=r"could not see into|different number of tensors was saved"
    ):
        recorded(model, normal(N, 4))
    assert untouched(model)


def test_saved_tensors_kept_elsewhere(kind):
    model, batch = kind
    wanted = alone(model, batch)
    with save_on_cpu():
        agree(recorded(model, batch), wanted)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode(kind):
    model, batch = kind
    wanted = alone(model, batch)
    with torch.autograd.detect_anomaly():
        agree(recorded(model, batch), wanted)


# --- precision --------------------------------------------------------------------------------------------------------------------


def near(rec, wanted, tolerance):
    """Relative to the largest entry of each parameter's rows."""
    for name, rows in rec.grads().items():
        error = (rows.double() - wanted[name].double()).abs().max() / wanted[name].double().abs().max()
        assert error < tolerance, f"{name}: {error}"


def under_autocast(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return values(model(batch).float())


def test_autocast(kind):
    model, batch = kind
    model, batch = model.float(), batch.float()
    rec = recorded(model, batch, under_autocast)
    near(rec, alone(model, batch, under_autocast), 0.03)
    assert {rows.dtype for rows in rec.grads().values()} == {torch.float32}
    norms = rec.norms()
    rows = torch.cat([rows.flatten(1) for rows in rec.grads().values()], 1)
    # the rows are rounded to bfloat16, as the loop's are
    torch.testing.assert_close(norms, rows.norm(dim=1), rtol=2e-3, atol=0)
    dots = rec.dot({name: p.detach() for name, p in model.named_parameters()})
    with torch.autocast("cpu", torch.bfloat16):
        # our own arithmetic is not the model's
        torch.testing.assert_close(rec.norms(), norms)
        torch.testing.assert_close(rec.dot({name: p.detach() for name, p in model.named_parameters()}), dots)


def test_a_part_outside_autocast():
    def losses(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model[0](batch)
            with torch.autocast("cpu", enabled=False):
                return values(model[2](hidden.float().tanh()))

    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), normal(N, 6, 4).float()
    near(recorded(model, batch, losses, batch_size=N), alone(model, batch, losses), 0.03)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision(kind, dtype, tolerance):
    model, batch = kind
    model, batch = model.to(dtype), batch.to(dtype)
    rec = recorded(model, batch, lambda m, b: values(m(b).float()))
    near(rec, alone(model, batch, lambda m, b: values(m(b).float())), tolerance)
    assert {rows.dtype for rows in rec.grads().values()} == {dtype}
    rows = torch.cat([rows.flatten(1) for rows in rec.grads().values()], 1).double()
    torch.testing.assert_close(rec.norms().double(), rows.norm(dim=1), rtol=5e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("structure", ["elementwise", "linear"])
def test_sums_of_half_precision_numbers_are_wide(dtype, structure):
    """70,000 ones: more than float16 holds, and than bfloat16 can count."""
    elementwise = structure == "elementwise"
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(70_000 if elementwise else (100, 700), dtype=dtype))
    model.forward = lambda x: x * model.weight if elementwise else x @ model.weight
    batch = torch.ones(2, 70_000 if elementwise else 100, dtype=dtype)
    rec = recorded(model, batch, lambda m, b: m(b).float().sum(1))
    ones = {"weight": torch.ones_like(model.weight)}
    total = torch.full((2,), 70_000.0)
    torch.testing.assert_close(rec.norms(), total.sqrt())
    torch.testing.assert_close(rec.norms(by="parameter")["weight"], total.sqrt())
    torch.testing.assert_close(rec.dot(ones), total)
    torch.testing.assert_close(rec.gram(), total.expand(2, 2))
    torch.testing.assert_close(rec.project({"weight": ones["weight"][None]}), total[:, None])


def test_scaled_losses(kind):
    """As with a gradient scaler: rows scale alike."""
    model, batch = kind
    wanted = alone(model, batch)
    rec = recorded(model, batch, lambda m, b: squares(m, b) * 2.0**10)
    agree(rec, {name: rows * 2.0**10 for name, rows in wanted.items()})


# --- what is trained --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["bias", "weight", "first", "last"])
def test_partly_frozen(kind, part):
    model, batch = kind
    names = [name for name, _ in model.named_parameters()]
    kept = {"first": names[:2], "last": names[-2:]}.get(part, [name for name in names if part in name.split(".")[-1]])
    for name, p in model.named_parameters():
        p.requires_grad_(name in kept)
    assert list(exact(model, batch).grads()) == kept


def test_unfrozen_layer_by_layer(kind):
    model, batch = kind
    model.requires_grad_(False)
    for name, p in reversed(list(model.named_parameters())):
        p.requires_grad_(True)
        assert name in exact(model, batch).grads()


def test_frozen_inside_the_recording():
    """From there on it is a constant."""
    model, batch = mlp(), normal(N, 4)
    with sw.record(model) as rec:
        model[0].requires_grad_(False)
        rec.backward(squares(model, batch))
    assert rec.grads()["0.weight"].eq(0).all()
    agree_on = alone(model, batch)
    for name, rows in agree_on.items():
        torch.testing.assert_close(rec.grads()[name], rows)


def test_unfrozen_inside_the_recording():
    model, batch = mlp(), normal(N, 4)
    model[0].requires_grad_(False)
    with pytest.raises(sw.SamplewiseError, match=r"0\.(weight|bias)"), sw.record(model) as rec:  # noqa: PT012
        model[0].requires_grad_(True)
        rec.backward(squares(model, batch))


def test_nothing_to_train():
    """An error, as in plain PyTorch."""
    model, batch = mlp().requires_grad_(False), normal(N, 4)
    with pytest.raises(RuntimeError, match="losses require no grad"):
        recorded(model, batch)
    assert untouched(model)


def test_evaluation_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 2)).double()
    squares(model, normal(8, 2, 6))
    exact(model.eval(), normal(N, 2, 6))
    assert not model.training


def without_gradient(model, batch):
    with torch.no_grad():
        hidden = model[:2](batch)
    return values(model[2:](hidden))


def in_inference_mode(model, batch):
    with torch.inference_mode():
        hidden = model[:2](batch)
    return values(model[2:](hidden.clone()))


def against_a_teacher(model, batch):
    with torch.no_grad():
        target = model(batch * 2)
    return (model(batch) - target).square().sum(1)


def partly_detached(model, batch):
    out = model(batch)
    return (out * (out.detach() > 0)).sum(1) + (model[0].weight.detach().sum() * out).sum(1)


def against_an_average(model, batch):
    """A teacher with the parameters of another time."""
    frozen = {name: p.detach() * 0.9 for name, p in model.named_parameters()}
    target = torch.func.functional_call(model, frozen, (batch,))
    return (model(batch) - target).square().sum(1)


@pytest.mark.parametrize(
    "losses", [without_gradient, in_inference_mode, against_a_teacher, partly_detached, against_an_average]
)
def test_parts_without_gradients(losses):
    exact(mlp(), normal(N, 4), losses, batch_size=N)


# --- forwards and backwards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_backwards_in_any_order(kind, order):
    model, batch = kind
    views = [batch, batch * 0.5, batch.flip(1)]
    wanted = [alone(model, view) for view in views]
    with sw.record(model) as rec:
        losses = [squares(model, view) for view in views]
        for k in order:
            rec.backward(losses[k])
    agree(rec, {name: sum(rows[name] for rows in wanted) for name in wanted[0]})


def test_two_losses_of_one_forward(kind):
    model, batch = kind
    with sw.record(model) as rec:
        out = model(batch)
        rec.backward(values(out), retain_graph=True)
        rec.backward(out.flatten(1).exp().sum(1))
    agree(rec, alone(model, batch, lambda m, b: values(m(b)) + m(b).flatten(1).exp().sum(1)))


def test_several_scalar_losses_at_once(kind):
    model, batch = kind
    with sw.record(model) as rec:
        out = model(batch)
        torch.autograd.backward([values(out).sum(), out.exp().sum()])
    agree(rec, alone(model, batch, lambda m, b: values(m(b)) + m(b).flatten(1).exp().sum(1)))


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 5, 1), (2, 0, 5)])
def test_clipped_sums_accumulate_over_batches(kind, sizes):
    model, batch = kind
    batch = torch.cat([batch, batch * 0.5, batch.flip(1)])[:7]
    if 0 in sizes and isinstance(model, Net):
        sizes = (2, 5)  # plain PyTorch has no empty LSTM
    rows = alone(model, batch)
    norms = torch.cat([r.flatten(1) for r in rows.values()], 1).norm(dim=1)
    limit = norms.median()
    weights = (limit / norms).clamp_max(1)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for part in batch.split(sizes):
        for name, found in recorded(model, part).clipped_sum(limit.item()).items():
            total[name] += found
    for name, found in total.items():
        torch.testing.assert_close(found, torch.einsum("n,n...->...", weights, rows[name]))


def test_private_training_follows_the_loop(kind):
    """Steps of clipped gradients by samplewise and by a loop end at the same place."""
    model, batch = kind
    other = copy.deepcopy(model)
    for _ in range(3):
        sums, _ = sw.clipped_grads(model, squares, batch, max_grad_norm=1.0)
        rows = alone(other, batch)
        norms = torch.cat([r.flatten(1) for r in rows.values()], 1).norm(dim=1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.sub_(0.1 * sums[name])
            for name, p in other.named_parameters():
                p.sub_(0.1 * torch.einsum("n,n...->...", (1 / norms).clamp_max(1), rows[name]))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_training_goes_on_as_ever(kind):
    """Recordings between the steps of an optimizer change nothing."""
    model, batch = kind
    other = copy.deepcopy(model)
    for one, records in ((model, True), (other, False)):
        optimizer = torch.optim.Adam(one.parameters(), 0.01)
        for _ in range(3):
            if records:
                recorded(one, batch)
            optimizer.zero_grad()
            squares(one, batch).sum().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.equal(q)


QUANTITIES = {
    "factors": lambda rec: rec.factors(),
    "grads": lambda rec: rec.grads(),
    "norms": lambda rec: rec.norms(),
    "norms by parameter": lambda rec: rec.norms(by="parameter"),
    "weighted sum": lambda rec: rec.weighted_sum(torch.ones(N)),
    "clipped sum": lambda rec: rec.clipped_sum(1.0),
    "dot": lambda rec: rec.dot({}),
    "gram": lambda rec: rec.gram(),
    "project": lambda rec: rec.project(sw.GaussianProjection(2, seed=0)),
}


def without_backward(model, batch):
    squares(model, batch)


def with_another_backward(model, batch):
    """What is trained beside the model is none of its losses."""
    squares(model, batch)
    other = mlp()
    squares(other, normal(5, 4)).sum().backward()


def with_gradients_of_the_inputs(model, batch):
    batch.requires_grad_()
    torch.autograd.grad(squares(model, batch).sum(), batch)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("step", [without_backward, with_another_backward, with_gradients_of_the_inputs])
def test_without_a_backward_there_are_no_gradients(step, quantity):
    """Nor are they zero."""
    model = mlp()
    with sw.record(model) as rec:
        step(model, normal(N, 4))
        with pytest.raises(sw.SamplewiseError, match=r"no backward pass .* Call `rec.backward\(losses\)` inside"):
            QUANTITIES[quantity](rec)
    with pytest.raises(sw.SamplewiseError, match="no backward pass"):
        QUANTITIES[quantity](rec)


@pytest.mark.parametrize("size", [0, 1, N])
@pytest.mark.parametrize("backward", [lambda rec, losses: rec.backward(losses), lambda _, losses: losses.sum().backward()])
def test_after_a_backward_that_reaches_no_parameter_they_are_zero(backward, size):
    model, batch = mlp(), normal(size, 4).requires_grad_()
    with sw.record(model) as rec:
        model(batch)
        backward(rec, batch.square().sum(1))
    assert rec.norms().equal(torch.zeros(size, dtype=torch.float64))
    assert not any(rows.any() for rows in rec.grads().values())


def with_its_own_parameters_cloned(model, batch):
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    return torch.func.functional_call(model, parameters, (batch,)).square().sum(1)


def by_a_copy(model, batch):
    return squares(copy.deepcopy(model), batch)


@pytest.mark.parametrize("losses", [with_its_own_parameters_cloned, by_a_copy])
@pytest.mark.parametrize("create_graph", [False, True])
def test_losses_of_another_model_are_refused(losses, create_graph):
    """All gradients would be zero."""
    model, batch, expected = mlp(), normal(N, 4), "no trainable parameter of the recorded model"
    with pytest.raises(sw.SamplewiseError, match=expected):
        sw.per_sample_norms(model, losses, batch, batch_size=N)
    with pytest.raises(sw.SamplewiseError, match=expected):
        recorded(model, batch, losses, batch_size=N, create_graph=create_graph)


@pytest.mark.parametrize("losses", [with_its_own_parameters_cloned, by_a_copy])
def test_a_backward_of_another_model_is_none_of_this_one(losses):
    model, batch = mlp(), normal(N, 4)
    with sw.record(model, batch_size=N) as rec:
        losses(model, batch).sum().backward()
    with pytest.raises(sw.SamplewiseError, match="no backward pass"):
        rec.norms()


@pytest.mark.parametrize("backward", [lambda rec, losses: rec.backward(losses), lambda _, losses: losses.sum().backward()])
def test_a_frozen_model_has_no_gradients(backward):
    """Whatever else is trained, a prompt perhaps."""
    model, prompt = mlp().requires_grad_(False), normal(4).requires_grad_()
    with sw.record(model) as rec:
        backward(rec, squares(model, normal(N, 4) + prompt))
    assert rec.grads() == {}
    assert rec.norms().equal(torch.zeros(N))


@pytest.mark.parametrize("first", [True, False])
def test_another_model_may_have_a_backward_of_its_own(first):
    """By `loss.backward()`, before or after that of the recorded model, or by `rec.backward` after it."""
    model, other, batch = mlp(), nn.Linear(2, 1).double(), normal(N, 4)
    with sw.record(model) as rec:
        out = model(batch)
        if first:
            other(out.detach()).sum().backward()
        rec.backward(squares(lambda _: out, batch), retain_graph=True)
        rec.backward(other(out.detach()).square().sum(1), retain_graph=True)
        other(out.detach()).sum().backward()
    agree(rec, alone(model, batch))


class Dummy(nn.Module):
    """A reentrant checkpoint of samples that require no grad, as is usual: by a tensor that does."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return checkpoint(lambda y, _: self.inner(y), x, torch.ones(1, requires_grad=True), use_reentrant=True)


def test_a_reentrant_checkpoint_hides_the_parameters_until_its_backward():
    model, batch = Dummy(), normal(N, 4)
    agree(recorded(model, batch), alone(model, batch))


def test_another_model_may_have_a_part_in_the_losses():
    """It gets its ordinary gradient; ours are those of the losses."""
    model, head, batch = mlp(), nn.Linear(2, 3).double(), normal(N, 4)
    with sw.record(model) as rec:
        rec.backward(squares(nn.Sequential(model, head), batch))
    wanted = alone(nn.Sequential(model, copy.deepcopy(head).requires_grad_(False)), batch)
    agree(rec, {name.removeprefix("0."): rows for name, rows in wanted.items()})
    assert head.weight.grad is not None


class BuiltAtFirstUse(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4).double()

    def forward(self, x):
        if not hasattr(self, "second"):
            self.second = nn.Linear(4, 2).double()
        return self.second(self.first(x))


def test_a_module_built_inside_the_recording_is_refused():
    model, batch = BuiltAtFirstUse(), normal(N, 4)
    with pytest.raises(sw.SamplewiseError, match=r"second.weight, second.bias was unfrozen, added or replaced"):
        sw.per_sample_norms(model, squares, batch)
    agree(recorded(model, batch), alone(model, batch))


def hooked(model):
    model[0].weight.register_hook(lambda grad: grad)


@pytest.mark.parametrize("backward", [lambda rec, losses: rec.backward(losses), lambda _, losses: losses.sum().backward()])
def test_after_a_refused_backward_there_are_no_gradients(backward):
    """Nor are they zero."""
    model = mlp()
    with sw.record(model) as rec:
        losses = squares(model, normal(N, 4))
        hooked(model)
        with pytest.raises(sw.SamplewiseError, match="has a hook"):
            backward(rec, losses)
    with pytest.raises(sw.SamplewiseError, match="no backward pass"):
        rec.norms()


def test_inputs_get_their_ordinary_gradient(kind):
    model, batch = kind
    plain, given = batch.clone().requires_grad_(), batch.clone().requires_grad_()
    squares(model, plain).sum().backward()
    model.zero_grad()
    wanted = alone(model, batch)
    agree(recorded(model, given), wanted)
    torch.testing.assert_close(given.grad, plain.grad)
    agree(recorded(model, given), wanted)
    torch.testing.assert_close(given.grad, 2 * plain.grad)


def stateful(layers):
    """A recurrent model, and the states it is given: (layers, n, features)."""
    torch.manual_seed(0)
    rnn = nn.LSTM(4, 3, layers, batch_first=True)
    model = Net(lambda self, x, h, c: self.head(self.rnn(x, (h, c))[0]), rnn=rnn, head=nn.Linear(3, 2))
    return model, (normal(layers, N, 3), normal(N, layers, 3).transpose(0, 1).contiguous())


@pytest.mark.parametrize(("layers", "declared"), [(1, False), (2, False), (1, True), (2, True), (N, True)])
def test_states_given_with_the_samples_second(layers, declared):
    (model, states), batch = stateful(layers), normal(N, 5, 4)
    wanted = entries(model, values(model(batch, *states)))
    with sw.record(model, batch_size=N) as rec:
        for state in states if declared else ():
            rec.batched(state, 1)
        rec.backward(values(model(batch, *states)))
    agree(rec, wanted)


def test_as_many_layers_as_samples_have_to_be_declared():
    model, states = stateful(N)
    with pytest.raises(sw.SampleAxisError):
        recorded(model, normal(N, 5, 4), lambda m, b: values(m(b, *states)))


def test_truncated_backpropagation():
    """States run on from part to part, without their gradient."""
    model, batch = recurrent(), normal(N, 6, 4)

    def losses(model, batch):
        state, total = None, 0
        for part in batch.split(2, 1):
            out, state = model.rnn(part, state)
            state = tuple(x.detach() for x in state)
            total = total + values(model.head(out))
        return total

    exact(model, batch, losses, batch_size=N)


def test_activations_keep_their_gradient():
    model, batch = mlp(), normal(N, 4)

    def run(losses_to):
        hidden = model[:2](batch)
        hidden.retain_grad()
        losses_to(values(model[2:](hidden)))
        return hidden.grad

    plain = run(lambda losses: losses.sum().backward())
    model.zero_grad()
    with sw.record(model, batch_size=N) as rec:
        torch.testing.assert_close(run(rec.backward), plain)


def test_adversarial_inputs_made_inside(kind):
    model, batch = kind

    def losses(model, batch):
        batch = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(squares(model, batch).sum(), batch)
        return squares(model, batch.detach() + 0.1 * slope.sign())

    exact(model, batch, losses, batch_size=N)


def test_an_output_scaled_in_the_backward():
    """A hook that treats samples alike is part of the backward."""

    def losses(model, batch):
        hidden = model[:2](batch)
        hidden.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
        return values(model[2:](hidden))

    exact(mlp(), normal(N, 4), losses, batch_size=N)


def doubled(module, args, out):
    return out * 2


def negated(module, grad_input, grad_output):
    return tuple(-grad for grad in grad_input)


@pytest.mark.parametrize("place", [1, 3])
@pytest.mark.parametrize("hook", [("register_forward_hook", doubled), ("register_full_backward_hook", negated)])
def test_hooks_of_modules(place, hook):
    model, (register, function) = mlp(), hook
    getattr(model[place], register)(function)
    plain, batch = alone(mlp(), normal(N, 4)), normal(N, 4)
    rec = agree(recorded(model, batch), alone(model, batch))
    assert not torch.allclose(rec.grads()["0.weight"], plain["0.weight"])


def on_node(method):
    """What registers a hook on the node where a gradient is accumulated, which lives as long as it is held."""

    def register(p, hook):
        node = torch.autograd.graph.get_gradient_edge(p).node
        hook.node = node
        return getattr(node, method)(hook)

    return register


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    "register", [torch.Tensor.register_post_accumulate_grad_hook, on_node("register_hook"), on_node("register_prehook")]
)
def test_hooks_where_gradients_are_accumulated_are_refused(register, create_graph, inside):
    """An optimizer that steps in the backward would never step."""
    model, batch = mlp(), normal(N, 4)

    def hook(*args):
        called.append(args)

    def run():
        with sw.record(model, create_graph=create_graph) as rec:
            losses = squares(model, batch)
            handles.append(register(model[2].bias, hook)) if inside else None
            rec.backward(losses)

    called, handles = [], [] if inside else [register(model[2].bias, hook)]
    with pytest.raises(sw.UnsupportedOpError, match=r"^2.bias: has a hook"):
        run()
    handles[0].remove()
    exact(model, batch, create_graph=create_graph)
    assert not called


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measuring_draws_none_of_the_users_random_numbers(dtype):
    """The first recording on a machine measures; the step after it draws what it would have drawn."""
    before = torch.get_rng_state()
    sw.calibrate("cpu", dtype, again=True)
    assert before.equal(torch.get_rng_state())


# --- where the parameters come from -----------------------------------------------------------------------------------------------


def test_functional_call_with_computed_parameters(kind):
    """As in meta-learning: the parameters handed over are computed from the model's."""
    model, batch = kind

    def losses(model, batch):
        made = {name: p * 2 + 0.1 for name, p in model.named_parameters()}
        return values(torch.func.functional_call(model, made, (batch,)))

    exact(model, batch, losses)


def test_functional_call_with_tied_parameters():
    table = nn.Embedding(6, 4)
    model = Net(lambda self, ids: self.head(self.table(ids)), table=table, head=nn.Linear(4, 6))
    model.head.weight = table.weight
    ids = torch.randint(0, 6, (N, 5), generator=torch.Generator().manual_seed(0))
    call = lambda m, b: values(torch.func.functional_call(m, dict(m.named_parameters()), (b,)))
    assert set(exact(model, ids, call).grads()) == {"table.weight", "head.bias"}


def test_one_flat_parameter():
    """As sharded training keeps them: all weights are slices of one parameter."""

    def forward(self, x):
        weight, bias, gain = self.flat.split([20, 5, 5])
        return F.linear(x, weight.view(5, 4), bias) * gain

    exact(Net(forward, flat=normal(30)), normal(N, 6, 4))


@pytest.mark.parametrize(
    "change", [lambda w: w.div_(w.norm(dim=1, keepdim=True)), lambda w: w.clamp_(-0.3, 0.3), lambda w: w.mul_(1)]
)
def test_weights_changed_in_the_forward(change):
    """In place and without a gradient: renormalised or clipped weights."""

    def forward(self, x):
        with torch.no_grad():
            change(self.inner.weight)
        return self.inner(x) * self.scale

    exact(Net(forward, inner=nn.Linear(4, 3), scale=normal(3)), normal(N, 4))


def test_parameters_of_the_loss_get_their_ordinary_gradient():
    """They are not the model's: their shape says nothing, even where it has n rows."""
    for shape in ((2,), (N, 2)):
        model, batch, weights = mlp(), normal(N, 4), nn.Parameter(normal(*shape))
        losses = lambda m, b, weights=weights: (m(b) * weights).square().sum(1)
        wanted = entries(model, losses(model, batch))
        (ordinary,) = torch.autograd.grad(losses(model, batch).sum(), weights)
        agree(recorded(model, batch, losses), wanted)
        torch.testing.assert_close(weights.grad, ordinary)


def clipped(grad):
    return grad.clamp(-0.1, 0.1)


@pytest.mark.parametrize("derive", [lambda w: w * 2, lambda w: w.t().contiguous().t(), lambda w: w.view(4, 1, 4).squeeze(1)])
def test_hooks_on_derived_weights(derive):
    """Each sample's gradient passes through them on its own."""

    def forward(self, x):
        weight = derive(self.weight)
        weight.register_hook(clipped)
        return F.linear(x, weight)

    exact(Net(forward, weight=normal(4, 4)), normal(N, 4))


def test_a_users_pre_hook_changes_the_input():
    model, batch = mlp(), normal(N, 4)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    agree(recorded(model, batch), alone(mlp(), batch * 2))


def test_a_part_of_the_model_run_before_it():
    """What the recording has not been told yet, it must not guess."""
    batch = normal(N, 4)
    apart = lambda m, b: (m[:2](b)[:, :2] - m(b)).square().sum(1)
    agree(recorded(mlp(), batch, apart, batch_size=N), alone(mlp(), batch, apart))

    def mixed(model, batch):
        hidden = model[:2](batch)[:, :2]
        return (hidden - hidden.mean(0) - model(batch)).square().sum(1)

    with pytest.raises(sw.SamplewiseError):
        recorded(mlp(), batch, mixed, batch_size=N)
    with pytest.raises(sw.SamplewiseError):
        recorded(mlp(), batch, mixed)


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).T


class Rounded(nn.Module):
    """Straight through, as in training for quantisation."""

    def forward(self, x):
        return x + ((x * 4).round() / 4 - x).detach()


def parametrized(*parts):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    for part in parts:
        parametrize.register_parametrization(layer, "weight", part)
    return layer


def pruned():
    torch.manual_seed(0)
    return prune.random_unstructured(nn.Linear(4, 4).double(), "weight", 0.5)


def convolution_under(wrap, **options):
    torch.manual_seed(0)
    layer = wrap(nn.Conv1d(4, 4, 2), **options)
    return Net(lambda self, x: self.layer(x[..., None].expand(-1, -1, 3) * normal(3)), layer=layer)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrized(Symmetric()),
        lambda: parametrized(Rounded()),
        lambda: parametrized(Symmetric(), Rounded()),
        lambda: parametrizations.spectral_norm(mlp()[2]),
        lambda: nn.Sequential(mlp()[0], parametrizations.weight_norm(mlp()[2], dim=1)),
        lambda: nn.Sequential(
            *(parametrizations.orthogonal(nn.Linear(4, 4).double(), orthogonal_map=m) for m in ("cayley", "householder"))
        ),
        lambda: convolution_under(parametrizations.weight_norm),
        lambda: convolution_under(parametrizations.spectral_norm),
        lambda: nn.utils.weight_norm(mlp()[0]),
        lambda: nn.utils.spectral_norm(nn.Linear(4, 3).double()),
        pruned,
    ],
    ids=[
        "symmetric",
        "rounded",
        "both",
        "spectral norm, training",
        "weight norm by columns",
        "orthogonal, two ways",
        "weight norm of a convolution",
        "spectral norm of a convolution",
        "weight norm by hooks",
        "spectral norm by hooks",
        "pruned",
    ],
)
def test_parametrizations(make):
    """Those with a state of their own run each sample from the same state."""
    torch.manual_seed(0)
    model = make()
    batch = normal(N, next(m.in_features for m in model.modules() if isinstance(m, nn.Linear)) if _has_linear(model) else 4)
    wanted = stateless_alone(model, batch)
    agree(recorded(model, batch), wanted)


def _has_linear(model):
    return any(isinstance(m, nn.Linear) for m in model.modules())


def stateless_alone(model, batch):
    """`alone` for models that plain PyTorch cannot copy: weights by hooks are no leaves."""
    rows = []
    for i in range(len(batch)):
        kept = copy.deepcopy(model.state_dict())
        rows.append(torch.autograd.grad(squares(model, batch[i : i + 1]).sum(), list(trained(model).values())))
        model.load_state_dict(kept)
    return {name: torch.stack(grads) for name, grads in zip(trained(model), zip(*rows, strict=True), strict=True)}


def test_a_parametrization_computed_once():
    model, batch = parametrizations.weight_norm(nn.Linear(4, 3).double()), normal(N, 4)

    def losses(model, batch):
        with parametrize.cached():
            return values(model(batch)) + values(model(batch * 2))

    exact(model, batch, losses)


def test_sparse_embeddings():
    """Rows are dense, and the parameter gets no gradient."""
    torch.manual_seed(0)
    ids = torch.tensor([[0, 1, 1], [4, 4, 4], [2, 3, 0]])
    exact(nn.Embedding(6, 2, sparse=True).double(), ids)


def test_lazy_layers_after_their_first_run():
    model, batch = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(2)).double(), normal(N, 4)
    with pytest.raises((ValueError, sw.SamplewiseError), match=r"uninitialized|[Ll]azy"):
        recorded(model, batch)
    squares(model, batch)
    exact(model, batch)


# --- copies -----------------------------------------------------------------------------------------------------------------------


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, pickled, saved]


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("make", [mlp, convolutional, attentive])
def test_copies_before_and_after(duplicate, make):
    model, batch = make(), next(batch for function, batch in KINDS.values() if function is make)
    wanted = alone(model, batch)
    agree(recorded(duplicate(model), batch), wanted)
    recorded(model, batch)
    twin = duplicate(model)
    assert untouched(twin)
    agree(recorded(twin, batch), wanted)


@pytest.mark.parametrize("duplicate", COPIES)
def test_copies_inside_a_recording_have_nothing_of_it(duplicate):
    model, batch = mlp(), normal(N, 4)
    wanted = alone(model, batch)
    with sw.record(model) as rec:
        losses = squares(model, batch)
        twin = duplicate(model)
        rec.backward(losses)
    agree(rec, wanted)
    agree(recorded(twin, batch), wanted)
    assert not any(p._backward_hooks or p.grad is not None for p in twin.parameters())
    squares(twin, batch).sum().backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name].sum(0))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_record_is_not_copied(duplicate):
    rec = recorded(mlp(), normal(N, 4))
    with pytest.raises(TypeError, match="Keep its results"):
        duplicate([rec] if duplicate is not copy.copy else rec)


def test_a_model_without_numbers_is_refused(kind):
    model, batch = kind
    with pytest.raises(sw.UnsupportedOpError, match="on the meta device"):
        recorded(model.to("meta"), batch.to("meta"))


def test_states_inside_a_recording():
    model, batch = mlp(), normal(N, 4)
    average = copy.deepcopy(model)
    with sw.record(model) as rec:
        losses = squares(model, batch)
        with torch.no_grad():
            for p, q in zip(average.parameters(), model.parameters(), strict=True):
                p.lerp_(q + 1, 0.1)
        state = copy.deepcopy(model.state_dict())
        rec.backward(losses)
    agree(rec, alone(model, batch))
    assert all(state[name].equal(p) for name, p in model.named_parameters())


# --- compilation ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield "eager"
    torch._dynamo.reset()


def whole(model, backend):
    return torch.compile(model, backend=backend)


def part(model, backend):
    model[2] = torch.compile(model[2], backend=backend)
    return model


def whole_in_place(model, backend):
    model.compile(backend=backend)
    return model


def part_in_place(model, backend):
    model[2].compile(backend=backend)
    return model


@pytest.mark.parametrize("compiled", [whole, part, whole_in_place, part_in_place])
@pytest.mark.parametrize("warm", [False, True])
def test_compiled_modules_are_refused(compiler, compiled, warm):
    model, batch = compiled(mlp(), compiler), normal(N, 4)
    if warm:
        squares(model, batch)
    with pytest.raises(
        sw.UnsupportedOpError, match=r"(model|2) is compiled by torch.compile.*Record the module that was compiled"
    ):
        recorded(model, batch)
    assert untouched(model)


def test_the_module_that_was_compiled_is_exact(compiler):
    model, batch = mlp(), normal(N, 4)
    compiled = whole(model, compiler)
    squares(compiled, batch)
    exact(compiled._orig_mod, batch)


FUNCTIONS = {
    "activations": lambda h, weight, scale: h.sin() * 2,
    "weights": lambda h, weight, scale: F.linear(h, weight.sin() * scale[:, None]),
    "both": lambda h, weight, scale: F.linear(h, weight).sin(),
}


def through(function):
    return lambda model, batch: values(function(model[:4](batch), model[4].weight, model[4].bias))


@pytest.mark.parametrize(("backend", "warm"), [("eager", True), ("aot_eager", False), ("aot_eager", True)])
def test_compiled_functions_are_exact(compiler, backend, warm):
    batch = normal(N, 4)
    for plain in FUNCTIONS.values():
        model, losses = mlp(), through(torch.compile(plain, backend=backend))
        wanted = alone(model, batch, through(plain))
        if warm:
            alone(model, batch, losses)
        agree(recorded(model, batch, losses, batch_size=N), wanted)


def test_the_compiler_does_not_trace_our_bookkeeping(compiler):
    """It would look at everything that is remembered of earlier calls."""
    model, batch, seen = mlp(), normal(N, 4), []

    def backend(graph, _):
        seen.append(graph)
        return graph

    losses = through(torch.compile(FUNCTIONS["weights"], backend=backend))
    agree(recorded(model, batch, losses, batch_size=N), alone(model, batch, through(FUNCTIONS["weights"])))
    traced = "".join(str(node.meta.get("stack_trace")) for graph in seen for node in graph.graph.nodes)
    assert str(Path(sw.__file__).parent) not in traced


# --- threads ----------------------------------------------------------------------------------------------------------------------


def together(*runs):
    """Run functions in threads that wait for each other at every step; their results."""
    barrier, results = threading.Barrier(len(runs)), [None] * len(runs)

    def work(k, run):
        try:
            results[k] = run(lambda: barrier.wait(20))
        except BaseException as error:  # noqa: BLE001
            results[k] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    return results


def stepwise(model, batch):
    """A recording whose every step waits for the other thread."""

    def run(wait):
        with sw.record(model) as rec:
            wait()
            out = model(batch)
            wait()
            losses = values(out)
            wait()
            rec.backward(losses)
            wait()
            assert len(rec.norms()) == len(batch)
        wait()
        return rec

    return run


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("sizes", [(3, 3), (3, 5)])
def test_recordings_in_two_threads_do_not_see_each_other(same, sizes):
    first, second = mlp(), mlp()
    second = first if same else second
    batches = [normal(8, 4)[: sizes[0]], normal(8, 4).flip(0)[: sizes[1]]]
    records = together(stepwise(first, batches[0]), stepwise(second, batches[1]))
    for rec, batch in zip(records, batches, strict=True):
        agree(rec, alone(mlp(), batch))
    assert untouched(first)


def test_another_thread_trains_while_a_recording_is_open():
    model, batch, others = mlp(), normal(N, 4), normal(7, 4)
    wanted, plain = alone(model, batch), alone(model, others)

    def record(wait):
        with sw.record(model) as rec:
            losses = squares(model, batch)
            wait()
            rec.backward(losses)
            wait()
            wait()
        return rec

    def train(wait):
        wait()
        wait()
        squares(model, others).sum().backward()
        wait()

    rec, _ = together(record, train)
    agree(rec, wanted)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name].sum(0))


def elsewhere(function):
    """What a function returns, or raises, in another thread."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_backward_in_another_thread(kind, reentrant):
    model, batch = kind
    scaled = Net(lambda self, x: self.model(self.scale * x), model=model, scale=normal(1))
    wanted = alone(scaled, batch)
    if reentrant is not None:
        scaled.function = lambda self, x: checkpoint(self.model, self.scale * x, use_reentrant=reentrant)
    with sw.record(scaled) as rec:
        losses = squares(scaled, batch)
        elsewhere(lambda: rec.backward(losses))
    agree(rec, wanted)
    assert untouched(scaled)


def test_a_backward_in_another_thread_sees_what_the_recording_did_not():
    model = Net(
        lambda self, x: self.b(self.a(x)) + Product.apply(x, self.w), a=nn.Linear(4, 5), b=nn.Linear(5, 2), w=normal(2, 4)
    )
    with sw.record(model) as rec:
        losses = squares(model, normal(N, 4))
        with pytest.raises(sw.UnsupportedOpError, match=r"^w: an ordinary gradient reached"):
            elsewhere(lambda: rec.backward(losses))


def begun_by_the_engine(loss):
    edge = torch.autograd.graph.get_gradient_edge(loss)
    torch.autograd.Variable._execution_engine.run_backward((edge,), (torch.ones_like(loss),), False, False, (), True, True)


def begun_without_functions(loss):
    with torch._C.DisableTorchFunction():
        loss.backward()


@pytest.mark.parametrize("reduce", [torch.sum, torch.std])
@pytest.mark.parametrize("begin", [lambda loss: elsewhere(loss.backward), begun_by_the_engine, begun_without_functions])
def test_a_backward_that_the_recording_does_not_see_is_refused(reduce, begin):
    """Nothing would be known of its loss, which may be no sum over the samples."""
    model = mlp()
    with sw.record(model):
        loss = reduce(squares(model, normal(N, 4)))
        with pytest.raises(sw.SamplewiseError, match="does not see it"):
            begin(loss)
    assert untouched(model)


# --- several processes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group():
    """Of this process alone, over no network."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_replicated_models(kind, process_group):
    model, batch = kind
    wanted = {f"module.{name}": rows for name, rows in alone(model, batch).items()}
    for wrap in (nn.parallel.DistributedDataParallel, nn.DataParallel):
        outer = wrap(model)
        agree(recorded(outer, batch), wanted)
        assert untouched(outer)


def on_one_of_two(rank, place):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    model, batch = mlp(), normal(N, 4) * (1 + rank)
    wanted = {f"module.{name}": rows for name, rows in alone(model, batch).items()}
    outer = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        agree(recorded(outer, batch), wanted)
    assert untouched(outer)
    torch.distributed.destroy_process_group()


def test_each_of_two_processes_has_the_rows_of_its_samples(tmp_path):
    torch.multiprocessing.spawn(on_one_of_two, (tmp_path / "meeting",), nprocs=2)


def fully_sharded(model):
    return torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))


def sharded_by_parts(model):
    fully_sharded(model[0])
    return model


def left_whole_after_a_run(model):
    fully_sharded(model)(normal(N, 4))
    return model


def flattened(model, **options):
    return torch.distributed.fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def distributed(model):
    return torch.distributed.tensor.distribute_module(model, torch.distributed.init_device_mesh("cpu", (1,)))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use")
@pytest.mark.parametrize(
    ("shard", "named"),
    [
        (fully_sharded, "0.weight"),
        (sharded_by_parts, "0.weight"),
        (left_whole_after_a_run, "the model"),
        (flattened, "_flat_param"),
        (lambda model: flattened(model).module, "_flat_param"),
        (lambda model: flattened(model, use_orig_params=True), "0.weight"),
        (lambda model: flattened(model, use_orig_params=True).module, "0.weight"),
        (distributed, "0.weight"),
    ],
)
def test_sharded_models_are_refused(process_group, shard, named):
    """The forward swaps their parameters for others."""
    model = shard(mlp())
    with pytest.raises(sw.UnsupportedOpError, match=f"^record: .*{named}.* is sharded"):
        recorded(model, normal(N, 4))


# --- functions of users -----------------------------------------------------------------------------------------------------------


class Reversed(torch.autograd.Function):
    """Gradient reversal (domain adaptation)."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Sign(torch.autograd.Function):
    """Straight through (binary networks)."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin(), x * 2

    @staticmethod
    def backward(ctx, first, second):
        (x,) = ctx.saved_tensors
        return first * x.cos() + second * 2


class ByNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() * 2)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


ON_ACTIVATIONS = {
    "reversed": Reversed.apply,
    "sign": Sign.apply,
    "in place": lambda x: Doubled.apply(x * 1),
    "two results": lambda x: sum(Pair.apply(x)),
}
ON_WEIGHTS = {
    "reversed": lambda w, s: Reversed.apply(w),
    "reversed, scaled": lambda w, s: Reversed.apply(w) * s,
    "sign": lambda w, s: Sign.apply(w),
    "sign, scaled": lambda w, s: Sign.apply(w) * s,
    "scaled, sign": lambda w, s: Sign.apply(w * s) + w,
    "two results": lambda w, s: sum(Pair.apply(w)) * s,
}


@pytest.mark.parametrize("name", ON_ACTIVATIONS)
def test_functions_on_activations(name):
    model = Net(lambda self, x: self.b(ON_ACTIVATIONS[name](self.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 2))
    exact(model, normal(N, 4))


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_functions_on_weights(name):
    """Binary and quantised weights, most often with a learned scale."""
    model = Net(
        lambda self, x: F.linear(x.tanh(), ON_WEIGHTS[name](self.weight, self.scale)) * self.scale[0],
        weight=normal(5, 4),
        scale=normal(5, 1),
    )
    exact(model, normal(N, 4))


def test_a_function_that_leaves_torch_has_to_be_declared():
    def forward(self, x):
        out = ByNumpy.apply(self.a(x))
        return self.b(self.declared(out))

    model = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 2))
    model.declared = lambda out: out
    batch = normal(N, 4)
    wanted = alone(model, batch)
    with pytest.raises(sw.SampleAxisError, match="could not see into"):
        recorded(model, batch)
    with sw.record(model) as rec:
        model.declared = rec.batched
        rec.backward(squares(model, batch))
    agree(rec, wanted)


def test_a_function_on_activations_and_a_weight_is_refused_until_the_weight_is_spread():
    """Only its own backward knows the weight's part of each sample, and it adds them up."""
    model = Net(lambda self, x: Product.apply(self.a(x), self.weight), a=nn.Linear(4, 5), weight=normal(2, 5))
    with pytest.raises(sw.UnsupportedOpError, match=r"^weight: an ordinary gradient reached"):
        recorded(model, normal(N, 4))
    assert untouched(model)
    each = Net(
        lambda self, x: torch.cat([Product.apply(h, self.weight * 1) for h in self.a(x).split(1)]),
        a=model.a,
        weight=model.weight.detach(),
    )
    with pytest.raises(sw.SamplewiseError):
        recorded(each, normal(N, 4))
    exact(Net(lambda self, x: self.a(x) @ self.weight.T, a=model.a, weight=model.weight.detach()), normal(N, 4))


def test_an_error_in_a_users_backward_leaves_nothing():
    class Broken(Sign):
        @staticmethod
        def backward(ctx, grad):
            raise KeyError("on purpose")

    model = Net(lambda self, x: self.b(Broken.apply(self.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 2))
    with pytest.raises(KeyError, match="on purpose"):
        recorded(model, normal(N, 4))
    assert untouched(model)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise MemoryError


@pytest.mark.parametrize(
    ("backward", "create_graph"),
    [
        (lambda rec, losses: rec.backward(losses), False),
        (lambda rec, losses: rec.backward(losses), True),
        (lambda _, losses: losses.sum().backward(), False),
        (lambda rec, losses: elsewhere(lambda: rec.backward(losses)), False),
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_half_a_backward_gives_no_gradients(backward, create_graph, again):
    model = Net(lambda self, x: self.b(Failing.apply(self.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 2))
    with sw.record(model, create_graph=create_graph) as rec:
        batch = normal(N, 4)
        losses = squares(model, batch)
        with pytest.raises(MemoryError):
            backward(rec, losses)
        if again:
            rec.backward(model.a(batch).sum(1))
    for quantity in QUANTITIES.values():
        with pytest.raises(sw.SamplewiseError, match="ended with an error"):
            quantity(rec)


def test_an_interrupt_leaves_nothing():
    model, batch = mlp(), normal(N, 4)
    with pytest.raises(KeyboardInterrupt), sw.record(model):  # noqa: PT012
        model(batch)
        raise KeyboardInterrupt
    assert untouched(model)
    exact(model, batch)


def test_vmap_over_the_samples_is_refused():
    """Its tensors hide the sample axis."""
    model = Net(lambda self, x: torch.func.vmap(self.inner)(x), inner=nn.Linear(N, N))
    with pytest.raises(sw.SamplewiseError):
        recorded(model, normal(N, N))
    assert untouched(model)


def test_vmap_that_mixes_samples_is_not_taken_for_one_that_does_not():
    model = Net(lambda self, x: self.inner(torch.func.vmap(lambda column: column.cumsum(0), 1, 0)(x)), inner=nn.Linear(N, 2))
    with pytest.raises(sw.SamplewiseError):
        recorded(model, normal(N, N))
    assert untouched(model)


# --- sizes ------------------------------------------------------------------------------------------------------------------------


def test_one_sample(kind):
    model, batch = kind
    rec = exact(model, batch[:1])
    torch.testing.assert_close(rec.gram(), rec.norms().square()[:, None])


@pytest.mark.parametrize("again", [False, True])
def test_a_backward_that_never_began_takes_nothing_away(again):
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with sw.record(model, create_graph=again) as rec:
        losses = model(x).square().sum(1)
        with pytest.raises(RuntimeError):
            torch.zeros(()).backward()
        with pytest.raises((RuntimeError, sw.SamplewiseError)):
            losses.backward()
        with pytest.raises(sw.SamplewiseError, match="no backward pass has run"):
            rec.norms()
        rec.backward(losses)
    assert rec.norms().shape == (4,)
