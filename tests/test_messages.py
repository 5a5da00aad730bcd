"""Every error of the core is raised here through the public interface, and says what happened, where, and what to do.

A case is matched with the `raise` it covers by looking at where the exception came from, so that no message is without a test.
"""

import ast
import builtins
import functools
import inspect
import os
import pickle
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import samplewise as sw
from samplewise import captured, errors, testing
from samplewise.factors import Dense, Factor
from samplewise.registry import EXPANSIONS, RULES, operation

SOURCE = Path(sw.__file__).parent
N, D = 3, 4

# --- triggers -----------------------------------------------------------------------------------------------------------------


def x(*shape):
    return torch.randn(shape or (N, D), generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


class Net(nn.Module):
    """A forward as a function of the module and its inputs; tensors given are parameters."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.double()

    def forward(self, *args):
        return self.function(self, *args)


def linear():
    return nn.Linear(D, 2).double()


def squares(model, batch):
    return model(batch).abs().square().flatten(1).sum(1)


def run(model, batch=None, losses=squares, **options):
    """A recording from beginning to end."""
    with sw.record(model, **options) as rec:
        rec.backward(losses(model, x() if batch is None else batch))
    return rec


def net(forward, batch=None, *, losses=squares, options=None, **parts):
    """What records a model of one function."""
    return lambda: run(Net(forward, **(parts or {"inner": linear(), "w": x(D)})), batch, losses, **(options or {}))


def reduced(loss, model=None, **options):
    """What records a model whose loss is one number."""
    model = model or linear()

    def trigger():
        with sw.record(model, **options):
            loss(model, x()).backward()

    return trigger


@contextmanager
def registered():
    """Rules registered inside are gone afterwards."""
    before = dict(RULES), dict(EXPANSIONS)
    try:
        yield
    finally:
        for table, old in zip((RULES, EXPANSIONS), before, strict=True):
            table.clear()
            table.update(old)
        operation.cache_clear()


@functools.cache
def third_party():
    """Ops of a third party: `scale(x, weight, power)` and, in place only, `mend_(x, weight)`."""
    library = torch.library.Library("messages", "FRAGMENT")
    library.define("scale(Tensor x, Tensor weight, int power=1) -> Tensor")
    library.impl("scale", lambda x, weight, power=1: x * weight**power, "CompositeImplicitAutograd")
    library.define("mend_(Tensor(a!) x, Tensor weight) -> Tensor(a!)")
    library.impl("mend_", lambda x, weight: x.copy_(x * weight), "CompositeImplicitAutograd")
    return library, torch.ops.messages


def with_rule(function, *args, **kwargs):
    """What records `scale`, with this rule for it."""

    def trigger():
        _, ops = third_party()
        with registered():
            sw.rule(ops.scale)(function)
            run(Net(lambda self, b: ops.scale(b, self.w, *args, **kwargs), w=x(D)))

    return trigger


def in_place_op():
    _, ops = third_party()
    run(Net(lambda self, b: ops.mend_(b.clone(), self.w), w=x(D)))


def wrong_rule():
    def scale(grad, out, x, weight, power=1):
        return {"weight": Dense(2 * grad * x)}

    _, ops = third_party()
    with registered():
        sw.rule(ops.scale)(scale)
        testing.check_rule(ops.scale, [testing.Sample((x(), nn.Parameter(x(D))))])


def nested():
    with sw.record(linear()), sw.record(linear()):
        pass


def after_the_recording(backward):
    def trigger():
        model = linear()
        with sw.record(model) as rec:
            losses = squares(model, x())
        backward(rec, losses)

    return trigger


def without_backward():
    model = linear()
    with sw.record(model) as rec:
        squares(model, x())
    rec.norms()


def failed_backward():
    model = linear()
    with sw.record(model) as rec:
        batch = x().requires_grad_()
        batch.register_hook(lambda grad: grad[:0])
        with pytest.raises(RuntimeError, match="hook"):
            rec.backward(squares(model, batch))
    rec.norms()


def unseen_backward():
    model = linear()
    with sw.record(model):
        loss = squares(model, x()).sum()
        with torch._C.DisableTorchFunction():
            loss.backward()


@torch.library.custom_op("samplewise_tests::scaled_into", mutates_args={"into"})
def scaled_into(x: Tensor, scale: Tensor, into: Tensor) -> Tensor:
    """An op of somebody else."""
    into.copy_(x * scale)
    return x * scale


def changed_within_the_backward(*, other=False):
    """One use has arrived, and perhaps the other is to come."""

    def forward(self, b):
        inner = b @ self.w
        outer = inner.sin()
        inner.register_hook(lambda _: [None, outer.detach().zero_()][0])
        return outer @ (self.v if other else self.w)

    return Net(forward, w=x(D, D), v=x(D, D)), squares, x()


class Unfinished(Factor):
    """A factor of somebody else."""

    shape = torch.Size([D])


def changed_after_the_backward():
    model, batch = linear(), x()
    rec = run(model, batch)
    batch.zero_()
    rec.grads()


class Unseen(torch.autograd.Function):
    """A use of a parameter that a recording cannot see."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.save_for_backward(inputs, weight)
        return inputs * weight

    @staticmethod
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors
        return grad * weight, (grad * inputs).sum(0)


class Subclass(torch.Tensor):
    """Without ways of its own."""


class Late(torch.autograd.Function):
    """The identity, whose backward brings a use of a layer that its forward did not show."""

    @staticmethod
    def forward(ctx, inputs, layer):
        ctx.save_for_backward(inputs)
        ctx.layer = layer
        return inputs.clone()

    @staticmethod
    def backward(ctx, grad):
        (inputs,) = ctx.saved_tensors
        with torch.enable_grad():
            torch.autograd.backward(ctx.layer(inputs.detach()).square().sum())
        return grad, None


def penalty(model, batch):
    batch = batch.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(batch).tanh().sum(), batch, create_graph=True)
    return slope.square().sum(1)


def penalty_inside():
    model = linear()
    with sw.record(model, create_graph=True) as rec, torch.autocast("cpu"):
        rec.backward(rec.batched(penalty(model, x())))


def declared_in_spite_of_all():
    model = Net(lambda self, b: self.inner(b.cumsum(0)), inner=linear())
    with sw.record(model) as rec:
        rec.backward(rec.batched(squares(model, x())))


def assigned(target, index, value):
    target = target.clone()
    target[index] = value
    return target


