"""On a GPU: every rule, the models, half precision by every strategy, and steps that do not wait for the device."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import samplewise as sw
from models import MODELS
from samples import EXACT, SLOW, Op
from samplewise import captured as graphs
from samplewise import testing
from samplewise.products import HALF
from samplewise.tracer import Trace
from samplewise.tracing import Traced
from test_models import assert_rows, built, stacked
from test_rules import cases

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from cells import captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
N = 4
# in torch 2.11: a shift alone with gradient, an in-place product with a view, a table without columns
PLAIN_FAILS = {"batch_norm-3", "instance_norm-3", "addmm_-0", "embedding-12"}


def moved(tree: object) -> object:
    """On the device, and what was one tensor before still is."""
    there: dict[int, Tensor] = {}

    def move(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in there:
            there[id(x)] = nn.Parameter(x.detach().to(DEVICE)) if isinstance(x, nn.Parameter) else x.to(DEVICE)
        return there[id(x)]

    return tree_map(move, tree)


def sample(call: testing.Sample) -> testing.Sample:
    args, kwargs = moved((call.args, dict(call.kwargs)))
    return testing.Sample(args, kwargs, call.n, call.batch_dim, call.constant)


@pytest.mark.parametrize(("op", "call"), cases(EXACT))
@pytest.mark.filterwarnings("ignore")
def test_by_rule(op: Op, call: testing.Sample, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.id in PLAIN_FAILS:
        pytest.skip("plain torch fails on it, alone and without a recording")
    # cuDNN's recurrent layers have no backward in evaluation
    with torch.backends.cudnn.flags(enabled=not op.__name__.startswith(("RNN", "LSTM", "GRU")), allow_tf32=False):
        testing.check_rule(op, [sample(call)])


@pytest.mark.parametrize(("op", "call"), cases(SLOW))
@pytest.mark.filterwarnings("ignore")
def test_by_the_fallback(op: Op, call: testing.Sample) -> None:
    testing.check_rule(op, [sample(call)], fallback="allow")


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if not entry.refused])
@pytest.mark.filterwarnings("ignore")
def test_models(name: str) -> None:
    entry, batch = MODELS[name], moved(MODELS[name].batch)
    model = built(entry).to(DEVICE)
    # what the models make in their forward is made on the device too
    with torch.device(DEVICE), torch.backends.cudnn.flags(enabled=False):
        whole = stacked(model, entry.losses(model, batch))
        with sw.record(model, batch_size=len(next(iter(whole.values())))) as rec:
            rec.backward(entry.losses(model, batch))
    assert_rows(rec.grads(), whole)


class Text(nn.Module):
    """Positions beyond one block of a Gram, a tied head, and norms; turned, the positions come first."""

    def __init__(self, *, tied: bool, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.tokens, self.places = nn.Embedding(50, 32), nn.Parameter(torch.randn(600, 32))
        self.up, self.norm, self.down = nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 50, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        if turned:
            # the shift alone
            self.norm.weight.requires_grad_(False)
            self.last = nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places
        # samples along the second axis
        x = self.last(x.transpose(0, 1)) if self.turned else x
        x = self.head(x + self.down(F.gelu(self.norm(self.up(x)))))
        return x.transpose(0, 1) if self.turned else x


class Images(nn.Module):
    """Convolutions with strides, groups, dilation and of single pixels; early and late ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.Conv2d(16, 32, 1),
            nn.Conv2d(32, 64, 3, 2, 1, groups=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=2, dilation=2),
            nn.AdaptiveAvgPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.Flatten(),
            nn.Linear(256, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def text_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    ids, target = batch
    return F.cross_entropy(model(ids).flatten(0, 1), target.flatten(), reduction="none").view(ids.shape).mean(1)


def image_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, target = batch
    # rounded images are the same in all types
    return F.cross_entropy(model(images.to(next(model.parameters()).dtype)), target, reduction="none")


def problem(name: str) -> tuple[nn.Module, object, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    if name == "images":
        images = torch.randn(N, 3, 16, 16, device=DEVICE).bfloat16().double()
        return Images().to(DEVICE), image_losses, (images, torch.randint(5, (N,), device=DEVICE))
    ids = torch.randint(50, (N, 600), device=DEVICE)
    return Text(tied=name == "tied", turned=name == "turned").to(DEVICE), text_losses, (ids, ids.roll(-1, 1))


def loop(model: nn.Module, losses: object, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    model = copy.deepcopy(model).double()
    return stacked(model, (losses(model, (batch[0][i : i + 1], batch[1][i : i + 1])).squeeze(0) for i in range(N)))


def norms_of(rows: dict[str, Tensor]) -> Tensor:
    return torch.cat([row.flatten(1) for row in rows.values()], 1).norm(dim=1)


@pytest.mark.parametrize("strategy", ["auto", "gram", "tile", "store"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["text", "tied", "turned", "images"])
def test_every_strategy_in_every_type(name: str, dtype: torch.dtype, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, losses, batch = problem(name)
    model = model.to(dtype)
    wanted = loop(model, losses, batch)
    norms, limit = norms_of(wanted), norms_of(wanted).median().item()
    clipped = {key: torch.einsum("n,n...->...", limit / norms.clamp_min(limit), rows) for key, rows in wanted.items()}
    near = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.05)
    torch.testing.assert_close(sw.per_sample_norms(model, losses, batch, strategy=strategy).double(), norms, rtol=near, atol=0)
    sums, found = sw.clipped_grads(model, losses, batch, max_grad_norm=limit, strategy=strategy)
    torch.testing.assert_close(found.double(), norms, rtol=near, atol=0)
    for key, total in clipped.items():
        assert sums[key].dtype == dtype
        assert (sums[key].double() - total).norm() <= near * total.norm(), key
    for key, rows in sw.per_sample_grads(model, losses, batch).items():
        assert (rows.double() - wanted[key]).norm() <= near * wanted[key].norm(), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["text", "tied", "turned", "images"])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    model, losses, batch = problem(name)
    wanted = loop(model, losses, batch)
    norms, limit = norms_of(wanted), norms_of(wanted).median().item()
    with torch.autocast("cuda", dtype):
        found = sw.per_sample_norms(model, losses, batch)
        sums, _ = sw.clipped_grads(model, losses, batch, max_grad_norm=limit)
    torch.testing.assert_close(found.double(), norms, rtol=0.1, atol=0)
    for key, rows in wanted.items():
        total = torch.einsum("n,n...->...", limit / norms.clamp_min(limit), rows)
        assert (sums[key].double() - total).norm() <= 0.1 * total.norm(), key


def test_the_backward_knows_the_strategy() -> None:
    """It runs in a thread of its own."""
    model, losses, batch = problem("text")
    for strategy in ("gram", "tile", "store"):
        with sw.record(model, strategy=strategy) as rec:
            rec.backward(losses(model, batch))
        assert [row.algorithm for row in rec.coverage().rows if row.parameter == "up.weight"] == [(strategy,)]


@pytest.mark.parametrize("name", ["text", "tied", "turned", "images"])
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    model, losses, batch = problem(name)

    def step() -> None:
        sw.per_sample_norms(model, losses, batch)
        sw.clipped_grads(model, losses, batch, max_grad_norm=1.0)
        sw.per_sample_grads(model, losses, batch)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["text", "tied", "turned", "images"])
def test_a_step_can_be_captured(name: str) -> None:
    """Replayed on another batch it gives that batch's numbers."""
    model, losses, batch = problem(name)
    other = tuple(x.flip(0).clone() for x in batch)

    def step() -> tuple[dict[str, Tensor], Tensor]:
        return sw.clipped_grads(model, losses, batch, max_grad_norm=0.5)

    replay = captured(step)
    for x, new in zip(batch, other, strict=True):
        x.copy_(new)
    (sums, norms), _ = replay()
    wanted, wanted_norms = sw.clipped_grads(model, losses, other, max_grad_norm=0.5)
    torch.testing.assert_close(norms, wanted_norms)
    torch.testing.assert_close(sums, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["text", "tied", "turned", "images"])
def test_a_trace(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision our own kernels are ops of it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, losses, batch = problem(name)
    model = model.to(dtype)
    run = sw.traced(sw.clipped_grads, model, losses, max_grad_norm=0.5)
    near = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.05)
    for k in range(5):
        fed = tuple(x.roll(k, 0) for x in batch)
        (sums, norms), (wanted, wanted_norms) = run(fed), sw.clipped_grads(model, losses, fed, max_grad_norm=0.5)
        torch.testing.assert_close(norms.double(), wanted_norms.double(), rtol=near, atol=0)
        for key, total in wanted.items():
            assert (sums[key].double() - total.double()).norm() <= near * total.double().norm(), key
    assert ("samplewise." in the_trace(run).code) == (dtype in HALF)


def the_trace(run: Traced) -> Trace:
    """The only one that it has."""
    ((trace,),) = [known.sure for known in run._known.values()]
    return trace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["text", "tied", "turned", "images"])
def test_a_trace_does_not_wait_and_can_be_captured(name: str, dtype: torch.dtype) -> None:
    """Neither its making, but for the comparison of what is no result, nor its runs; a replay gives another batch's numbers."""
    model, losses, batch = problem(name)
    model, other = model.to(dtype), tuple(x.flip(0).clone() for x in batch)
    run = sw.traced(sw.clipped_grads, model, losses, max_grad_norm=0.5)
    for _ in range(3):
        run(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    replay = captured(lambda: run(batch))
    for x, new in zip(batch, other, strict=True):
        x.copy_(new)
    (sums, norms), _ = replay()
    wanted, wanted_norms = sw.clipped_grads(model, losses, other, max_grad_norm=0.5)
    near = 0.05 if dtype is torch.bfloat16 else 1e-3
    torch.testing.assert_close(norms, wanted_norms, rtol=near, atol=0)
    for key, total in wanted.items():
        assert (sums[key].double() - total.double()).norm() <= near * total.double().norm(), key


def test_a_trace_draws_on_the_device() -> None:
    """Dropout by the device's generator, another one at each call, as a recording draws it."""
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 2)).to(DEVICE)
    batch = torch.randn(N, 6, device=DEVICE)
    run = sw.traced(sw.per_sample_norms, model, lambda m, x: m(x).square().sum(1))
    for k in range(6):
        torch.manual_seed(k)
        found = run(batch)
        torch.manual_seed(k)
        torch.testing.assert_close(found, sw.per_sample_norms(model, lambda m, x: m(x).square().sum(1), batch))
    assert the_trace(run)
    assert not torch.equal(run(batch), run(batch))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["text", "tied", "turned", "images"])
