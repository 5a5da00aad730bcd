"""A traced quantity gives what a recording gives, whatever changed since it was traced, or it is refused."""

import copy
import functools
import gc
import itertools
import math
import os
import random
import sys
import sysconfig
import types
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import samplewise as sw
from samplewise.tracer import Tracer
from test_ways_of_running import KINDS, Net, normal, squares

N = 5
# recorded once, then traced twice
BEFORE = 3


class Count:
    """Calls that no trace sees: the number is in a variable of Python's own."""

    def __init__(self, start):
        os.environ["SAMPLEWISE_CALLS"] = str(start)

    def step(self):
        number = int(os.environ["SAMPLEWISE_CALLS"])
        os.environ["SAMPLEWISE_CALLS"] = str(number + 1)
        return number


def quantities(model, loss_fn, batch):
    """A quantity of a user's own."""
    with sw.record(model) as rec:
        rec.backward(loss_fn(model, batch))
    norms = rec.norms()
    return {"grads": rec.grads(), "norms": norms, "sums": rec.weighted_sum(1 / norms), "gram": rec.gram(), "n": len(norms)}


def equal(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def batch_like(x, seed):
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))


def ready(quantity, model, losses, x, **options):
    """A traced quantity that has made its trace of other batches."""
    run = sw.traced(quantity, model, losses, **options)
    for seed in range(BEFORE):
        run(batch_like(x, seed))
    return run


def again(run, batch, times=BEFORE + 1):
    """As many calls as it takes to make a trace and run it."""
    return [run(batch(seed)) for seed in range(times)]


@pytest.fixture(params=KINDS)
def kind(request):
    make, batch = KINDS[request.param]
    return make(), batch.clone()


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


# --- the same numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantity", "options"),
    [
        (sw.per_sample_grads, {}),
        (sw.per_sample_norms, {}),
        (sw.per_sample_norms, {"strategy": "gram"}),
        (sw.clipped_grads, {"max_grad_norm": 0.5}),
        (quantities, {}),
    ],
)
def test_a_later_batch(kind, quantity, options):
    model, batch = kind
    run = ready(quantity, model, squares, batch, **options)
    for seed in (10, 11):
        fed = batch_like(batch, seed)
        equal(run(fed), quantity(model, squares, fed, **options))


def test_the_model_is_not_run_again(mlp):
    calls, x = Count(0), normal(N, 4)

    def losses(model, batch):
        calls.step()
        return squares(model, batch)

    run = ready(sw.per_sample_norms, mlp, losses, x)
    run(x)
    assert calls.step() == BEFORE


def test_training_sees_its_own_steps(mlp):
    """Values of parameters are read at every call, and gradients are written where they are wanted."""
    one, other = mlp, copy.deepcopy(mlp)
    results = [{name: torch.zeros_like(p) for name, p in model.named_parameters()} for model in (one, other)]
    run = sw.traced(sw.clipped_grads, one, squares, max_grad_norm=0.3, out=results[0])
    for seed in range(8):
        x = batch_like(normal(N, 4), seed)
        for model, sums, found in (
            (one, results[0], run(x)),
            (other, results[1], sw.clipped_grads(other, squares, x, max_grad_norm=0.3, out=results[1])),
        ):
            assert all(found[0][name] is part for name, part in sums.items())
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.sub_(sums[name])
        equal(list(one.parameters()), list(other.parameters()))


def test_batches_of_several_tensors(mlp):
    def losses(model, batch):
        scale = batch["scale"]
        return F.cross_entropy(model(batch["inputs"][0]), batch["labels"], reduction="none") * scale

    def made(seed, scale):
        labels = torch.randint(3, (N,), generator=torch.Generator().manual_seed(seed))
        return {"inputs": (batch_like(normal(N, 4), seed), None), "labels": labels, "scale": scale}

    run = sw.traced(sw.per_sample_norms, mlp, losses)
    for seed in range(10):
        batch = made(seed, 1.5 if seed < 6 else 2.5)
        equal(run(batch), sw.per_sample_norms(mlp, losses, batch))


def test_one_tensor_given_twice_and_then_two(mlp):
    losses = lambda model, batch: (model(batch[0]) * model(batch[1])).sum(1)
    run, x = sw.traced(sw.per_sample_norms, mlp, losses), normal(N, 4)
    for seed in range(5):
        run((y := batch_like(x, seed), y))
    for seed in range(5):
        pair = (batch_like(x, seed), batch_like(x, seed + 1))
        equal(run(pair), sw.per_sample_norms(mlp, losses, pair))


def test_results_are_nobody_elses(mlp):
    run = ready(sw.per_sample_grads, mlp, squares, x := normal(N, 4))
    first = run(x)
    kept = {name: rows.clone() for name, rows in first.items()}
    run(x + 1)
    equal(first, kept)
    for rows in first.values():
        rows.zero_()
    equal(run(x), kept)


@pytest.mark.parametrize("half", [False, True])
def test_autocast(mlp, half):
    """Casts are part of a trace; weights that autocast keeps as they were cast before are not."""
    model, x = mlp.float(), normal(N, 4).float()
    run = sw.traced(sw.per_sample_norms, model, squares)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        for seed in range(6):
            fed = batch_like(x, seed)
            equal(run(fed), sw.per_sample_norms(model, squares, fed))
            with torch.no_grad():
                model[0].weight.mul_(1.1)
    equal(run(x), sw.per_sample_norms(model, squares, x))


def test_a_weight_cast_once():
    """Of a weight that is cast for all samples together, under one autocast around all steps."""
    torch.manual_seed(0)
    model = Net(
        lambda self, x: x @ F.linear(self.w, self.v), w=nn.Parameter(torch.randn(4, 3)), v=nn.Parameter(torch.randn(2, 3))
    )
    run, x, found, wanted = sw.traced(sw.per_sample_norms, model.float(), squares), torch.randn(N, 4), [], []
    before = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        for seed in range(6):
            found.append(run(batch_like(x, seed)))
            model.w.data.mul_(1.5)
    for seed in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            wanted.append(sw.per_sample_norms(before, squares, batch_like(x, seed)))
        before.w.data.mul_(1.5)
    # before that, autocast itself has what it cast first
    equal(found[BEFORE:], wanted[BEFORE:])


