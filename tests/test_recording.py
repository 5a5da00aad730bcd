"""What a recording does around the numbers: it leaves nothing behind, computes nothing twice, and says why it refuses."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import samplewise as sw
from samplewise.notes import Notes

N, T, D = 3, 3, 4
Losses = Callable[[nn.Module, Tensor], Tensor]


def x(*shape: int) -> Tensor:
    return torch.randn(shape or (N, D), generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    out = model(batch)
    return (out * (out.cos() + 1.5)).flatten(1).sum(1)


def second(model: nn.Module, batch: Tensor) -> Tensor:
    out = model(batch).transpose(0, 1)
    return (out * (out.cos() + 1.5)).flatten(1).sum(1)


def linear(*sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(*(sizes or (D, 2))).double()


class Lambda(nn.Module):
    """A forward as a function of the module and its inputs; tensors given are parameters."""

    def __init__(self, forward: Callable[..., object], **parts: object) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.double()

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.function(self, *args, **kwargs)


def loop(model: nn.Module, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The truth: the gradient of each entry of the losses in turn."""
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(loss, list(names.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in losses()
    ]
    return {name: torch.stack(grads) for name, grads in zip(names, zip(*rows, strict=True), strict=True)}


def same(model: nn.Module, batch: object, losses: Losses = squares, **options: object) -> sw.Record:
    wanted = loop(model, lambda: losses(model, batch))
    with sw.record(model, **options) as rec:
        rec.backward(losses(model, batch))
    assert list(rec.grads()) == list(wanted)
    for name, rows in rec.grads().items():
        torch.testing.assert_close(rows, wanted[name], msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(rec.norms().square(), sum(rows.flatten(1).square().sum(1) for rows in wanted.values()))
    assert untouched(model)
    return rec


def untouched(model: nn.Module) -> bool:
    """No hook, mode, attribute or gradient is left."""
    modules = all(
        not m._forward_pre_hooks and not m._forward_hooks and not m._backward_hooks and not m._forward_pre_hooks_with_kwargs
        for m in model.modules()
        if not isinstance(m, nn.MultiheadAttention)
    )
    tensors = all(not p._backward_hooks and p.grad is None and not hasattr(p, "grad_sample") for p in model.parameters())
    plain = all(not p._post_accumulate_grad_hooks for p in model.parameters())
    return modules and tensors and plain and not torch.overrides._get_current_function_mode_stack()


# --- leaving nothing behind -------------------------------------------------------------------------------------------------------


def test_nothing_is_left_after_a_normal_end() -> None:
    model, attributes = linear(), set(vars(linear()))
    keys = {name: set(vars(p)) for name, p in model.named_parameters()}
    rec = same(model, x())
    assert set(vars(model)) == attributes
    assert {name: set(vars(p)) for name, p in model.named_parameters()} == keys
    assert rec.grads()["weight"].requires_grad is False
    assert type(model) is nn.Linear


def broken(*_: object) -> Tensor:
    raise KeyError("on purpose")


@pytest.mark.parametrize("where", ["forward", "backward", "loss", "after"])
def test_nothing_is_left_after_an_exception(where: str) -> None:
    def forward(self: nn.Module, batch: Tensor) -> Tensor:
        out = self.inner(batch)
        if where == "backward":
            out.register_hook(broken)
        return broken() if where == "forward" and self.fail else out

    model = Lambda(forward, inner=linear(), fail=True)
    with pytest.raises(KeyError, match="on purpose"), sw.record(model) as rec:  # noqa: PT012
        losses = squares(model, x())
        if where == "loss":
            broken()
        rec.backward(losses)
        broken()
    assert untouched(model)
    same(linear(), x())
    model.fail, where = False, ""
    same(model, x())


def test_an_exception_inside_a_composite_op_leaves_the_mode_stack_alone() -> None:
    model = linear()
    for _ in range(3):
        with pytest.raises(RuntimeError), sw.record(model):
            F.layer_norm(model(x()), (7,))
        assert untouched(model)


def test_recordings_do_not_nest() -> None:
    model = linear()
    with sw.record(model) as rec:
        with pytest.raises(sw.SamplewiseError, match=r"do not nest. Close the outer one first"), sw.record(linear()):
            pass
        rec.backward(squares(model, x()))
    assert untouched(model)
    assert rec.norms().shape == (N,)


def test_a_record_does_not_keep_the_graph_or_the_inputs_alive() -> None:
    model, batch = linear(), x()
    with sw.record(model) as rec:
        out = model(batch)
        kept = weakref.ref(out)
        rec.backward(out.sum(1))
    del out
    gc.collect()
    assert kept() is None


def test_a_note_is_of_one_tensor_and_not_of_the_next_with_its_identity() -> None:
    notes, kept = Notes[str](), []
    one = x()
    notes[one] = "known"
    identity, known = id(one), notes.get(one)
    del one
    while not kept or id(kept[-1]) != identity:
        kept.append(torch.empty(0))
    assert known == "known"
    assert notes.get(kept[-1]) is None


def test_a_tensor_from_outside_that_shares_changed_memory_is_not_trusted() -> None:
    """Every time, and not only when it is first seen."""
    memory = torch.zeros(N, D, dtype=torch.float64)
    view = memory.view(N, D)

    def mixes(self: nn.Module, batch: Tensor) -> Tensor:
        memory.copy_(batch.flip(0))
        return self.inner(view)

    with sw.record(Lambda(mixes, inner=linear())) as rec, pytest.raises(sw.SampleAxisError, match="shares its memory"):
        rec.backward(rec._recording.model(x()).square().sum(1))


def test_the_model_trains_as_before() -> None:
    model = linear()
    same(model, x())
    squares(model, x()).sum().backward()
    torch.testing.assert_close(model.weight.grad, torch.autograd.grad(squares(model, x()).sum(), model.weight)[0])


def test_gradients_of_users_are_kept() -> None:
    model = linear()
    model.weight.grad = torch.ones_like(model.weight)
    with sw.record(model) as rec:
        rec.backward(squares(model, x()))
    assert model.weight.grad.eq(1).all()
    assert model.bias.grad is None


# --- nothing twice ----------------------------------------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # what is made on the meta device takes no memory
        self.counts[func.overloadpacket.__name__] += not (isinstance(out, Tensor) and out.is_meta)
        return out


def test_the_ordinary_weight_gradient_is_never_computed() -> None:
    model, batch = nn.Sequential(linear(4, 5), nn.ReLU(), linear(5, 6), nn.ReLU(), linear(6, 2)), x()
    with sw.record(model) as rec:
        losses = model(batch).sum(1)
        with Ops() as ops:
            rec.backward(losses)
    # the gradients of two inputs, and not one product more
    assert ops.counts["mm"] == 2
    assert not ops.counts["addmm"] + ops.counts["bmm"] + ops.counts["einsum"]


def test_a_convolution_computes_its_input_gradient_alone() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Conv1d(3, 2, 3)).double()
    masks = []

    class Masks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "convolution_backward":
                masks.append(list(args[-1]))
            return func(*args, **(kwargs or {}))

    with sw.record(model, strategy="gram") as rec:
        losses = squares(model, x(3, 2, 8))
        with Masks():
            rec.backward(losses)
    assert masks == [[True, False, False]]


def test_the_forward_runs_each_op_once_and_copies_nothing() -> None:
    model, batch = nn.Sequential(linear(4, 5), nn.ReLU(inplace=True), nn.LayerNorm(5).double(), linear(5, 2)), x(3, 6, 4)
    with Ops() as plain:
        model(batch)
    with sw.record(model), Ops() as recorded:
        model(batch)
    for op in ("clone", "copy_", "_to_copy", "empty_like", "new_empty", "cat", "contiguous"):
        assert recorded.counts[op] == plain.counts[op], op
    for op in ("mm", "addmm", "native_layer_norm", "relu_"):
        assert recorded.counts[op] == plain.counts[op], op


def test_saved_activations_are_the_models_own() -> None:
    """As many saved bytes as plain training: what a rule keeps is the tensor the model made."""
    model, batch = nn.Sequential(linear(4, 50), nn.Tanh(), linear(50, 60), nn.Tanh(), linear(60, 2)), x(30, 4)

    def storages(run: Callable[[], object]) -> int:
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            keep = run()
            assert keep is not None
        return sum(found.values())

    plain = storages(lambda: model(batch))
    with sw.record(model):
        assert storages(lambda: model(batch)) <= plain


def test_frozen_layers_below_cost_no_backward() -> None:
    model = nn.Sequential(linear(4, 5), nn.ReLU(), linear(5, 2))
    model[0].requires_grad_(False)
    with sw.record(model) as rec:
        losses = model(x()).sum(1)
        with Ops() as ops:
            rec.backward(losses)
    assert not ops.counts["mm"] + ops.counts["threshold_backward"]
    assert list(rec.grads()) == ["2.weight", "2.bias"]


# --- which backward ---------------------------------------------------------------------------------------------------------------


def test_autograd_grad_for_an_input_leaves_no_trace() -> None:
    model, batch = linear(), x().requires_grad_()
    wanted = loop(model, lambda: squares(model, batch))
    with sw.record(model) as rec:
        losses = squares(model, batch)
        torch.autograd.grad(losses.sum(), batch, retain_graph=True)
        with pytest.raises(sw.SamplewiseError, match="no backward pass"):
            rec.grads()
        rec.backward(losses)
    torch.testing.assert_close(rec.grads()["weight"], wanted["weight"])
    assert batch.grad is not None
    torch.testing.assert_close(batch.grad, torch.autograd.grad(squares(model, batch).sum(), batch)[0])


def test_rows_of_two_batches_are_never_added() -> None:
    model = linear()
    with sw.record(model) as rec:
        rec.backward(squares(model, x()))
        with pytest.raises(
            sw.MixedSamplesError, match=r"rows of two batches are never added. Open a new recording for each batch"
        ):
            model(x())


def test_two_forwards_before_the_backward_add_up_per_sample() -> None:
    model, (a, b) = linear(), (x(), x(N, D) + 1)
    wanted = loop(model, lambda: squares(model, a) + squares(model, b))
    with sw.record(model) as rec:
        rec.backward(squares(model, a) + squares(model, b))
    torch.testing.assert_close(rec.grads()["weight"], wanted["weight"])


def test_a_second_backward_raises_as_usual_and_adds_up_with_retain_graph() -> None:
    model = linear()
    with sw.record(model) as rec:
        losses = squares(model, x())
        rec.backward(losses)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            rec.backward(losses)
    with sw.record(model) as twice:
        losses = squares(model, x())
        twice.backward(losses, retain_graph=True)
        twice.backward(losses)
    torch.testing.assert_close(twice.grads()["weight"], 2 * loop(model, lambda: squares(model, x()))["weight"])
    assert rec is not twice


def test_a_second_derivative_is_refused() -> None:
    model, batch = linear(), x().requires_grad_()
    with pytest.raises(RuntimeError, match=r"create_graph|once_differentiable|second derivative"), sw.record(model) as rec:  # noqa: PT012
        (slope,) = torch.autograd.grad(squares(model, batch).sum(), batch, create_graph=True)
        rec.backward(slope.square().sum(1))


def test_backward_after_the_block_is_refused() -> None:
    model = linear()
    with sw.record(model) as rec:
        losses = squares(model, x())
    with pytest.raises(sw.SamplewiseError, match=r"inside the `with record\(...\)` block"):
        rec.backward(losses)
    with pytest.raises(sw.SamplewiseError, match=r"inside the `with record\(...\)` block"):
        losses.sum().backward()


def test_an_input_edited_in_place_raises() -> None:
    model, batch = linear(), x()
    with sw.record(model) as rec:
        hidden = batch * 1
        losses = model(hidden).sum(1)
        hidden.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            rec.backward(losses)
    assert untouched(model)


# --- uses that cannot be seen -----------------------------------------------------------------------------------------------------


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum(0)


def test_a_users_function_on_a_parameter_raises() -> None:
    model = Lambda(lambda self, b: Scale.apply(b, self.w), w=x(D))
    with (
        pytest.raises(sw.UnsupportedOpError, match=r"^w: an ordinary gradient reached .* rule with `samplewise.rule`"),
        sw.record(model) as rec,
    ):
        rec.backward(squares(model, x()))
    assert untouched(model)
    assert model.w.grad is None


def test_a_users_function_on_activations_is_fine() -> None:
    same(
        Lambda(
            lambda self, b: self.out(Scale.apply(self.inner(b), torch.ones(4).double())), inner=linear(4, 4), out=linear(4, 2)
        ),
        x(),
    )


def test_a_tensor_computed_before_the_recording_raises() -> None:
    model = linear()
    weight = model.weight * 2
    with (
        pytest.raises(sw.SamplewiseError, match=r"computed before the recording began|could not see into"),
        sw.record(model, batch_size=N) as rec,
    ):
        rec.backward(F.linear(rec.batched(x()), weight, model.bias).sum(1))
    assert untouched(model)


def test_a_scripted_module_raises() -> None:
    model = Lambda(lambda self, b: self.inner(b), inner=torch.jit.trace(linear(), x()))
    with pytest.raises(sw.SamplewiseError), sw.record(model) as rec:
        rec.backward(squares(model, x()))
    assert untouched(model)


# --- losses -----------------------------------------------------------------------------------------------------------------------

LOGITS, CLASSES = linear(D, 5), torch.tensor([1, 0, 4])
REFUSED_LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "ignore_index": (lambda out: F.cross_entropy(out, torch.tensor([1, -100, 4])), "weighted mean"),
    "class weights": (lambda out: F.cross_entropy(out, CLASSES, weight=torch.arange(1.0, 6).double()), "weighted mean"),
    "nll ignore_index": (lambda out: F.nll_loss(out.log_softmax(1), CLASSES, ignore_index=0), "weighted mean"),
    "masked mean": (
        lambda out: (out.sum(1) * torch.tensor([1.0, 0, 1])).sum() / torch.tensor([1.0, 0, 1]).sum(),
        "weighted mean|mean",
    ),
    "squared mean": (lambda out: out.mean().square(), "plain sum or mean"),
    "norm": (lambda out: out.norm(), "plain sum or mean"),
    "mean over picked": (lambda out: out[torch.tensor([True, False, True])].mean(), "mean"),
    "product": (lambda out: out.sum() * out.mean(), "plain sum or mean"),
    "divided by a mean": (lambda out: out.sum() / out.mean(), "plain sum or mean"),
    "plus penalty": (lambda out: out.mean() + LOGITS.weight.square().sum(), "plain sum or mean|penalty|samples"),
    "constant": (lambda out: LOGITS.weight.square().sum(), "does not depend on the samples"),
}