def test_a_trace_as_a_graph(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sizes of batches, while parameters are trained; earlier results stay as they were."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, losses, batch = problem(name)
    model, near = model.to(dtype), {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.05)
    run = sw.traced(sw.clipped_grads, model, losses, capture=True, max_grad_norm=0.5)
    kept = []
    for k in range(12):
        fed = tuple(x.roll(k, 0)[: N - k % 2] for x in batch)
        kept.append((run(fed), sw.clipped_grads(model, losses, fed, max_grad_norm=0.5)))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.99)
    assert in_the_graph(run)
    for (sums, norms), (wanted, wanted_norms) in kept:
        torch.testing.assert_close(norms.double(), wanted_norms.double(), rtol=near, atol=0)
        for key, total in wanted.items():
            assert (sums[key].double() - total.double()).norm() <= near * total.double().norm(), key


def test_a_graph_does_not_wait_and_is_ordered_with_other_streams() -> None:
    model, losses, batch = problem("text")
    run = sw.traced(sw.clipped_grads, model, losses, capture=True, max_grad_norm=0.5)
    for _ in range(5):
        run(batch)
    wanted = [sw.clipped_grads(model, losses, tuple(x.roll(k, 0) for x in batch), max_grad_norm=0.5) for k in range(6)]
    fed = [tuple(x.roll(k, 0) for x in batch) for k in range(6)]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = []
        for k in range(6):
            with torch.cuda.stream(streams[k % 3]):
                found.append(run(fed[k]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_graph_draws_as_a_recording_does() -> None:
    """And does not draw when it is captured."""
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 2)).to(DEVICE)
    batch = torch.randn(N, 6, device=DEVICE)
    run = sw.traced(sw.per_sample_norms, model, lambda m, x: m(x).square().sum(1), capture=True)
    for k in range(8):
        torch.manual_seed(k)
        found = run(batch), run(batch)
        torch.manual_seed(k)
        wanted = [sw.per_sample_norms(model, lambda m, x: m(x).square().sum(1), batch) for _ in range(2)]
        torch.testing.assert_close(found, tuple(wanted))


