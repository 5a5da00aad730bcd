"""Traces as CUDA graphs, with a stand-in on the CPU: what is copied in and out, and when a graph no longer holds."""

import contextlib
import copy
import warnings
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
        # what is said of a launched step that waits for the device
        self.waits: list[str] = []
        self.error: Exception | None = None

    def captured(self, run, pool, device):
        if self.error is not None:
            raise self.error
        self.captures += 1
        # what a capture launches does not run: its effects are undone
        state, before = torch.get_rng_state(), [x.clone() for x in self.outside]
        found, held = run(), set(map(memory, self.outside))
        torch.set_rng_state(state)
        for x, old in zip(self.outside, before, strict=True):
            x.copy_(old)

        def replay():
            self.replays += 1
            for old, new in zip(found, run(), strict=True):
                if memory(old) not in held:
                    old.untyped_storage().copy_(new.untyped_storage())

        return SimpleNamespace(replay=replay), found

    # the caller's buffers
    outside: Sequence[Tensor] = ()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    made, stream = Graphs(), SimpleNamespace(wait_event=lambda _: None, record_event=object)
    monkeypatch.setattr(captured, "_DEVICE", "cpu")
    monkeypatch.setattr(captured, "_captured", made.captured)
    monkeypatch.setattr(captured, "_waits", lambda: contextlib.nullcontext(made.waits))
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