def second_batch():
    model = linear()
    with sw.record(model) as rec:
        rec.backward(squares(model, x()))
        rec.backward(squares(model, x()))


def before_the_model():
    model = Net(lambda self, b: self.inner(b), inner=linear())
    batch = x()
    with sw.record(model):
        model(model.inner(batch))


def unfrozen():
    model = linear()
    model.bias.requires_grad_(False)
    with sw.record(model) as rec:
        losses = squares(model, x())
        model.bias.requires_grad_(True)
        rec.backward(losses)


def hooked():
    model = linear()
    model.weight.register_hook(lambda grad: grad * 2)
    run(model)


def hooked_when_accumulated():
    model = linear()
    model.weight.register_post_accumulate_grad_hook(lambda p: None)
    run(model)


def hooked_on_its_node():
    model = linear()
    node = torch.autograd.graph.get_gradient_edge(model.weight).node
    node.register_prehook(lambda grads: None)
    run(model)


def uncollected():
    model = linear()
    with sw.record(model, create_graph=True):
        squares(model, x()).sum().backward()


def batched(tensor, *args, batch_size=N, **kwargs):
    def trigger():
        with sw.record(linear(), batch_size=batch_size) as rec:
            rec.batched(tensor, *args, **kwargs)

    return trigger


def quantity(ask):
    return lambda: ask(run(linear()))


def complex_model():
    return Net(lambda self, b: b * self.w, w=x(D) * 1j)


def overlapping():
    flat = x(9)
    return flat[:8].view(2, D), flat[7:]


def no_batch_yet():
    with sw.record(linear()) as rec:
        rec.grads()


def backward_without_a_model():
    with sw.record(linear()) as rec:
        rec.backward(x(N).requires_grad_())


def rule_for_linear():
    sw.rule(F.linear)(lambda grad, out, a, weight, bias=None: {})


MASK = torch.ones(N, N).double()
WEIGHTS = torch.ones(N).double()


# --- the table ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """How to get an error, and what its message says: patterns."""

    trigger: Callable[[], object]
    # the op or the call
    call: str
    found: str
    remedy: str
    parameter: str = ""
    kind: type[Exception] = sw.SamplewiseError


SPARSE, LEAF = torch.eye(N, D, dtype=torch.float64).to_sparse(), nn.Parameter(torch.ones((), dtype=torch.float64))
DERIVED = LEAF * 2


def thrice(losses, n=N):
    """Enough calls for a trace; the losses are told their number, which is where no trace looks: in a variable of Python's own."""
    os.environ["SAMPLEWISE_CALLS"] = "0"

    def told(m, b):
        number = int(os.environ["SAMPLEWISE_CALLS"])
        os.environ["SAMPLEWISE_CALLS"] = str(number + 1)
        return losses(m, b, number)

    run = sw.traced(sw.per_sample_norms, linear(), told)
    for _ in range(3):
        run(x(n, D))


def not_captured():
    def refused(run, pool, device):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    def waits():
        return nullcontext([])

    on_the_cpu = {"_DEVICE": "cpu", "_captured": refused, "_waits": waits}
    here = {"device": lambda _: nullcontext(), "is_current_stream_capturing": lambda: False}
    with patch.multiple(captured, **on_the_cpu), patch.multiple(torch.cuda, **here):
        run = sw.traced(sw.per_sample_norms, linear(), squares, capture=True)
        for _ in range(5):
            run(x())


def again(quantity, **options):
    run = sw.traced(quantity, linear(), squares, **options)
    for _ in range(3):
        run(x())


def counted():
    def forward(self, b):
        self.calls += 1
        return b @ self.w

    run = sw.traced(sw.per_sample_norms, Net(forward, w=x(D, 2), calls=0), squares)
    for _ in range(3):
        run(x())


def set_aside(b):
    aside = torch.zeros_like(b)
    aside.data = torch.ones(D, dtype=b.dtype)
    return 0


CHANGED = "changed in place after the backward"
TOGETHER, WHERE = "Keep the samples apart", r"in '[\w.]+' \(test_messages.py, line \d+\)"
AXES = {"found": r"\(3, .* with samples on axis \d.* and \(3, .* with samples on axis \d", "remedy": r"rec.constant\(tensor\)"}


def hooked_late(self, b):
    rows = self.w.expand(len(b), -1)
    out = b * rows
    rows.register_hook(lambda grad: grad)
    return out


def legacy_hook():
    model = nn.Sequential(linear())
    model[0].register_backward_hook(lambda *_: None)
    run(model)


@torch.inference_mode()
def in_inference_mode():
    run(linear())


def hooked_twice(self: nn.Module, b: Tensor) -> Tensor:
    v = self.w * 2
    v.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    return b * v + v.cos()


