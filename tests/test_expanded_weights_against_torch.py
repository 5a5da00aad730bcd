"""What torch 2.13's Expanded Weights get silently wrong, or refuse without need: one test each, with what is right."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from expanded_weights_loop import Called, batch, check_module, close, manual, module_loop, score
from samplewise.expanded_weights import ExpandedWeight, call_for_per_sample_grads


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_padding_idx_gets_no_gradient():
    model = Called(lambda m, ids: m.embed(ids).exp().sum(1), embed=nn.Embedding(6, 3, padding_idx=2).double())
    check_module(model, torch.tensor([[2, 1, 2], [0, 2, 5]]))
    assert not model.embed.weight.grad_sample[:, 2].any()


def test_scale_grad_by_freq_is_refused():
    with pytest.raises(RuntimeError, match="scale_grad_by_freq"):
        call_for_per_sample_grads(nn.Embedding(6, 3, scale_grad_by_freq=True))(torch.tensor([[2, 1], [2, 2]])).sum().backward()


def test_embedding_that_renormalises_is_exact_or_refused():
    model, ids = nn.Embedding(6, 3, max_norm=0.5).double(), torch.tensor([[2, 1], [2, 4]])
    try:
        output = call_for_per_sample_grads(model)(ids)
    except RuntimeError:
        return
    expected = manual(2, lambda i: score(F.embedding(ids[i], model.weight)), [model.weight])
    score(output).backward()
    close(model.weight.grad_sample, expected[0])


@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_in_eval_and_the_layers_below(affine):
    norm = nn.InstanceNorm1d(4, affine=affine, track_running_stats=True)
    model = nn.Sequential(nn.Conv1d(2, 4, 2), norm, nn.Conv1d(4, 3, 2)).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    check_module(model.eval(), batch(3, 2, 6).requires_grad_())


@pytest.mark.parametrize("length", [3, 5])
@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(4, 4), nn.PReLU()),
        nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 2)),
    ],
    ids=str,
)
def test_batch_second_where_length_equals_batch_size(model, length):
    for p in model.parameters():
        p.grad_sample = None
    check_module(model.double(), batch(length, 3, 4).requires_grad_(), dim=1)


@pytest.mark.parametrize("length", [3, 5])
def test_position_ids_when_length_equals_batch_size(length):
    """Ids (T, 1) are the same for every sample: no axis of theirs is the batch."""

    def forward(m, x):
        return m.head(x + m.positions(torch.arange(len(x))[:, None])).tanh()

    model = Called(forward, positions=nn.Embedding(6, 4), head=nn.Linear(4, 2)).double()
    check_module(model, batch(length, 3, 4), dim=1)


@pytest.mark.parametrize("length", [3, 5])
@pytest.mark.parametrize("unsqueeze", [False, True])
def test_position_ids_with_the_batch_first(length, unsqueeze):
    def forward(m, ids):
        positions = torch.arange(ids.shape[1])
        return m.head(m.embed(ids) + m.positions(positions[None] if unsqueeze else positions)).tanh()

    model = Called(forward, embed=nn.Embedding(7, 4), positions=nn.Embedding(6, 4), head=nn.Linear(4, 2)).double()
    check_module(model, torch.randint(7, (3, length)))


@pytest.mark.parametrize("length", [3, 5])
def test_position_parameter_when_length_equals_batch_size(length):
    check_module(Called(lambda m, x: (x + m.table) * m.table, table=(length, 4)), batch(3, length, 4))


def test_an_input_edited_in_place_after_use_raises():
    def forward(m, x):
        hidden = x * 2
        out = m.a(hidden)
        hidden.add_(1)
        return out

    model = Called(forward, a=nn.Linear(4, 3).double())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        call_for_per_sample_grads(model)(batch(3, 4)).sum().backward()


def test_the_users_input_edited_in_place_after_the_forward_raises():
    model, x = nn.Linear(4, 3).double(), batch(3, 4)
    value = call_for_per_sample_grads(model)(x).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: F.linear(x, m.w, m.b),
        lambda m, x: x @ m.w.mT + m.b,
        lambda m, x: x @ m.w.mH * m.b,
        lambda m, x: torch.einsum("nti,oi->nto", x.conj(), m.w.conj()) / m.b,
        lambda m, x: F.conv1d(x.mT, m.w[..., None], m.b),
    ],
    ids=["linear", "matmul", "adjoint", "einsum", "conv1d"],
)
def test_complex_is_exact_or_refused(call):
    model, x = Called(call, dtype=torch.complex128, w=(3, 4), b=(3,)), torch.randn(2, 5, 4, dtype=torch.complex128)
    if call(model, x).shape[1] == 3:
        with pytest.raises(RuntimeError, match="complex"):
            score(call_for_per_sample_grads(model)(x)).backward()
    else:
        check_module(model, x.requires_grad_())


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant):
        super().__init__()
        self.below, self.inside, self.above, self.scale = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 3),
            nn.Parameter(torch.randn(4)),
        )
        self.reentrant = reentrant

    def forward(self, x):
        def segment(h):
            return torch.tanh(self.inside(h)) * self.scale

        if self.reentrant is None:
            return self.above(segment(self.below(x)))
        return self.above(checkpoint(segment, self.below(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    model, x = Checkpointed(reentrant=reentrant).double(), batch(3, 4)
    model.reentrant = None
    expected = module_loop(model, (x,), size=3)
    model.reentrant = reentrant
    check_module(model, x, loop=expected)


def test_double_backward_is_exact_or_refused():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double(), batch(3, 4).requires_grad_()

    def penalty(call, x):
        (slope,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
        return slope.square().sum()

    expected = manual(3, lambda i: penalty(model, x[i : i + 1]), list(model.parameters()))
    try:
        penalty(call_for_per_sample_grads(model), x).backward()
    except RuntimeError:
        return
    for p, rows in zip(model.parameters(), expected, strict=True):
        close(p.grad_sample, rows)


def test_create_graph_is_exact_or_refused():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double(), batch(3, 4)
    expected = module_loop(model, (x,), size=3)
    try:
        score(call_for_per_sample_grads(model)(x)).backward(create_graph=True)
    except RuntimeError:
        return
    for name, p in model.named_parameters():
        close(p.grad_sample.detach(), expected[name], name)


WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "kwargs", [{"ignore_index": 1}, {"weight": WEIGHTS}, {"label_smoothing": 0.1}], ids=lambda k: next(iter(k))
)
def test_summed_losses_with_ignored_or_weighted_targets(kwargs):
    model, x, y = nn.Linear(4, 3).double(), batch(4, 4), torch.tensor([0, 1, 2, 0])
    expected = manual(
        4,
        lambda i: F.cross_entropy(model(x[i : i + 1]), y[i : i + 1], reduction="sum", **kwargs),
        list(model.parameters()),
    )
    F.cross_entropy(call_for_per_sample_grads(model)(x), y, reduction="sum", **kwargs).backward()
    for p, rows in zip(model.parameters(), expected, strict=True):
        close(p.grad_sample, rows)


@pytest.mark.parametrize("kwargs", [{}, {"ignore_index": 1}, {"weight": WEIGHTS}], ids=str)
def test_mean_losses_average_to_the_batch_gradient(kwargs):
    """The wrapper cannot see the loss: its rows are batch size times share, whatever the mean divides by."""
    model, x, y = nn.Linear(4, 3).double(), batch(4, 4), torch.tensor([0, 1, 2, 0])
    whole = torch.autograd.grad(F.cross_entropy(model(x), y, **kwargs), list(model.parameters()))
    F.cross_entropy(call_for_per_sample_grads(model, loss_reduction="mean")(x), y, **kwargs).backward()
    for p, total in zip(model.parameters(), whole, strict=True):
        close(p.grad_sample.mean(0), total)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_in_training_is_refused(affine, track):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=affine, track_running_stats=track)).double()
    with pytest.raises(RuntimeError):
        score(call_for_per_sample_grads(model)(batch(3, 4))).backward()


def test_a_gradient_of_something_else_leaves_no_rows():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double(), batch(3, 4).requires_grad_()
    wanted = torch.autograd.grad(score(model(x)), x)[0]
    expected = module_loop(model, (x,), size=3)
    value = score(call_for_per_sample_grads(model)(x))
    torch.testing.assert_close(torch.autograd.grad(value, x, retain_graph=True)[0], wanted)
    assert all(getattr(p, "grad_sample", None) is None for p in model.parameters())
    value.backward()
    for name, p in model.named_parameters():
        close(p.grad_sample, expected[name], name)


def test_backward_into_chosen_inputs_leaves_no_rows():
    model, x = nn.Linear(4, 3).double(), batch(3, 4).requires_grad_()
    score(call_for_per_sample_grads(model)(x)).backward(inputs=[x])
    assert x.grad is not None
    assert all(getattr(p, "grad_sample", None) is None for p in model.parameters())


def test_two_views_joined_along_the_batch_are_exact():
    torch.manual_seed(0)
    model = Called(lambda m, x: m.b(torch.cat([m.a(x), m.a(x).sin()])), a=nn.Linear(4, 3).double(), b=nn.Linear(3, 2).double())
    x = batch(4, 4)
    score(call_for_per_sample_grads(model)(x)).backward()
    for name, p in model.named_parameters():
        alone = [torch.autograd.grad(score(model(row[None])), p)[0] for row in x]
        torch.testing.assert_close(p.grad_sample, torch.stack(alone), msg=name)


def test_samples_that_meet_are_refused():
    for meet in (
        lambda h: h @ h.t(),
        lambda h: h - h.mean(0),
        lambda h: h.cumsum(0),
        lambda h: h.flip(0) * h,
        lambda h: torch.cat([h, h.flip(0)], 1)[:, 2:],
    ):
        model = Called(lambda m, x, meet=meet: m.b(meet(m.a(x))[:, :3]), a=nn.Linear(4, 3).double(), b=nn.Linear(3, 2).double())
        with pytest.raises(RuntimeError):
            score(call_for_per_sample_grads(model)(batch(4, 4))).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(dtype, inside):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(3, 4)

    def call(m, x):
        with torch.autocast("cpu", dtype=dtype):
            return m.inner(x)

    if inside:
        model = Called(call, inner=model)
        output = call_for_per_sample_grads(model)(x)
    else:
        with torch.autocast("cpu", dtype=dtype):
            output = call_for_per_sample_grads(model)(x)
    assert output.dtype == dtype
    output.float().square().sum().backward()
    expected = module_loop(model.inner if inside else model, (x,), size=3, loss=lambda out: out.square().sum())
    for (name, p), rows in zip(model.named_parameters(), expected.values(), strict=True):
        assert p.grad_sample.dtype == torch.float32
        close(p.grad_sample, rows, name, rtol=5e-2)


def test_lstm_first_in_float32():
    check_module(nn.LSTM(4, 5, batch_first=True), torch.randn(3, 6, 4), rtol=1e-3)


@pytest.mark.parametrize("length", [3, 5])
@pytest.mark.parametrize(
    "kwargs", [{}, {"bias": False}, {"kdim": 6, "vdim": 2}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(kwargs, length, batch_first):
    attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **kwargs).double()
    shape = (3, length) if batch_first else (length, 3)
    inputs = [batch(*shape, width) for width in (4, kwargs.get("kdim", 4), kwargs.get("vdim", 4))]
    for need_weights in (False, True):
        for p in attention.parameters():
            p.grad_sample = None
        model = Called(lambda m, *qkv, need=need_weights: m.inner(*qkv, need_weights=need)[0], inner=attention)
        check_module(model, *inputs, dim=0 if batch_first else 1)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder_layer(norm_first, batch_first):
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first, norm_first=norm_first).double()
    for training in (True, False):
        for p in model.parameters():
            p.grad_sample = None
        check_module(model.train(training), batch(3, 5, 4) if batch_first else batch(5, 3, 4), dim=0 if batch_first else 1)


def test_transformer():
    model = nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, batch_first=True).double()
    check_module(model, batch(3, 5, 4), batch(3, 6, 4))


ARITHMETIC = [
    ("+", lambda m, x: x + m.w[0] + m.w),
    ("*", lambda m, x: (x * m.w[1]) * 2),
    ("@", lambda m, x: x @ m.w),
    ("@ on the left", lambda m, x: (m.w @ x.mT).mT),
    (".t()", lambda m, x: x @ m.w.t()),
    ("mT", lambda m, x: x @ m.w.mT),
    ("expand", lambda m, x: torch.cat([m.w[0].expand(x.shape[0], 1, 4), x], 1).tanh()),
    ("[]", lambda m, x: F.linear(x, m.w[:2], m.w[2, :2])),
    ("chunk", lambda m, x: F.linear(x, m.w.chunk(2)[1])),
    (".to", lambda m, x: (x.float() @ m.w.to(torch.float32)).double()),
    (".float", lambda m, x: F.linear(x.float(), m.w.float()).double()),
    ("contiguous", lambda m, x: x @ m.w.t().contiguous()),
    ("normalised", lambda m, x: F.linear(x, F.normalize(m.w, dim=1))),
    ("low rank", lambda m, x: x @ (m.w @ m.w.t())),
    ("scaled", lambda m, x: F.linear(x, m.w * 0.5)),
    ("softmax", lambda m, x: x @ m.w.softmax(0)),
    ("einsum", lambda m, x: torch.einsum("nti,oi->nto", x, m.w)),
    ("stack", lambda m, x: x @ torch.stack([m.w[0], m.w[1], m.w[2], m.w[0]])),
    ("where", lambda m, x: torch.where(x > 0, m.w[0], x)),
    ("view_as_real", lambda m, x: x @ m.w.reshape(2, 8).view(4, 4)),
]


@pytest.mark.parametrize("call", [call for _, call in ARITHMETIC], ids=[name for name, _ in ARITHMETIC])
def test_arithmetic_on_a_parameter(call):
    check_module(
        Called(call, w=(4, 4)),
        batch(3, 4, 4).requires_grad_(),
        rtol=1e-4 if "float" in call.__code__.co_names or "float32" in call.__code__.co_names else None,
    )


LAYERS = [
    (nn.RMSNorm(4), (5, 4)),
    (nn.PReLU(), (4,)),
    (nn.PReLU(4), (4, 5)),
    (nn.ConvTranspose1d(3, 2, 3, stride=2, padding=1, output_padding=1), (3, 5)),
    (nn.ConvTranspose2d(4, 2, 3, groups=2), (4, 3, 4)),
    (nn.ConvTranspose3d(2, 2, 2), (2, 3, 2, 2)),
    (nn.BatchNorm1d(4).eval(), (4,)),
    (nn.BatchNorm2d(3).eval(), (3, 4, 5)),
    (nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), (5, 4)),
    (nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(inplace=True), nn.Linear(3, 2)), (5, 4)),
    (nn.Sequential(nn.Linear(4, 6), nn.GLU()), (5, 4)),
    (parametrizations.weight_norm(nn.Linear(4, 3)), (4,)),
    (parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), (4,)),
    (parametrizations.orthogonal(nn.Linear(4, 4)), (4,)),
    (parametrizations.weight_norm(nn.Conv2d(2, 3, 2)), (2, 4, 4)),
    (nn.Conv3d(2, 3, 2, dilation=2), (2, 4, 4, 3)),
]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("module", "shape"), LAYERS, ids=[str(module).split("(")[0] + str(i) for i, (module, _) in enumerate(LAYERS)]
)
def test_layer(module, shape, size):
    module = module.double()
    for p in module.parameters():
        p.grad_sample = None
    check_module(module, batch(size, *shape).requires_grad_())


def test_own_parametrization():
    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).transpose(-1, -2)

    model = nn.Linear(4, 4).double()
    parametrize.register_parametrization(model, "weight", Symmetric())
    check_module(model, batch(3, 4))


def test_bilinear():
    check_module(nn.Bilinear(3, 4, 2).double(), batch(5, 3).requires_grad_(), batch(5, 4).requires_grad_())


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag(mode):
    model = nn.EmbeddingBag(6, 3, mode=mode).double()
    check_module(model, torch.tensor([[1, 1, 2], [0, 5, 5]]))


@pytest.mark.parametrize(
    "cell",
    [
        nn.RNNCell(3, 4),
        nn.RNNCell(3, 4, nonlinearity="relu"),
        nn.GRUCell(3, 4),
        nn.LSTMCell(3, 4),
        nn.LSTMCell(3, 4, bias=False),
    ],
    ids=str,
)
def test_cells(cell):
    def forward(m, x):
        state = None
        for step in x.unbind(1):
            state = m.cell(step, state)
        return state

    check_module(Called(forward, cell=cell.double()), batch(3, 5, 3).requires_grad_())


@pytest.mark.parametrize("size", [3, 32])
def test_patch_embedding_in_channels_last(size):
    def forward(m, x):
        tokens = m.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([m.token.expand(len(x), -1, -1), tokens], 1) + m.positions
        return m.head(tokens[:, 0] + tokens[:, 1:].mean(1))

    model = Called(
        forward, patches=nn.Conv2d(3, 4, 2, stride=2), token=(1, 1, 4), positions=(1, 5, 4), head=nn.Linear(4, 2)
    ).double()
    check_module(model, batch(size, 3, 4, 4).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("size", [3, 32])
def test_channels_last_network(size):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 2, 3, stride=2, bias=False),
    )
    model = model.double().to(memory_format=torch.channels_last)
    check_module(model, batch(size, 3, 6, 6).to(memory_format=torch.channels_last))


def test_group_norm_of_a_channels_last_input_without_gradient():
    """Plain PyTorch 2.13 crashes here when only the weight needs a gradient."""
    model, x = nn.GroupNorm(2, 4).double(), batch(3, 4, 5, 6)
    expected = module_loop(model, (x,), size=3)
    score(call_for_per_sample_grads(model)(x.to(memory_format=torch.channels_last))).backward()
    for name, p in model.named_parameters():
        close(p.grad_sample, expected[name], name)


def test_conv3d_with_dilation_in_a_large_batch():
    check_module(nn.Conv3d(2, 3, 2, dilation=(1, 2, 1)).double(), batch(33, 2, 3, 4, 3))


KEYWORDS = [
    ("linear", lambda x, w, b: F.linear(x, bias=b, weight=w), (4,), (3, 4), (3,)),
    ("conv", lambda x, w, b: F.conv1d(x, bias=b, padding=1, weight=w), (2, 5), (3, 2, 2), (3,)),
    ("layer_norm", lambda x, w, b: F.layer_norm(x, bias=b, weight=w, normalized_shape=(4,)), (2, 4), (4,), (4,)),
    ("group_norm", lambda x, w, b: F.group_norm(x, bias=b, weight=w, num_groups=2), (4, 3), (4,), (4,)),
    ("instance_norm", lambda x, w, b: F.instance_norm(bias=b, weight=w, input=x), (4, 3), (4,), (4,)),
]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("case", KEYWORDS, ids=[name for name, *_ in KEYWORDS])
def test_keywords_in_any_order(case, wrapped):
    _, op, shape, weight, bias = case
    model, x = Called(lambda m, x: op(x, m.w, m.b), w=weight, b=bias), batch(3, *shape)
    if wrapped:
        check_module(model, x)
        return
    expected = module_loop(model, (x,), size=3)
    score(op(x, ExpandedWeight(model.w, 3, "sum"), ExpandedWeight(model.b, 3, "sum"))).backward()
    close(model.w.grad_sample, expected["w"])
    close(model.b.grad_sample, expected["b"])


def test_bare_parameters_and_views():
    def forward(m, x):
        q, k, v = F.linear(x, m.packed, m.shift).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * m.gain

    check_module(Called(forward, packed=(12, 4), shift=(12,), gain=(4,)), batch(3, 5, 4))


def test_flattened_batches():
    model = Called(
        lambda m, x: m.b(m.a(x.flatten(0, 1)).relu_()).view(len(x), -1, 2), a=nn.Linear(4, 5), b=nn.Linear(5, 2)
    ).double()
    check_module(model, batch(3, 6, 4))


def clamped(grad):
    return grad.clamp(-0.1, 0.1)


def test_a_hook_before_two_uses_of_a_derived_weight_is_refused():
    def forward(m, x):
        scaled = m.w * 2
        scaled.register_hook(clamped)
        return x @ scaled.t() + F.linear(x.sin(), scaled)

    with pytest.raises(RuntimeError, match="reaches several uses through a hook"):
        score(call_for_per_sample_grads(Called(forward, w=(3, 4)))(batch(3, 4))).backward()


def test_a_hook_on_an_expansion_after_its_use_is_refused():
    def forward(m, x):
        rows = m.w[None].expand(len(x), 4)
        out = torch.cat([x, rows], 1)
        rows.register_hook(clamped)
        return out

    with pytest.raises(RuntimeError, match="Register the hook before the use"):
        score(call_for_per_sample_grads(Called(forward, w=(4,)))(batch(3, 4))).backward()


def test_a_hook_on_a_derived_weight_sees_each_sample_alone():
    def forward(m, x):
        turned = m.w.t()
        turned.register_hook(clamped)
        return x @ turned

    check_module(Called(forward, w=(3, 4)), batch(3, 4))