@pytest.mark.parametrize("name", REFUSED_LOSSES)
def test_losses_that_are_no_plain_mean_are_refused(name: str) -> None:
    loss, says = REFUSED_LOSSES[name]
    with pytest.raises(sw.SamplewiseError, match=says), sw.record(LOGITS, loss_reduction="mean"):
        loss(LOGITS(x())).backward()
    assert untouched(LOGITS)


MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean of losses": lambda out: F.cross_entropy(out, CLASSES, reduction="none").mean(),
    "cross entropy": lambda out: F.cross_entropy(out, CLASSES),
    "no target ignored": lambda out: F.cross_entropy(out, CLASSES, ignore_index=3),
    "smoothed": lambda out: F.cross_entropy(out, CLASSES, label_smoothing=0.1),
    "nll": lambda out: F.nll_loss(out.log_softmax(1), CLASSES),
    "mse": lambda out: F.mse_loss(out, torch.zeros_like(out)),
    "scaled sum": lambda out: out.sum() / N,
    "two terms": lambda out: F.mse_loss(out, torch.ones_like(out)) + 0.5 * out.tanh().mean(),
    "mean of all": lambda out: out.square().mean(),
    "mean twice": lambda out: out.square().mean(1).mean(),
    "bce": lambda out: F.binary_cross_entropy_with_logits(out, torch.ones_like(out), pos_weight=torch.arange(1.0, 6).double()),
}


