"""The models that everything is measured on: unmodified, written as their users would, with one loss per sample."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A model, a batch, and the losses `(n,)` of its samples."""

    name: str
    model: nn.Module
    # (outputs, targets) -> (n,)
    losses: Callable[[Tensor, Tensor], Tensor]
    input: Tensor
    target: Tensor

    @property
    def n(self) -> int:
        return len(self.input)

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.input, self.target

    def loss_fn(self, model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.losses(model(batch[0]), batch[1])

    def to(self, device: str, dtype: torch.dtype) -> "Workload":
        moved = self.input.to(device, dtype) if self.input.is_floating_point() else self.input.to(device)
        return Workload(self.name, self.model.to(device, dtype), self.losses, moved, self.target.to(device))


class Attention(nn.Module):
    """Self-attention with one packed projection."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small GPT; position ids are given per sample, so that every peer can run it."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int, *, tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
        x = self.tokens(ids) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ViT(nn.Module):
    """A small vision transformer with a class token and a position table."""

    def __init__(self, width: int, layers: int, heads: int, patch: int, side: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (side // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Residual(nn.Module):
    """A basic block of a residual network, with group norm."""

    def __init__(self, inward: int, outward: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inward, outward, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outward, outward, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(8, outward), nn.GroupNorm(8, outward)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and inward == outward
        shortcut = (nn.Conv2d(inward, outward, 1, stride, bias=False), nn.GroupNorm(8, outward))
        self.shortcut = nn.Identity() if same else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


def resnet18(width: int, classes: int) -> nn.Module:
    """ResNet-18 for small images, group norm in place of batch norm."""
    widths = [width, width, 2 * width, 4 * width, 8 * width]
    stages = [
        block
        for stage, (inward, outward) in enumerate(itertools.pairwise(widths))
        for block in (Residual(inward, outward, 1 if stage == 0 else 2), Residual(outward, outward, 1))
    ]
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes))


class Tagger(nn.Module):
    """An LSTM language model."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(ids))[0])


def token_losses(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape).mean(1)


def class_losses(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def mlp(n: int = 256, width: int = 1024, depth: int = 2) -> Workload:
    widths = [784, *[width] * depth]
    hidden = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(width, 10))
    return Workload(
        f"MLP 784-{'-'.join([str(width)] * depth)}-10, n={n}", model, class_losses, torch.randn(n, 784), _classes(n)
    )


def cnn(n: int = 64) -> Workload:
    widths = [3, 32, 64, 64, 128]
    layers = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4, 10))
    return Workload(f"CNN 32-64-64-128, 3x32x32, n={n}", model, class_losses, torch.randn(n, 3, 32, 32), _classes(n))


def resnet(n: int = 32, width: int = 32) -> Workload:
    model, images = resnet18(width, 10), torch.randn(n, 3, 32, 32)
    return Workload(f"ResNet-18 GroupNorm, width {width}, 3x32x32, n={n}", model, class_losses, images, _classes(n))


def gpt(
    n: int = 8, length: int = 128, width: int = 384, layers: int = 4, vocabulary: int = 8192, *, tied: bool = False
) -> Workload:
    model = GPT(vocabulary, width, layers, max(1, width // 64), length, tied=tied)
    ids = torch.randint(vocabulary, (n, length))
    name = f"GPT d={width}, {layers} layers, T={length}, vocabulary {vocabulary}, {'tied' if tied else 'untied'}, n={n}"
    return Workload(name, model, token_losses, ids, ids.roll(-1, 1))


def vit(n: int = 32, width: int = 192, layers: int = 6, patch: int = 4, side: int = 32) -> Workload:
    model, images = ViT(width, layers, max(1, width // 64), patch, side, 10), torch.randn(n, 3, side, side)
    return Workload(
        f"ViT d={width}, {layers} layers, patch {patch}, {side}x{side}, n={n}", model, class_losses, images, _classes(n)
    )


def lstm(n: int = 32, length: int = 64) -> Workload:
    ids = torch.randint(2000, (n, length))
    name = f"LSTM 128-256, vocabulary 2000, T={length}, n={n}"
    return Workload(name, Tagger(2000, 128, 256), token_losses, ids, ids.roll(-1, 1))


# The table of the README.
WORKLOADS: dict[str, Callable[[], Workload]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet": resnet,
    "gpt": gpt,
    "gpt-tied": lambda: gpt(tied=True),
    "gpt-512": lambda: gpt(length=512),
    "gpt-512-tied": lambda: gpt(length=512, tied=True),
    "vit": vit,
    "lstm": lstm,
}

# What a GPU is for.
CUDA_WORKLOADS: dict[str, Callable[[], Workload]] = {
    "gpt2-1024": lambda: gpt(8, 1024, 768, 12, 50304),
    "gpt2-256": lambda: gpt(32, 256, 768, 12, 50304),
    "vit-b": lambda: vit(64, 768, 12, 16, 224),
    "resnet-64": lambda: resnet(256, 64),
}


def _classes(n: int) -> Tensor:
    return torch.randint(10, (n,))
