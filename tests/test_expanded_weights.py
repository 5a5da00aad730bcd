"""The call wrapper of `samplewise.expanded_weights`: what it returns, checks, sets and leaves behind."""

import gc
import inspect
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from expanded_weights_loop import (
    Called,
    batch,
    check_module,
    close,
    manual,
    module_loop,
    options,
    score,
)
from samplewise.expanded_weights import ExpandedWeight, call_for_per_sample_grads


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    assert not _get_current_function_mode_stack(), "a mode was left behind"


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("case", options(given=[None, 6], loss_reduction=["sum", "mean"]), ids=str)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_wrapper_gives_rows_and_no_grad(case, needs_grad):
    check_module(mlp(), batch(6, 4).requires_grad_(needs_grad), **case)


@pytest.mark.parametrize("size", [0, 1, 4])
def test_wrapper_takes_any_batch_size(size):
    check_module(mlp(), batch(size, 4))


@pytest.mark.parametrize("length", [2, 6])
def test_wrapper_with_the_batch_second(length):
    check_module(mlp(), batch(length, 6, 4), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_wrapper_keeps_the_dtype(dtype):
    model, x = mlp().to(dtype), torch.randn(3, 4, dtype=dtype)
    expected = module_loop(model, (x,), size=3)
    call_for_per_sample_grads(model)(x).float().square().sum().backward()
    assert {p.grad_sample.dtype for p in model.parameters()} == {dtype}
    assert expected.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    "frozen",
    [("0.weight",), ("0.bias",), ("0.weight", "0.bias"), ("2.weight",), ("0.weight", "0.bias", "2.weight", "2.bias")],
)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_frozen_parameters_are_left_alone(frozen, needs_grad):
    model = mlp()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if len(frozen) < 4 or needs_grad:
        check_module(model, batch(3, 4).requires_grad_(needs_grad))


def test_several_inputs_and_keywords():
    model = Called(
        lambda m, x, *, scale, bias=None: m.a(x) * scale + m.b(bias),
        a=nn.Linear(4, 3).double(),
        b=nn.Linear(2, 3).double(),
    )
    check_module(model, batch(5, 4).requires_grad_(), kwargs={"scale": batch(5, 1), "bias": batch(5, 2)})


def test_structured_output():
    model = Called(lambda m, x: {"out": m.a(x), "pair": (x, m.a(x).tanh())}, a=nn.Linear(4, 3).double())
    check_module(model, batch(5, 4))


def test_nested_input():
    model = Called(lambda m, inputs: m.a(inputs["x"]) + m.a(inputs["more"][0]), a=nn.Linear(4, 3).double())
    check_module(model, {"x": batch(5, 4), "more": [batch(5, 4)]})


def test_a_second_use_adds_up():
    check_module(Called(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Linear(4, 4).double()), batch(3, 4))


def test_a_tied_parameter_has_one_grad_sample():
    model = Called(lambda m, ids: F.linear(m.a(ids), m.a.weight), a=nn.Embedding(7, 4).double())
    check_module(model, torch.randint(7, (3, 5)))


def test_an_unused_parameter_has_zero_rows():
    model = Called(lambda m, x: m.a(x), a=nn.Linear(4, 3).double(), unused=(2, 2))
    call_for_per_sample_grads(model)(batch(5, 4)).sum().backward()
    close(model.unused.grad_sample, torch.zeros(5, 2, 2, dtype=torch.float64))


def test_the_batch_size_given_allows_inputs_of_other_sizes():
    model = Called(lambda m, x, table: m.a(x) @ table.t(), a=nn.Linear(4, 3).double())
    x, table = batch(5, 4), batch(7, 3)
    expected = manual(5, lambda i: score(model(x[i : i + 1], table)), list(model.parameters()))
    score(call_for_per_sample_grads(model, batch_size=5)(x, table)).backward()
    for p, rows in zip(model.parameters(), expected, strict=True):
        close(p.grad_sample, rows)


def test_rows_can_be_cleared_and_made_again():
    model = mlp()
    for clear in (lambda p: delattr(p, "grad_sample"), lambda p: setattr(p, "grad_sample", None), lambda p: None):
        check_module(model, batch(3, 4))
        for p in model.parameters():
            clear(p)