# by the function that builds the message
CASES: dict[str, Case] = {
    # --- declarations and shapes
    "alignment.broadcast: a mask of n by n": Case(
        net(lambda self, b: self.inner(b) @ self.inner(b).mT + MASK, x(N, N, D)), "^add: ", **AXES, kind=sw.SampleAxisError
    ),
    "alignment.broadcast: a column and a row": Case(
        net(lambda self, b: self.inner(b)[:, :1], losses=lambda m, b: (m(b) - WEIGHTS).square().mean(1)),
        "^sub: ",
        r"\(3, 1\) with samples on axis 0 and \(3,\)",
        r"Is a `squeeze\(-1\)` missing",
        kind=sw.SampleAxisError,
    ),
    "alignment.stacked: two layouts": Case(
        net(lambda self, b: self.inner(torch.stack([b, b.transpose(0, 1)])), x(N, N, D)), "^stack: ", **AXES
    ),
    "alignment.class_loss: targets the other way round": Case(
        net(
            lambda self, b: self.inner(b),
            x(N, N, D),
            losses=lambda m, b: F.cross_entropy(m(b).mT, (b[..., 0] > 0).long().t(), reduction="none").sum(1),
        ),
        "^cross_entropy_loss: ",
        **AXES,
    ),
    "alignment.class_loss: class weights that are made of samples": Case(
        net(
            lambda self, b: torch.cat([self.inner(b), b[:, :1]], 1),
            losses=lambda m, b: F.cross_entropy(m(b), torch.zeros(N).long(), b.abs().mean(1), reduction="none"),
        ),
        "^cross_entropy_loss: ",
        r"\(3, 3\) with samples on axis 0 and \(3,\) with samples on axis 0",
        AXES["remedy"],
    ),
    "quantities.Record.batched: another size": Case(
        batched(x(5, D)), "^batched: ", r"\(5, 4\).*batch size 3", "axis of the samples", kind=ValueError
    ),
    "quantities._checked_owners: no batch size": Case(
        batched(x(5, D), owners=torch.zeros(5).long(), batch_size=None),
        "^batched: ",
        "number of samples",
        "Give `batch_size`",
        kind=ValueError,
    ),
    "quantities._checked_owners: one too few": Case(
        batched(x(5, D), owners=torch.zeros(4).long()),
        "^batched: ",
        r"int64 of shape \(4,\)",
        "must be 5 int64",
        kind=ValueError,
    ),
    "attaching.common_size: two sizes": Case(
        lambda: run(Net(lambda self, b: self.inner(b[0]), inner=linear()), (x(), x(5))),
        "^Net: ",
        "sizes 3, 5 on axis 0",
        "Give `batch_size`",
        kind=ValueError,
    ),
    # --- what cannot be split over samples
    "mixing._refusal: lost": Case(
        net(lambda self, b: self.inner(b.cumsum(0))),
        f"^linear: .*{WHERE}",
        r"\(3, 4\) was lost in cumsum",
        r"rec.batched\(tensor, dim\)",
        "'inner.weight'",
        sw.SampleAxisError,
    ),
    "mixing._refusal: sorted": Case(
        net(lambda self, b: self.inner(b.sort(0)[0])), "^linear: ", "lost in sort", TOGETHER, "'inner.weight'"
    ),
    "mixing._refusal: some of the chosen rows": Case(
        net(
            lambda self, b: b.new_zeros(b.shape).index_add(
                0, r := (b[:, 0] > -99).nonzero()[:2, 0], self.inner(b[r]) @ self.inner.weight
            )
        ),
        "^linear: ",
        "lost in getitem",
        TOGETHER,
        "'inner.weight'",
    ),
    "mixing._refusal: products of samples": Case(
        net(lambda self, b: (b.t() @ b @ self.w)[:3, None]), "^matmul: ", "lost in matmul", TOGETHER, "'w'"
    ),
    "mixing._refusal: nobody's rows": Case(
        net(lambda self, b: self.inner(torch.cat([b, torch.zeros(1, D).double()]))[:3]),
        "^linear: ",
        r"rows of an operand of shape \(4, 4\) belong to no sample",
        "owners=",
        "'inner.weight'",
    ),
    "mixing._postponed: in place, at once": Case(
        net(lambda self, b: (self.w * 1).add_(b.cumsum(0)[0])[:3, None]), "^add: ", "lost in cumsum", TOGETHER, "'w'"
    ),
    "mixing._postponed.factors: declared batched in spite of it": Case(
        declared_in_spite_of_all,
        "^linear: ",
        "lost in cumsum",
        TOGETHER,
        "'inner.weight'",
    ),
    "by_rule.placed: contracted": Case(
        net(lambda self, b: (b.t() @ self.rows)[:3], rows=x(N, 2)),
        "^matmul: brings the samples together",
        r"shapes \(4, 3\), \(3, 2\), samples on axis 1",
        "Move the sample axis.*batch_dim",
        "'rows'",
        sw.SampleAxisError,
    ),
    "entering.enter_aligned: attention over the samples": Case(
        net(
            lambda self, b: F.scaled_dot_product_attention(b.transpose(0, 1), self.k, self.k).transpose(0, 1),
            x(N, 2, D),
            k=x(1, 5, D),
        ),
        "^scaled_dot_product_attention: ",
        r"axis 1 of an operand of shape \(2, 3, 4\)",
        "Move the samples to a leading axis",
        "'k'",
    ),
    "entering.enter_aligned: joined with an order": Case(
        net(lambda self, b: torch.cat([b[b.sum(1).argsort()], self.w.expand(N, D)])),
        "^cat: joins",
        r"put into an order with 'w' along the sample axis \(axis 0\)",
        "Join along another axis",
        "'w'",
    ),
    "entering.enter: joined": Case(
        net(lambda self, b: torch.cat([b, self.w[None]])),
        "^cat: joins",
        r"axis 0, 3 rows and 1\)",
        "Join along another axis",
        "'w'",
    ),
    "entering.assign: places of no sample": Case(
        net(lambda self, b: assigned(b, torch.tensor([[0, 1], [1, 2]]), self.w)),
        "^setitem: ",
        r"target of shape \(3, 4\)",
        r"torch.where",
        "'w'",
    ),
    "entering.spread_target: no place for each": Case(
        net(lambda self, b: (self.w * 1).index_add_(0, torch.tensor([0, 1, 2]), b[:, 0])[:3, None]),
        "^index_add: ",
        r"in place into 'w', of shape \(4,\)",
        "write out of place",
        "'w'",
    ),
    "entering._overwrite: a view": Case(
        net(lambda self, b: (self.w * 1)[None].add_(b), x(1, D)), "^add: ", "in place into 'w'", "write out of place", "'w'"
    ),
    "sample_axis._batch_norm: training": Case(
        lambda: run(nn.BatchNorm1d(D).double()), "^batch_norm: ", "in training mode", "model.eval()", kind=sw.MixedSamplesError
    ),
    "sample_axis._renormalised: max_norm": Case(
        lambda: run(nn.Embedding(5, 2, max_norm=0.1), torch.tensor([1, 2, 0])),
        "^embedding: ",
        "max_norm rescales",
        "leave max_norm unset",
        "weight",
        sw.MixedSamplesError,
    ),
    # --- rules and the fallback
    "rules.embedding.embedding: by frequency": Case(
        net(lambda self, b: F.embedding((b > 0).long(), self.table, scale_grad_by_freq=True).sum(1), table=x(2, D)),
        "^embedding: ",
        "scale_grad_by_freq=True",
        "leave it False",
        "table",
        sw.UnsupportedOpError,
    ),
    "rules.convolution.convolution: complex": Case(
        lambda: run(nn.Conv1d(2, 2, 3, dtype=torch.complex128), x(N, 2, 5) * 1j),
        "^convolution: ",
        "complex",
        "real and imaginary parts",
        "weight",
    ),
    "rules.convolution.transposed_convolution: complex": Case(
        lambda: run(nn.ConvTranspose1d(2, 2, 3, dtype=torch.complex128), x(N, 2, 5) * 1j),
        "^transposed convolution: ",
        "complex",
        "real and imaginary parts",
        "weight",
    ),
    "rules.recurrent.pack_padded_sequence: unsorted": Case(
        net(
            lambda self, b: self.rnn(pack_padded_sequence(b, torch.tensor([1, 3, 2]), batch_first=True))[1][0],
            x(N, 5, D),
            rnn=nn.GRU(D, 2, batch_first=True),
        ),
        "^pack_padded_sequence: ",
        r"got \[1, 3, 2\]",
        "enforce_sorted=False",
        kind=RuntimeError,
    ),
    "registry._free_key: taken": Case(
        rule_for_linear, "^linear already", "has a rule or an expansion", "an op of your own", kind=ValueError
    ),
    "by_rule.bind: too many arguments": Case(
        with_rule(lambda grad, out, x, weight: {}, 2), "scale: ", "3 arguments, its rule knows x, weight", "Add"
    ),
    "by_rule.bind: an unknown argument": Case(
        with_rule(lambda grad, out, x, weight: {}, power=2), "scale: ", "the argument power", "Add"
    ),
    "by_rule._checked: no factor": Case(
        with_rule(lambda grad, out, x, weight, power=1: {"x": grad}),
        "scale: ",
        r"no factor for 'weight' \(w\), got NoneType",
        "from the rule, or freeze",
        "w",
        sw.UnsupportedOpError,
    ),
    "by_rule._checked: of another shape": Case(
        with_rule(lambda grad, out, x, weight, power=1: {"weight": Dense(grad[..., :2])}),
        "scale: ",
        r"shape \(2,\), expected \(4,\)",
        "Return",
        r"'weight' \(w\)",
    ),
    "mixing.mix: out": Case(
        net(lambda self, b: torch.add(b, self.w, out=torch.empty(N, D).double())), "^add: ", "`out=`", "Use the result", "'w'"
    ),
    "fallback.fall_back: writes to an argument": Case(
        net(lambda self, b: scaled_into(self.inner(b), self.w, torch.zeros(N, 2).double()), inner=linear(), w=x(2)),
        r"samplewise_tests::scaled_into|samplewise_tests.scaled_into",
        "writes to into",
        "`samplewise.rule`",
        "w",
    ),
    "fallback.fall_back: forbidden": Case(
        net(lambda self, b: torch.cdist(b, self.codes), codes=x(5, D), options={"fallback": "error"}),
        "^cdist: ",
        "no rule gives the gradient",
        "Register one with `samplewise.rule`",
        "'codes'",
        sw.UnsupportedOpError,
    ),
    "fallback.fall_back: memory": Case(
        net(lambda self, b: torch.as_strided_scatter(b, self.w, (D,), (1,))),
        "^as_strided_scatter: ",
        "addresses memory, not axes",
        "slice_scatter",
        "'w'",
    ),
    "fallback.fall_back: several results": Case(
        net(lambda self, b: torch.linalg.lstsq(b, self.m).solution, x(N, D, D), m=x(N, D, 2)),
        "^linalg_lstsq: ",
        "one tensor as result only",
        "samplewise.rule",
        "'m'",
    ),
    "fallback._in_two_steps: an op in place only": Case(
        in_place_op, "mend: ", "an in-place op cannot be run sample by sample", "Use it out of place", "'w'"
    ),
    "fallback._looped: samples on the op's own axis": Case(
        net(lambda self, b: torch.cdist(b.mT, self.codes), x(N, 2).mT.contiguous().mT, codes=x(5, N)),
        "^cdist: ",
        "cannot be run sample by sample",
        "Move the sample axis",
        "'codes'",
        sw.MixedSamplesError,
    ),
    "fallback._refuse_ragged: unequally many rows": Case(
        net(lambda self, b: torch.cdist(torch.cat([b, b[:1]]), self.codes), codes=x(5, D)),
        "^cdist: ",
        "sample by sample",
        "register a rule",
        "'codes'",
    ),
    "fallback._layout: something else than on the batch": Case(
        net(lambda self, b: F.mse_loss(b, self.m), m=x(N, D)),
        "^mse_loss: ",
        "something else than on the batch",
        "for a loss, reduction='none'",
        "'m'",
        sw.MixedSamplesError,
    ),
    "fallback._layout: rows that cannot be told apart": Case(
        net(
            lambda self, b: self.table[(b[:, 0] > 9).long().repeat(2), (b[:, 0] > 9).long().repeat_interleave(2)],
            losses=lambda model, b: model(b).view(2, -1).sum(0),
            table=x(D, D),
        ),
        "^getitem: ",
        "alike for all samples",
        "an axis of their own",
        "'table'",
        sw.SampleAxisError,
    ),
    "collecting.Collector._pull: a reentrant checkpoint of a parameter": Case(
        lambda: run(Net(lambda self, b: b * checkpoint(torch.square, self.w, use_reentrant=True), w=x(D))).grads(),
        "^record: ",
        "tensor computed from",
        "without reentrant checkpointing",
        "'w'",
    ),
    "collecting.Collector._opaque: two uses behind a hook": Case(
        lambda: run(Net(hooked_twice, w=x(D))).grads(),
        "^record: ",
        "w reaches several uses through a hook",
        "Use its result once",
        "w",
    ),
    "recording.Recording._refuse_ordinary: by a parameter": Case(
        net(lambda self, b: b - torch.autograd.grad((b * self.w).sum(), self.w)[0], w=x(D)),
        "^autograd.grad: ",
        "depends on the samples",
        "take it outside",
        "'w'",
    ),
    # --- life
    "errors.one_of: a choice": Case(
        lambda: sw.record(linear(), fallback="never"),
        "^record: ",
        "fallback .* got 'never'",
        "one of 'allow', 'error'",
        kind=ValueError,
    ),
    "recording.Recording.open: nested": Case(nested, "^record: ", "another recording is active", "Close the outer one"),
    "attaching._refuse_opaque: a compiled part": Case(
        lambda: run(nn.Sequential(torch.compile(linear(), backend="eager"))), "^record: 0 ", "torch.compile", "_orig_mod"
    ),
    "attaching._refuse_opaque: lazy": Case(
        lambda: run(nn.LazyLinear(2)), "^record: ", "no shape yet", "Run the model once", "the model"
    ),
    "attaching._refuse_opaque: scripted": Case(
        lambda: run(torch.jit.script(linear())), "^record: ", "scripted module", "Record the module that was scripted"
    ),
    "attaching.refuse_unrecordable: without numbers": Case(
        lambda: run(linear().to("meta"), x().to("meta")), "^record: ", "on the meta device", "`model.to_empty", "weight, bias"
    ),
    "attaching._refuse_sharded: by name": Case(
        lambda: run(type("FSDPModule", (nn.Linear,), {})(D, 2).double()),
        "^record: the model ",
        "is sharded",
        "DistributedDataParallel",
    ),
    "taps._refuse_hook_after: on a module": Case(
        legacy_hook, "^record: ", "`register_backward_hook`", "Use .*`register_full_backward_hook`"
    ),
    "collecting.Collector.refuse_bypassed_hooks: after the use": Case(
        lambda: run(Net(hooked_late, w=x(1, D))).grads(),
        "^record: ",
        "a hook put on the expansion after its use",
        "Register the hook before",
        "w",
    ),
    "recording.Recording.__init__: inference mode": Case(
        in_inference_mode, "^record: ", "inference mode is on", "Leave `torch.inference_mode", kind=sw.SamplewiseError
    ),
    "attaching.refuse_hooks: a hook on a gradient": Case(hooked, "^weight: ", "has a hook", "Remove it", "weight"),
    "attaching.refuse_hooks: when it is accumulated": Case(
        hooked_when_accumulated, "^weight: ", "when its gradient is accumulated", "Remove it", "weight"
    ),
    "attaching.refuse_hooks_on_nodes: when it is accumulated": Case(
        hooked_on_its_node, "^weight: ", "on the node", "Remove it", "weight"
    ),
    "recording.Recording._enter_model: a second batch": Case(
        second_batch, "^Linear: ", "rows of two batches", "Open a new recording", kind=sw.MixedSamplesError
    ),
    "recording.Recording._run: before the model": Case(
        before_the_model, "^linear: ", "number of samples is not known", "Give `batch_size`", "inner.weight"
    ),
    "recording.Recording._refuse_transform: vmap": Case(
        net(lambda self, b: torch.vmap(self.inner)(b)), "^linear: ", "torch.func", "for the whole batch"
    ),
    # --- backward
    "recording.Recording._refuse_unseen: a derivative inside": Case(
        penalty_inside,
        "^backward: ",
        "derivative with create_graph=True",
        "Take it without autocast before",
    ),
    "attaching.refuse_unseen: a function of somebody else": Case(
        net(lambda self, b: self.inner(b) + Unseen.apply(b, self.w)[:, :2]),
        "^w: ",
        "a use that the recording did not see",
        "Compute it .* from ordinary ops",
        "w",
    ),
    "recording.Recording.awaits: closed": Case(
        after_the_recording(lambda _, losses: losses.sum().backward()), "^backward: ", "closed", "inside the `with"
    ),
    "recording.Recording.awaits: not seen": Case(
        unseen_backward, "^backward: ", "does not see it", r"Call `rec.backward\(losses\)`"
    ),
    "quantities.Record.backward: closed": Case(
        after_the_recording(lambda rec, losses: rec.backward(losses)), "^backward: ", "closed", "inside the `with"
    ),
    "recording.Recording._check_create_graph: a reduced loss": Case(
        uncollected, "^backward: ", "create_graph=True", r"rec.backward\(losses\)"
    ),
    "attaching.refuse_new_parameters: unfrozen": Case(unfrozen, "^backward: ", "was unfrozen", "before `record`", "bias"),
    "mixing._refusal: a reduced loss": Case(
        reduced(lambda model, batch: squares(model, batch).sum(), Net(lambda self, b: self.inner(b.cumsum(0)), inner=linear())),
        "^linear: ",
        "lost in cumsum",
        TOGETHER,
        "'inner.weight'",
    ),
    "attaching.refuse_loss: not linear": Case(
        reduced(lambda model, batch: squares(model, batch).sum().square()),
        "^backward: ",
        "no plain sum or mean",
        "Keep one loss per sample",
        kind=sw.MixedSamplesError,
    ),
    "attaching.refuse_loss: a weighted mean": Case(
        reduced(
            lambda model, batch: F.cross_entropy(model(batch), torch.tensor([0, 1, -100])),
            loss_reduction="mean",
        ),
        "^backward: cross_entropy_loss",
        "weighted mean",
        "reduction='none'",
        kind=sw.MixedSamplesError,
    ),
    "attaching.refuse_loss: no samples": Case(
        reduced(lambda model, batch: (model(batch), model.weight.square().sum())[1]),
        "^backward: ",
        "does not depend on the samples",
        "from the model's output",
        kind=sw.SampleAxisError,
    ),
    "quantities.Record._check: no model": Case(
        backward_without_a_model, "^backward: ", "no model was run", "give `batch_size`", kind=sw.SampleAxisError
    ),
    "quantities.Record._check: one number": Case(
        lambda: run(linear(), losses=lambda m, b: squares(m, b).sum()),
        "^backward: ",
        r"shape \(3,\), got \(\)",
        "reduction='none'",
        kind=ValueError,
    ),
    "errors.of_type: no tensor": Case(
        lambda: run(linear(), losses=lambda m, b: (squares(m, b), b)),
        "^backward: ",
        "got a tuple",
        "one loss per sample",
        kind=TypeError,
    ),
    "errors.of_type: no model": Case(
        lambda: sw.record(linear().parameters()), "^record: ", "got a generator", "expected a model", kind=TypeError
    ),
    "errors.of_type: no direction": Case(
        quantity(lambda rec: rec.dot([1.0])), "^dot: ", "got a list", "expected a direction {name: tensor", kind=TypeError
    ),
    "errors.of_type: no record": Case(
        quantity(lambda rec: rec.gram(x())), "^gram: ", "got a Tensor", "expected another record", kind=TypeError
    ),
    "errors.of_type: no projection": Case(
        quantity(lambda rec: rec.project(128)),
        "^project: ",
        "got a int",
        "expected a GaussianProjection or matrices",
        kind=TypeError,
    ),
    "errors.of_type: no number": Case(
        quantity(lambda rec: rec.clipped_sum("1")),
        "^clipping: ",
        "got a str",
        "expected max_grad_norm as a number",
        kind=TypeError,
    ),
    "quantities.Record._check: all frozen": Case(
        lambda: run(linear().requires_grad_(False)), "^backward: ", "require no grad", "Check for frozen parameters"
    ),
    "attaching.refuse_elsewhere: another model": Case(
        lambda: run(linear(), x(), lambda _, b: squares(linear(), b), batch_size=3),
        "^backward: ",
        r"reach no trainable parameter of the recorded model, .* of shapes \(2,\)",
        "by the recorded model, not by a copy",
    ),
    "quantities.Record._check_place: another order": Case(
        net(lambda self, b: self.inner(b.roll(1, 0))),
        "^backward: ",
        "in the order 2, 0, 1",
        "keep the samples apart",
        kind=sw.SampleAxisError,
    ),
    "taps._refuse_second: a second derivative": Case(
        lambda: run(linear(), losses=penalty), "^backward: ", "second derivative", r"record\(..., create_graph=True\)"
    ),
    "by_rule.Awaited.tap: a subclass of tensors": Case(
        net(lambda self, b: self.inner(b.as_subclass(Subclass))),
        "^linear: gave a Subclass",
        "bias, inner.weight",
        r"x.as_subclass\(torch.Tensor\)",
    ),
    "collecting.Collector._refuse_late: a use that the forward did not show": Case(
        lambda: sw.per_sample_norms(
            Net(lambda self, b: self.inner(Late.apply(b * self.w, self.inner)), inner=linear(), w=x(D)), squares, x()
        ),
        "^inner.weight: |inner.bias",
        "last known use",
        "`samplewise.record`",
        "inner",
    ),
    # --- quantities
    "quantities.Record.__reduce__: a copy": Case(
        lambda: pickle.dumps(run(linear())), "^record: ", "neither be copied nor pickled", "Keep its results", kind=TypeError
    ),
    "quantities.Record.factors: half a backward": Case(
        failed_backward, "^record: ", "ended with an error", "Record the batch again", kind=sw.SamplewiseError
    ),
    "quantities.Record.factors: no backward": Case(
        without_backward,
        "^record: ",
        "no backward pass has run",
        r"Call `rec.backward\(losses\)` inside",
        kind=sw.SamplewiseError,
    ),
    "factors._lacking: a method": Case(
        lambda: Unfinished().sq_norms(), "^Unfinished: ", "lacks `to_dense`", "defines `n`, `regroup`", kind=NotImplementedError
    ),
    "collecting.Held.refuse_changed: between two uses": Case(
        lambda: sw.per_sample_norms(*changed_within_the_backward()), "^record: ", CHANGED, "give the recording a copy"
    ),
    "collecting.Held.refuse_changed: between two uses, kept": Case(
        lambda: run(*changed_within_the_backward()[::2]).grads(), "^record: ", CHANGED, "give the recording a copy"
    ),
    "collecting.Held.refuse_changed: before the sums": Case(
        lambda: sw.clipped_grads(*changed_within_the_backward(other=True), max_grad_norm=1.0),
        "^record: ",
        CHANGED,
        "give the recording a copy",
    ),
    "collecting.Held.refuse_changed: an input": Case(
        changed_after_the_backward, "^record: ", CHANGED, "give the recording a copy"
    ),
    "quantities.Record.norms: by": Case(
        quantity(lambda rec: rec.norms(by="layer")), "^norms: ", "got 'layer'", "None or 'parameter'", kind=ValueError
    ),
    "quantities.Record._check_out: shape": Case(
        quantity(lambda rec: rec.grads(out=dict.fromkeys(["weight", "bias"], x(2)))),
        "^grads: ",
        r"got \(2,\)",
        r"out\['weight'\] must be a tensor of shape \(3, 2, 4\), torch.float64, cpu that requires no grad",
        kind=ValueError,
    ),
    "quantities.Record._check_out: missing": Case(
        quantity(lambda rec: rec.clipped_sum(1.0, out={})),
        "^weighted_sum: ",
        "got nothing",
        r"out\['weight'\] must be a tensor",
        kind=ValueError,
    ),
    "quantities.Record._check_out: one buffer for two": Case(
        quantity(lambda rec: rec.weighted_sum(x(N), out=dict(zip(["weight", "bias"], overlapping(), strict=True)))),
        "^weighted_sum: ",
        r"out\['weight'\] and out\['bias'\] reach over the same memory",
        "a tensor of its own, or parts of one buffer",
        kind=ValueError,
    ),
    "quantities.Record._check_out: expanded": Case(
        quantity(lambda rec: rec.weighted_sum(x(N), out={"weight": x(2, 1).expand(2, D), "bias": x(2)})),
        "^weighted_sum: ",
        r"got \(2, 4\), torch.float64, cpu, expanded",
        r"out\['weight'\] must be .* memory for each entry",
        kind=ValueError,
    ),
    "errors.one_of: a strategy": Case(
        lambda: sw.record(linear(), strategy="ghost"),
        "^record: ",
        "got 'ghost'",
        "strategy is one of 'auto', 'gram', 'tile', 'store'",
        kind=ValueError,
    ),
    "strategy.Strategy.__post_init__: budget": Case(
        lambda: sw.record(linear(), memory_budget=-1),
        "^record: ",
        "got -1",
        "memory_budget is a number of bytes",
        kind=ValueError,
    ),
    "quantities.Record.weighted_sum: shape": Case(
        quantity(lambda rec: rec.weighted_sum(x(2))),
        "^weighted_sum: ",
        r"got \(2,\)",
        r"shape \(3,\), one per sample",
        kind=ValueError,
    ),
    "quantities.Record.weighted_sum: a list": Case(
        quantity(lambda rec: rec.weighted_sum([1.0, 2.0, 3.0])),
        "^weighted_sum: ",
        "got a list",
        r"shape \(3,\), one per sample.*`torch.tensor\(weights\)`",
        kind=TypeError,
    ),
    "results.check_limit: zero": Case(
        quantity(lambda rec: rec.clipped_sum(0.0)), "max_grad_norm", "got 0.0", "must be positive", kind=ValueError
    ),
    "results.check_limit: no number, in one call": Case(
        lambda: sw.clipped_grads(linear(), squares, x(), max_grad_norm=float("nan")),
        "max_grad_norm",
        "got nan",
        "must be positive",
        kind=ValueError,
    ),
    "quantities.Record._check_names: no such": Case(
        quantity(lambda rec: rec.dot({"nothing": x(2)})),
        "^dot: ",
        "no such trainable",
        "named_parameters",
        "'nothing'",
        ValueError,
    ),
    "quantities.Record._check_names: shape": Case(
        quantity(lambda rec: rec.project({"bias": x(4, 3)})),
        "^project: ",
        r"\(3,\)",
        r"expected shape \(2,\)",
        "'bias'",
        ValueError,
    ),
    "quantities.Record.gram: another model": Case(
        quantity(lambda rec: rec.gram(run(nn.Linear(D, 2, bias=False).double()))),
        "^gram: ",
        "different parameters",
        "Record the same model",
        "bias",
        ValueError,
    ),
    "quantities.Record._check_names: a real direction": Case(
        lambda: run(complex_model()).dot({"w": x(D)}),
        "^dot: ",
        r"of shape \(4,\), torch.float64",
        r"expected shape \(4,\), complex",
        "'w'",
        ValueError,
    ),
    "quantities.Record._check_names: a complex matrix": Case(
        quantity(lambda rec: rec.project({"bias": x(4, 2).cfloat()})),
        "^project: ",
        r"of shape \(2,\), torch.complex64, in each row",
        r"expected shape \(2,\), real",
        "'bias'",
        ValueError,
    ),
    "quantities.Record._check_real: a complex parameter": Case(
        lambda: run(complex_model()).project(sw.GaussianProjection(2)),
        "^project: ",
        "'w' is torch.complex128",
        "Give a complex matrix for each parameter",
        "'w'",
        ValueError,
    ),
    "quantities._rows_of: none": Case(
        quantity(lambda rec: rec.project({})), "^project: ", r"got \{\}", r"\{name: \(k, \*shape\)\}", kind=ValueError
    ),
    "quantities._rows_of: no rows": Case(
        quantity(lambda rec: rec.project({"bias": x(0, 2)})),
        "^project: ",
        r"\(0, 2\)",
        "one k of 1 or more",
        "'bias'",
        ValueError,
    ),
    "quantities._rows_of: two numbers": Case(
        quantity(lambda rec: rec.project({"weight": x(5, 2, D), "bias": x(3, 2)})),
        "^project: ",
        r"'weight': \(5, 2, 4\), 'bias': \(3, 2\)",
        "as many rows",
        "'bias'",
        ValueError,
    ),
    "projections.GaussianProjection.__post_init__: size": Case(
        lambda: sw.GaussianProjection(0), "^GaussianProjection: size", "got 0", "must be positive", kind=ValueError
    ),
    "quantities.Record._check_alike: other shapes": Case(
        quantity(lambda rec: rec.gram(run(nn.Linear(D, 3).double()))),
        "^gram: ",
        r"is \(2, 4\), torch.float64, cpu in one record and \(3, 4\)",
        "Record the same model",
        "'weight'",
        ValueError,
    ),
    "quantities.Record._check_alike: another type": Case(
        quantity(lambda rec: rec.gram(run(nn.Linear(D, 2), x().float()))),
        "^gram: ",
        r"and \(2, 4\), torch.float32, cpu in the other",
        "Record the same model",
        "'weight'",
        ValueError,
    ),
    "quantities.Record._n: no batch yet": Case(no_batch_yet, "^record: ", "no model was run", "Run the model"),
    # --- the judge
    # --- traces
    "errors.of_type: no model to trace": Case(
        lambda: sw.traced(sw.per_sample_norms, "model", squares), "^traced: ", "a str", "expected a model", kind=TypeError
    ),
    "tracing._kind_of: a batch of something else": Case(
        lambda: sw.traced(sw.per_sample_norms, linear(), squares)([object()]),
        "^traced: ",
        "a object",
        "Give its tensors",
        kind=TypeError,
    ),
    "tracing.Traced._trace: other steps": Case(
        lambda: thrice(lambda m, b, count: squares(m, b) * count),
        "^traced: ",
        "different steps: `.*` and `",
        "Call the function itself",
    ),
    "tracing.Traced._refuse_changes: an attribute": Case(
        counted, "^traced: ", r"changed in the call \(to int\)", "Call the function itself"
    ),
    "tracer.Tracer.read: a value": Case(
        lambda: thrice(lambda m, b, _: squares(m, b) * b.max().item()),
        "^traced: ",
        r"_local_scalar_dense.* shape \(\)",
        "records each batch",
    ),
    "tracer.Tracer._is_tensor: a sparse tensor": Case(
        lambda: thrice(lambda m, b, _: squares(m, b + SPARSE.to_dense())),
        "^traced: .*to_dense",
        "layout torch.sparse_coo",
        "records each batch",
    ),
    "tracer.Tracer._is_tensor: a generator": Case(
        lambda: thrice(lambda m, b, _: squares(m, b * torch.rand(D, generator=torch.Generator()))),
        "^traced: .*rand",
        "takes a Generator",
        "torch's default generator",
    ),
    "tracer.Tracer._from_outside: a history": Case(
        lambda: thrice(lambda m, b, _: squares(m, b) * DERIVED, n=1),
        "^traced: ",
        r"shape \(\) was computed before",
        "Detach it",
    ),
    "tracer.Tracer._refuse_moved: a checkpoint": Case(
        lambda: thrice(lambda m, b, _: checkpoint(F.dropout, m(b), use_reentrant=False).square().sum(1)),
        "^traced: ",
        "draws random numbers after the generator was set",
        "records each batch",
    ),
    "tracer.Tracer._refuse_gradients: a leaf": Case(
        lambda: thrice(lambda m, b, _: squares(m, b) * LEAF),
        "^traced: ",
        "the `.grad` of a tensor of shape",
        "require no grad",
    ),
    "tracer.Reading.__torch_function__: other memory": Case(
        lambda: thrice(lambda m, b, _: squares(m, b) + set_aside(b)), "^traced: `.data = ...`", "where no op is", "copy_"
    ),
    "tracer.Tracer._refuse_moved_generators: numbers of Python's": Case(
        lambda: thrice(lambda m, b, _: squares(m, b) * random.random()),
        "^traced: ",
        "random numbers of Python's",
        "default generator",
    ),
    "tracer.Tracer._refuse_result: a graph": Case(
        lambda: again(lambda m, losses, b: m(b)), "^traced: ", r"a result of shape \(3, 2\) has a graph", "Detach it"
    ),
    "tracer.Tracer._refuse_result: an object": Case(
        lambda: again(lambda m, losses, b: object()), "^traced: ", "hold a object", "tensors and numbers"
    ),
    "captured.refuse_uncaptured: on the CPU": Case(
        lambda: again(sw.per_sample_norms, capture=True),
        "^traced: with capture=True",
        "on one CUDA device, found cpu",
        "Leave out capture=True",
    ),
    "captured.Captured.__call__: it waits": Case(
        not_captured, "^traced: with capture=True CUDA refuses", "operation not permitted", "Leave out capture=True"
    ),
    "verification._batch_size: no tensors": Case(
        lambda: sw.verify(linear(), squares, [3.0]), "^verify: ", "none", "at least one tensor with samples", kind=ValueError
    ),
    "verification.verify: a value that left torch": Case(
        lambda: sw.verify(linear(), lambda m, b: squares(m, b) * b.max().item(), x()),
        r"^\d+ of \d+ comparisons",
        "relative error .*, tolerance",
        "eval",
        "'weight'",
        sw.VerificationError,
    ),
    "testing.check_rule: a wrong rule": Case(
        wrong_rule,
        "^scale: sample 0, as given: ",
        "gradient of shared.0",
        "batch-of-one loop",
        "shared.0",
        sw.VerificationError,
    ),
}


