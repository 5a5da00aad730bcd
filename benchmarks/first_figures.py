"""First figures: what per-sample quantities cost beside a plain training step, ours and others', equal numbers checked first.

    python benchmarks/first_figures.py [--repeats 15] [--threads 2] [--json figures.json]

Every method runs once per round, all methods of a workload interleaved in one process; the table gives the median and the quartiles
of the time over that of the plain step (forward, and backward with ordinary gradients) in the same round.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import samplewise as sw

Grads = dict[str, Tensor]


class Block(nn.Module):
    """One transformer layer of a small GPT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small GPT with an untied head; position ids are given per sample, so that every peer can run it."""

    def __init__(self, vocabulary: int = 2000, width: int = 192, layers: int = 4, heads: int = 6, length: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]).expand_as(ids)
        x = self.tokens(ids) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Workload:
    name: str
    model: nn.Module
    # (outputs, targets) -> (n,) losses
    losses: Callable[[Tensor, Tensor], Tensor]
    input: Tensor
    target: Tensor

    def loss_fn(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.losses(model(batch[0]), batch[1])


def token_losses(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape).mean(1)


def class_losses(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def workloads() -> list[Workload]:
    mlp = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    widths = [3, 32, 64, 64, 128]
    convolutions = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)) for a, b in itertools.pairwise(widths)
    ]
    cnn = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128 * 4, 10))
    ids = torch.randint(2000, (8, 64))
    return [
        Workload("MLP 784-1024-1024-10, n=256", mlp, class_losses, torch.randn(256, 784), torch.randint(10, (256,))),
        Workload("CNN 32-64-64-128, 3x32x32, n=64", cnn, class_losses, torch.randn(64, 3, 32, 32), torch.randint(10, (64,))),
        Workload("GPT d=192, 4 layers, T=64, vocabulary 2000, n=8", GPT(), token_losses, ids, ids.roll(-1, 1)),
    ]


def norms_of(grads: Grads) -> Tensor:
    return torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()


def clip(grads: Grads, limit: float) -> Grads:
    weights = (limit / norms_of(grads)).clamp(max=1)
    return {name: (weights @ g.flatten(1)).view(g.shape[1:]) for name, g in grads.items()}


def plain(w: Workload) -> None:
    w.model.zero_grad(set_to_none=True)
    w.loss_fn(w.model, (w.input, w.target)).sum().backward()


def by_loop(w: Workload) -> Grads:
    parameters = dict(w.model.named_parameters())
    rows = []
    for i in range(len(w.input)):
        loss = w.loss_fn(w.model, (w.input[i : i + 1], w.target[i : i + 1])).sum()
        rows.append(torch.autograd.grad(loss, list(parameters.values())))
    return {name: torch.stack(column) for name, column in zip(parameters, zip(*rows, strict=True), strict=True)}


def by_expanded_weights(w: Workload) -> Grads:
    for p in w.model.parameters():
        p.grad_sample = None
    for p in w.model.parameters():
        del p.grad_sample
    out = call_for_per_sample_grads(w.model, batch_size=len(w.input), loss_reduction="sum")(w.input)
    w.losses(out, w.target).sum().backward()
    return {name: p.grad_sample for name, p in w.model.named_parameters()}


def by_vmap(w: Workload) -> Grads:
    parameters = {name: p.detach() for name, p in w.model.named_parameters()}

    def loss(parameters: Grads, x: Tensor, y: Tensor) -> Tensor:
        return w.losses(functional_call(w.model, parameters, (x[None],)), y[None]).sum()

    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, w.input, w.target)


def ours(w: Workload, quantity: str, limit: float) -> object:
    batch = (w.input, w.target)
    if quantity == "norms":
        return sw.per_sample_norms(w.model, w.loss_fn, batch)
    if quantity == "clipped sum":
        return sw.clipped_grads(w.model, w.loss_fn, batch, max_grad_norm=limit)[0]
    return sw.per_sample_grads(w.model, w.loss_fn, batch)


def others(by: Callable[[Workload], Grads], quantity: str) -> Callable[[Workload, float], object]:
    finish = {"norms": lambda g, _: norms_of(g), "clipped sum": clip, "gradients": lambda g, _: g}[quantity]
    return lambda w, limit: finish(by(w), limit)


QUANTITIES = ("norms", "clipped sum", "gradients")
PEERS = {"loop": by_loop, "Expanded Weights": by_expanded_weights, "vmap(grad)": by_vmap}
METHODS: dict[tuple[str, str], Callable[[Workload, float], object]] = {
    **{("samplewise", q): (lambda w, limit, q=q: ours(w, q, limit)) for q in QUANTITIES},
    **{(peer, q): others(by, q) for peer, by in PEERS.items() for q in QUANTITIES},
}


def agree(found: object, expected: object) -> bool:
    if isinstance(expected, dict):
        return all(agree(found[name], value) for name, value in expected.items())
    scale = expected.abs().max()
    return bool((found - expected).abs().max() <= 1e-3 * scale)


def usable(w: Workload, limit: float) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """The methods that run and give the loop's numbers, and why the others are left out."""
    expected = {q: METHODS["loop", q](w, limit) for q in QUANTITIES}
    kept, left_out = [], {}
    for (system, quantity), run in METHODS.items():
        try:
            right = agree(run(w, limit), expected[quantity])
        except Exception as error:  # noqa: BLE001  (whatever a peer raises is its result)
            left_out[f"{system}, {quantity}"] = f"raises {type(error).__name__}: {str(error).splitlines()[0][:100]}"
            continue
        if right:
            kept.append((system, quantity))
        else:
            left_out[f"{system}, {quantity}"] = "wrong numbers"
    return kept, left_out


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(w: Workload, repeats: int) -> dict[str, object]:
    limit = norms_of(by_loop(w)).median().item()
    kept, left_out = usable(w, limit)
    times: dict[str, list[float]] = {"plain": [], **{f"{s}, {q}": [] for s, q in kept}}
    for round_ in range(repeats + 2):
        found = {"plain": seconds(lambda: plain(w))}
        w.model.zero_grad(set_to_none=True)
        for system, quantity in kept:
            found[f"{system}, {quantity}"] = seconds(lambda run=METHODS[system, quantity]: run(w, limit))
        if round_ >= 2:
            for name, value in found.items():
                times[name].append(value)
    return {
        "workload": w.name,
        "plain_ms": 1e3 * statistics.median(times["plain"]),
        "left_out": left_out,
        "ratios": ratios(times),
    }


