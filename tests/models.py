"""Realistic models, tiny and written by hand, each with a batch, its losses and what is special about it.

`MODELS`, at the end, is the table; test_models.py judges every entry, and docs/models_hand_built.md lists them.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

# also the length of several other axes: an axis must never be found by its size
N = 3


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def ints(high, *shape):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def values(out):
    """One loss per sample of whatever a model gives."""
    return (out * (out.cos() + 1.5)).flatten(1).sum(1)


def squares(model, batch):
    return values(model(*batch))


@dataclass(frozen=True)
class Model:
    make: Callable[[], nn.Module]
    # tensors with the samples on axis 0; others are given to every sample
    batch: tuple
    special: str
    losses: Callable = squares
    # what the message says where it is refused
    refused: str = ""
    # refused with good reason: its samples have no gradients of their own
    mixes: bool = False


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


# --- images ---------------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, i, o, stride, norm):
        super().__init__()
        self.body = nn.Sequential(
            conv(i, o, stride=stride, bias=False), norm(o), nn.ReLU(inplace=True), conv(o, o, bias=False), norm(o)
        )
        self.short = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), norm(o)) if i != o else nn.Identity()

    def forward(self, x):
        out = self.body(x)
        out += self.short(x)
        return F.relu_(out)


class ResNet(nn.Module):
    def __init__(self, norm=lambda c: nn.GroupNorm(2, c), channels_last=False):
        super().__init__()
        self.channels_last = channels_last
        self.stem = nn.Sequential(conv(3, 4, bias=False), norm(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        self.layers = nn.Sequential(Residual(4, 4, 1, norm), Residual(4, 6, 2, norm))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = x.to(memory_format=torch.channels_last) if self.channels_last else x
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.layers(self.stem(x)), 1), 1))


def used_batch_norm(channels):
    """As after some training."""
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.normal_(generator=torch.Generator().manual_seed(channels))
    norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(channels))
    return norm


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 4)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, c), nn.ReLU(), conv(c, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), conv(4, 2))
            for c in (4, 6, 8)
        )
        self.down = nn.Sequential(conv(10, 5, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(self.down(torch.cat(features, 1)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(c, 2, 1), nn.Conv2d(2, c, 1)

    def forward(self, x):
        return x * self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1)), inplace=True)).sigmoid()


class EfficientNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), used_batch_norm(6), nn.SiLU(inplace=True))
        self.depthwise = nn.Sequential(
            conv(6, 6, groups=6, bias=False, stride=2), used_batch_norm(6), nn.SiLU(inplace=True), SqueezeExcite(6)
        )
        self.project = nn.Sequential(nn.Conv2d(6, 4, 1, bias=False), used_batch_norm(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.project(self.depthwise(self.expand(x))).mean([2, 3]))


class ConvNeXtBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.depthwise, self.norm = conv(c, c, 5, groups=c), nn.LayerNorm(c, eps=1e-6)
        self.up, self.down = nn.Linear(c, 2 * c), nn.Linear(2 * c, c)
        self.gamma = nn.Parameter(0.5 * torch.ones(c))

    def forward(self, x):
        out = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(out)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, stride=2)
        self.blocks = nn.Sequential(ConvNeXtBlock(4), ConvNeXtBlock(4))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x)).mean([-2, -1])))


class UNet(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        block = lambda i, o: nn.Sequential(conv(i, o), nn.GroupNorm(2, o), nn.LeakyReLU(0.1, inplace=True))
        self.down = nn.ModuleList([block(2, 4), block(4, 6)])
        self.middle = block(6, 6)
        self.lift = nn.ModuleList(
            [nn.ConvTranspose2d(6, 6, 2, stride=2), nn.ConvTranspose2d(4, 4, 3, 2, 1, 1)]
            if transposed
            else [conv(6, 6, 1), conv(4, 4, 1)]
        )
        self.up = nn.ModuleList([block(12, 4), block(8, 4)])
        self.out, self.transposed = nn.Conv2d(4, 1, 1), transposed

    def forward(self, x):
        skips = []
        for block in self.down:
            skips.append(block(x if not skips else F.max_pool2d(skips[-1], 2)))
        x = self.middle(F.max_pool2d(skips[-1], 2))
        for lift, block in zip(self.lift, self.up, strict=True):
            x = x if self.transposed else F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat([skips.pop(), lift(x)], dim=1))
        return self.out(x)


class ViT(nn.Module):
    def __init__(self, d=4):
        super().__init__()
        self.patches = nn.Conv2d(3, d, 4, 4)
        self.token, self.positions = nn.Parameter(normal(1, 1, d)), nn.Parameter(normal(1, 5, d))
        layer = nn.TransformerEncoderLayer(d, 2, 6, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(d), enable_nested_tensor=False)
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


class WindowAttention(nn.Module):
    def __init__(self, d, heads, side):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(d, 3 * d), nn.Linear(d, d), heads
        self.table = nn.Parameter(normal((2 * side - 1) ** 2, heads))
        place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        apart = (place[:, :, None] - place[:, None]).permute(1, 2, 0) + side - 1
        self.register_buffer("index", apart[..., 0] * (2 * side - 1) + apart[..., 1])

    def forward(self, x, mask):
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (d // self.heads) ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        windows = mask.shape[0]
        scores = (scores.view(b // windows, windows, self.heads, t, t) + mask[None, :, None]).view(-1, self.heads, t, t)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))


class SwinBlock(nn.Module):
    def __init__(self, d, size, side, shift):
        super().__init__()
        self.size, self.side, self.shift = size, side, shift
        self.norm, self.attention = nn.LayerNorm(d), WindowAttention(d, 2, side)
        self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        region = torch.zeros(1, size, size, 1)
        for k, part in enumerate((slice(0, -side), slice(-side, -shift or None), slice(-shift or size, None))):
            region[:, part] += 3 * k
            region[:, :, part] += k
        same = self.partition(region).squeeze(-1)
        self.register_buffer("mask", -100.0 * (same[:, None] != same[:, :, None]).float())

    def partition(self, x):
        b, h, w, d = x.shape
        s = self.side
        return x.view(b, h // s, s, w // s, s, d).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, s * s, d)

    def reverse(self, windows):
        h, s = self.size, self.side
        b = windows.shape[0] // (h // s) ** 2
        return windows.view(b, h // s, h // s, s, s, -1).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, h, -1)

    def forward(self, x):
        out = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
        out = self.reverse(self.attention(self.partition(out), self.mask))
        x = x + torch.roll(out, (self.shift, self.shift), (1, 2))
        return x + self.mlp(x)


class Swin(nn.Module):
    def __init__(self, d=4):
        super().__init__()
        self.patches = nn.Conv2d(3, d, 2, 2)
        self.blocks = nn.Sequential(SwinBlock(d, 4, 2, 0), SwinBlock(d, 4, 2, 1))
        self.merge, self.head = nn.Linear(4 * d, 2 * d, bias=False), nn.Linear(2 * d, 3)

    def forward(self, x):
        x = self.blocks(self.patches(x).permute(0, 2, 3, 1))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.merge(x).mean((1, 2)))


class Mixer(nn.Module):
    def __init__(self, d=4, t=4):
        super().__init__()
        mlp = lambda i: nn.Sequential(nn.Linear(i, 5), nn.GELU(), nn.Linear(5, i))
        self.patches = nn.Conv2d(3, d, 4, 4)
        self.tokens, self.channels = mlp(t), mlp(d)
        self.norms = nn.ModuleList([nn.LayerNorm(d), nn.LayerNorm(d)])
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = x + self.tokens(self.norms[0](x).mT).mT
        return self.head((x + self.channels(self.norms[1](x))).mean(1))


class SpatialTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.locate = nn.Sequential(conv(2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 6))
        self.classify = nn.Sequential(conv(2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(75, 3))

    def forward(self, x):
        theta = self.locate(x).view(-1, 2, 3) + torch.tensor([[1.0, 0, 0], [0, 1, 0]], dtype=x.dtype)
        return self.classify(F.grid_sample(x, F.affine_grid(theta, x.size(), align_corners=False), align_corners=False))


class Capsules(nn.Module):
    """Dynamic routing between 8 lower and 3 upper capsules."""

    def __init__(self):
        super().__init__()
        self.primary = nn.Conv2d(2, 8, 3, 2)
        self.weight = nn.Parameter(0.3 * normal(3, 8, 4, 4))

    def forward(self, x):
        lower = squash(self.primary(x).view(x.shape[0], 8, 4))
        votes = torch.einsum("kpoi,npi->nkpo", self.weight, lower)
        logits = torch.zeros(x.shape[0], 3, 8, dtype=x.dtype)
        for _ in range(2):
            upper = squash(torch.einsum("nkp,nkpo->nko", logits.softmax(1), votes))
            logits = logits + torch.einsum("nkpo,nko->nkp", votes, upper)
        return squash(torch.einsum("nkp,nkpo->nko", logits.softmax(1), votes))


def squash(x):
    size = x.square().sum(-1, keepdim=True)
    return x * size / (1 + size) / (size + 1e-8).sqrt()


class MaskedConv(nn.Conv2d):
    def __init__(self, i, o, k):
        super().__init__(i, o, k, padding=k // 2)
        mask = torch.ones(k, k)
        mask[k // 2, k // 2 :] = 0
        mask[k // 2 + 1 :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class PixelCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = MaskedConv(1, 4, 5), MaskedConv(4, 8, 3)
        self.out = nn.Conv2d(4, 5, 1)

    def forward(self, x):
        a, b = self.second(F.elu(self.first(x))).chunk(2, 1)
        return self.out(a.tanh() * b.sigmoid())


def pixel_losses(model, batch):
    images, classes = batch
    return F.cross_entropy(model(images), classes, reduction="none").mean((1, 2))


# --- two views, conditions, generators --------------------------------------------------------------------------------------------


class Siamese(nn.Module):
    def __init__(self, joined):
        super().__init__()
        self.joined = joined
        self.tower = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))

    def forward(self, a, b):
        if self.joined:
            left, right = self.tower(torch.cat([a, b])).chunk(2)
        else:
            left, right = self.tower(a), self.tower(b)
        return F.cosine_similarity(left, right)[:, None] + (left - right).abs()


class InterleavedViews(nn.Module):
    """(n, views, d) made one long batch and back."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, views):
        n, k, _ = views.shape
        return F.normalize(self.tower(views.flatten(0, 1)), dim=-1).view(n, k, -1).mean(1)


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 2 * 3), nn.Sequential(nn.Linear(3, 5), nn.Softplus(), nn.Linear(5, 6))

    def forward(self, x, noise):
        mean, log_variance = self.encoder(x).chunk(2, dim=-1)
        return self.decoder(mean + noise * (0.5 * log_variance).exp()), mean, log_variance