@pytest.mark.parametrize("name", MEANS)
def test_plain_means(name: str) -> None:
    rows = []
    for piece, target in zip(x().split(1), CLASSES.split(1), strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "CLASSES", target)
            patch.setitem(globals(), "N", 1)
            rows.append(torch.autograd.grad(MEANS[name](LOGITS(piece)), LOGITS.weight)[0])
    with sw.record(LOGITS, loss_reduction="mean") as rec:
        MEANS[name](LOGITS(x())).backward()
    torch.testing.assert_close(rec.grads()["weight"], torch.stack(rows))


@pytest.mark.parametrize("reduce", [lambda losses: losses.sum(), lambda losses: losses.unsqueeze(0).sum()])
def test_sums(reduce: Callable[[Tensor], Tensor]) -> None:
    model = linear()
    with sw.record(model) as rec:
        reduce(squares(model, x())).backward()
    torch.testing.assert_close(rec.grads()["weight"], loop(model, lambda: squares(model, x()))["weight"])


@pytest.mark.parametrize(
    ("losses", "error", "says"),
    [
        (lambda m, b: squares(m, b).flip(0), sw.SampleAxisError, "cannot tell that entry i belongs to sample i"),
        (lambda m, b: squares(m, b).sort()[0], sw.SampleAxisError, "cannot tell"),
        (lambda m, b: squares(m, b).softmax(0), sw.SampleAxisError, "cannot tell"),
        (lambda m, b: m(b).square().sum(0)[:1].expand(N), sw.SampleAxisError, "cannot tell"),
        (lambda m, b: m.weight.sum().expand(len(m(b))), sw.SampleAxisError, "do not depend on the samples"),
        (lambda m, b: squares(m, b).sum(), ValueError, r"expected one loss per sample, shape \(3,\), got \(\)"),
        (lambda m, b: m(b), ValueError, r"expected one loss per sample, shape \(3,\), got \(3, 2\)"),
        (lambda m, b: m(b)[:2].sum(1), ValueError, r"got \(2,\)"),
    ],
)
def test_losses_that_lost_the_axis_are_refused(losses: Losses, error: type[Exception], says: str) -> None:
    model = linear()
    with pytest.raises(error, match=says), sw.record(model) as rec:
        rec.backward(losses(model, x()))
    assert untouched(model)