def test_random_numbers_are_drawn_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double().train()
    run, x = ready(sw.per_sample_norms, model, squares, normal(N, 4)), normal(N, 4)
    torch.manual_seed(1)
    found = [run(x), run(x)]
    assert not found[0].equal(found[1])
    torch.manual_seed(1)
    equal(found, [sw.per_sample_norms(model, squares, x) for _ in range(2)])


def test_buffers_are_read_and_written():
    torch.manual_seed(0)
    make = lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, affine=True, track_running_stats=True)).double().train()
    )
    one = make()
    other, x = copy.deepcopy(one), normal(N, 2, 5, 5)
    run = sw.traced(sw.per_sample_norms, one, squares)
    for seed in range(6):
        fed = batch_like(x, seed)
        equal(run(fed), sw.per_sample_norms(other, squares, fed))
    equal(dict(one.named_buffers()), dict(other.named_buffers()))
    one.eval()
    one[1].running_mean.add_(1)
    for seed in range(5):
        equal(run(batch_like(x, seed)), sw.per_sample_norms(one, squares, batch_like(x, seed)))
        one[1].running_var.mul_(1.5)


def test_a_number_that_python_made(mlp):
    losses = lambda model, batch: (
        squares(model, batch) * torch.tensor([2.0, 3.0], dtype=torch.float64).sum() + torch.arange(2.0).sum()
    )
    run = ready(sw.per_sample_norms, mlp, losses, x := normal(N, 4))
    equal(run(x), sw.per_sample_norms(mlp, losses, x))


def test_a_shape_changed_in_place(mlp):
    def losses(model, batch):
        out = model(batch)
        aside = out.detach().mul(2).detach()
        aside.unsqueeze_(0)
        return (out * aside[0]).sum(1)

    run = ready(sw.per_sample_norms, mlp, losses, x := normal(N, 4))
    equal(run(x), sw.per_sample_norms(mlp, losses, x))


# --- what has changed since ---------------------------------------------------------------------------------------------------