def test_plain_calls_are_untouched_before_and_after():
    model, x = mlp(), batch(3, 4)
    wrapped = call_for_per_sample_grads(model)
    score(model(x)).backward()
    assert all(p.grad is not None and not hasattr(p, "grad_sample") for p in model.parameters())
    model.zero_grad()
    output = wrapped(x)
    score(model(x)).backward()
    assert all(not hasattr(p, "grad_sample") for p in model.parameters())
    model.zero_grad()
    score(output).backward()
    assert all(p.grad is None and p.grad_sample.shape == (3, *p.shape) for p in model.parameters())


def test_nothing_is_left_on_the_module():
    model = mlp()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) + len(module._forward_hooks) for name, module in model.named_modules()}
    kinds = [type(p) for p in model.parameters()]
    output = call_for_per_sample_grads(model)(batch(3, 4))
    output.sum().backward()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert {name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()} == hooks
    assert [type(p) for p in model.parameters()] == kinds
    assert all(not p._backward_hooks and set(vars(p)) <= {"grad_sample"} for p in model.parameters())


def test_a_call_that_is_dropped_frees_its_graph_at_once():
    """Without waiting for the garbage collector: no cycle holds activations, and no guard stays on the parameters."""
    model, x = mlp(), batch(3, 4)
    gc.disable()
    try:
        alive = weakref.ref(call_for_per_sample_grads(model)(x).grad_fn)
        assert alive() is None
        assert not any(p._backward_hooks for p in model.parameters())
    finally:
        gc.enable()


def test_an_error_in_the_forward_leaves_nothing_behind():
    def fail(m, x):
        m.a(x)
        raise ValueError("of the user")

    model = Called(fail, a=nn.Linear(4, 3).double())
    with pytest.raises(ValueError, match="of the user"):
        call_for_per_sample_grads(model)(batch(3, 4))
    model.function = lambda m, x: m.a(x)
    check_module(model, batch(3, 4))


def test_an_error_in_the_backward_leaves_nothing_behind():
    def fail(grad):
        raise ValueError("of the user")

    model = mlp()
    output = call_for_per_sample_grads(model)(batch(3, 4))
    output.register_hook(fail)
    with pytest.raises(ValueError, match="of the user"):
        output.sum().backward()
    for p in model.parameters():
        assert getattr(p, "grad_sample", None) is None
    check_module(model, batch(3, 4))


def test_the_wrapper_carries_the_signature_of_forward():
    model = Called(lambda m, x: x)
    assert inspect.signature(call_for_per_sample_grads(model)) == inspect.signature(model.forward)
    assert call_for_per_sample_grads(model).__name__ == "forward"


def test_without_grad_the_output_is_plain():
    model, x = mlp(), batch(3, 4)
    with torch.no_grad():
        output = call_for_per_sample_grads(model)(x)
    assert not output.requires_grad
    torch.testing.assert_close(output, model(x).detach())


def test_retained_graphs_give_the_same_rows_again():
    model, x = mlp(), batch(3, 4)
    value = score(call_for_per_sample_grads(model)(x))
    value.backward(retain_graph=True)
    first = [p.grad_sample for p in model.parameters()]
    for p in model.parameters():
        p.grad_sample = None
    value.backward()
    for p, rows in zip(model.parameters(), first, strict=True):
        close(p.grad_sample, rows)
    with pytest.raises(RuntimeError):
        value.backward()