def test_a_regularisation_term_is_added_per_sample() -> None:
    same(linear(), x(), lambda m, b: squares(m, b) + 0.1 * m.weight.square().sum())
    same(linear(), x(), lambda m, b: squares(m, b) + sum(p.abs().sum() for p in m.parameters()) / N)


# --- models -----------------------------------------------------------------------------------------------------------------------


def tied() -> nn.Module:
    embedding, head = nn.Embedding(5, D), nn.Linear(D, 5, bias=False)
    head.weight = embedding.weight
    return Lambda(lambda self, ids: self.head(self.embedding(ids)), embedding=embedding, head=head)


def reused(self: nn.Module, batch: Tensor) -> Tensor:
    return self.inner(self.inner(self.inner(batch).relu_()).tanh())


def lora() -> nn.Module:
    base = linear()
    base.requires_grad_(False)
    return Lambda(
        lambda self, b: F.linear(b, self.base.weight + 0.5 * self.up @ self.down, self.base.bias),
        base=base,
        up=x(2, 1),
        down=x(1, D),
    )


def transformer(*, batch_first: bool, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=batch_first, **options).double()


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "tied": (tied, torch.tensor([[0, 1, 1], [2, 0, 4], [3, 3, 3]])),
    "reused": (lambda: Lambda(reused, inner=linear(4, 4)), x()),
    "reused, three axes": (lambda: Lambda(reused, inner=linear(4, 4)), x(N, T, D)),
    "unused": (lambda: Lambda(lambda self, b: self.a(b), a=linear(), b=linear(3, 3)), x()),
    "lora": (lora, x()),
    "weight norm": (lambda: parametrizations.weight_norm(linear()), x()),
    "orthogonal": (lambda: parametrizations.orthogonal(linear()), x()),
    "spectral norm, eval": (lambda: parametrizations.spectral_norm(linear()).eval(), x()),
    "bare parameters": (lambda: Lambda(lambda self, b: b * self.scale + self.shift, scale=x(D), shift=x(D)), x(N, T, D)),
    "positions, T == n": (
        lambda: Lambda(lambda self, b: self.inner(b + self.table[: b.shape[1]]), table=x(T, D), inner=linear()),
        x(N, T, D),
    ),
    "class token": (
        lambda: Lambda(
            lambda self, b: self.inner(torch.cat([self.token.expand(len(b), -1, -1), b], 1)), token=x(1, 1, D), inner=linear()
        ),
        x(N, T, D),
    ),
    "in place": (
        lambda: nn.Sequential(linear(4, 5), nn.ReLU(inplace=True), linear(5, 5), nn.LeakyReLU(inplace=True), linear(5, 2)),
        x(N, T, D),
    ),
    "flattened": (lambda: Lambda(lambda self, b: self.inner(b.view(-1, D)).view(len(b), -1), inner=linear()), x(N, T, D)),
    "convolutional": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 2),
        ).double(),
        x(N, 2, 4, 4),
    ),
    "channels last": (
        lambda: (
            nn.Sequential(nn.Conv2d(2, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.PReLU(4))
            .double()
            .eval()
            .to(memory_format=torch.channels_last)
        ),
        x(N, 2, 4, 4).contiguous(memory_format=torch.channels_last),
    ),
    "encoder layer": (lambda: transformer(batch_first=True), x(N, T, D)),
    "encoder layer, norm first, gelu": (lambda: transformer(batch_first=True, norm_first=True, activation="gelu"), x(N, T, D)),
    "encoder layer, eval": (lambda: transformer(batch_first=True).eval(), x(N, 5, D)),
    "encoder": (
        lambda: nn.TransformerEncoder(transformer(batch_first=True), 2, enable_nested_tensor=False).double(),
        x(N, T, D),
    ),
    "lstm": (
        lambda: Lambda(
            lambda self, b: self.out(self.inner(b)[0][:, -1]),
            inner=nn.LSTM(D, 3, 2, batch_first=True, bidirectional=True),
            out=nn.Linear(6, 2),
        ),
        x(N, T, D),
    ),
    "gru": (lambda: Lambda(lambda self, b: self.inner(b)[0], inner=nn.GRU(D, 3, batch_first=True)), x(N, T, D)),
    "rnn cell": (lambda: Lambda(lambda self, b: self.inner(b[:, 1], self.inner(b[:, 0])), inner=nn.RNNCell(D, 3)), x(N, T, D)),
    "checkpointed": (
        lambda: Lambda(
            lambda self, b: self.out(checkpoint(self.inner, self.first(b), use_reentrant=False)),
            first=linear(4, 4),
            inner=nn.Sequential(linear(4, 5), nn.ReLU(), linear(5, 4)),
            out=linear(),
        ),
        x(),
    ),
    "checkpointed, reentrant": (
        lambda: Lambda(
            lambda self, b: self.out(checkpoint(self.inner, self.first(b), use_reentrant=True)),
            first=linear(4, 4),
            inner=nn.Sequential(linear(4, 5), nn.ReLU(), linear(5, 4)),
            out=linear(),
        ),
        x(),
    ),
    "partly frozen": (
        lambda: _frozen(nn.Sequential(linear(4, 5), linear(5, 5), linear(5, 2)), "0.bias", "1.weight", "2.weight"),
        x(),
    ),
}