CHANGES = {
    "frozen": lambda model: model[0].weight.requires_grad_(False),
    "replaced": lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight.detach() * 2)),
    "other memory": lambda model: setattr(model[0].weight, "data", model[0].weight.detach() * 2),
    "turned": lambda model: setattr(model[0].weight, "data", (model[0].weight.detach() * 2).T.contiguous().T),
    "tied": lambda model: setattr(model[0], "bias", nn.Parameter(model[0].bias.detach()[:6])),
    "another activation": lambda model: model.__setitem__(1, nn.Sigmoid()),
    "a part more": lambda model: model.append(nn.Linear(3, 3).double()),
    "a part less": lambda model: model.pop(2),
    "a hook": lambda model: model[1].register_forward_hook(lambda *args: args[-1] * 2),
    "a hook before": lambda model: model[1].register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    "a forward": lambda model: setattr(model[1], "forward", lambda x: x * 3),
    "parametrized": lambda model: nn.utils.parametrizations.weight_norm(model[0]),
    "values": lambda model: model.load_state_dict({name: x * 2 for name, x in model.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed(mlp, change):
    run = ready(sw.per_sample_grads, mlp, squares, x := normal(N, 4))
    CHANGES[change](mlp)
    for seed in range(5):
        fed = batch_like(x, seed)
        equal(run(fed), sw.per_sample_grads(mlp, squares, fed))


def test_training_and_evaluation_in_turn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    run, x = sw.traced(sw.per_sample_norms, model, squares), normal(N, 4)
    for k in range(10):
        model.train(k % 2 == 0)
        torch.manual_seed(k)
        found = run(x)
        torch.manual_seed(k)
        equal(found, sw.per_sample_norms(model, squares, x))
    model[1].p = 0.9
    model.train()
    torch.manual_seed(0)
    found = run(x)
    torch.manual_seed(0)
    equal(found, sw.per_sample_norms(model, squares, x))


@pytest.mark.parametrize("n", [1, 0])
def test_batches_of_another_size(mlp, n):
    run = ready(sw.per_sample_norms, mlp, squares, x := normal(N, 4))
    for seed in range(5):
        for fed in (batch_like(x, seed), batch_like(x[:n], seed), batch_like(x.T.contiguous(), seed).T):
            equal(run(fed), sw.per_sample_norms(mlp, squares, fed))


def test_more_kinds_than_are_kept(mlp):
    run = sw.traced(sw.per_sample_norms, mlp, squares)
    for k in [*range(1, 12), *range(1, 12)] * 2:
        fed = batch_like(torch.empty(k, 4, dtype=torch.float64), k)
        equal(run(fed), sw.per_sample_norms(mlp, squares, fed))
    assert len(run._known) <= 8


FACTOR = 2.0


class Losses:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, model, batch):
        return squares(model, batch) * self.factor

    def method(self, model, batch):
        return self(model, batch)


class Criterion(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, model, batch):
        return squares(model, batch) * self.factor


def scaled(model, batch, factor=1.0):
    return squares(model, batch) * factor


def of_a_variable():
    factor = 2.0

    def losses(model, batch):
        return squares(model, batch) * factor

    def change():
        nonlocal factor
        factor = 3.0

    return losses, change


def of_a_global():
    return (lambda model, batch: squares(model, batch) * FACTOR), lambda: globals().update(FACTOR=3.0)


def of_an_object(make):
    found = make(2.0)
    return found, lambda: setattr(found, "factor", 3.0)


def of_a_method():
    found = Losses(2.0)
    return found.method, lambda: setattr(found, "factor", 3.0)


def of_a_partial():
    found = functools.partial(scaled, factor=2.0)
    return found, lambda: found.keywords.update(factor=3.0)


def of_a_default():
    found = lambda model, batch, factor=2.0: scaled(model, batch, factor)
    return found, lambda: setattr(found, "__defaults__", (3.0,))


@pytest.mark.parametrize(
    "made",
    [
        of_a_variable,
        of_a_global,
        lambda: of_an_object(Losses),
        lambda: of_an_object(Criterion),
        of_a_method,
        of_a_partial,
        of_a_default,
    ],
)
def test_a_number_of_the_losses_that_changed(mlp, made):
    losses, change = made()
    run = ready(sw.per_sample_norms, mlp, losses, x := normal(N, 4))
    before = run(x)
    change()
    for seed in range(5):
        fed = batch_like(x, seed)
        equal(run(fed), sw.per_sample_norms(mlp, losses, fed))
    torch.testing.assert_close(run(x), before * 1.5)


def test_a_tensor_of_the_losses_is_read(mlp):
    factor = torch.tensor(2.0, dtype=torch.float64)
    run = ready(sw.per_sample_norms, mlp, lambda model, batch: squares(model, batch) * factor, x := normal(N, 4))
    before = run(x)
    factor.fill_(3.0)
    torch.testing.assert_close(run(x), before * 1.5)


# --- refused, with the call itself left to take --------------------------------------------------------------------------------


def reads(how):
    return lambda model, batch: squares(model, batch) * how(batch)


@pytest.mark.parametrize(
    "losses",
    [
        reads(lambda batch: batch.max().item()),
        reads(lambda batch: 2.0 if (batch + torch.rand(())).max() > 9 else 1.0),
        lambda model, batch: squares(model, batch) * (2.0 if (model(batch) > 9).any() else 1.0),
        lambda model, batch: squares(model, batch) * (2.0 if model[0].weight.any() else 1.0),
        lambda model, batch: squares(model, batch) * (2.0 if torch.zeros_like(batch).copy_(batch).any() else 1.0),
        reads(lambda batch: float(batch[0, 0])),
        reads(lambda batch: batch[0].tolist()[0]),
        reads(lambda batch: float(batch.numpy()[0, 0])),
        reads(lambda batch: float(np.asarray(batch)[0, 0])),
        reads(lambda batch: len(batch[batch[:, 0] > 0])),
        reads(lambda batch: len(batch.nonzero())),
        lambda model, batch: squares(model, batch) * model[0].weight.sum().item(),
    ],
)
def test_values_that_are_read(mlp, losses):
    run, x = sw.traced(sw.per_sample_norms, mlp, losses), normal(N, 4)
    run(x)
    with pytest.raises(sw.UnsupportedOpError, match=r"^traced: .*[cC]all the function itself"):
        again(run, lambda seed: batch_like(x, seed))
    assert not torch._C._len_torch_dispatch_stack()


def test_a_yes_or_no_of_the_batch(mlp):
    """As language models ask whether there is any padding."""

    def losses(model, batch):
        x, mask = batch
        total = squares(model, x)
        if not mask.all():
            total = total * mask.double().mean(1)
            if (mask.sum(1) == torch.tensor(1)).any():
                total = total * 2
        return total

    x, full = normal(N, 4), torch.ones(N, 3, dtype=torch.bool)
    some, one = full.clone(), full.clone()
    some[1, 2], one[1, 1:] = False, False
    run = sw.traced(sw.per_sample_norms, mlp, losses)
    for seed in range(30):
        batch = (batch_like(x, seed), [full, some, one][seed % 3].clone())
        equal(run(batch), sw.per_sample_norms(mlp, losses, batch))
    assert len(next(iter(run._known.values())).sure) == 3


def test_numbers_of_the_librarys_own_are_read(mlp):
    """What it tells by example is no value of the batch."""
    losses = lambda model, batch: model(batch.flip(0).roll(1, 0).roll(-1, 0).flip(0)).square().sum(1)
    run = ready(sw.per_sample_norms, mlp, losses, x := normal(N, 4))
    equal(run(x), sw.per_sample_norms(mlp, losses, x))


def test_packed_sequences():
    torch.manual_seed(0)
    model = Net(lambda self, x: self.rnn(x)[1][0][-1], rnn=nn.LSTM(4, 3, batch_first=True)).double()

    def losses(model, batch):
        sequences, lengths = batch
        return model(nn.utils.rnn.pack_padded_sequence(sequences, lengths, batch_first=True)).square().sum(1)

    run, batch = sw.traced(sw.per_sample_norms, model, losses), (normal(3, 4, 4), torch.tensor([4, 2, 1]))
    run(batch)
    with pytest.raises(sw.UnsupportedOpError, match=r"^traced: "):
        run(batch)


def test_steps_that_python_decides(mlp):
    calls = Count(1)

    def losses(model, batch):
        return squares(model, batch) * calls.step()

    run, x = sw.traced(sw.per_sample_norms, mlp, losses), normal(N, 4)
    with pytest.raises(sw.UnsupportedOpError, match=r"two batches of one kind took different steps: `.*mul.* and `.*mul"):
        again(run, lambda _: x)


def test_numbers_of_pythons_that_change(mlp):
    calls = Count(1)

    def losses(model, batch):
        return squares(model, batch) * torch.tensor([float(calls.step())])

    run, x = sw.traced(sw.per_sample_norms, mlp, losses), normal(N, 4)
    with pytest.raises(sw.UnsupportedOpError, match=r"took different steps"):
        again(run, lambda _: x)


def test_a_model_that_changes_itself(mlp):
    class Counting(nn.Sequential):
        count = 0

        def forward(self, x):
            self.count += 1
            return super().forward(x) * self.count

    model = Counting(*mlp)
    run, x = sw.traced(sw.per_sample_norms, model, squares), normal(N, 4)
    with pytest.raises(sw.UnsupportedOpError, match=r"^traced: an attribute .* changed in the call \(to int\)"):
        again(run, lambda _: x)


def test_a_table_that_is_made_once(mlp):
    class Tabled(nn.Sequential):
        table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.ones(4, dtype=x.dtype) * 2
            return super().forward(x * self.table)

    model = Tabled(*mlp)
    run = ready(sw.per_sample_norms, model, squares, x := normal(N, 4))
    equal(run(x), sw.per_sample_norms(model, squares, x))
    assert next(iter(run._known.values())).sure


def test_ordinary_gradients(mlp):
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    run, x = sw.traced(sw.per_sample_norms, mlp, lambda model, batch: squares(model, batch) * scale), normal(N, 4)
    run(x)
    with pytest.raises(sw.UnsupportedOpError, match=r"accumulates or reads the `.grad` of a tensor of shape \(\)"):
        run(x)
    scale.requires_grad_(False)
    for seed in range(4):
        equal(run(batch_like(x, seed)), sw.per_sample_norms(mlp, squares, batch_like(x, seed)))


def test_a_batch_with_a_history(mlp):
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    run, x = sw.traced(sw.per_sample_norms, mlp, squares, batch_size=N), normal(N, 4)
    with pytest.raises(sw.SamplewiseError):
        again(run, lambda _: x * w)


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_in_a_checkpoint(reentrant):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).double()
    model = Net(
        lambda self, x: self.head(checkpoint(self.body, self.first(x), use_reentrant=reentrant)),
        first=nn.Linear(4, 4).double(),
        body=body,
        head=nn.Linear(4, 2).double(),
    )
    run, x = sw.traced(sw.per_sample_norms, model, squares), normal(N, 4)
    run(x)
    with pytest.raises(sw.UnsupportedOpError, match=r"^traced: .* draws random numbers after the generator was set"):
        run(x)
    model.eval()
    for seed in range(5):
        equal(run(batch_like(x, seed)), sw.per_sample_norms(model, squares, batch_like(x, seed)))


