"""For those who write rules: check one against a batch-of-one loop, for every quantity and on awkward inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .errors import VerificationError
from .quantities import record


@dataclass(frozen=True)
class Sample:
    """One call of an op for `check_rule`.

    Among the arguments, `nn.Parameter`s are parameters; tensors with size `n` on axis `batch_dim` carry the samples unless
    named in `constant`; other tensors are the same for all samples.

    Example:
        >>> Sample((torch.randn(4, 3), nn.Parameter(torch.randn(2, 3))), n=4)  # doctest: +ELLIPSIS
        Sample(...)
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    n: int = 3
    batch_dim: int = 0
    # positions or names of tensors that are the same for all samples although a size is n
    constant: tuple[int | str, ...] = ()


def check_rule(op: Callable[..., Any], samples: Iterable[Sample], *, fallback: str = "error") -> None:
    """Compare the per-sample gradients of `op`'s parameters with a batch-of-one loop.

    Every sample is tried as given, with its tensors and the gradients of its results in other memory orders, with one of its samples only,
    and empty; the gradients, norms, weighted sums, dots, Grams and projections are compared, and the gradients of the batched tensors
    with plain autograd.

    Args:
        op: The function, as it is called in models.
        samples: Calls to try; use float64 tensors.
        fallback: "error" insists on a rule; "allow" accepts the slow way.

    Raises:
        VerificationError: If anything differs, naming the sample, the variant and the quantity.

    Example:
        >>> x, w = torch.randn(4, 3).double(), nn.Parameter(torch.randn(2, 3).double())
        >>> check_rule(torch.nn.functional.linear, [Sample((x, w), n=4)])
    """
    for place, sample in enumerate(samples):
        for variant, changed, after in _variants(sample):
            if not changed.n and not _takes_empty(op, changed):
                continue
            try:
                _check(op, changed, fallback, after)
            except AssertionError as error:
                raise VerificationError(
                    f"{op.__name__}: sample {place}, {variant}: {error}\nThe expected numbers are those of a "
                    "batch-of-one loop: correct the rule, or say in the sample which tensors are `constant`."
                ) from error


def _takes_empty(op: Callable[..., Any], sample: Sample) -> bool:
    """Whether plain torch runs the op on an empty batch, forward and backward; some ops do not."""
    call, inputs = _Call(op, sample), [_input(x) for x in _batched(sample)]
    leaves = [*call.parameters(), *(x for x in inputs if x.requires_grad)]
    try:
        torch.autograd.grad(call(*inputs), leaves, allow_unused=True)
    except (RuntimeError, IndexError, ValueError):
        return False
    return True


# What becomes of a result before the losses: it decides how the gradient lies in memory that comes back to the op.
After = Callable[[Tensor], Tensor]


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _summed(x: Tensor) -> Tensor:
    return x.sum(-1) if x.ndim > 2 else x


# Models that go on with another axis first.
_AFTER: dict[str, After] = {
    "as given": _as_it_is,
    "with its result's axes reversed": lambda x: x.permute(*reversed(range(x.ndim))).contiguous(),
    "with its result's last axis first": lambda x: x.movedim(-1, 0).contiguous() if x.ndim else x,
}


def _variants(sample: Sample) -> Iterator[tuple[str, Sample, After]]:
    for name, after in _AFTER.items():
        yield name, sample, after
    if sample.batch_dim == 0:
        yield "with its result summed over an axis", sample, _summed
    for name, changed in _changed(sample):
        yield name, changed, _as_it_is


def _changed(sample: Sample) -> Iterator[tuple[str, Sample]]:
    yield "in another memory order", _with_batched(sample, lambda x: x.mT.contiguous().mT if x.ndim > 1 else x)
    if sample.batch_dim == 0:
        yield "channels last", _with_batched(sample, _channels_last)
    yield "with n = 1", _with_batched(sample, lambda x: x.narrow(sample.batch_dim, 0, 1), n=1)
    yield "with an empty batch", _with_batched(sample, lambda x: x.narrow(sample.batch_dim, 0, 0), n=0)


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim]) if x.ndim in formats else x


def _with_batched(sample: Sample, change: Callable[[Tensor], Tensor], n: int | None = None) -> Sample:
    swap = {id(x): change(x) for x in _batched(sample)}
    args, kwargs = _swapped((sample.args, dict(sample.kwargs)), swap)
    return Sample(args, kwargs, sample.n if n is None else n, sample.batch_dim, sample.constant)


def _swapped(tree: Any, swap: Mapping[int, Any]) -> Any:
    return tree_map(lambda x: swap.get(id(x), x) if isinstance(x, Tensor) else x, tree)


def _named(sample: Sample) -> list[tuple[int | str, Any]]:
    flat: list[tuple[int | str, Any]] = []
    arguments: list[tuple[int | str, Any]] = [*enumerate(sample.args), *sample.kwargs.items()]
    for key, value in arguments:
        flat += [(key, item) for item in (value if isinstance(value, list | tuple) else [value])]
    return flat


def _batched(sample: Sample) -> list[Tensor]:
    return [
        x
        for key, x in _named(sample)
        if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) and key not in sample.constant and _has_batch(x, sample)
    ]


