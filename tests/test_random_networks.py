"""Random small networks: exact against a batch-of-one loop, or refused. Never silently wrong.

`SAMPLEWISE_NETWORKS=3000 pytest tests/test_random_networks.py -s` runs more of them and prints what was refused.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import samplewise as sw

EXAMPLES = int(os.environ.get("SAMPLEWISE_NETWORKS", "150"))
COUNTS: Counter[str] = Counter()
# Layouts: letters of the axes; M is samples and positions merged, X positions and samples
Step = tuple[str, int]
Op = Callable[["Network", Tensor, int], Tensor]


class Network(nn.Module):
    """A program of named ops; parameters are made when first used, and used again wherever shape and number agree."""

    def __init__(self, steps: list[Step], batch_dim: int, loss: int) -> None:
        super().__init__()
        self.steps, self.batch_dim, self.loss = steps, batch_dim, loss
        self.table, self.layers = nn.ParameterDict(), nn.ModuleDict()

    def p(self, k: int, *shape: int) -> nn.Parameter:
        name = "x".join(map(str, shape)) + f"_{k % 2}"
        if name not in self.table:
            self.table[name] = nn.Parameter(torch.randn(shape, dtype=torch.float64) / 2)
        return self.table[name]

    def layer(self, k: int, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        key = f"{name}_{k % 2}".replace(".", "_")
        if key not in self.layers:
            self.layers[key] = make().double()
        return self.layers[key]

    def forward(self, x: Tensor) -> Tensor:
        self.size, self.layout = x.shape[self.batch_dim], "BTD" if self.batch_dim == 0 else "TBD"
        self.length, self.kept = x.shape[1 - self.batch_dim], [(x, self.layout)]
        self.ran: list[str] = []
        for name, k in self.steps:
            layouts, op = OPS[name]
            if self.layout in layouts:
                self.ran.append(name)
                x = op(self, x, k)
                self.kept.append((x, self.layout))
        return x

    def to(self, layout: str, x: Tensor) -> Tensor:  # type: ignore[override]
        self.layout = layout
        return x

    def losses(self, x: Tensor) -> Tensor:
        out = self(x)
        if self.layout in {"MD", "XD"}:
            out = (
                out.reshape(self.size, -1, out.shape[-1])
                if self.layout == "MD"
                else out.reshape(-1, self.size, out.shape[-1]).transpose(0, 1)
            )
        elif self.layout == "TBD":
            out = out.transpose(0, 1)
        out = out.flatten(1)
        if self.loss == 1 and out.shape[1] > 1:
            return F.cross_entropy(out, torch.zeros(len(out), dtype=torch.int64), reduction="none")
        if self.loss == 2:
            return F.mse_loss(out, torch.ones_like(out), reduction="none").mean(-1)
        return (out * (out.cos() + 1.5)).sum(1)


# --- ops on the last axis, in any layout -----------------------------------------------------------------------------------------


def widths(k: int) -> int:
    return 2 + k % 3


def earlier(net: Network, x: Tensor, k: int) -> Tensor:
    """A kept value of the same layout and shape, else `x`."""
    same = [v for v, layout in net.kept if layout == net.layout and v.shape == x.shape]
    return same[k % len(same)] if same else x


def derived(net: Network, k: int, o: int, i: int) -> Tensor:
    """A weight computed from parameters."""
    v = net.p(k, o, i)
    choices: list[Callable[[], Tensor]] = [
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
    ]
    return choices[k % len(choices)]()


def written(net: Network, x: Tensor, k: int) -> Tensor:
    """Writes into a copy, into a view of it, or straight into `x`."""
    out = [x.clone(), x * 1, x, torch.zeros_like(x) + x][k % 4]
    part = out[..., 0]
    [
        lambda: part.mul_(2),
        lambda: part.add_(net.p(k, 1)),
        lambda: out.__setitem__((..., 0), net.p(k, 1)),
        lambda: out[..., :1].copy_(net.p(k, 1)),
        out[..., -1].tanh_,
    ][k % 5]()
    return out


def heads(net: Network, x: Tensor, k: int) -> Tensor:
    """Two heads merged with the samples, `(B * H, T, d)` or `(T, B * H, d)`."""
    a, b, d = x.shape
    wide = F.linear(x, net.p(k, 4, d))
    if net.layout == "BTD":
        q = wide.view(a, b, 2, 2).transpose(1, 2).reshape(a * 2, b, 2)
        q = torch.bmm((q @ q.mT).softmax(-1), F.linear(q, net.p(k, 2, 2)))
        return q.view(a, 2, b, 2).transpose(1, 2).reshape(a, b, 4)
    q = wide.contiguous().view(a, b * 2, 2).transpose(0, 1)
    q = torch.baddbmm(net.p(k, a, 2), (q @ q.mT).softmax(-1), q) * net.p(k, 2)
    return q.transpose(0, 1).contiguous().view(a, b, 4)


def convolved(net: Network, x: Tensor, k: int) -> Tensor:
    x, d = x.transpose(1, 2), x.shape[-1]
    choices = [
        lambda: F.conv1d(x, net.p(k, 3, d, 3), net.p(k, 3), padding=1),
        lambda: F.conv1d(x, net.p(k, d, 1, 2), padding="same", groups=d),
        lambda: F.group_norm(x, 1, net.p(k, d), net.p(k + 1, d)),
        lambda: F.instance_norm(x, weight=net.p(k, d)) if x.shape[2] > 1 else x,
        lambda: F.conv1d(F.pad(x, (1, 0)), derived(net, k, 2, 2 * d).view(2, d, 2)),
        lambda: F.avg_pool1d(F.pad(x, (1, 1)), 3, 1) * net.p(k, d, 1),
        lambda: net.layer(k, f"circular{d}", lambda: nn.Conv1d(d, 2, 1, padding_mode="circular"))(x),
        lambda: F.conv2d(x.unsqueeze(1), net.p(k, 2, 1, 1, 1)).sum(1),
    ]
    return choices[k % len(choices)]().transpose(1, 2)


def recurrent(net: Network, x: Tensor, k: int) -> Tensor:
    d, state, outs = x.shape[-1], torch.zeros(net.size, 2, dtype=x.dtype), []
    for step in x.unbind(0 if net.layout == "TBD" else 1):
        state = torch.tanh(F.linear(step, net.p(k, 2, d), net.p(k, 2)) + F.linear(state, net.p(k, 2, 2)))
        outs.append(state)
    return torch.stack(outs, 0 if net.layout == "TBD" else 1)


def attention(net: Network, x: Tensor, k: int) -> Tensor:
    d, first = x.shape[-1], net.layout == "BTD"
    if k % 3 == 0:
        mha = net.layer(
            k,
            f"mha{d}{first}",
            lambda: nn.MultiheadAttention(d, 1, batch_first=first, bias=bool(k % 2), add_bias_kv=k % 4 == 3),
        )
        return mha(x, earlier(net, x, k), x, need_weights=k % 5 == 0)[0]
    x = x if first else x.transpose(0, 1)
    q, v = F.linear(x, net.p(k, 3 * d, d)).chunk(3, -1)[:2]
    out = (
        F.scaled_dot_product_attention(q, x, v, is_causal=True)
        if k % 3 == 1
        else ((q @ x.transpose(-2, -1)) + net.p(k, x.shape[1], x.shape[1])).softmax(-1) @ v
    )
    return out if first else out.transpose(0, 1)


def embedded(net: Network, x: Tensor, k: int) -> Tensor:
    ids = x.argmax(-1)
    return F.embedding(ids, net.p(k, x.shape[-1], 3), padding_idx=k % 2 - 1 if k % 2 == 0 else 0) + x.sum(-1, keepdim=True)


def positions(net: Network, x: Tensor, k: int) -> Tensor:
    t, d = (x.shape[1], x.shape[2]) if net.layout == "BTD" else (x.shape[0], x.shape[2])
    if net.layout == "BTD":
        return (
            x
            + [
                lambda: net.p(k, t, d),
                lambda: net.p(k, 1, t, d),
                lambda: net.p(k, t + 2, d)[:t],
                lambda: F.embedding(torch.arange(t), net.p(k, 5, d)),
                lambda: net.p(k, t, 1),
                lambda: F.embedding(torch.arange(t)[None], net.p(k, 5, d)),
            ][k % 6]()
        )
    return (
        x
        * [
            lambda: net.p(k, t, 1, d),
            lambda: net.p(k, t, 1, 1),
            lambda: F.embedding(torch.arange(t)[:, None], net.p(k, 5, d)),
            lambda: net.p(k, t + 1, 1, d)[1:],
        ][k % 4]()
    )


def token(net: Network, x: Tensor, k: int) -> Tensor:
    d = x.shape[-1]
    if net.layout == "BTD":
        return (
            torch.cat([net.p(k, 1, 1, d).expand(net.size, -1, -1), x], 1)
            if k % 2
            else torch.cat([x, net.p(k, d).expand(net.size, 2, d).clone()], 1)
        )
    return (
        torch.cat([net.p(k, 1, 1, d).expand(-1, net.size, -1), x])
        if k % 2
        else torch.cat([x, net.p(k, d).repeat(1, net.size, 1)])
    )


def along_positions(net: Network, x: Tensor, k: int) -> Tensor:
    dim = 1 if net.layout == "BTD" else 0
    return [
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
    ][k % 10]()


def pooled(net: Network, x: Tensor, k: int) -> Tensor:
    dim = 1 if net.layout == "BTD" else 0
    choices = [
        lambda: x.mean(dim),
        lambda: x.select(dim, 0),
        lambda: x.amax(dim),
        lambda: x.narrow(dim, -1, 1).squeeze(dim),
        lambda: x.logsumexp(dim),
    ]
    return net.to("BD", choices[k % 5]())


def mixed(net: Network, x: Tensor, k: int) -> Tensor:
    """Ops that bring the samples together: to be refused, or to do no harm."""
    dim = 1 if net.layout == "TBD" else 0
    choices = [
        lambda: x - x.mean(dim, keepdim=True),
        lambda: x.softmax(dim),
        lambda: x.flip(dim),
        lambda: x.cumsum(dim),
        lambda: x.roll(1, dim),
        lambda: x.sort(dim)[0],
        lambda: x * net.p(k, x.shape[-1]) + x.flip(dim),
        lambda: x.reshape(-1).view(x.shape[::-1]).permute(*reversed(range(x.ndim))),
        lambda: x.transpose(0, 1).reshape(x.shape),
        lambda: x / x.norm(),
        lambda: x.mT.reshape(x.shape),
        lambda: torch.cat([x, x], dim).narrow(dim, 1, x.shape[dim]),
        lambda: (
            F.batch_norm(x.reshape(-1, x.shape[-1]), None, None, training=True).reshape(x.shape)
            if x.numel() > x.shape[-1]
            else x
        ),
        lambda: x + F.linear(x.transpose(dim, 0), net.p(k, x.shape[-1], x.shape[-1])).cumsum(0).transpose(dim, 0),
        lambda: x[torch.arange(x.shape[0]).flip(0)] if dim == 0 else x,
        lambda: torch.einsum("ni...,mi...->ni...", x, x) if dim == 0 else x,
        lambda: x + net.kept[k % len(net.kept)][0].sum(),
        lambda: x * net.kept[0][0].amax(),
    ]
    return choices[k % len(choices)]()


ANY = ("BTD", "TBD", "MD", "XD", "BD")
LONG = ("BTD", "TBD")
OPS: dict[str, tuple[tuple[str, ...], Op]] = {
    "linear": (ANY, lambda net, x, k: F.linear(x, net.p(k, widths(k), x.shape[-1]), net.p(k, widths(k)) if k % 2 else None)),
    "square": (ANY, lambda net, x, k: F.linear(x, net.p(k, x.shape[-1], x.shape[-1]))),
    "matmul": (
        ANY,
        lambda net, x, k: [
            lambda: x @ net.p(k, x.shape[-1], 2),
            lambda: (net.p(k, 2, x.shape[-1]) @ x.mT).mT,
            lambda: x @ net.p(k, x.shape[-1])[:, None],
        ][k % 3](),
    ),
    "tied": (ANY, lambda net, x, k: (x @ net.p(k, x.shape[-1], 3)).tanh() @ net.p(k, x.shape[-1], 3).t()),
    "derived": (ANY, lambda net, x, k: F.linear(x, derived(net, k, widths(k), x.shape[-1]))),
    "einsum": (
        ANY,
        lambda net, x, k: torch.einsum(
            ["...i,oi->...o", "oi,...i->...o", "...i,oi,oi->...o"][k % 3],
            *[[x, net.p(k, 2, x.shape[-1])], [net.p(k, 2, x.shape[-1]), x], [x, *[net.p(k, 2, x.shape[-1])] * 2]][k % 3],
        ),
    ),
    "scale": (
        ANY,
        lambda net, x, k: [
            lambda: x * net.p(k, x.shape[-1]),
            lambda: net.p(k, 1) - x,
            lambda: x / (net.p(k, x.shape[-1]).square() + 1),
            lambda: x.addcmul(x, net.p(k, 1)),
            lambda: torch.maximum(x, net.p(k, x.shape[-1])),
            lambda: torch.where(x > 0, x, net.p(k, x.shape[-1]) * x),
            lambda: F.prelu(x.flatten(0, -2), net.p(k, 1)).view_as(x),
        ][k % 7](),
    ),
    "in place": (
        ANY,
        lambda net, x, k: [
            x.relu_,
            lambda: x.mul_(net.p(k, x.shape[-1])),
            lambda: x.add_(net.p(k, 1), alpha=2),
            lambda: F.leaky_relu(x, inplace=True),
            lambda: x.clamp_(-2, 2),
            lambda: x.sub_(earlier(net, x, k) * 0.5),
        ][k % 6](),
    ),
    "written": (ANY, written),
    "activation": (
        ANY,
        lambda net, x, k: [
            torch.tanh,
            F.gelu,
            F.silu,
            torch.sin,
            lambda t: t.clone(),
            lambda t: t.softmax(-1),
            lambda t: F.normalize(t, dim=-1),
        ][k % 7](x),
    ),
    "norm": (
        ANY,
        lambda net, x, k: [
            lambda: F.layer_norm(x, x.shape[-1:], net.p(k, x.shape[-1]), net.p(k + 1, x.shape[-1])),
            lambda: F.rms_norm(x, x.shape[-1:], net.p(k, x.shape[-1]), 1e-3),
            lambda: F.layer_norm(x, x.shape[-1:], None, net.p(k, x.shape[-1])),
        ][k % 3](),
    ),
    "residual": (
        ANY,
        lambda net, x, k: [
            lambda: x + earlier(net, x, k),
            lambda: x * earlier(net, x, k),
            lambda: torch.lerp(x, earlier(net, x, k), net.p(k, 1)),
        ][k % 3](),
    ),
    "features": (
        ANY,
        lambda net, x, k: [
            lambda: torch.cat([x, earlier(net, x, k)], -1),
            lambda: x[..., : max(1, x.shape[-1] - 1)],
            lambda: x.flip(-1),
            lambda: x.repeat(*[1] * (x.ndim - 1), 2),
            lambda: torch.stack([x, x * x], -1).flatten(-2),
            lambda: x[..., [0, 0]],
            lambda: F.pad(x, (1, 0)),
        ][k % 7](),
    ),
    "fallback": (
        ("BTD", "BD"),
        lambda net, x, k: (
            torch.cdist(x, net.p(k, 2, x.shape[-1]))
            if net.layout == "BTD"
            else x * F.cosine_similarity(x, net.p(k, 1, x.shape[-1]))[:, None]
        ),
    ),
    "bilinear": (
        ("BD", "BTD", "MD"),
        lambda net, x, k: F.bilinear(x, earlier(net, x, k), net.p(k, 2, x.shape[-1], x.shape[-1]), net.p(k, 2)),
    ),
    "swap": (
        LONG,
        lambda net, x, k: net.to(
            "TBD" if net.layout == "BTD" else "BTD",
            [lambda: x.transpose(0, 1), lambda: x.permute(1, 0, 2).contiguous(), lambda: x.movedim(0, 1)][k % 3](),
        ),
    ),
    "merge": (
        LONG,
        lambda net, x, k: net.to(
            "MD" if net.layout == "BTD" else "XD", [lambda: x.reshape(-1, x.shape[-1]), lambda: x.flatten(0, 1)][k % 2]()
        ),
    ),
    "split": (
        ("MD", "XD"),
        lambda net, x, k: net.to(
            *("BTD", x.reshape(net.size, -1, x.shape[-1])) if net.layout == "MD" else ("TBD", x.unflatten(0, (-1, net.size)))
        ),
    ),
    "pool": (LONG, pooled),
    "lengthen": (
        ("BD",),
        lambda net, x, k: net.to(
            "BTD" if k % 2 else "TBD",
            [
                lambda: x.unsqueeze(0),
                lambda: x[:, None],
                lambda: x.expand(3, *x.shape),
                lambda: x[:, :, None] * x[:, None],
                lambda: torch.stack([x, x.tanh()]),
                lambda: x.unsqueeze(1).repeat(1, 3, 1),
            ][k % 6](),
        ),
    ),
    "convolve": (("BTD",), convolved),
    "recur": (LONG, recurrent),
    "attend": (LONG, attention),
    "heads": (LONG, heads),
    "embed": (("BTD", "TBD", "BD"), embedded),
    "positions": (LONG, positions),
    "token": (LONG, token),
    "along": (LONG, along_positions),
    "expanded weight": (("BTD",), lambda net, x, k: torch.bmm(x, net.p(k, x.shape[-1], 2).expand(net.size, -1, -1))),
    "mixed": (ANY, mixed),
}


@st.composite
def networks(draw: st.DrawFn, *, harmful: bool) -> tuple[Network, Tensor]:
    names = [name for name in OPS if harmful or name != "mixed"]
    steps = draw(st.lists(st.tuples(st.sampled_from(names), st.integers(0, 59)), min_size=1, max_size=9), "steps")
    if harmful:
        steps.insert(draw(st.integers(0, len(steps))), ("mixed", draw(st.integers(0, 59))))
    net = Network(steps, draw(st.integers(0, 1), "batch_dim"), draw(st.integers(0, 2), "loss"))
    n, t, d = (
        draw(st.sampled_from([3, 2, 4, 1]), "n"),
        draw(st.sampled_from([3, 2, 4, 1]), "t"),
        draw(st.sampled_from([3, 2, 4]), "d"),
    )
    torch.manual_seed(n + 10 * t + 100 * d)
    return net, torch.randn((n, t, d) if net.batch_dim == 0 else (t, n, d), dtype=torch.float64)


def loop(net: Network, x: Tensor) -> dict[str, Tensor]:
    rows = []
    for piece in x.split(1, net.batch_dim):
        (loss,) = net.losses(piece.clone())
        rows.append(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, materialize_grads=True))
    return {name: torch.stack(grads) for (name, _), grads in zip(net.named_parameters(), zip(*rows, strict=True), strict=True)}


def attack(net: Network, x: Tensor) -> str:
    try:
        net.losses(x.clone()).sum().backward()
        assume(any(True for _ in net.parameters()))
        wanted = loop(net, x)
    except (RuntimeError, IndexError, ValueError):
        # not a network in plain PyTorch
        assume(False)
    net.zero_grad()
    assume(all(rows.isfinite().all() for rows in wanted.values()))
    try:
        with sw.record(net, batch_dim=net.batch_dim) as rec:
            rec.backward(net.losses(x.clone()))
    except sw.SamplewiseError as error:
        said = re.sub(r"\(.*?\)|'.*?'|\d", "", str(error))[:90]
        COUNTS[f"refused, {'harmful' if 'mixed' in net.ran else 'plain'}: {type(error).__name__} {said}"] += 1
        return "refused"
    flat = torch.cat([rows.flatten(1) for rows in wanted.values()], 1)
    for name, rows in rec.grads().items():
        torch.testing.assert_close(rows, wanted[name], rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(rec.norms(), flat.norm(dim=1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rec.gram(), flat @ flat.T, rtol=1e-6, atol=1e-7)
    weights = torch.arange(1.0, len(flat) + 1, dtype=flat.dtype)
    total = torch.cat([part.flatten() for part in rec.weighted_sum(weights).values()])
    torch.testing.assert_close(total, weights @ flat, rtol=1e-6, atol=1e-7)
    assert all(p.grad is None for p in net.parameters())
    return "exact"


CHECK = settings(
    deadline=None,
    derandomize=EXAMPLES <= 150,
    phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if EXAMPLES > 150 else [])],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


@settings(CHECK, max_examples=EXAMPLES)
@given(networks(harmful=False))
def test_networks_are_exact(case: tuple[Network, Tensor]) -> None:
    outcome = attack(*case)
    COUNTS[f"plain: {outcome}"] += 1
    event(outcome)


@settings(CHECK, max_examples=EXAMPLES)
@given(networks(harmful=True))
def test_networks_that_mix_samples_are_refused_or_exact(case: tuple[Network, Tensor]) -> None:
    COUNTS[f"harmful: {attack(*case)}"] += 1


def test_few_plain_networks_are_refused() -> None:
    """Runs after the two above: being exact by refusing everything would be no success."""
    sys.stdout.writelines(f"{count:6} {what}\n" for what, count in sorted(COUNTS.items()))
    exact, refused = COUNTS["plain: exact"], COUNTS["plain: refused"]
    assert refused <= 0.02 * (exact + refused)