ARGUMENTS = [
    ("Module passed must be nn.Module", lambda: call_for_per_sample_grads("fail")),
    ("Batch size passed must be None or an integer", lambda: call_for_per_sample_grads(mlp(), batch_size=6.4)),
    ("Batch size passed must be None or an integer", lambda: call_for_per_sample_grads(mlp(), batch_size="6")),
    ("Batch size must be positive", lambda: call_for_per_sample_grads(mlp(), batch_size=-64)),
    ("Batch size must be positive", lambda: call_for_per_sample_grads(mlp(), batch_size=0)),
    (
        "Expected loss_reduction argument to be sum or mean",
        lambda: call_for_per_sample_grads(mlp(), loss_reduction="none"),
    ),
    (
        "Expected loss_reduction argument to be sum or mean",
        lambda: call_for_per_sample_grads(mlp(), loss_reduction=["sum"]),
    ),
    (
        "Expected loss_reduction argument to be sum or mean",
        lambda: ExpandedWeight(mlp()[0].weight, 3, ["sum"]),
    ),
    ("Unable to find a tensor in the passed args and kwargs", lambda: call_for_per_sample_grads(mlp())(3)),
    (
        "found at least one input with batch size",
        lambda: call_for_per_sample_grads(nn.Bilinear(2, 2, 2))(torch.ones(3, 2), torch.ones(2, 2)),
    ),
    (
        "found at least one input with batch size",
        lambda: call_for_per_sample_grads(Called(lambda m, x, y: x))(torch.ones(3, 2), y=torch.ones(2, 2)),
    ),
    ("batch size", lambda: call_for_per_sample_grads(mlp(), batch_size=5)(batch(3, 4)).sum().backward()),
]


@pytest.mark.parametrize(("phrase", "call"), ARGUMENTS, ids=[phrase for phrase, _ in ARGUMENTS])
def test_arguments_are_checked(phrase, call):
    with pytest.raises(RuntimeError, match=phrase):
        call()


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_call(reentrant, inner):
    def segment(m, x):
        return m.b(m.a(x).tanh())

    def forward(m, x):
        return checkpoint(segment, m, x, use_reentrant=False) if inner else segment(m, x)

    model, x = Called(forward, a=nn.Linear(4, 5).double(), b=nn.Linear(5, 3).double()), batch(6, 4).requires_grad_()
    expected = module_loop(model, (x,), size=6)
    (wanted,) = torch.autograd.grad(score(model(x)), x)
    score(checkpoint(call_for_per_sample_grads(model), x, use_reentrant=reentrant)).backward()
    for name, p in model.named_parameters():
        close(p.grad_sample, expected[name], name)
        assert p.grad is None
    torch.testing.assert_close(x.grad, wanted)


TRANSFORMS = [
    ("grad", lambda call, x: torch.func.grad(lambda x: call(x).sum())(x)),
    ("vmap", lambda call, x: torch.vmap(call)(x[None])),
    ("jvp", lambda call, x: torch.func.jvp(call, (x,), (x,))),
]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("transform", [transform for _, transform in TRANSFORMS], ids=[name for name, _ in TRANSFORMS])
def test_a_transform_around_a_call_is_refused(transform, size):
    model, x = mlp(), batch(size, 4)
    with pytest.raises(RuntimeError, match=r"call_for_per_sample_grads: runs inside a transform of torch\.func"):
        transform(call_for_per_sample_grads(model), x)
    with pytest.raises(RuntimeError, match=r"linear: runs inside a transform of torch\.func"):
        transform(lambda x: F.linear(x, ExpandedWeight(model[0].weight, size, "sum")), x)
    check_module(model, x)


def test_arguments_are_keywords_only():
    with pytest.raises(TypeError):
        call_for_per_sample_grads(mlp(), 3)


@pytest.mark.parametrize("backward", [False, True])
def test_rows_of_an_earlier_call_are_refused(backward):
    model, x = mlp(), batch(3, 4)
    wrapped = call_for_per_sample_grads(model)
    wrapped(x).sum().backward()
    with pytest.raises(RuntimeError, match="clear out the grad_sample"):
        wrapped(x) if backward else call_for_per_sample_grads(model)


def test_rows_of_two_backwards_are_never_added():
    model = mlp()
    first, second = (call_for_per_sample_grads(model)(batch(3, 4)).sum() for _ in range(2))
    first.backward()
    rows = [p.grad_sample.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="grad_sample"):
        second.backward()
    for p, each in zip(model.parameters(), rows, strict=True):
        close(p.grad_sample, each)