def evidence(model, batch):
    x, noise = batch
    out, mean, log_variance = model(x, noise)
    divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum(1)
    return F.binary_cross_entropy_with_logits(out, x.sigmoid(), reduction="none").sum(1) + divergence


class FiLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.condition = nn.Embedding(5, 8)
        self.first, self.norm, self.last = conv(2, 4), nn.GroupNorm(2, 4, affine=False), conv(4, 2)

    def forward(self, x, kind):
        scale, shift = self.condition(kind)[:, :, None, None].chunk(2, 1)
        return self.last(F.relu(self.norm(self.first(x)) * (1 + scale) + shift))


class HyperNetwork(nn.Module):
    """Makes the weights of a small network for each sample."""

    def __init__(self):
        super().__init__()
        self.hyper = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4 * 5 + 5))

    def forward(self, x, task):
        made = self.hyper(task)
        weight, bias = made[:, :20].view(-1, 5, 4), made[:, 20:]
        return torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1) + bias


class SharedHyperNetwork(nn.Module):
    """Makes one convolution for all samples from a learned code."""

    def __init__(self):
        super().__init__()
        self.code = nn.Parameter(normal(3))
        self.hyper = nn.Linear(3, 4 * 2 * 9)

    def forward(self, x):
        return F.conv2d(x, self.hyper(self.code).view(4, 2, 3, 3), padding=1)


class TimeBlock(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.a, self.b = nn.Conv1d(i, o, 3, padding=1), nn.Conv1d(o, o, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(2, o), nn.GroupNorm(2, o)])
        self.time, self.short = nn.Linear(6, 2 * o), nn.Conv1d(i, o, 1)

    def forward(self, x, time):
        scale, shift = self.time(F.silu(time)).unsqueeze(-1).chunk(2, dim=1)
        out = F.silu(self.norms[0](self.a(x)) * (scale + 1) + shift)
        return F.silu(self.norms[1](self.b(out)), inplace=True) + self.short(x)


class Diffusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 6))
        self.down, self.middle, self.up = TimeBlock(2, 4), TimeBlock(4, 4), TimeBlock(8, 4)
        self.shrink, self.grow, self.out = (
            nn.Conv1d(4, 4, 3, 2, 1),
            nn.ConvTranspose1d(4, 4, 4, 2, 1),
            nn.Conv1d(4, 2, 1),
        )

    def forward(self, x, t):
        frequencies = torch.exp(-math.log(100) * torch.arange(2, dtype=x.dtype) / 2)
        angle = t[:, None].to(x.dtype) * frequencies[None]
        time = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        skip = self.down(x, time)
        middle = self.middle(self.shrink(skip), time)
        return self.out(self.up(torch.cat([self.grow(middle), skip], 1), time))


