"""The recurrent modules through `samplewise.expanded_weights`: every layer option, both layouts, packed sequences."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from expanded_weights_loop import Called, check_module, close, manual, module_loop, options, score
from samplewise.expanded_weights import ExpandedWeight, call_for_per_sample_grads


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


KINDS = {
    "tanh": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="tanh", **kwargs),
    "relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
    "gru": nn.GRU,
    "lstm": nn.LSTM,
}
LAYERS = [
    {},
    {"bias": False},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "bias": False, "dropout": 0.0},
]
PROJECTED = [
    {"proj_size": 2},
    {"proj_size": 2, "num_layers": 2, "bidirectional": True},
    {"proj_size": 2, "bias": False},
]
CASES = [(kind, layers) for kind in KINDS for layers in LAYERS] + [("lstm", layers) for layers in PROJECTED]
IDS = [f"{kind}-{'-'.join(f'{k}={v}' for k, v in layers.items()) or 'plain'}" for kind, layers in CASES]
each_case = pytest.mark.parametrize(("kind", "layers"), CASES, ids=IDS)


def build(kind, layers, *, batch_first=True, dtype=torch.float64):
    return KINDS[kind](3, 4, batch_first=batch_first, dtype=dtype, **layers)


def states(kind, layers, size, dtype=torch.float64):
    """Initial states, (layers, n, hidden)."""
    rows = layers.get("num_layers", 1) * (2 if layers.get("bidirectional") else 1)
    hidden = torch.randn(rows, size, layers.get("proj_size", 4), dtype=dtype)
    return (hidden, torch.randn(rows, size, 4, dtype=dtype)) if kind == "lstm" else hidden


def first(out):
    """Score of the outputs alone: unbatched by batch axis 0 they stay samples first."""
    return score(out[0])


@each_case
@pytest.mark.parametrize(("loss_reduction", "needs_grad"), [("sum", True), ("mean", False)])
def test_batch_first(kind, layers, loss_reduction, needs_grad):
    x = torch.randn(3, 5, 3, dtype=torch.float64, requires_grad=needs_grad)
    check_module(build(kind, layers), x, loss=score, loss_reduction=loss_reduction)


@each_case
@pytest.mark.parametrize("length", [3, 5])
def test_batch_second(kind, layers, length):
    x = torch.randn(length, 3, 3, dtype=torch.float64, requires_grad=True)
    check_module(build(kind, layers, batch_first=False), x, dim=1)


@pytest.mark.parametrize("shape", [(1, 5), (3, 1), (1, 1), (4, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_small_shapes(kind, shape):
    check_module(build(kind, {}), torch.randn(*shape, 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind):
    check_module(build(kind, {"num_layers": 2}, dtype=torch.float32), torch.randn(3, 5, 3), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_non_contiguous_input(kind):
    check_module(build(kind, {}), torch.randn(5, 3, 3, dtype=torch.float64).transpose(0, 1))


@each_case
def test_given_states_batch_second(kind, layers):
    check_module(
        build(kind, layers, batch_first=False),
        torch.randn(5, 3, 3, dtype=torch.float64),
        states(kind, layers, 3),
        dim=1,
    )


@each_case
def test_given_states_batch_first(kind, layers):
    model, x, hx = build(kind, layers), torch.randn(5, 6, 3, dtype=torch.float64), states(kind, layers, 5)

    def one(args, index, dim, size):
        return (args[0][index : index + 1], nest(args[1], lambda h: h[:, index : index + 1])) if args else args

    expected = module_loop(model, (x, hx), size=5, one=lambda v, i, d, s: one(v, i, d, s) if isinstance(v, tuple) else v)
    check_module(model, x, hx, size=5, given=5, loop=expected)


def nest(hx, function):
    return tuple(map(function, hx)) if isinstance(hx, tuple) else function(hx)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_frozen(kind, frozen):
    model = build(kind, {"num_layers": 2})
    getattr(model, frozen).requires_grad_(False)
    check_module(model, torch.randn(3, 5, 3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("kind", KINDS)
def test_between_other_layers(kind):
    def forward(m, ids):
        out, hidden = m.rnn(m.embed(ids))
        return m.head(out[:, -1]) + m.head((hidden[0] if isinstance(hidden, tuple) else hidden)[-1])

    parts = {"embed": nn.Embedding(7, 3), "rnn": build(kind, {"bidirectional": False}), "head": nn.Linear(4, 2)}
    check_module(Called(forward, **parts).double(), torch.randint(7, (3, 5)))


class Packed(nn.Module):
    """Packs inside the forward, so that the samples enter as a padded batch."""

    def __init__(self, rnn, *, enforce_sorted):
        super().__init__()
        self.rnn, self.enforce_sorted = rnn, enforce_sorted

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=self.rnn.batch_first, enforce_sorted=self.enforce_sorted)
        out, _ = self.rnn(packed)
        return pad_packed_sequence(
            out, batch_first=self.rnn.batch_first, total_length=x.shape[1 if self.rnn.batch_first else 0]
        )[0]


LENGTHS = [([5, 3, 2], True), ([2, 5, 3], False), ([3, 3, 3], True), ([1, 5, 1], False), ([5, 3, 2], False)]


@each_case
@pytest.mark.parametrize(("lengths", "enforce_sorted"), LENGTHS, ids=str)
def test_packed_inside(kind, layers, lengths, enforce_sorted):
    model = Packed(build(kind, layers), enforce_sorted=enforce_sorted)
    check_module(model, torch.randn(3, 5, 3, dtype=torch.float64, requires_grad=True), torch.tensor(lengths))


@each_case
@pytest.mark.parametrize(("lengths", "enforce_sorted"), LENGTHS, ids=str)
def test_packed_outside(kind, layers, lengths, enforce_sorted):
    model = build(kind, layers)
    sequences = [torch.randn(length, 3, dtype=torch.float64) for length in lengths]
    expected = {name: [] for name, _ in model.named_parameters()}
    for sequence in sequences:
        model.zero_grad()
        score(model(sequence[None])).backward()
        for name, p in model.named_parameters():
            expected[name].append(p.grad)
    model.zero_grad()
    packed = pack_sequence(sequences, enforce_sorted=enforce_sorted)
    out, hidden = call_for_per_sample_grads(model)(packed)
    assert isinstance(out, PackedSequence)
    plain, _ = model(packed)
    torch.testing.assert_close(out.data, plain.data)
    (score(out.data) + score(hidden)).backward()
    for name, p in model.named_parameters():
        assert p.grad is None
        close(p.grad_sample, torch.stack(expected[name]), name)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_with_given_states(kind):
    model, lengths = build(kind, {}), [2, 5, 3]
    sequences, hx = [torch.randn(length, 3, dtype=torch.float64) for length in lengths], states(kind, {}, 3)
    expected = {name: [] for name, _ in model.named_parameters()}
    for index, sequence in enumerate(sequences):
        model.zero_grad()
        score(model(sequence[None], nest(hx, lambda h, i=index: h[:, i : i + 1]))).backward()
        for name, p in model.named_parameters():
            expected[name].append(p.grad)
    model.zero_grad()
    out, hidden = call_for_per_sample_grads(model, batch_size=3)(pack_sequence(sequences, enforce_sorted=False), hx)
    (score(out.data) + score(hidden)).backward()
    for name, p in model.named_parameters():
        close(p.grad_sample, torch.stack(expected[name]), name)


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_without_samples_is_refused(kind):
    with pytest.raises(RuntimeError):
        score(call_for_per_sample_grads(build(kind, {}))(torch.randn(5, 3, dtype=torch.float64))).backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_wrong_layout_is_refused(kind, batch_first):
    """The steps of a recurrence are not samples: torch sees it when the sizes differ, we also when they are equal."""
    wrapped = call_for_per_sample_grads(build(kind, {}, batch_first=batch_first), batch_first=not batch_first)
    for length in (5, 3):
        with pytest.raises(RuntimeError):
            score(wrapped(torch.randn(length, 3, 3, dtype=torch.float64))[0]).backward()


@pytest.mark.parametrize("option", options(kind=list(KINDS)), ids=lambda o: o["kind"])
def test_dropout_between_layers_keeps_its_draw(option):
    """With dropout the rows are those of the masks that were drawn: they add up to the batch gradient."""
    model, x = build(option["kind"], {"num_layers": 2, "dropout": 0.5}), torch.randn(3, 5, 3, dtype=torch.float64)
    torch.manual_seed(1)
    first(model(x)).backward()
    total = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(1)
    first(call_for_per_sample_grads(model)(x)).backward()
    for name, p in model.named_parameters():
        close(p.grad_sample.sum(0), total[name], name)


def expanded(model, size):
    """The module's parameters, expanded, for `torch.func.functional_call`."""
    return {name: ExpandedWeight(p, size, "sum") for name, p in model.named_parameters()}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("length", [3, 5])
