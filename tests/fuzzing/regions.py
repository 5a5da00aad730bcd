"""Steps that take the following steps as their body: routing, samples one by one, two views, checkpoints, modes."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .network import EVERY, LAST, PLAIN, SAMPLES, op
from .ops_rows import choose


def fitted(net, out, k, d):
    """Rows brought back to width `d`."""
    return out if out.shape[-1] == d else F.linear(out, net.p(k, d, out.shape[-1]))


def expert(net, x, k, body):
    """The body on some rows `(r, d)`, its result as wide as its input."""
    out, _ = net.inside(x, body, "RD")
    return fitted(net, out, k, x.shape[-1])


def wanted_rows(x, k):
    """A mask over the leading axes, by a condition on every row's own values."""
    weights = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
    return (x.detach() @ weights > 0) if k % 2 else x[..., 0] > 0


@op(LAST, region=True)
def masked(net, x, k, body):
    """Rows picked by a mask go through the body and are written to their places."""
    mask = wanted_rows(x, k)
    lead = mask.nonzero(as_tuple=True)
    run = lambda rows: expert(net, rows, k, body)

    def assigned(out, index):
        out[index] = run(x[index])
        return out

    def both():
        out = assigned(torch.empty_like(x), mask)
        out[~mask] = x[~mask] * net.p(k, x.shape[-1])
        return out

    def put():
        out = x * 1
        out.index_put_(lead, run(x[lead]))
        return out

    return choose(
        k // 2,
        lambda: assigned(x.clone(), mask),
        lambda: assigned(torch.zeros_like(x), lead) + x,
        lambda: x.index_put(lead, run(x[lead]), accumulate=k // 2 % 2 == 1),
        lambda: x.masked_scatter(mask.unsqueeze(-1).expand_as(x), run(x[mask])),
        both,
        put,
        lambda: torch.where(mask.unsqueeze(-1), run(x.reshape(-1, x.shape[-1])).view(x.shape), x),
        lambda: x * 0.5 + torch.zeros_like(x).index_put((mask,), run(x[mask])),
    )


@op(LAST, region=True)
def routed(net, x, k, body):
    """Rows picked by their numbers among all rows go through the body."""
    d = x.shape[-1]
    flat, mask = x.reshape(-1, d), wanted_rows(x, k).flatten()
    rows = choose(
        k // 20, lambda: mask.nonzero().squeeze(1), lambda: torch.where(mask)[0], lambda: torch.arange(len(flat))[mask]
    )
    out = expert(net, choose(k // 2, lambda: flat[rows], lambda: flat.index_select(0, rows)), k, body)
    wide = rows[:, None].expand(-1, d)
    return choose(
        k // 2,
        lambda: flat.index_add(0, rows, out),
        lambda: flat.index_copy(0, rows, out),
        lambda: torch.zeros_like(flat).scatter_add(0, wide, out) + flat,
        lambda: torch.zeros(len(flat), d, dtype=x.dtype).index_add_(0, rows, out),
        lambda: flat.scatter(0, wide, out),
        lambda: flat.clone().index_copy_(0, rows, out),
        lambda: flat.index_add(0, rows, out, alpha=0.5),
        lambda: flat.index_put((rows,), out, accumulate=True),
        lambda: flat.scatter_reduce(0, wide, out, "sum"),
    ).view(x.shape)


@op(LAST, region=True)
def experts(net, x, k, body):
    """Two experts, each on its own rows, joined again."""
    d = x.shape[-1]
    flat = x.reshape(-1, d)
    scores = F.linear(flat, net.p(k, 2, d)).softmax(-1)
    weight, choice = scores.topk(1 + k % 2, -1)

    def looped():
        out = torch.zeros_like(flat)
        for e in range(2):
            rows, place = (choice == e).nonzero(as_tuple=True)
            if len(rows):
                out.index_add_(0, rows, expert(net, flat[rows], 30 * e, body) * weight[rows, place, None])
        return out

    def out_of_place():
        out = flat * 0.1
        for e in range(2):
            rows = (choice[:, 0] == e).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, expert(net, flat[rows], 30 * e, body) * scores[rows, e : e + 1])
        return out

    def dense():
        every = torch.stack([expert(net, flat, 30 * e, body) for e in range(2)], 1)
        return (every.gather(1, choice[..., None].expand(-1, -1, d)) * weight[..., None]).sum(1)

    def by_weights():
        return torch.einsum("rk,rkdi,ri->rd", weight, net.p(k, 2, d, d)[choice], flat)

    def sorted_rows():
        order = choice[:, 0].argsort(stable=True)
        counts = [int((choice[:, 0] == e).sum()) for e in range(2)]
        parts = flat[order].split(counts)
        done = torch.cat([expert(net, part, 30 * e, body) for e, part in enumerate(parts) if len(part)])
        return done[order.argsort()] * weight[:, :1]

    return choose(k // 2, looped, out_of_place, dense, by_weights, sorted_rows).view(x.shape)


@op(("BD", "MD", "XD", "BTD"), region=True)
def sorted_and_back(net, x, k, body):
    """Rows in the order of their data, through the body, and back."""
    d = x.shape[-1]
    flat = x.reshape(-1, d)
    order = flat[:, 0].argsort(descending=bool(k % 2))
    run = lambda rows: expert(net, rows, k, body)

    def inverse():
        return run(flat[order])[order.argsort()]

    def scattered():
        out = torch.empty_like(flat)
        out[order] = run(flat[order])
        return out

    def selected():
        return run(flat.index_select(0, order)).index_select(0, torch.argsort(order))

    def gathered():
        wide = order[:, None].expand(-1, d)
        return run(flat.gather(0, wide)).gather(0, order.argsort()[:, None].expand(-1, d))

    def added():
        return torch.zeros_like(flat).index_add_(0, order, run(flat[order]))

    def copied():
        return torch.zeros_like(flat).index_copy(0, order, run(flat[order]))

    return choose(k // 2, inverse, scattered, selected, gathered, added, copied).view(x.shape)


@op(PLAIN, region=True)
def one_by_one(net, x, k, body):
    """The body on a batch of one, for every sample."""
    b, parts = net.batch, []
    layout = net.layout
    for i in range(net.size):
        part = choose(
            k // 3, lambda i=i: x.narrow(b, i, 1), lambda i=i: x.select(b, i).unsqueeze(b), lambda i=i: x.split(1, b)[i]
        )
        out, layout = net.inside(part, body, size=1)
        parts.append(out)
    # (T 1) D pieces side by side are one sample after the other
    return net.to("MD" if layout == "XD" else layout, torch.cat(parts, SAMPLES.get(layout, 0)))


@op(PLAIN, region=True)
def views_joined(net, x, k, body):
    """The samples and a second view of them as one batch."""
    b = net.batch
    both = choose(
        k // 3,
        lambda: torch.cat([x, x.sin()], b),
        lambda: torch.cat([x, x.flip(net.features)], b),
        lambda: x.repeat_interleave(2, b),
        lambda: torch.stack([x, x * 0.5], b + 1).flatten(b, b + 1),
    )
    out, layout = net.inside(both, body, size=2 * net.size)
    if layout == "XD":
        layout, out = "TBD", out.unflatten(0, (-1, 2 * net.size))
    if layout == "MD":
        layout, out = "BTD", out.unflatten(0, (2 * net.size, -1))
    dim = SAMPLES[layout]
    parts = out.chunk(2, dim) if k // 3 % 4 in {0, 1} else out.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return net.to(layout, parts[0] * 0.5 + parts[1].tanh())


@op(EVERY, region=True)
def checkpointed(net, x, k, body):
    layouts, start = [], net.layout

    def run(x):
        out, layout = net.inside(x, body, start)
        layouts.append(layout)
        return out

    size = net.size

    def kept_size(x):
        # recomputed in the backward, when the network is elsewhere
        before, net.size = net.size, size
        try:
            return run(x)
        finally:
            net.size = before

    if not x.requires_grad:
        x = x * net.aligned(net.p(k, net.width(x)), x)
    return net.to((out := checkpoint(kept_size, x, use_reentrant=bool(k % 2)), layouts[0])[1], out)


@op(EVERY, region=True)
def without_grad(net, x, k, body):
    with torch.no_grad():
        out, layout = net.inside(x, body)
    return net.to(layout, out)


@op(EVERY, region=True)
def grad_switched(net, x, k, body):
    """A region without gradients, and one with them inside it."""
    with torch.set_grad_enabled(k % 2 == 0):
        y = x * 0.5
        with torch.enable_grad():
            out, layout = net.inside(y + x, body)
    return net.to(layout, out)


@op(EVERY, region=True, coarse=True)
def autocast(net, x, k, body):
    short, net.short = net.short, not net.case.precise
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=net.short):
            out, layout = net.inside(x.float() if net.short else x * 1.0, body)
    finally:
        net.short = short
    return net.to(layout, out.double())


@op(EVERY, region=True)
def hooked(net, x, k, body):
    """The body as a module of its own, behind hooks that do nothing."""

    class Body(torch.nn.Module):
        def forward(self, x):
            self.result = net.inside(x, body)
            return self.result[0]

    module = Body()
    if k % 2:
        module.register_forward_hook(lambda module, args, out: out.view_as(out))
    out = module(x)
    return net.to(module.result[1], out)


@op(("BTD", "BD", "BCT", "BCHW"), region=True)
def mapped(net, x, k, body):
    """`torch.vmap` over the samples."""
    layouts = []
    if (key := (k, *body)) not in net.warm:
        # a parameter must not be made inside vmap
        net.warm.add(key)
        net.inside(x[:1].detach(), body, size=1)

    def one(row):
        out, layout = net.inside(row[None], body, size=1)
        layouts.append(layout)
        return out

    out = torch.vmap(one, randomness="different")(x)
    layout = layouts[0]
    if layout not in SAMPLES or SAMPLES[layout] != 0:
        # a body that turned the axes: its one sample comes first again
        moved = out.unsqueeze(1) if layout not in SAMPLES else out.movedim(1 + SAMPLES[layout], 1)
        return net.to("BD", moved.flatten(1))
    return net.to(layout, out.squeeze(1))


@op(EVERY, region=True)
def skipped(net, x, k, body):
    """A residual around the body, where it keeps shape and layout."""
    out, layout = net.inside(x, body)
    if layout == net.layout and out.shape == x.shape:
        return choose(
            k, lambda: x + out, lambda: out.clone().add_(x), lambda: torch.where(x > 0, out, x), lambda: x.clone().mul_(out)
        )
    return net.to(layout, out)


@op(PLAIN, region=True)
def chosen_samples(net, x, k, body):
    """Samples that fulfil a condition of their own go through the body, the others stay."""
    b = net.batch
    mask = (x.detach().movedim(b, 0).flatten(1).sum(1) > 0) if x.ndim > 1 else x.detach() > 0
    rows = mask.nonzero().flatten()
    if not len(rows):
        # made here as in the other cases: without a gradient where the region has none
        return x.clone()
    out, layout = net.inside(x.index_select(b, rows), body, size=len(rows))
    if layout != net.layout or out.shape[net.features] != x.shape[net.features] or out.shape[:b] != x.shape[:b]:
        return x
    if [s for i, s in enumerate(out.shape) if i != b] != [s for i, s in enumerate(x.shape) if i != b]:
        return x
    return choose(
        k // 3,
        lambda: x.index_copy(b, rows, out),
        lambda: x.index_add(b, rows, out),
        lambda: x.clone().index_copy_(b, rows, out),
        lambda: torch.zeros_like(x).index_add_(b, rows, out) + x,
        lambda: x.movedim(b, 0).index_put((rows,), out.movedim(b, 0)).movedim(0, b),
        lambda: torch.cat([out, x.index_select(b, (~mask).nonzero().flatten())], b).index_select(
            b, torch.cat([rows, (~mask).nonzero().flatten()]).argsort()
        ),
    )