def test_a_generator_of_its_own(mlp):
    generator = torch.Generator().manual_seed(0)
    noisy = lambda model, batch: squares(model, batch + torch.randn(4, dtype=torch.float64, generator=generator))
    run, x = sw.traced(sw.per_sample_norms, mlp, noisy), normal(N, 4)
    run(x)
    with pytest.raises(sw.UnsupportedOpError, match=r"^traced: .* takes a Generator"):
        run(x)


def test_memory_that_is_set(mlp):
    def losses(model, batch):
        aside = torch.zeros_like(batch)
        aside.data = batch.detach()
        return squares(model, batch + aside)

    run, x = sw.traced(sw.per_sample_norms, mlp, losses, batch_size=N), normal(N, 4)
    with pytest.raises(sw.SamplewiseError):
        again(run, lambda _: x)


@pytest.mark.parametrize("batch", [{1, 2}, [np.ones(3)], {"x": object()}, torch.eye(3).to_sparse()])
def test_batches_that_cannot_be_seen_into(mlp, batch):
    with pytest.raises(TypeError, match=r"^traced: a batch is made of dense tensors and plain values"):
        sw.traced(sw.per_sample_norms, mlp, squares)(batch)


def test_an_error_leaves_nothing_behind(mlp):
    def losses(model, batch):
        if fails:
            raise ArithmeticError("on purpose")
        return squares(model, batch)

    fails, x = False, normal(N, 4)
    run = sw.traced(sw.per_sample_norms, mlp, losses)
    run(x)
    for fails in (True, False):
        for _ in range(4):
            if fails:
                with pytest.raises(ArithmeticError):
                    run(x)
            else:
                equal(run(x), sw.per_sample_norms(mlp, losses, x))
    assert not torch._C._len_torch_dispatch_stack()
    assert not torch.overrides._get_current_function_mode_stack()


# --- found in review ----------------------------------------------------------------------------------------------------------


def tensor_of(value):
    return torch.tensor(value, dtype=torch.float64)


def changed(net, change, losses=squares, quantity=sw.per_sample_norms, x=None):
    """A trace, a change, and then the call itself beside it, or a refusal of both or of the trace."""
    x = normal(N, 4) if x is None else x
    run = sw.traced(quantity, net, losses)
    try:
        again(run, lambda seed: batch_like(x, seed))
    except sw.UnsupportedOpError as error:
        if not str(error).startswith("traced: "):
            raise
        return
    change()
    for seed in range(5):
        fed = batch_like(x, seed)
        equal(run(fed), quantity(net, losses, fed))


