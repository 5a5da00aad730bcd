"""Steps that write: in-place ops, views, buffers, aliases, shorter types, detaching."""

import torch
import torch.nn.functional as F

from .network import EVERY, LAST, PLAIN, op
from .ops_rows import choose


@op(EVERY)
def in_place(net, x, k):
    p = net.aligned(net.p(k, net.width(x)), x)
    y = x.clone() if k // 15 % 2 else x
    return choose(
        k,
        y.relu_,
        lambda: y.mul_(p),
        lambda: y.add_(p, alpha=2),
        lambda: F.leaky_relu(y, inplace=True),
        lambda: y.clamp_(-2, 2),
        lambda: y.sub_(net.earlier(x, k // 2) * 0.5),
        lambda: y.addcmul_(y.detach().clone(), p),
        lambda: y.lerp_(p.expand_as(y), 0.25),
        lambda: y.masked_fill_(y > 0.5, 0.5),
        lambda: y.copy_(p * 2),
        lambda: y.zero_().add_(x.detach()),
        lambda: y.div_(p.square() + 1).sigmoid_(),
        lambda: F.silu(y, inplace=True),
        lambda: y.transpose(0, -1).mul_(2).transpose(0, -1),
        lambda: y.unsqueeze_(0).squeeze_(0),
    )


@op(LAST)
def written(net, x, k):
    """Writes into a copy, into a view of it, or straight into `x`."""
    out = choose(k // 11, x.clone, lambda: x * 1, lambda: x, lambda: torch.zeros_like(x) + x)
    p, part = net.p(k, 1), out[..., 0]

    def assigned(index, value):
        out[index] = value

    choose(
        k,
        lambda: part.mul_(1 + p.detach()),
        lambda: part.add_(p),
        lambda: assigned((..., 0), p),
        lambda: out[..., :1].copy_(p),
        out[..., -1].tanh_,
        lambda: assigned((..., slice(0, 1)), out[..., -1:].clone() * p),
        lambda: assigned(out > 0.3, 0.3),
        lambda: out.narrow(-1, 0, 1).mul_(p),
        lambda: out[..., ::2].mul_(0.5),
        lambda: out.select(-1, 0).fill_(0.5),
        lambda: out.unbind(-1)[0].detach().add_(0.0),
    )
    return out


@op(PLAIN)
def template(net, x, k):
    """A parameter for every sample, which the data replaces for some of them, whole or in part."""
    rows = x.movedim(net.batch, 0)
    kept, some = net.p(k, *rows.shape[1:]).expand(rows.shape).clone(), rows.flatten(1).sum(1) > 0.2 * (k // 17 % 3)
    places = some.nonzero()[:, 0]
    everywhere = places.view(-1, *[1] * (rows.ndim - 1)).expand(-1, *rows.shape[1:])
    number = 0.5

    def assigned(index, value):
        kept[index] = value
        return kept

    out = choose(
        k,
        lambda: assigned(some, number),
        lambda: assigned(places, number),
        lambda: assigned(some, rows[some]),
        lambda: assigned(places, rows[places]),
        lambda: assigned(rows > 0, number),
        lambda: assigned((places, 0), number),
        lambda: assigned((slice(None), 0), rows[:, 0]),
        lambda: kept.index_fill(0, places, number),
        lambda: kept.index_copy(0, places, rows[places]),
        lambda: kept.index_add(0, places, rows[places]),
        lambda: kept.index_put((places,), rows[places]),
        lambda: kept.scatter(0, everywhere, rows[places]),
        lambda: kept.index_copy_(0, places, rows[places]),
        lambda: kept.scatter_(0, everywhere, number),
        lambda: torch.where(some.view(-1, *[1] * (rows.ndim - 1)), rows, kept),
        lambda: kept.masked_scatter(rows > 0, rows[rows > 0]),
        lambda: kept.masked_fill_(rows > 0, number),
    )
    return out.movedim(0, net.batch)


@op(EVERY)
def buffer(net, x, k):
    """A tensor made first and filled afterwards."""
    f, d = net.features, net.width(x)
    p = net.p(k, d)
    empty = choose(
        k // 8, lambda: torch.empty_like(x), lambda: torch.zeros(x.shape, dtype=x.dtype), lambda: x.new_zeros(x.shape)
    )

    def column_by_column():
        for j in range(d):
            empty.select(f, j).copy_(x.select(f, j) * p[j])
        return empty

    def assigned():
        empty[:] = x
        return empty * net.aligned(p, x)

    def twice():
        empty[...] = x * net.aligned(p, x)
        kept = empty.clone()
        empty.mul_(2)
        return kept + empty

    def reused():
        empty.copy_(x)
        first = empty.tanh()
        other = torch.zeros_like(empty)
        other[:] = x * 0.5
        return first * net.aligned(p, x) + other

    def parameter_first():
        empty.copy_(net.aligned(p, x))
        empty.add_(x)
        return empty

    def viewed():
        view = empty.movedim(f, 0)
        view[:] = x.movedim(f, 0)
        return empty * net.aligned(p, x)

    def flat():
        line = torch.zeros(x.numel(), dtype=x.dtype)
        line.view(x.shape).copy_(x)
        return line.view(x.shape) * net.aligned(p, x)

    def out_argument():
        with torch.no_grad():
            torch.mul(x, 2.0, out=empty)
        return x * empty

    return choose(k, column_by_column, assigned, twice, reused, parameter_first, viewed, flat, out_argument)


@op(PLAIN)
def buffer_by_sample(net, x, k):
    """A buffer filled sample by sample."""
    b = net.batch
    w = net.aligned(net.p(k, net.width(x)), x)
    out = torch.zeros_like(x) if k % 2 else torch.empty(x.shape, dtype=x.dtype)
    front, source = out.movedim(b, 0), (x * w).movedim(b, 0)

    def one_by_one():
        for i in range(len(front)):
            front[i] = source[i]
        return out

    def copied():
        for i in range(len(front)):
            front[i].copy_(source[i])
        return out

    def sliced():
        for i in range(len(front)):
            out.narrow(b, i, 1).copy_((x.narrow(b, i, 1) + w).tanh())
        return out

    def halves():
        half = (len(front) + 1) // 2
        front[:half] = source[:half]
        front[half:] = source[half:]
        return out

    def indexed():
        out.index_copy_(b, torch.arange(len(front)), x * w)
        return out

    def put():
        front.index_put_((torch.arange(len(front)),), source)
        return out

    return choose(k // 2, one_by_one, copied, sliced, halves, indexed, put)


@op(EVERY)
def detached(net, x, k):
    p = net.aligned(net.p(k, net.width(x)), x)

    def without_graph():
        with torch.no_grad():
            gate = (x * p).sigmoid()
        return gate * x

    return choose(
        k,
        lambda: x.detach() * p + x,
        lambda: x * p.detach(),
        without_graph,
        lambda: x + (x * p).detach(),
        lambda: (x > p.detach()).to(x.dtype) * x + (x * p),
        lambda: x.data * p + x,
        lambda: x * p.data,
        lambda: x + (x.sign() * p - x).detach(),
    )


@op(EVERY, coarse=True)
def cast(net, x, k):
    p = net.aligned(net.p(k, net.width(x)), x)
    return choose(
        k,
        lambda: net.cast(x * 2, torch.float32).double(),
        lambda: (net.cast(x, torch.float32) * net.cast(p, torch.float32)).to(x.dtype),
        lambda: (net.cast(x, torch.bfloat16) + net.cast(p, torch.bfloat16)).to(x.dtype),
        lambda: net.cast(x, torch.float32).tanh().type_as(x),
        lambda: net.cast(x, torch.float32) * p,
        lambda: x * net.cast(net.p(k, 1), torch.float32)[0],
    )


@op(LAST, coarse=True)
def cast_product(net, x, k):
    d = x.shape[-1]
    w = net.p(k, 2, d)
    return choose(
        k,
        lambda: F.linear(net.cast(x, torch.float32), net.cast(w, torch.float32)).double(),
        lambda: F.linear(net.cast(x, torch.bfloat16), net.cast(w, torch.bfloat16)).double(),
        lambda: (net.cast(x, torch.bfloat16) @ net.cast(w, torch.bfloat16).t()).to(x.dtype),
        lambda: F.layer_norm(net.cast(x, torch.float32), (d,), net.cast(net.p(k, d), torch.float32)).double(),
    )
