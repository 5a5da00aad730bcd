"""Calls like one before take a short way: the same answers, and only where shapes and plain axes decide."""

from collections.abc import Callable, Hashable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samplewise as sw
from samplewise import by_rule, registry, remembered
from samplewise.axes import Axis
from samplewise.errors import MixedSamplesError, SamplewiseError
from samplewise.factors import Dense
from samplewise.recording import Recording
from samplewise.remembered import CONSTANT, key_of_meeting


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_FOLLOWED", {})
    monkeypatch.setattr(by_rule, "_MEETINGS", {})


class Net(nn.Module):
    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.function = nn.Linear(4, 4), nn.LayerNorm(4), function
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1)


def batch(n: int = 3, *shape: int) -> Tensor:
    return torch.randn(n, *(shape or (5, 4)), generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def by_loop(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(losses(model, x[k : k + 1]).sum(), list(named.values()), allow_unused=True) for k in range(len(x))
    ]
    columns = zip(named.values(), zip(*rows, strict=True), strict=True)
    return dict(
        zip(
            named,
            [torch.stack([torch.zeros_like(p) if g is None else g for g in column]) for p, column in columns],
            strict=True,
        )
    )


def plain(model: nn.Module, x: Tensor) -> Tensor:
    return (model.norm(model.inner(x).tanh()) + x).transpose(1, 2).reshape(len(x), -1)


def check(model: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(sw.per_sample_grads(model, losses, x), by_loop(model, x))


def test_the_second_step_is_remembered_and_exact() -> None:
    model = Net(plain)
    check(model, batch())
    calls, meetings = dict(remembered._FOLLOWED), dict(by_rule._MEETINGS)
    assert {key[0] for key in calls} >= {"tanh", "add", "transpose", "reshape"}
    assert {key[0] for key in meetings} == {"linear", "layer_norm"}
    check(model, batch().flip(0))
    assert (calls, meetings) == (remembered._FOLLOWED, by_rule._MEETINGS)


@pytest.mark.parametrize(
    "x", [batch(4), batch(5), batch(3, 3, 4), batch(4, 4, 4), batch(1), batch(3).transpose(1, 2).contiguous().mT]
)
def test_other_shapes_are_decided_anew(x: Tensor) -> None:
    """n equal to the length, or to the width, among them."""
    model = Net(plain)
    check(model, batch())
    check(model, x)


def test_other_axes_are_decided_anew() -> None:
    """The same shapes with the samples elsewhere."""
    model, x = Net(lambda m, x: m.inner(x).tanh()), batch(4, 4, 4)
    for dim in (0, 1):
        with sw.record(model, batch_size=4, batch_dim=dim) as rec:
            rec.backward(model(x).square().sum([d for d in range(3) if d != dim]))
        expected = by_loop(model, x.movedim(dim, 0))
        torch.testing.assert_close(rec.grads(), expected)


def test_freezing_is_seen() -> None:
    model = Net(plain)
    for frozen in ((), ("weight",), ("bias",), ("weight", "bias"), ()):
        for name, p in model.inner.named_parameters():
            p.requires_grad_(name not in frozen)
        check(model, batch())


@pytest.mark.parametrize("op", [torch.std, torch.var])
def test_a_flag_is_no_axis(op: Callable[..., Tensor]) -> None:
    """True equals 1, but `std(True)` brings all samples together and `std(1)` does not."""
    model = Net(lambda m, x: m.inner(x))
    with sw.record(model):
        out = model(batch())
        apart, together = op(out, 1), op(out, True)
        assert (apart.shape, together.shape) == ((3, 4), ())
        with pytest.raises(MixedSamplesError):
            together.backward()


def test_an_index_of_data_is_never_remembered() -> None:
    """Equal shapes, other rows: a sample's own rows one time, another sample's the next."""
    model = Net(lambda m, x: m.inner(x)[m.rows])
    model.rows = torch.arange(3)
    expected = by_loop(Net(lambda m, x: m.inner(x)), batch())
    torch.testing.assert_close(sw.per_sample_grads(model, losses, batch()), expected)
    assert not any(key[0] == "getitem" for key in remembered._FOLLOWED)
    model.rows = torch.tensor([2, 1, 0])
    with sw.record(model) as rec, pytest.raises(SamplewiseError):
        rec.backward(losses(model, batch()))


def test_a_mode_of_training_is_seen() -> None:
    model = Net(lambda m, x: m.batch_norm(m.inner(x).mT))
    model.batch_norm = nn.BatchNorm1d(4).double().eval()
    check(model, batch())
    model.train()
    with sw.record(model), pytest.raises(MixedSamplesError):
        model(batch())


def test_a_weight_in_another_memory_order_and_type() -> None:
    model = Net(plain)
    check(model, batch())
    model.inner.weight = nn.Parameter(model.inner.weight.detach().mT.contiguous().mT)
    check(model, batch())
    half = Net(plain).float()
    torch.testing.assert_close(sw.per_sample_grads(half, losses, batch().float()), by_loop(half, batch().float()))


def test_tensors_in_a_list_are_not_held() -> None:
    """A rule of a third party with a list among its arguments."""

    def mix(parts: list[Tensor], weight: Tensor) -> Tensor:
        if torch.overrides.has_torch_function((weight,)):
            return torch.overrides.handle_torch_function(mix, (weight,), parts, weight)
        return (parts[0] + parts[1]) * weight

    key = f"{mix.__module__}.{mix.__qualname__}"
    try:

        @sw.rule(mix)
        def mixed(grad: Tensor, out: None, parts: list[Tensor], weight: Tensor) -> dict[str, object]:
            return {"weight": Dense(grad * (parts[0] + parts[1]))}

        model = Net(lambda m, x: mix([x, 2 * x], m.scale))
        model.scale = nn.Parameter(torch.randn(4).double())
        for x in (batch(3, 4), 3 * batch(3, 4)):
            check(model, x)
        assert not by_rule._MEETINGS
    finally:
        registry.RULES.pop(key, None)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4)], ids=["layer", "group"])
