"""Steps that treat every row alike, along the features: products, scalings, activations, norms, derived weights."""

import random

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations

from .network import EVERY, LAST, op


def widths(k):
    return 2 + k % 3


def choose(k, *choices):
    return choices[k % len(choices)]()


def derived(net, k, o, i):
    """A weight computed from parameters."""
    v = net.p(k, o, i)
    return choose(
        k,
        lambda: net.p(k, o, 1) * v / v.norm(dim=1, keepdim=True),
        lambda: v + net.p(k, o, 1) @ net.p(k, 1, i),
        lambda: net.p(k, i, o).t(),
        lambda: net.p(k, i * o).view(o, i),
        lambda: v.softmax(0),
        lambda: net.p(k, o + 1, i)[1:],
        lambda: v.clone().mul_(2.0),
        lambda: torch.cat([net.p(k, 1, i), net.p(k, 1, i).expand(o, i)[1:]]),
        lambda: v.masked_fill(torch.ones(o, i, dtype=torch.bool).triu(1), 0.0),
        lambda: v.detach() + 0 * v,
        lambda: torch.outer(net.p(k, o), net.p(k, i)),
        net.p(k, 2, o, i)[k % 2].contiguous,
        lambda: v.cumsum(0),
        lambda: v.sort(1)[0],
        lambda: torch.linalg.qr(net.p(k, max(o, i), max(o, i)))[0][:o, :i],
        lambda: v.gather(1, v.argsort(1)),
        lambda: v.roll(1, 0).flip(1),
        lambda: torch.stack([net.p(k, i)] * o) * 0.5,
        lambda: torch.einsum("or,ri->oi", net.p(k, o, 2), net.p(k, 2, i)).tanh(),
        lambda: torch.linalg.solve(net.p(k, o, o) + 3 * torch.eye(o, dtype=v.dtype), v),
        lambda: F.linear(v, net.p(k, i, i)),
        lambda: torch.where(v > 0, v, 0.1 * v),
        lambda: torch.zeros(o, i, dtype=v.dtype).index_add(0, torch.zeros(o, dtype=torch.int64), v),
        lambda: v.view(-1)[torch.arange(o * i).flip(0)].view(o, i),
        lambda: net.p(k, o, 2 * i)[:, ::2],
        lambda: v * (v.max() - v.min()) / v.std(),
        lambda: v.unfold(1, 1, 1).squeeze(-1) + v.diagonal()[0],
    )


@op(LAST)
def linear(net, x, k):
    return F.linear(x, net.p(k, widths(k), x.shape[-1]), net.p(k, widths(k)) if k % 2 else None)


@op(LAST)
def module_linear(net, x, k):
    d, o = x.shape[-1], widths(k)
    return net.layer(k, f"linear{d}{o}", lambda: torch.nn.Linear(d, o))(x)


@op(LAST)
def square(net, x, k):
    return F.linear(x, net.p(k, x.shape[-1], x.shape[-1]))


@op(LAST)
def matmul(net, x, k):
    d = x.shape[-1]
    return choose(
        k,
        lambda: x @ net.p(k, d, 2),
        lambda: (net.p(k, 2, d) @ x.mT).mT,
        lambda: x @ net.p(k, d)[:, None],
        lambda: torch.matmul(x.unsqueeze(-2), net.p(k, d, 2)).squeeze(-2),
        lambda: (x.unsqueeze(-2) @ net.p(k, d, d) @ x.unsqueeze(-1)).squeeze(-1),
        lambda: torch.matmul(x, net.p(k, d)).unsqueeze(-1) * x,
        lambda: (net.p(k, d) * x).sum(-1, keepdim=True),
        lambda: torch.addmm(net.p(k, 2), x.flatten(0, -2), net.p(k, d, 2)).view(*x.shape[:-1], 2),
        lambda: torch.mm(x.reshape(-1, d), net.p(k, d, 2)).view(*x.shape[:-1], 2),
        lambda: x @ net.p(k, d, 2) @ net.p(k, 2, d),
        lambda: torch.linalg.multi_dot([x.reshape(-1, d), net.p(k, d, 2), net.p(k, 2, d)]).view(x.shape),
    )