class Fed(nn.Module):
    """A linear layer of what a function makes of the input."""

    def __init__(self, function, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = nn.Linear(width, 2).double(), function
        self.register_buffer("number", tensor_of(1.0))
        self.register_buffer("index", torch.tensor(1))
        self.register_buffer("places", torch.tensor([1]))
        self.config, self.numbers, self.hidden = SimpleNamespace(factor=2.0), [2.0], (nn.Dropout(0.5),)

    def forward(self, x):
        return self.layer(self.function(self, x))


VALUES_READ = {
    "an index in a list": (lambda self, x: x[:, [self.index, 0, 1, 2]], lambda net: net.index.add_(1)),
    "an index in a tuple": (lambda self, x: x[:, (self.index, 0, 1, 2)], lambda net: net.index.add_(1)),
    "a list of tensors": (lambda self, x: x * torch.tensor([self.number, 1.0, 2.0, 3.0]), lambda net: net.number.fill_(5)),
    "as_tensor": (lambda self, x: x * torch.as_tensor([self.number, 1.0, 2.0, 3.0]), lambda net: net.number.fill_(5)),
    "new_tensor": (lambda self, x: x * x.new_tensor([self.number, 1.0, 2.0, 3.0]), lambda net: net.number.fill_(5)),
    "Tensor": (lambda self, x: x * torch.DoubleTensor([self.number, 1.0, 2.0, 3.0]), lambda net: net.number.fill_(5)),
    "places to split at": (
        lambda self, x: torch.cat([part * (k + 1) for k, part in enumerate(x.tensor_split(self.places, 1))], 1),
        lambda net: net.places.fill_(2),
    ),
}


@pytest.mark.parametrize("case", VALUES_READ)
def test_values_read_without_an_op(case):
    function, change = VALUES_READ[case]
    net = Fed(function)
    changed(net, lambda: change(net))


def by_numpy(_, x):
    mask = torch.zeros(4, dtype=x.dtype)
    mask.numpy()[:] = (1, 2, 3, 4)
    return x * mask


def through_numpy(_, x):
    numbers = np.zeros(4)
    made = torch.from_numpy(numbers)
    numbers[:] = 2
    return x * made


@pytest.mark.parametrize("function", [by_numpy, through_numpy, lambda self, x: x * self.number.clone().apply_(lambda v: v + 2)])
def test_memory_written_without_an_op(function):
    changed(Fed(function), lambda: None)


def seeded(_, x):
    torch.manual_seed(0)
    return x + torch.randn_like(x)


def forked(_, x):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return x + torch.randn_like(x)


@pytest.mark.parametrize(
    "function",
    [seeded, forked, lambda _, x: x * 2 if random.random() < 0.9 else x, lambda _, x: x * float(np.random.rand() < 0.9)],  # noqa: NPY002
)
def test_generators_that_are_moved(function):
    net, x = Fed(function), normal(N, 4)
    run = sw.traced(sw.per_sample_norms, net, squares)
    run(x)
    with pytest.raises(sw.UnsupportedOpError, match=r"^traced: .*(generator was set|random numbers of Python's or numpy's)"):
        run(x)


def test_results_with_a_graph(mlp):
    def penalty(model, loss_fn, batch):
        with sw.record(model, create_graph=True) as rec:
            rec.backward(loss_fn(model, batch))
        return rec.norms()

    run, x = sw.traced(penalty, mlp, squares), normal(N, 4)
    assert run(x).requires_grad
    with pytest.raises(sw.UnsupportedOpError, match=r"^traced: a result of shape \(5,\) has a graph"):
        run(x)


def test_results_that_cannot_be_seen_into(mlp):
    def quantity(model, loss_fn, batch):
        return SimpleNamespace(norms=sw.per_sample_norms(model, loss_fn, batch))

    run, x = sw.traced(quantity, mlp, squares), normal(N, 4)
    run(x)
    with pytest.raises(sw.UnsupportedOpError, match=r"^traced: the results hold a SimpleNamespace"):
        run(x)


def test_results_with_other_numbers(mlp):
    calls = Count(0)

    def quantity(model, loss_fn, batch):
        return {"norms": sw.per_sample_norms(model, loss_fn, batch), "call": calls.step()}

    run, x = sw.traced(quantity, mlp, squares), normal(N, 4)
    with pytest.raises(sw.UnsupportedOpError, match=r"the results were others"):
        again(run, lambda _: x)


def test_a_result_that_is_a_detached_parameter(mlp):
    run = ready(lambda model, *_: model[0].weight.detach(), mlp, squares, x := normal(N, 4))
    assert not run(x).requires_grad


CRITERION, TEACHER, ALPHA = nn.CrossEntropyLoss(reduction="none"), nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double(), 1.0
CONFIG = {"alpha": 1.0, "more": [SimpleNamespace(alpha=1.0)]}


def by_a_criterion(model, batch):
    return CRITERION(model(batch), torch.arange(len(batch)) % 2)


def by_a_teacher(model, batch):
    with torch.no_grad():
        wanted = TEACHER(batch)
    return (model(batch) - wanted[:, : model(batch).shape[1]]).square().sum(1)


def inside_a_comprehension(model, batch):
    return sum([ALPHA * squares(model, batch) for _ in range(2)])


@torch.autocast("cpu", enabled=False)
def decorated(model, batch):
    return ALPHA * squares(model, batch)


class Called:
    def __call__(self, model, batch):
        return ALPHA * squares(model, batch)


def by_a_table(model, batch):
    return squares(model, batch) * CONFIG["alpha"] * CONFIG["more"][0].alpha


def with_an_attribute(model, batch):
    return squares(model, batch) * with_an_attribute.alpha


def by_a_helper(model, batch):
    return inside_a_comprehension(model, batch)


with_an_attribute.alpha = 1.0
BY_LOSSES = {
    "an attribute of a criterion": (by_a_criterion, lambda: setattr(CRITERION, "label_smoothing", 0.3)),
    "the mode of another model": (by_a_teacher, TEACHER.eval),
    "the parameters of another model": (
        by_a_teacher,
        lambda: TEACHER.load_state_dict({name: x + 1 for name, x in TEACHER.state_dict().items()}, assign=True),
    ),
    "a global in a comprehension": (inside_a_comprehension, lambda: globals().update(ALPHA=3.0)),
    "a global in a helper": (by_a_helper, lambda: globals().update(ALPHA=3.5)),
    "a global under a decorator": (decorated, lambda: globals().update(ALPHA=4.0)),
    "a global of a class": (Called(), lambda: globals().update(ALPHA=5.0)),
    "an entry of a table": (by_a_table, lambda: CONFIG.update(alpha=2.0)),
    "an entry further in": (by_a_table, lambda: setattr(CONFIG["more"][0], "alpha", 2.0)),
    "an attribute of the function": (with_an_attribute, lambda: setattr(with_an_attribute, "alpha", 2.0)),
}


@pytest.mark.parametrize("case", BY_LOSSES)
def test_what_the_losses_use(mlp, case):
    losses, change = BY_LOSSES[case]
    TEACHER.eval() if "parameters" in case else TEACHER.train()
    torch.manual_seed(0)
    run, x = sw.traced(sw.per_sample_norms, mlp, losses), normal(N, 4)
    again(run, lambda seed: batch_like(x, seed))
    change()
    for seed in range(5):
        torch.manual_seed(seed)
        found = run(batch_like(x, seed))
        torch.manual_seed(seed)
        equal(found, sw.per_sample_norms(mlp, losses, batch_like(x, seed)))


def test_a_number_that_changes_at_every_step(mlp):
    """Right, and no faster, which is said."""
    factor, x = 0.0, normal(N, 4)
    losses = lambda model, batch: squares(model, batch) * factor
    run = sw.traced(sw.per_sample_norms, mlp, losses)

    def step(number):
        nonlocal factor
        factor = number / 100
        equal(run(x), sw.per_sample_norms(mlp, losses, x))

    for number in range(49):
        step(number)
    with pytest.warns(UserWarning, match=r"^traced: 50 calls in a row .* so each was recorded"):
        step(49)
    step(50)


def test_two_flags_of_which_one_is_none(mlp):
    first, second = None, True

    def losses(model, batch):
        total = squares(model, batch) * 2 if first else squares(model, batch)
        return total * 3 if second else total

    def change():
        nonlocal first, second
        first, second = True, None

    changed(mlp, change, losses)


def switched(net):
    net.hidden[0].eval()


BY_MODEL = {
    "an object": (lambda self, x: x * self.config.factor, lambda net: setattr(net.config, "factor", 3.0)),
    "a list": (lambda self, x: x * self.numbers[0], lambda net: net.numbers.__setitem__(0, 3.0)),
    "a module in a tuple": (lambda self, x: self.hidden[0](x) if not self.hidden[0].training else x, switched),
    "a global": (lambda self, x: x * ALPHA, lambda net: globals().update(ALPHA=7.0)),
    "a class": (lambda self, x: x, lambda net: setattr(net, "__class__", Doubled)),
    "a name": (
        lambda self, x: x,
        lambda net: (
            net.layer.register_parameter("other", net.layer._parameters.pop("bias"))
            or net.layer.register_parameter("bias", None)
        ),
    ),
}


class Doubled(Fed):
    def forward(self, x):
        return super().forward(x * 2)


@pytest.mark.parametrize("case", BY_MODEL)
def test_what_the_model_uses(case):
    function, change = BY_MODEL[case]
    net = Fed(function)
    changed(net, lambda: change(net), quantity=sw.per_sample_grads)


def test_a_hook_that_moves(mlp):
    hook = lambda _, args, *rest: rest[0] * 2 if rest else (args[0] * 3,)
    handle = mlp[1].register_forward_hook(hook)

    def change():
        handle.remove()
        mlp[1].register_forward_pre_hook(hook)

    changed(mlp, change)


def test_hooks_for_all_modules(mlp):
    handles = []
    try:
        changed(mlp, lambda: handles.append(nn.modules.module.register_module_forward_hook(lambda *args: args[2] * 2)))
    finally:
        handles[0].remove()


def held_in(make):
    """Losses that take a number from something, and its change."""
    held, read, change = make()
    return (lambda model, batch: squares(model, batch) * read(held)), lambda: change(held)


class Slotted:
    __slots__ = ("a",)

    def __init__(self):
        self.a = 1.0


class Base:
    a = 1.0

    @property
    def through(self):
        return ALPHA

    @staticmethod
    def aside():
        return ALPHA


class Derived(Base):
    pass


HOLDERS = {
    "slots": lambda: (Slotted(), lambda held: held.a, lambda held: setattr(held, "a", 3.0)),
    "deque": lambda: (deque([1.0]), lambda held: held[0], lambda held: held.__setitem__(0, 3.0)),
    "a long list": lambda: ([1.0] * 300, lambda held: held[0], lambda held: held.__setitem__(0, 3.0)),
    "a long dict": lambda: (dict.fromkeys(range(300), 1.0), lambda held: held[0], lambda held: held.update({0: 3.0})),
    "an array": lambda: (np.ones(2), lambda held: torch.tensor(held)[0], lambda held: held.fill(3.0)),
    "bytes": lambda: (bytearray(b"a"), lambda held: held[0], lambda held: held.__setitem__(0, 3)),
    "a weak reference": lambda: (
        (kept := Base(), weakref.ref(kept)),
        lambda held: held[1]().a,
        lambda held: setattr(held[0], "a", 3.0),
    ),
    "a bound method of Python's": lambda: (
        (table := {"a": 1.0}, table.get),
        lambda held: held[1]("a"),
        lambda held: held[0].update(a=3.0),
    ),
    "a base": lambda: (Derived(), lambda held: held.a, lambda held: setattr(Base, "a", Base.a + 1)),
    "a property": lambda: (Derived(), lambda held: held.through, lambda held: globals().update(ALPHA=ALPHA + 1)),
    "a static method": lambda: (Derived(), lambda held: held.aside(), lambda held: globals().update(ALPHA=ALPHA + 1)),
}


@pytest.mark.parametrize("case", HOLDERS)
def test_what_holds_a_number(mlp, case):
    losses, change = held_in(HOLDERS[case])
    changed(mlp, change, losses)


def test_a_variable_of_another_module(mlp, monkeypatch):
    made = types.ModuleType("of_the_user")
    made.alpha = 1.0
    monkeypatch.setitem(globals(), "SETTINGS", made)
    changed(mlp, lambda: setattr(made, "alpha", 3.0), lambda model, batch: squares(model, batch) * SETTINGS.alpha)  # noqa: F821


def test_losses_of_an_installed_package(mlp, monkeypatch):
    made = types.ModuleType("installed")
    made.__file__ = f"{sysconfig.get_paths()['purelib']}/installed.py"
    monkeypatch.setitem(sys.modules, "installed", made)
    exec("def make(c):\n def loss(m, b): return m(b).square().sum(1) * c['a']\n return loss", vars(made))
    settings = {"a": 1.0}
    changed(mlp, lambda: settings.update(a=3.0), made.make(settings))


@pytest.fixture
def of_the_user(monkeypatch):
    """A module of the user's."""
    made = types.ModuleType("of_the_user")
    made.alpha = 1.0
    monkeypatch.setitem(sys.modules, "of_the_user", made)
    return made


def test_a_module_that_is_imported_in_the_losses(mlp, of_the_user):
    def losses(model, batch):
        import of_the_user as settings

        return squares(model, batch) * settings.alpha

    def others(model, batch):
        from of_the_user import alpha

        return squares(model, batch) * alpha

    for function in (losses, others):
        changed(mlp, lambda: setattr(of_the_user, "alpha", of_the_user.alpha + 1), function)


def test_a_module_that_is_an_attribute(of_the_user):
    net = Fed(lambda self, x: x * self.settings.alpha)
    net.settings = of_the_user
    changed(net, lambda: setattr(of_the_user, "alpha", 3.0))


def test_an_attribute_of_a_parameter():
    net = Fed(lambda self, x: x * getattr(self.layer.weight, "gain", 1.0))
    changed(net, lambda: setattr(net.layer.weight, "gain", 2.0))
    changed(net, lambda: setattr(net.layer.weight, "gain", 3.0))


def test_a_function_in_the_clothes_of_an_installed_one(mlp):
    @functools.wraps(F.mse_loss)
    def losses(model, batch):
        return squares(model, batch) * ALPHA

    changed(mlp, lambda: globals().update(ALPHA=ALPHA + 1), losses)


class Meta(type):
    alpha = 1.0


class Table(dict, metaclass=Meta):
    beta = 1.0

    def through(self):
        return ALPHA


@pytest.mark.parametrize(
    ("read", "change"),
    [
        (lambda held: held.beta, lambda: setattr(Table, "beta", Table.beta + 1)),
        (lambda held: held.through(), lambda: globals().update(ALPHA=ALPHA + 1)),
        (lambda held: type(held).alpha, lambda: setattr(Meta, "alpha", Meta.alpha + 1)),
    ],
)
def test_what_a_class_of_containers_has(mlp, read, change):
    held = Table()
    changed(mlp, change, lambda model, batch: squares(model, batch) * read(held))


def test_dates(mlp):
    held = np.array([1], dtype="timedelta64[s]")
    losses = lambda model, batch: squares(model, batch) * int(held[0].astype(int))
    run, x = sw.traced(sw.per_sample_norms, mlp, losses), normal(N, 4)
    with pytest.warns(UserWarning, match=r"^traced: the model or the losses reach more"):
        again(run, lambda _: x)
    held[0] = 3
    equal(run(x), sw.per_sample_norms(mlp, losses, x))


def test_batches_with_attributes(mlp):
    losses = lambda model, batch: squares(model, batch["x"]) * batch.beta
    run, x = sw.traced(sw.per_sample_norms, mlp, losses), normal(N, 4)
    for k in range(10):
        batch = Table(x=batch_like(x, k))
        batch.beta = 1.0 if k < 5 else 2.0
        equal(run(batch), sw.per_sample_norms(mlp, losses, batch))
    batch.beta = [1.0]
    with pytest.raises(TypeError, match=r"^traced: a batch is made of"):
        run(batch)


def test_an_iterator_is_not_traced(mlp):
    numbers = itertools.cycle([1.0] * 6 + [3.0])
    run, x = sw.traced(sw.per_sample_norms, mlp, lambda model, batch: squares(model, batch) * next(numbers)), normal(N, 4)
    wanted = sw.per_sample_norms(mlp, squares, x)
    for k in range(14):
        torch.testing.assert_close(run(x), wanted * (3 if k % 7 == 6 else 1))


def test_more_than_can_be_looked_at(mlp):
    many = [object() for _ in range(5000)]
    run, x = sw.traced(sw.per_sample_norms, mlp, lambda model, batch: squares(model, batch) + 0 * len(many)), normal(N, 4)
    with pytest.warns(UserWarning, match=r"^traced: the model or the losses reach more objects"):
        run(x)
    mlp[0].weight.requires_grad_(False)
    for _ in range(4):
        equal(run(x), sw.per_sample_norms(mlp, squares, x))


def test_a_batch_that_is_used_from_outside_too(mlp):
    data = normal(N, 4)
    losses = lambda model, batch: (model(batch) - 2 * model(data)).square().sum(1)
    run = sw.traced(sw.per_sample_norms, mlp, losses, batch_size=N)
    again(run, lambda _: data)
    for seed in range(3):
        equal(run(batch_like(data, seed)), sw.per_sample_norms(mlp, losses, batch_like(data, seed), batch_size=N))


def test_a_question_of_memory_that_is_shared(mlp):
    def losses(model, batch):
        x, y = batch
        x.mul_(-1)
        return squares(model, x) if (y > 0).all() else squares(model, x) * 3

    run = sw.traced(sw.per_sample_norms, mlp, losses)
    for seed in range(5):
        run((batch_like(normal(N, 4), seed), torch.ones(N, 4, dtype=torch.float64)))
    x = batch_like(normal(N, 4), 9).abs()
    other = x.clone()
    equal(run((x, x.view(N, 4))), sw.per_sample_norms(mlp, losses, (other, other.view(N, 4))))
    with pytest.raises(sw.UnsupportedOpError, match=r"^traced: .* reads a value"):
        run((x, x.view(N, 4)))


def test_a_question_that_follows_from_another(mlp):
    def losses(model, batch):
        index = batch[:, 0].abs().long()
        if (index < 4).all() and (torch.arange(1.0, 5.0).index_select(0, index) > -1).all():
            return squares(model, batch)
        return squares(model, batch) * 3

    run, x = sw.traced(sw.per_sample_norms, mlp, losses), normal(N, 4)
    for seed in range(10):
        fed = batch_like(x, seed) * (1 if seed < 5 else 50)
        equal(run(fed), sw.per_sample_norms(mlp, losses, fed))


def test_a_trainer_with_its_own_trace(mlp):
    class Trainer:
        def __init__(self, model):
            self.model, self.calls = model, Count(0)
            self.norms = sw.traced(sw.per_sample_norms, model, self.losses)

        def losses(self, model, batch):
            self.calls.step()
            return squares(model, batch)

    trainer, x = Trainer(mlp), normal(N, 4)
    again(trainer.norms, lambda seed: batch_like(x, seed), 8)
    assert trainer.calls.step() == BEFORE
    other = copy.deepcopy(trainer)
    equal(other.norms(x), trainer.norms(x))
    assert other.model is not mlp


def test_numbers_by_dlpack(mlp):
    losses = lambda model, batch: squares(model, batch) * (1 if np.from_dlpack(batch.detach())[0, 0] > 0 else 3)
    run, x = sw.traced(sw.per_sample_norms, mlp, losses), normal(N, 4)
    run(x)
    with pytest.raises(sw.UnsupportedOpError, match=r"^traced: `__dlpack__`"):
        run(x)


def test_threads(mlp):
    run, x = sw.traced(sw.per_sample_norms, mlp, squares), normal(N, 4)
    wanted = sw.per_sample_norms(mlp, squares, x)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: run(x), range(30)):
            equal(found, wanted)