def test_a_graph_writes_statistics_and_buffers_once() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6).eval().requires_grad_(requires_grad=False), nn.Linear(6, 3)).to(DEVICE)
    model.register_buffer("steps", torch.zeros((), device=DEVICE))
    batch = torch.randn(N, 6, device=DEVICE)
    out = {name: torch.zeros(N, *p.shape, device=DEVICE) for name, p in model.named_parameters() if p.requires_grad}

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        m.steps.add_(1)
        return m(x).square().sum(1) * torch.tensor(2.0)

    run = sw.traced(sw.per_sample_grads, model, losses, capture=True, out=out)
    for k in range(1, 8):
        found = run(batch * k)
        assert model.steps.item() == k
        assert all(found[name] is out[name] for name in out)
        before = {name: x.clone() for name, x in out.items()}
        torch.testing.assert_close(before, sw.per_sample_grads(model, losses, batch * k))
        model.steps.sub_(1)


def test_what_a_graph_refuses() -> None:
    """Numbers on the CPU at once; what waits for the device before the first call that would be a replay."""
    model, batch = nn.Linear(6, 6).to(DEVICE), torch.randn(N, 6, device=DEVICE)
    refused = {
        "found cpu and cuda:0": lambda m, x: m(x).square().sum(1) * torch.rand(()),
        "wait for the device": lambda m, x: m(x).square().sum(1) * torch.full((), 2.0).to(DEVICE),
        "wait for the device.*": lambda m, x: torch.linalg.inv(m(x).exp().diag_embed()).square().sum((1, 2)),
    }
    for message, losses in refused.items():
        run = sw.traced(sw.per_sample_norms, model, losses, capture=True)
        with pytest.raises(sw.UnsupportedOpError, match=message):
            list(map(run, [batch] * 5))
        assert_the_device_goes_on(model, batch)