@each_case
def test_expanded_weights_by_hand(kind, layers, length, batch_first):
    model, x = build(kind, layers, batch_first=batch_first), torch.randn(3, length, 3, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    expected = module_loop(model, (x,), size=3, dim=0 if batch_first else 1)
    score(torch.func.functional_call(model, expanded(model, 3), (x,))).backward()
    for name, p in model.named_parameters():
        close(p.grad_sample, expected[name], name)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_expanded_weights_by_hand(kind):
    model, sequences = build(kind, {}), [torch.randn(length, 3, dtype=torch.float64) for length in (4, 3, 1)]
    out, hidden = torch.func.functional_call(model, expanded(model, 3), (pack_sequence(sequences),))
    (score(out.data) + score(hidden)).backward()
    for name, p in model.named_parameters():
        rows = [torch.autograd.grad(score(model(sequence[None])), p)[0] for sequence in sequences]
        close(p.grad_sample, torch.stack(rows), name)


@pytest.mark.parametrize("kind", ["tanh", "gru"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_learned_initial_state(kind, size):
    model = Called(lambda m, x: m.rnn(x, m.start.expand(1, len(x), 4))[0], rnn=build(kind, {}), start=(1, 1, 4))
    check_module(model, torch.randn(size, 5, 3, dtype=torch.float64))


@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_weight_of_the_size_of_a_batch_is_a_constant(frozen):
    x, state = torch.randn(3, 5, 3, dtype=torch.float64), torch.zeros(1, 3, 3, dtype=torch.float64)
    weights = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 3), (3, 3), (3,), (3,))]
    trained = [w.requires_grad_() for k, w in enumerate(weights) if k != frozen]

    def call(x, state, weights):
        return torch.rnn_tanh(x, state, weights, True, 1, 0.0, False, False, True)[0]

    rows = manual(3, lambda i: score(call(x[i : i + 1], state[:, i : i + 1], weights)), trained)
    score(call(x, state, [ExpandedWeight(w, 3, "sum") if w.requires_grad else w for w in weights])).backward()
    for w, each in zip(trained, rows, strict=True):
        close(w.grad_sample, each)