# --- where messages are made --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A `raise`, or an error that is made in one place and raised in another."""

    file: str
    lines: range
    # the function, as `Class.method.inner`
    function: str

    @property
    def name(self) -> str:
        return f"{self.file.removesuffix('.py').replace('/', '.')}.{self.function}"


# our own bugs, the protocol of module attributes, and what is caught before it reaches anybody
NOT_FOR_USERS = {"AssertionError", "AttributeError", "TooMuchError"}


@functools.cache
def sites() -> list[Site]:
    """All of them, in all files of the core."""
    files = [*SOURCE.glob("*.py"), *(SOURCE / "rules").glob("*.py")]
    return [site for file in sorted(files) for site in _sites(str(file.relative_to(SOURCE)), file.read_text())]


def _sites(file: str, text: str) -> Iterator[Site]:
    def walk(node: ast.AST, function: str) -> Iterator[Site]:
        site = Site(file, range(getattr(node, "lineno", 0), getattr(node, "end_lineno", 0) + 1), function)
        if isinstance(node, ast.Raise):
            if node.exc is not None and _called(node.exc) not in NOT_FOR_USERS:
                yield site
            return
        if isinstance(node, ast.Call) and issubclass(_known(_called(node)), Exception):
            yield site
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".removeprefix(".")
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    return walk(ast.parse(text), "")


