"""What is handed back is the caller's own: ordinary tensors, in memory that nothing else reads or writes."""

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samplewise as sw
from samplewise.factors import Dense, meeting
from samplewise.joined import Joined

N, T, D = 3, 5, 4


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def x(*shape: int) -> Tensor:
    return torch.randn(shape or (N, T, D), dtype=torch.float64)


class Net(nn.Module):
    """A forward as a function of the module and its input; tensors given are parameters."""

    def __init__(self, forward: Callable[..., Tensor], **parts: object) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.double()

    def forward(self, batch: Tensor) -> Tensor:
        return self.function(self, batch)


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    out = model(batch)
    return (out * (out.cos() + 1.5)).flatten(1).sum(1)


def linear_in(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).flatten(1).sum(1)


def recorded(model: nn.Module, batch: Tensor, losses: Callable[..., Tensor] = squares, **options: object) -> sw.Record:
    with sw.record(model, **options) as rec:
        rec.backward(losses(model, batch))
    return rec


def batchnorm(self: nn.Module, batch: Tensor) -> Tensor:
    return self.norm(batch.mT).mT + self.w


MODELS: dict[str, Callable[[], Net]] = {
    "two tables": lambda: Net(lambda self, b: self.inner(b + self.v + self.w), v=x(T, D), w=x(T, D), inner=nn.Linear(D, D)),
    "three names": lambda: Net(lambda self, b: b + self.u + self.v + self.w, u=x(T, D), v=x(T, D), w=x(T, D)),
    "biases of two norms": lambda: Net(lambda self, b: self.a(b) + self.b(b), a=nn.LayerNorm(D), b=nn.LayerNorm(D)),
    "a batch norm and a table": lambda: Net(batchnorm, norm=nn.BatchNorm1d(D).eval(), w=x(T, D)),
    "views": lambda: Net(lambda self, b: b + self.v.view(T, D) + self.w.view(T, D), v=x(T * D), w=x(T * D)),
    "a view and the parameter": lambda: Net(lambda self, b: b + self.v.view(T, D) + self.w, v=x(T * D), w=x(T, D)),
    "parts": lambda: Net(lambda self, b: b + torch.cat([self.v, self.w]), v=x(2, D), w=x(T - 2, D)),
    "derived together": lambda: Net(lambda self, b: b + (self.v + self.w), v=x(T, D), w=x(T, D)),
    "an expanded gradient": lambda: Net(lambda self, b: (b * 0 + self.w).sum(1), w=x(T, D)),
    "an expanded pull-back": lambda: Net(lambda self, b: b * (self.w.sum(0) + 1), w=x(T, D)),
    "a weight derived by an expanded pull-back": lambda: Net(
        lambda self, b: nn.functional.linear(b, self.w.sum(0)), w=x(2, D, D)
    ),
    "a complex parameter": lambda: Net(lambda self, b: (b + self.v + self.w).abs(), v=x(T, D) * 1j, w=x(T, D) * 1j),
}
WAYS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "streamed": lambda model, batch, losses: sw.per_sample_grads(model, losses, batch),
    "recorded": lambda *args: recorded(*args).grads(),
    "differentiable": lambda *args: recorded(*args, create_graph=True).grads(),
    "stored": lambda *args: recorded(*args, strategy="store").grads(),
    "summed": lambda *args: recorded(*args).weighted_sum(torch.ones(N, dtype=torch.float64)),
    "clipped": lambda model, batch, losses: sw.clipped_grads(model, losses, batch, max_grad_norm=1.0)[0],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("losses", [squares, linear_in])
@pytest.mark.parametrize("name", MODELS)
def test_each_can_be_scaled_in_place_alone(name: str, losses: Callable[..., Tensor], way: str) -> None:
    model, batch = MODELS[name](), x()
    found = {key: rows.detach() for key, rows in WAYS[way](model, batch, losses).items()}
    wanted = {key: (k + 2) * rows.clone() for k, (key, rows) in enumerate(found.items())}
    for k, rows in enumerate(found.values()):
        rows.mul_(k + 2)
    for key, rows in found.items():
        torch.testing.assert_close(rows, wanted[key])