def test_errors_that_values_make():
    """A matrix that has no factor, an assertion: such ops are run though nothing is made of their results."""
    net = Fed(lambda self, x: torch.linalg.cholesky(x).sum(1))
    made = [m @ m.mT + torch.eye(4) for m in torch.randn(5, 3, 4, 4, dtype=torch.float64)]
    run = sw.traced(sw.per_sample_norms, net, squares)
    again(run, lambda k: made[k])
    with pytest.raises(torch.linalg.LinAlgError):
        run(-made[4])

    def checked(_, x):
        torch._assert_async(x.isfinite().all())
        return x

    run, x = ready(sw.per_sample_norms, Fed(checked), squares, normal(N, 4)), normal(N, 4)
    with pytest.raises(RuntimeError, match=r"Expected Tensor with single nonzero value"):
        run(x * torch.inf)


def test_statistics_of_what_is_not_used():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.norm = nn.Linear(6, 2), nn.InstanceNorm1d(2, track_running_stats=True)

        def forward(self, x):
            self.norm(x.view(-1, 2, 3))
            return self.layer(x)

    one = Aside().double()
    other, x = copy.deepcopy(one), normal(N, 6)
    run = sw.traced(sw.per_sample_norms, one, squares)
    for seed in range(6):
        fed = batch_like(x, seed) + seed
        equal(run(fed), sw.per_sample_norms(other, squares, fed))
        equal(dict(one.named_buffers()), dict(other.named_buffers()))


