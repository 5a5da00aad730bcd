"""The choice of algorithms: any choice gives the same numbers, and costs decide by shapes, budget and measured rates."""

import ctypes
import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import samplewise as sw
from samplewise import buffers, products, strategy
from samplewise.factors import Dense, Factor, Pulled, squares
from samplewise.outer import Outer, _by_onednn, _tiles
from samplewise.strategy import STRATEGIES, Rates
from samplewise.streaming import _frees


class Mixed(nn.Module):
    """A convolution, an embedding tied to a head, and layers on both sides of every choice."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.early, self.late = nn.Conv1d(4, 3, 3, padding=1), nn.Conv1d(3, 16, 3, stride=4, padding=1)
        self.wide, self.narrow = nn.Linear(16, 40), nn.Linear(40, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.late(self.early(self.tokens(ids).mT).relu()).mT
        return self.norm(self.narrow(self.wide(x).tanh())) @ self.tokens.weight.T


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logsumexp(-1).square().sum(1)


def setting() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Mixed().double(), torch.randint(7, (3, 24))


def by_loop(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    rows = [torch.autograd.grad(losses(model, ids[k : k + 1]).sum(), list(model.parameters())) for k in range(len(ids))]
    return {
        name: torch.stack(column) for (name, _), column in zip(model.named_parameters(), zip(*rows, strict=True), strict=True)
    }


def clipped(grads: dict[str, Tensor], limit: float) -> tuple[dict[str, Tensor], Tensor]:
    norms = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
    weights = (limit / norms).clamp(max=1)
    return {name: torch.einsum("n,n...->...", weights, g) for name, g in grads.items()}, norms


@pytest.mark.parametrize("budget", [None, 0, 10**9])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_gives_the_loops_numbers(name: str, budget: int | None) -> None:
    model, ids = setting()
    expected = by_loop(model, ids)
    sums, norms = clipped(expected, 0.5)
    with sw.record(model, strategy=name, memory_budget=budget) as rec:
        rec.backward(losses(model, ids))
    found = sw.clipped_grads(model, losses, ids, max_grad_norm=0.5, strategy=name, memory_budget=budget)
    torch.testing.assert_close(rec.grads(), expected)
    torch.testing.assert_close(rec.norms(), norms)
    torch.testing.assert_close(rec.clipped_sum(0.5), sums)
    torch.testing.assert_close(found, (sums, norms))
    torch.testing.assert_close(sw.per_sample_norms(model, losses, ids, strategy=name), norms)


def chosen(model: nn.Module, ids: Tensor, **options: object) -> dict[str, tuple[str, ...]]:
    with sw.record(model, **options) as rec:
        rec.backward(losses(model, ids))
    return {row.parameter: row.algorithm for row in rec.coverage().rows}


def test_coverage_shows_the_choice() -> None:
    model, ids = setting()
    assert chosen(model, ids, strategy="store")["wide.weight"] == ("store",)
    assert chosen(model, ids, strategy="gram")["wide.weight"] == ("gram",)
    assert chosen(model, ids, strategy="tile")["early.weight"] == ("tile",)
    found = chosen(model, ids, strategy="gram")
    assert found["norm.weight"] == ("dense",)
    assert found["tokens.weight"] == ("rows", "gram") or found["tokens.weight"] == ("gram", "rows")


def rated(monkeypatch: pytest.MonkeyPatch, **change: float) -> None:
    rates = Rates(
        **{"product": 1e11, "convolution": 1e11, "onednn": 0.0, "turning": 0.0, "layer": 0.0, "memory": 1e10, **change}
    )
    monkeypatch.setattr(strategy, "_MEASURED", {})
    monkeypatch.setattr(strategy, "calibrate", lambda *_: rates)
    monkeypatch.setattr(strategy, "_UNMEASURED", {"cpu": rates})


def test_rates_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """With slow memory gradients are not formed where positions are few; with slow products they are."""
    model, ids = setting()
    rated(monkeypatch, memory=1.0)
    assert chosen(model, ids, memory_budget=0)["wide.weight"] == ("gram",)
    rated(monkeypatch, product=1.0)
    # six positions: 36 (16 + 40) against 6 * 16 * 40
    assert chosen(model, ids, memory_budget=0)["wide.weight"] == ("gram",)
    # 24 positions of 4 channels, of which the patches have 12: 576 (3 + 12) against 24 * 36
    assert chosen(model, ids, memory_budget=0)["early.weight"] in {("tile",), ("store",)}


def test_the_budget_limits_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 positions of 40 and 40 channels: norms by tiles are the fastest, gradients larger than their factors."""
    rated(monkeypatch, product=1.0, onednn=2.0, turning=1e10)
    monkeypatch.setattr("samplewise.outer._SMALL_PRODUCT", 0)
    model, batch = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)).double(), torch.randn(3, 16, 40).double()
    size = 3 * 40 * 40 * 8
    for budget, stored in [(0, 0), (size, 1), (2 * size - 1, 1), (2 * size, 2)]:
        with sw.record(model, memory_budget=budget) as rec:
            rec.backward(model(batch).square().sum((1, 2)))
        assert [row.algorithm for row in rec.coverage().rows].count(("store",)) == stored


