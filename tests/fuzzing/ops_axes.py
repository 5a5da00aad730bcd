"""Steps that move, merge and split axes, and steps along the positions."""

import torch
import torch.nn.functional as F

from .network import FEATURES, LONG, PLAIN, POSITIONS, op
from .ops_rows import choose

SWAPS = {
    "BTD": ("TBD", "BCT", "TDB"),
    "TBD": ("BTD", "TDB"),
    "BD": ("DB",),
    "DB": ("BD",),
    "TDB": ("BTD", "TBD"),
    "BCT": ("BTD",),
}


@op(SWAPS)
def swap(net, x, k):
    """Another order of the axes, made in one of several ways."""
    old, new = net.layout, SWAPS[net.layout][k % len(SWAPS[net.layout])]
    letters = [letter if letter in new else {"C": "D", "D": "C"}[letter] for letter in old]
    order = [letters.index(letter) for letter in new]
    out = choose(
        k // 3,
        lambda: x.permute(order),
        lambda: x.permute(*order).contiguous(),
        lambda: torch.einsum(x, list(range(x.ndim)), order),
        lambda: torch.movedim(x, order, list(range(x.ndim))),
        lambda: torch.permute(x, tuple(order)).clone(),
        lambda: x.permute(order).reshape([x.shape[i] for i in order]),
        lambda: torch.stack([torch.stack(row.unbind(0), 0) for row in x.permute(order).unbind(0)], 0),
    )
    return net.to(new, out)


@op(LONG)
def merge(net, x, k):
    layout = "MD" if net.layout == "BTD" else "XD"
    d = x.shape[-1]
    return net.to(
        layout,
        choose(
            k,
            lambda: x.reshape(-1, d),
            lambda: x.flatten(0, 1),
            lambda: x.contiguous().view(-1, d),
            lambda: torch.cat(x.unbind(0)),
            lambda: x.reshape(x.shape[0] * x.shape[1], d),
            lambda: x.movedim(-1, 0).reshape(d, -1).t(),
        ),
    )


@op(("BTD", "TBD"))
def merge_the_other_way(net, x, k):
    """The axes swapped first: `(B T) D` becomes `(T B) D`."""
    layout = "XD" if net.layout == "BTD" else "MD"
    return net.to(layout, choose(k, lambda: x.transpose(0, 1).reshape(-1, x.shape[-1]), lambda: x.swapaxes(0, 1).flatten(0, 1)))


@op(("MD", "XD"))
def split(net, x, k):
    d = x.shape[-1]
    if net.layout == "MD":
        return net.to("BTD", choose(k, lambda: x.reshape(net.size, -1, d), lambda: x.unflatten(0, (net.size, -1))))
    return net.to("TBD", choose(k, lambda: x.unflatten(0, (-1, net.size)), lambda: torch.stack(x.split(net.size))))


@op(LONG)
def windows(net, x, k):
    """Positions folded into the features and back, and other reshapes that keep the samples."""
    a, b, d = x.shape
    if net.layout == "BTD":
        return choose(
            k,
            lambda: x.reshape(a, 1, b * d),
            lambda: x.reshape(a, b * d, 1),
            lambda: x.reshape(a, d, b),
            lambda: x.repeat(1, 2, 1).view(a, 2, b, d).transpose(1, 2).reshape(a, 2 * b, d),
            lambda: x.repeat(1, 2, 1).view(a * 2, b, d).tanh().view(a, 2 * b, d),
            lambda: x.view(1, a, b, d).squeeze(0),
            lambda: x.unsqueeze(1).expand(a, 2, b, d).reshape(a, 2 * b, d),
        )
    return choose(
        k,
        lambda: x.transpose(0, 1).reshape(b, -1).view(b, a, d).transpose(0, 1),
        lambda: x.unsqueeze(1).expand(a, 2, b, d).reshape(2 * a, b, d),
        lambda: x.repeat(2, 1, 1),
        lambda: x.reshape(1, a, b, d)[0],
    )


@op(POSITIONS)
def along(net, x, k):
    dim = net.positions
    return choose(
        k,
        lambda: x.flip(dim),
        lambda: x.roll(1, dim),
        lambda: x.cumsum(dim),
        lambda: x.softmax(dim),
        lambda: x.sort(dim)[0],
        lambda: x - x.mean(dim, keepdim=True),
        lambda: x.repeat_interleave(2, dim),
        lambda: x.index_select(dim, torch.tensor([0, 0])),
        lambda: torch.stack(x.unbind(dim), dim),
        lambda: x.topk(1, dim)[0],
        lambda: x.gather(dim, x.argsort(dim, descending=True)),
        lambda: torch.cat([x, x.flip(dim)], dim),
        lambda: torch.cat(x.split(1, dim)[::-1], dim),
        lambda: x.logcumsumexp(dim),
        lambda: x.cummax(dim)[0],
        lambda: torch.cat([x.narrow(dim, 0, 1)] * 2, dim),
        lambda: torch.tensor_split(x, 2, dim)[0],
    )


