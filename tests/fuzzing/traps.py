"""Steps that may bring the samples together: to be refused, or to do no harm."""

import torch
import torch.nn.functional as F

from .network import EVERY, FEATURES, PLAIN, op
from .ops_rows import choose


def affine(net, x, k):
    """Something with a parameter, so that what went wrong before is seen."""
    return x * net.aligned(net.p(k, net.width(x)), x)


@op(PLAIN, harmful=True)
def statistics(net, x, k):
    b, y = net.batch, affine(net, x, k) if k // 20 % 2 else x
    return choose(
        k,
        lambda: y - y.mean(b, keepdim=True),
        lambda: y / (y.std(b, keepdim=True, correction=0) + 1),
        lambda: y / (y.abs().max() + 1),
        lambda: y * y.amax(b, keepdim=True),
        lambda: y / (y.norm() + 1),
        lambda: y + y.sum(),
        lambda: y - y.mean(b, keepdim=True).detach(),
        lambda: y / (y.detach().abs().max() + 1),
        lambda: (y - y.min()) / (y.max() - y.min() + 1),
        lambda: y + net.kept[k % len(net.kept)][0].sum(),
        lambda: y * net.kept[0][0].amax(),
        lambda: y + y.var(b, keepdim=True, correction=0),
        lambda: y.softmax(b),
        lambda: y.log_softmax(b) + y,
        lambda: y - y.logsumexp(b, keepdim=True),
        lambda: y * (y > 0).to(y.dtype).mean(),
        lambda: F.normalize(y, dim=b),
        lambda: y - y.median(b, keepdim=True)[0],
        lambda: y - y.quantile(0.5, b, keepdim=True),
        lambda: torch.where(y > y.mean(), y, 2 * y),
        # in the gradient only
        lambda: y + (y.sum() - y.sum().detach()),
        lambda: y + (y.mean(b, keepdim=True) - y.mean(b, keepdim=True).detach()),
    )


@op(PLAIN, harmful=True)
def rows_beside(net, x, k):
    """A parameter's rows beside those of samples, in the place of a sample or of all but one."""
    rows = x.movedim(net.batch, 0) * 1
    p, n = net.p(k, *rows.shape[1:]), len(rows)
    i = k // 14 % n
    one, others = rows[i : i + 1], p.expand(n - 1, *p.shape)

    def assigned(index):
        rows[index] = p
        return rows

    out = choose(
        k,
        lambda: torch.cat([others[:i], one, others[i:]]),
        lambda: torch.cat([*others[:i, None], one, *others[i:, None]], dim=0),
        lambda: torch.cat([rows[:i], p[None], rows[i + 1 :]]),
        lambda: torch.stack([*rows[:i], p, *rows[i + 1 :]]),
        lambda: torch.vstack([others[:i], one, others[i:]]),
        lambda: torch.stack([*others[:i], one[0], *others[i:]]),
        lambda: assigned(i),
        lambda: rows.select_scatter(p, 0, i),
        lambda: rows.index_copy(0, torch.tensor([i]), p[None]),
        lambda: torch.cat([rows, p[None]])[1:],
        lambda: torch.cat([p[None], rows])[:n],
        lambda: torch.cat([p.expand_as(rows), rows])[i : i + n],
        lambda: torch.roll(torch.cat([others, one]), i + 1, 0),
        lambda: assigned((rows.flatten(1).sum(1) > 0).nonzero()[:, 0]),
    )
    return out.movedim(0, net.batch)


@op(PLAIN, harmful=True)
def order_of_samples(net, x, k):
    b, y = net.batch, affine(net, x, k) if k // 20 % 2 else x
    n = y.shape[b]
    return choose(
        k,
        lambda: y.flip(b),
        lambda: y.roll(1, b),
        lambda: y.sort(b)[0],
        lambda: y.cumsum(b),
        lambda: y.cummax(b)[0],
        lambda: y.gather(b, y.argsort(b)),
        lambda: y.index_select(b, torch.arange(n).flip(0)),
        lambda: y + affine(net, y, k).flip(b),
        lambda: torch.cat([y, y], b).narrow(b, 1, n),
        lambda: torch.cat([y.narrow(b, 0, 1)] * n, b),
        lambda: y.topk(n, b)[0],
        lambda: torch.stack(y.unbind(b)[::-1], b),
        lambda: torch.cat(y.split(1, b)[::-1], b),
        lambda: torch.take_along_dim(y, y.argmax(b, keepdim=True), b).expand_as(y),
        lambda: y.select(b, 0).unsqueeze(b) + y,
        lambda: y.movedim(b, 0)[y.movedim(b, 0).flatten(1)[:, 0].argsort()].movedim(0, b),
        lambda: y.logcumsumexp(b),
        lambda: torch.stack([y.select(b, (i + 1) % n) for i in range(n)], b),
        lambda: y.diff(dim=b, prepend=y.narrow(b, 0, 1)),
        lambda: y.movedim(b, 0)[[(i + 1) % n for i in range(n)]].movedim(0, b),
    )