@pytest.mark.skipif(not products._built_in(), reason="needs oneDNN")
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("t", "o", "i"), [(1, 9, 7), (1, 7, 9), (1, 7, 7), (50, 9, 7), (50, 7, 9)])
def test_products_by_onednn(monkeypatch: pytest.MonkeyPatch, t: int, o: int, i: int, *, strided: bool) -> None:
    """The left or the right first, whichever is the cheaper to turn."""
    rated(monkeypatch, product=1.0, onednn=2.0, turning=1e10)
    monkeypatch.setattr("samplewise.outer._SMALL_PRODUCT", 0)
    monkeypatch.setattr("samplewise.outer.has_onednn", lambda _: True)
    left, right = torch.randn(4, 1, t, 2 * o)[..., :o], torch.randn(4, 1, t, 2 * i)[..., :i]
    factor = Outer(left, right, torch.Size((o, i))) if strided else Outer(left.clone(), right.clone(), torch.Size((o, i)))
    weights, grads = torch.rand(4), (left.double().mT @ right.double())[:, 0]
    with torch.no_grad():
        found = factor.weighted_sum(weights)
        norms = torch.cat([squares(part) for part in _tiles(factor.left, factor.right)])
    torch.testing.assert_close(found.double(), torch.einsum("n,noi->oi", weights.double(), grads), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms.double(), grads.square().sum((1, 2)), rtol=1e-4, atol=1e-5)
    assert found.is_contiguous()


@pytest.mark.parametrize(
    ("turning", "flops", "faster"),
    [(1e9, 2e8, True), (1e6, 2e8, False), (1e9, 9e7, False)],
    ids=["fast", "slow turns", "small"],
)
def test_onednn_is_taken_where_it_is_faster_with_its_turns(
    turning: float, flops: float, monkeypatch: pytest.MonkeyPatch, *, faster: bool
) -> None:
    """2e8 flop take 2 ms by torch and 1 by oneDNN; 200 thousand numbers are turned in 0.8 ms or in 0.8 s."""
    rated(monkeypatch, onednn=2e11, turning=turning)
    monkeypatch.setattr("samplewise.outer.has_onednn", lambda _: True)
    with torch.no_grad():
        assert _by_onednn(torch.empty(1), flops, 200_000) == faster
    assert not _by_onednn(torch.empty(1), flops, 200_000)


@pytest.mark.parametrize(("length", "algorithm"), [(1, ("gram", "rows")), (40, ("store",))])
def test_a_tied_table_is_stored_where_that_takes_less_memory(length: int, algorithm: tuple[str, ...]) -> None:
    """8 + 4 + 4 numbers and an index for each position, against 32 for each sample."""
    table, head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
    head.weight = table.weight
    model, ids = nn.Sequential(table, head).double(), torch.randint(0, 8, (3, length))
    found = chosen(model, ids, memory_budget=0)["0.weight"]
    assert sorted(found) == sorted(algorithm)
    with sw.record(model) as rec:
        rec.backward(losses(model, ids))
    grads = rec.grads()["0.weight"]
    sums, norms = sw.clipped_grads(model, losses, ids, max_grad_norm=0.5)
    torch.testing.assert_close(norms, grads.flatten(1).norm(dim=1))
    weights = (0.5 / norms).clamp(max=1)
    torch.testing.assert_close(sums["0.weight"], torch.einsum("n,nvd->vd", weights, grads))