class Flow(nn.Module):
    """Affine coupling layers."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(3))

    def forward(self, x):
        total = x.new_zeros(x.shape[0])
        for net in self.nets:
            kept, moved = x.split(2, 1)
            shift, scale = net(kept).chunk(2, 1)
            x = torch.cat([moved * scale.tanh().exp() + shift, kept], 1)
            total = total + scale.tanh().sum(1)
        return x, total


def likelihood(model, batch):
    latent, total = model(*batch)
    return 0.5 * latent.pow(2).sum(-1) - total


# --- sequences --------------------------------------------------------------------------------------------------------------------


class WaveNet(nn.Module):
    def __init__(self, c=4):
        super().__init__()
        self.table, self.dilations = nn.Embedding(7, c), (1, 2, 4)
        self.filters = nn.ModuleList(nn.Conv1d(c, 2 * c, 2, dilation=d) for d in self.dilations)
        self.skips, self.residuals = (nn.ModuleList(nn.Conv1d(c, c, 1) for _ in self.dilations) for _ in range(2))
        self.out = nn.Sequential(nn.ReLU(), nn.Conv1d(c, 7, 1))

    def forward(self, ids):
        x, total = self.table(ids).transpose(1, 2), 0
        for dilation, gates, skip, residual in zip(self.dilations, self.filters, self.skips, self.residuals, strict=True):
            a, b = gates(F.pad(x, (dilation, 0))).chunk(2, dim=1)
            out = torch.tanh(a) * torch.sigmoid(b)
            total, x = total + skip(out), residual(out) + x
        return self.out(total + x)


def next_token(model, batch):
    (ids,) = batch
    return F.cross_entropy(model(ids)[..., :-1], ids[:, 1:], reduction="none").sum(1)


class LSTMLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=0)
        self.rnn, self.head = nn.LSTM(4, 4, 2, batch_first=True), nn.Linear(4, 7)
        self.head.weight = self.table.weight

    def forward(self, ids, lengths):
        packed = pack_padded_sequence(self.table(ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=ids.shape[1])
        return self.head(out)


def masked_next_token(model, batch):
    ids, lengths = batch
    mask = torch.arange(ids.shape[1] - 1)[None] < lengths[:, None] - 1
    losses = F.cross_entropy(model(ids, lengths)[:, :-1].mT, ids[:, 1:], reduction="none")
    return (losses * mask).sum(1) / mask.sum(1)


class Seq2Seq(nn.Module):
    def __init__(self, h=4):
        super().__init__()
        self.source, self.target = nn.Embedding(7, 3), nn.Embedding(7, 3)
        self.encoder, self.decoder = nn.GRU(3, h, batch_first=True, bidirectional=True), nn.GRUCell(3 + 2 * h, h)
        self.start, self.attend, self.out = nn.Linear(2 * h, h), nn.Linear(h, 2 * h, bias=False), nn.Linear(3 * h, 7)

    def forward(self, source, target):
        memory, last = self.encoder(self.source(source))
        state = self.start(torch.cat([last[0], last[1]], 1)).tanh()
        logits = []
        for t in range(target.shape[1]):
            scores = torch.bmm(memory, self.attend(state).unsqueeze(2)).squeeze(2)
            scores = scores.masked_fill(source == 0, float("-inf"))
            context = torch.bmm(scores.softmax(1).unsqueeze(1), memory).squeeze(1)
            state = self.decoder(torch.cat([self.target(target[:, t]), context], 1), state)
            logits.append(self.out(torch.cat([state, context], 1)))
        return torch.stack(logits, 1)


class GreedyDecoder(nn.Module):
    """Begins with a token that is the same for all samples, and goes on with what it finds most likely."""

    def __init__(self, kind, h=4):
        super().__init__()
        self.table, self.encoder = nn.Embedding(7, 3), kind(3, h, batch_first=True)
        self.decoder, self.out = kind(3, h, batch_first=True), nn.Linear(h, 7)

    def forward(self, source):
        _, state = self.encoder(self.table(source))
        token, logits = torch.full((len(source), 1), 1), []
        for _ in range(3):
            step, state = self.decoder(self.table(token), state)
            logits.append(self.out(step))
            token = logits[-1].argmax(-1)
        return torch.cat(logits, 1)


class SequenceAutoencoder(nn.Module):
    def __init__(self, kind, h=4):
        super().__init__()
        self.encoder, self.decoder, self.out = kind(4, h, batch_first=True), kind(4, h, batch_first=True), nn.Linear(h, 4)

    def forward(self, x):
        _, state = self.encoder(x)
        return self.out(self.decoder(x.new_ones(x.shape), state)[0])


class LearnedPlanes(nn.Module):
    """Features of points looked up in learned planes, then in the nearest of learned codes."""

    def __init__(self):
        super().__init__()
        self.planes, self.codes, self.knots = (
            nn.Parameter(torch.randn(1, 4, 3, 3)),
            nn.Parameter(torch.randn(5, 4)),
            nn.Embedding(9, 4),
        )

    def forward(self, points):
        n = len(points)
        found = F.grid_sample(self.planes.expand(n, -1, -1, -1), points.tanh()[:, :, None], align_corners=False)[..., 0].mT
        near = torch.cdist(found, self.codes.expand(n, 5, 4)).softmax(-1) @ self.codes
        return near + self.knots(torch.searchsorted(torch.linspace(-1, 1, 8, dtype=points.dtype), points[..., 0].contiguous()))


class Translator(nn.Module):
    def __init__(self, d=4):
        super().__init__()
        self.table, self.positions = nn.Embedding(7, d), nn.Embedding(8, d)
        self.transformer = nn.Transformer(d, 2, 1, 1, 6, 0.0, batch_first=True)
        self.transformer.encoder.enable_nested_tensor = False
        self.head = nn.Linear(d, 7)

    def embed(self, ids):
        return self.table(ids) * 2 + self.positions(torch.arange(ids.shape[1]))

    def forward(self, source, target):
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
        padding = source == 0
        out = self.transformer(
            self.embed(source),
            self.embed(target),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return self.head(out)


class RelativeAttention(nn.Module):
    """Attention with a bias gathered by distance in buckets (T5)."""

    def __init__(self, d=4, heads=2):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.bias, self.heads = nn.Embedding(4, heads), heads

    def forward(self, x):
        n, t, d = x.shape
        apart = torch.arange(t)[None, :] - torch.arange(t)[:, None]
        bias = self.bias(apart.clamp(-1, 2) + 1).permute(2, 0, 1).unsqueeze(0)
        q, k, v = (layer(x).view(n, t, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(n, t, d))


class Rotary(nn.Module):
    """Grouped queries, rotary positions, RMS norm, gated MLP (Llama)."""

    def __init__(self, d=8, heads=4, groups=2):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, d // heads
        self.q, self.kv, self.o = (nn.Linear(i, o, bias=False) for i, o in ((d, d), (d, 2 * groups * self.size), (d, d)))
        self.gate, self.up, self.down = (nn.Linear(i, o, bias=False) for i, o in ((d, 6), (d, 6), (6, d)))
        self.norms = nn.ModuleList([nn.RMSNorm(d), nn.RMSNorm(d)])

    def turn(self, x):
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor([0.7], dtype=x.dtype)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, x):
        n, t, d = x.shape
        normed = self.norms[0](x)
        q = self.q(normed).view(n, t, self.heads, self.size).transpose(1, 2)
        k, v = self.kv(normed).view(n, t, 2, self.groups, self.size).permute(2, 0, 3, 1, 4)
        k, v = (y.repeat_interleave(self.heads // self.groups, 1) for y in (self.turn(k), v))
        out = F.scaled_dot_product_attention(self.turn(q), k, v, is_causal=True)
        x = x + self.o(out.transpose(1, 2).reshape(n, t, d))
        normed = self.norms[1](x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class LinearAttention(nn.Module):
    def __init__(self, d=4):
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("ntd,nte->ntde", k, v).cumsum(1)
        return self.out(torch.einsum("ntd,ntde->nte", q, state) / (torch.einsum("ntd,ntd->nt", q, k.cumsum(1))[..., None] + 1))


class SelectiveScan(nn.Module):
    """A selective state space written as a loop (Mamba)."""

    def __init__(self, d=4, s=3):
        super().__init__()
        self.inner, self.conv = nn.Linear(d, 2 * d, bias=False), nn.Conv1d(d, d, 3, padding=2, groups=d)
        self.project, self.step = nn.Linear(d, 1 + 2 * s, bias=False), nn.Linear(1, d)
        self.log_a, self.skip = nn.Parameter(torch.log(torch.arange(1.0, s + 1)).repeat(d, 1)), nn.Parameter(torch.ones(d))
        self.out, self.s = nn.Linear(d, d, bias=False), s

    def forward(self, x):
        n, t, d = x.shape
        x, gate = self.inner(x).chunk(2, -1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., :t].transpose(1, 2))
        step, b, c = self.project(x).split([1, self.s, self.s], -1)
        step, a = F.softplus(self.step(step)), -torch.exp(self.log_a)
        state, outs = x.new_zeros(n, d, self.s), []
        for i in range(t):
            state = torch.exp(step[:, i, :, None] * a) * state + (step[:, i] * x[:, i]).unsqueeze(-1) * b[:, i].unsqueeze(1)
            outs.append((state * c[:, i].unsqueeze(1)).sum(-1))
        return self.out((torch.stack(outs, 1) + x * self.skip) * F.silu(gate))


class Perceiver(nn.Module):
    """Learned latents, expanded over the batch, attend to the input."""

    def __init__(self, d=4):
        super().__init__()
        self.latents = nn.Parameter(normal(3, d))
        self.cross, self.own = (nn.MultiheadAttention(d, 2, batch_first=True) for _ in range(2))

    def forward(self, x):
        latents = self.latents.unsqueeze(0).repeat(x.shape[0], 1, 1)
        latents = latents + self.cross(latents, x, x, need_weights=False)[0]
        return latents + self.own(latents, latents, latents, need_weights=False)[0]


class DiffusionTransformer(nn.Module):
    """A block whose norms and gates are made from a condition."""

    def __init__(self, d=4):
        super().__init__()
        self.norm, self.condition = nn.LayerNorm(d, elementwise_affine=False), nn.Linear(d, 3 * d)
        self.attention, self.mlp = nn.MultiheadAttention(d, 2, batch_first=True), nn.Linear(d, d)

    def forward(self, x, condition):
        shift, scale, gate = self.condition(F.silu(condition))[:, None].chunk(3, -1)
        normed = self.norm(x) * (1 + scale) + shift
        return x + gate * self.attention(normed, normed, normed, need_weights=False)[0] + self.mlp(normed)


class Tree(nn.Module):
    """A sentence folded by halves."""

    def __init__(self):
        super().__init__()
        self.leaves, self.join = nn.Embedding(7, 4), nn.Linear(8, 4)

    def forward(self, ids):
        if ids.shape[1] == 1:
            return self.leaves(ids[:, 0])
        left, right = ids.tensor_split(2, 1)
        return self.join(torch.cat([self(left), self(right)], 1)).tanh()


class Memory(nn.Module):
    """A controller reads and writes slots, whose first content is learned (neural Turing machine)."""

    def __init__(self):
        super().__init__()
        self.cell, self.key, self.value = nn.GRUCell(8, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.slots = nn.Parameter(normal(3, 4))

    def forward(self, x):
        memory, state = self.slots.expand(len(x), -1, -1).clone(), x.new_zeros(len(x), 4)
        read = torch.zeros_like(state)
        for t in range(x.shape[1]):
            state = self.cell(torch.cat([x[:, t], read], 1), state)
            weight = (memory @ self.key(state).unsqueeze(-1)).softmax(1)
            read, new = (weight * memory).sum(1), self.value(state)[:, None]
            memory = memory * (1 - weight * new.sigmoid()) + weight * new
        return torch.cat([state, read], 1)


class ConvLSTM(nn.Module):
    def __init__(self, c=3):
        super().__init__()
        self.gates, self.c = conv(2 + c, 4 * c), c

    def forward(self, frames):
        n, _, _, h, w = frames.shape
        state = memory = frames.new_zeros(n, self.c, h, w)
        for frame in frames.unbind(1):
            i, f, o, g = torch.split(self.gates(torch.cat([frame, state], 1)), self.c, 1)
            memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
            state = o.sigmoid() * memory.tanh()
        return state


# --- sets, graphs, tables ---------------------------------------------------------------------------------------------------------


class DeepSets(nn.Module):
    def __init__(self):
        super().__init__()
        self.each = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))
        self.all = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))

    def forward(self, x, mask):
        return self.all((self.each(x) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class RaggedDeepSets(DeepSets):
    """Only what the mask keeps is computed; `how` brings it back to its owner."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x, mask):
        out = self.each(x[mask])
        owners = torch.arange(len(x))[:, None].expand_as(mask)[mask]
        if self.how == "index_add":
            return self.all(out.new_zeros(len(x), out.shape[1]).index_add_(0, owners, out))
        if self.how == "scatter_add":
            return self.all(out.new_zeros(len(x), out.shape[1]).scatter_add(0, owners[:, None].expand_as(out), out))
        back = out.new_zeros(*mask.shape, out.shape[1])
        back[mask] = out
        return self.all(back.sum(1))