def assert_the_device_goes_on(model: nn.Module, batch: Tensor) -> None:
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    torch.rand(3, device=DEVICE).sum().item()
    run = sw.traced(sw.per_sample_norms, model, lambda m, x: F.dropout(m(x)).square().sum(1), capture=True)
    assert all(run(batch).isfinite().all() for _ in range(6))


def test_the_device_goes_on_after_a_broken_capture() -> None:
    model, batch = nn.Linear(6, 6).to(DEVICE), torch.randn(N, 6, device=DEVICE)

    def wait() -> None:
        x = torch.rand(3, device=DEVICE)
        torch.cuda.current_stream().synchronize()
        x.sum()

    with pytest.raises(RuntimeError):
        graphs._captured(wait, graphs.Pool(), torch.device("cuda", 0))
    assert_the_device_goes_on(model, batch)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_a_graph(masked: bool, dtype: torch.dtype, dropout: float) -> None:
    """Its kernels say on the CPU how dropout was drawn, unless they are captured."""
    model = nn.Linear(16, 48).to(DEVICE, dtype)
    batch = torch.randn(N, 8, 16, device=DEVICE, dtype=dtype)
    mask = torch.ones(8, 8, device=DEVICE, dtype=torch.bool).tril() if masked else None

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = m(x).unflatten(2, (3, 2, 8)).transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout).float().square().sum((1, 2, 3))

    run = sw.traced(sw.per_sample_norms, model, losses, capture=True)
    for k in range(7):
        torch.manual_seed(k)
        found = run(batch * (k + 1))
        torch.manual_seed(k)
        wanted = sw.per_sample_norms(model, losses, batch * (k + 1))
        torch.testing.assert_close(found, wanted, rtol=0.02 if dtype is torch.bfloat16 else 1e-4, atol=0)
    assert in_the_graph(run)


def in_the_graph(run: Traced) -> bool:
    return all(trace._replay is not None for known in run._known.values() for trace in known.sure)


def test_memory_of_graphs_is_given_back() -> None:
    model, losses, batch = problem("text")
    sw.clipped_grads(model, losses, batch, max_grad_norm=1.0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    run = sw.traced(sw.clipped_grads, model, losses, capture=True, max_grad_norm=1.0)
    for _ in range(6):
        run(batch)
    held = torch.cuda.memory_allocated()
    assert held > before
    run.release()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def test_rates_are_measured() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rates = sw.calibrate(DEVICE, dtype, again=True)
        assert min(rates.product, rates.convolution, rates.memory) > 1e9
        assert rates.device == "cuda"


def test_nothing_is_left_on_the_device() -> None:
    model, losses, batch = problem("text")
    sw.clipped_grads(model, losses, batch, max_grad_norm=1.0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        sw.clipped_grads(model, losses, batch, max_grad_norm=1.0)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
