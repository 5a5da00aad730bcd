"""The names that programs import from torch's Expanded Weights beside the wrapper and the tensor class."""

import pytest
import torch
import torch.nn.functional as F

from expanded_weights_loop import (
    batch,
    close,
    expanded,
    manual,
    options,
    score,
    trainable,
)
from samplewise import expanded_weights as ew
from samplewise.expanded_weights import ExpandedWeight


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


NAMES = """
ExpandedWeight HANDLED_FUNCTIONS call_for_per_sample_grads implements_per_sample_grads
ConvPerSampleGrad EmbeddingPerSampleGrad GroupNormPerSampleGrad
InstanceNormPerSampleGrad LayerNormPerSampleGrad LinearPerSampleGrad
forward_helper standard_kwargs is_batch_first set_grad_sample_if_exists unpack_expanded_weight_or_tensor
maybe_scale_by_batch_size sum_over_all_but_batch_and_last_n
conv_picker conv_args_and_kwargs conv_normalizer conv_input_for_string_padding int_padding_for_string_padding
conv_padding_for_same conv_group_weight_grad_sample conv_unfold_weight_grad_sample unfold3d
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_the_names_that_programs_import_exist(name):
    assert getattr(ew, name).__doc__ or name == "HANDLED_FUNCTIONS"


HANDLERS = [
    (F.linear, "Linear"), (F.conv1d, "Conv"), (F.conv2d, "Conv"), (F.conv3d, "Conv"), (F.embedding, "Embedding"),
    (F.layer_norm, "LayerNorm"), (F.group_norm, "GroupNorm"), (F.instance_norm, "InstanceNorm"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "name"), HANDLERS, ids=[function.__name__ for function, _ in HANDLERS])
def test_handlers_are_registered(function, name):
    assert ExpandedWeight.handled_functions is ew.HANDLED_FUNCTIONS
    assert ew.HANDLED_FUNCTIONS[function] is getattr(ew, f"{name}PerSampleGrad")


def test_handlers_can_be_applied_by_hand():
    weight, bias, x = trainable(3, 4), trainable(3), batch(2, 4)
    rows = manual(2, lambda i: score(F.linear(x[i], weight, bias)), [weight, bias])
    pair = [ExpandedWeight(w, 2, "sum") for w in (weight, bias)]
    score(ew.LinearPerSampleGrad.apply(("bias",), F.linear, x, *pair)).backward()
    close(weight.grad_sample, rows[0])
    close(bias.grad_sample, rows[1])


def test_standard_kwargs_splits_positions_from_keywords():
    assert ew.standard_kwargs(("bias", "eps"), (1, 2, 3, 4)) == ((1, 2), {"bias": 3, "eps": 4})
    assert ew.standard_kwargs((), (1, 2)) == ((1, 2), {})


@pytest.mark.parametrize("which", options(weight=[False, True], bias=[False, True]), ids=str)
def test_forward_helper_is_the_plain_function(which):
    x, plain = batch(3, 4), {"weight": trainable(5, 4), "bias": trainable(5)}
    given = {name: ExpandedWeight(w, 3, "sum") if which[name] else w.detach() for name, w in plain.items()}
    args, kwargs = ew.standard_kwargs(("bias",), (x, given["weight"], given["bias"]))
    assert args[1] is given["weight"]
    assert kwargs["bias"] is given["bias"]
    torch.testing.assert_close(ew.forward_helper(F.linear, args, kwargs), F.linear(x, *plain.values()))


HELPER_ERRORS = [
    ("do not support inputs that are also ExpandedWeights", lambda: expanded(3, 4)),
    ("requires a Tensor as the first input", lambda: 3),
    ("requires a batch dimension but got an input of size 0", lambda: torch.tensor(3.0)),
    ("0 is not a valid batch size for Expanded Weights", lambda: batch(0, 4)),
    ("batch size matching input", lambda: batch(3, 4)),
]


@pytest.mark.parametrize(("phrase", "first"), HELPER_ERRORS, ids=[phrase for phrase, _ in HELPER_ERRORS])
def test_forward_helper_checks(phrase, first):
    with pytest.raises(RuntimeError, match=phrase):
        ew.forward_helper(F.linear, (first(), expanded(5, 4)), {"bias": None})


def test_forward_helper_checks_the_loss_reduction():
    with pytest.raises(RuntimeError, match="same loss_reduction"):
        ew.forward_helper(F.linear, (batch(2, 4), expanded(5, 4), expanded(5, loss_reduction="mean")), {})


@pytest.mark.parametrize(("loss_reduction", "scale"), [("sum", 1), ("mean", 2)])
def test_set_grad_sample_if_exists(loss_reduction, scale):
    given = expanded(3, loss_reduction=loss_reduction)
    seen = []
    for uses in (1, 2):
        ew.set_grad_sample_if_exists(given, lambda weight: seen.append(weight) or torch.ones(2, 3))
        torch.testing.assert_close(given.orig_weight.grad_sample, torch.full((2, 3), float(scale * uses)))
    assert all(weight is given.orig_weight for weight in seen)
    torch.testing.assert_close(ew.maybe_scale_by_batch_size(torch.ones(2), given), torch.full((2,), float(scale)))


def test_set_grad_sample_if_exists_passes_over_everything_else():
    plain = torch.ones(3)
    ew.set_grad_sample_if_exists(plain, lambda _: pytest.fail("called"))
    assert not hasattr(plain, "grad_sample")
    ew.set_grad_sample_if_exists(3, lambda _: pytest.fail("called"))
    ew.set_grad_sample_if_exists(None, lambda _: pytest.fail("called"))
    with pytest.raises(RuntimeError, match="mixture of ExpandedWeight parameters and normal Parameters"):
        ew.set_grad_sample_if_exists(trainable(3), lambda _: pytest.fail("called"))


def test_unpack_expanded_weight_or_tensor():
    given, plain = expanded(3), torch.ones(3)
    assert ew.unpack_expanded_weight_or_tensor(given) is given.orig_weight
    assert ew.unpack_expanded_weight_or_tensor(plain) is plain
    assert ew.unpack_expanded_weight_or_tensor(4) is None
    assert ew.unpack_expanded_weight_or_tensor(given, lambda w: w is given.orig_weight)
    assert ew.unpack_expanded_weight_or_tensor(plain, lambda w: w.shape) == (3,)
    assert ew.unpack_expanded_weight_or_tensor(4, lambda w: w) is None
    with pytest.raises(RuntimeError, match="mixture of ExpandedWeight parameters and normal Parameters"):
        ew.unpack_expanded_weight_or_tensor(trainable(3))


@pytest.mark.parametrize(("last", "over"), [(0, (1, 2, 3, 4)), (2, (1, 2)), (3, (1,)), (4, ())])
def test_sum_over_all_but_batch_and_last_n(last, over):
    x = batch(2, 3, 4, 5, 2)
    torch.testing.assert_close(ew.sum_over_all_but_batch_and_last_n(x, last), x.sum(over) if over else x)


def test_is_batch_first():
    second = expanded(3)
    second.set_batch_first(False)
    assert ew.is_batch_first((1, expanded(3), None)) is True
    assert ew.is_batch_first((1, second)) is False
    assert ew.is_batch_first((1, torch.ones(2))) is None
    with pytest.raises(RuntimeError, match="conflicting batch_first"):
        ew.is_batch_first((expanded(3), second))


def test_convolution_arguments():
    assert [ew.conv_picker(function, 1, 2, 3) for function in (F.conv1d, F.conv2d, F.conv3d)] == [1, 2, 3]
    args, kwargs = ew.conv_args_and_kwargs(("groups", "padding"), ("x", "w", None, 2, 3, "same"))
    assert args == ("x", "w")
    assert kwargs == {"bias": None, "stride": 2, "padding": "same", "dilation": 1, "groups": 3}
    assert ew.conv_normalizer("x", "w", "b") == (
        ("x", "w"),
        {"bias": "b", "stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    )
    assert ew.conv_padding_for_same(2, 4) == (3, 3)
    assert ew.conv_padding_for_same(1, 4) == (1, 2)
    assert list(ew.int_padding_for_string_padding(F.conv2d, "same", (1, 2), (2, 4))) == [3, 3, 0, 1]
    assert list(ew.int_padding_for_string_padding(F.conv1d, "valid", 1, (2,))) == [0, 0]
    with pytest.raises(RuntimeError, match="only accept 'same' or 'valid'"):
        ew.int_padding_for_string_padding(F.conv1d, "other", 1, (2,))
    x = batch(1, 1, 5)
    assert ew.conv_input_for_string_padding(F.conv1d, "valid", x, 1, (3,)) is x
    torch.testing.assert_close(ew.conv_input_for_string_padding(F.conv1d, "same", x, 1, (4,)), F.pad(x, (1, 2)))


@pytest.mark.parametrize("dilation", [1, 2])
def test_unfold3d_lists_the_blocks_a_convolution_sees(dilation):
    x, w = batch(2, 3, 6, 7, 8), batch(4, 3, 2, 3, 2)
    blocks = ew.unfold3d(x, (2, 3, 2), (1, 0, 1), (1, 2, 1), (dilation,) * 3)
    expected = F.conv3d(x, w, stride=(1, 2, 1), padding=(1, 0, 1), dilation=dilation)
    torch.testing.assert_close((w.flatten(1) @ blocks).view(expected.shape), expected)
    with pytest.raises(ValueError, match="must be of the shape"):
        ew.unfold3d(x[0], (2, 3, 2), (1, 0, 1), (1, 2, 1), (1, 1, 1))


CONVOLUTIONS = [
    (F.conv1d, (4, 2, 3), 1),
    (F.conv2d, (4, 2, 3, 2), 1),
    (F.conv3d, (4, 2, 1, 2, 3), 1),
    (F.conv2d, (4, 1, 2, 2), 2),
]


@pytest.mark.parametrize(("function", "shape", "groups"), CONVOLUTIONS)
def test_convolution_weight_rows(function, shape, groups):
    x, w, dims = batch(3, 2, *[7] * (len(shape) - 2)), trainable(*shape), len(shape) - 2
    stride, padding, dilation = (2,) * dims, (1,) * dims, (1,) * dims
    grad = torch.randn_like(function(x, w, None, stride, padding, dilation, groups))
    (rows,) = manual(
        3, lambda i: (function(x[i : i + 1], w, None, stride, padding, dilation, groups) * grad[i : i + 1]).sum(), [w]
    )
    close(
        ew.conv_unfold_weight_grad_sample(x, grad, w.shape, shape[2:], stride, padding, dilation, groups, function),
        rows,
    )
    if groups == 1:
        close(ew.conv_group_weight_grad_sample(x, grad, w.shape, stride, padding, dilation, 3, function), rows)
