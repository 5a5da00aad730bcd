"""`ExpandedWeight` itself, and the handlers that third parties register for it."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expanded_weights_loop import (
    Called,
    batch,
    close,
    expanded,
    manual,
    score,
    trainable,
)
from samplewise import expanded_weights as ew
from samplewise.expanded_weights import ExpandedWeight, call_for_per_sample_grads, implements_per_sample_grads


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_expanded_weight_looks_like_its_weight():
    weight = trainable(5, 4)
    expanded = ExpandedWeight(weight, 3, "mean")
    assert isinstance(expanded, torch.Tensor)
    assert expanded.orig_weight is weight
    assert (expanded.batch_size, expanded.loss_reduction, expanded.batch_first, expanded.allow_smaller_batches) == (
        3,
        "mean",
        True,
        False,
    )
    assert (expanded.shape, expanded.dtype, expanded.device, expanded.is_cuda) == (
        weight.shape,
        weight.dtype,
        weight.device,
        False,
    )
    assert (expanded.size(), expanded.dim(), expanded.ndim, expanded.numel(), len(expanded)) == (
        weight.shape,
        2,
        2,
        20,
        5,
    )
    assert expanded.requires_grad
    assert expanded.data_ptr() == weight.data_ptr()
    assert expanded.get_device() == weight.get_device()
    torch.testing.assert_close(expanded.data, weight.data)
    expanded.set_batch_first(False)
    expanded.set_allow_smaller_batches(True)
    assert (expanded.batch_first, expanded.allow_smaller_batches) == (False, True)
    assert "ExpandedWeight" in repr(expanded)


NOT_EXPANDED = [
    ("Can only make Expanded Weights of Tensors", lambda: ExpandedWeight(3, 3, "sum")),
    ("of tensors that requires_grad", lambda: ExpandedWeight(torch.ones(3), 3, "sum")),
    ("Expected loss_reduction argument to be sum or mean", lambda: ExpandedWeight(trainable(3), 3, "none")),
]


@pytest.mark.parametrize(("phrase", "make"), NOT_EXPANDED, ids=[phrase for phrase, _ in NOT_EXPANDED])
def test_expanded_weight_checks_its_arguments(phrase, make):
    with pytest.raises(RuntimeError, match=phrase):
        make()


REFUSED_CALLS = [
    (
        "Input does not have a batch dimension.* at least rank 2, got of rank 1",
        lambda: F.linear(batch(4), expanded(3, 4)),
    ),
    (
        "Input does not have a batch dimension.* at least rank 2, got of rank 0",
        lambda: F.linear(torch.tensor(1.0).double(), expanded(3, 4)),
    ),
    ("needs an input with a batch size, got a 1D tensor", lambda: F.embedding(torch.tensor([1, 2]), expanded(5, 3))),
    ("only support convolution with batched input", lambda: F.conv1d(batch(2, 5), expanded(3, 2, 2))),
    ("only support convolution with batched input", lambda: F.conv2d(batch(2, 5, 5), expanded(3, 2, 2, 2))),
    ("only support convolution with batched input", lambda: F.conv3d(batch(2, 5, 5, 5), expanded(3, 2, 2, 2, 2))),
    ("Layer norm should not normalize over batch dimension", lambda: F.layer_norm(batch(2, 4), (2, 4), expanded(2, 4))),
    ("Layer norm should not normalize over batch dimension", lambda: F.layer_norm(batch(2), (2,), expanded(2))),
    ("0 is not a valid batch size for Expanded Weights", lambda: F.linear(batch(0, 4), expanded(3, 4))),
    ("0 is not a valid batch size for Expanded Weights", lambda: F.conv2d(batch(0, 2, 5, 5), expanded(3, 2, 2, 2))),
    ("batch size matching input", lambda: F.linear(batch(3, 4), expanded(3, 4))),
    ("batch size matching input", lambda: F.conv1d(batch(3, 2, 5), expanded(3, 2, 2))),
    ("batch size matching input", lambda: F.layer_norm(batch(3, 4), (4,), expanded(4))),
    ("batch size matching input", lambda: F.linear(batch(2, 4), expanded(3, 4), expanded(3, size=3))),
    ("same loss_reduction", lambda: F.linear(batch(2, 4), expanded(3, 4), expanded(3, loss_reduction="mean"))),
    ("do not support inputs that are also ExpandedWeights", lambda: F.linear(expanded(2, 4), expanded(3, 4))),
]


@pytest.mark.parametrize(("phrase", "call"), REFUSED_CALLS, ids=lambda value: value if isinstance(value, str) else "")
def test_calls_are_checked(phrase, call):
    with pytest.raises(RuntimeError, match=phrase):
        call()


def test_conflicting_layouts_are_refused():
    weight, bias = expanded(3, 4), expanded(3)
    bias.set_batch_first(False)
    with pytest.raises(RuntimeError, match="conflicting batch_first"):
        F.linear(batch(2, 2, 4), weight, bias)


WRAPPED_REFUSALS = [
    ("Input does not have a batch dimension.* at least rank 2, got of rank 1", nn.Linear(4, 3), torch.randn(4)),
    ("needs an input with a batch size, got a 1D tensor", nn.Embedding(5, 3), torch.tensor([1, 2])),
    ("only support convolution with batched input", nn.Conv2d(2, 3, 2), torch.randn(2, 5, 5)),
    ("Layer norm should not normalize over batch dimension", nn.LayerNorm((2, 4)), torch.randn(2, 4)),
]


@pytest.mark.parametrize(("phrase", "module", "x"), WRAPPED_REFUSALS, ids=[phrase for phrase, *_ in WRAPPED_REFUSALS])
def test_wrapped_modules_are_checked(phrase, module, x):
    with pytest.raises(RuntimeError, match=phrase):
        call_for_per_sample_grads(module)(x)


MIXTURES = [
    ("linear", lambda e, p: F.linear(batch(2, 4), e(3, 4), p(3))),
    ("linear, weight plain", lambda e, p: F.linear(batch(2, 4), p(3, 4), e(3))),
    ("conv", lambda e, p: F.conv1d(batch(2, 4, 5), e(3, 4, 2), p(3))),
    ("layer_norm", lambda e, p: F.layer_norm(batch(2, 4), (4,), e(4), p(4))),
    ("group_norm", lambda e, p: F.group_norm(batch(2, 4, 3), 2, e(4), p(4))),
    ("instance_norm", lambda e, p: F.instance_norm(batch(2, 4, 3), None, None, p(4), e(4))),
]


@pytest.mark.parametrize("call", [call for _, call in MIXTURES], ids=[name for name, _ in MIXTURES])
def test_a_mixture_of_expanded_and_plain_trainable_tensors_is_refused(call):
    with pytest.raises(RuntimeError, match="mixture of ExpandedWeight parameters and normal Parameters"):
        call(expanded, trainable).sum().backward()


def test_a_mixture_is_refused_in_a_wrapped_module():
    plain = trainable(3)
    model = Called(lambda m, x: F.linear(x, m.w, plain), w=(3, 4))
    with pytest.raises(RuntimeError, match="mixture of ExpandedWeight parameters and normal Parameters"):
        call_for_per_sample_grads(model)(batch(2, 4)).sum().backward()


def test_expanded_weights_add_up_over_uses():
    weight, x = trainable(4, 4), batch(3, 4)
    (rows,) = manual(3, lambda i: score(F.linear(F.linear(x[i], weight), weight)), [weight])
    once = ExpandedWeight(weight, 3, "sum")
    score(F.linear(F.linear(x, once), once)).backward()
    close(weight.grad_sample, rows)
    score(F.linear(F.linear(x, once), once)).backward()
    close(weight.grad_sample, 2 * rows)


MASKED = [
    ("*", lambda w, mask: w * mask),
    ("+", lambda w, mask: mask + w),
    ("in place", lambda w, mask: (w * 1).mul_(mask)),
    ("column", lambda w, mask: w * mask[:, :1]),
    ("where", lambda w, mask: torch.where(mask > 0, w, 0.0)),
    ("masked_fill", lambda w, mask: w.masked_fill(mask > 0, 0.0)),
    ("lerp", lambda w, mask: torch.lerp(w, w * 2, mask)),
    ("addcmul", lambda w, mask: torch.addcmul(w, w, mask)),
    ("gate", lambda w, mask: w * mask.clone().requires_grad_().sigmoid()),
]


@pytest.mark.parametrize("call", [call for _, call in MASKED], ids=[name for name, _ in MASKED])
def test_a_mask_of_the_size_of_a_batch_is_refused(call):
    weight, mask, x = trainable(3, 4), batch(3, 4).sign(), batch(3, 4)
    with pytest.raises(RuntimeError, match="may be a batch of 3 samples, or a constant"):
        F.linear(x, call(ExpandedWeight(weight, 3, "sum"), mask))


@pytest.mark.parametrize("call", [call for name, call in MASKED if name not in {"gate", "column"}])
def test_a_mask_with_a_leading_axis_is_a_constant(call):
    weight, mask, x = trainable(3, 4), batch(3, 4).sign(), batch(3, 4)
    (rows,) = manual(3, lambda i: score(F.linear(x[i], call(weight * 1, mask))), [weight])
    score(F.linear(x, call(ExpandedWeight(weight, 3, "sum")[None], mask[None])[0])).backward()
    close(weight.grad_sample, rows)


@pytest.mark.parametrize("made", [lambda w: w, lambda w: w * 2], ids=["itself", "derived"])
def test_rows_have_the_dtype_of_the_weight_under_autocast(made):
    weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((3, 4), (3,)))
    x = torch.randn(2, 4)
    rows = manual(2, lambda i: score(F.linear(x[i], made(weight), bias)), [weight, bias])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = F.linear(x, made(ExpandedWeight(weight, 2, "sum")), ExpandedWeight(bias, 2, "sum"))
    score(out.float()).backward()
    for each, wanted in zip((weight, bias), rows, strict=True):
        assert each.grad_sample.dtype == torch.float32
        close(each.grad_sample, wanted, rtol=5e-2)


def test_rows_of_other_batch_sizes_are_not_added():
    weight = trainable(3, 4)
    score(F.linear(batch(1, 4), ExpandedWeight(weight, 1, "sum"))).backward()
    with pytest.raises(
        RuntimeError, match=r"grad_sample: rows of shape \(5, 3, 4\) cannot be added to those of shape \(1, 3, 4\)"
    ):
        score(F.linear(batch(5, 4), ExpandedWeight(weight, 5, "sum"))).backward()


def test_expanded_weights_with_the_batch_second():
    weight, bias, x = trainable(3, 4), trainable(3), batch(5, 2, 4)
    rows = manual(2, lambda i: score(F.linear(x[:, i], weight, bias)), [weight, bias])
    pair = [ExpandedWeight(w, 2, "sum") for w in (weight, bias)]
    for each in pair:
        each.set_batch_first(False)
    score(F.linear(x, *pair)).backward()
    close(weight.grad_sample, rows[0])
    close(bias.grad_sample, rows[1])


@pytest.mark.parametrize(("loss_reduction", "scale"), [("sum", 1), ("mean", 5)])
def test_smaller_batches_fill_the_first_rows(loss_reduction, scale):
    weight, bias, x = trainable(3, 4), trainable(3), batch(2, 4)
    rows = manual(2, lambda i: score(F.linear(x[i], weight, bias)), [weight, bias])
    wide = ExpandedWeight(weight, 5, loss_reduction)
    wide.set_allow_smaller_batches(True)
    score(F.linear(x, wide, ExpandedWeight(bias, 2, loss_reduction))).backward()
    close(weight.grad_sample, scale * torch.cat([rows[0], torch.zeros(3, 3, 4, dtype=torch.float64)]))
    close(bias.grad_sample, (2 if loss_reduction == "mean" else 1) * rows[1])
    with pytest.raises(RuntimeError, match="batch size matching input"):
        F.linear(batch(6, 4), wide)


# name, shape of the weight, op(x, weight) with x of (3, 4)
ARITHMETIC = [
    ("+", (4,), lambda x, w: x + w),
    ("*", (4,), lambda x, w: w * x),
    ("add", (1, 4), lambda x, w: torch.add(x, w, alpha=2)),
    ("-", (4,), lambda x, w: 1 - w - x),
    ("/", (), lambda x, w: x / (w * w + 1)),
    ("@", (4, 4), lambda x, w: x @ w),
    ("@ .t()", (4, 4), lambda x, w: x @ w.t()),
    ("matmul .T", (4, 4), lambda x, w: torch.matmul(x, w.T * 2)),
    ("[]", (4, 4), lambda x, w: x * w[0] + w[1:2]),
    ("expand", (4, 4), lambda x, w: torch.cat([x[:, None], w[None, :1].expand(len(x), 1, 4)], 1)),
    (".to", (4, 4), lambda x, w: x @ w.to(torch.float32).double()),
    ("weight norm", (4, 4), lambda x, w: F.linear(x, w / w.norm(dim=1, keepdim=True))),
    ("where", (4, 4), lambda x, w: torch.where(x > 0, x * w[0], w[1])),
]


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize(("shape", "call"), [pytest.param(*case, id=name) for name, *case in ARITHMETIC])
def test_arithmetic_on_an_expanded_weight(shape, call, size):
    weight, x = trainable(*shape), batch(size, 4)
    (rows,) = manual(size, lambda i: score(call(x[i : i + 1], weight)), [weight])
    score(call(x, ExpandedWeight(weight, size, "sum"))).backward()
    assert weight.grad is None
    close(weight.grad_sample, rows, rtol=1e-5)


@pytest.fixture
def registered():
    """Whatever a test registers is taken out again."""
    before = dict(ew.HANDLED_FUNCTIONS)
    yield
    ew.HANDLED_FUNCTIONS.clear()
    ew.HANDLED_FUNCTIONS.update(before)


class ScaledPerSampleGrad(torch.autograd.Function):
    """A third party's handler of `F.linear` without bias, in torch's way; its rows are 10 times too large."""

    seen: ClassVar[list] = []

    @staticmethod
    def forward(ctx, kwarg_names, function, *args_and_kwargs):
        args, kwargs = ew.standard_kwargs(kwarg_names, args_and_kwargs)
        ScaledPerSampleGrad.seen.append((function, tuple(kwarg_names), type(args[1]).__name__))
        ctx.args = args
        return ew.forward_helper(function, args, kwargs)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.args
        ew.set_grad_sample_if_exists(weight, lambda _: 10 * torch.einsum("n...o,n...i->noi", grad, x))
        grad_x = grad @ ew.unpack_expanded_weight_or_tensor(weight) if x.requires_grad else None
        return (None, None, grad_x, *[None] * 5)


@pytest.mark.parametrize("loss_reduction", ["sum", "mean"])
def test_a_third_party_handler_takes_precedence(registered, loss_reduction):
    ScaledPerSampleGrad.seen.clear()
    assert implements_per_sample_grads(F.linear)(ScaledPerSampleGrad) is ScaledPerSampleGrad
    weight, x = trainable(3, 4), batch(2, 4).requires_grad_()
    (rows,) = manual(2, lambda i: score(F.linear(x[i], weight)), [weight])
    wanted = torch.autograd.grad(score(F.linear(x, weight)), x)[0]
    score(F.linear(x, ExpandedWeight(weight, 2, loss_reduction))).backward()
    close(weight.grad_sample, (20 if loss_reduction == "mean" else 10) * rows)
    torch.testing.assert_close(x.grad, wanted)
    assert ScaledPerSampleGrad.seen == [(F.linear, (), "ExpandedWeight")]


@pytest.mark.parametrize("loss_reduction", ["sum", "mean"])
def test_a_third_party_handler_works_inside_the_wrapper(registered, loss_reduction):
    implements_per_sample_grads(F.linear)(ScaledPerSampleGrad)
    model = Called(lambda m, x: F.linear(torch.tanh(m.b(x)), m.w), w=(3, 4), b=nn.LayerNorm(4).double())
    x, scale = batch(2, 4), 2 if loss_reduction == "mean" else 1
    expected = manual(2, lambda i: score(model(x[i : i + 1])) * scale, list(model.parameters()))
    score(call_for_per_sample_grads(model, loss_reduction=loss_reduction)(x)).backward()
    for (name, p), rows in zip(model.named_parameters(), expected, strict=True):
        close(p.grad_sample, 10 * rows if name == "w" else rows, name)
        assert p.grad is None


def test_a_handled_use_and_an_engine_use_add_up(registered):
    implements_per_sample_grads(F.linear)(ScaledPerSampleGrad)
    model, x = Called(lambda m, x: F.linear(x, m.w) @ m.w, w=(3, 4)), batch(2, 4)
    handled = manual(2, lambda i: score(F.linear(x[i], model.w) @ model.w.detach()), [model.w])[0]
    engine = manual(2, lambda i: score(F.linear(x[i], model.w.detach()) @ model.w), [model.w])[0]
    score(call_for_per_sample_grads(model)(x)).backward()
    close(model.w.grad_sample, 10 * handled + engine)


def test_a_function_unknown_to_torch_can_be_registered(registered):
    @implements_per_sample_grads(torch.heaviside)
    class HeavisidePerSampleGrad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, kwarg_names, function, *args_and_kwargs):
            args, kwargs = ew.standard_kwargs(kwarg_names, args_and_kwargs)
            ctx.args = args
            return ew.forward_helper(function, args, kwargs)

        @staticmethod
        def backward(ctx, grad):
            ew.set_grad_sample_if_exists(ctx.args[1], lambda _: torch.where(ctx.args[0] == 0, grad, 0.0))
            return None, None, None, None

    weight, x = trainable(4), batch(2, 4).relu()
    torch.heaviside(x, ExpandedWeight(weight, 2, "sum")).sum().backward()
    close(weight.grad_sample, (x == 0).double())


def test_a_backward_without_samples_is_refused():
    weight = trainable(4)
    with pytest.raises(RuntimeError, match="same for all samples"):
        (ExpandedWeight(weight, 3, "sum") * batch(5, 4)).sum().backward()
    assert weight.grad is None


def test_rows_of_two_weights_are_two_tensors():
    """Both shifts have the gradient that autograd hands to both norms."""
    shifts, x = [trainable(4), trainable(4)], batch(3, 4)
    normed = [F.layer_norm(x, (4,), expanded(4, size=3, loss_reduction="sum"), ExpandedWeight(b, 3, "sum")) for b in shifts]
    score(normed[0] + normed[1]).backward()
    wanted = shifts[0].grad_sample.clone()
    close(shifts[1].grad_sample.mul_(3), 3 * wanted)
    close(shifts[0].grad_sample, wanted)


def test_hooks_are_refused():
    weight, x = trainable(3, 4), batch(2, 4)
    for each in (ExpandedWeight(weight, 2, "sum"), ExpandedWeight(weight, 2, "sum") * 2):
        with pytest.raises(RuntimeError, match="cannot handle function register_hook"):
            each.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
        with pytest.raises(RuntimeError, match="cannot handle function register_post_accumulate_grad_hook"):
            each.register_post_accumulate_grad_hook(lambda weight: None)
    weight.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    for made in (lambda w: w, lambda w: w * 2):
        with pytest.raises(RuntimeError, match=r"weight 0 of shape \(3, 4\): has a hook on its gradient"):
            F.linear(x, made(ExpandedWeight(weight, 2, "sum"))).sum().backward()
    assert weight.grad is None
    assert not hasattr(weight, "grad_sample")