def test_backwards_of_one_call_add_up():
    model = Called(lambda m, x: (m.a(x), m.b(m.a(x))), a=nn.Linear(4, 4).double(), b=nn.Linear(4, 3).double())
    x = batch(3, 4)
    expected = module_loop(model, (x,), size=3)
    one, two = call_for_per_sample_grads(model)(x)
    score(one).backward(retain_graph=True)
    score(two).backward(retain_graph=True)
    for name, p in model.named_parameters():
        close(p.grad_sample, expected[name], name)
    score((one, two)).backward()
    for name, p in model.named_parameters():
        close(p.grad_sample, 2 * expected[name], name)


@pytest.mark.parametrize("replaced", [lambda rows: rows.clone(), lambda rows: rows.mul_(0.5)], ids=["copied", "changed"])
def test_rows_that_are_no_longer_those_of_the_call_are_refused(replaced):
    model = mlp()
    value = score(call_for_per_sample_grads(model)(batch(3, 4)))
    value.backward(retain_graph=True)
    model[2].bias.grad_sample = replaced(model[2].bias.grad_sample)
    with pytest.raises(RuntimeError, match=r"'2\.bias' still has the grad_sample"):
        value.backward()


def test_two_calls_in_one_backward_add_up():
    model, x, y = mlp(), batch(3, 4), batch(3, 4)
    expected = manual(3, lambda i: (model(x[i]) * model(y[i])).sum().sin(), list(model.parameters()))
    one, two = call_for_per_sample_grads(model)(x), call_for_per_sample_grads(model)(y)
    (one * two).sum(1).sin().sum().backward()
    for p, rows in zip(model.parameters(), expected, strict=True):
        close(p.grad_sample, rows)


@pytest.mark.parametrize("sizes", [(1, 5), (5, 1), (3, 5)], ids=str)
def test_two_calls_of_other_batch_sizes_in_one_backward_are_refused(sizes):
    model = mlp()
    value = sum(score(call_for_per_sample_grads(model)(batch(size, 4))) for size in sizes)
    with pytest.raises(RuntimeError, match=r"grad_sample: rows of shape .* cannot be added to those of shape"):
        value.backward()


def test_a_backward_that_failed_leaves_no_rows_to_the_next():
    model, x, failing = mlp(), batch(3, 4), [True]

    def fail(grad):
        if failing:
            raise ValueError("of the user")

    model[1].register_forward_hook(lambda module, args, out: out.register_hook(fail) and None)
    expected = module_loop(mlp_like(model), (x,), size=3)
    value = score(call_for_per_sample_grads(model)(x))
    with pytest.raises(ValueError, match="of the user"):
        value.backward(retain_graph=True)
    failing.clear()
    value.backward()
    for name, p in model.named_parameters():
        close(p.grad_sample, expected[name], name)


def mlp_like(model):
    """The same values without hooks."""
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    return twin


def test_an_ordinary_gradient_beside_the_rows_is_refused():
    """The module's own parameter, used behind the wrapper's back: a gradient that the rows would miss."""
    model, x = mlp(), batch(3, 4)
    with pytest.raises(RuntimeError, match="ordinary gradient"):
        (call_for_per_sample_grads(model)(x).sum() + model[0].weight.square().sum()).backward()
    assert all(getattr(p, "grad_sample", None) is None for p in model.parameters())


@pytest.mark.parametrize(
    "forward",
    [lambda m, x: (m.a(x), m.b(x)), lambda m, x: ((m.c + x).exp(), (m.c + x) + 1)],
    ids=["disjoint graphs", "nothing saved"],
)
def test_an_ordinary_gradient_is_refused_in_the_backward_of_another_output_too(forward):
    model = Called(forward, a=nn.Linear(4, 3).double(), b=nn.Linear(4, 3).double(), c=(4,))
    one, two = call_for_per_sample_grads(model)(batch(5, 4))
    score(one).backward()
    for p in model.parameters():
        p.grad_sample = None
    with pytest.raises(RuntimeError, match="ordinary gradient"):
        (score(two) + model.b.weight.square().sum()).backward()
    assert all(p.grad_sample is None for p in model.parameters())