def _frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    make, batch = MODELS[name]
    torch.manual_seed(0)
    model = make()
    if "reentrant" in name:
        # autograd.grad does not go with it: the truth is the same network without checkpoints
        plain = Lambda(lambda self, b: self.out(self.inner(self.first(b))), first=model.first, inner=model.inner, out=model.out)
        wanted = loop(plain, lambda: squares(plain, batch))
        with sw.record(model) as rec:
            rec.backward(squares(model, batch))
        for key, rows in rec.grads().items():
            torch.testing.assert_close(rows, wanted[key])
        assert untouched(model)
        return
    same(model, batch)
    report = sw.verify(model, squares, batch)
    assert not report.failures


MHA = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 3, "vdim": 5},
    {"kdim": 3, "vdim": 5, "add_bias_kv": True},
]
MASKS: dict[str, Callable[[int], dict[str, object]]] = {
    "plain": lambda t: {},
    "no weights": lambda t: {"need_weights": False},
    "per head": lambda t: {"average_attn_weights": False},
    "attn_mask": lambda t: {"attn_mask": torch.ones(t, t, dtype=torch.bool).triu(1), "need_weights": False},
    "float mask": lambda t: {"attn_mask": x(t, t)},
    "padding": lambda t: {"key_padding_mask": torch.arange(t).expand(N, t) >= torch.tensor([t, t - 1, t - 1])[:, None]},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", MHA, ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("t", [T, 5])
def test_multihead_attention(t: int, batch_first: bool, options: dict[str, object], masks: str) -> None:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(D, 2, batch_first=batch_first, **options).double()

    def attend(self: nn.Module, q: Tensor) -> Tensor:
        turned = q if batch_first else q.transpose(0, 1)
        k = turned[..., : options.get("kdim", D)]
        v = torch.cat([turned, turned], -1)[..., : options.get("vdim", D)]
        out, weights = self.mha(turned, k, v, **MASKS[masks](t))
        out = out if batch_first else out.transpose(0, 1)
        return out if weights is None else torch.cat([out.flatten(1), weights.flatten(1)], 1)

    same(Lambda(attend, mha=mha), x(N, t, D))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("t", [T, 5])
def test_transformer_in_both_layouts(t: int, batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(D, 2, 1, 1, 8, dropout=0.0, batch_first=batch_first).double()
    mask = nn.Transformer.generate_square_subsequent_mask(t, dtype=torch.float64)
    batch = x(N, t, D) if batch_first else x(t, N, D)

    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        out = model(batch, batch * 0.5, tgt_mask=mask)
        return (out * out.cos()).sum((1, 2) if batch_first else (0, 2))

    same(model, batch, losses, batch_dim=0 if batch_first else 1, batch_size=N)


def test_batch_dim_one() -> None:
    for model in (linear(), nn.Sequential(linear(4, 4), nn.LayerNorm(4).double(), linear()), transformer(batch_first=False)):
        for t in (T, 5):
            rec = same(model, x(t, N, D), second, batch_dim=1)
            assert all(rows.shape[0] == N for rows in rec.grads().values())


def test_several_inputs_keywords_and_dictionaries() -> None:
    model = Lambda(
        lambda self, a, pair, *, scale, parts: self.a(a) * scale + self.b(pair[0]) + self.a(parts["c"]) + pair[1][:, None],
        a=linear(),
        b=linear(),
    )
    call = lambda m, _: m(x(), (x(N, D) + 1, x(N)), scale=x(N, 1), parts={"c": x() * 2, "names": ["a", "b"]}).sum(1)
    same(model, None, call)
    same(model, None, call, batch_size=N)


def test_the_batch_size_must_be_clear() -> None:
    model = Lambda(lambda self, a, b: self.a(a) + b.mean(), a=linear())
    with (
        pytest.raises(
            ValueError,
            match=r"the batch size is not clear from the inputs: found sizes 3, 5|sizes 3, 5 on axis 0. Give `batch_size`",
        ),
        sw.record(model),
    ):
        model(x(), x(5))
    wanted = loop(model, lambda: model(x(), x(5)).sum(1))
    with sw.record(model, batch_size=N) as rec:
        rec.backward(model(x(), x(5)).sum(1))
    torch.testing.assert_close(rec.grads()["a.weight"], wanted["a.weight"])
    with pytest.raises(ValueError, match="no tensor with such an axis"), sw.record(model):
        model(torch.ones(()), torch.ones(()))


def test_functional_call() -> None:
    model = linear()
    wanted = loop(model, lambda: squares(model, x()))
    with sw.record(model, batch_size=N) as rec:
        out = torch.func.functional_call(model, dict(model.named_parameters()), (x().clone(),))
        rec.backward((out * (out.cos() + 1.5)).sum(1))
    torch.testing.assert_close(rec.grads()["weight"], wanted["weight"])


def test_declarations() -> None:
    model = linear()
    mask = torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 0]]).double()
    # T == n: a mask made outside could be batched
    masked = Lambda(lambda self, b: self.inner(b) @ self.inner(b).mT + mask, inner=linear(D, 2))
    with (
        pytest.raises(sw.SampleAxisError, match=r"fall on different places after broadcasting.*rec.constant\(tensor\)"),
        sw.record(masked) as rec,
    ):
        rec.backward(squares(masked, x(N, T, D)))
    with sw.record(masked) as rec:
        rec.constant(mask)
        rec.backward(squares(masked, x(N, T, D)))
    torch.testing.assert_close(rec.grads()["inner.weight"], loop(masked, lambda: squares(masked, x(N, T, D)))["inner.weight"])
    with sw.record(model, batch_size=N) as rec, pytest.raises(ValueError, match="has not the batch size 3"):
        rec.batched(x(5, D))


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False), nn.BatchNorm1d(2, track_running_stats=False).eval()]
)
def test_batch_norm_in_training_mode_raises(layer: nn.Module) -> None:
    model = nn.Sequential(linear(), layer.double())
    with (
        pytest.raises(sw.MixedSamplesError, match=r"batch_norm: .* mix the samples .*model.eval\(\).*nn.GroupNorm"),
        sw.record(model) as rec,
    ):
        rec.backward(squares(model, x()))
    assert untouched(model)