@pytest.mark.parametrize("name", MODELS)
def test_an_earlier_result_can_be_written_to(name: str) -> None:
    model, batch = MODELS[name](), x()
    earlier = sw.per_sample_grads(model, squares, batch)
    wanted = {key: rows.clone() for key, rows in earlier.items()}
    for again in (
        sw.per_sample_grads(model, squares, batch, out=earlier),
        recorded(model, batch).grads(out=earlier),
        recorded(model, batch).grads(out=recorded(model, batch).grads()),
    ):
        for key, rows in again.items():
            torch.testing.assert_close(rows, wanted[key])


@pytest.mark.parametrize("name", MODELS)
def test_the_record_keeps_what_it_knew(name: str) -> None:
    rec = recorded(MODELS[name](), x())
    norms = rec.norms()
    for rows in rec.grads().values():
        rows.mul_(3)
    torch.testing.assert_close(rec.norms(), norms)
    torch.testing.assert_close(sum(rows.flatten(1).abs().square().sum(1) for rows in rec.grads().values()).sqrt(), norms)


def test_gradients_that_are_stored_stay_the_record_s() -> None:
    rec = recorded(nn.Linear(D, 2).double(), x(), strategy="store")
    norms = rec.norms()
    rec.grads()["weight"].mul_(3)
    torch.testing.assert_close(rec.norms(), norms)


@pytest.mark.parametrize("way", ["streamed", "recorded"])
def test_gradients_that_the_user_sees_are_others(way: str) -> None:
    seen = list[Tensor]()

    def forward(self: nn.Module, batch: Tensor) -> Tensor:
        hidden = batch + self.w
        hidden.retain_grad()
        hidden.register_hook(seen.append)
        seen.append(hidden)
        return hidden.sin()

    batch = x().requires_grad_()
    found = WAYS[way](Net(forward, w=x(T, D)), batch, squares)["w"]
    hidden, arrived = seen
    wanted = found.clone()
    found.mul_(3)
    for grad in (hidden.grad, arrived, batch.grad):
        torch.testing.assert_close(grad, wanted)


# --- tensors to write to ------------------------------------------------------------------------------------------------------