class DenseGraph(nn.Module):
    """Messages by a padded adjacency matrix."""

    def __init__(self, d=4):
        super().__init__()
        self.own, self.other = (
            nn.ModuleList(nn.Linear(d, d) for _ in range(2)),
            nn.ModuleList(nn.Linear(d, d) for _ in range(2)),
        )
        self.head = nn.Linear(d, 2)

    def forward(self, x, edges):
        degree = edges.sum(-1, keepdim=True).clamp_min(1)
        for own, other in zip(self.own, self.other, strict=True):
            x = F.relu(own(x) + edges @ other(x) / degree)
        return self.head(x.amax(1))


class GraphAttention(nn.Module):
    def __init__(self, d=4):
        super().__init__()
        self.weight = nn.Linear(d, d, bias=False)
        self.source, self.target = nn.Parameter(normal(d)), nn.Parameter(normal(d, 1))

    def forward(self, x, edges):
        h = self.weight(x)
        scores = F.leaky_relu((h @ self.source)[:, None, :] + h @ self.target, 0.2)
        scores = torch.where(edges.bool() | torch.eye(x.shape[1], dtype=torch.bool), scores, float("-inf"))
        return F.elu(scores.softmax(-1) @ h)


class SparseGraph(nn.Module):
    """Nodes of all graphs in one list, edges as index pairs, messages and read-out by `index_add`."""

    def __init__(self, d=4):
        super().__init__()
        self.own, self.other, self.head = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 2)

    def forward(self, nodes, edges, owners, graphs):
        source, target = edges
        for _ in range(2):
            messages = torch.relu(self.other(nodes[source]))
            nodes = torch.tanh(self.own(nodes) + torch.zeros_like(nodes).index_add(0, target, messages))
        return self.head(nodes.new_zeros(graphs, nodes.shape[1]).index_add(0, owners, nodes))


def sparse_graphs(model, batch):
    """Padded graphs as one list of nodes with one list of edges."""
    x, edges = batch
    n, t, _ = x.shape
    graph, source, target = edges.nonzero().unbind(1)
    return values(model(x.flatten(0, 1), torch.stack([graph * t + source, graph * t + target]), torch.arange(n * t) // t, n))


def unpadded_graphs(model, batch):
    """The same without the padding: the number of a node depends on the graphs before it."""
    x, edges = batch
    kept = edges.sum(-1) > 0
    number = (kept.flatten().cumsum(0) - 1).view(kept.shape)
    graph, source, target = edges.nonzero().unbind(1)
    owners = torch.arange(len(x))[:, None].expand_as(kept)[kept]
    return values(model(x[kept], torch.stack([number[graph, source], number[graph, target]]), owners, len(x)))


def collated(x, edges):
    """What a loader makes of graphs: all nodes, the edges between them, the graph of each node."""
    nodes, links, owners, count = [], [], [], 0
    for k, (rows, matrix) in enumerate(zip(x, edges, strict=True)):
        size = int((matrix.sum(-1) > 0).sum())
        nodes.append(rows[:size])
        links.append(matrix.nonzero().T + count)
        owners.append(torch.full((size,), k))
        count += size
    return torch.cat(nodes), torch.cat(links, 1), torch.cat(owners)


def graphs(n=N, nodes=4):
    """Adjacency of a ring of n + 1, ..., of differing sizes; padded nodes have no edges."""
    edges = torch.zeros(n, nodes, nodes, dtype=torch.float64)
    for k in range(n):
        size = nodes - k % 3
        for i in range(size):
            edges[k, i, (i + 1) % size] = edges[k, (i + 1) % size, i] = 1
    return edges


class PointNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.turn = nn.Sequential(nn.Conv1d(3, 5, 1), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(5, 9))
        self.each, self.head = nn.Sequential(nn.Conv1d(3, 6, 1), nn.GroupNorm(2, 6), nn.ReLU()), nn.Linear(6, 3)

    def forward(self, points):
        turn = self.turn(points.transpose(1, 2)).view(-1, 3, 3) + torch.eye(3, dtype=points.dtype)
        return self.head(self.each(torch.bmm(points, turn).transpose(1, 2)).max(2)[0])


class DLRM(nn.Module):
    """Dense features, embedding bags, all pairwise dot products."""

    def __init__(self, offsets):
        super().__init__()
        self.offsets = offsets
        self.tables = nn.ModuleList(nn.EmbeddingBag(6, 3, mode="sum") for _ in range(2))
        self.bottom, self.top = nn.Linear(4, 3), nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))
        rows, columns = torch.tril_indices(3, 3, -1)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def bags(self, ids):
        if not self.offsets:
            return [table(part) for table, part in zip(self.tables, ids.unbind(1), strict=True)]
        n, _, k = ids.shape
        starts = torch.arange(n) * k
        return [table(part.reshape(-1), starts) for table, part in zip(self.tables, ids.unbind(1), strict=True)]

    def forward(self, dense, ids):
        bottom = self.bottom(dense).relu()
        vectors = torch.stack([bottom, *self.bags(ids)], 1)
        pairs = torch.bmm(vectors, vectors.transpose(1, 2))[:, self.rows, self.columns]
        return self.top(torch.cat([bottom, pairs], 1)).squeeze(1)[:, None]


# --- fields, solvers, special layers ----------------------------------------------------------------------------------------------


class Field(nn.Module):
    """Fourier features of positions along rays, blended by density (NeRF)."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(12, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU(inplace=True))
        self.density, self.colour = (
            nn.Linear(6, 1),
            nn.Sequential(nn.Linear(6 + 3, 5), nn.ReLU(), nn.Linear(5, 3), nn.Sigmoid()),
        )

    def forward(self, points, direction):
        scaled = (points[..., None] * 2.0 ** torch.arange(2) * math.pi).flatten(-2)
        hidden = self.trunk(torch.cat([scaled.sin(), scaled.cos()], -1))
        alpha = 1 - torch.exp(-F.softplus(self.density(hidden)).squeeze(-1) * 0.3)
        passed = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha[:, :-1]], 1), 1)
        colours = self.colour(torch.cat([hidden, direction[:, None].expand(-1, points.shape[1], -1)], -1))
        return ((alpha * passed).unsqueeze(-1) * colours).sum(1)


class NeuralODE(nn.Module):
    """A field integrated by fourth-order Runge-Kutta."""

    def __init__(self):
        super().__init__()
        self.field, self.head = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), nn.Linear(4, 2)

    def slope(self, t, y):
        return self.field(torch.cat([y, torch.full_like(y[:, :1], t)], 1))

    def forward(self, y):
        h = 0.25
        for step in range(3):
            a = self.slope(h * step, y)
            b = self.slope(h * (step + 0.5), y + h / 2 * a)
            c = self.slope(h * (step + 0.5), y + h / 2 * b)
            y = y + h / 6 * (a + 2 * b + 2 * c + self.slope(h * (step + 1), y + h * c))
        return self.head(y)


class Equilibrium(nn.Module):
    """A fixed number of iterations of one layer, the first without gradients."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 5, bias=False), nn.Linear(4, 5)

    def forward(self, x):
        z, injected = torch.zeros(x.shape[0], 5, dtype=x.dtype), self.outer(x)
        with torch.no_grad():
            for _ in range(4):
                z = torch.tanh(self.inner(z) + injected)
        for _ in range(3):
            z = 0.5 * z + 0.5 * torch.tanh(self.inner(z) + injected)
        return z


class KAN(nn.Module):
    """Each edge has a function of its own, a sum of Gaussian bumps."""

    def __init__(self, *sizes):
        super().__init__()
        pairs = list(itertools.pairwise(sizes))
        self.bumps = nn.ParameterList(0.5 * normal(o, i, 5) for i, o in pairs)
        self.base = nn.ParameterList(normal(o, i) for i, o in pairs)
        self.register_buffer("centres", torch.linspace(-1, 1, 5))

    def forward(self, x):
        for bumps, base in zip(self.bumps, self.base, strict=True):
            basis = torch.exp(-(((x.unsqueeze(-1) - self.centres) / 0.5) ** 2))
            x = F.linear(F.silu(x), base) + torch.einsum("nig,oig->no", basis, bumps)
        return x