def _called(node: ast.AST) -> str:
    """The name of what is called, without its module."""
    function = node.func if isinstance(node, ast.Call) else node
    return getattr(function, "id", getattr(function, "attr", ""))


def _known(name: str) -> type:
    found = getattr(errors, name, None) or getattr(builtins, name, None)
    return found if inspect.isclass(found) else object


# --- where they came from -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observation:
    """What a case gave."""

    kind: type[BaseException]
    message: str
    # (file, line) of every exception on the way to it, and of where its message was made
    places: frozenset[tuple[str, int]]

    def came_from(self, site: Site) -> bool:
        return any(file == site.file and line in site.lines for file, line in self.places)


@functools.cache
def observe(name: str) -> Observation:
    """Run a case, and see where its error came from."""
    torch.manual_seed(0)
    made: list[tuple[sw.SamplewiseError, tuple[str, int]]] = []

    def watched(self: sw.SamplewiseError, *args: object) -> None:
        RuntimeError.__init__(self, *args)
        frame = inspect.currentframe().f_back
        made.append((self, _place(frame.f_code.co_filename, frame.f_lineno)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sw.SamplewiseError, "__init__", watched)
        with pytest.raises((sw.SamplewiseError, ValueError, TypeError, RuntimeError)) as caught:
            CASES[name].trigger()
    message, raised, error = str(caught.value), set(), caught.value
    while error is not None:
        raised |= {_innermost(error.__traceback__)}
        error = error.__cause__
    built = {place for one, place in made if str(one) in message}
    return Observation(caught.type, message, frozenset((raised | built) - {None}))


def _innermost(trace: TracebackType | None) -> tuple[str, int] | None:
    """The last place in our own source that an exception came through."""
    found = None
    while trace is not None:
        found, trace = _place(trace.tb_frame.f_code.co_filename, trace.tb_lineno) or found, trace.tb_next
    return found


def _place(file: str, line: int) -> tuple[str, int] | None:
    path = Path(file)
    return (str(path.relative_to(SOURCE)), line) if path.is_relative_to(SOURCE) else None


# --- the tests ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_says_what_happened_where_and_what_to_do(name: str) -> None:
    case, seen = CASES[name], observe(name)
    assert issubclass(seen.kind, case.kind), f"{seen.kind.__name__}: {seen.message}"
    for what in ("call", "parameter", "found", "remedy"):
        assert re.search(getattr(case, what), seen.message), f"{what} {getattr(case, what)!r} is not in: {seen.message}"


@pytest.mark.parametrize("name", CASES)
def test_comes_from_the_function_it_is_listed_under(name: str) -> None:
    seen = observe(name)
    assert name.partition(": ")[0] in {site.name for site in sites() if seen.came_from(site)}, f"{seen.places}: {seen.message}"


def test_no_message_is_without_a_case() -> None:
    seen = [observe(name) for name in CASES]
    missing = [site for site in sites() if not any(one.came_from(site) for one in seen)]
    assert not missing, "\n".join(f"no case for {site.name}, {site.file} line {site.lines.start}" for site in missing)


SNIPPET = """
class A:
    def f(self):
        try:
            raise ValueError(
                "two lines"
            )
        except ValueError:
            raise
        raise AssertionError("our bug")

    def g(self):
        def inner():
            return errors.SampleAxisError("made here")
        refusal = inner()
        raise refusal
"""


def test_every_place_that_makes_or_raises_an_error_is_found():
    found = [(site.name, site.lines) for site in _sites("rules/a.py", SNIPPET)]
    assert found == [("rules.a.A.f", range(5, 8)), ("rules.a.A.g.inner", range(14, 15)), ("rules.a.A.g", range(16, 17))]


def test_a_place_without_a_case_is_noticed():
    seen = observe("errors.one_of: a choice")
    assert any(seen.came_from(site) for site in sites())
    assert not any(seen.came_from(site) for site in sites() if site.name != "errors.one_of")