# --- rates --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Callable[[], dict[str, dict[str, float]]]:
    monkeypatch.setattr(strategy, "_MEASURED", {})
    monkeypatch.setenv("SAMPLEWISE_CACHE", str(tmp_path / "cache"))
    return lambda: json.loads((tmp_path / "cache" / "rates.json").read_text())


def test_rates_are_measured_once_and_kept(cache, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sw.calibrate("cpu", torch.float32)
    assert min(first.product, first.convolution, first.memory) > 1e6
    assert list(cache().values()) == [first._asdict()]
    strategy._MEASURED.clear()
    monkeypatch.setattr(strategy, "_measure", lambda *_: pytest.fail("measured twice"))
    assert sw.calibrate("cpu", torch.float32) == first
    assert strategy.rates(torch.zeros(1)) == first


def test_other_types_have_rates_of_their_own(cache) -> None:
    assert sw.calibrate("cpu", torch.float64) != sw.calibrate("cpu", torch.float32)
    assert len(cache()) == 2


def test_a_recording_measures_before_it_begins_and_never_within(cache, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(strategy, "_measure", lambda *what: measured.append(what) or Rates(1.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    model, ids = setting()
    with sw.record(model) as rec:
        assert len(measured) == 1
        rec.backward(losses(model, ids))
        rec.norms()
    sw.per_sample_norms(model, losses, ids)
    assert len(measured) == 1


@pytest.mark.parametrize("text", ["", "nonsense", "[]", '{"a": 1}', '{"a": {"b": 2}}'])
def test_a_broken_cache_is_measured_anew(cache, tmp_path, text: str) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "rates.json").write_text(text)
    found = sw.calibrate("cpu", torch.float32)
    assert found._asdict() in cache().values()


def test_without_a_place_to_write_rates_stay_in_memory(cache, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAMPLEWISE_CACHE", str(tmp_path / "file" / "inside"))
    assert sw.calibrate("cpu", torch.float32) == strategy.rates(torch.zeros(1))


def test_measuring_can_be_switched_off(cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLEWISE_CALIBRATE", "0")
    monkeypatch.setattr(strategy, "_measure", lambda *_: pytest.fail("measured"))
    model, ids = setting()
    assert sw.per_sample_norms(model, losses, ids).shape == (3,)


# --- repeated products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("small", [0.0, 1e9])
def test_repeated_products_by_either_library(monkeypatch: pytest.MonkeyPatch, small: float, *, bias: bool) -> None:
    monkeypatch.setattr(products, "_SMALL_PRODUCT", small)
    rows, weight, addend = torch.randn(5, 7), torch.randn(9, 7), torch.randn(5, 9)
    # every other number of a row
    b = torch.randn(18)[::2] if bias else None
    before = addend.clone()
    with torch.no_grad():
        wanted = torch.nn.functional.linear(rows, weight, b)
        # a transposed weight too, as backward passes have it
        for w in (weight, weight.t().contiguous().t()):
            product = products.RepeatedProduct(w, 5, b)
            assert (product._packed is None) == (small > 0 or not products.has_onednn(weight))
            torch.testing.assert_close(product.of(rows), wanted)
            torch.testing.assert_close(product.plus(rows, addend), wanted + addend)
    assert torch.equal(addend, before)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_in_float32(monkeypatch: pytest.MonkeyPatch, kind: type[nn.RNNBase]) -> None:
    """Whose products are oneDNN's, where there is one; the loop runs torch's own layer in float64."""
    monkeypatch.setattr(products, "_SMALL_PRODUCT", 0.0)
    torch.manual_seed(0)
    model, x = kind(3, 5, bidirectional=True, batch_first=True), torch.randn(4, 6, 3)
    # with other numbers between those of the biases
    for name in ("bias_ih_l0", "bias_hh_l0", "bias_hh_l0_reverse"):
        setattr(model, name, nn.Parameter(torch.randn(len(getattr(model, name)), 2)[:, 0]))
    grads = sw.per_sample_grads(model, lambda m, batch: m(batch)[0].square().sum((1, 2)), x)
    model.double()
    for k in range(4):
        wanted = torch.autograd.grad(model(x[k : k + 1].double())[0].square().sum(), list(model.parameters()))
        for (name, _), grad in zip(model.named_parameters(), wanted, strict=True):
            torch.testing.assert_close(grads[name][k].double(), grad, rtol=1e-4, atol=1e-5, msg=f"{name}, sample {k}")


# --- memory -------------------------------------------------------------------------------------------------------------------


def test_buffers_are_reused_and_can_be_given_back() -> None:
    sw.release_buffers()
    with torch.no_grad():
        first = buffers.scratch("a", (4, 5), torch.zeros(1))
        again = buffers.scratch("a", (3,), torch.zeros(1))
        other = buffers.scratch("b", (3,), torch.zeros(1))
        wider = buffers.scratch("a", (3,), torch.zeros(1, dtype=torch.float64))
        assert first.data_ptr() == again.data_ptr()
        assert len({x.data_ptr() for x in (first, other, wider)}) == 3
        sw.release_buffers()
        assert not buffers._slots().held


def test_blocks_that_the_heap_serves_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    sw.release_buffers()
    monkeypatch.setattr(buffers, "SMALLEST", 100)
    with torch.no_grad():
        buffers.scratch("a", (24,), torch.zeros(1))
        assert not buffers._slots().held
        buffers.scratch("a", (25,), torch.zeros(1))
    assert [key[0] for key in buffers._slots().held] == ["a"]
    sw.release_buffers()


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="other allocators have rules of their own"
)
@pytest.mark.parametrize(
    ("device", "setting", "kept"),
    [("cpu 4", {}, True), ("cpu 3", {}, False), ("cpu 4", {"MALLOC_TRIM_THRESHOLD_": "131072"}, False), ("cuda 4", {}, False)],
)
def test_freed_memory_is_kept_for_the_next_step(device: str, setting: dict[str, str], *, kept: bool) -> None:
    """glibc maps a first block of 24 MiB by itself, to be given back when it is freed, unless told otherwise: at the fourth recording."""
    code = """
import ctypes, sys, torch
from samplewise.buffers import keep_freed_memory
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
info = ctypes.CDLL(None).mallinfo2
info.restype = Info
device, recordings = sys.argv[1].split()
for _ in range(int(recordings)):
    keep_freed_memory(device)
before = info().hblkhd
block = torch.empty(6 * 2**20)
print(info().hblkhd - before)
"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    run = subprocess.run(
        [sys.executable, "-c", code, device], env={**plain, **setting}, capture_output=True, text=True, check=True
    )
    assert (int(run.stdout) == 0) == kept


@pytest.mark.skipif(buffers._glibc() is None, reason="other allocators have rules of their own")
def test_kept_memory_can_be_given_back() -> None:
    code = """
import re, torch
from pathlib import Path
from samplewise.buffers import keep_freed_memory
from samplewise import release_buffers
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
for _ in range(4):
    keep_freed_memory("cpu")
before = resident()
blocks = [torch.ones(2 * 2**20) for _ in range(20)]
del blocks
kept = resident() - before
release_buffers()
print(kept, resident() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, left = map(float, run.stdout.split())
    assert kept > 100
    assert left < 40


def test_what_frees_memory_becomes_a_sum_first() -> None:
    """Then the largest factors, so that the least of them is left beside the sums of the others."""

    def outer(t: int) -> Outer:
        return Outer(torch.zeros(2, 1, t, 50), torch.zeros(2, 1, t, 60), torch.Size((50, 60)))

    factors = {"some": outer(2), "more": outer(9), "most, and more than the sum": outer(20), "least": outer(1)}
    order = sorted(factors, key=lambda name: _frees(factors[name]), reverse=True)
    assert order == ["most, and more than the sum", "more", "some", "least"]


def test_factors_that_hold_no_tensor_themselves_have_their_turn() -> None:
    class Elsewhere(Factor):
        shape, n = torch.Size((2,)), 3

        def regroup(self, n: int) -> Factor:
            return self

        def to_dense(self) -> Tensor:
            return torch.ones(3, 2)

    pulled = Pulled(Dense(torch.ones(3, 2)), lambda rows: rows, False, torch.Size((2,)))
    assert _frees(pulled) == (True, 24)
    assert _frees(Elsewhere()) == (True, 0)


def test_no_buffer_is_shared_with_a_graph_or_a_trace() -> None:
    with torch.enable_grad():
        assert buffers.scratch("a", (3,), torch.zeros(1)).data_ptr() != buffers.scratch("a", (3,), torch.zeros(1)).data_ptr()
    sw.release_buffers()
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        buffers.scratch("a", (3,), torch.empty(1))
    with torch.no_grad():
        buffers.scratch("a", (3,), torch.empty(1, device="meta"))
    assert not buffers._slots().held


def test_the_kept_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sw.release_buffers()
    monkeypatch.setattr(buffers, "LIMIT", 100)
    with torch.no_grad():
        buffers.scratch("a", (20,), torch.zeros(1))
        buffers.scratch("b", (20,), torch.zeros(1))
    assert sum(x.nbytes for x in buffers._slots().held.values()) <= 100


def test_memory_made_in_inference_mode_serves_outside() -> None:
    sw.release_buffers()
    model, ids = setting()
    with sw.record(model, strategy="tile") as rec:
        rec.backward(losses(model, ids))
    with torch.inference_mode():
        inside = rec.norms()
    torch.testing.assert_close(rec.norms(), inside)


def test_results_do_not_change_with_the_next_step() -> None:
    model, ids = setting()
    first = sw.clipped_grads(model, losses, ids, max_grad_norm=0.5, strategy="store")
    copies = {name: x.clone() for name, x in first[0].items()}, first[1].clone()
    sw.clipped_grads(model, losses, ids.flip(1), max_grad_norm=0.1, strategy="store")
    torch.testing.assert_close(first, copies, rtol=0, atol=0)


def test_nothing_outlives_its_results() -> None:
    """Without the garbage collector: results in a cycle would double the memory of a training loop."""
    model, ids = setting()
    gc.collect()
    gc.disable()
    try:
        for run in (
            lambda: list(sw.per_sample_grads(model, losses, ids).values()),
            lambda: [sw.per_sample_norms(model, losses, ids)],
            lambda: [*sw.clipped_grads(model, losses, ids, max_grad_norm=0.5)[0].values()],
        ):
            found = [weakref.ref(x) for x in run()]
            assert all(ref() is None for ref in found)
    finally:
        gc.enable()


# --- results into given memory --------------------------------------------------------------------------------------------------


def test_gradients_into_given_memory() -> None:
    model, ids = setting()
    model.unused = nn.Parameter(torch.ones(2).double())
    out = {name: torch.full((3, *p.shape), torch.nan).double() for name, p in model.named_parameters()}
    found = sw.per_sample_grads(model, losses, ids, out=out)
    assert all(found[name] is out[name] for name in out)
    torch.testing.assert_close(found, sw.per_sample_grads(model, losses, ids))
    with sw.record(model) as rec:
        rec.backward(losses(model, ids))
    torch.testing.assert_close(rec.grads(out=out), found)


@pytest.mark.parametrize("name", STRATEGIES)
def test_sums_into_the_parameters_gradients(name: str) -> None:
    model, ids = setting()
    expected, norms = sw.clipped_grads(model, losses, ids, max_grad_norm=0.5)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    out = {key: p.grad for key, p in model.named_parameters()}
    found = sw.clipped_grads(model, losses, ids, max_grad_norm=0.5, strategy=name, out=out)
    torch.testing.assert_close(found, (expected, norms))
    assert all(found[0][key] is p.grad for key, p in model.named_parameters())
    with sw.record(model, strategy=name) as rec:
        rec.backward(losses(model, ids))
    torch.testing.assert_close(rec.clipped_sum(0.5, out=out), expected)


@pytest.mark.parametrize(
    ("sizes", "wins"),
    [
        ((8, 1024, 768, 768), "tile"),
        ((8, 1024, 3072, 768), "tile"),
        ((32, 256, 3072, 768), "gram"),
        ((32, 256, 50304, 768), "gram"),
        ((64, 197, 3072, 768), "gram"),
    ],
)
def test_what_won_on_a_gpu_is_chosen_there(sizes: tuple[int, ...], wins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rates of an H100 (docs/gpu.md); no tensor has values."""
    monkeypatch.setattr("samplewise.outer.rates", lambda _: Rates(542e12, 1.3e12, 0.0, 0.0, 0.0, 2.84e12, "cuda"))
    n, t, o, i = sizes
    left, right = (torch.empty(n, 1, t, d, dtype=torch.bfloat16, device="meta") for d in (o, i))
    assert Outer(left, right, torch.Size((o, i))).algorithm == wins
