"""What the recording itself costs: microseconds for each op of a deep model of tiny layers, and the share of a GPT's step.

    python benchmarks/overhead.py [--threads 1] [--repeats 9]

A chain of ops is run plainly and for norms; the difference, forward and backward apart, grows with the chain, and what a hundred ops more
add to it is divided by their number. What remains without any is the recording itself, with one linear layer. "In a trace" is the same of
`samplewise.traced`, forward and backward together: below zero it costs less than the Python of a plain step. Beside them stands what a step
takes that is written by hand for the linear layers (`by_hand.py`), and last what a `torch.autograd.Function` takes that does nothing: in a
recording every op with parameters needs one. The GPT is run with its 4 layers and all its ops but with width 6 and two samples of two
tokens, where nothing but overhead is left, beside the time of its real step.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samplewise as sw
from by_hand import Collected, with_layers
from samplewise.surroundings import Surroundings
from samplewise.taps import Seen
from workloads import GPT, gpt, token_losses

LENGTH, WIDTH = 100, 8


@dataclass(frozen=True)
class Chain:
    """An op, repeated; `ops` calls of torch in each repetition."""

    step: Callable[[nn.Module | None, Tensor], Tensor]
    layer: Callable[[], nn.Module] | None = None
    ops: int = 1


CHAINS = {
    "elementwise": Chain(lambda _, x: x * 1.5),
    "in place": Chain(lambda _, x: (x * 1.5).relu_(), ops=2),
    "view": Chain(lambda _, x: x.view(4, 2, WIDTH // 2).view(4, WIDTH), ops=2),
    "softmax": Chain(lambda _, x: F.softmax(x, -1)),
    "linear": Chain(lambda m, x: m(x), lambda: nn.Linear(WIDTH, WIDTH)),
    "layer norm": Chain(lambda m, x: m(x), lambda: nn.LayerNorm(WIDTH)),
}


class Deep(nn.Module):
    """A linear layer and a chain behind it."""

    def __init__(self, chain: Chain, length: int) -> None:
        super().__init__()
        self.first, self.chain = nn.Linear(WIDTH, WIDTH), chain
        self.layers = nn.ModuleList(chain.layer() for _ in range(length)) if chain.layer else [None] * length

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = self.chain.step(layer, x)
        return x


def fastest(run: Callable[[], object], repeats: int) -> float:
    """Seconds; what else the machine does must not count."""
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[3:])


def plain_step(model: nn.Module, losses: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    losses(model, x).sum().backward()


def recorded_forward(model: nn.Module, x: Tensor) -> None:
    with sw.record(model):
        model(x)


# (seconds of the forward, of the whole step) of a model on a batch, the fastest of some repeats
Way = Callable[[nn.Module, Tensor, int], tuple[float, float]]


def row_sums(model: nn.Module, x: Tensor) -> Tensor:
    """Losses, `(n,)`."""
    return model(x).sum(1)


def plain(model: nn.Module, x: Tensor, repeats: int) -> tuple[float, float]:
    """An ordinary step."""
    return fastest(lambda: model(x), repeats), fastest(lambda: plain_step(model, row_sums, x), repeats)


def ours(model: nn.Module, x: Tensor, repeats: int) -> tuple[float, float]:
    """Norms by a recording."""
    return fastest(lambda: recorded_forward(model, x), repeats), fastest(
        lambda: sw.per_sample_norms(model, row_sums, x), repeats
    )


def traced(model: nn.Module, x: Tensor, repeats: int) -> tuple[float, float]:
    """Norms by a trace, which has no forward of its own."""
    norms = sw.traced(sw.per_sample_norms, model, row_sums)
    return 0.0, fastest(lambda: norms(x), repeats)


class ByHand:
    """Norms written by hand for a model of linear layers."""

    def __init__(self, model: nn.Module) -> None:
        self.collected = Collected()
        self.model = with_layers(model, self)

    def norms(self, x: Tensor) -> Tensor:
        """`(n,)`."""
        self.collected = Collected()
        row_sums(self.model, x).sum().backward()
        return self.collected.norms()[0]


def by_hand(model: nn.Module, x: Tensor, repeats: int) -> tuple[float, float]:
    """The same."""
    step = ByHand(model)
    return fastest(lambda: step.model(x), repeats), fastest(lambda: step.norms(x), repeats)


def nothing(_: nn.Module, __: Tensor, ___: int) -> tuple[float, float]:
    """No step at all, to compare with."""
    return 0.0, 0.0


def overhead(way: Way, chain: Chain, length: int, repeats: int, than: Way = plain) -> tuple[float, float]:
    """Microseconds that one way with a chain takes longer than another, in the forward and in the backward."""
    model, x = Deep(chain, length), torch.randn(4, WIDTH)
    (forward, step), (less, least) = way(model, x, repeats), than(model, x, repeats)
    return 1e6 * (forward - less), 1e6 * (step - forward - (least - less))


def per_op(way: Way, chain: Chain, repeats: int, than: Way = plain) -> str:
    """Microseconds that each op adds, in the forward and in the backward."""
    short, long = (overhead(way, chain, length, repeats, than) for length in (LENGTH, 2 * LENGTH))
    return " | ".join(f"{(b - a) / (LENGTH * chain.ops):.1f}" for a, b in zip(short, long, strict=True))


def in_a_trace(chain: Chain, repeats: int) -> str:
    """Microseconds that each op adds to a traced step, forward and backward together."""
    short, long = (sum(overhead(traced, chain, length, repeats)) for length in (LENGTH, 2 * LENGTH))
    return f"{(long - short) / (LENGTH * chain.ops):.1f}"


def gpt_share(repeats: int) -> tuple[float, float, float]:
    """The overhead of norms in milliseconds, recorded and traced, and the time of the real plain step."""
    tiny, ids = GPT(8, 6, 4, 1, 2), torch.randint(8, (2, 2))

    def losses(m: nn.Module, ids: Tensor) -> Tensor:
        return token_losses(m(ids), ids)

    norms, least = sw.traced(sw.per_sample_norms, tiny, losses), fastest(lambda: plain_step(tiny, losses, ids), repeats)
    more = [fastest(run, repeats) - least for run in (lambda: sw.per_sample_norms(tiny, losses, ids), lambda: norms(ids))]
    real = gpt()
    step = fastest(lambda: plain_step(real.model, lambda m, _: real.loss_fn(m, real.batch), real.input), 3)
    return 1e3 * more[0], 1e3 * more[1], 1e3 * step


def look(repeats: int) -> tuple[float, int]:
    """Microseconds in which a trace looks at what a GPT and its losses can reach, as in each call, and how many modules those are."""
    workload = gpt()
    around = Surroundings(workload.model, workload.loss_fn)
    around.state()
    return 1e6 * fastest(around.state, repeats), len(list(workload.model.modules()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print("| op | forward, us | backward, us | in a trace, us |\n|---|---|---|---|")
    for name, chain in CHAINS.items():
        print(f"| {name} | {per_op(ours, chain, options.repeats)} | {in_a_trace(chain, options.repeats)} |")
    print(f"| linear, by hand | {per_op(by_hand, CHAINS['linear'], options.repeats)} | |")
    print(
        f"| a function that does nothing, plain | {per_op(plain, Chain(lambda _, x: Seen.apply(x)), options.repeats, nothing)} | |"
    )
    forward, backward = overhead(ours, CHAINS["view"], 0, options.repeats)
    both = sum(overhead(traced, CHAINS["view"], 0, options.repeats))
    print(f"| the recording itself | {forward:.0f} | {backward:.0f} | {both:.0f} |")
    more, less, step = gpt_share(options.repeats)
    print(
        f"\nGPT: {more:.1f} ms of overhead for norms, {more / step:.1%} of a plain step of {step:.0f} ms; {less:.1f} ms in a trace"
    )
    found, modules = look(options.repeats)
    print(
        f"Of that {found / 1e3:.2f} ms to look at what may have changed, {found / modules:.1f} us for each of {modules} modules"
    )


if __name__ == "__main__":
    main()