# --- options and quantities ------------------------------------------------------------------------------------------------------


def test_the_fallback_can_be_forbidden_and_is_reported() -> None:
    model = Lambda(lambda self, b: torch.cdist(b, self.codes), codes=x(5, D), inner=linear())
    rec = same(model, x(N, T, D))
    rows = {row.parameter: row for row in rec.coverage().rows}
    assert rows["codes"].how == ("fallback",)
    assert rows["inner.weight"].structure in {(), ("unused",)}
    assert rec.coverage().fallback_share == pytest.approx(20 / 30)
    with (
        pytest.raises(sw.UnsupportedOpError, match=r"cdist: no rule gives the gradient of 'codes'.*fallback='error'"),
        sw.record(model, fallback="error"),
    ):
        model(x(N, T, D))


@pytest.mark.parametrize("options", [{"fallback": "never"}, {"loss_reduction": "none"}])
def test_options_are_checked(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="is one of"):
        sw.record(linear(), **options)


def test_quantities_check_their_arguments() -> None:
    model = linear()
    rec = same(model, x())
    for run, says in [
        (lambda: rec.weighted_sum(x(2)), r"expected weights of shape \(3,\)"),
        (lambda: rec.clipped_sum(0.0), "must be positive"),
        (lambda: rec.clipped_sum(float("nan")), "must be positive"),
        (lambda: rec.norms(by="layer"), "None or 'parameter'"),
        (lambda: rec.dot({"nothing": x(2)}), "no such trainable parameter"),
        (lambda: rec.dot({"bias": x(3)}), r"expected shape \(2,\)"),
        (lambda: rec.project({"bias": x(4, 3)}), r"expected shape \(2,\)"),
        (lambda: rec.gram(same(tied(), MODELS["tied"][1])), "different parameters"),
    ]:
        with pytest.raises(ValueError, match=says):
            run()
    with pytest.raises(sw.SamplewiseError, match="no model was run"), sw.record(model) as empty:
        empty.grads()