class LoRALinear(nn.Module):
    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Parameter(normal(rank, base.in_features)), nn.Parameter(normal(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + (x @ self.a.T) @ self.b.T * 0.5


class CosineClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.weight, self.scale = nn.Linear(4, 5), nn.Parameter(normal(3, 5)), nn.Parameter(torch.tensor(4.0))

    def forward(self, x):
        return self.scale * F.linear(F.normalize(self.body(x)), F.normalize(self.weight, dim=1))


class NormalisedWeight(nn.Module):
    """Standardised convolution weights."""

    def __init__(self):
        super().__init__()
        self.conv, self.gain = conv(2, 4), nn.Parameter(torch.ones(4, 1, 1, 1))

    def forward(self, x):
        weight = self.conv.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight * self.gain, self.conv.bias, padding=1)


class Codebook(nn.Module):
    """The nearest code by a computed index, straight through (VQ-VAE)."""

    def __init__(self, by_distance):
        super().__init__()
        self.by_distance = by_distance
        self.encoder, self.codes, self.decoder = nn.Linear(4, 3), nn.Embedding(6, 3), nn.Linear(3, 4)

    def forward(self, x):
        z = self.encoder(x)
        if self.by_distance:
            index = torch.cdist(z.detach(), self.codes.weight.detach()).argmin(-1)
        else:
            flat = z.reshape(-1, 3)
            far = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ self.codes.weight.t() + self.codes.weight.pow(2).sum(1)
            index = far.argmin(1).view(z.shape[:-1])
        q = self.codes(index)
        return self.decoder(z + (q - z).detach()), z, q


def commitment(model, batch):
    out, z, q = model(*batch)
    terms = (out - batch[0]).pow(2).mean(-1) + (q - z.detach()).pow(2).sum(-1) + 0.25 * (z - q.detach()).pow(2).sum(-1)
    return terms.mean(1)


class TensorTrain(nn.Module):
    """A 6 by 6 matrix as two cores."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(normal(2, 3, 4)), nn.Parameter(normal(4, 3, 2))
        self.u, self.v = nn.Parameter(normal(5, 2)), nn.Parameter(normal(2, 6))

    def forward(self, x):
        out = torch.einsum("nik,ior,rkp->nop", x.view(-1, 2, 3), self.a, self.b).reshape(-1, 6)
        merged = torch.einsum("ior,rkp->ikop", self.a, self.b).reshape(6, 6)
        return F.linear(F.relu(out + x @ merged), self.u @ self.v)


class PythonLoop(nn.Module):
    """A user's own loop over the samples."""

    def __init__(self, how):
        super().__init__()
        self.how, self.inner, self.out = how, nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        one = lambda row: self.out(self.inner(row).relu())
        if self.how == "index":
            return torch.stack([one(x[i]) for i in range(len(x))])
        if self.how == "slice":
            return torch.cat([one(x[i : i + 1]) for i in range(len(x))])
        if self.how == "iterate":
            return torch.stack([one(row) for row in x])
        return torch.stack([one(row) for row in x.unbind(0)])


class TimeLoop(nn.Module):
    """The same over the positions, of which there are as many as samples."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        state, outs = x.new_zeros(x.shape[0], 4), []
        for t in range(x.shape[1]):
            state = self.inner(x[:, t] + state).tanh()
            outs += [state]
        return torch.stack(outs, 1)


class RadialBasis(nn.Module):
    def __init__(self):
        super().__init__()
        self.centres, self.log_width, self.head = nn.Parameter(normal(5, 4)), nn.Parameter(torch.zeros(5)), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.exp(-torch.cdist(x, self.centres).pow(2) * self.log_width.exp()))


class Ensemble(nn.Module):
    """Members side by side in one product."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(normal(3, 4, 5)), nn.Parameter(normal(3, 5, 2))
        self.bias = nn.Parameter(normal(3, 1, 5))

    def forward(self, x):
        hidden = torch.relu(torch.baddbmm(self.bias, x.expand(3, -1, -1), self.a))
        return torch.bmm(hidden, self.b).transpose(0, 1)


class FourierOperator(nn.Module):
    """Products with complex weights on the lowest frequencies."""

    def __init__(self):
        super().__init__()
        self.lift, self.skip, self.out = nn.Conv1d(1, 3, 1), nn.Conv1d(3, 3, 1), nn.Conv1d(3, 1, 1)
        self.weight = nn.Parameter(torch.complex(normal(3, 3, 2), normal(3, 3, 2, 1).squeeze(-1)))

    def forward(self, x):
        x = self.lift(x)
        spectrum = torch.fft.rfft(x)
        out = torch.zeros_like(spectrum)
        out[:, :, :2] = torch.einsum("nif,iof->nof", spectrum[:, :, :2], self.weight)
        return self.out(F.gelu(torch.fft.irfft(out, n=x.size(-1)) + self.skip(x)))


class MaskedAutoencoder(nn.Module):
    """Masked linear layers (MADE)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
        order, hidden = torch.arange(4), torch.arange(6) % 3
        self.register_buffer("first", (hidden[:, None] >= order[None]).double())
        self.register_buffer("last", (order[:, None] > hidden[None]).double())

    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.a.weight * self.first, self.a.bias)), self.b.weight * self.last, self.b.bias)


# --- mixtures of experts ----------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self, route, count=4, d=4):
        super().__init__()
        self.route = route
        self.gate = nn.Linear(d, count, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(d, 5), nn.GELU(), nn.Linear(5, d)) for _ in range(count))
        self.head = nn.Linear(d, 2)

    def forward(self, x):
        shape = x.shape
        return self.head(self.route(self, x.reshape(-1, shape[-1])).view(shape))


def soft(self, x):
    return torch.einsum("re,erd->rd", self.gate(x).softmax(-1), torch.stack([expert(x) for expert in self.experts]))


def top_one_by_mask(self, x):
    weight, chosen = self.gate(x).softmax(-1).max(-1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(self.experts):
        mask = chosen == e
        out[mask] = expert(x[mask]) * weight[mask].unsqueeze(-1)
    return out


def top_two_by_where(self, x):
    """As in the Mixtral of Hugging Face."""
    weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    masks = F.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
    for e, expert in enumerate(self.experts):
        slot, row = torch.where(masks[e])
        out.index_add_(0, row, expert(x[None, row].reshape(-1, x.shape[-1])) * weights[row, slot, None])
    return out


def top_two_by_index_put(self, x):
    weights, chosen = self.gate(x).topk(2, dim=-1)
    weights = weights.softmax(-1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(self.experts):
        row, slot = (chosen == e).nonzero(as_tuple=True)
        out = out.index_put((row,), expert(x[row]) * weights[row, slot].unsqueeze(-1), accumulate=True)
    return out


def top_two_sorted(self, x):
    """Rows sorted by expert, one slice each, and back."""
    weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
    order = chosen.flatten().argsort(stable=True)
    rows = order // 2
    parts = x[rows].split(torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist())
    outs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
    return torch.zeros_like(x).index_add(0, rows, outs * weights.flatten()[order].unsqueeze(-1))


def top_two_masked(self, x):
    """Every expert sees every row; what was not chosen has weight 0."""
    scores = self.gate(x)
    kept = scores >= scores.topk(2, dim=-1).values[:, -1:]
    weights = scores.masked_fill(~kept, float("-inf")).softmax(-1)
    return sum(weights[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


class StackedExperts(nn.Module):
    """One weight for all experts, looked up by the chosen ones."""

    def __init__(self):
        super().__init__()
        self.gate, self.weight = nn.Linear(4, 5), nn.Parameter(normal(5, 2, 4))

    def forward(self, x):
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        return torch.einsum("ntoi,nti->nto", self.weight[chosen], x) * weight[..., None]


# --- tagging, ranking, recommending, acting ---------------------------------------------------------------------------------------


class CRF(nn.Module):
    """A tagger whose partition function runs through a transition matrix."""

    def __init__(self):
        super().__init__()
        self.scores, self.transitions = nn.Linear(4, 3), nn.Parameter(normal(3, 3))
        self.start, self.end = nn.Parameter(normal(3)), nn.Parameter(normal(1, 3)[0])

    def forward(self, x, tags):
        scores, rows = self.scores(x), torch.arange(len(x))
        total, path = self.start + scores[:, 0], self.start[tags[:, 0]] + scores[rows, 0, tags[:, 0]]
        for t in range(1, x.shape[1]):
            total = torch.logsumexp(total.unsqueeze(2) + self.transitions + scores[:, t].unsqueeze(1), 1)
            path = path + self.transitions[tags[:, t - 1], tags[:, t]] + scores[rows, t, tags[:, t]]
        return torch.logsumexp(total + self.end, 1) - path - self.end[tags[:, -1]]


def outputs(model, batch):
    return model(*batch)


class Recogniser(nn.Module):
    """Alignment-free training (CTC), time first."""

    def __init__(self):
        super().__init__()
        self.conv, self.rnn, self.head = nn.Conv1d(2, 4, 3, padding=1), nn.GRU(4, 3, bidirectional=True), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.rnn(self.conv(x).permute(2, 0, 1))[0]).log_softmax(-1)


def alignment_free(model, batch):
    x, targets, lengths = batch
    times = torch.full((len(x),), x.shape[2])
    return F.ctc_loss(model(x), targets, times, lengths, reduction="none")


class FactorisationMachine(nn.Module):
    """Second-order interactions by the square of the sum."""

    def __init__(self):
        super().__init__()
        self.linear, self.factors = nn.Embedding(9, 1), nn.Embedding(9, 3)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        v = self.factors(ids)
        pairs = 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(1, keepdim=True)
        return self.bias + self.linear(ids).sum(1) + pairs


class MatrixFactorisation(nn.Module):
    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(5, 4), nn.Embedding(6, 4)
        self.user_bias, self.item_bias = nn.Parameter(normal(5)), nn.Parameter(normal(6))
        self.mean = nn.Parameter(torch.tensor(0.3))

    def forward(self, user, item):
        dots = (self.users(user) * self.items(item)).sum(-1)
        return (dots + self.user_bias[user] + self.item_bias[item] + self.mean)[:, None]


class SkipGram(nn.Module):
    """Word vectors with negative samples."""

    def __init__(self):
        super().__init__()
        self.centre, self.context = nn.Embedding(7, 4), nn.Embedding(7, 4)

    def forward(self, word, near, far):
        centre = self.centre(word)
        good = (centre * self.context(near)).sum(-1)
        bad = torch.bmm(self.context(far), centre.unsqueeze(-1)).squeeze(-1)
        return -F.logsigmoid(good) - F.logsigmoid(-bad).sum(-1)


class Tasks(nn.Module):
    """Shared experts, one gate and one head for each task (MMoE)."""

    def __init__(self):
        super().__init__()
        self.experts, self.gates, self.heads = (
            nn.ModuleList(nn.Linear(i, o) for _ in range(k)) for k, i, o in ((3, 4, 5), (2, 4, 3), (2, 5, 1))
        )

    def forward(self, x):
        experts = torch.stack([F.relu(expert(x)) for expert in self.experts], dim=1)
        mixed = [torch.einsum("nk,nkd->nd", gate(x).softmax(-1), experts) for gate in self.gates]
        return torch.cat([head(part) for head, part in zip(self.heads, mixed, strict=True)], 1)


class ActorCritic(nn.Module):
    """A Gaussian policy with a learned deviation, and a value."""

    def __init__(self):
        super().__init__()
        self.body, self.mean, self.value = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 2), nn.Linear(6, 1)
        self.log_deviation = nn.Parameter(torch.zeros(2))

    def forward(self, state):
        hidden = self.body(state)
        return torch.distributions.Normal(self.mean(hidden), self.log_deviation.exp()), self.value(hidden).squeeze(-1)


def clipped_policy(model, batch):
    """PPO."""
    state, action, old, gain = batch
    policy, value = model(state)
    ratio = (policy.log_prob(action).sum(-1) - old).exp()
    wanted = torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
    return -wanted + 0.5 * (value - gain).square() - 0.01 * policy.entropy().sum(-1)


class Dueling(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.gain, self.value = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, state):
        hidden = self.body(state).relu()
        gain = self.gain(hidden)
        return self.value(hidden) + gain - gain.mean(1, keepdim=True)


def temporal_difference(model, batch):
    state, action, reward, after = batch
    with torch.no_grad():
        target = reward + 0.9 * model(after).max(1).values
    return F.smooth_l1_loss(model(state).gather(1, action[:, None]).squeeze(1), target, reduction="none")


class MixtureDensity(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(4, 6), nn.Linear(6, 9)

    def forward(self, x):
        return self.heads(self.body(x).tanh()).split(3, 1)


def mixture_likelihood(model, batch):
    x, y = batch
    weights, means, deviations = model(x)
    each = -0.5 * ((y - means) / deviations.exp()) ** 2 - deviations
    return -torch.logsumexp(weights.log_softmax(1) + each, 1)


class Ranker(nn.Module):
    """Lists of documents for each query (ListNet)."""

    def __init__(self):
        super().__init__()
        self.query, self.score = nn.Linear(3, 4), nn.Bilinear(4, 4, 1)

    def forward(self, query, documents):
        query = self.query(query)[:, None].expand(-1, documents.shape[1], -1)
        return self.score(query.contiguous(), documents).squeeze(-1)


def list_loss(model, batch):
    query, documents, grades = batch
    return -(grades.softmax(1) * model(query, documents).log_softmax(1)).sum(1)


class Prefix(nn.Module):
    """A frozen attention with learned keys and values in front (prefix tuning), and scaled values (IA3)."""

    def __init__(self, d=4):
        super().__init__()
        self.qkv = nn.Linear(d, 3 * d).requires_grad_(False)
        self.keys, self.values, self.scale = nn.Parameter(normal(2, d)), nn.Parameter(normal(1, 2, d)), nn.Parameter(normal(d))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        k = torch.cat([self.keys.expand(len(x), -1, -1), k], 1)
        v = torch.cat([self.values.repeat(len(x), 1, 1), v * self.scale], 1)
        return F.scaled_dot_product_attention(q, k, v)


class DoRA(nn.Module):
    """A low-rank update whose columns keep learned lengths."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 5).requires_grad_(False)
        self.a, self.b = nn.Parameter(normal(2, 4)), nn.Parameter(normal(5, 2))
        self.length = nn.Parameter(self.base.weight.norm(dim=1, keepdim=True).detach().clone())

    def forward(self, x):
        weight = self.base.weight + self.b @ self.a
        return F.linear(x, self.length * weight / weight.norm(dim=1, keepdim=True).detach(), self.base.bias)


class Detector(nn.Module):
    """Learned queries; each image's are matched to its own targets in a Python loop (DETR)."""

    def __init__(self, d=4):
        super().__init__()
        self.patches, self.queries = nn.Conv2d(3, d, 4, 4), nn.Embedding(5, d)
        self.decoder = nn.TransformerDecoderLayer(d, 2, 6, 0.0, batch_first=True)
        self.classes, self.boxes = nn.Linear(d, 4), nn.Linear(d, 4)

    def forward(self, x):
        memory = self.patches(x).flatten(2).mT
        queries = self.queries.weight.unsqueeze(0).expand(len(x), -1, -1)
        out = self.decoder(queries, memory)
        return self.classes(out), self.boxes(out).sigmoid()


def matched(model, batch):
    images, kinds, boxes, counts = batch
    logits, found = model(images)
    losses = []
    for k in range(len(images)):
        size = int(counts[k])
        cost = torch.cdist(found[k].detach(), boxes[k, :size], p=1) - logits[k].detach().softmax(-1)[:, kinds[k, :size]]
        chosen = cost.argmin(0)
        target = torch.zeros(logits.shape[1], dtype=torch.long)
        target[chosen] = kinds[k, :size]
        losses.append(F.cross_entropy(logits[k], target) + F.l1_loss(found[k][chosen], boxes[k, :size]))
    return torch.stack(losses)


class RowByRow(nn.Module):
    """A user's loop that writes each sample's row into one tensor."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, x):
        out = torch.zeros(len(x), 2, dtype=x.dtype)
        for i in range(len(x)):
            out[i] = self.inner(x[i])
        return out


class Repadded(nn.Module):
    """Sentences taken out of their padding, and padded again."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Conv1d(4, 2, 2)

    def forward(self, x, mask):
        parts = [self.inner(row[kept]) for row, kept in zip(x, mask, strict=True)]
        padded = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        return self.out(F.pad(padded, (0, 0, 0, x.shape[1] - padded.shape[1])).mT)


class Gumbel(nn.Module):
    """A discrete code by given Gumbel noise, hard in the forward."""

    def __init__(self):
        super().__init__()
        self.encoder, self.codes = nn.Linear(4, 5), nn.Parameter(normal(5, 3))

    def forward(self, x, noise):
        soft = ((self.encoder(x) - noise.abs().log()) / 0.7).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), 5).to(soft.dtype)
        return (hard - soft.detach() + soft) @ self.codes