def columns(buffer: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    parts = buffer.split([shape.numel() for shape in shapes.values()], -1)
    return {name: part.view(*buffer.shape[:-1], *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def test_parts_of_one_buffer_may_lie_side_by_side() -> None:
    model, batch = nn.Sequential(nn.Linear(D, 2), nn.Linear(2, 3)).double(), x()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    size = sum(shape.numel() for shape in shapes.values())
    for buffer in (x(N, size), x(N, size + 3)[:, :size], x(N * 2, size)[::2]):
        grads = sw.per_sample_grads(model, squares, batch, out=columns(buffer, shapes))
        for name, rows in sw.per_sample_grads(model, squares, batch).items():
            torch.testing.assert_close(grads[name], rows)
    flat = x(size)
    recorded(model, batch).weighted_sum(torch.ones(N).double(), out=columns(flat, shapes))
    torch.testing.assert_close(flat, torch.cat([rows.sum(0).flatten() for rows in grads.values()]))


@pytest.mark.parametrize("call", ["per_sample_grads", "grads", "clipped_grads", "weighted_sum"])
def test_one_buffer_for_two_is_refused_before_anything_is_written(call: str) -> None:
    model, batch = MODELS["two tables"](), x()
    leading = () if call in {"clipped_grads", "weighted_sum"} else (N,)
    out = {name: torch.zeros(*leading, *p.shape).double() for name, p in model.named_parameters()}
    out["w"] = out["v"]
    calls: dict[str, Callable[[], object]] = {
        "per_sample_grads": lambda: sw.per_sample_grads(model, squares, batch, out=out),
        "grads": lambda: recorded(model, batch).grads(out=out),
        "clipped_grads": lambda: sw.clipped_grads(model, squares, batch, max_grad_norm=1.0, out=out),
        "weighted_sum": lambda: recorded(model, batch).weighted_sum(torch.ones(N).double(), out=out),
    }
    with pytest.raises(ValueError, match=rf"^{call}: out\['v'\] and out\['w'\] reach over the same memory.* of its own"):
        calls[call]()
    assert not any(rows.any() for rows in out.values())


LAYOUTS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "one after another": lambda m: (m[:2], m[2:5], m[5:]),
    "the same": lambda m: (m, m),
    "one entry in common": lambda m: (m.flatten()[:8], m.flatten()[7:]),
    "columns": lambda m: (m[:, :2], m[:, 2:5], m[:, 5:]),
    "columns in common": lambda m: (m[:, :3], m[:, 2:]),
    "a column and a row": lambda m: (m[:, 0], m[3]),
    "columns of different heights": lambda m: (m[:3, :2], m[:, 2:]),
    "every other column": lambda m: (m[:, ::2], m[:, 1::2]),
    "blocks": lambda m: (m.view(6, 2, 3)[..., :1], m.view(6, 2, 3)[..., 1:]),
    "inside another": lambda m: (m, m[2, 1:2], m[4]),
    "nothing": lambda m: (m[:0], m[:0], m),
    "of another type": lambda m: (m, m.view(torch.int64)[:1]),
    "single numbers": lambda m: tuple(m[0]),
    "single numbers, twice": lambda m: (*m[0], m[0, 3]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_common_memory_is_found(name: str) -> None:
    matrix = x(6, 6)
    tensors = {str(k): part for k, part in enumerate(LAYOUTS[name](matrix))}
    # the truth: which entries of the matrix each of them has
    entries = []
    for part in tensors.values():
        marks = torch.zeros(36, dtype=torch.bool)
        marks.as_strided(part.shape, part.stride(), part.storage_offset()).fill_(True)
        entries.append(marks)
    assert (meeting(tensors) is not None) == any((a & b).any() for a, b in itertools.combinations(entries, 2))


def test_tensors_to_write_to_are_looked_at_where_no_gradient_arrives() -> None:
    model = Net(lambda self, b: b.sin() + 0 * b.detach().requires_grad_(), w=x(D))
    with pytest.raises(ValueError, match=r"^per_sample_grads: out\['w'\] must be a tensor"):
        sw.per_sample_grads(model, squares, x(), out={})


class Turned(nn.Module):
    """Two products with the transposed weight, of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.second = nn.Parameter(x(D, D)), nn.Parameter(x(D, D))

    def forward(self, batch: Tensor) -> Tensor:
        return F.linear(F.linear(batch, self.weight.t()).tanh(), self.second.t())


class Given(nn.Module):
    """A product with a weight that lies in memory as it was given, beside one that is not used."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.unused = nn.Parameter(weight), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    def forward(self, batch: Tensor) -> Tensor:
        return F.linear(batch, self.weight)


NOT_DENSE = {
    "rows left out": lambda: x(4, 6).t()[::2],
    "columns left out": lambda: x(8, 3).t()[:, ::2],
    "dense": lambda: x(4, 3).t(),
}


@pytest.mark.parametrize("name", NOT_DENSE)
def test_sums_of_weights_that_are_not_dense(name: str) -> None:
    """In a row, as autograd has them; zeros are laid out as gradients too."""
    model = Given(NOT_DENSE[name]()).double()
    batch = x(5, model.weight.shape[1])
    squares(model, batch).sum().backward()
    sums, _ = sw.clipped_grads(model, squares, batch, max_grad_norm=1e9)
    assert model.weight.grad is not None
    torch.testing.assert_close(sums["weight"], model.weight.grad)
    assert sums["weight"].stride() == model.weight.grad.stride()
    assert sums["unused.weight"].stride() == model.unused.weight.stride()


def test_what_waits_counts_with_all_its_memory() -> None:
    joined = Joined()
    with torch.no_grad():
        assert joined.take("a", Dense(x(100, D)[:2]))
    assert joined.size == 100 * D


LAID_OUT = {
    "equal linears": lambda: (nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)), x(5, D)),
    "transposed": lambda: (Turned(), x(5, D)),
    "channels last": lambda: (nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), x(5, 3, 6, 6)),
    "one by one, channels last": lambda: (nn.Conv2d(3, 1, 1).to(memory_format=torch.channels_last), x(5, 3, 6, 6)),
    "depthwise": lambda: (nn.Conv2d(4, 4, 3, groups=4), x(5, 4, 6, 6)),
    "embedding": lambda: (nn.Sequential(nn.Embedding(6, D), nn.Flatten()), torch.tensor([[0, 1], [2, 2], [3, 5]])),
}


WAYS_TO_SUM: dict[str, Callable[[nn.Module, Tensor], dict[str, Tensor]]] = {
    "one call": lambda model, batch: sw.clipped_grads(model, squares, batch, max_grad_norm=1e9)[0],
    "recorded": lambda model, batch: recorded(model, batch).weighted_sum(torch.ones(len(batch), dtype=torch.float64)),
}


@pytest.mark.parametrize("name", LAID_OUT)
@pytest.mark.parametrize("way", WAYS_TO_SUM)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_sums_are_laid_out_as_gradients_are(name: str, way: str, optimizer: type[torch.optim.Optimizer]) -> None:
    """Fused optimizers go through memory, whatever the strides say."""
    model, batch = LAID_OUT[name]()
    plain = copy.deepcopy(model.double())
    squares(plain, batch).sum().backward()
    sums = WAYS_TO_SUM[way](model, batch)
    for (key, p), own in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        assert sums[key].stride() == own.grad.stride()
        p.grad = sums[key]
    for parameters in (plain.parameters(), model.parameters()):
        optimizer(parameters, lr=0.1, fused=True).step()
    for p, own in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, own)


