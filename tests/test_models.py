"""Models written by hand, each exact against a loop over its samples, or refused with a reason."""

from pathlib import Path

import pytest
import torch

import samplewise as sw
from models import MIXED, MODELS, N, collated, values

EXACT = [name for name, entry in MODELS.items() if not entry.refused]
REFUSED = [name for name, entry in MODELS.items() if entry.refused]
TABLE = Path(__file__).parents[1] / "docs" / "models_hand_built.md"


def sample(batch, i):
    return tuple(x[i : i + 1] for x in batch)


def built(entry):
    torch.manual_seed(0)
    return entry.make().double()


def stacked(model, losses):
    """The gradients of scalar losses, one row each."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in losses
    ]
    return {name: torch.stack(grads) for name, grads in zip(trained, zip(*rows, strict=True), strict=True)}


def rows_alone(entry, model):
    """The gradient of each sample's own loss, run on its own."""
    return stacked(model, (entry.losses(model, sample(entry.batch, i)).squeeze(0) for i in range(N)))


def rows_together(entry, model):
    """The gradient of each entry of the batch's losses."""
    return stacked(model, entry.losses(model, entry.batch))


def recorded(entry, model):
    with sw.record(model, batch_size=N) as rec:
        rec.backward(entry.losses(model, entry.batch))
    return rec


def assert_rows(found, wanted):
    assert list(found) == list(wanted)
    for name, rows in wanted.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    entry = MODELS[name]
    model = built(entry)
    wanted = rows_alone(entry, model)
    assert all(rows.abs().amax() > 0 for rows in wanted.values()), "a parameter that tests nothing"
    assert_rows(recorded(entry, model).grads(), wanted)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", EXACT)
def test_verified(name):
    entry = MODELS[name]
    assert not sw.verify(built(entry), entry.losses, entry.batch).failures


@pytest.mark.parametrize("name", REFUSED)
def test_refused_today(name):
    """Each sample has its gradient, but the recording cannot follow where."""
    entry = MODELS[name]
    model = built(entry)
    assert largest_difference(rows_alone(entry, model), rows_together(entry, model)) < 1e-9
    with pytest.raises(sw.SamplewiseError, match=entry.refused):
        recorded(entry, model)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", MIXED)
def test_refused_because_samples_mix(name):
    """The loss of a sample is another one in another batch: the reason why these are refused is checked too."""
    entry = MIXED[name]
    model = built(entry)
    alone = rows_alone(entry, model)
    assert largest_difference(alone, rows_together(entry, model)) > 0.01 * max(rows.abs().max() for rows in alone.values())
    with pytest.raises((sw.SampleAxisError, sw.MixedSamplesError)):
        recorded(entry, model)
    assert all(p.grad is None for p in model.parameters())


# plain PyTorch itself has no empty batch for these
NEVER_EMPTY = {
    "Swin",
    "spatial transformer",
    "views interleaved",
    "LSTM language model",
    "Transformer",
    "relative positions",
    "Fourier operator",
    "speech recogniser",
    "detection transformer",
    "padded again",
    *(name for name in MODELS if name.startswith("loop over samples")),
}


@pytest.mark.parametrize("name", [name for name in EXACT if name not in NEVER_EMPTY])
def test_an_empty_batch(name):
    entry = MODELS[name]
    model, empty = built(entry), tuple(x[:0] for x in entry.batch)
    with sw.record(model, batch_size=0) as rec:
        rec.backward(entry.losses(model, empty))
    found = rec.grads()
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {
        name: (0, *p.shape) for name, p in model.named_parameters() if p.requires_grad
    }
    assert rec.norms().shape == (0,)


@pytest.mark.parametrize("name", sorted(NEVER_EMPTY))
def test_what_is_never_empty(name):
    entry = MODELS[name]
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        entry.losses(built(entry), tuple(x[:0] for x in entry.batch)).sum().backward()


@pytest.mark.parametrize("name", EXACT)
def test_one_sample(name):
    entry = MODELS[name]
    model, last = built(entry), sample(entry.batch, N - 1)
    with sw.record(model, batch_size=1) as rec:
        rec.backward(entry.losses(model, last))
    assert_rows(rec.grads(), {name: rows[N - 1 :] for name, rows in rows_alone(entry, model).items()})


def test_graphs_collated_by_a_loader():
    """Rows made outside are declared with their owners, and nothing else is."""
    entry = MODELS["graph, sparse"]
    model, (x, edges) = built(entry), entry.batch
    wanted = stacked(model, (values(model(*collated(*sample((x, edges), i)), 1)).squeeze(0) for i in range(N)))
    nodes, links, owners = collated(x, edges)
    assert len(nodes) % N == 0, "what could be taken for equal graphs"
    with sw.record(model, batch_size=N) as rec:
        rec.batched(nodes, owners=owners)
        rec.backward(values(model(nodes, links, owners, N)))
    assert_rows(rec.grads(), wanted)


def test_the_table_of_the_documentation_lists_every_model():
    rows = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    listed = {name: (special, state) for name, special, state in rows[1:]}
    assert set(listed) == {*MODELS, *MIXED}
    for name, entry in {**MODELS, **MIXED}.items():
        state = "mixes its samples" if entry.mixes else "refused today" if entry.refused else "exact"
        assert listed[name] == (entry.special, state), name