def test_a_gradient_in_other_memory(mlp):
    """Sums may go into `.grad`; what reads it otherwise is refused."""
    for p in mlp.parameters():
        p.grad = torch.zeros_like(p)
    given = {name: p.grad for name, p in mlp.named_parameters()}
    run = ready(sw.clipped_grads, mlp, squares, x := normal(N, 4), max_grad_norm=1.0, out=given)
    equal(run(x)[0], sw.clipped_grads(mlp, squares, x, max_grad_norm=1.0)[0])
    reads = sw.traced(lambda model, *_: [p.grad * 2 for p in model.parameters()], mlp, squares)
    reads(x)
    with pytest.raises(sw.UnsupportedOpError, match=r"accumulates or reads the `.grad`"):
        reads(x)


def test_conjugates(mlp):
    losses = lambda model, z: squares(model, z.real * z.imag)
    run, z = sw.traced(sw.per_sample_norms, mlp, losses, batch_size=N), torch.randn(N, 4, dtype=torch.complex128)
    for k in range(10):
        fed = z.conj() if k < 5 else z
        equal(run(fed), sw.per_sample_norms(mlp, losses, fed, batch_size=N))


def test_a_number_that_is_none(mlp):
    losses = lambda model, batch: squares(model, batch) + torch.tensor(float("nan")).nan_to_num(2.0)
    run = ready(sw.per_sample_norms, mlp, losses, x := normal(N, 4))
    equal(run(x), sw.per_sample_norms(mlp, losses, x))