@pytest.mark.parametrize("most", [0, 30, 2**20])
def test_small_factors_wait_for_others_up_to_a_limit(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr("samplewise.streaming._MOST_WAITING", most)
    model = nn.Sequential(*(nn.Linear(D, D) for _ in range(6)), nn.LayerNorm(D)).double()
    batch = x(N, D)
    torch.testing.assert_close(sw.per_sample_norms(model, squares, batch), recorded(model, batch).norms())


@pytest.mark.parametrize("most", [0, 2**20])
def test_what_waits_must_not_change(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """What does not wait was used before."""
    monkeypatch.setattr("samplewise.streaming._MOST_WAITING", most)
    model, batch = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)).double(), x(N, D).requires_grad_()
    wanted = recorded(model, batch.detach()).norms()

    def double(leaf: Tensor) -> None:
        with torch.no_grad():
            leaf.mul_(2)

    batch.register_post_accumulate_grad_hook(double)
    if most:
        with pytest.raises(sw.SamplewiseError, match="changed in place"):
            sw.per_sample_norms(model, squares, batch)
    else:
        torch.testing.assert_close(sw.per_sample_norms(model, squares, batch), wanted)


# --- limits -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [math.inf, 1e39, 1e308])
def test_an_infinite_limit_clips_nothing(limit: float, dtype: torch.dtype) -> None:
    model, batch = nn.Linear(D, 2, bias=False).to(dtype), x(N, D).to(dtype)
    # a gradient of norm zero
    batch[2] = 0
    rec = recorded(model, batch)
    wanted = rec.weighted_sum(torch.ones(N, dtype=dtype))["weight"]
    streamed, norms = sw.clipped_grads(model, squares, batch, max_grad_norm=limit)
    assert norms[2] == 0
    torch.testing.assert_close(rec.clipped_sum(limit)["weight"], wanted)
    torch.testing.assert_close(streamed["weight"], wanted)


def test_no_number_is_no_limit() -> None:
    with pytest.raises(ValueError, match="max_grad_norm must be positive, got nan"):
        recorded(nn.Linear(D, 2).double(), x(N, D)).clipped_sum(math.nan)


# --- complex parameters -------------------------------------------------------------------------------------------------------


def test_complex_directions_and_matrices_are_taken() -> None:
    rec = recorded(Net(lambda self, b: (b * self.w).abs(), w=x(D) + 1j * x(D)), x(N, D))
    (rows,) = rec.grads().values()
    direction = x(D) + 1j * x(D)
    wanted = (rows * direction.conj()).real.sum(1)
    torch.testing.assert_close(rec.dot({"w": direction}), wanted)
    torch.testing.assert_close(rec.project({"w": direction[None]}), wanted[:, None])


def test_records_of_half_and_single_precision_may_meet() -> None:
    model, half = nn.Linear(D, 2), nn.Linear(D, 2).bfloat16()
    assert recorded(model, x(N, D).float()).gram(recorded(half, x(N, D).bfloat16())).shape == (N, N)
