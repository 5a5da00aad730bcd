"""Traces as CUDA graphs, with a stand-in on the CPU: what is copied in and out, and when a graph no longer holds."""

import contextlib
import copy
from collections.abc import Sequence
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch import Tensor, nn

import samplewise as sw
from samplewise import captured
from samplewise.trace import memory
from test_tracing import batch_like, equal, quantities
from test_ways_of_running import Net, normal, squares

N = 5
# recorded once, traced twice, launched once more: the next one is a replay
BEFORE = 4


class Graphs:
    """Graphs that run their ops again, into the results of the first time, as a graph writes to the same addresses."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def captured(self, run, pool):
        self.captures += 1
        # what a capture launches does not run: its effects are undone
        state, before = torch.get_rng_state(), [x.clone() for x in self.outside]
        given, held = run(), set(map(memory, self.outside))
        copies = {id(x): x if memory(x) in held else x.clone() for x in given}
        found = [copies[id(x)] for x in given]
        torch.set_rng_state(state)
        for x, old in zip(self.outside, before, strict=True):
            x.copy_(old)

        def replay():
            self.replays += 1
            for old, new in zip(found, run(), strict=True):
                if memory(old) not in held:
                    old.copy_(new)

        return SimpleNamespace(replay=replay), found

    # the caller's buffers
    outside: Sequence[Tensor] = ()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    made, stream = Graphs(), SimpleNamespace(wait_event=lambda _: None, record_event=object)
    monkeypatch.setattr(captured, "_DEVICE", "cpu")
    monkeypatch.setattr(captured, "_captured", made.captured)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    return made


def network() -> nn.Module:
    return Net(lambda m, x: torch.tanh(x @ m.w).square() @ m.v, w=normal(3, 4), v=normal(4, 2)).double()


def test_a_replay_gives_the_numbers_of_its_batch_in_memory_of_their_own(graphs: Graphs) -> None:
    model = network()
    run, first = sw.traced(quantities, model, squares, capture=True), normal(N, 3)
    batches = [batch_like(first, seed) for seed in range(BEFORE + 3)]
    found = [run(x) for x in batches]
    assert (graphs.captures, graphs.replays) == (1, 3)
    # earlier results are as they were
    for x, results in zip(batches, found, strict=True):
        equal(results, quantities(model, squares, x))


def test_parameters_are_read_where_they_are(graphs: Graphs) -> None:
    """A step of an optimizer writes to the same memory; other memory is captured anew when it has come twice."""
    model = network()
    run, x = sw.traced(sw.per_sample_norms, model, squares, capture=True), normal(N, 3)
    for _ in range(BEFORE + 1):
        run(x)
    with torch.no_grad():
        model.w.mul_(0.5)
    equal(run(x), sw.per_sample_norms(model, squares, x))
    assert (graphs.captures, graphs.replays) == (1, 2)
    model.w.data = model.w.data * 3
    wanted = sw.per_sample_norms(model, squares, x)
    equal(run(x), wanted)
    assert (graphs.captures, graphs.replays) == (1, 2)
    equal([run(x), run(x)], [wanted, wanted])
    assert (graphs.captures, graphs.replays) == (2, 3)
    # to and fro: no graph of addresses that were there once
    for k in range(4):
        model.w.data = model.w.data * (k + 1.0)
        equal(run(x), sw.per_sample_norms(model, squares, x))
    assert (graphs.captures, graphs.replays) == (2, 3)


def test_the_callers_buffers_are_written_to_and_handed_back(graphs: Graphs) -> None:
    model, x = network(), normal(N, 3)
    out = {name: torch.zeros(N, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    graphs.outside = list(out.values())
    run = sw.traced(sw.per_sample_grads, model, squares, capture=True, out=out)
    for seed in range(BEFORE + 2):
        fed = batch_like(x, seed)
        versions = [buffer._version for buffer in out.values()]
        found = run(fed)
        assert all(found[name] is out[name] for name in out)
        # autograd may have saved them
        assert all(buffer._version > old for buffer, old in zip(out.values(), versions, strict=True))
        equal(found, sw.per_sample_grads(model, squares, fed))
    assert graphs.replays == 2


LAYOUTS = {
    "a slice": lambda x: torch.cat([x, x], 1)[:, 2:5],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand(N, 3),
    "with an offset": lambda x: torch.cat([x, x])[N:],
    "overlapping": lambda x: x.flatten().as_strided((N, 3), (1, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_of_any_layout(graphs: Graphs, layout: str) -> None:
    model, make = network(), LAYOUTS[layout]
    run = sw.traced(sw.per_sample_norms, model, squares, capture=True)
    for seed in range(BEFORE + 2):
        x = make(batch_like(normal(N, 3), seed))
        equal(run(x), sw.per_sample_norms(model, squares, x))
    assert graphs.replays == 2


def test_batches_of_several_sizes_and_an_empty_one(graphs: Graphs) -> None:
    model = network()
    run = sw.traced(sw.clipped_grads, model, squares, capture=True, max_grad_norm=0.5)
    for seed in range(BEFORE + 2):
        for n in (N, 2, 0):
            x = batch_like(normal(n, 3), seed)
            equal(run(x), sw.clipped_grads(model, squares, x, max_grad_norm=0.5))
    assert (graphs.captures, graphs.replays) == (3, 6)


def test_results_that_are_parts_of_the_batch_or_one_tensor(graphs: Graphs) -> None:
    def quantity(model, loss_fn, batch):
        norms = sw.per_sample_norms(model, loss_fn, batch)
        return {"norms": norms, "again": norms, "batch": batch, "part": batch[:, 1], "three": 3}

    model = network()
    run = sw.traced(quantity, model, squares, capture=True)
    kept = []
    for seed in range(BEFORE + 3):
        x = batch_like(normal(N, 3), seed)
        kept.append((x, run(x)))
    assert graphs.replays == 3
    for x, found in kept:
        equal(found, quantity(model, squares, x))
        assert found["norms"] is found["again"]


def test_a_yes_or_no_has_graphs_of_its_own(graphs: Graphs) -> None:
    model = Net(lambda m, x: x @ m.w if (x[:, 0] > 0).all() else (x * 2) @ m.w, w=normal(3, 2)).double()
    run = sw.traced(sw.per_sample_norms, model, squares, capture=True)
    for seed in range(BEFORE + 2):
        for sign in (1, -1):
            x = batch_like(normal(N, 3), seed).abs() * sign
            equal(run(x), sw.per_sample_norms(model, squares, x))
    # one recording for both
    assert (graphs.captures, graphs.replays) == (2, 5)


def test_somebody_elses_graph_gets_the_ops(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), normal(N, 3)
    run = sw.traced(sw.per_sample_norms, model, squares, capture=True)
    for _ in range(BEFORE + 1):
        run(x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    equal(run(x), sw.per_sample_norms(model, squares, x))
    assert graphs.replays == 1


def test_copies_capture_for_themselves(graphs: Graphs) -> None:
    model, x = network(), normal(N, 3)
    run = sw.traced(sw.per_sample_norms, model, squares, capture=True)
    for _ in range(BEFORE):
        run(x)
    other = copy.copy(run)
    for _ in range(BEFORE):
        equal(other(x), sw.per_sample_norms(model, squares, x))
    assert graphs.captures == 2
    run.release()
    for _ in range(BEFORE):
        run(x)
    assert graphs.captures == 3


def test_memory_that_runs_out_is_no_refusal() -> None:
    def run():
        raise torch.OutOfMemoryError("none left")

    stands_in = dict.fromkeys(("CUDAGraph", "current_stream", "stream", "graph"), MagicMock())
    with patch.multiple(torch.cuda, **stands_in), pytest.raises(torch.OutOfMemoryError):
        captured._captured(run, SimpleNamespace(handle=None))


def test_a_batch_that_is_written_to_is_refused(graphs: Graphs) -> None:
    """By the graph it would be a copy that is written to."""
    model = Net(lambda m, x: x.mul_(2) @ m.w, w=normal(3, 2)).double()
    run, x = sw.traced(sw.per_sample_norms, model, squares, capture=True), normal(N, 3)
    run(x)
    with pytest.raises(sw.UnsupportedOpError, match="write to the batch"):
        run(x)


def test_a_conjugated_batch_is_refused(graphs: Graphs) -> None:
    model, x = Net(lambda m, x: x.real @ m.w, w=normal(3, 2)).double(), torch.complex(normal(N, 3), normal(N, 3)).conj()
    run = sw.traced(sw.per_sample_norms, model, squares, capture=True)
    run(x)
    with pytest.raises(sw.UnsupportedOpError, match="conjugates"):
        run(x)