def test_a_profiled_part(mlp):
    def losses(model, batch):
        with torch.profiler.record_function("losses"):
            return squares(model, batch)

    run = ready(sw.per_sample_norms, mlp, losses, x := normal(N, 4))
    equal(run(x), sw.per_sample_norms(mlp, losses, x))


# --- where else ---------------------------------------------------------------------------------------------------------------


def test_inside_other_modes_it_is_recorded(mlp):
    run = ready(sw.per_sample_norms, mlp, squares, x := normal(N, 4))
    wanted = run(x)
    with FlopCounterMode(display=False) as counter:
        equal(run(x), wanted)
    assert counter.get_total_flops() > 0
    with torch.device("cpu"):
        equal(run(x), wanted)
    with pytest.raises(sw.SamplewiseError, match=r"inference mode"), torch.inference_mode():
        run(x)
    with torch.no_grad(), pytest.raises(sw.SamplewiseError):
        run(x)


def test_what_is_held_is_let_go(mlp):
    run = ready(sw.per_sample_grads, mlp, squares, x := normal(N, 4))
    found = run(x)
    held = [weakref.ref(rows) for rows in found.values()] + [weakref.ref(mlp[0].weight), weakref.ref(x)]
    del found, x
    gc.collect()
    assert [ref() is None for ref in held] == [True] * 4 + [False, True]
    run.release()
    run(normal(N, 4))
    del run
    # pytest holds the fixture
    assert mlp[0].weight is held[-2]()


def test_arguments_of_all_kinds():
    """Lists, numbers that are none, a name that Python has for itself."""
    x = torch.zeros(6)

    def run(y):
        y = torch.nan_to_num(y.clone().random_(3, 4) + math.inf, posinf=2.0).reshape([2, 3])
        y = y.add(torch.full([2, 3], math.nan, dtype=torch.float32)).nan_to_num(nan=-math.pi)
        return torch.ops.aten.random_.to(torch.cat([y, y], 1), 7), y.sum([0], dtype=torch.float64), y.flip(0, 1)

    tracer = Tracer([x])
    with tracer:
        wanted = run(x)
    trace = tracer.result(wanted)
    torch.manual_seed(0)
    found = trace([x])
    torch.manual_seed(0)
    equal(found, run(x))


def test_a_tracer_keeps_no_tensor_alive():
    x = torch.ones(3)
    tracer = Tracer([x])
    with tracer:
        made = weakref.ref(y := x * 2)
        z = y + 1
    del y
    assert made() is None
    again = tracer.result({"z": z, "number": 1})
    equal(again([torch.full((3,), 2.0)]), {"z": torch.full((3,), 5.0), "number": 1})


OPS_BY_NAME = {"square": torch.ops.aten.square, "sum": torch.ops.aten.sum.dim_IntList}


def test_ops_are_no_surroundings():
    """Tables of them, and the namespace that finds them when they are named, are the same at all times."""

    def losses(m, x):
        return OPS_BY_NAME["sum"](OPS_BY_NAME["square"](torch.ops.aten.contiguous(m(x))), [1])

    torch.ops.aten.__dict__.pop("contiguous", None)
    model, x = nn.Linear(3, 2).double(), normal(N, 3)
    run = sw.traced(sw.per_sample_norms, model, losses)
    for seed in range(BEFORE + 1):
        equal(run(batch_like(x, seed)), sw.per_sample_norms(model, losses, batch_like(x, seed)))
    assert len(run._around.state()) < 500
    assert [len(known.sure) for known in run._known.values()] == [1]


def test_a_batch_that_needs_a_gradient_after_the_call():
    """Because it is written to: the next one is of the same kind all the same."""
    model, x = Net(lambda m, x: x.mul_(m.w).sum(1, keepdim=True), w=normal(3)), normal(N, 3)
    run = sw.traced(sw.per_sample_norms, model, squares)
    for seed in range(BEFORE + 1):
        equal(run(batch_like(x, seed)), sw.per_sample_norms(model, squares, batch_like(x, seed)))
    assert [len(known.sure) for known in run._known.values()] == [1]


@pytest.mark.parametrize(
    "change",
    [
        lambda h, x: h.__setitem__(h < 0, 0.5),
        lambda h, x: h.__setitem__(x[:, 0] < 0, 2),
        lambda h, x: h[:, 1:].__setitem__(h[:, 1:] < 0, 0.5),
        lambda h, x: x.clone().__setitem__(x < 0, 1.0),
    ],
)
def test_a_number_where_a_mask_says_so(change):
    """An elementwise op: no value of the mask is read, of whatever rows it is true."""

    def losses(m, x):
        h = m(x) * 1
        change(h, x)
        return h.square().sum(1) + m(x).sum(1)

    model, x = nn.Linear(3, 2).double(), normal(N, 3)
    run = sw.traced(quantities, model, losses)
    for seed, sign in itertools.product(range(3), (1, -1)):
        fed = batch_like(x, seed) if seed else x.abs() * sign
        equal(run(fed), quantities(model, losses, fed))
    assert not sw.verify(model, losses, x).failures
    assert [len(known.sure) for known in run._known.values()] == [1]
