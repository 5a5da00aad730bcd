"""Layers: convolutions, recurrences, attention, normalisation, images."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, unpack_sequence

from .network import LONG, op
from .ops_rows import choose, derived


@op(("BCT",))
def convolve(net, x, k):
    d = x.shape[1]
    return choose(
        k,
        lambda: F.conv1d(x, net.p(k, 3, d, 3), net.p(k, 3), padding=1),
        lambda: F.conv1d(x, net.p(k, d, 1, 2), padding="same", groups=d),
        lambda: F.group_norm(x, 1, net.p(k, d), net.p(k + 1, d)),
        lambda: F.instance_norm(x, weight=net.p(k, d)) if x.shape[2] > 1 else x,
        lambda: F.conv1d(F.pad(x, (1, 0)), derived(net, k // 3, 2, 2 * d).view(2, d, 2)),
        lambda: F.avg_pool1d(F.pad(x, (1, 1)), 3, 1) * net.p(k, d, 1),
        lambda: net.layer(k, f"circular{d}", lambda: nn.Conv1d(d, 2, 1, padding_mode="circular"))(x),
        lambda: F.conv2d(x.unsqueeze(1), net.p(k, 2, 1, 1, 1)).sum(1),
        lambda: F.conv_transpose1d(x, net.p(k, d, 2, 2), net.p(k, 2), stride=2),
        lambda: F.conv1d(x, net.p(k, 2, d, 2), stride=2, padding=1, dilation=1),
        lambda: F.unfold(x.unsqueeze(1), (d, 1)).mul(1.5),
        lambda: F.interpolate(x, scale_factor=2),
        lambda: F.max_pool1d(F.pad(x, (1, 1)), 2, 1) * net.p(k, d, 1),
        lambda: net.layer(k, f"transposed{d}", lambda: nn.ConvTranspose1d(d, 2, 3, padding=1))(x),
        lambda: F.conv1d(x.reshape(1, -1, x.shape[2]), net.p(k, d, 1, 1).repeat(len(x), 1, 1), groups=len(x) * d).view(x.shape),
        lambda: net.layer(k, f"bn{d}", lambda: nn.BatchNorm1d(d)).eval()(x),
        lambda: F.conv1d(x, torch.softmax(net.p(k, 2, d, 1), 1)),
    )


@op(("BTD", "BD", "BCT"))
def to_image(net, x, k):
    if net.layout == "BD":
        out = choose(k, lambda: x[:, :, None, None].expand(-1, -1, 2, 3), lambda: (x[:, :, None] * x[:, None])[:, None])
    else:
        out = choose(
            k,
            lambda: x[:, None],
            lambda: x.unsqueeze(-1) * x.unsqueeze(-2),
            lambda: x.unsqueeze(2).repeat(1, 1, 2, 1),
            lambda: torch.einsum("bij,bik->bijk", x, x),
            lambda: x[:, None].expand(-1, 2, -1, -1) * net.p(k, 2, 1, 1),
        )
    return net.to("BCHW", out)


@op(("BCHW",))
def image(net, x, k):
    x = x.contiguous(memory_format=torch.channels_last) if k // 5 % 3 == 0 else x
    c, h, w = x.shape[1:]
    return choose(
        k,
        lambda: F.conv2d(x, net.p(k, 2, c, 3, 3), net.p(k, 2), padding=1),
        lambda: F.conv2d(x, net.p(k, 2, c, 1, 1)),
        lambda: F.conv2d(x, net.p(k, c, 1, 1, 2), groups=c, padding="same"),
        lambda: F.conv_transpose2d(x, net.p(k, c, 2, 2, 2), net.p(k, 2), padding=0),
        lambda: F.conv_transpose2d(x, net.p(k, c, 1, 1, 1), groups=c, stride=2),
        lambda: F.group_norm(x, 1, net.p(k, c), net.p(k + 1, c)),
        lambda: F.instance_norm(x, weight=net.p(k, c), bias=net.p(k, c)) if h * w > 1 else x,
        lambda: F.layer_norm(x.permute(0, 2, 3, 1), (c,), net.p(k, c)).permute(0, 3, 1, 2),
        lambda: F.layer_norm(x, (c, h, w), net.p(k, c, h, w)),
        lambda: F.max_pool2d(F.pad(x, (1, 0, 1, 0)), 2),
        lambda: F.adaptive_avg_pool2d(x, 1) * x,
        lambda: F.interpolate(x, scale_factor=2, mode="bilinear") if h * w < 20 else x,
        lambda: x * net.p(k, c, 1, 1) + net.p(k, 1, c, 1, 1),
        lambda: F.conv3d(x.unsqueeze(2), net.p(k, 2, c, 1, 1, 1)).squeeze(2),
        lambda: F.conv_transpose3d(x.unsqueeze(2), net.p(k, c, 2, 1, 1, 1)).mean(2),
        lambda: torch.einsum("oc,bchw->bohw", net.p(k, 2, c), x),
        lambda: F.unfold(x, 1).view(x.shape),
        lambda: net.layer(k, f"bn2d{c}", lambda: nn.BatchNorm2d(c)).eval()(x),
        lambda: (
            net.layer(k, f"conv{c}", lambda: nn.Conv2d(c, 2, 3, padding=1, padding_mode="reflect"))(x) if min(h, w) > 1 else x
        ),
        lambda: net.layer(k, f"last{c}", lambda: nn.Conv2d(c, 2, 1)).to(memory_format=torch.channels_last)(x),
        lambda: F.conv2d(F.conv2d(x, net.p(k, 2, c, 1, 1)), net.p(k, 2, c, 1, 1).transpose(0, 1)),
        lambda: x.permute(0, 2, 3, 1).reshape(-1, c).mul(net.p(k, c)).view(-1, h, w, c).permute(0, 3, 1, 2),
        lambda: F.linear(x.movedim(1, -1), net.p(k, 2, c)).movedim(-1, 1),
        lambda: F.prelu(x, net.p(k, c)),
        lambda: x.flatten(0, 1).unsqueeze(1).mul(net.p(k, 1)).view(x.shape),
        lambda: F.conv2d(x.flatten(0, 1).unsqueeze(1), net.p(k, 1, 1, 1, 1)).view(x.shape),
        lambda: F.conv2d(
            x.view(1, -1, h, w) if x.is_contiguous() else x.reshape(1, -1, h, w),
            torch.ones(len(x) * c, 1, 1, 1).double() * 2,
            groups=len(x) * c,
        ).view(x.shape),
    )


@op(("BCHW",))
def hypernet(net, x, k):
    """A convolution whose kernel is computed from the sample itself."""
    n, c, h, w = x.shape
    kernel = F.linear(x.mean((2, 3)), net.p(k, 2 * c, c))
    return choose(
        k,
        lambda: F.conv2d(x.reshape(1, n * c, h, w), kernel.view(2 * n, c, 1, 1), groups=n).view(n, 2, h, w),
        lambda: torch.einsum("nchw,noc->nohw", x, kernel.view(n, 2, c)),
        lambda: torch.stack([F.conv2d(x[i : i + 1], kernel[i].view(2, c, 1, 1))[0] for i in range(n)]),
        lambda: torch.bmm(kernel.view(n, 2, c), x.flatten(2)).view(n, 2, h, w),
        lambda: torch.vmap(lambda image, weight: F.conv2d(image[None], weight.view(2, c, 1, 1))[0])(x, kernel),
    )


@op(("BCHW",))
def from_image(net, x, k):
    choices = [
        ("BD", lambda: x.mean((2, 3))),
        ("BD", lambda: x.amax((-1, -2))),
        ("BCT", lambda: x.flatten(2)),
        ("BTD", lambda: x.flatten(2).mT),
        ("BTD", lambda: x.flatten(1, 2)),
        ("BD", lambda: F.adaptive_max_pool2d(x, 1).flatten(1)),
        ("TBD", lambda: x.flatten(2).permute(2, 0, 1)),
        ("BCT", lambda: x.mean(2)),
    ]
    layout, make = choices[k % len(choices)]
    return net.to(layout, make())


@op(LONG)
def recur(net, x, k):
    d, first = x.shape[-1], net.layout == "BTD"
    n, t = (x.shape[0], x.shape[1]) if first else (x.shape[1], x.shape[0])

    def cell():
        state, outs = torch.zeros(n, 2, dtype=x.dtype), []
        for step in x.unbind(1 if first else 0):
            state = torch.tanh(F.linear(step, net.p(k, 2, d), net.p(k, 2)) + F.linear(state, net.p(k, 2, 2)))
            outs.append(state)
        return torch.stack(outs, 1 if first else 0)

    def gru_cell():
        layer, state = net.layer(k, f"grucell{d}", lambda: nn.GRUCell(d, 2)), net.p(k, 2).expand(n, 2)
        outs = [state := layer(step, state) for step in x.unbind(1 if first else 0)]
        return torch.stack(outs, 1 if first else 0)

    def layer(kind, **options):
        return net.layer(k, f"{kind.__name__}{d}{first}{sorted(options)}", lambda: kind(d, 2, batch_first=first, **options))

    def packed():
        made = layer([nn.LSTM, nn.GRU][k // 7 % 2], bidirectional=k // 14 % 2 == 1)
        start = x[:, 0, 0] if first else x[0, :, 0]
        lengths = ((start > 0).long() * (t - 1) + 1).detach()
        sequence = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
        if k // 28 % 2 and first:
            return torch.stack([torch.cat([part.sum(0)] * 2) for part in unpack_sequence(made(sequence)[0])]).unsqueeze(1)
        return pad_packed_sequence(made(sequence)[0], batch_first=first, total_length=t)[0]

    def with_state():
        start = net.p(k, 1, 1, 2).expand(1, n, 2).contiguous()
        return layer(nn.GRU)(x, start)[0]

    def last_state():
        out, (h, c) = layer(nn.LSTM)(x)
        return out + (h[-1] * c[-1])[:, None] if first else out + h + c

    return choose(
        k,
        cell,
        gru_cell,
        lambda: layer(nn.LSTM)(x)[0],
        lambda: layer(nn.RNN, bidirectional=True)(x)[0],
        packed,
        with_state,
        last_state,
    )


@op(LONG)
def attend(net, x, k):
    d, first = x.shape[-1], net.layout == "BTD"

    def module():
        options = {"bias": bool(k % 2), "add_bias_kv": k // 3 % 4 == 3, "add_zero_attn": k // 5 % 4 == 3}
        made = net.layer(k, f"mha{d}{first}{options}", lambda: nn.MultiheadAttention(d, 1, batch_first=first, **options))
        return made(x, net.earlier(x, k), x, need_weights=k // 3 % 2 == 0)[0]

    def encoder():
        made = net.layer(
            k, f"encoder{d}{first}", lambda: nn.TransformerEncoderLayer(d, 1, 3, 0.0, batch_first=first, norm_first=bool(k % 2))
        )
        return made(x)

    if k % 6 in {0, 1}:
        return module() if k % 6 == 0 else encoder()
    y = x if first else x.transpose(0, 1)
    t = y.shape[1]
    q, v = F.linear(y, net.p(k, 3 * d, d)).chunk(3, -1)[:2]
    mask = torch.ones(t, t, dtype=torch.bool).tril()
    out = choose(
        k // 6 * 4 + k % 6 - 2,
        lambda: F.scaled_dot_product_attention(q, y, v, is_causal=True),
        lambda: ((q @ y.transpose(-2, -1)) + net.p(k, t, t)).softmax(-1) @ v,
        lambda: (q @ net.p(k, 4, d).t()).softmax(-1) @ net.p(k, 4, d),
        lambda: F.scaled_dot_product_attention(
            q, net.p(k, 1, 4, d).expand(len(q), -1, -1), net.p(k, 4, d).expand(len(q), 4, d)
        ),
        lambda: F.scaled_dot_product_attention(net.p(k, t, d).expand(len(q), -1, -1), y, v, attn_mask=mask),
        lambda: (q @ y.mT).masked_fill(~mask, -9.0).softmax(-1) @ v,
        lambda: F.scaled_dot_product_attention(q, y, v, attn_mask=net.p(k, t, t)),
        lambda: torch.einsum("bqd,bkd,de->bqk", q, y, net.p(k, d, d)).softmax(-1) @ v,
        lambda: torch.cat([net.p(k, 1, d).expand(len(q), 1, d), q], 1).softmax(1)[:, 1:] * v,
        lambda: torch.einsum("bqd,kd->bqk", q, net.p(k, 4, d)).softmax(-1) @ net.p(k, 4, d),
        lambda: torch.baddbmm(net.p(k, t, t), q, y.mT).softmax(-1) @ v,
        lambda: F.scaled_dot_product_attention(q[:, None], y[:, None], v[:, None])[:, 0],
    )
    return out if first else out.transpose(0, 1)


@op(LONG)
def heads(net, x, k):
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


@op(("BTD",))
def expanded_weight(net, x, k):
    d = x.shape[-1]
    w, v = net.p(k, d, 2), net.p(k, 2, d)
    return choose(
        k,
        lambda: torch.bmm(x, net.p(k, d, 2).expand(net.size, -1, -1)),
        lambda: torch.bmm(x, net.p(k, d, 2).repeat(net.size, 1, 1)),
        lambda: torch.bmm(x, torch.stack([net.p(k, d, 2)] * net.size)),
        lambda: torch.bmm(x, net.p(k, d, 2)[None].expand(len(x), d, 2) * x.mean((1, 2))[:, None, None]),
        lambda: torch.matmul(x[:, None], net.p(k, 3, d, 2)).flatten(1, 2),
        lambda: torch.baddbmm(net.p(k, 1, 1, 2), x, net.p(k, d, 2).expand(net.size, -1, -1)),
        lambda: torch.einsum("btd,bde->bte", x, net.p(k, d, 2).expand(net.size, -1, -1)),
        lambda: torch.vmap(lambda row: row @ w)(x),
        lambda: torch.vmap(lambda row, w: row @ w, in_dims=(0, None))(x, w),
        lambda: torch.vmap(F.linear, in_dims=(0, None))(x, v),
    )
