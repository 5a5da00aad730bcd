"""One call for one quantity, at the lowest memory: each parameter's is formed at its last use in the backward."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .collecting import Held
from .factors import Factor
from .joined import Joined
from .quantities import Record
from .recording import Recording
from .results import check_limit, clipping_weights, dense_in, total_norms
from .strategy import Strategy
from .sums import Store, tensors_of

Batch = Any
LossFunction = Callable[[Any, Batch], Tensor]
# Elements of small factors that wait for others, to be taken together.
_MOST_WAITING = 2**20


def per_sample_grads(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    *,
    batch_size: int | None = None,
    batch_dim: int = 0,
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The gradient of every sample's loss.

    Args:
        model: Any module, unmodified.
        loss_fn: `loss_fn(model, batch) -> (n,)` losses.
        batch: Handed to `loss_fn` as it is.
        batch_size: n; by default the common size of the model's tensor inputs on `batch_dim`.
        batch_dim: The axis of the model's inputs that carries the samples.
        out: Tensors `{name: (n, *shape)}` to write the gradients into, the result of an earlier call for example: fresh memory is
            slow.

    Returns:
        `{name: (n, *shape)}`.

    Raises:
        SamplewiseError: As `record` does.
        ValueError: If `out` has not one tensor of the right shape and type for each parameter, or two of them share memory.

    Example:
        >>> model, x = nn.Linear(3, 2), torch.randn(4, 3)
        >>> per_sample_grads(model, lambda m, x: m(x).square().sum(1), x)["bias"].shape
        torch.Size([4, 2])
    """
    grads: dict[str, Tensor] = {}

    def consume(name: str, factor: Factor) -> None:
        if not grads:
            rec._check_out("per_sample_grads", out, rec._n())  # noqa: SLF001
        grads[name] = dense_in(name, factor, out)

    rec = Record(Recording(model, batch_size=batch_size, batch_dim=batch_dim, consume=consume))
    _run(rec, loss_fn, batch)
    with rec._recording.aside():  # noqa: SLF001
        if not grads:
            rec._check_out("per_sample_grads", out, rec._n())  # noqa: SLF001
        return rec._filled(grads, out, rec._n())  # noqa: SLF001


def per_sample_norms(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    *,
    batch_size: int | None = None,
    batch_dim: int = 0,
    strategy: str = "auto",
) -> Tensor:
    """The L2 norm of the gradient of every sample's loss, over all parameters, `(n,)`.

    Each parameter's factor is dropped as soon as its squared norm is known; small ones wait for others, up to a million numbers in all.
    Arguments and errors as `per_sample_grads`, `strategy` as `record`.

    Example:
        >>> model, x = nn.Linear(3, 2), torch.randn(4, 3)
        >>> per_sample_norms(model, lambda m, x: m(x).square().sum(1), x).shape
        torch.Size([4])
    """
    small, squares, held = Joined(), list[Tensor](), Held()

    def consume(name: str, factor: Factor) -> None:
        nonlocal small
        if not small.take(name, factor):
            squares.append(factor.sq_norms())
            return
        held.hold(factor)
        if small.size > _MOST_WAITING:
            held.refuse_changed()
            held.release()
            squares.extend(small.sq_norms())
            small = Joined()

    chosen = Strategy.of(strategy, None)
    rec = Record(Recording(model, batch_size=batch_size, batch_dim=batch_dim, consume=consume, strategy=chosen))
    _run(rec, loss_fn, batch)
    held.refuse_changed()
    with rec._recording.aside():  # noqa: SLF001
        return total_norms([*squares, *small.sq_norms()], rec._n(), rec._like())  # noqa: SLF001


def clipped_grads(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    *,
    max_grad_norm: float,
    batch_size: int | None = None,
    batch_dim: int = 0,
    strategy: str = "auto",
    memory_budget: int | None = None,
    out: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The sum of per-sample gradients clipped to `max_grad_norm`, and their norms before clipping, in one backward.

    Book-keeping (Bu et al. 2023, arXiv:2210.00038): the factors of the one backward serve the norms and the weighted sum, or gradients that
    are stored instead (`strategy`, `memory_budget` as in `record`). Arguments and errors as `per_sample_grads`; ValueError if
    `max_grad_norm` is not positive.

    Returns:
        `({name: shape}, (n,))`; the sums are in `out` if it is given.

    Example:
        >>> model, x = nn.Linear(3, 2), torch.randn(4, 3)
        >>> sums, norms = clipped_grads(model, lambda m, x: m(x).square().sum(1), x, max_grad_norm=1.0)
    """
    check_limit(max_grad_norm)
    kept, small, squares, held = dict[str, Factor](), Joined(), list[Tensor](), Held()

    def consume(name: str, factor: Factor) -> None:
        held.hold(factor)
        if not small.take(name, factor):
            kept[name] = factor
            squares.append(factor.sq_norms())

    chosen, store = Strategy.of(strategy, memory_budget), Store()
    rec = Record(Recording(model, batch_size=batch_size, batch_dim=batch_dim, consume=consume, strategy=chosen, store=store))
    _run(rec, loss_fn, batch)
    held.refuse_changed()
    held.release()
    rec._check_out("clipped_grads", out)  # noqa: SLF001
    with rec._recording.aside():  # noqa: SLF001
        norms = total_norms([*squares, *small.sq_norms()], rec._n(), rec._like())  # noqa: SLF001
        weights = clipping_weights(norms, max_grad_norm)
        sums = small.weighted_sums(weights)
        order = sorted(kept, key=lambda name: _frees(kept[name]))
        while order:
            name = order.pop()
            sums[name] = kept.pop(name).weighted_sum(weights)
        return rec._filled(sums, out), norms  # noqa: SLF001


def _frees(factor: Factor) -> tuple[bool, int]:
    """Whether a factor takes more memory than a sum of its gradients, and how much: such are the first to become sums."""
    tensors = tensors_of(factor)
    size = sum(x.nbytes for x in tensors)
    # a factor of somebody else may hold its tensors in some way of its own
    return size >= factor.shape.numel() * max((x.element_size() for x in tensors), default=0), size


def _run(rec: Record, loss_fn: LossFunction, batch: Batch) -> None:
    """Run a batch whose factors are consumed, each at its parameter's last use."""
    recording = rec._recording  # noqa: SLF001
    try:
        with rec:
            rec.backward(loss_fn(recording.model, batch))
        with recording.aside():
            recording.collector.finish()
    finally:
        # it knows the results, and perhaps the record: in a cycle they would live until the garbage collector comes
        recording.collector.consume = None