@op(EVERY)
def tied(net, x, k):
    w, f = net.p(k, x.shape[net.features], 3), net.features
    return torch.tensordot(torch.tensordot(x, w, ([f], [0])).tanh(), w, ([-1], [1])).movedim(-1, f)


@op(LAST)
def derived_weight(net, x, k):
    return F.linear(x, derived(net, k, widths(k // 3), x.shape[-1]))


@op(EVERY)
def any_axis(net, x, k):
    """A product with the features wherever they are, in many spellings."""
    f, d = net.features, net.width(x)
    w = net.p(k, 2, d)
    letters = "abcde"[: x.ndim]
    out = letters.replace(letters[f], "o")
    return choose(
        k,
        lambda: torch.tensordot(w, x, ([1], [f])).movedim(0, f),
        lambda: torch.tensordot(x, w, ([f], [1])).movedim(-1, f),
        lambda: torch.einsum(f"{letters},o{letters[f]}->{out}", x, w),
        lambda: torch.einsum(f"o{letters[f]},{letters}->{out[::-1]}", w, x).permute(*reversed(range(x.ndim))),
        lambda: torch.einsum(f"{letters},o{letters[f]},o->{out}", x, w, net.p(k, 2)),
        lambda: F.linear(x.movedim(f, -1), w).movedim(-1, f),
        lambda: (w @ x.movedim(f, -2)).movedim(-2, f) if x.ndim > 1 else x,
        lambda: torch.einsum(x, list(range(x.ndim)), w, [9, f], [9 if i == f else i for i in range(x.ndim)]),
        lambda: torch.stack([(x * net.aligned(row, x)).sum(f) for row in w], f),
        lambda: torch.einsum(f"{letters},{letters},o{letters[f]}->{out}", x, net.earlier(x, k), w),
        lambda: sum(x.select(f, j).unsqueeze(f) * net.aligned(w[:, j], x) for j in range(d)),
        lambda: torch.einsum(f"...{letters[f]},o{letters[f]}->...o", x.movedim(f, -1), w).movedim(-1, f),
        lambda: torch.tensordot(w, x.movedim(f, 0), 1).movedim(0, f),
        lambda: torch.einsum(f"{letters},o{letters[f]},p{letters[f]}->{out.replace('o', 'op')}", x, w, w).flatten(f, f + 1),
    )


@op(EVERY)
def random_einsum(net, x, k):
    """The features against a parameter that may know the positions too, the letters in any order."""
    rng = random.Random(k)
    letters = list("abcd"[: x.ndim])
    feature = letters[net.features]
    others = [a for i, a in enumerate(letters) if i not in {net.features, 0, net.batch}]
    weight = [feature, "o", *rng.sample(others, rng.randrange(len(others) + 1))]
    out = ["o" if a == feature else a for a in letters]
    rng.shuffle(weight)
    shuffled = rng.sample(out, len(out))
    sizes = {**dict(zip(letters, x.shape, strict=True)), "o": 2}
    operands = [("".join(letters), x), ("".join(weight), net.p(k, *(sizes[a] for a in weight)))]
    if rng.random() < 0.3:
        operands.append(("o", net.p(k, 2)))
    if rng.random() < 0.3:
        operands.append(("".join(letters), net.earlier(x, k)))
    rng.shuffle(operands)
    spelling = ",".join(names for names, _ in operands) + "->" + "".join(shuffled)
    return torch.einsum(spelling, *(x for _, x in operands)).permute([shuffled.index(a) for a in out])


@op(LAST)
def reparametrized(net, x, k):
    """A module whose weight is computed by a parametrization, or merged with a low-rank one."""
    d = x.shape[-1]

    def lora():
        base, down, up = net.p(k, 2, d), net.p(k, 1, d), net.p(k, 2, 1)
        return F.linear(x, base.detach() + up @ down) + F.linear(F.linear(x, down), up) * 0.5

    make = {
        "weight": lambda: parametrizations.weight_norm(torch.nn.Linear(d, 2)),
        "spectral": lambda: parametrizations.spectral_norm(torch.nn.Linear(d, 2)).eval(),
        "orthogonal": lambda: parametrizations.orthogonal(torch.nn.Linear(d, d)),
    }
    name = list(make)[k // 2 % 3]
    return lora() if k % 2 else net.layer(k, f"{name}{d}", make[name])(x)


@op(EVERY)
def scale(net, x, k):
    d = net.width(x)
    p = net.aligned(net.p(k, d), x)
    return choose(
        k,
        lambda: x * p,
        lambda: net.p(k, 1).view([1] * x.ndim) - x,
        lambda: x / (p.square() + 1),
        lambda: x.addcmul(x, net.p(k, 1)[0]),
        lambda: torch.maximum(x, p),
        lambda: torch.where(x > 0, x, p * x),
        lambda: torch.where(x > 0.2, p, x),
        lambda: x.lerp(p.expand_as(x), 0.3),
        lambda: torch.add(x, p, alpha=2),
        lambda: torch.addcdiv(x, p, x.square() + 1),
        lambda: torch.atan2(x, p.square() + 1),
        lambda: x.masked_fill(x > 0.5, 0.0) + p,
        lambda: torch.logaddexp(x, p),
        lambda: torch.pow(x.square() + 1, p),
        lambda: torch.hypot(x, p + 2),
        lambda: x * torch.sigmoid(p) + (1 - torch.sigmoid(p)) * x.tanh(),
        lambda: torch.clamp(x, min=p - 1, max=p + 1),
        lambda: x + p[None][0],
        lambda: torch.fmin(x, p),
        lambda: (x.unsqueeze(-1) * net.p(k, 3)).sum(-1),
        lambda: x.copysign(p),
        lambda: F.threshold(x, 0.1, 0.0) * p,
    )


@op(LAST)
def prelu(net, x, k):
    return F.prelu(x.flatten(0, -2), net.p(k, x.shape[-1] if k % 2 else 1)).view_as(x)


@op(EVERY)
def activation(net, x, k):
    return choose(
        k,
        x.tanh,
        lambda: F.gelu(x),
        lambda: F.silu(x),
        x.sin,
        x.clone,
        lambda: x.softmax(net.features),
        lambda: F.normalize(x, dim=net.features),
        lambda: x.exp().clamp(max=3),
        lambda: F.softplus(x),
        lambda: x.log_softmax(net.features),
        lambda: x - x.amax(net.features, keepdim=True),
        lambda: x.round() - x.round().detach() + x,
        lambda: x.argsort(net.features).to(x.dtype) * 0.3 + x,
        lambda: F.dropout(x, 0.5, training=False),
        lambda: torch.nan_to_num(x),
        lambda: F.hardtanh(x),
        lambda: (x > 0).to(x.dtype) * x,
    )


@op(LAST)
def norm(net, x, k):
    d = x.shape[-1]
    return choose(
        k,
        lambda: F.layer_norm(x, (d,), net.p(k, d), net.p(k + 1, d)),
        lambda: F.rms_norm(x, (d,), net.p(k, d), 1e-3),
        lambda: F.layer_norm(x, (d,), None, net.p(k, d)),
        lambda: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, correction=0) + 0.1) * net.p(k, d),
        lambda: F.layer_norm(x.unsqueeze(-2), (1, d), net.p(k, 1, d)).squeeze(-2),
        lambda: net.layer(k, f"rms{d}", lambda: torch.nn.RMSNorm(d, eps=1e-3))(x),
    )


@op(EVERY)
def residual(net, x, k):
    y = net.earlier(x, k // 4)
    return choose(k, lambda: x + y, lambda: x * y, lambda: torch.lerp(x, y, net.p(k, 1)[0]), lambda: torch.maximum(x, y - 0.1))


@op(EVERY)
def feature_moves(net, x, k):
    f, y = net.features, net.earlier(x, k // 9)
    index = torch.tensor([0, 0])
    return choose(
        k,
        lambda: torch.cat([x, y], f),
        lambda: x.narrow(f, 0, max(1, x.shape[f] - 1)),
        lambda: x.flip(f),
        lambda: torch.cat([x] * 2, f),
        lambda: torch.stack([x, x * x], f + 1).flatten(f, f + 1),
        lambda: x.index_select(f, index),
        lambda: x.movedim(f, -1)[..., [0, 0]].movedim(-1, f),
        lambda: F.pad(x.movedim(f, -1), (1, 0)).movedim(-1, f),
        lambda: x.roll(1, f),
        lambda: x.cumsum(f),
        lambda: x.sort(f)[0],
        lambda: x.topk(1, f)[0],
        lambda: x.gather(f, x.argsort(f)),
        lambda: torch.stack(x.unbind(f)[::-1], f),
        lambda: torch.cat(x.split(1, f), f) * 2,
        lambda: x.repeat_interleave(2, f),
        lambda: torch.take_along_dim(x, x.argmax(f, keepdim=True), f),
        lambda: x.scatter(f, x.argmin(f, keepdim=True), 0.5),
        lambda: torch.zeros_like(x).scatter_add(f, x.argsort(f), x),
        lambda: torch.cat([x, net.aligned(net.p(k, 2), x).expand(*x.shape[:f], 2, *x.shape[f + 1 :])], f),
        lambda: torch.cat(torch.chunk(x, 2, f)[::-1], f),
    )


@op(("BD", "BTD", "MD", "RD", "TBD", "XD"))
def bilinear(net, x, k):
    return F.bilinear(x, net.earlier(x, k), net.p(k, 2, x.shape[-1], x.shape[-1]), net.p(k, 2))


@op(LAST)
def looked_up(net, x, k):
    """A table of parameters, asked by ids computed from the samples."""
    d = x.shape[-1]
    ids = x.argmax(-1)
    table = net.p(k, d, 3)
    return x.sum(-1, keepdim=True) + choose(
        k,
        lambda: F.embedding(ids, table),
        lambda: F.embedding(ids, table, padding_idx=0),
        lambda: table[ids],
        lambda: table.index_select(0, ids.flatten()).view(*ids.shape, 3),
        lambda: F.one_hot(ids, d).to(x.dtype) @ table,
        lambda: table.t()[:, ids].movedim(0, -1),
        lambda: (
            table.gather(0, ids.reshape(-1, 1).expand(-1, 3)).view(*ids.shape, 3)
            if ids.numel() <= d
            else table.expand(ids.numel(), d, 3).gather(1, ids.reshape(-1, 1, 1).expand(-1, 1, 3)).view(*ids.shape, 3)
        ),
        lambda: table.softmax(-1)[ids],
        lambda: F.embedding_bag(x.argsort(-1).reshape(-1, d), table, mode=["sum", "mean", "max"][k // 8 % 3]).view(
            *ids.shape, 3
        ),
        lambda: F.embedding_bag(x.argsort(-1).reshape(-1, d), table, mode="sum", per_sample_weights=x.reshape(-1, d)).view(
            *ids.shape, 3
        ),
        lambda: table[(x[..., 0] > 0).long()],
        lambda: torch.take_along_dim(table.expand(*ids.shape, d, 3), ids[..., None, None].expand(*ids.shape, 1, 3), -2).squeeze(
            -2
        ),
        lambda: F.embedding(ids, table, scale_grad_by_freq=True),
        lambda: table.take(ids * 3)[..., None] * net.p(k, 3),
        lambda: F.embedding(x.argsort(-1), table).mean(-2),
    )


@op(LAST)
def slow(net, x, k):
    """Ops that have no rule."""
    d = x.shape[-1]
    return choose(
        k,
        lambda: torch.cdist(x, net.p(k, 2, d)) if x.ndim > 2 else x,
        lambda: x * F.cosine_similarity(x, net.p(k, d).expand_as(x), dim=-1).unsqueeze(-1),
        lambda: torch.linalg.solve(net.p(k, d, d) + 3 * torch.eye(d, dtype=x.dtype), x.unsqueeze(-1)).squeeze(-1),
        lambda: F.pairwise_distance(x, net.p(k, d)).unsqueeze(-1) + x,
        lambda: torch.kron(x.reshape(-1, d), net.p(k, 1, 2)).view(*x.shape[:-1], 2 * d),
        lambda: torch.inner(x, net.p(k, 2, d)),
        lambda: torch.linalg.vector_norm(x - net.p(k, d), dim=-1, keepdim=True) + x,
        lambda: torch.cdist(x.reshape(-1, 1, d), net.p(k, 1, 2, d).squeeze(0)).view(*x.shape[:-1], 2),
        lambda: torch.vdot(net.p(k, d), net.p(k + 30, d)) * x,
        lambda: torch.matrix_exp(x.unsqueeze(-1) * net.p(k, d, d) * 0.1).sum(-1),
    )