@op(PLAIN, harmful=True)
def between_samples(net, x, k):
    """Products of samples with samples."""
    b = net.batch
    y = affine(net, x, k) if k // 20 % 2 else x
    rows = y.movedim(b, 0)
    flat = rows.flatten(1)
    back = lambda out: out.view(rows.shape).movedim(0, b)
    return choose(
        k,
        lambda: back(flat @ flat.T @ flat),
        lambda: back((flat @ flat.T).softmax(1) @ flat),
        lambda: back((flat @ flat.T).softmax(0) @ flat),
        lambda: y + torch.cdist(flat, flat).sum(),
        lambda: back(torch.einsum("ni,mi->mn", flat, flat) @ flat),
        lambda: back(torch.einsum("ni,mj,mi->nj", flat, flat, flat)),
        lambda: back(torch.triu(flat @ flat.T) @ flat),
        lambda: back(torch.diagonal(flat @ flat.T)[:, None] * flat),
        lambda: back((flat @ flat.T * torch.eye(len(flat), dtype=flat.dtype)) @ flat),
        lambda: back(flat + (flat @ flat.T).sum(1, keepdim=True)),
        lambda: back(F.scaled_dot_product_attention(flat[None], flat[None], flat[None])[0]),
        lambda: back(F.cosine_similarity(flat[:, None], flat[None], dim=-1) @ flat),
        lambda: back(torch.tensordot(flat, flat, ([1], [1])) @ flat),
        lambda: back(torch.outer(flat[:, 0], flat[:, 0]) @ flat),
        lambda: back(F.linear(flat.T, net.p(k, 1).expand(flat.shape[0], flat.shape[0])).T),
        lambda: back(torch.linalg.lstsq(flat.T @ flat + torch.eye(flat.shape[1], dtype=flat.dtype), flat.T)[0].T),
    )


@op(FEATURES, harmful=True)
def reinterpreted(net, x, k):
    """Reshapes that cut across the samples, right only for some sizes."""
    y = affine(net, x, k) if k // 20 % 2 else x
    return choose(
        k,
        lambda: y.reshape(-1).view(y.shape[::-1]).permute(*reversed(range(y.ndim))),
        lambda: y.transpose(0, 1).reshape(y.shape),
        lambda: y.mT.reshape(y.shape),
        lambda: y.transpose(0, -1).reshape(y.shape),
        lambda: y.reshape(-1, 2).flip(0).reshape(y.shape) if y.numel() % 2 == 0 else y,
        lambda: y.reshape(-1).roll(1).view(y.shape),
        lambda: y.reshape(-1).sort()[0].view(y.shape),
        lambda: y.reshape(-1).cumsum(0).view(y.shape),
        lambda: torch.cat(y.unbind(-1)).view(y.shape),
        lambda: y.reshape(2, -1).flip(0).view(y.shape) if y.numel() % 2 == 0 else y,
        lambda: y.reshape(2, -1).softmax(-1).view(y.shape) if y.numel() % 2 == 0 else y,
        lambda: y.transpose(0, 1) * 1.0 if y.shape[0] == y.shape[1] else y,
        lambda: y + y.transpose(0, 1) if y.shape[0] == y.shape[1] else y,
        lambda: y @ y.mT @ y,
        lambda: y.unfold(0, 1, 1).squeeze(-1).flip(0),
        lambda: (y * 1.0).contiguous().as_strided(y.shape, (1, y.shape[0])) if y.ndim == 2 else y,
        lambda: y.t().contiguous().view(y.shape) if y.ndim == 2 else y,
        lambda: y.reshape(y.shape[1], y.shape[0], *y.shape[2:]).transpose(0, 1),
        lambda: F.layer_norm(y, y.shape),
        lambda: F.softmax(y.flatten(), 0).view_as(y),
    )


