"""The judge itself: it passes what is right, catches what is not, and changes nothing; projections are the same everywhere."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samplewise as sw
from samplewise.factors import Dense
from samplewise.registry import RULES, operation
from samplewise.testing import Sample, check_rule
from samplewise.verification import Difference, Report

LINEAR = operation(F.linear).name


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().flatten(1).sum(1)


def supervised(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def small(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    return model.to(dtype), torch.randn(6, 4, dtype=dtype)


def sabotage(monkeypatch: pytest.MonkeyPatch, name: str, change: object) -> None:
    """Let the rule of linear give another factor for one of its parameters."""
    rule = RULES[LINEAR]

    def wrong(grad: Tensor, out: None, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> dict[str, object]:
        factors = dict(rule.function(grad, out, input, weight, bias))
        make = factors[name]
        factors[name] = lambda: change(make() if callable(make) else make)
        return factors

    monkeypatch.setitem(RULES, LINEAR, replace(rule, function=wrong))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_passes_right_models(dtype: torch.dtype) -> None:
    model, x = small(dtype)
    report = sw.verify(model, squares, x)
    assert not report.failures
    assert report.samples == (0, 2, 5)
    assert {d.quantity for d in report.differences} >= {
        "gradient",
        "norm",
        "weighted sum",
        "dot",
        "gram",
        "projection",
        "clipped sum",
        "norm streamed",
    }
    assert re.fullmatch(r"\d+ comparisons on samples \[0, 2, 5\] agree; largest relative error \S+", str(report))


def test_takes_nested_batches_and_one_sample() -> None:
    model, x = small()
    batch = {"x": x, "y": torch.tensor([0, 1, 2, 0, 1, 2])}
    assert not sw.verify(model, supervised, batch).failures
    assert sw.verify(model, squares, x[:1]).samples == (0,)
    assert sw.verify(model, squares, x, samples=6).samples == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("parameter", "change"),
    [
        ("weight", lambda factor: Dense(factor.to_dense() * 1.01)),
        ("weight", lambda factor: Dense(factor.to_dense().roll(1, 0))),
        ("bias", lambda factor: Dense(factor.to_dense() + 0.01)),
        ("bias", lambda factor: Dense(factor.to_dense().flip(0))),
    ],
)
def test_catches_a_sabotaged_rule(parameter: str, change: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small()
    sabotage(monkeypatch, parameter, change)
    with pytest.raises(sw.VerificationError, match=rf"gradient of '0\.{parameter}': relative error .*, tolerance") as caught:
        sw.verify(model, squares, x)
    assert re.match(r"\d+ of \d+ comparisons differ from the batch-of-one loop:\n", str(caught.value))
    with pytest.raises(sw.VerificationError, match="linear: sample 0, as given: gradient of"):
        check_rule(
            F.linear, [Sample((x, nn.Parameter(torch.randn(2, 4).double()), nn.Parameter(torch.randn(2).double())), n=6)]
        )


@pytest.mark.parametrize("quantity", ["sq_norms", "weighted_sum", "dot", "gram", "project"])
def test_catches_a_wrong_quantity(quantity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are right here; only a fast path is not."""
    from samplewise.outer import Outer

    right = getattr(Outer, quantity)
    monkeypatch.setattr(Outer, quantity, lambda *args: right(*args) * 1.5)
    model, x = small()
    with pytest.raises(sw.VerificationError):
        sw.verify(model, squares, x)
    with pytest.raises(sw.VerificationError):
        check_rule(F.linear, [Sample((x, nn.Parameter(torch.randn(2, 4).double())), n=6)])


def test_catches_dropout_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 2)).double()
    with pytest.raises(sw.VerificationError):
        sw.verify(model, squares, torch.randn(6, 4).double())
    assert not sw.verify(model.eval(), squares, torch.randn(6, 4).double()).failures


def test_catches_losses_that_depend_on_the_batch() -> None:
    model, x = small()
    with pytest.raises(sw.SamplewiseError):
        sw.verify(model, lambda m, batch: squares(m, batch) / squares(m, batch).detach().mean(), x)


def test_leaves_the_model_as_it_was() -> None:
    model, x = small()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)
    sw.verify(model, squares, x)
    assert model[0].weight.grad.eq(7.0).all()
    assert model[0].bias.grad is None
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


def test_grads_are_put_back_after_an_error() -> None:
    model, x = small()
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)

    def broken(model: nn.Module, batch: Tensor) -> Tensor:
        model(batch)
        raise KeyError("broken")

    with pytest.raises(KeyError):
        sw.verify(model, broken, x)
    assert model[0].weight.grad.eq(7.0).all()


def test_nan_is_a_failure() -> None:
    model, x = small()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(sw.VerificationError, match="inf"):
        sw.verify(model, squares, x)


@pytest.mark.parametrize("batch", [torch.zeros(0, 4), {}, torch.tensor(1.0)])
def test_needs_samples(batch: object) -> None:
    with pytest.raises(ValueError, match="at least one tensor with samples on axis 0"):
        sw.verify(small()[0], squares, batch)


def test_report_text() -> None:
    wrong = Difference("gradient", "'w'", 0.5, 1e-8)
    report = Report((0, 1), (wrong, Difference("norm", "all parameters", 1e-12, 1e-8)))
    assert report.failures == (wrong,)
    assert report.worst == 0.5
    assert str(report).splitlines()[1] == "gradient of 'w': relative error 5.0e-01, tolerance 1.0e-08"


# --- projections --------------------------------------------------------------------------------------------------------------


def test_projections_depend_on_seed_and_name_alone() -> None:
    shape = torch.Size([3, 2])
    first = sw.GaussianProjection(5, seed=3).matrix("a", shape)
    torch.manual_seed(99)
    torch.rand(10)
    assert first.equal(sw.GaussianProjection(5, seed=3).matrix("a", shape))
    assert not first.equal(sw.GaussianProjection(5, seed=4).matrix("a", shape))
    assert not first.equal(sw.GaussianProjection(5, seed=3).matrix("b", shape))
    assert torch.get_rng_state().equal(_state_after(lambda: sw.GaussianProjection(5).matrix("a", shape)))


def _state_after(run: object) -> Tensor:
    run()
    return torch.get_rng_state()


def test_stored_projections_stay_what_they_are() -> None:
    """Scores stored with one version must be comparable with the next: a change here needs a new version in the key."""
    matrix = sw.GaussianProjection(2, seed=1).matrix("weight", torch.Size([2]))
    torch.testing.assert_close(matrix, torch.tensor(STORED), atol=1e-6, rtol=0)


STORED = [[-0.282239, 0.704601], [-0.389666, -0.341337]]


def test_projections_keep_squared_norms_on_average() -> None:
    model, x = small()
    with sw.record(model) as rec:
        rec.backward(squares(model, x))
    found = torch.stack([rec.project(sw.GaussianProjection(64, seed=k)).square().sum(1) for k in range(60)]).mean(0)
    torch.testing.assert_close(found, rec.norms().square(), rtol=0.1, atol=0)


def test_projection_of_a_batch_is_that_of_its_parts() -> None:
    model, x = small()
    parts = []
    for piece in (x, x[:2], x[2:]):
        with sw.record(model) as rec:
            rec.backward(squares(model, piece))
        parts.append(rec.project(sw.GaussianProjection(8)))
    torch.testing.assert_close(parts[0], torch.cat(parts[1:]))