def test_a_norm_met_before_goes_straight_to_its_op(norm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    through, taken = [], Recording._through
    monkeypatch.setattr(Recording, "_through", lambda self, func, *rest: through.append(func) or taken(self, func, *rest))
    functions = {F.layer_norm, F.group_norm}
    model, x = norm.double(), batch(3, 4)
    check(model, x)
    assert functions & set(through)
    through.clear()
    check(model, x + 1)
    assert not functions & set(through)


def test_a_rule_for_a_function_of_functional_comes_before_what_was_met() -> None:
    model, x = nn.LayerNorm(4).double(), batch(3, 4)
    check(model, x)
    called = []
    try:

        @sw.rule(F.layer_norm)
        def own(
            grad: Tensor, out: None, input: Tensor, sizes: object, weight: Tensor, bias: Tensor, eps: float = 1e-5
        ) -> dict[str, object]:
            called.append(eps)
            return {"weight": Dense(grad * F.layer_norm(input, sizes, eps=eps)), "bias": Dense(grad)}

        check(model, x)
        assert called
    finally:
        registry.RULES.pop("torch.nn.functional.layer_norm", None)
        registry.operation.cache_clear()


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_LIMIT", 20)
    monkeypatch.setattr(by_rule, "_MOST_MEETINGS", 5)
    model = Net(plain)
    for n in range(2, 12):
        check(model, batch(n))
        assert len(remembered._FOLLOWED) <= 20
        assert len(by_rule._MEETINGS) <= 5


def test_in_place_activations() -> None:
    model = Net(lambda m, x: F.relu(m.norm(F.relu(m.inner(x), inplace=True)), inplace=True))
    check(model, batch())
    assert ("relu", True) in {key[:2] for key in remembered._FOLLOWED}
    check(model, batch())


def added_in_place(x: Tensor) -> Tensor:
    x += 2 * x.detach()
    return x


def test_in_place_sums_of_samples_are_remembered() -> None:
    model = Net(lambda m, x: added_in_place(m.inner(x)))
    check(model, batch())
    assert ("add", True) in {key[:2] for key in remembered._FOLLOWED}
    check(model, batch())


def test_an_in_place_op_that_brings_samples_is_decided_anew() -> None:
    """Of equal shapes, with samples in what was a constant: what shares its memory is no longer known, every time."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        held = torch.zeros_like(x.detach())[:0].new_zeros(x.shape)
        rows = held[0]
        held += x.detach()
        return m.inner(x) * rows

    model = Net(forward)
    for _ in range(3):
        with pytest.raises(SamplewiseError):
            sw.per_sample_grads(model, losses, batch())
    assert ("iadd", True) not in {key[:2] for key in remembered._FOLLOWED}
    assert ("add", True) not in {key[:2] for key in remembered._FOLLOWED}


def test_an_in_place_op_with_its_target_by_name_is_decided_anew() -> None:
    """Samples come into a constant, which is used across samples then."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        held = x.new_ones(x.shape)
        torch.clamp_(input=held, min=x.detach())
        return m.inner(x) * held.sum(0)

    for _ in range(3):
        with pytest.raises(SamplewiseError):
            sw.per_sample_grads(Net(forward), losses, batch())


def changed_one_by_one(x: Tensor) -> Tensor:
    held = x.clone()
    part = held[..., :4]
    for i in range(held.shape[1]):
        held[:, i : i + 1].neg_()
        held[:, i : i + 1] += 1
    return part


@pytest.mark.parametrize("n", [1, 3])
def test_samples_changed_in_place_on_another_axis_stay_where_they_are(n: int) -> None:
    """A view of all of them, taken before, too."""
    model, x = Net(lambda m, x: m.inner(changed_one_by_one(x))), batch(n).transpose(0, 1).contiguous()
    expected = by_loop(Net(lambda m, x: m.inner(1 - x)), x.transpose(0, 1))
    for _ in range(2):
        found = sw.per_sample_grads(model, lambda m, x: m(x).square().sum((0, 2)), x, batch_dim=1)
        torch.testing.assert_close(found, expected)


def test_two_arguments_that_were_one_tensor_are_decided_anew() -> None:
    def normalised(second: str) -> Net:
        model = Net(lambda m, x: F.batch_norm(m.inner(x[:, 0]), m.first, getattr(m, second), m.norm.weight, m.norm.bias))
        model.register_buffer("first", torch.rand(4, dtype=torch.float64) + 0.5)
        model.register_buffer("other", torch.rand(4, dtype=torch.float64) + 0.5)
        return model

    for second in ("first", "other", "first"):
        check(normalised(second), batch())


def test_overloads_are_the_ops_that_they_belong_to() -> None:
    aten = torch.ops.aten

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = aten.linear.default(x, m.inner.weight, m.inner.bias)
        return aten.layer_norm.default(aten.add_.Tensor(h, x), [4], m.norm.weight, m.norm.bias)

    for _ in range(2):
        check(Net(forward), batch())


@pytest.mark.parametrize("write", [torch.ops.aten.add_.Tensor, torch.ops.aten.add_, torch.Tensor.add_])
def test_an_overload_that_writes_is_seen(write: Callable[..., Tensor]) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        held = x.new_zeros(x.shape)
        write(held, x.detach())
        return m.inner(x) * held.sum(0)

    for _ in range(2):
        with pytest.raises(SamplewiseError):
            sw.per_sample_grads(Net(forward), losses, batch())


@torch.library.custom_op("samplewise_tests::write", mutates_args={"into"})
def write(x: Tensor, scale: float, into: Tensor) -> None:
    """An op of somebody else that writes to an argument in the middle."""
    into.copy_(x * scale)


def test_an_op_that_writes_to_an_argument_is_seen() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        held = x.new_zeros(x.shape)
        write(x.detach(), 2.0, held)
        return m.inner(x) * held.sum(0)

    for _ in range(2):
        with pytest.raises(SamplewiseError):
            sw.per_sample_grads(Net(forward), losses, batch())


@torch.library.custom_op("samplewise_tests::put", mutates_args={"out"})
def put(x: Tensor, out: Tensor) -> None:
    """An op of somebody else that writes to an argument of the name that torch's own ops have for one that is no operand."""
    out.copy_(x)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("op", [put, torch.ops.samplewise_tests.put, torch.ops.samplewise_tests.put.default])
def test_an_op_that_writes_to_its_out_is_seen(op: Callable[..., None], named: bool) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        held = x.new_zeros(x.shape)
        total = x.detach().sum(0, keepdim=True).expand_as(x)
        op(total, out=held) if named else op(total, held)
        return m.inner(x) * held

    for _ in range(2):
        with pytest.raises(SamplewiseError):
            sw.per_sample_grads(Net(forward), losses, batch())


@pytest.mark.parametrize("op", [torch.cdist, torch.ops.aten.cdist, torch.ops.aten.cdist.default])
def test_a_packet_writes_to_no_out_that_is_not_given(op: Callable[..., Tensor]) -> None:
    for _ in range(2):
        check(Net(lambda m, x: op(x, m.inner.weight)), batch())


@pytest.mark.parametrize(
    ("op", "given", "first"),
    [
        (torch.index_select, {"dim": 1, "index": 2, "input": 3}, "input"),
        (torch.where, {"input": 1, "other": 2, "condition": 3}, "condition"),
        (torch.searchsorted, {"input": 1, "sorted_sequence": 2}, "sorted_sequence"),
        (torch.fft.fft, {"n": 1, "input": 2}, "input"),
        (torch.linalg.solve, {"B": 1, "A": 2}, "A"),
        (torch.cat, {"dim": 1, "tensors": 2}, "tensors"),
        (torch.ops.aten.where.self, {"self": 1, "other": 2, "condition": 3}, "condition"),
        (torch.ops.aten.where, {"self": 1, "other": 2, "condition": 3}, "condition"),
        (torch.ops.aten.clamp_.default, {"self": 1, "min": 2}, "self"),
        (torch.polygamma, {"input": 1, "n": 2}, None),
        (torch.nn.functional.layer_norm, {"input": 1, "normalized_shape": 2}, None),
    ],
)
def test_the_first_argument_is_known_by_its_names(op: Callable[..., Tensor], given: dict[str, int], first: str | None) -> None:
    expected = ((), given) if first is None else ((given[first],), {k: v for k, v in given.items() if k != first})
    assert registry.operation(op).in_order((), given) == expected
    assert registry.operation(op).in_order((0,), given) == ((0,), given)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: torch.index_select(dim=1, index=torch.tensor([1, 0, 3, 2]), input=m.inner(x)) * m.norm.weight,
        lambda m, x: torch.gather(index=x.argsort(1), dim=1, input=m.inner(x)) * m.norm.weight,
        lambda m, x: torch.conv1d(weight=m.inner.weight[..., None], input=x.mT),
        lambda m, x: torch.linalg.solve(B=m.inner(x)[..., None], A=torch.eye(4, dtype=x.dtype).expand(*x.shape, 4))[..., 0],
        lambda m, x: torch.where(other=m.norm.weight, input=m.inner(x), condition=x > 0),
        lambda m, x: torch.mul(out=None, other=m.norm.weight, input=m.inner(x)),
        lambda m, x: torch.neg_(input=m.inner(x)) * m.norm.weight,
        lambda m, x: torch.ops.aten.mul_.Tensor(other=m.norm.weight, self=m.inner(x)),
    ],
)
def test_arguments_by_name(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    for _ in range(2):
        check(Net(forward), batch())


def test_operands_are_not_taken_for_results_that_another_overload_writes_to() -> None:
    aten = torch.ops.aten
    for op in (aten.max, aten.topk, aten.sort, aten.linalg_qr):
        found = registry.operation(op)
        assert found.writes
        assert found.others_written((torch.ones(2), torch.ones(2)), {}) == []


def test_a_meeting_on_another_kind_of_device_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA a group norm in half precision keeps statistics, which it does not on a CPU."""
    # there is none on the device that stands for another one here
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)

    def key(device: str) -> Hashable:
        x, w = torch.empty(3, 4, device=device), torch.empty(4, 4, device=device)
        kinds = {id(x): Axis(0), id(w): CONSTANT}
        return key_of_meeting("linear", 3, (x, w), lambda value: kinds[id(value)], ())

    assert key("cpu") == key("cpu")
    assert key("cpu") != key("meta")