@op(POSITIONS)
def pool(net, x, k):
    dim = net.positions
    out = choose(
        k,
        lambda: x.mean(dim),
        lambda: x.select(dim, 0),
        lambda: x.amax(dim),
        lambda: x.narrow(dim, -1, 1).squeeze(dim),
        lambda: x.logsumexp(dim),
        lambda: x.max(dim)[0],
        lambda: x.unbind(dim)[-1],
        lambda: x.square().sum(dim),
        lambda: torch.einsum(x, [0, 1, 2], [i for i in range(3) if i != dim]),
        # of an expanded axis torch's median reads other memory
        lambda: x.contiguous().median(dim)[0],
        lambda: x.std(dim, correction=0) if x.shape[dim] > 1 else x.sum(dim),
    )
    return net.to({"BTD": "BD", "TBD": "BD", "TDB": "DB", "BCT": "BD"}[net.layout], out)


@op(("BD",))
def lengthen(net, x, k):
    choices = [
        ("TBD", lambda: x.unsqueeze(0)),
        ("BTD", lambda: x[:, None]),
        ("TBD", lambda: x.expand(3, *x.shape)),
        ("BTD", lambda: x[:, :, None] * x[:, None]),
        ("TBD", lambda: torch.stack([x, x.tanh()])),
        ("BTD", lambda: x.unsqueeze(1).repeat(1, 3, 1)),
        ("TDB", lambda: torch.stack([x.t(), 2 * x.t()])),
        ("BTD", lambda: x[:, None] + net.p(k, 3, x.shape[1])),
        ("TBD", lambda: x + net.p(k, 3, 1, x.shape[1])),
        ("BTD", lambda: torch.einsum("bd,te->bted", x, net.p(k, 2, 2)).flatten(1, 2)),
        ("TBD", lambda: torch.einsum("bd,te->tbe", x, net.p(k, 2, 2))),
        ("BTD", lambda: torch.stack([x, x.flip(1)], 1)),
        ("BCT", lambda: x.unsqueeze(-1) * net.p(k, 3)),
    ]
    layout, make = choices[k % len(choices)]
    return net.to(layout, make())


@op(POSITIONS)
def position_table(net, x, k):
    t, d = x.shape[net.positions], net.width(x)
    order = [net.layout.index(letter) for letter in net.layout if letter != "B"]
    shape = [x.shape[i] if i in order else 1 for i in range(x.ndim)]
    grid = lambda table: (table if net.positions < net.features else table.t()).reshape(shape)  # (t, d) laid out as x
    sole = lambda row: row.reshape([t if i == net.positions else 1 for i in range(x.ndim)])
    return choose(
        k,
        lambda: x + grid(net.p(k, t, d)),
        lambda: x * grid(net.p(k, t + 2, d)[:t]),
        lambda: x + grid(F.embedding(torch.arange(t), net.p(k, 6, d)) if t <= 6 else net.p(k, t, d)),
        lambda: x * sole(net.p(k, t)),
        lambda: x + sole(net.p(k, t + 1)[1:]).expand_as(x),
        lambda: x + grid(net.p(k, t, d)).expand_as(x).clone(),
        lambda: x + grid(net.p(k, t, d)).expand_as(x).contiguous(),
        lambda: torch.where(grid(net.p(k, t, d)) > 0, x, grid(net.p(k, t, d))),
        lambda: x + grid(net.p(k, t, 1) @ net.p(k, 1, d)),
    )


@op(LONG)
def token(net, x, k):
    d = x.shape[-1]
    if net.layout == "BTD":
        return choose(
            k,
            lambda: torch.cat([net.p(k, 1, 1, d).expand(net.size, -1, -1), x], 1),
            lambda: torch.cat([x, net.p(k, d).expand(net.size, 2, d).clone()], 1),
            lambda: torch.cat([net.p(k, 1, 1, d).repeat(x.shape[0], 1, 1), x], 1),
            lambda: torch.cat([net.p(k, 2, d)[None].expand(len(x), 2, d) * 2, x], 1),
            lambda: torch.cat([torch.zeros(len(x), 1, d, dtype=x.dtype) + net.p(k, d), x], 1),
        )
    return choose(
        k,
        lambda: torch.cat([net.p(k, 1, 1, d).expand(-1, net.size, -1), x]),
        lambda: torch.cat([x, net.p(k, d).repeat(1, net.size, 1)]),
        lambda: torch.cat([x, net.p(k, 2, 1, d).expand(2, x.shape[1], d)]),
    )


