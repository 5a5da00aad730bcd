"""Steps spelled in other ways: overloads of torch's ops, arguments by name, one tensor given twice, hooks, ops of one's own."""

import torch
import torch.nn.functional as F
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from .network import EVERY, LAST, op
from .ops_rows import choose, widths

aten = torch.ops.aten


@op(EVERY)
def overload(net, x, k):
    """Packets and overloads of `torch.ops.aten`, some of which write to their first argument."""
    f, d = net.features, net.width(x)
    p, y = net.aligned(net.p(k, d), x), x.clone() if k // 29 % 2 else x * 1.0
    return choose(
        k,
        lambda: aten.mul.Tensor(x, p),
        lambda: aten.add(x, p, alpha=2),
        lambda: aten.add.Tensor(x, other=p),
        lambda: aten.mul_.Tensor(y, p),
        lambda: aten.add_.Tensor(y, p, alpha=2),
        lambda: aten.relu_.default(y) + p,
        lambda: aten.copy_.default(y, x * p),
        lambda: aten.sum.dim_IntList(x, [f], True) * p + x,
        lambda: aten.transpose.int(aten.transpose.int(x, 0, -1) * 2.0, 0, -1) * p,
        lambda: aten._softmax.default(x, f, False) * p,
        lambda: aten.where.self(x > 0, x, p.expand_as(x)),
        lambda: aten.clamp_.default(self=y, min=-1.0) * p,
        lambda: aten.slice.Tensor(x, f, 0, 1) * p,
        lambda: aten.cat.default([x, x * p], f),
        lambda: aten.select.int(x, f, 0).unsqueeze(f) + x * p,
        lambda: aten.stack.default(aten.unbind.int(x, f), f) * p,
        lambda: aten.sub_.Scalar(y, 0.5) * p,
        lambda: aten.fill_.Scalar(y, 0.5) * p + x,
        lambda: aten.masked_fill_.Scalar(y, x > 0.5, 0.25) * p,
        lambda: aten.lerp.Tensor(x, p.expand_as(x), torch.full_like(x, 0.25)),
        lambda: aten.gelu.default(x) * p,
        lambda: aten.mean.dim(x, [f], True) + p * x,
        lambda: aten.index_select.default(x, f, torch.arange(d).flip(0)) * p,
        lambda: aten.view.default(x.contiguous(), list(x.shape)) * p,
        lambda: aten.permute.default(aten.permute.default(x, list(range(x.ndim))[::-1]), list(range(x.ndim))[::-1]) * p,
        lambda: aten.expand.default(p, list(x.shape)) * x,
        lambda: aten.square_.default(y) + p,
        lambda: aten.detach.default(x) * p + x,
        lambda: aten.addcmul_.default(y, x, p.expand_as(x), value=0.5),
    )


