"""Record a batch, then ask for any quantity."""

import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Literal, Self, overload

import torch
from torch import Tensor, nn

from . import rules as _rules  # noqa: F401  (fills the tables)
from .axes import Axis, Lost, Where
from .coverage import Coverage
from .errors import SampleAxisError, SamplewiseError, of_type
from .factors import HALF, Factor, expanded, meeting, wide
from .joined import Joined
from .known import DECLARED_CONSTANT
from .projections import GaussianProjection
from .recording import Recording
from .results import as_autograd_has_it, clipping_weights, dense_in, root, total_norms
from .running import unrecorded
from .strategy import Strategy
from .sums import Store


class Record:
    """The per-sample gradients of one batch. Made by `record`; use it as a context manager."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._collector = recording.collector

    def __enter__(self) -> Self:
        """Attach to the model."""
        self._recording.open()
        try:
            self._recording.__enter__()  # type: ignore[no-untyped-call]
        except BaseException:
            self._recording.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave no mode, hook or attribute behind, whatever happened."""
        self._recording.close()
        self._recording.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if self._recording.create_graph:
            # their graph holds the recording, and a cycle through autograd would live for ever
            self._recording.collector = weakref.proxy(self._collector)

    def __reduce__(self) -> str:
        """Refuse copies, and what would be stored of it."""
        raise TypeError(
            "record: a record belongs to a backward that has run, and can neither be copied nor pickled. Keep its results, "
            "`rec.grads()` or `rec.norms()` for example."
        )

    # --- saying what is what ------------------------------------------------------------------------------------------------

    def constant(self, tensor: Tensor) -> Tensor:
        """Declare that a tensor has the same value for every sample, whatever its shape; returns it."""
        self._recording.declare(tensor, DECLARED_CONSTANT)
        return tensor

    def batched(self, tensor: Tensor, dim: int = 0, *, owners: Tensor | None = None) -> Tensor:
        """Declare that axis `dim` of a tensor carries the samples; returns it.

        Args:
            tensor: Made outside the model, or by a function that the recording cannot see into.
            dim: The axis.
            owners: The sample of each row, `(shape[dim],)`, for samples with different numbers of rows: unpadded sequences, graphs.

        Raises:
            ValueError: If that axis does not have the batch size, or `owners` names no sample for each of its rows.
        """
        n, dim = self._recording.n, dim % tensor.ndim
        if owners is not None:
            rows = _checked_owners(owners, tensor, dim, n)
            self._recording.declare(tensor, Axis.of_rows(dim, rows, n or 0))
            # numbers of samples, whatever their count suggests
            self._recording.declare(owners, DECLARED_CONSTANT)
            return tensor
        if n is not None and tensor.shape[dim] != n:
            raise ValueError(
                f"batched: axis {dim} of a tensor of shape {tuple(tensor.shape)} has not the batch size {n}. Give the axis of the samples, "
                "or `owners` where samples have different numbers of rows."
            )
        self._recording.declare(tensor, Axis(dim))
        return tensor

    # --- backward -----------------------------------------------------------------------------------------------------------

    def backward(self, losses: Tensor, *, retain_graph: bool = False) -> None:
        """Run the backward pass from one loss per sample.

        Args:
            losses: `(n,)`, computed inside the `with` block.
            retain_graph: Keep the graph for another backward; the gradients of several backwards add up.

        Raises:
            SampleAxisError: If `losses` no longer has its samples on its only axis.
            ValueError: If `losses` is not a vector of n.
        """
        recording = self._recording
        if not recording._open:  # noqa: SLF001
            raise SamplewiseError(
                "backward: the recording is closed. Call `rec.backward(losses)` inside the `with record(...)` block."
            )
        with unrecorded():
            self._check(losses)
        recording.backward(losses, retain_graph=retain_graph)

    def _check(self, losses: Tensor) -> None:
        of_type("backward", losses, "a tensor of one loss per sample", Tensor)
        n, where = self._recording.n, self._recording.where(losses)
        if n is None:
            raise SampleAxisError(
                "backward: no model was run in this recording, so the batch size is unknown. Run the model inside the `with record(...)` "
                "block, or give `batch_size` to `record`."
            )
        if losses.shape != (n,):
            raise ValueError(
                f"backward: expected one loss per sample, shape ({n},), got {tuple(losses.shape)}. "
                "Use reduction='none' and sum or average over everything but the samples; for a reduced loss use "
                f"`loss.backward()` and `loss_reduction`. If there are not {n} samples, the size of the model's inputs on the sample axis, "
                "give `batch_size` or `batch_dim`."
            )
        self._check_place(where, n)
        if not losses.requires_grad:
            raise SamplewiseError(
                "backward: the losses require no grad, so nothing trainable had a part in them. Check for frozen parameters, "
                "`torch.no_grad` and `.detach()`."
            )
        if self._recording.create_graph:
            self._recording.refuse_new_parameters()

    def _check_place(self, where: Where | None, n: int) -> None:
        """Refuse losses of which it is not known that entry i belongs to sample i."""
        if isinstance(where, Lost) and where.refused:
            raise SampleAxisError(where.refused)
        if where != Axis(0) and n > 1:
            found = where or "they do not depend on the samples"
            raise SampleAxisError(
                f"backward: the losses have the right shape, ({n},), but the recording cannot tell that entry i belongs to sample i: "
                f"{found}. Compute the losses from the model's output inside the recording and keep the samples apart; a table or mask "
                "of n entries made outside is declared by `rec.constant` (`rec` from `samplewise.record`)."
            )

    # --- quantities ---------------------------------------------------------------------------------------------------------

    def factors(self) -> dict[str, Factor]:
        """The unmaterialised gradients: a factor for each parameter that the loss reached.

        Raises:
            SamplewiseError: If no backward of this recording has run, or one ended with an error.
        """
        self._n()
        if self._recording.collector.empty and not self._recording.begun:
            raise SamplewiseError(
                "record: no backward pass has run from losses of this recording, so there are no gradients. Call `rec.backward(losses)` "
                "inside the `with record(...)` block first."
            )
        if self._recording.failed:
            raise SamplewiseError(
                "record: a backward pass ended with an error, and what had arrived by then is only a part. Record the batch again."
            )
        return self._recording.collected()

    def grads(self, *, out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Materialise all per-sample gradients.

        Args:
            out: Tensors `{name: (n, *shape)}` to write them into, of an earlier call for example: fresh memory is slow.

        Returns:
            `{name: (n, *shape)}` for every trainable parameter; zeros where the loss does not reach.

        Raises:
            ValueError: If `out` has not one tensor of the right shape and type for each parameter, or two of them share memory.
        """
        with self._recording.aside():
            self._check_out("grads", out, self._n())
            found = {name: dense_in(name, factor, out) for name, factor in self.factors().items()}
            return self._filled(found, out, self._n())

    @overload
    def norms(self, *, by: None = None) -> Tensor: ...
    @overload
    def norms(self, *, by: Literal["parameter"]) -> dict[str, Tensor]: ...
    def norms(self, *, by: str | None = None) -> Tensor | dict[str, Tensor]:
        """L2 norms of the per-sample gradients, `(n,)`, over all parameters; `by="parameter"` gives `{name: (n,)}`."""
        if by not in {None, "parameter"}:
            raise ValueError(f"norms: by is None or 'parameter', got {by!r}")
        with self._recording.aside():
            if by is None:
                small, others = Joined.split(self.factors())
                squares = [factor.sq_norms() for factor in others.values()]
                return total_norms([*squares, *small.sq_norms()], self._n(), self._like())
            by_name = {name: root(factor.sq_norms()) for name, factor in self.factors().items()}
            return {name: by_name[name] if name in by_name else self._zeros() for name in self._recording.parameters}

    def weighted_sum(self, weights: Tensor, *, out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """`sum_n weights[n] grad[n]`, as `{name: shape}`; `weights` is `(n,)`.

        Args:
            weights: One number for each sample.
            out: Tensors `{name: shape}` to write the sums into, such as the `.grad` of each parameter.

        Raises:
            TypeError: If `weights` is no tensor.
            ValueError: If `weights` is not a vector of n, or `out` has not one tensor of the right shape and type for each parameter, or
                two of them share memory.
        """
        if not isinstance(weights, Tensor):
            raise TypeError(
                f"weighted_sum: expected weights of shape ({self._n()},), one per sample, got a {type(weights).__name__}. "
                "Make a tensor of it, `torch.tensor(weights)`."
            )
        with self._recording.aside():
            self._check_out("weighted_sum", out)
            if weights.shape != (self._n(),):
                raise ValueError(
                    f"weighted_sum: expected weights of shape ({self._n()},), one per sample, got {tuple(weights.shape)}"
                )
            small, others = Joined.split(self.factors())
            sums = {name: factor.weighted_sum(weights) for name, factor in others.items()}
            return self._filled({**sums, **small.weighted_sums(weights)}, out)

    def clipped_sum(self, max_grad_norm: float, *, out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The sum of gradients clipped to a norm: weights `min(1, max_grad_norm / norms[n])` (Abadi et al. 2016, arXiv:1607.00133).

        Args:
            max_grad_norm: The largest norm that is left as it is; `math.inf` clips nothing.
            out: Tensors `{name: shape}` to write the sums into.

        Raises:
            ValueError: If `max_grad_norm` is not positive, or `out` has not one tensor of the right shape and type for each parameter.
        """
        return self.weighted_sum(clipping_weights(self.norms(), max_grad_norm), out=out)

    def dot(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Inner products with one direction, `(n,)`; `direction` is `{name: shape}`, missing parameters count as zero.

        Raises:
            ValueError: If a name is unknown, a shape differs, or one is real and the other complex.
        """
        of_type("dot", direction, "a direction {name: tensor of the parameter's shape}", Mapping)
        self._check_names("dot", direction)
        with self._recording.aside():
            terms = [factor.dot(direction[name]) for name, factor in self.factors().items() if name in direction]
            return _total(terms, self._zeros())

    def gram(self, other: "Record | None" = None) -> Tensor:
        """Inner products of per-sample gradients, `(n, m)`, with those of another record of the same model (default: itself).

        Raises:
            ValueError: If the other record has other parameters, or theirs have other shapes or types.
        """
        other = self if other is None else other
        of_type("gram", other, "another record of the same model", Record)
        if set(other._recording.parameters) != set(self._recording.parameters):  # noqa: SLF001
            raise ValueError(
                "gram: the two records have different parameters: only one has "
                f"{', '.join(sorted(set(self._recording.parameters) ^ set(other._recording.parameters)))}. "  # noqa: SLF001
                "Record the same model twice, with the same parameters frozen."
            )
        self._check_alike(other)
        with self._recording.aside():
            mine, theirs = self.factors(), other.factors()
            terms = [mine[name].gram(theirs[name]) for name in mine if name in theirs]
            return _total(terms, self._zeros().new_zeros(self._n(), other._n()))  # noqa: SLF001

    def project(self, projection: GaussianProjection | Mapping[str, Tensor]) -> Tensor:
        """Projected gradients, `(n, k)`: a `GaussianProjection`, or `{name: (k, *shape)}`.

        Raises:
            ValueError: If a name is unknown, a shape or the number of rows differs, or one is real and the other complex.
        """
        of_type("project", projection, "a GaussianProjection or matrices {name: (k, *shape)}", GaussianProjection, Mapping)
        factors = self.factors()
        with self._recording.aside():
            if isinstance(projection, GaussianProjection):
                self._check_real("project")
                size = projection.size
                rows = (
                    (factor, projection.matrix(name, factor.shape).to(self._like().device)) for name, factor in factors.items()
                )
            else:
                size = _rows_of(projection)
                self._check_names("project", {name: matrix[0] for name, matrix in projection.items()})
                rows = ((factor, projection[name]) for name, factor in factors.items() if name in projection)
            return _total([factor.project(matrix) for factor, matrix in rows], self._zeros().new_zeros(self._n(), size))

    def coverage(self) -> Coverage:
        """Which parameter was used where, by rule or fallback, and the share of all trainable parameters."""
        return Coverage.of(self._recording.parameters, self._recording.collector.uses)

    # --- details ------------------------------------------------------------------------------------------------------------

    def _n(self) -> int:
        if self._recording.n is None:
            raise SamplewiseError(
                "record: no model was run in this recording yet, so it has no samples. Run the model and `rec.backward(losses)` inside the "
                "`with record(...)` block first."
            )
        return self._recording.n

    def _like(self) -> Tensor:
        parameter = next(iter(self._recording.parameters.values()), None)
        return torch.zeros(()) if parameter is None else wide(parameter.detach().new_empty(0))

    def _zeros(self) -> Tensor:
        return self._like().new_zeros(self._n())

    def _filled(self, found: dict[str, Tensor], out: Mapping[str, Tensor] | None, *leading: int) -> dict[str, Tensor]:
        """The found gradients in the parameters' own types, or in `out`, zeros for the others, in the model's order."""
        filled: dict[str, Tensor] = {}
        for name, p in self._recording.parameters.items():
            if out is None:
                filled[name] = as_autograd_has_it(found.get(name), p, *leading)
            elif name not in found:
                filled[name] = out[name].zero_()
            else:
                filled[name] = out[name] if found[name] is out[name] else out[name].copy_(found[name])
        return filled

    def _check_out(self, call: str, out: Mapping[str, Tensor] | None, *leading: int) -> None:
        if out is None:
            return
        for name, p in self._recording.parameters.items():
            x, shape = out.get(name), (*leading, *p.shape)
            if x is None or x.shape != shape or x.dtype != p.dtype or x.device != p.device or x.requires_grad or expanded(x):
                found = "nothing" if x is None else f"{tuple(x.shape)}, {x.dtype}, {x.device}"
                if x is not None:
                    found += ", requires grad" * x.requires_grad + ", expanded" * expanded(x)
                raise ValueError(
                    f"{call}: out['{name}'] must be a tensor of shape {shape}, {p.dtype}, {p.device} that requires no grad and has memory "
                    f"for each entry, got {found}"
                )
        pair = meeting({name: out[name] for name in self._recording.parameters})
        if pair is not None:
            raise ValueError(
                f"{call}: out['{pair[0]}'] and out['{pair[1]}'] reach over the same memory, where one gradient would be written over the "
                "other. Give each parameter a tensor of its own, or parts of one buffer that lie one after another or side by side."
            )

    def _check_names(self, call: str, given: Mapping[str, Tensor]) -> None:
        for name, tensor in given.items():
            expected = self._recording.parameters.get(name)
            if expected is None or expected.shape != tensor.shape or expected.is_complex() != tensor.is_complex():
                wanted = (
                    "no such trainable parameter (names as in `model.named_parameters()`)"
                    if expected is None
                    else f"expected shape {tuple(expected.shape)}, {'complex' if expected.is_complex() else 'real'}"
                )
                raise ValueError(
                    f"{call}: '{name}' of shape {tuple(tensor.shape)}, {tensor.dtype}{', in each row' * (call == 'project')}: {wanted}"
                )

    def _check_real(self, call: str) -> None:
        for name, p in self._recording.parameters.items():
            if p.is_complex():
                raise ValueError(
                    f"{call}: a GaussianProjection is real, and '{name}' is {p.dtype}. Give a complex matrix for each parameter, "
                    "`{name: (k, *shape)}`."
                )

    def _check_alike(self, other: "Record") -> None:
        for name, p in self._recording.parameters.items():
            q = other._recording.parameters[name]  # noqa: SLF001
            if p.shape != q.shape or _summed_in(p) != _summed_in(q) or p.device != q.device:
                raise ValueError(
                    f"gram: '{name}' is {tuple(p.shape)}, {p.dtype}, {p.device} in one record and {tuple(q.shape)}, {q.dtype}, {q.device} "
                    "in the other. Record the same model twice."
                )


def _checked_owners(owners: Tensor, tensor: Tensor, dim: int, n: int | None) -> Tensor:
    if n is None:
        raise ValueError("batched: owners need to know the number of samples. Give `batch_size` to `record`.")
    if (
        owners.shape != tensor.shape[dim : dim + 1]
        or owners.dtype != torch.long
        or (owners.numel() and not 0 <= owners.min() <= owners.max() < n)
    ):
        raise ValueError(
            f"batched: owners of the rows on axis {dim} of a tensor of shape {tuple(tensor.shape)} must be {tensor.shape[dim]} int64 "
            f"numbers below the batch size {n}, got {owners.dtype} of shape {tuple(owners.shape)}"
        )
    return owners.cpu()


def record(
    model: nn.Module,
    *,
    batch_size: int | None = None,
    batch_dim: int = 0,
    loss_reduction: str = "sum",
    fallback: str = "allow",
    create_graph: bool = False,
    strategy: str = "auto",
    memory_budget: int | None = None,
) -> Record:
    """Record one batch of a model, so that every per-sample quantity can be asked for afterwards.

    Args:
        model: Any module, unmodified.
        batch_size: n; by default the common size of the model's tensor inputs on `batch_dim`.
        batch_dim: The axis of the model's inputs that carries the samples. Results are always sample-first.
        loss_reduction: For `loss.backward()` on a scalar: "sum" if it is a sum over samples, "mean" if a mean.
            `rec.backward(losses)` needs neither.
        fallback: "allow" runs ops without a rule sample by sample; "error" forbids it.
        create_graph: Make every quantity differentiable again (gradient penalties, Hessian-vector products), and allow losses that are made
            of derivatives by the samples, of any order (`torch.autograd.grad(model(x).sum(), x, create_graph=True)` inside the block:
            forces, differential equations, critics). Its backward is `rec.backward(losses)`; it keeps the graph and costs about as much
            again.
        strategy: How norms and weighted sums of outer products are found: "gram" from inner products of positions (Li et al. 2022,
            arXiv:2110.05679), "tile" from gradients formed a few samples at a time, "store" from gradients formed once and kept;
            "auto" chooses by cost, at the rates that `calibrate` measured. `rec.coverage()` shows what was chosen.
        memory_budget: Bytes of gradients that "auto" may store beyond what it would keep otherwise, 32 MiB by default.

    Returns:
        A context manager; its quantities may be asked for inside or after the block.

    Raises:
        SampleAxisError: If a gradient cannot be split over samples because their axis was lost.
        MixedSamplesError: If an op mixes the samples of the batch.
        UnsupportedOpError: If a use of a parameter cannot be recorded.

    Example:
        >>> model, x = nn.Linear(3, 2), torch.randn(4, 3)
        >>> with record(model) as rec:
        ...     rec.backward(model(x).square().sum(1))
        >>> rec.grads()["weight"].shape, rec.norms().shape
        (torch.Size([4, 2, 3]), torch.Size([4]))
    """
    return Record(
        Recording(
            model,
            batch_size=batch_size,
            batch_dim=batch_dim,
            loss_reduction=loss_reduction,
            fallback=fallback,
            create_graph=create_graph,
            strategy=Strategy.of(strategy, memory_budget),
            store=Store(),
        )
    )


def _rows_of(matrices: Mapping[str, Tensor]) -> int:
    """The number of rows that all matrices of a projection have."""
    rows = {matrix.shape[:1].numel() if matrix.ndim else 0 for matrix in matrices.values()}
    if len(rows) != 1 or 0 in rows:
        found = ", ".join(f"'{name}': {tuple(matrix.shape)}" for name, matrix in matrices.items())
        raise ValueError(
            f"project: expected matrices {{name: (k, *shape)}} with one k of 1 or more, got {{{found}}}. Give each parameter as many rows, "
            "of zeros where there is nothing to project."
        )
    return rows.pop()


def _summed_in(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in HALF else x.dtype


def _total(terms: list[Tensor], zero: Tensor) -> Tensor:
    return torch.stack(terms).sum(0) if terms else zero
