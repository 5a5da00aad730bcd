"""Unmodified Hugging Face models: exact against a batch-of-one loop in float64, or refused with a reason."""

import re

import pytest
import torch

import samplewise as sw
import transformers_models
from transformers_models import CASES, PAGE, REFUSED, Case, N, largest_error, one_by_one, outcome, recorded, rows


def case(name: str) -> Case:
    return next(c for c in CASES if str(c) == name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_or_refused(case: Case) -> None:
    found = outcome(case)
    if case.refused:
        assert re.search(case.refused, found), found
    else:
        assert found == "exact"


@pytest.mark.parametrize("name", ["GPT-2, sdpa, padded left", "BERT", "CvT", "Swin v2", "BART", "LoRA on GPT-2"])
def test_agrees_with_finite_differences(name: str) -> None:
    """A judge without autograd: how each sample's loss changes along a random direction of all parameters."""
    model, batch = case(name).model(), case(name).batch()
    rec = recorded(case(name), model, batch)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    direction = {n: torch.randn_like(p) for n, p in parameters.items()}
    found, step = rec.dot(direction), 1e-5

    def losses(size: float) -> torch.Tensor:
        for n, p in parameters.items():
            p.data.add_(direction[n], alpha=size)
        out = case(name).loss(model, batch).detach()
        for n, p in parameters.items():
            p.data.sub_(direction[n], alpha=size)
        return out

    expected = (losses(step) - losses(-step)) / (2 * step)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_comparison_can_fail() -> None:
    """The judge of this file: rows of other samples, of one parameter alone, and slightly wrong ones are errors."""
    gpt = case("GPT-2, eager, T = n")
    right = one_by_one(gpt, gpt.model(), gpt.batch())
    assert largest_error(right, right) == 0
    for name, found in right.items():
        for wrong in (found.roll(1, 0), found * 1.001, torch.zeros_like(found)):
            assert largest_error({**right, name: wrong}, right) > 1e-4, name
    with pytest.raises(AssertionError):
        largest_error({name: found for name, found in right.items() if name != "transformer.wpe.weight"}, right)


def test_wrong_expectations_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`outcome` raises for wrong numbers: here the reference is made wrong."""
    right = transformers_models.one_by_one
    monkeypatch.setattr(transformers_models, "one_by_one", lambda *args: {k: x * 1.01 for k, x in right(*args).items()})
    with pytest.raises(AssertionError, match=r"relative error 9\.9e-03"):
        outcome(case("GPT-2, eager, T = n"))


def test_only_adapters_have_gradients() -> None:
    lora = case("LoRA on Llama")
    model = lora.model()
    grads = recorded(lora, model, lora.batch()).grads()
    assert len(grads) == 2 * 2 * 2
    assert all("lora_" in name for name in grads)
    assert all(p.grad is None for p in model.parameters())


def test_tied_head_is_one_parameter() -> None:
    gpt = case("GPT-2, eager, T = n")
    model = gpt.model()
    assert model.lm_head.weight is model.transformer.wte.weight
    row = next(line for line in str(recorded(gpt, model, gpt.batch()).coverage()).splitlines() if "wte" in line)
    assert row.split()[:2] == ["transformer.wte.weight", "2"]


def test_models_own_loss_is_refused() -> None:
    """`model(..., labels=...)` averages over the tokens of the whole batch: no sum over samples where lengths differ."""
    llama = case("Llama, sdpa, padded left")
    model, batch = llama.model(), llama.batch()
    with sw.record(model, batch_size=N) as rec, pytest.raises(ValueError, match=r"expected one loss per sample, shape \(3,\)"):
        rec.backward(model(**batch).loss)
    with sw.record(model, batch_size=N, loss_reduction="mean"), pytest.raises(sw.SamplewiseError):
        model(**batch).loss.backward()


def test_names_are_unique_and_refusals_have_a_case() -> None:
    assert len({str(c) for c in CASES}) == len(CASES)
    assert {str(c) for c in CASES} >= REFUSED.keys()


def test_page_lists_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in page if line.startswith("| ")] == rows(), "run `python -m tests.transformers_models`"