class Counted(nn.Module):
    """Writes to a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 2))
        self.register_buffer("state", torch.zeros(N, 3))
        self.register_buffer("table", torch.arange(6.0).view(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.state.mul_(2).add_(1)
        return x @ self.w


def test_what_cannot_be_captured_is_said_before_the_next_call_runs(graphs: Graphs) -> None:
    """And the call in which that was found out loses nothing."""
    for waits, error in ((["it waits"], None), ([], RuntimeError("not permitted\nand more"))):
        model = Counted()
        graphs.waits, graphs.error, graphs.outside = waits, error, [model.state]
        run = sw.traced(sw.per_sample_norms, model, squares, capture=True)
        for _ in range(BEFORE):
            wanted = sw.per_sample_norms(copy.deepcopy(model), squares, torch.ones(N, 3))
            equal(run(torch.ones(N, 3)), wanted)
        before = model.state.clone()
        for _ in range(2):
            with pytest.raises(sw.UnsupportedOpError, match="wait for the device" if waits else "not permitted\\)"):
                run(torch.ones(N, 3))
        assert torch.equal(model.state, before)
    assert not graphs.captures


def test_without_room_for_a_graph_ops_are_launched(graphs: Graphs) -> None:
    model, x = network(), normal(N, 3)
    graphs.error = torch.OutOfMemoryError("none left")
    run = sw.traced(sw.per_sample_norms, model, squares, capture=True)
    for _ in range(BEFORE - 1):
        run(x)
    with pytest.warns(UserWarning, match="no memory for a graph"):
        run(x)
    graphs.error = AssertionError("it is tried again")
    equal(run(x), sw.per_sample_norms(model, squares, x))


def test_a_batch_in_memory_that_the_model_writes_to(graphs: Graphs) -> None:
    """A copy of it would not hear of that."""
    model = Counted()
    graphs.outside = [model.state]
    run = sw.traced(sw.per_sample_norms, model, squares, capture=True)
    for k in range(BEFORE + 1):
        run(torch.ones(N, 3) * k)
    model.state.fill_(3.0)
    found = run(model.state)
    model.state.fill_(3.0)
    equal(found, sw.per_sample_norms(model, squares, model.state))


def test_results_share_memory_and_have_strides_as_they_have_without_a_graph(graphs: Graphs) -> None:
    def quantity(model, loss_fn, batch):
        norms = sw.per_sample_norms(model, loss_fn, batch)
        wide = norms[:, None].expand(N, 4)
        return {"norms": norms, "wide": wide, "some": norms[1:4:2], "held": model.table, "part": model.table[:1]}

    model = Counted()
    graphs.outside = [model.state, model.table]
    run, x = sw.traced(quantity, model, squares, capture=True), torch.ones(N, 3)
    for _ in range(BEFORE + 1):
        run(x)
    found, wanted = run(x), quantity(model, squares, x)
    assert graphs.replays == 2
    equal(found, wanted)
    assert [y.stride() for y in found.values()] == [y.stride() for y in wanted.values()]
    found["norms"].zero_()
    assert not found["wide"].any()
    assert not found["some"].any()
    # what others hold is theirs, and a view of it is a new one in each call
    assert found["held"] is model.table
    found["part"].t_()
    equal(run(x)["part"], wanted["part"])


def test_switches_that_choose_kernels_are_looked_at(graphs: Graphs) -> None:
    model, x = network(), normal(N, 3)
    run = sw.traced(sw.per_sample_norms, model, squares, capture=True)
    for _ in range(BEFORE + 1):
        run(x)
    assert (graphs.captures, graphs.replays) == (1, 1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        run(x), run(x), run(x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (graphs.captures, graphs.replays) == (2, 2)


def test_versions_count_on_in_other_memory(graphs: Graphs) -> None:
    model, x = network(), normal(N, 3)
    out = {name: torch.zeros(N, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    graphs.outside = list(out.values())
    run = sw.traced(sw.per_sample_grads, model, squares, capture=True, out=out)
    for _ in range(BEFORE + 1):
        run(x)
    for buffer in out.values():
        buffer.data = buffer.data.clone()
    for _ in range(4):
        versions = [buffer._version for buffer in out.values()]
        run(x)
        assert all(buffer._version > old for buffer, old in zip(out.values(), versions, strict=True))
    assert graphs.captures == 2


def test_a_scattered_batch_is_refused(graphs: Graphs) -> None:
    model, data = nn.Linear(8, 2), torch.randn(50_000, 100, 8)
    run = sw.traced(sw.per_sample_norms, model, squares, capture=True)
    run(data[:100, 0])
    run(data[:1000, 0].contiguous())
    run(data[:30_000, 0])
    with pytest.raises(sw.UnsupportedOpError, match=r"scattered .* give its `.contiguous"):
        run(data[:30_000, 1])
    # small enough
    run(data[:100, 1])


def stand_ins() -> dict[str, MagicMock]:
    return {name: MagicMock() for name in ("CUDAGraph", "current_stream", "stream", "graph", "Stream")}


def test_a_broken_capture_is_mended() -> None:
    """For the allocator and the generator, by a capture that ends well."""

    def run():
        raise RuntimeError("operation not permitted")

    end, device = MagicMock(side_effect=RuntimeError("it had ended")), torch.device("cpu")
    with patch.multiple(torch.cuda, **stand_ins()), patch.object(torch._C, "_cuda_endAllocateToPool", end, create=True):
        with pytest.raises(RuntimeError, match="not permitted"):
            captured._captured(run, SimpleNamespace(handle=(0, 1)), device)
        assert torch.cuda.graph.call_count == 2
        assert captured._captured(lambda: [1], SimpleNamespace(handle=(0, 1)), device)[1] == [1]
        assert torch.cuda.graph.call_count == 3
    end.assert_called_once_with(None, (0, 1))


def test_steps_that_wait_are_found(recwarn: pytest.WarningsRecorder) -> None:
    modes = [0]
    switched = {"get_sync_debug_mode": lambda: modes[-1], "set_sync_debug_mode": modes.append}
    with patch.multiple(torch.cuda, **switched):
        with captured._waits() as found:
            assert modes == [0, 1]
        assert not found
        with captured._waits() as found:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
            warnings.warn("another one", stacklevel=1)
    assert found
    assert modes[-1] == 0
    assert [str(warning.message) for warning in recwarn] == ["another one"]


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