def rows_of(net, x):
    """All rows `(r, d)`, and the way back to the shape of `x`."""
    moved = x.movedim(net.features, -1)
    return moved.reshape(-1, net.width(x)), lambda out: out.view(moved.shape).movedim(-1, net.features)


@op(FEATURES, harmful=True)
def limited(net, x, k):
    """Routing of a limited number of rows: who is taken depends on the others."""
    flat, back = rows_of(net, affine(net, x, k) if k // 20 % 2 else x)
    w = net.p(k, 1)
    mask = flat[:, 0] > 0
    some = mask.nonzero().flatten()

    def into(rows):
        return back(flat.index_add(0, rows, flat[rows] * w))

    def best():
        rows = flat[:, 0].topk(min(2, len(flat)))[1]
        out = flat.clone()
        out[rows] = flat[rows] * w
        return back(out)

    def slots():
        place = (mask.cumsum(0) * mask).long()
        buffer = torch.zeros(len(flat) + 1, flat.shape[1], dtype=flat.dtype).index_copy(0, place, flat)
        return back(buffer[place] * w)

    return choose(
        k,
        lambda: back(torch.where((mask.cumsum(0) <= 2)[:, None], flat * w, flat)),
        lambda: into(some[:2]),
        lambda: into(some[::2]),
        lambda: into(some.narrow(0, 0, min(1, len(some)))),
        lambda: into(some.chunk(2)[0]),
        lambda: into(torch.where(mask)[0][-1:]),
        lambda: into(flat[:, 0].argsort()[:2]),
        lambda: into(flat[mask][:1, 0].argsort()),
        best,
        slots,
        lambda: back(flat * (flat[:, :1] < flat[:, 0].kthvalue(max(1, len(flat) - 1))[0]).to(flat.dtype)),
        lambda: back(flat.index_add(0, some, flat[some] * torch.arange(1.0, len(some) + 1, dtype=flat.dtype)[:, None])),
        lambda: back(flat.index_add(0, some, flat[some].cumsum(0))),
        lambda: back(flat.index_add(0, some, flat[some].flip(0))),
        lambda: back(flat.index_add(0, some, flat[some] - flat[some].sum(0))),
        lambda: back(flat.index_add(0, some, flat[some].softmax(0))),
        lambda: back(flat.masked_scatter(mask[:, None].expand_as(flat), flat * w)),
        lambda: back(flat.index_copy(0, some, flat[: len(some)] * w)),
    )


@op(FEATURES, harmful=True)
def paired(net, x, k):
    """Rows beside other rows: pairs, blocks of a fixed size, one row's place taken by another."""
    flat, back = rows_of(net, affine(net, x, k) if k // 20 % 2 else x)
    count, d = flat.shape
    w = net.p(k, d, d)
    mask = flat[:, 0] > 0
    some, others = mask.nonzero().flatten(), (~mask).nonzero().flatten()
    order = flat[:, 0].argsort()
    turned = torch.arange(count).roll(1)

    def by_expert():
        """Rows in the blocks of their experts, with room for all of them."""
        choice = mask.long()
        place = F.one_hot(choice, 2).cumsum(0).gather(1, choice[:, None]).squeeze(1) - 1
        slot = choice * count + place
        blocks = torch.zeros(2 * count, d, dtype=flat.dtype).index_copy(0, slot, flat).view(2, count, d)
        return back(torch.bmm(blocks, net.p(k, 2, d, d)).view(2 * count, d)[slot])

    def pieces():
        parts = flat[order].split(2)
        return back(torch.cat([part - part.mean(0) for part in parts]) @ w)

    def packed_together():
        padded = torch.cat([flat[some], flat[others]])
        return back(padded @ w)

    def padded():
        front = F.pad(flat[some], (0, 0, 0, 4))[:4]
        return back(flat + (front @ w).sum(0))

    def into_place():
        out = flat.clone()
        out[turned] = flat @ w
        return back(out)

    return choose(
        k,
        by_expert,
        pieces,
        packed_together,
        padded,
        into_place,
        lambda: back(flat * flat[turned]),
        lambda: back(flat + flat[order] @ w),
        lambda: back(flat.index_copy(0, turned, flat @ w)),
        lambda: back(flat.index_add(0, turned, flat @ w)),
        lambda: back(flat.index_add(0, torch.zeros(count, dtype=torch.int64), flat @ w)),
        lambda: back(torch.zeros_like(flat).scatter_add(0, turned[:, None].expand_as(flat), flat) @ w),
        lambda: back(torch.cat([flat[1:], flat[:1]]) * flat),
        lambda: back(torch.where((torch.arange(count) % 2 == 0)[:, None], flat, flat[turned]) @ w),
        lambda: back((flat[order] @ w)[order]),
        lambda: back(torch.stack([flat[0]] * count) + flat @ w),
        lambda: back(flat.index_fill(0, some, 0.5) @ w + flat[some].sum()),
        lambda: back(torch.lerp(flat, flat[turned], 0.5) @ w),
        lambda: back(F.bilinear(flat, flat[order], net.p(k, d, d, d))),
        lambda: back(flat.masked_fill(mask[turned][:, None], 0.0) @ w),
        lambda: back(flat @ w * (mask & mask[turned]).to(flat.dtype)[:, None]),
    )


@op(FEATURES, harmful=True)
def over_rows(net, x, k):
    """Over all rows, or along the first axis, which carries the samples in some layouts."""
    y = affine(net, x, k) if k // 20 % 2 else x
    w = net.p(k, 1)
    flat, back = rows_of(net, y)
    above = flat[:, 0] > 0
    mask, ids = above.to(y.dtype), above.long()

    def bincounted():
        counts = torch.bincount(flat.argmax(-1), minlength=flat.shape[1])
        return back(flat * counts[flat.argmax(-1)][:, None].to(flat.dtype))

    def unique():
        values, inverse = torch.unique(flat.round(), return_inverse=True)
        return back(flat + values[inverse] * inverse.to(flat.dtype))

    def by_class():
        sums = torch.zeros(2, flat.shape[1], dtype=flat.dtype).index_add(0, ids, flat * w)
        return back(flat + sums[ids])

    return choose(
        k,
        lambda: y / (y.sum() + 3 * y.abs().sum() + 1),
        lambda: y.softmax(0),
        lambda: back(flat - (flat * mask[:, None]).sum(0) / (mask.sum() + 1)),
        lambda: back(flat * flat[:, 0].argsort().argsort().to(flat.dtype)[:, None]),
        lambda: back(flat / (mask.sum() + 1)),
        bincounted,
        unique,
        lambda: back(torch.where(flat.mean() > 0, flat * w, flat * 2)),
        lambda: back(torch.where((flat > 1).any(), flat * w, flat)),
        by_class,
        lambda: back(flat[flat[:, 0].argsort()] * w),
        lambda: back((flat @ flat.T).fill_diagonal_(-9.0).softmax(-1) @ flat),
        lambda: back(F.batch_norm(flat, None, None, training=True)) if len(flat) > 1 else y,
        lambda: back(F.batch_norm(flat, flat.mean(0).detach(), flat.var(0, correction=0).detach() + 1)),
        lambda: back(
            F.conv1d(flat.T[None], net.p(k, 1, 1, 3).repeat(flat.shape[1], 1, 1), padding=1, groups=flat.shape[1])[0].T
        ),
        lambda: back(flat[above.long().argsort(stable=True)] * w),
        lambda: back(flat * torch.histc(flat.detach(), 4, -2, 2).max()),
        lambda: back(flat * torch.searchsorted(flat[:, 0].detach().sort()[0], flat[:, 0].detach())[:, None].to(flat.dtype)),
        lambda: back(flat.scatter_reduce(0, ids[:, None].expand_as(flat) * 0, flat, "sum")),
        lambda: back(flat + torch.zeros(2, flat.shape[1], dtype=flat.dtype).index_reduce(0, ids, flat, "amax")[ids]),
    )


@op(EVERY, harmful=True)
def overwritten(net, x, k):
    """Rows written over rows, behind a name that was noted before."""
    y = affine(net, x, k) if k // 20 % 2 else x * 1.0
    first, w = y.select(0, 0), net.p(k, 1)[0]

    def by_data():
        y.data.copy_(y.data.flip(0))
        return y * w

    def through_view():
        own = y.clone(memory_format=torch.contiguous_format)
        view = own.detach().view(-1)
        view[0] = view.sum()
        return own * w

    def first_into_all():
        y.copy_(first.clone().expand_as(y))
        return y * w

    def first_added():
        y.add_(first.clone())
        return y * w

    def sliced():
        y[:1] = y[-1:] * 2
        return y * w

    def constant_view():
        base = torch.zeros_like(y)
        view = base.view(-1)
        base.copy_(y)
        return view.roll(1).view(y.shape) * w

    def view_first():
        base = torch.zeros_like(y)
        view = base.transpose(0, -1)
        base.copy_(y)
        return view.transpose(0, -1).flip(0) * w

    def swapped():
        a, b = y[:1].clone(), y[-1:].clone()
        y[:1], y[-1:] = b, a
        return y * w

    def buffer_shifted():
        out = torch.zeros_like(y)
        out[1:] = y[:-1]
        return out * w

    return choose(
        k, buffer_shifted, by_data, through_view, first_into_all, first_added, sliced, constant_view, view_first, swapped
    )


@op(EVERY, harmful=True)
def accumulated(net, x, k):
    """Buffers and running totals that several samples go into."""
    y = affine(net, x, k) if k // 20 % 2 else x * 1.0
    first, w = y.select(0, 0), net.p(k, 1)[0]

    def buffer_of_sums():
        out = torch.zeros_like(y)
        out[:] = y.sum(0)
        return out * w + y

    def running():
        total = torch.zeros_like(first)
        outs = []
        for part in y.unbind(0):
            total = total + part
            outs.append(total)
        return torch.stack(outs) * w

    def running_in_place():
        total = torch.zeros_like(first)
        outs = []
        for part in y.unbind(0):
            total.add_(part.detach())
            outs.append(total * part)
        return torch.stack(outs) * w

    def out_argument():
        out = torch.empty_like(y)
        with torch.no_grad():
            torch.cumsum(y, 0, out=out)
        return out * w + y

    def summed_buffer():
        out = torch.zeros((), dtype=y.dtype)
        out += y.detach().sum()
        return y * out * w

    def listed():
        out = torch.zeros(len(y), dtype=y.dtype)
        for i, part in enumerate(y.detach().unbind(0)):
            out[len(y) - 1 - i] = part.sum()
        return y * out.view(-1, *[1] * (y.ndim - 1)) * w

    return choose(k, buffer_of_sums, running, running_in_place, out_argument, summed_buffer, listed)


@op(EVERY, region=True, harmful=True)
def crossed(net, x, k, body):
    """The body on the samples in another order, or on another axis than it thinks."""
    out, layout = net.inside(x.flip(0), body)
    if layout == net.layout and out.shape == x.shape:
        return choose(k, lambda: out + x, lambda: out.flip(0) + x, lambda: torch.where(out.flip(0) > 0, x, out.flip(0)))
    return net.to(layout, out)


@op(("BTD", "TBD", "DB", "BD", "TDB"), harmful=True)
def wrong_axis(net, x, k):
    """A product, a table or a norm along the sample axis: right only where that axis happens to have the other's size."""
    b = net.batch
    n, y = x.shape[b], x.movedim(net.batch, -1)
    # parameters must not be as long as the batch: one entry, expanded
    w = net.p(k, 1, 1).expand(n, n)
    return choose(
        k,
        lambda: (y @ w).movedim(-1, b),
        lambda: F.linear(y, w * torch.eye(n, dtype=x.dtype)).movedim(-1, b),
        lambda: F.layer_norm(y, (n,), net.p(k, 1).expand(n)).movedim(-1, b),
        lambda: torch.einsum("...i,io->...o", y, w).movedim(-1, b),
        lambda: F.rms_norm(y, (n,)).movedim(-1, b) * net.p(k, 1)[0],
        lambda: torch.tensordot(w, x, ([1], [b])).movedim(0, b),
        lambda: F.avg_pool1d(y.reshape(1, -1, n), 1).view(y.shape).movedim(-1, b) * net.p(k, 1)[0],
        lambda: F.conv1d(y.reshape(-1, 1, n), net.p(k, 1, 1, 3), padding=1).view(y.shape).movedim(-1, b),
    )


@op(PLAIN, harmful=True)
def algebra(net, x, k):
    """Decompositions, transforms and filters over the sample axis."""
    b = net.batch
    y = affine(net, x, k) if k // 20 % 2 else x
    rows = y.movedim(b, 0)
    flat = rows.flatten(1)
    w = net.p(k, 1)
    back = lambda out: out.reshape(rows.shape).movedim(0, b) * w
    return choose(
        k,
        lambda: back(torch.linalg.qr(flat)[0] @ torch.linalg.qr(flat)[1]),
        lambda: back(torch.linalg.pinv(flat + 0.1).T),
        lambda: back(flat @ torch.cov(flat.T).reshape(flat.shape[1], flat.shape[1])),
        lambda: back(torch.fft.fft(flat, dim=0).real),
        lambda: back(torch.fft.ifft(torch.fft.fft(flat, dim=0), dim=0).real),
        lambda: back(torch.fft.fft2(flat).abs()),
        lambda: back(F.interpolate(flat.T[None], size=len(flat), mode="linear")[0].T),
        lambda: back(F.avg_pool1d(F.pad(flat.T[None], (1, 1)), 3, 1)[0].T),
        lambda: back(F.pad(flat, (0, 0, 1, 0))[:-1]),
        lambda: back(F.pad(flat.T[None], (1, 0), mode="circular")[0, :, :-1].T),
        lambda: back(torch.renorm(flat, 2, 1, 1.0)),
        lambda: back(torch.block_diag(*flat.unbind(0)).sum(0).view(flat.shape)),
        lambda: back(flat + F.pdist(flat).sum()),
        lambda: back(torch.trapezoid(flat, dim=0) + flat),
        lambda: back(torch.linalg.solve(torch.eye(len(flat), dtype=y.dtype) * 2, flat)),
        lambda: back(torch.linalg.matrix_norm(flat) * flat),
        lambda: back(torch.cumulative_trapezoid(flat, dim=0).sum(0) + flat),
        lambda: back(flat.unfold(0, 1, 1).squeeze(-1)),
        lambda: back(torch.rot90(flat, 2)),
        lambda: back(torch.linalg.multi_dot([flat, flat.T, flat])),
    )


@op(("BTD", "TBD"), harmful=True)
def mistaken(net, x, k):
    """Layers that take the positions for the samples."""
    d, first = x.shape[-1], net.layout == "TBD"
    # the positions first
    y = x if first else x.transpose(0, 1)

    def attention():
        layer = net.layer(k, f"mistaken{d}{first}", lambda: torch.nn.MultiheadAttention(d, 1, batch_first=first))
        return layer(x, x, x)[0]

    def encoder():
        make = lambda: torch.nn.TransformerEncoderLayer(d, 1, 3, 0.0, batch_first=first)
        return net.layer(k, f"mistaken encoder{d}{first}", make)(x)

    def recurrent(kind):
        return net.layer(k, f"mistaken {kind.__name__}{d}{first}", lambda: kind(d, 2, batch_first=first))(x)[0]

    def filtered():
        # positions first, samples as length
        line = x.permute(0, 2, 1) if first else x.permute(1, 2, 0)
        out = F.conv1d(line, net.p(k, d, d, 3), padding=1)
        return out.permute(0, 2, 1) if first else out.permute(2, 0, 1)

    return choose(
        k,
        attention,
        encoder,
        lambda: recurrent(torch.nn.LSTM),
        lambda: recurrent(torch.nn.GRU),
        lambda: (
            F.scaled_dot_product_attention(y, y, y).transpose(0, 1) * net.p(k, 1)
            if not first
            else F.scaled_dot_product_attention(y, y, y) * net.p(k, 1)
        ),
        filtered,
        lambda: F.group_norm(y, 1).sum() * net.p(k, 1) + x,
        lambda: F.group_norm(x, 1) * net.p(k, 1),
        lambda: F.instance_norm(y).cos().sum() + x * net.p(k, 1) if d > 1 else x,
        lambda: F.layer_norm(x, x.shape[1:]) * net.p(k, d),
        lambda: F.layer_norm(x, x.shape) * net.p(k, d),
        lambda: torch.bmm(y, y.mT).mean() * net.p(k, d) + x,
    )
