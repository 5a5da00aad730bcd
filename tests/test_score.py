"""The scores themselves, against a loop over single samples."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset, default_collate

import samplewise as sw
from samplewise.attribution import (
    ScoreTask,
    ScoringError,
    as_score_task,
    detection,
    group_parameters,
    rank,
    score,
    score_batches,
    top_share,
)
from samplewise.attribution.scoring import move


class Pair(NamedTuple):
    a: object
    b: object


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()


def cross_entropy(model, batch):
    inputs, targets = batch
    logits = model(inputs)
    return F.cross_entropy(logits, targets, reduction="none"), logits


def data(samples=11):
    torch.manual_seed(1)
    return TensorDataset(torch.randn(samples, 5, dtype=torch.float64), torch.arange(samples) % 3)


def make_task(loss=cross_entropy, dataset=None, **options):
    return ScoreTask(network(), dataset or data(), loss, **options)


def test_scores_equal_a_loop_over_samples():
    task = make_task()
    scores = score(task, batch_size=4)
    model = task.model.eval()
    for index, (inputs, target) in enumerate(task.dataset):
        logits = model(inputs[None])[0]
        loss = F.cross_entropy(logits, target)
        grads = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, model.parameters()), strict=True))
        squares = {name: grad.square().sum() for name, grad in grads.items()}
        expected = {
            "index": index,
            "loss": loss,
            "grad_norm": sum(squares.values()).sqrt(),
            "grad_norm.0": (squares["0.weight"] + squares["0.bias"]).sqrt(),
            "grad_norm.1": (squares["1.weight"] + squares["1.bias"]).sqrt(),
            "grad_norm.4": (squares["4.weight"] + squares["4.bias"]).sqrt(),
            "el2n": (logits.softmax(0) - F.one_hot(target, 3)).norm(),
            "target": target,
            "prediction": logits.argmax(),
            "probability": logits.softmax(0).max(),
        }
        assert scores.keys() == expected.keys()
        for name, value in expected.items():
            assert scores[name][index].item() == pytest.approx(torch.as_tensor(value).item(), rel=1e-12), name


@pytest.mark.parametrize("batch_size", [1, 3, 11, 64])
def test_scores_do_not_depend_on_the_batch_size(batch_size):
    expected = score(make_task(), batch_size=5)
    for name, values in score(make_task(), batch_size=batch_size).items():
        torch.testing.assert_close(values, expected[name], rtol=1e-12, atol=0)


def test_training_flags_are_as_before():
    task = make_task()
    task.model[1].eval()
    flags = [module.training for module in task.model.modules()]
    score(task)
    assert [module.training for module in task.model.modules()] == flags


def in_training_mode(model, batch):
    model.train()
    returned = cross_entropy(model, batch)
    model.eval()
    return returned


def test_a_loss_that_calls_the_model_in_training_mode():
    with pytest.raises(ScoringError, match="evaluation mode, but the model is called in training"):
        score(make_task(in_training_mode))
    with pytest.raises(ScoringError, match="module '3' is called in training mode"):
        score(make_task(lambda model, batch: cross_entropy(model, batch) if model[3].train() else None))
    score(make_task())


def test_no_gradient_is_left_on_the_model():
    task = make_task()
    score(task)
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_frozen_parameters_have_no_column():
    task = make_task()
    task.model[0].requires_grad_(False)
    assert "grad_norm.0" not in score(task)


def test_losses_alone_give_no_class_columns():
    scores = score(make_task(lambda model, batch: cross_entropy(model, batch)[0]))
    assert "loss" in scores
    assert "el2n" not in scores


def test_batches_may_be_mappings():
    def loss(model, batch):
        return cross_entropy(model, (batch["x"], batch["label"]))

    items = [{"x": inputs, "label": target} for inputs, target in data()]
    torch.testing.assert_close(score(make_task(loss, items)), score(make_task()))


def test_a_range_of_samples():
    whole = score(make_task())
    parts = list(score_batches(make_task(), start=3, stop=8, batch_size=2))
    assert [(part.start, part.stop) for part in parts] == [(3, 5), (5, 7), (7, 8)]
    torch.testing.assert_close(torch.cat([part.loss for part in parts]), whole["loss"][3:8])


def test_move_keeps_structure():
    moved = move({"x": Pair(torch.ones(2), ["text", (torch.zeros(1),)])}, "meta")
    assert isinstance(moved["x"], Pair)
    assert moved["x"].a.device.type == "meta"
    assert moved["x"].b[0] == "text"
    assert moved["x"].b[1][0].device.type == "meta"


def nan_at_four_and_nine(model, batch):
    losses, _ = cross_entropy(model, batch)
    return torch.where((batch[0] == data()[4][0]).all(1) | (batch[0] == data()[9][0]).all(1), torch.nan, losses)


STRANGER = network().eval()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: cross_entropy(model, batch)[0].mean(), r"scalar for 11 samples.*reduction=\"none\""),
        (lambda model, batch: cross_entropy(model, batch)[0][:-1], r"shape \(10,\) for 11 samples"),
        (lambda model, batch: model(batch[0]), r"shape \(11, 3\) for 11 samples"),
        (lambda model, batch: None, "must return losses .n,., or .losses, logits.; got NoneType"),
        (lambda model, batch: cross_entropy(model, batch)[0].detach(), "depend on no trainable parameter"),
        (nan_at_four_and_nine, "losses must be finite, not so for samples 4, 9$"),
        (lambda model, batch: (cross_entropy(model, batch)[0], model(batch[0])[:, 0]), r"logits of shape \(11,\)"),
        (lambda model, batch: (cross_entropy(model, batch)[0], 3), "got int for the logits"),
        (lambda model, batch: (cross_entropy(model, batch)[0], model(batch[0]) / 0), r"softmax\(logits\), must be finite"),
        (lambda model, batch: (batch[0] * 1).requires_grad_().sum(1), "reach no trainable parameter of ScoreTask.model"),
        # the square root has no finite gradient at zero
        (lambda model, batch: (model(batch[0]) * 0).sum(1).sqrt(), "gradient norms of '0' must be finite"),
    ],
)
def test_losses_that_cannot_be_scored(loss, message):
    with pytest.raises(ScoringError, match=message):
        score(make_task(loss))


def test_losses_of_another_model_cannot_be_scored():
    with pytest.raises(sw.SamplewiseError, match="reach no trainable parameter of the recorded model"):
        score(make_task(lambda _, batch: cross_entropy(STRANGER, batch)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda batch: batch[0], "labels must be integers of shape"),
        (lambda batch: batch[1].tolist(), "must return a tensor of integers .n,., got list"),
        (lambda batch: batch[1] - 1, r"labels must lie in 0 ... 2; not so for samples 0, 3, 6, 9"),
    ],
)
def test_labels_that_cannot_be_scored(labels, message):
    with pytest.raises(ScoringError, match=message):
        score(make_task(labels=labels))


@pytest.mark.parametrize("first", [0, 1])
def test_logits_of_some_batches_only(first):
    def loss(model, batch):
        losses, logits = cross_entropy(model, batch)
        return (losses, logits) if batch[1][0] == first else losses

    with pytest.raises(ScoringError, match="logits for every batch or for none"):
        score(make_task(loss), batch_size=4)


def test_classes_that_are_ruled_out_have_no_probability():
    def loss(model, batch):
        losses, logits = cross_entropy(model, batch)
        return losses, torch.cat([logits, torch.full_like(logits[:, :1], -torch.inf)], 1)

    torch.testing.assert_close(score(make_task(loss))["el2n"], score(make_task())["el2n"])


def sorted_batch(items):
    return default_collate(sorted(items, key=lambda item: float(item[0][0])))


def padded(items):
    return nn.utils.rnn.pad_sequence([inputs for inputs, _ in items], batch_first=True)


def mean_with_padding(model, batch):
    return model[4:](batch.tanh()).square().mean((1, 2))


UNEQUAL = [(torch.full((1 + place % 7, 8), 0.5, dtype=torch.float64), 0) for place in range(11)]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (make_task(collate_fn=sorted_batch), "do not stay at their samples' places"),
        (make_task(lambda model, batch: cross_entropy(model, batch)[0] / len(batch[0])), "among 8 samples and .* among 4"),
        (make_task(mean_with_padding, UNEQUAL, collate_fn=padded), "padded length of the batch"),
    ],
)
def test_losses_that_change_with_the_order_or_the_batch(task, message):
    with pytest.raises(ScoringError, match=message):
        score(task)
    assert len(score(task, batch_size=1)["loss"]) == 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_losses_near_zero_differ_by_rounding_alone(dtype):
    def loss(model, batch):
        last_digits = torch.linspace(-2, 2, len(batch[0]), dtype=dtype) * torch.finfo(dtype).eps
        return (model(batch[0]) * 0).sum(1) + last_digits

    inputs = torch.randn(11, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    score(ScoreTask(network().to(dtype), TensorDataset(inputs, torch.zeros(11)), loss))


def test_random_losses_are_scored_as_they_are():
    score(make_task(lambda model, batch: cross_entropy(model, batch)[0] * torch.rand(len(batch[0]))))


def test_logits_without_labels():
    items = [{"x": inputs, "class": target} for inputs, target in data()]
    task = make_task(lambda model, batch: cross_entropy(model, (batch["x"], batch["class"])), items)
    with pytest.raises(ScoringError, match="no labels where they are usually found"):
        score(task)


def test_items_of_different_sizes_ask_for_a_collate_function():
    items = [(torch.zeros(size, dtype=torch.float64), 0) for size in (5, 6)]
    with pytest.raises(ScoringError, match=r"default collate cannot make a batch.*collate_fn"):
        score(make_task(dataset=items))


class Stream(IterableDataset):
    def __len__(self):
        return 3

    def __iter__(self):
        return iter(data())


@pytest.mark.parametrize(
    ("model", "dataset", "loss", "message"),
    [
        ("no model", [1], cross_entropy, "model must be a torch.nn.Module, got str"),
        (nn.Linear(1, 1), iter([1]), cross_entropy, "dataset must be map-style"),
        (nn.Linear(1, 1), Stream(), cross_entropy, "dataset must be map-style"),
        (nn.Linear(1, 1), [], cross_entropy, "data set is empty"),
        (nn.Linear(1, 1), [1], None, "per_sample_loss must be a function"),
        (nn.Linear(1, 1).requires_grad_(False), [1], cross_entropy, "no parameter of the model has requires_grad"),
    ],
)
def test_tasks_that_cannot_be_scored(model, dataset, loss, message):
    with pytest.raises(ScoringError, match=message):
        ScoreTask(model, dataset, loss)


MASK = torch.arange(11) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": torch.arange(11)}, "labels must be a function, got Tensor"),
        ({"collate_fn": 1}, "collate_fn must be a function, got int"),
        ({"preview": "text"}, "preview must be a function, got str"),
        ({"class_names": {1: "b", 0: "a"}}, "class_names must be a sequence.*got dict"),
        ({"class_names": {"b", "a"}}, "class_names must be a sequence.*got set"),
        ({"known_mislabelled": MASK}, "got truth values: give mask.nonzero"),
        ({"known_mislabelled": MASK.numpy()}, "got truth values"),
        ({"known_mislabelled": MASK.tolist()}, "got truth values"),
        ({"known_mislabelled": [3, 11]}, r"known_mislabelled must lie in 0 ... 10, not so for 11"),
        ({"known_mislabelled": [-1]}, "not so for -1"),
    ],
)
def test_options_of_a_task_that_are_of_the_wrong_kind(options, message):
    with pytest.raises(ScoringError, match=message):
        make_task(**options)


@pytest.mark.parametrize("known", [{1, 2}, range(1, 3), torch.tensor([1, 2]), torch.tensor([1, 2]).numpy(), (1, 2)])
def test_known_errors_in_any_collection(known):
    make_task(known_mislabelled=known)
    assert detection(torch.tensor([0.1, 0.9, 0.2]), known).recall == 1


def test_any_object_with_the_attributes_is_a_task():
    own = SimpleNamespace(model=network(), dataset=data(), per_sample_loss=cross_entropy, class_names="abc")
    task = as_score_task(own)
    assert (task.model, task.class_names, task.labels) == (own.model, "abc", None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "got None .is a return statement missing.. without model, dataset, per_sample_loss"),
        (SimpleNamespace(model=1, dataset=2), "got SimpleNamespace without per_sample_loss"),
    ],
)
def test_other_values_are_not(value, message):
    with pytest.raises(ScoringError, match=message):
        as_score_task(value)


NAMES = ["net.a.0.weight", "net.a.1.weight", "net.b.weight", "net.scale"]


def test_groups_are_the_first_level_that_splits():
    assert list(group_parameters(NAMES)) == ["net.a", "net.b", "net.scale"]
    assert list(group_parameters(["weight"])) == ["weight"]


def test_groups_by_depth_and_by_prefix():
    assert list(group_parameters(NAMES, depth=1)) == ["net"]
    assert list(group_parameters(NAMES, depth=3)) == ["net.a.0", "net.a.1", "net.b.weight", "net.scale"]
    assert group_parameters(NAMES, prefixes=["net.a", "net.a.1"]) == {
        "net.a": ("net.a.0.weight",),
        "net.a.1": ("net.a.1.weight",),
        "other": ("net.b.weight", "net.scale"),
    }


def test_a_prefix_that_covers_nothing():
    with pytest.raises(ScoringError, match="no trainable parameter lies under ne, c; the model has net"):
        group_parameters(NAMES, prefixes=["ne", "c"])


def test_other_is_what_no_prefix_covers():
    assert list(group_parameters(["other.w"], prefixes=["other"])) == ["other"]
    with pytest.raises(ScoringError, match="'other' is the group of what no prefix covers"):
        group_parameters(["other.w", "a.w"], prefixes=["other"])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"head": ("4.weight", "4.bias")}, r"0.weight, 0.bias, 1.weight ... \(in no group\)"),
        (
            {**group_parameters(["0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"]), "b": ("4.bias",)},
            "in several",
        ),
        ({"head": ("5.weight",)}, r"5.weight \(no trainable parameter\)"),
    ],
)
def test_groups_must_hold_every_parameter_once(groups, message):
    with pytest.raises(ScoringError, match=message):
        score(make_task(), groups=groups)


def test_equal_values_keep_their_order():
    assert rank(torch.tensor([1.0, 2.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]


def test_top_share():
    norms = torch.tensor([1.0] * 199 + [10.0])
    share = top_share(norms)  # the top 1 % of 200 are 2 samples
    assert share.samples == 2
    assert share.norm == pytest.approx(11 / 209)
    assert share.squared_norm == pytest.approx(101 / 299)
    assert top_share(torch.zeros(3)).norm == 0


def test_detection_counts_hits_among_the_first():
    found = detection(torch.tensor([0.9, 0.8, 0.7, 0.1]), [0, 2])
    assert (found.known, found.found, found.precision, found.recall) == (2, 1, 0.5, 0.5)
    assert found.average_precision == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank(torch.tensor([0.0, torch.nan])), "value of sample 1 is not a number"),
        (lambda: top_share(torch.tensor([1.0, torch.nan])), "finite and not negative"),
        (lambda: top_share(torch.tensor([1.0, torch.inf])), "finite and not negative"),
        (lambda: top_share(torch.tensor([])), "one sample or more"),
        (lambda: top_share(torch.ones(2), 2.0), "between 0 and 1, got 2.0"),
        (lambda: detection(torch.ones(3), []), "nothing to find"),
        (lambda: detection(torch.ones(3), [False, True, False]), "got truth values"),
        (lambda: detection(torch.ones(3), [-1]), "must lie in 0 ... 2, not so for -1"),
    ],
)
def test_figures_of_values_that_give_none(call, message):
    with pytest.raises(ScoringError, match=message):
        call()


def test_the_top_is_as_large_as_its_fraction():
    assert [top_share(torch.ones(100), fraction).samples for fraction in (0.0, 0.07, 0.29, 0.291, 1.0)] == [1, 7, 29, 30, 100]
