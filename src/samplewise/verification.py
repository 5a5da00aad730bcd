"""The judge: every quantity against a batch-of-one loop, and against itself on other batches."""

from collections.abc import Callable, Iterable  # noqa: TC003
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .errors import VerificationError
from .quantities import Record, record
from .results import clipping_weights
from .streaming import Batch, LossFunction, clipped_grads, per_sample_norms

Grads = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """The largest difference found for one quantity of one parameter (or of all)."""

    quantity: str
    parameter: str
    # relative to the largest magnitude of the expected values
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it lies within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Report:
    """What `verify` compared."""

    samples: tuple[int, ...]
    differences: tuple[Difference, ...]

    @property
    def failures(self) -> tuple[Difference, ...]:
        """The differences beyond their tolerance."""
        return tuple(d for d in self.differences if not d.passed)

    @property
    def worst(self) -> float:
        """The largest relative error of all."""
        return max((d.error for d in self.differences), default=0.0)

    def __str__(self) -> str:
        """One line per failure, or one line in all."""
        if not self.failures:
            return f"{len(self.differences)} comparisons on samples {list(self.samples)} agree; largest relative error {self.worst:.1e}"
        lines = [
            f"{d.quantity} of {d.parameter}: relative error {d.error:.1e}, tolerance {d.tolerance:.1e}" for d in self.failures
        ]
        return "\n".join([f"{len(lines)} of {len(self.differences)} comparisons differ from the batch-of-one loop:", *lines])


def verify(
    model: nn.Module, loss_fn: LossFunction, batch: Batch, *, samples: int = 3, tolerance: float | None = None
) -> Report:
    """Compare every quantity with a batch-of-one loop on a few samples, and with itself on other batches.

    Args:
        model: The model, in the mode it is used in. Anything random in it (dropout) makes the comparison fail: use `eval()`.
        loss_fn: `loss_fn(model, batch) -> (n,)`.
        batch: Tensors, or nested tuples, lists and dicts of them, with the samples on axis 0; whatever has another size
            there is handed to every sample as it is.
        samples: How many samples to compare, spread over the batch.
        tolerance: Largest error relative to the largest expected magnitude; by default 1e-8 in float64, 1e-3 in float32,
            5e-2 in half precision.

    Returns:
        A report; `print` it.

    Raises:
        VerificationError: If a comparison fails; its message begins with the report.
        ValueError: If the batch has no tensors, or an empty axis 0.

    Example:
        >>> model, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()
        >>> verify(model, lambda m, x: m(x).square().sum(1), x).failures
        ()
    """
    n = _batch_size(batch)
    chosen = sorted({round(k * (n - 1) / max(1, samples - 1)) for k in range(samples)})
    tolerance = _tolerance(model) if tolerance is None else tolerance
    expected = _loop(model, loss_fn, batch, n, chosen)
    with record(model, batch_size=n) as rec:
        rec.backward(loss_fn(model, batch))
    differences = [
        *_compare_rows(rec, expected, chosen, tolerance),
        *_compare_quantities(rec, expected, chosen, tolerance),
        *_compare_batches(model, loss_fn, batch, n, rec, tolerance),
    ]
    report = Report(tuple(chosen), tuple(differences))
    if report.failures:
        raise VerificationError(
            f"{report}\nIf the model draws random numbers (dropout), call `model.eval()` first. A number that leaves torch (`.item()`) "
            "counts as a constant: keep it a tensor if other samples have a part in it."
        )
    return report


def _batch_size(batch: Batch) -> int:
    tensors = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim]
    if not tensors or not tensors[0].shape[0]:
        raise ValueError(
            "verify: the batch needs at least one tensor with samples on axis 0, and found none in a "
            f"{type(batch).__name__}. Give tensors, or nested tuples, lists and dicts of them (`dict(batch)`)."
        )
    return tensors[0].shape[0]


def _tolerance(model: nn.Module) -> float:
    types = {p.dtype for p in model.parameters()}
    return 5e-2 if types & {torch.float16, torch.bfloat16} else 1e-3 if torch.float32 in types else 1e-8


def _take(batch: Batch, n: int, index: Tensor) -> Batch:
    """The batch of some samples only."""
    return tree_map(lambda x: x[index] if isinstance(x, Tensor) and x.ndim and x.shape[0] == n else x, batch)