def _has_batch(x: Tensor, sample: Sample) -> bool:
    return x.ndim > sample.batch_dim and x.shape[sample.batch_dim] == sample.n


class _Call(nn.Module):
    """The op as a module: its parameters, and a forward that takes the batched tensors."""

    def __init__(self, op: Callable[..., Any], sample: Sample, after: After = _as_it_is) -> None:
        super().__init__()
        self.op, self.sample, self.after = op, sample, after
        found = {id(x): x for _, x in _named(sample) if isinstance(x, nn.Parameter)}
        self.shared = nn.ParameterList(found.values())

    def forward(self, *batched: Tensor) -> Tensor:
        swap = dict(zip(map(id, _batched(self.sample)), batched, strict=True))
        args, kwargs = _swapped((self.sample.args, dict(self.sample.kwargs)), swap)
        out = self.op(*args, **kwargs)
        outs = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor) and x.is_floating_point()]
        # a nonlinear function of every entry: no two samples get the same output gradient
        return torch.stack([(x * (x.cos() + 1.5)).sum() for x in map(self.after, outs)]).sum()


def _check(op: Callable[..., Any], sample: Sample, fallback: str, after: After = _as_it_is) -> None:
    call, inputs = _Call(op, sample, after), [_input(x) for x in _batched(sample)]
    wanted, wanted_inputs = _loop(call, inputs, sample)
    with record(call, batch_size=sample.n, batch_dim=sample.batch_dim, fallback=fallback) as rec:
        for key in sample.constant:
            rec.constant(sample.kwargs[key] if isinstance(key, str) else sample.args[key])
        call(*inputs).backward()
    found, norms = rec.grads(), rec.norms()
    for name, expected in wanted.items():
        _close(f"gradient of {name}", found[name], expected)
    for place, (x, wanted_input) in enumerate(zip(inputs, wanted_inputs, strict=True)):
        if x.grad is not None and wanted_input is not None:
            _close(f"gradient of input {place}", x.grad, wanted_input)
    flat = torch.cat(
        [rows.reshape(sample.n, rows[:1].numel() if sample.n else rows.shape[1:].numel()) for rows in wanted.values()],
        1,
    )
    _close("norms", norms, flat.norm(dim=1))
    _check_linear(rec, wanted, flat)


def _check_linear(rec: Any, wanted: Mapping[str, Tensor], flat: Tensor) -> None:
    generator = torch.Generator("cpu").manual_seed(1)
    weights = torch.randn(len(flat), generator=generator, device="cpu").to(flat)
    direction = {name: torch.randn(rows.shape[1:], generator=generator, device="cpu").to(rows) for name, rows in wanted.items()}
    aim = torch.cat([d.flatten() for d in direction.values()])
    total = torch.cat([part.flatten() for part in rec.weighted_sum(weights).values()])
    _close("weighted sum", total, weights @ flat)
    _close("dot", rec.dot(direction), flat @ aim)
    _close("gram", rec.gram(), flat @ flat.T)
    matrix = {name: torch.stack([d, 3 * d.flip(0) if d.ndim else d]) for name, d in direction.items()}
    rows = torch.cat([m.flatten(1) if m.ndim > 1 else m[:, None] for m in matrix.values()], 1)
    _close("projection", rec.project(matrix), flat @ rows.T)


def _close(quantity: str, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, msg=lambda text: f"{quantity}: {text}")


def _input(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


def _loop(call: _Call, inputs: list[Tensor], sample: Sample) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """The gradients by plain autograd: per sample for the parameters, of the whole batch for the inputs."""
    parameters = dict(call.named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    pieces: list[list[Tensor | None]] = []
    for i in range(sample.n):
        one = [_input(x.narrow(sample.batch_dim, i, 1)) for x in inputs]
        single = _Call(call.op, _with_batched(sample, lambda x: x), call.after)
        swap = dict(zip(map(id, _batched(sample)), one, strict=True))
        args, kwargs = _swapped((sample.args, dict(sample.kwargs)), swap)
        single.sample = Sample(args, kwargs, 1, sample.batch_dim, sample.constant)
        leaves = [*parameters.values(), *(x for x in one if x.requires_grad)]
        found = torch.autograd.grad(single(*one), leaves, allow_unused=True, materialize_grads=True)
        for name, grad in zip(parameters, found, strict=False):
            # an op with sparse gradients stands for the same numbers
            rows[name].append(grad.to_dense() if grad.is_sparse else grad)
        rest = iter(found[len(parameters) :])
        pieces.append([next(rest) if x.requires_grad else None for x in one])
    stacked = {
        name: torch.stack(g) if g else parameters[name].new_zeros(0, *parameters[name].shape) for name, g in rows.items()
    }
    return stacked, [_put_together(x, [p[k] for p in pieces], sample) for k, x in enumerate(inputs)]


def _put_together(x: Tensor, pieces: list[Tensor | None], sample: Sample) -> Tensor | None:
    found = [p for p in pieces if p is not None]
    return torch.cat(found, sample.batch_dim) if found else torch.zeros_like(x)