def test_clipping() -> None:
    model = linear()
    rec = same(model, x())
    norms, limit = rec.norms(), rec.norms().median().item()
    weights = (limit / norms).clamp_max(1)
    for name, total in rec.clipped_sum(limit).items():
        torch.testing.assert_close(total, torch.einsum("n,n...->...", weights, rec.grads()[name]))
    sums, found = sw.clipped_grads(model, squares, x(), max_grad_norm=limit)
    torch.testing.assert_close(found, norms)
    torch.testing.assert_close(sums["weight"], rec.clipped_sum(limit)["weight"])
    with sw.record(model) as zero:
        zero.backward(squares(model, x()) * 0)
    assert zero.clipped_sum(1.0)["weight"].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    model, batch = nn.Sequential(linear(4, 8), nn.GELU(), nn.LayerNorm(8), linear(8, 2)).float(), x(N, T, D).float()
    wanted = loop(model, lambda: squares(model, batch))["0.weight"]
    if dtype == torch.bfloat16:
        with sw.record(model) as rec, torch.autocast("cpu", dtype):
            rec.backward(squares(model, batch).float())
        assert rec.grads()["0.weight"].dtype == torch.float32
        torch.testing.assert_close(rec.grads()["0.weight"], wanted, rtol=0.1, atol=0.1)
    half = nn.Sequential(linear(4, 8), nn.GELU(), linear(8, 2)).to(dtype)
    with sw.record(half) as rec:
        rec.backward(squares(half, batch.to(dtype)).float())
    assert rec.grads()["0.weight"].dtype == dtype
    assert rec.norms().dtype == torch.float32


def test_streaming_keeps_nothing_and_agrees() -> None:
    model = Lambda(reused, inner=linear(4, 4))
    rec = same(model, x())
    torch.testing.assert_close(sw.per_sample_norms(model, squares, x()), rec.norms())
    torch.testing.assert_close(sw.per_sample_grads(model, squares, x())["inner.weight"], rec.grads()["inner.weight"])
    assert untouched(model)