def _loop(model: nn.Module, loss_fn: LossFunction, batch: Batch, n: int, chosen: Iterable[int]) -> Grads:
    """Per-sample gradients by ordinary backward passes, one sample at a time; the model's own `.grad` is put back."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = {name: p.grad for name, p in parameters.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    try:
        for i in chosen:
            model.zero_grad(set_to_none=True)
            loss_fn(model, _take(batch, n, torch.tensor([i], device="cpu"))).sum().backward()
            for name, p in parameters.items():
                rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad)
    finally:
        for name, p in parameters.items():
            p.grad = kept[name]
    return {name: torch.stack(found).detach() for name, found in rows.items()}


def _difference(
    quantity: str, parameter: str, found: Tensor, expected: Tensor, tolerance: float, whole: float = 0.0
) -> Difference:
    limits = torch.finfo(expected.dtype)
    # a gradient that is zero in exact arithmetic (of a key's bias) is rounding noise of the whole gradient
    floor = max(limits.tiny, 100 * limits.eps * whole / tolerance)
    scale = expected.abs().max().clamp_min(floor) if expected.numel() else expected.new_ones(())
    error = ((found.to(expected.dtype) - expected).abs().max() / scale).item() if expected.numel() else 0.0
    # nothing expected and nothing found is no error; NaN is one
    error = 0.0 if found.equal(expected) else error if error == error else float("inf")  # noqa: PLR0124
    return Difference(quantity, parameter, error, tolerance)


def _compare_rows(rec: Record, expected: Grads, chosen: list[int], tolerance: float) -> list[Difference]:
    found = rec.grads()
    whole = max((rows.abs().max().item() for rows in expected.values() if rows.numel()), default=0.0)
    return [
        _difference("gradient", f"'{name}'", found[name][chosen], rows, tolerance, whole) for name, rows in expected.items()
    ]


def _compare_quantities(rec: Record, expected: Grads, chosen: list[int], tolerance: float) -> list[Difference]:
    """The quantities that come from factors, against the same computed from the expected rows."""
    flat = torch.cat([_flat(rows) for rows in expected.values()], 1)
    n = len(rec.norms())
    weights = torch.zeros(n, dtype=flat.dtype, device=flat.device)
    weights[chosen] = torch.linspace(-1, 2, len(chosen), dtype=flat.dtype, device=flat.device)
    generator = torch.Generator("cpu").manual_seed(0)
    direction = {
        name: torch.randn(rows.shape[1:], generator=generator, device="cpu").to(rows) for name, rows in expected.items()
    }
    aim = torch.cat([_flat(d[None])[0] for d in direction.values()])
    matrix = {name: torch.stack([d, -2 * d]) for name, d in direction.items()}
    total = torch.cat([_flat(part[None])[0] for part in rec.weighted_sum(weights).values()])
    pairs: dict[str, tuple[Tensor, Tensor]] = {
        "norm": (rec.norms()[chosen], flat.norm(dim=1)),
        "weighted sum": (total, weights[chosen] @ flat),
        "dot": (rec.dot(direction)[chosen], flat @ aim),
        "gram": (rec.gram()[chosen][:, chosen], flat @ flat.T),
        "projection": (rec.project(matrix)[chosen], torch.stack([flat @ aim, -2 * (flat @ aim)], 1)),
    }
    return [_difference(name, "all parameters", found, wanted, tolerance) for name, (found, wanted) in pairs.items()]


def _flat(rows: Tensor) -> Tensor:
    """`(k, ...)` as a real matrix of k rows; inner products of complex gradients are those of their parts."""
    real = torch.view_as_real(rows.resolve_conj()) if rows.is_complex() else rows
    return real.reshape(len(rows), -1)


def _compare_batches(
    model: nn.Module, loss_fn: LossFunction, batch: Batch, n: int, rec: Record, tolerance: float
) -> list[Difference]:
    """The same samples in another order, and in two halves; and the one-call functions."""
    norms, found = rec.norms(), []
    turned = torch.arange(n, device="cpu").flip(0)
    orders: list[tuple[str, Callable[[], Tensor]]] = [
        ("norm in reverse order", lambda: per_sample_norms(model, loss_fn, _take(batch, n, turned), batch_size=n).flip(0)),
        ("norm streamed", lambda: per_sample_norms(model, loss_fn, batch, batch_size=n)),
        (
            "norm in two halves",
            lambda: torch.cat([per_sample_norms(model, loss_fn, part, batch_size=k) for part, k in _halves(batch, n)]),
        ),
    ]
    found += [_difference(name, "all parameters", run(), norms, tolerance) for name, run in orders]
    median = norms.median().item()
    limit = median if median > 0 else 1.0
    clipped, _ = clipped_grads(model, loss_fn, batch, max_grad_norm=limit, batch_size=n)
    wanted = rec.weighted_sum(clipping_weights(norms, limit))
    whole = max((total.abs().max().item() for total in wanted.values() if total.numel()), default=0.0)
    return found + [_difference("clipped sum", f"'{name}'", clipped[name], wanted[name], tolerance, whole) for name in wanted]


def _halves(batch: Batch, n: int) -> list[tuple[Any, int]]:
    return [(_take(batch, n, part), len(part)) for part in torch.arange(n, device="cpu").tensor_split(2) if len(part)]