def ratios(times: dict[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    """Median and quartiles of the ratio to the plain step within rounds."""
    base = times["plain"]
    table = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles([v / b for v, b in zip(values, base, strict=True)], n=4)
        table[name] = (middle, low, high)
    return table


def cell(result: dict[str, object], system: str, quantity: str) -> str:
    found = result["ratios"].get(f"{system}, {quantity}")
    if found is None:
        return result["left_out"][f"{system}, {quantity}"].split(":")[0]
    return f"{found[0]:.2f} ({found[1]:.2f}-{found[2]:.2f})"


def markdown(results: list[dict[str, object]]) -> str:
    systems = ["samplewise", *PEERS]
    lines = [f"| workload (plain step) | quantity | {' | '.join(systems)} |", "|---" * (2 + len(systems)) + "|"]
    for result in results:
        for quantity in QUANTITIES:
            head = f"{result['workload']} ({result['plain_ms']:.0f} ms)" if quantity == QUANTITIES[0] else ""
            lines.append(f"| {head} | {quantity} | {' | '.join(cell(result, s, quantity) for s in systems)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    results = [measure(w, options.repeats) for w in workloads()]
    print(markdown(results))
    print(f"\n{options.repeats} rounds, {options.threads} threads, float32, torch {torch.__version__}, {platform.machine()}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