def test_an_empty_batch() -> None:
    model = nn.Sequential(linear(4, 5), nn.ReLU(inplace=True), nn.LayerNorm(5).double(), linear(5, 2))
    with sw.record(model) as rec:
        rec.backward(squares(model, x()[:0]))
    assert {name: tuple(rows.shape) for name, rows in rec.grads().items()} == {
        name: (0, *p.shape) for name, p in model.named_parameters()
    }
    assert rec.norms().shape == (0,)
    assert rec.gram().shape == (0, 0)
    assert rec.clipped_sum(1.0)["0.weight"].eq(0).all()
    assert rec.project(sw.GaussianProjection(3)).shape == (0, 3)


def test_a_refused_op_has_changed_nothing():
    norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = norm[1].running_mean.clone()
    with pytest.raises(sw.MixedSamplesError, match="batch_norm"), sw.record(norm):
        norm(torch.randn(4, 3))
    assert norm[1].running_mean.equal(before)
    table = nn.Embedding(5, 3, max_norm=0.1)
    weight = table.weight.detach().clone()
    with pytest.raises(sw.MixedSamplesError, match="max_norm"), sw.record(table):
        table(torch.tensor([1, 2]))
    assert table.weight.equal(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_number_among_the_parameters_does_not_widen_the_result(dtype: torch.dtype) -> None:
    model = Lambda(lambda self, b: b * self.s, s=torch.tensor(0.5))
    b, seen = x(N, D).to(dtype), []
    with sw.record(model) as rec:
        out = model(b)
        seen.append(out.dtype)
        rec.backward(out.float().square().sum(1))
    assert seen == [model(b).dtype] == [dtype]
    torch.testing.assert_close(rec.grads()["s"].float(), b.float().square().sum(1), rtol=2e-2, atol=1e-2)


CLASS_WEIGHTS = torch.tensor([0.2, 1.5, 0.7], dtype=torch.float64)
BY_CLASS: dict[str, Losses] = {
    "cross entropy": lambda m, b: F.cross_entropy(m(b), LABELS, CLASS_WEIGHTS, reduction="none"),
    "its module": lambda m, b: nn.CrossEntropyLoss(CLASS_WEIGHTS, reduction="none")(m(b), LABELS),
    "negative log likelihood": lambda m, b: F.nll_loss(m(b).log_softmax(1), LABELS, weight=CLASS_WEIGHTS, reduction="none"),
    "of pixels": lambda m, b: F.cross_entropy(
        m(b)[..., None].expand(-1, -1, 2), LABELS[:, None].expand(-1, 2), CLASS_WEIGHTS, reduction="none"
    ).sum(1),
    "margins": lambda m, b: F.multi_margin_loss(m(b), LABELS, weight=CLASS_WEIGHTS, reduction="none"),
    "positive ones": lambda m, b: F.binary_cross_entropy_with_logits(
        m(b), F.one_hot(LABELS, N).double(), pos_weight=CLASS_WEIGHTS, reduction="none"
    ).sum(1),
}
LABELS = torch.tensor([1, 0, 2])


@pytest.mark.parametrize("name", BY_CLASS)
def test_as_many_weights_of_classes_as_samples(name: str) -> None:
    """Twice, the second time by what is remembered of the first."""
    for _ in range(2):
        same(linear(D, N), x(), BY_CLASS[name])


def test_class_weights_that_are_made_of_samples_are_refused_after_others() -> None:
    """What was remembered was of others."""
    same(linear(D, N), x(), BY_CLASS["cross entropy"])
    with pytest.raises(sw.SampleAxisError, match="sample axes of two operands"):
        same(linear(D, N), x(), lambda m, b: F.cross_entropy(m(b), LABELS, b.abs().mean(1), reduction="none"))


def written_by_samples(m: nn.Module, b: Tensor) -> Tensor:
    weights, out = torch.zeros_like(CLASS_WEIGHTS), m(b)
    return F.cross_entropy(out, LABELS, weights.copy_(out.detach().abs().mean(1)), reduction="none")


def written_from_outside(m: nn.Module, b: Tensor) -> Tensor:
    out = m(b)
    return F.cross_entropy(out, LABELS, OUTSIDE.copy_(out.detach().abs().mean(1)), reduction="none")


OUTSIDE = torch.zeros(N, dtype=torch.float64)


@pytest.mark.parametrize("losses", [written_by_samples, written_from_outside])
def test_class_weights_that_samples_were_written_to_are_refused(losses: Losses) -> None:
    model = linear(D, N)
    with pytest.raises(sw.SampleAxisError, match="sample axes of two operands"), sw.record(model) as rec:
        rec.backward(losses(model, x()))


def test_class_weights_that_are_declared_as_samples_are_refused() -> None:
    model, weights = linear(D, N), CLASS_WEIGHTS.clone()
    with pytest.raises(sw.SampleAxisError, match="sample axes of two operands"), sw.record(model) as rec:  # noqa: PT012
        out = model(x() + 0 * weights.sum())
        rec.batched(weights)
        F.cross_entropy(out, LABELS, weights, reduction="none")