@op(LAST)
def overloaded_product(net, x, k):
    d, o = x.shape[-1], widths(k // 17)
    w, b, flat = net.p(k, o, d), net.p(k, o), x.reshape(-1, d)
    rows = lambda out: out.view(*x.shape[:-1], out.shape[-1])
    return choose(
        k,
        lambda: aten.linear.default(x, w, b),
        lambda: aten.linear(x, w),
        lambda: aten.matmul.default(x, w.t()),
        lambda: rows(aten.mm.default(flat, net.p(k, d, o))),
        lambda: rows(aten.addmm.default(b, flat, net.p(k, d, o), alpha=0.5)),
        lambda: rows(aten.addmm(b, flat, w.t(), beta=2)),
        lambda: aten.layer_norm.default(x, [d], net.p(k, d), net.p(k + 30, d)),
        lambda: x + aten.embedding.default(net.p(k, d, d), x.argmax(-1)),
        lambda: rows(aten.bmm.default(flat[:, None], net.p(k, d, o).expand(len(flat), d, o))[:, 0]),
        lambda: aten.einsum.default("...i,oi->...o", [x, w]),
        lambda: aten.einsum("oi,...i->...o", [w, x]),
        lambda: rows(aten.conv1d.default(flat[:, None], net.p(k, o, 1, d))[:, :, 0]),
        lambda: aten.rms_norm.default(x, [d], net.p(k, d), 1e-3),
        lambda: aten.tensordot.default(x, w, [x.ndim - 1], [1]),
        lambda: rows(aten.mv.default(flat, net.p(k, d))[:, None]) * x,
        lambda: aten.bilinear.default(x, x, net.p(k, o, d, d), b),
        lambda: aten.prelu.default(x.reshape(-1, d), net.p(k, d)).view(x.shape),
    )


@op(EVERY)
def by_name(net, x, k):
    """Arguments given by name, the tensors that come first among them."""
    f, d = net.features, net.width(x)
    p, y = net.aligned(net.p(k, d), x), x * 1.0
    index = torch.arange(d).flip(0)
    return choose(
        k,
        lambda: torch.add(input=x, other=p),
        lambda: torch.mul(other=p, input=x),
        lambda: torch.clamp_(input=y, min=-1.0, max=1.0) * p,
        lambda: torch.where(condition=x > 0, input=x, other=p),
        lambda: torch.cat(tensors=[x, x * p], dim=f),
        lambda: torch.softmax(dim=f, input=x) * p,
        lambda: y.mul_(other=p),
        lambda: torch.transpose(dim1=0, dim0=-1, input=torch.transpose(input=x, dim0=0, dim1=-1) * 2) * p,
        lambda: torch.sum(input=x, dim=(f,), keepdim=True) * p + x,
        lambda: torch.index_select(dim=f, index=index, input=x) * p,
        lambda: torch.movedim(source=f, destination=0, input=x).movedim(source=0, destination=f) * p,
        lambda: torch.lerp(input=x, end=p.expand_as(x), weight=0.25),
        lambda: torch.neg_(input=y) + p,
        lambda: torch.gather(dim=f, input=x, index=x.argsort(dim=f)) * p,
        lambda: torch.stack(dim=f, tensors=torch.unbind(dim=f, input=x)) * p,
        lambda: torch.narrow(length=1, start=0, dim=f, input=x) * p,
        lambda: torch.addcmul(tensor1=x, tensor2=p, input=x, value=0.5),
        lambda: torch.tensordot(dims=([1], [f]), b=x, a=net.p(k, 2, d)).movedim(0, f),
        lambda: F.linear(weight=net.p(k, 2, d), input=x.movedim(f, -1), bias=net.p(k, 2)).movedim(-1, f),
        lambda: F.layer_norm(weight=net.p(k, d), normalized_shape=(d,), bias=net.p(k + 30, d), input=x.movedim(f, -1)).movedim(
            -1, f
        ),
        lambda: torch.matmul(other=net.p(k, d, 2), input=x.movedim(f, -1)).movedim(-1, f),
        lambda: F.leaky_relu(input=y, inplace=True) * p,
        lambda: torch.scatter(dim=f, input=x, src=x * p, index=x.argsort(dim=f)),
        lambda: torch.index_add(input=x, index=index, dim=f, source=x * p),
        lambda: torch.masked_fill(value=0.5, mask=x > 0.5, input=x) * p,
        lambda: torch.take_along_dim(indices=x.argsort(f), input=x, dim=f) * p,
        lambda: torch.flip(dims=(f,), input=x) * p,
        lambda: torch.cat(torch.split(split_size_or_sections=1, dim=f, tensor=x), dim=f) * p,
        lambda: torch.polygamma(n=1, input=x.square() + 1.0) * p,
        lambda: torch.conv1d(weight=net.p(k, 2, 1, 1), input=x.reshape(-1, 1, 1)).view(*x.shape, 2).sum(-1) * p,
    )


@op(EVERY)
def given_twice(net, x, k):
    """One tensor in two places of a call, and then two tensors of the same shape."""
    f, d = net.features, net.width(x)
    p, q, y = net.aligned(net.p(k, d), x), net.aligned(net.p(k + 30, d), x), x * 1.0
    c = torch.linspace(0.5, 1.5, d, dtype=x.dtype)
    last = x.movedim(f, -1)
    back = lambda out: out.movedim(-1, f)
    rows = last.reshape(-1, d)
    return choose(
        k,
        lambda: torch.mul(x, x) + torch.mul(x, p),
        lambda: torch.addcmul(x, x, x) * p,
        lambda: torch.addcmul(p.expand_as(x), x, x) + torch.addcmul(p.expand_as(x), x, net.earlier(x, k)),
        lambda: torch.lerp(x, x, p) + torch.lerp(x, p.expand_as(x), 0.5),
        lambda: torch.stack([x, x, y * p], f + 1).flatten(f, f + 1),
        lambda: y.add_(y) * p,
        lambda: y.detach().clone().mul_(y.detach()) * p + y,
        lambda: torch.where(x > 0, x, x) * p,
        lambda: back(
            F.layer_norm(last, (d,), net.p(k, d), net.p(k, d)) + F.layer_norm(last, (d,), net.p(k, d), net.p(k + 30, d))
        ),
        lambda: back(F.layer_norm(last, (d,), c, net.p(k, d)) + F.layer_norm(last, (d,), c, c)),
        lambda: back((F.batch_norm(rows, c, c, net.p(k, d)) + F.batch_norm(rows, c * 2, c, net.p(k, d))).view(last.shape)),
        lambda: back((F.batch_norm(rows, c, c, net.p(k, d), net.p(k, d))).view(last.shape)),
        lambda: back(F.bilinear(last, last, net.p(k, 2, d, d)) + F.bilinear(last, last * c, net.p(k, 2, d, d))),
        lambda: back(torch.einsum("...i,...i,oi->...o", last, last, net.p(k, 2, d))),
        lambda: back(torch.einsum("...i,oi,oi->...o", last, net.p(k, 2, d), net.p(k, 2, d))),
        lambda: torch.maximum(x, x) * p + torch.maximum(p, p),
        lambda: p * p * x + p * q,
        lambda: torch.hypot(x, x) + p,
        lambda: torch.addcdiv(p.expand_as(x), x, x.square() + 1) + torch.addcdiv(x, p, p.square() + 1),
        lambda: back(F.linear(last, net.p(k, d, d), net.p(k, d, d)[0])),
        lambda: F.mse_loss(x, x * p, reduction="none") + F.mse_loss(x, x, reduction="none"),
        lambda: y.copy_(y) * p,
    )


class Told(torch.nn.Linear):
    """A linear layer with hooks, which are given once."""

    def __init__(self, d, which):
        super().__init__(d, d)
        choose(
            which,
            lambda: self.register_forward_hook(lambda _, __, out: out * 2.0),
            lambda: self.register_forward_pre_hook(lambda _, args: (args[0].tanh(),)),
            lambda: self.register_full_backward_hook(lambda _, grads, __: (grads[0] * 0.5,)),
            lambda: self.register_full_backward_pre_hook(lambda _, grads: (grads[0] * 3.0,)),
            lambda: self.register_full_backward_hook(lambda *_: None),
            lambda: self.register_forward_hook(lambda _, args, out: out.add_(args[0])),
        )


@op(LAST)
def with_hooks(net, x, k):
    """Hooks that look at what passes, or change it row by row."""
    d = x.shape[-1]
    p, y = net.p(k, d), x * 1.0

    def on_result(hook):
        out = y * p
        if out.requires_grad:
            out.register_hook(hook)
        return out

    def packed(pack, unpack):
        with saved_tensors_hooks(pack, unpack):
            return F.linear(x, net.p(k, d, d)) * p

    def on_node():
        out = F.linear(y, net.p(k, d, d))
        if out.requires_grad:
            out.grad_fn.register_prehook(lambda grads: tuple(None if g is None else g * 2.0 for g in grads))
        return out

    def kept():
        out = y * p
        if out.requires_grad:
            out.retain_grad()
        return out.sin()

    def on_cpu():
        with save_on_cpu():
            return F.linear(x, net.p(k, d, d)).tanh() * p

    return choose(
        k,
        lambda: on_result(lambda g: g * 2.0),
        # each does as much to half a gradient: the loss may be a mean
        lambda: on_result(lambda g: g * (g > 0)),
        lambda: on_result(lambda g: g - g.mean(-1, keepdim=True)),
        lambda: on_result(lambda _: None),
        lambda: packed(lambda t: t.clone(), lambda t: t),
        lambda: packed(lambda t: t.numpy(force=True), torch.from_numpy),
        on_node,
        kept,
        on_cpu,
        *(lambda which=which: net.layer(k, f"told{d}_{which}", lambda: Told(d, which))(x) for which in range(6)),
        lambda: on_result(lambda g: g.detach().clone() * 1.5),
    )


@torch.library.custom_op("samplewise_fuzzing::put", mutates_args={"out"})
def put(x: torch.Tensor, out: torch.Tensor) -> None:
    """Writes its first argument into the second."""
    out.copy_(x)


@torch.library.custom_op("samplewise_fuzzing::rolled", mutates_args=())
def rolled(x: torch.Tensor, by: int) -> torch.Tensor:
    """Moves rows on, or gives them as they are."""
    return x.roll(by, 0).clone()


rolled.register_autograd(
    lambda ctx, grad: (grad.roll(-ctx.by, 0), None), setup_context=lambda ctx, inputs, output: setattr(ctx, "by", inputs[1])
)


@op(EVERY, harmful=True)
def own_op(net, x, k):
    """Ops that no table knows: defined by `torch.library`, or on lists of tensors."""
    p, y = net.aligned(net.p(k, net.width(x)), x), x * 1.0
    wide, seen = p.expand_as(x).clone(), y.detach()

    def filled(value, buffer):
        put(value, buffer)
        return buffer * p + y

    def aliased():
        put(seen.flip(0).clone(), seen)
        return y * p

    def listed(function, *args, **options):
        function([y], *args, **options)
        return y * p

    return choose(
        k,
        lambda: filled(seen, torch.zeros_like(x)),
        lambda: filled(seen.flip(0), torch.zeros_like(x)),
        lambda: filled(seen.sum(0, keepdim=True).expand_as(x), torch.empty_like(x)),
        aliased,
        lambda: rolled(y, 1) * p,
        lambda: rolled(y, 0) * p,
        lambda: rolled(y * p, 1),
        lambda: torch._foreach_mul([y, x], 2.0)[0] * p,
        lambda: torch._foreach_mul([y], [wide])[0],
        lambda: torch._foreach_add([y, wide], [wide, y])[1] * p,
        lambda: torch._foreach_norm([y])[0] * y * p,
        lambda: listed(torch._foreach_add_, [x.flip(0)]),
        lambda: listed(torch._foreach_mul_, [wide]),
        lambda: listed(torch._foreach_copy_, [seen.flip(0)]),
        lambda: listed(torch._foreach_neg_),
        lambda: torch._foreach_maximum([y], [x.flip(0)])[0] * p,
    )
