"""A program of named steps, run as a model; parameters are made when first used, and used again where shape and number agree."""

import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

# Letters of a layout: B samples, T positions, D or C features, H and W an image; M is samples and positions merged, X positions and
# samples, R some rows of some samples.
FEATURES = {"BTD": 2, "TBD": 2, "BD": 1, "MD": 1, "XD": 1, "RD": 1, "TDB": 1, "DB": 0, "BCT": 1, "BCHW": 1}
SAMPLES = {"BTD": 0, "TBD": 1, "BD": 0, "TDB": 2, "DB": 1, "BCT": 0, "BCHW": 0}
POSITIONS = {"BTD": 1, "TBD": 0, "TDB": 0, "BCT": 2}

EVERY = tuple(FEATURES)
# samples on an axis of their own
PLAIN = tuple(SAMPLES)
# features last
LAST = ("BTD", "TBD", "MD", "XD", "BD", "RD")
LONG = ("BTD", "TBD")


@dataclass(frozen=True)
class Op:
    layouts: tuple[str, ...]
    run: Callable
    # takes the steps that follow it as its body
    region: bool = False
    # may mix the samples
    harmful: bool = False
    # computes in a shorter type than float64
    coarse: bool = False


OPS: dict[str, Op] = {}


def op(layouts, **flags):
    """Put a function `(net, x, k)` into the table under its own name; `k` chooses the variant and the parameters."""

    def put(function):
        name = function.__name__.replace("_", " ").strip()
        assert name not in OPS
        OPS[name] = Op(tuple(layouts), function, **flags)
        return function

    return put


# `how` a program is recorded whose losses are made of derivatives by its input, and one that is traced and run again
DERIVATIVES, TRACED = 4, 5


@dataclass(frozen=True)
class Case:
    """All that determines a program, its input and how it is recorded."""

    steps: tuple[tuple[str, int], ...]
    n: int = 3
    t: int = 2
    d: int = 2
    batch_dim: int = 0
    loss: int = 0
    # 0 rec.backward(losses), 1 losses.sum().backward(), 2 losses.mean().backward(), 3 streamed
    how: int = 0
    # the parameters with number 1 are frozen
    frozen: bool = False
    # the input wants a gradient too
    wants: bool = False
    seed: int = 0
    # without the shorter types
    precise: bool = False

    @staticmethod
    def of(fields):
        return Case(**{**fields, "steps": tuple((name, k) for name, k in fields["steps"])})

    def fields(self):
        plain = asdict(Case(()))
        return {name: value for name, value in asdict(self).items() if name == "steps" or value != plain[name]}

    def but(self, **changes):
        return replace(self, **changes)

    def shape(self):
        return [(self.n, self.t, self.d), (self.t, self.n, self.d), (self.t, self.d, self.n)][self.batch_dim]

    def network(self):
        net = Network(self)
        return net, torch.randn(self.shape(), dtype=torch.float64, generator=net.generator("x"))


class Network(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case = case
        self.table, self.layers = nn.ParameterDict(), nn.ModuleDict()
        # inside autocast, which leaves float64 alone
        self.short = False
        # bodies whose parameters are made
        self.warm = set()
        self.ran = []

    def p(self, k, *shape):
        """A parameter of this shape: number 0 or 1."""
        number = k // 30 % 2
        name = "x".join(map(str, shape)) + f"_{number}"
        if name not in self.table:
            value = torch.randn(shape, dtype=torch.float64, generator=self.generator(name)) / 2
            self.table[name] = nn.Parameter(value, requires_grad=not (self.case.frozen and number == 1))
        return self.table[name].float() if self.short else self.table[name]

    def generator(self, name):
        """Values depend on the seed and the name alone, not on what was made before."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.case.seed} {name}".encode()))

    def layer(self, k, name, make):
        key = f"{name}_{k // 30 % 2}".replace(".", "_")
        if key not in self.layers:
            with torch.random.fork_rng():
                torch.manual_seed(self.generator(key).initial_seed())
                self.layers[key] = make().double()
        return self.layers[key]

    def forward(self, x):
        self.size, self.layout = x.shape[self.case.batch_dim], ["BTD", "TBD", "TDB"][self.case.batch_dim]
        self.kept, self.ran = [(x, self.layout)], []
        return self.run(x, self.case.steps)

    def run(self, x, steps):
        left = list(steps)
        while left:
            name, k = left.pop(0)
            step = OPS[name]
            if self.layout not in step.layouts:
                continue
            self.ran.append(name)
            if step.region:
                body, left = left[: 1 + k % 3], left[1 + k % 3 :]
                x = step.run(self, x, k, body)
            else:
                x = step.run(self, x, k)
            self.kept.append((x, self.layout))
        return x

    def inside(self, x, steps, layout=None, size=None):
        """Run steps on a tensor of its own layout and number of samples; gives the result and its layout."""
        outside = self.layout, self.size, self.kept
        self.layout, self.size = layout or self.layout, self.size if size is None else size
        self.kept = [(x, self.layout)]
        try:
            return self.run(x, steps), self.layout
        finally:
            self.layout, self.size, self.kept = outside

    def to(self, layout, x):
        self.layout = layout
        return x

    def earlier(self, x, k):
        """A kept value of the same layout and shape, else `x`."""
        same = [v for v, layout in self.kept if layout == self.layout and v.shape == x.shape]
        return same[k % len(same)] if same else x

    def cast(self, x, dtype):
        return x.to(torch.float64 if self.case.precise else dtype)

    @property
    def batch(self):
        return SAMPLES.get(self.layout)

    @property
    def features(self):
        return FEATURES[self.layout]

    @property
    def positions(self):
        return POSITIONS[self.layout]

    def width(self, x):
        return x.shape[self.features]

    def aligned(self, p, x):
        """A parameter `(d,)` shaped to broadcast along the features of `x`."""
        return p.view(-1, *[1] * (x.ndim - 1 - self.features))

    def losses(self, x):
        if self.case.how != DERIVATIVES:
            return self._outputs_losses(x)
        x = x if x.requires_grad else x.clone().requires_grad_()
        energy = self._outputs_losses(x)
        (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy.cos() + slope.movedim(self.case.batch_dim, 0).flatten(1).square().sum(1)

    def _outputs_losses(self, x):
        out = per_sample(self(x), self.layout, self.size)
        return LOSSES[self.case.loss % len(LOSSES)](out)


def per_sample(out, layout, n):
    """`(n, features)` from any layout."""
    if layout == "MD":
        return out.reshape(n, -1)
    if layout == "XD":
        return out.reshape(-1, n, out.shape[-1]).transpose(0, 1).flatten(1)
    return out.movedim(SAMPLES[layout], 0).flatten(1)


def _entropy(out):
    return F.cross_entropy(out, torch.zeros(len(out), dtype=torch.int64), reduction="none")


LOSSES = [
    lambda out: (out * (out.cos() + 1.5)).sum(1),
    _entropy,
    lambda out: F.mse_loss(out, torch.ones_like(out), reduction="none").mean(-1),
    lambda out: F.binary_cross_entropy_with_logits(out, torch.full_like(out, 0.3), reduction="none").sum(1),
    lambda out: -out.log_softmax(-1)[:, 0] + 0.1 * out.square().mean(1),
    lambda out: torch.stack([(row * (row.sin() + 2)).sum() for row in out.unbind(0)]),
]