def risk_sets(model, batch):
    """Cox: everybody still at risk is in the denominator."""
    x, times = batch
    risk = model(x)[:, 0]
    later = times[None] >= times[:, None]
    return torch.logsumexp(risk[None].expand(len(x), -1).masked_fill(~later, float("-inf")), 1) - risk


# --- models that mix their samples --------------------------------------------------------------------------------------------------


class Projector(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return self.tower(x)


def contrastive(model, batch):
    """InfoNCE: the others are the negatives."""
    a, b = (F.normalize(model(x), dim=1) for x in batch)
    return F.cross_entropy(a @ b.T / 0.5, torch.arange(len(a)), reduction="none")


def decorrelated(model, batch):
    """Features made uncorrelated over the batch (Barlow twins)."""
    a, b = (model(x) - model(x).mean(0) for x in batch)
    return ((a.T @ b / len(a) - torch.eye(3)) ** 2).sum() / len(a) + a.square().sum(1)


def hardest(model, batch):
    """Only losses above the batch's mean count."""
    losses = squares(model, batch)
    return torch.where(losses > losses.detach().mean(), losses, 0.1 * losses)


def mixed_up(model, batch):
    (x,) = batch
    return values(model(0.7 * x + 0.3 * x.flip(0)))


class Similar(nn.Module):
    """Minibatch discrimination."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 5), nn.Linear(6, 2)

    def forward(self, x):
        x = self.inner(x)
        near = torch.exp(-(x[:, None] - x[None]).abs().sum(-1)).sum(1, keepdim=True)
        return self.out(torch.cat([x, near], 1))


class Whitened(nn.Module):
    """A hand-written batch norm."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(4, 5), nn.Parameter(normal(5))

    def forward(self, x):
        x = self.inner(x)
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * self.scale


def with_capacity(self, x):
    """Switch: an expert takes its first two rows of the batch and drops the others."""
    weight, chosen = self.gate(x).softmax(-1).max(-1)
    place = F.one_hot(chosen, len(self.experts)).cumsum(0).gather(1, chosen[:, None]).squeeze(1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(self.experts):
        row = torch.where((chosen == e) & (place <= 2))[0]
        out = out.index_add(0, row, expert(x[row]) * weight[row, None])
    return out


def chosen_by_experts(self, x):
    """Each expert takes the rows that score best for it (expert choice routing)."""
    weights, rows = self.gate(x).softmax(-1).topk(3, dim=0)
    out = torch.zeros_like(x)
    for e, expert in enumerate(self.experts):
        out = out.index_add(0, rows[:, e], expert(x[rows[:, e]]) * weights[:, e, None])
    return out


def best_half(self, x):
    """The rows that score best in the batch go to the first expert, the others to the second."""
    order = self.gate(x)[:, 0].argsort(descending=True)
    first, second = x[order].split([len(x) // 2, len(x) - len(x) // 2])
    return torch.zeros_like(x).index_add(0, order, torch.cat([self.experts[0](first), self.experts[1](second)]))


def best_counted_twice(model, batch):
    order = batch[0][:, 0].argsort()
    out = model(batch[0][order])
    return values(torch.cat([out[:1] * 2, out[1:]])[order.argsort()])


class LinkedGraphs(SparseGraph):
    """With an edge from each graph's first node to the last node of all."""

    def forward(self, nodes, edges, owners, graphs):
        starts = torch.arange(graphs) * (len(nodes) // graphs)
        links = torch.stack([starts, torch.full_like(starts, len(nodes) - 1)])
        return super().forward(nodes, torch.cat([edges, links], 1), owners, graphs)


class Queue(nn.Module):
    """A recurrent state that runs on from sample to sample."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 3)

    def forward(self, x):
        state, outs = x.new_zeros(1, 3), []
        for i in range(len(x)):
            state = self.cell(x[i : i + 1], state)
            outs.append(state)
        return torch.cat(outs)


# --- the table --------------------------------------------------------------------------------------------------------------------

IMAGES, TOKENS, ROWS, SETS = normal(N, 3, 8, 8), ints(7, N, 6), normal(N, 4), normal(N, 5, 4)
KEPT = torch.arange(5)[None] < torch.tensor([5, 3, 2])[:, None]
SENTENCES, LENGTHS = ints(6, N, 5) + 1, torch.tensor([3, 5, 2])
SOURCES = torch.where(torch.arange(5)[None] < LENGTHS[:, None], SENTENCES, 0)

MODELS = {
    "ResNet, group norm": Model(ResNet, (IMAGES,), "in-place ReLU and `+=`, strided shortcut"),
    "ResNet, batch norm in evaluation": Model(lambda: ResNet(used_batch_norm).eval(), (IMAGES,), "running statistics"),
    "ResNet, channels last": Model(
        lambda: ResNet(channels_last=True).to(memory_format=torch.channels_last), (IMAGES,), "channels last throughout"
    ),
    "DenseNet": Model(DenseNet, (IMAGES,), "`cat` of all features so far"),
    "EfficientNet": Model(lambda: EfficientNet().eval(), (IMAGES,), "depthwise, squeeze and excite, SiLU in place"),
    "ConvNeXt": Model(ConvNeXt, (IMAGES,), "permutes, layer scale"),
    "U-Net, transposed": Model(lambda: UNet(True), (normal(N, 2, 8, 8),), "transposed convolutions, skips by `cat`"),
    "U-Net, interpolated": Model(lambda: UNet(False), (normal(N, 2, 8, 8),), "`F.interpolate`, skips by `cat`"),
    "ViT": Model(ViT, (IMAGES,), "class token expanded over the batch, position table"),
    "Swin": Model(Swin, (IMAGES,), "cyclic shift, windows and back, relative position table by a constant index"),
    "MLP-Mixer": Model(Mixer, (IMAGES,), "linear layers over positions"),
    "spatial transformer": Model(SpatialTransformer, (normal(N, 2, 5, 5),), "`affine_grid`, `grid_sample`"),
    "capsules": Model(Capsules, (normal(N, 2, 5, 5),), "einsum, routing by agreement"),
    "PixelCNN": Model(
        PixelCNN, (normal(N, 1, 4, 4), ints(5, N, 4, 4)), "weights times a mask, a loss per pixel", losses=pixel_losses
    ),
    "ConvLSTM": Model(ConvLSTM, (normal(N, N, 2, 4, 4),), "a convolution per frame, as many frames as samples"),
    "Siamese": Model(lambda: Siamese(False), (ROWS, normal(N, 4).flip(0)), "two towers share their weights"),
    "Siamese, joined": Model(lambda: Siamese(True), (ROWS, normal(N, 4).flip(0)), "both views in one batch, then `chunk`"),
    "views interleaved": Model(InterleavedViews, (normal(N, 2, 4),), "(n, views, d) as one long batch and back"),
    "VAE": Model(VAE, (normal(N, 6), normal(N, 3)), "reparametrised with given noise", losses=evidence),
    "FiLM": Model(FiLM, (normal(N, 2, 4, 4), ints(5, N)), "scale and shift of channels by an embedding"),
    "hypernetwork per sample": Model(HyperNetwork, (ROWS, normal(N, 3)), "weights made for each sample"),
    "hypernetwork, shared": Model(SharedHyperNetwork, (normal(N, 2, 4, 4),), "a convolution made from a learned code"),
    "diffusion U-Net, 1-D": Model(Diffusion, (normal(N, 2, 8), ints(50, N)), "sinusoidal time embedding, FiLM"),
    "normalising flow": Model(Flow, (ROWS,), "coupling layers, log determinants", losses=likelihood),
    "WaveNet": Model(WaveNet, (TOKENS,), "dilated causal convolutions, gates", losses=next_token),
    "LSTM language model": Model(
        LSTMLanguageModel, (SOURCES, LENGTHS), "packed sequences, tied head, padding_idx", losses=masked_next_token
    ),
    "GRU with attention": Model(Seq2Seq, (SOURCES, ints(7, N, N)), "teacher forcing in a loop, masked attention"),
    "greedy decoder, GRU": Model(
        lambda: GreedyDecoder(nn.GRU), (SOURCES,), "starts with one token for all, the encoder's state"
    ),
    "greedy decoder, LSTM": Model(
        lambda: GreedyDecoder(nn.LSTM), (SOURCES,), "starts with one token for all, the encoder's states"
    ),
    "sequence autoencoder": Model(lambda: SequenceAutoencoder(nn.LSTM), (normal(N, N, 4),), "a decoder whose input is ones"),
    "learned planes": Model(
        LearnedPlanes, (normal(N, N, 2),), "parameters expanded over the batch, `grid_sample`, `searchsorted`"
    ),
    "Transformer": Model(Translator, (SOURCES, ints(7, N, 4)), "encoder and decoder, causal and padding masks"),
    "relative positions": Model(RelativeAttention, (normal(N, N, 4),), "attention bias looked up by distance, T equal to n"),
    "Llama block": Model(Rotary, (normal(N, 5, 8),), "rotary positions, grouped queries, RMS norm, gated MLP"),
    "linear attention": Model(LinearAttention, (normal(N, 5, 4),), "einsum, cumulative sums"),
    "selective scan": Model(SelectiveScan, (normal(N, 4, 4),), "state space in a loop, exp of a parameter"),
    "Perceiver": Model(Perceiver, (normal(N, 5, 4),), "learned latents repeated over the batch"),
    "diffusion transformer": Model(DiffusionTransformer, (normal(N, N, 4), ROWS), "norms and gates made from a condition"),
    "tree": Model(Tree, (TOKENS,), "the model calls itself"),
    "memory": Model(Memory, (normal(N, N, 4),), "slots read and written, the first ones learned"),
    "DeepSets, padded": Model(DeepSets, (SETS, KEPT), "masked mean"),
    "DeepSets, index_add": Model(lambda: RaggedDeepSets("index_add"), (SETS, KEPT), "rows by mask, back by `index_add_`"),
    "DeepSets, scatter_add": Model(lambda: RaggedDeepSets("scatter_add"), (SETS, KEPT), "rows by mask, back by `scatter_add`"),
    "DeepSets, masked write": Model(lambda: RaggedDeepSets("mask"), (SETS, KEPT), "rows by mask, back by `out[mask] = rows`"),
    "graph, dense": Model(DenseGraph, (normal(N, 4, 4), graphs()), "messages by an adjacency matrix"),
    "graph attention": Model(GraphAttention, (normal(N, 4, 4), graphs()), "masked softmax over neighbours"),
    "graph, sparse": Model(
        SparseGraph, (normal(N, 4, 4), graphs()), "one list of nodes and edges, messages by `index_add`", losses=sparse_graphs
    ),
    "graph, sparse, numbered without padding": Model(
        SparseGraph,
        (normal(N, 4, 4), graphs()),
        "node numbers by `cumsum` over the batch inside the recording; collate before it and declare owners instead",
        losses=unpadded_graphs,
        refused="was lost in (getitem|index_add)",
    ),
    "PointNet": Model(PointNet, (normal(N, 5, 3),), "a rotation per sample, maximum over points"),
    "DLRM": Model(lambda: DLRM(False), (ROWS, ints(6, N, 2, 3)), "embedding bags (2-D), pairwise products"),
    "DLRM, offsets": Model(lambda: DLRM(True), (ROWS, ints(6, N, 2, 3)), "embedding bags by offsets"),
    "NeRF": Model(Field, (normal(N, 4, 3), normal(N, 3)), "Fourier features, blending by `cumprod`"),
    "neural ODE": Model(NeuralODE, (ROWS,), "a field reused twelve times"),
    "equilibrium": Model(Equilibrium, (ROWS,), "fixed iterations, the first under `no_grad`"),
    "KAN": Model(lambda: KAN(4, 3, 2), (ROWS,), "basis functions, einsum"),
    "LoRA": Model(
        lambda: nn.Sequential(LoRALinear(nn.Linear(4, 6)), nn.ReLU(inplace=True), LoRALinear(nn.Linear(6, 3))),
        (SETS,),
        "frozen layers with two products beside them",
    ),
    "cosine classifier": Model(CosineClassifier, (ROWS,), "normalised features and weight, learned scale"),
    "standardised weights": Model(
        NormalisedWeight, (normal(N, 2, 4, 4),), "a convolution weight minus its mean, by its deviation"
    ),
    "codebook": Model(
        lambda: Codebook(True), (normal(N, 3, 4),), "the nearest code by a computed index, straight through", losses=commitment
    ),
    "codebook, distances by products": Model(
        lambda: Codebook(False), (normal(N, 3, 4),), "the same with gradients through the distances' product", losses=commitment
    ),
    "tensor train": Model(TensorTrain, (normal(N, 6),), "cores contracted with the input, and with each other"),
    "loop over samples, x[i]": Model(lambda: PythonLoop("index"), (ROWS,), "`stack([f(x[i]) for i in range(n)])`"),
    "loop over samples, x[i:i+1]": Model(lambda: PythonLoop("slice"), (ROWS,), "`cat` of slices of one sample"),
    "loop over samples, for row in x": Model(lambda: PythonLoop("iterate"), (ROWS,), "iterating over the batch"),
    "loop over samples, unbind": Model(lambda: PythonLoop("unbind"), (ROWS,), "`x.unbind(0)`"),
    "loop over positions": Model(TimeLoop, (normal(N, N, 4),), "as many positions as samples"),
    "radial basis functions": Model(RadialBasis, (ROWS,), "`cdist` with a parameter"),
    "ensemble": Model(Ensemble, (ROWS,), "members in one `baddbmm`, the samples on axis 1"),
    "Fourier operator": Model(FourierOperator, (normal(N, 1, 8),), "complex weights between `rfft` and `irfft`"),
    "MADE": Model(MaskedAutoencoder, (ROWS,), "masked linear weights"),
    "experts, soft": Model(lambda: Experts(soft), (SETS,), "every expert on every row"),
    "experts, masked": Model(lambda: Experts(top_two_masked), (SETS,), "top 2 by a masked softmax"),
    "experts, out[mask] = expert(x[mask])": Model(
        lambda: Experts(top_one_by_mask), (SETS,), "rows taken and written by a mask"
    ),
    "experts, where and index_add_": Model(lambda: Experts(top_two_by_where), (SETS,), "top 2, as in Mixtral"),
    "experts, nonzero and index_put": Model(lambda: Experts(top_two_by_index_put), (SETS,), "top 2, accumulating writes"),
    "experts, sorted": Model(lambda: Experts(top_two_sorted), (SETS,), "rows sorted by their expert, split and brought back"),
    "CRF": Model(
        CRF, (normal(N, 4, 4), ints(3, N, 4)), "transitions in `logsumexp`, looked up by pairs of tags", losses=outputs
    ),
    "speech recogniser": Model(
        Recogniser,
        (normal(N, 2, 8), ints(4, N, 3) + 1, torch.tensor([2, 3, 1])),
        "time first, bidirectional GRU, CTC loss",
        losses=alignment_free,
    ),
    "factorisation machine": Model(FactorisationMachine, (ints(9, N, 4),), "square of the sum of embeddings"),
    "matrix factorisation": Model(MatrixFactorisation, (ints(5, N), ints(6, N)), "biases `b[user]`, a 0-dim parameter"),
    "skip-gram": Model(SkipGram, (ints(7, N), ints(7, N, 1)[:, 0], ints(7, N, 4)), "negative samples by `bmm`", losses=outputs),
    "multi-task experts": Model(Tasks, (ROWS,), "a gate for each task over shared experts"),
    "actor-critic": Model(
        ActorCritic,
        (ROWS, normal(N, 2), normal(N) - 3, normal(1, N)[0]),
        "`torch.distributions` with a learned deviation, PPO loss",
        losses=clipped_policy,
    ),
    "dueling Q-network": Model(
        Dueling,
        (ROWS, ints(3, N), normal(N), normal(N, 4).flip(0)),
        "`gather` by action, target under `no_grad`",
        losses=temporal_difference,
    ),
    "mixture density": Model(MixtureDensity, (ROWS, normal(N, 1)), "logsumexp over components", losses=mixture_likelihood),
    "ranking of lists": Model(
        Ranker, (normal(N, 3), SETS, normal(N, 5)), "bilinear scores, a softmax over documents", losses=list_loss
    ),
    "prefix tuning": Model(Prefix, (normal(N, 5, 4),), "learned keys and values before frozen ones, scaled values"),
    "DoRA": Model(DoRA, (ROWS,), "a merged low-rank weight, normalised by a detached norm"),
    "detection transformer": Model(
        Detector,
        (IMAGES, ints(4, N, 2), normal(N, 2, 4).sigmoid(), torch.tensor([2, 1, 2])),
        "learned queries, matching in a loop over samples",
        losses=matched,
    ),
    "loop over samples, out[i] = f(x[i])": Model(RowByRow, (ROWS,), "rows written into one tensor"),
    "padded again": Model(Repadded, (SETS, KEPT), "out of the padding, then `pad_sequence`"),
    "Gumbel softmax": Model(Gumbel, (ROWS, normal(N, 5)), "given noise, hard forward, soft backward"),
    "experts, stacked": Model(StackedExperts, (SETS,), "`weight[chosen]`, an expert's weight for every row"),
}

MIXED = {
    "InfoNCE": Model(Projector, (ROWS, normal(N, 4).flip(0)), "the other samples are the negatives", contrastive, mixes=True),
    "Barlow twins": Model(Projector, (ROWS, normal(N, 4).flip(0)), "correlations over the batch", decorrelated, mixes=True),
    "hard examples": Model(Projector, (ROWS,), "losses compared with the batch's mean", hardest, mixes=True),
    "mixup": Model(Projector, (ROWS,), "inputs blended with other samples", mixed_up, mixes=True),
    "minibatch discrimination": Model(Similar, (ROWS,), "distances between samples", mixes=True),
    "batch norm by hand": Model(Whitened, (ROWS,), "mean and variance over the batch", mixes=True),
    "batch norm in training": Model(lambda: ResNet(nn.BatchNorm2d), (IMAGES,), "mean and variance over the batch", mixes=True),
    "experts with capacity": Model(
        lambda: Experts(with_capacity), (SETS,), "an expert drops rows by what came before", mixes=True
    ),
    "expert choice": Model(
        lambda: Experts(chosen_by_experts), (SETS,), "experts choose among the rows of the batch", mixes=True
    ),
    "best half": Model(lambda: Experts(best_half, 2), (SETS,), "rows sorted by score over the batch", mixes=True),
    "best counted twice": Model(Projector, (ROWS,), "a sample's weight by its rank", best_counted_twice, mixes=True),
    "linked graphs": Model(LinkedGraphs, (normal(N, 4, 4), graphs()), "edges between graphs", sparse_graphs, mixes=True),
    "Cox regression": Model(Projector, (ROWS, normal(N)), "the others still at risk", risk_sets, mixes=True),
    "state over samples": Model(Queue, (ROWS,), "a recurrent state runs on from sample to sample", mixes=True),
}