SAME_FOR_ALL = [
    ("a parameter", lambda m, x: (m.a(x), m.scale * 2)),
    ("nothing else", lambda m, x: m.scale.square()),
    ("similarities", lambda m, x: m.a(x) @ m.a(x).t()),
    ("a batch statistic", lambda m, x: m.a(x).std(0)),
    ("a product of means", lambda m, x: m.a(x).mean() * m.a(x).mean()),
]


@pytest.mark.parametrize("forward", [each for _, each in SAME_FOR_ALL], ids=[name for name, _ in SAME_FOR_ALL])
def test_outputs_that_do_not_split_over_samples_are_refused(forward):
    model, x = Called(forward, a=nn.Linear(4, 3).double(), scale=(2,)), batch(5, 4).requires_grad_()
    output = call_for_per_sample_grads(model)(x)
    with pytest.raises(RuntimeError, match=r"call_for_per_sample_grads|ordinary gradient"):
        score(output).backward()
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in model.parameters())


def test_a_hook_that_comes_after_the_forward_is_refused():
    model = mlp()
    value = score(call_for_per_sample_grads(model)(batch(3, 4)))
    handle = model[0].weight.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    with pytest.raises(RuntimeError, match=r"0\.weight: has a hook on its gradient"):
        value.backward(retain_graph=True)
    handle.remove()
    value.backward()


class Balanced(nn.Module):
    """A mixture of experts in miniature: a second loss, which is not a sum over samples, is kept and not returned."""

    def __init__(self):
        super().__init__()
        self.gate, self.kept = nn.Linear(4, 3).double(), {}

    def forward(self, x):
        shares = self.gate(x).softmax(1)
        self.kept.update(balance=shares.mean(0).square().sum(), entropy=(shares * shares.log()).sum(), shares=shares)
        return shares


def test_a_loss_kept_on_the_module_is_refused_where_samples_meet_in_it():
    model, x = Balanced(), batch(5, 4).requires_grad_()
    value = score(call_for_per_sample_grads(model)(x)) + model.kept["balance"]
    torch.autograd.grad(value, x, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"tensor of shape \(\): backward: \w+ brought the samples together"):
        value.backward()
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in model.parameters())


def test_a_loss_kept_on_the_module_counts_where_it_is_a_sum():
    model, x = Balanced(), batch(5, 4)

    def loss(out):
        return score(out) + model.kept["entropy"] + score(model.kept["shares"])

    expected = manual(5, lambda i: loss(model(x[i : i + 1])), list(model.parameters()))
    loss(call_for_per_sample_grads(model)(x)).backward()
    for p, rows in zip(model.parameters(), expected, strict=True):
        close(p.grad_sample, rows)


def test_a_loss_inside_the_module():
    model = Called(lambda m, x, y: F.cross_entropy(m.a(x), y, reduction="sum"), a=nn.Linear(4, 3).double())
    x, y = batch(3, 4), torch.tensor([0, 2, 1])
    check_module(model, x, y, loss=lambda out: out)
    for p in model.parameters():
        p.grad_sample = None
    mean = Called(lambda m, x, y: F.cross_entropy(m.a(x), y), a=model.a)
    expected = module_loop(mean, (x, y), size=3, loss=lambda out: out)
    call_for_per_sample_grads(mean, loss_reduction="mean")(x, y).backward()
    for name, p in mean.named_parameters():
        close(p.grad_sample, expected[name], name)


def test_a_weighted_mean_inside_the_module_is_refused():
    model = Called(lambda m, x, y: F.cross_entropy(m.a(x), y, ignore_index=2), a=nn.Linear(4, 3).double())
    with pytest.raises(RuntimeError, match="weighted mean"):
        call_for_per_sample_grads(model, loss_reduction="mean")(batch(3, 4), torch.tensor([0, 2, 1])).backward()


def test_rows_of_two_parameters_are_two_tensors():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4)

        def forward(self, x):
            return self.first(x) + self.second(x)

    model = Sum().double()
    call_for_per_sample_grads(model)(batch(6, 4)).square().sum().backward()
    kept = model.second.bias.grad_sample.clone()
    model.first.bias.grad_sample.mul_(2)
    assert torch.equal(model.second.bias.grad_sample, kept)