@op(PLAIN)
def of_one_sample(net, x, k):
    """Every sample by itself, and put together again."""
    b = net.batch
    net.p(k, 1)
    row = lambda i: x.select(b, i)
    w = net.aligned(net.p(k, net.width(x)), x)
    each = range(x.shape[b])
    return choose(
        k,
        lambda: torch.stack([row(i).tanh() for i in each], b),
        lambda: torch.cat([x.narrow(b, i, 1) * w for i in each], b),
        lambda: torch.cat([part * w for part in x.split(1, b)], b),
        lambda: torch.stack([x.movedim(b, 0)[i] for i in each], b) * w,
        lambda: torch.cat([x.movedim(b, 0)[i : i + 1] for i in each]).movedim(0, b) + w,
        lambda: torch.cat([x.movedim(b, 0)[[i]] * 2 for i in each]).movedim(0, b) + w,
        lambda: torch.stack([row(i) * 2 for i in each], b) + w,
        lambda: torch.stack([part.sin() for part in x.unbind(b)], b),
        lambda: torch.cat([(x.narrow(b, i, 1) + w).cos() for i in reversed(each)], b).flip(b),
        lambda: torch.cat([part * w for part in x.chunk(2, b)], b),
        lambda: torch.cat([part * w for part in x.tensor_split(max(1, x.shape[b] // 2), b)], b),
        lambda: (
            torch.stack(
                [(x.movedim(b, 0)[i].movedim(0, -1) if x.ndim > 2 else x.movedim(b, 0)[i]).sum() for i in each]
            ).reshape([-1 if i == b else 1 for i in range(x.ndim)])
            * w
            + x
        ),
    )


@op(PLAIN)
def two_views(net, x, k):
    """The samples twice along their axis, run as one, and taken apart."""
    b, size = net.batch, x.shape[net.batch]
    w = net.aligned(net.p(k, net.width(x)), x)
    both = choose(
        k,
        lambda: torch.cat([x, x.tanh()], b),
        lambda: torch.cat([x, x.flip(net.features)], b),
        lambda: x.repeat_interleave(2, b),
        lambda: torch.cat([x] * 2, b),
    )
    out = both * w
    if k % 4 == 2:
        return out.unflatten(b, (size, 2)).sum(b + 1)
    return choose(
        k // 4,
        lambda: sum(out.chunk(2, b)),
        lambda: out.narrow(b, 0, size) * out.narrow(b, size, size),
        lambda: out.unflatten(b, (2, size)).mean(b),
        lambda: torch.stack(out.split(size, b)).amax(0),
    )


@op(FEATURES)
def round_trip(net, x, k):
    """Away and back without a change."""
    return choose(
        k,
        lambda: x.reshape(-1).view(x.shape),
        lambda: x[None].squeeze(0),
        lambda: x[..., None].squeeze(-1),
        lambda: x.movedim(0, -1).movedim(-1, 0),
        lambda: torch.stack([x, x])[k % 2],
        lambda: x.flip(0).flip(0),
        lambda: x.T.T if x.ndim == 2 else x.mT.mT,
        lambda: x.unsqueeze(1).expand(-1, 2, *x.shape[1:]).select(1, 0),
        lambda: torch.cat([x, x])[: len(x)],
        lambda: x[torch.arange(len(x))],
        lambda: x[:],
        lambda: x.to_sparse().to_dense(),
        lambda: x.roll(1, 0).roll(-1, 0),
        lambda: x.view(*x.shape),
        lambda: x.as_strided(x.shape, x.stride()),
        lambda: torch.complex(x, x * 0.5).real,
        lambda: torch.view_as_real(torch.view_as_complex(torch.stack([x, x], -1)))[..., 1],
        lambda: x.index_select(0, torch.arange(len(x)).flip(0)).index_select(0, torch.arange(len(x)).flip(0)),
        lambda: torch.einsum("...->...", x),
        lambda: x[x.isfinite().flatten(1).all(1)] if x.ndim > 1 else x,
        lambda: x[[True] * len(x)],
    )
