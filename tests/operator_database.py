"""PyTorch's own operator database, turned into cases for a recording, and the judge of each case.

A case is one call of an op in which one tensor is a parameter and others carry samples. `python -m tests.operator_database` runs all
of them and writes `docs/operators.md`.
"""

import contextlib
import itertools
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

import samplewise as sw

DTYPE = torch.float64
LARGEST = 4000
MOST_SAMPLES = 10
# plain torch writes out of bounds when the sizes of their pivots or running statistics do not fit
UNSAFE = frozenset({"lu_unpack", "_segment_reduce", "native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"})
# nor an index beyond the end: of these ops only the named places are data
ONLY_DATA = {"nn.functional.embedding_bag": {1}}
# means over samples with padding or a mask: as documented, a row is the sample's share, and the divisor counts all of them
SHARES = frozenset({"nn.functional.embedding_bag", "masked.mean"})
# what the judge can say; the last three are bugs
KINDS = ("exact", "own rows", "refused", "rightly refused", "not applicable", "WRONG", "MIXED", "CRASH")
BUGS = KINDS[-3:]
# of several verdicts on one case the last counts
RANK = ("rightly refused", "own rows", *BUGS)


# --- cases ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call: which of its tensors is the parameter (None: a factor on the result), and which carry the samples on which axis."""

    op: str
    form: str
    call: Callable[..., object]
    leaves: list[object]
    spec: TreeSpec
    parameter: int | None
    # slot -> (tensor, its sample axis)
    data: dict[int, tuple[Tensor, int]]
    n: int
    # rows of one sample on its axis
    rows: int = 1
    inplace: bool = False
    # whether the data ask for gradients themselves
    asks: bool = False

    def __str__(self) -> str:
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in self.leaves]
        batched = {k: (tuple(x.shape), dim) for k, (x, dim) in self.data.items()}
        return f"{self.op} [{self.form}] {shapes} parameter {self.parameter}, samples {batched}, n={self.n}, rows={self.rows}"

    def slices(self, start: int, size: int) -> list[Tensor]:
        """The data of `size` samples from `start` on."""
        parts = [x.narrow(dim, start * self.rows, size * self.rows).clone() for x, dim in self.data.values()]
        return [x.requires_grad_(self.asks and x.is_floating_point()) for x in parts]


class OneOp(nn.Module):
    """The call as a model: a parameter, buffers, and a forward that takes the data."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        scale = torch.tensor(0.7, dtype=DTYPE)
        self.p = nn.Parameter((scale if case.parameter is None else case.leaves[case.parameter]).detach().clone())
        for k, x in enumerate(case.leaves):
            if isinstance(x, Tensor) and k != case.parameter and k not in case.data:
                self.register_buffer(f"c{k}", x.detach().clone())

    def forward(self, *data: Tensor) -> list[Tensor]:
        case, leaves = self.case, list(self.case.leaves)
        for k, x in enumerate(leaves):
            if isinstance(x, Tensor) and k != case.parameter and k not in case.data:
                leaves[k] = getattr(self, f"c{k}")
        for (k, (_, dim)), x in zip(case.data.items(), data, strict=True):
            leaves[k] = x.flatten(dim, dim + 1) if case.rows > 1 else x
        if case.parameter is not None:
            leaves[case.parameter] = self.p
        if case.inplace:
            leaves[0] = leaves[0].clone()
        args, kwargs = tree_unflatten(leaves, case.spec)
        size = leaves[0].numel() if case.inplace else None
        outs = [x for x in tree_leaves(case.call(*args, **kwargs)) if isinstance(x, Tensor)]
        if case.inplace and leaves[0].numel() != size:
            raise NotApplicable("plain torch resizes the target")
        outs = [x.real + 0.5 * x.imag if x.is_complex() else x for x in outs]
        outs = [x.to(DTYPE) for x in outs if x.is_floating_point()]
        return outs if case.parameter is not None else [x * self.p for x in outs]


@cache
def operators() -> list[object]:
    """The differentiable ops of the database."""
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if op.name not in UNSAFE and op.supports_autograd and op.supports_dtype(DTYPE, "cpu")]


def name_of(op: object) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def samples_of(op: object, count: int) -> list[tuple[list[object], TreeSpec]]:
    """Up to `count` calls from the database that differ in shapes or options."""
    torch.manual_seed(0)
    random.seed(0)
    found: dict[str, tuple[list[object], TreeSpec]] = {}
    for sample in itertools.islice(op.sample_inputs("cpu", DTYPE, requires_grad=True), 400):
        leaves, spec = tree_flatten(((sample.input, *sample.args), dict(sample.kwargs)))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if tensors and all(x.layout == torch.strided and not x.is_nested and x.numel() <= LARGEST for x in tensors):
            shown = [(x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else str(x) for x in leaves]
            found.setdefault(f"{shown} {spec}", (leaves, spec))
    calls = list(found.values())
    return calls if len(calls) <= count else random.Random(0).sample(calls, count)


def variants(op: object) -> list[tuple[str, Callable[..., object], bool]]:
    """The function, and its method and in-place forms where the database has them."""
    own = [("", op.op, False)]
    if op.method_variant is not None and op.method_variant is not op.op:
        own.append(("method", op.method_variant, False))
    if op.inplace_variant is not None:
        own.append(("in place", op.inplace_variant, True))
    return own


def cases(op: object, count: int, per_sample: int) -> Iterator[Case]:
    """All cases of an op; of each of up to `count` samples a random choice of `per_sample` for each variant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = samples_of(op, count)
    for place, (leaves, spec) in enumerate(samples):
        chance = random.Random(f"{name_of(op)} {place}")
        for label, call, inplace in variants(op):
            every = list(_cases_of(op, label, call, leaves, spec, inplace, chance))
            yield from every if len(every) <= per_sample else chance.sample(every, per_sample)


def _cases_of(
    op: object,
    label: str,
    call: Callable[..., object],
    leaves: list[object],
    spec: TreeSpec,
    inplace: bool,
    chance: random.Random,
) -> Iterator[Case]:
    tensors = [k for k, x in enumerate(leaves) if isinstance(x, Tensor)]
    differentiable = [k for k in tensors if leaves[k].is_floating_point()]
    for parameter in [*differentiable, None]:
        allowed = ONLY_DATA.get(op.name, tensors)
        others = [k for k in tensors if k != parameter and k in allowed]
        for form, data, n, rows in _batches(leaves, others, chance):
            whole = form if not label else f"{label}, {form}"
            yield Case(name_of(op), whole, call, leaves, spec, parameter, data, n, rows, inplace, chance.random() < 0.5)


def _batches(
    leaves: list[object], others: list[int], chance: random.Random
) -> Iterator[tuple[str, dict[int, tuple[Tensor, int]], int, int]]:
    groups = [[k] for k in others] + ([others] if len(others) > 1 else [])
    for group in groups:
        n = chance.choice([2, 3, 5])
        yield "stacked", {k: (_stacked(leaves[k], n, chance), 0) for k in group}, n, 1
    for k in others:
        x = leaves[k].detach()
        for dim, size in enumerate(x.shape):
            if 2 <= size <= MOST_SAMPLES:
                yield "own axis", {k: (x, dim)}, size, 1
                partners = {j: (leaves[j].detach(), dim) for j in others if leaves[j].shape[dim : dim + 1] == (size,)}
                if len(partners) > 1 and k == min(partners):
                    yield "own axes", partners, size, 1
            if size % 2 == 0 and 4 <= size <= 2 * MOST_SAMPLES:
                yield "two rows", {k: (x, dim)}, size // 2, 2


def _stacked(x: Tensor, n: int, chance: random.Random) -> Tensor:
    """`n` slightly different copies of `x` on a new axis 0."""
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    if x.is_floating_point():
        return torch.stack([x.detach() * (1 + 0.2 * torch.rand(x.shape, generator=generator, dtype=x.dtype)) for _ in range(n)])
    return torch.stack([x.detach().roll(k, 0) if x.ndim else x.detach() for k in range(n)])


# --- the judge ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What came out of a case: one of KINDS, how the gradient was found, or why not."""

    kind: str
    detail: str
    case: Case


class NotApplicable(Exception):
    """The case asks nothing of a recording."""


# a loss: results, one per output -> (n,)
Losses = Callable[[list[Tensor]], Tensor]


def judge(case: Case) -> Verdict:
    """Record the case, and compare with the batch-of-one loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        try:
            whole = _plain(case)
            pieces = _loop(case)
            axes = None if pieces is None else _sample_axes(whole, pieces)
            return _judge_loop(case, whole, axes) if axes else _judge_without_loop(case, whole)
        except NotApplicable as reason:
            return Verdict("not applicable", str(reason), case)


def _plain(case: Case) -> list[Tensor]:
    """The call on the whole batch, as an ordinary model."""
    if "wrapper_set_seed" in getattr(getattr(case.call, "__code__", None), "co_names", ()):
        raise NotApplicable("random")
    model, data = OneOp(case), _inputs(case)
    try:
        outs, again = model(*data), model(*data)
    except NotApplicable:
        raise
    except Exception as error:
        raise NotApplicable("the op takes no such batch") from error
    if not all(x.layout == torch.strided and not x.is_nested for x in outs):
        raise NotApplicable("its result is not strided")
    if not all(_same(a, b) for a, b in zip(outs, again, strict=True)):
        raise NotApplicable("random")
    if not any(x.requires_grad and x.numel() for x in outs):
        raise NotApplicable("no gradient reaches the parameter")
    if not all(x.isfinite().all() for x in outs):
        raise NotApplicable("not finite")
    _gradient(sum(x.sum() for x in outs), model.p, *(x for x in data if x.requires_grad), retain=True)
    return outs


def _inputs(case: Case, start: int = 0, size: int | None = None) -> list[Tensor]:
    """The data as the model takes it: with two rows per sample the axis is split, and the model joins it."""
    parts = case.slices(start, case.n if size is None else size)
    dims = [dim for _, dim in case.data.values()]
    return [x.unflatten(dim, (-1, case.rows)) if case.rows > 1 else x for x, dim in zip(parts, dims, strict=True)]


def _loop(case: Case) -> list[list[Tensor]] | None:
    """The results of each sample alone; None where the op cannot run on one."""
    model = OneOp(case)
    try:
        return [model(*_inputs(case, i, 1)) for i in range(case.n)]
    except Exception:  # noqa: BLE001
        return None


def _sample_axes(whole: list[Tensor], pieces: list[list[Tensor]]) -> list[int | None] | None:
    """For each result the axis along which the samples' results make the batch's; None in it: the same for all samples."""
    axes: list[int | None] = []
    for k, out in enumerate(whole):
        if any(k >= len(piece) for piece in pieces):
            return None
        own = [piece[k] for piece in pieces]
        if all(_same(x, out) for x in own):
            axes.append(None)
            continue
        fits = [dim for dim in range(out.ndim) if all(x.ndim == out.ndim for x in own) and _joins(own, out, dim)]
        if len(fits) != 1:
            return None
        axes += fits
    if all(dim is None for dim in axes):
        raise NotApplicable("the result does not depend on the data")
    return axes


def _joins(parts: list[Tensor], out: Tensor, dim: int) -> bool:
    others = [[size for d, size in enumerate(x.shape) if d != dim] for x in [*parts, out]]
    fits = all(shape == others[-1] for shape in others) and len({x.shape[dim] for x in parts}) == 1
    return fits and _same(torch.cat(parts, dim), out)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.detach(), b.detach(), rtol=1e-9, atol=1e-10, equal_nan=True)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(
        a, b, rtol=1e-7, atol=1e-8 * max(1.0, float(b.abs().max()) if b.numel() else 0.0)
    )


def _weights(outs: list[Tensor]) -> list[Tensor]:
    return [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7)) for x in outs]


def _per_sample(outs: list[Tensor], weights: list[Tensor], axes: list[int | None], n: int) -> Tensor:
    """One loss per sample: the weighted sum of the rows that are its own."""
    terms = [
        (x * w).movedim(dim, 0).reshape(n, -1).sum(1) for x, w, dim in zip(outs, weights, axes, strict=True) if dim is not None
    ]
    return sum(terms[1:], terms[0])


def _total(outs: list[Tensor], weights: list[Tensor], axes: list[int | None]) -> Tensor:
    """One loss for the batch."""
    terms = [(x * w).sum() for x, w, dim in zip(outs, weights, axes, strict=True) if dim is not None]
    return sum(terms[1:], terms[0])


def _judge_loop(case: Case, whole: list[Tensor], axes: list[int | None]) -> Verdict:
    """An exact answer exists: the library gives it, or refuses; and it refuses losses along another axis of as many entries."""
    weights = _weights(whole)
    others = [_only(k, dim, whole) for k, dim in _candidates(case, whole) if dim != axes[k]]
    bugs = [verdict for wrong in others if (verdict := _judge_losses(case, weights, wrong)).kind in BUGS]
    if bugs:
        return bugs[0]
    expected = _loop_gradients(case, whole, weights, axes)
    per_sample = lambda outs: _per_sample(outs, weights, axes, case.n)
    verdicts = [_compared(case, losses, weights, expected) for losses in (per_sample, lambda outs: _total(outs, weights, axes))]
    return next((verdict for verdict in verdicts if verdict.kind in BUGS), verdicts[0])


def _compared(case: Case, losses: Losses, weights: list[Tensor], expected: Tensor) -> Verdict:
    found = _record(case, losses, weights)
    if isinstance(found, Verdict):
        return found
    rows, how = found
    if not _close(rows, expected):
        off = float((rows - expected).abs().max()) if rows.shape == expected.shape else tuple(rows.shape)
        return Verdict("WRONG", f"{how}, off by {off}", case)
    return Verdict("exact", how, case)


def _loop_gradients(case: Case, whole: list[Tensor], weights: list[Tensor], axes: list[int | None]) -> Tensor:
    model, rows = OneOp(case), []
    for i in range(case.n):
        outs = model(*_inputs(case, i, 1))
        own = [
            w if dim is None else w.narrow(dim, i * x.shape[dim], x.shape[dim])
            for x, w, dim in zip(outs, weights, axes, strict=True)
        ]
        rows.append(_gradient(_per_sample(outs, own, axes, 1)[0], model.p))
    expected = torch.stack(rows)
    if not expected.isfinite().all():
        raise NotApplicable("not finite")
    return expected


def _gradient(loss: Tensor, leaf: Tensor, *more: Tensor, retain: bool = False) -> Tensor:
    """The ordinary gradient for `leaf`, computed along with those of `more`."""
    if not loss.requires_grad:
        return torch.zeros_like(leaf)
    try:
        grad, *_ = torch.autograd.grad(loss, (leaf, *more), allow_unused=True, materialize_grads=True, retain_graph=retain)
    except Exception as error:
        raise NotApplicable("plain torch cannot differentiate it") from error
    return grad.to_dense() if grad.is_sparse else grad


def _record(case: Case, losses: Losses, constants: list[Tensor]) -> tuple[Tensor, str] | Verdict:
    """What the library returns for the parameter, `(n, *shape)`, and how; or a verdict on its refusal."""
    model, data = OneOp(case), _inputs(case)
    dims = [dim for _, dim in case.data.values()]
    try:
        with sw.record(model, batch_size=case.n, batch_dim=dims[0]) as rec:
            for x, dim in zip(data, dims, strict=True):
                rec.batched(x, dim)
            for x in constants:
                rec.constant(x)
            loss = losses(model(*data))
            if loss.ndim:
                rec.backward(loss)
            else:
                loss.backward()
        return rec.grads()["p"].detach(), " + ".join(rec.coverage().rows[0].how) or "unused"
    except sw.SamplewiseError as error:
        return Verdict("refused", _reason(error), case)
    except Exception as error:  # noqa: BLE001
        return Verdict("CRASH", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", case)


def _judge_without_loop(case: Case, whole: list[Tensor]) -> Verdict:
    """The samples mix, or a constant or the parameter has the samples' axis: refused, or each loss is its own sample's and its
    gradient right."""
    weights = _weights(whole)
    verdicts = [_judge_losses(case, weights, _only(k, dim, whole)) for k, dim in _candidates(case, whole)]
    verdicts.append(_judge_total(case, whole, weights))
    return max(verdicts, key=lambda verdict: RANK.index(verdict.kind))


def _candidates(case: Case, whole: list[Tensor]) -> list[tuple[int, int]]:
    sizes = {case.n, case.n * case.rows}
    places = [(k, dim) for k, x in enumerate(whole) if x.requires_grad for dim in range(x.ndim) if x.shape[dim] in sizes]
    return places[:4]


def _only(place: int, dim: int, whole: list[Tensor]) -> list[int | None]:
    """Losses from one result alone."""
    return [dim if k == place else None for k in range(len(whole))]


def _judge_losses(case: Case, weights: list[Tensor], axes: list[int | None]) -> Verdict:
    losses = lambda outs: _per_sample(outs, weights, axes, case.n)
    found = _record(case, losses, weights)
    if isinstance(found, Verdict):
        return found if found.kind == "CRASH" else Verdict("rightly refused", found.detail, case)
    rows, how = found
    model = OneOp(case)
    vector = losses(model(*_inputs(case)))
    jacobian = torch.stack([_gradient(loss, model.p, retain=True) for loss in vector])
    if not jacobian.isfinite().all():
        raise NotApplicable("not finite")
    if not _close(rows, jacobian):
        return Verdict("WRONG", f"{how}, against the gradients of the losses {tuple(axes)}", case)
    if _mixes(case, losses, vector):
        return Verdict("MIXED", f"{how}, losses on {tuple(axes)} depend on other samples", case)
    return Verdict("own rows", how, case)


def _judge_total(case: Case, whole: list[Tensor], weights: list[Tensor]) -> Verdict:
    """One loss for the batch: refused, or its parts add up to its gradient, and what is a sample's does not depend on the others."""
    axes = [0 if x.requires_grad else None for x in whole]
    total = lambda outs: _total(outs, weights, axes)
    found = _record(case, total, weights)
    if isinstance(found, Verdict):
        return found if found.kind == "CRASH" else Verdict("rightly refused", found.detail, case)
    rows, how = found
    model = OneOp(case)
    if not _close(rows.sum(0), _gradient(total(model(*_inputs(case))), model.p)):
        return Verdict("WRONG", f"{how}, against the gradient of the total", case)
    for i in range(case.n):
        alone = _record(replace(case, data=_copies(case, i)), total, weights)
        if isinstance(alone, tuple) and not _close(alone[0][i], rows[i]) and case.op not in SHARES:
            return Verdict("MIXED", f"{how}, rows of the total depend on other samples", case)
    return Verdict("own rows", how, case)


def _copies(case: Case, i: int) -> dict[int, tuple[Tensor, int]]:
    """The data if all samples were sample `i`."""
    parts = zip(case.data.items(), case.slices(i, 1), strict=True)
    return {k: (torch.cat([x.detach()] * case.n, dim), dim) for (k, (_, dim)), x in parts}


def _mixes(case: Case, losses: Losses, vector: Tensor) -> bool:
    """Whether the loss of a sample changes when all other samples become copies of it."""
    model = OneOp(case)
    for i in range(case.n):
        copies = _inputs(replace(case, data=_copies(case, i)))
        with contextlib.suppress(RuntimeError, ValueError, IndexError):
            if not _same(losses(model(*copies))[i], vector[i]):
                return True
    return False


def _reason(error: Exception) -> str:
    """A message without its names and numbers."""
    text = str(error).splitlines()[0].partition(". ")[0].partition(", so the gradient")[0]
    text = re.sub(r"^[\w.]+: ", "", text)
    text = re.sub(r"\([\d, ]*\)", "(..)", text)
    text = re.sub(r"'(p|c\d+)'", "a parameter", text)
    text = re.sub(r"-?\d+", "N", text)
    return f"{type(error).__name__}: {text}"


# --- the sweep ------------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """The verdicts on one op: those where it has the parameter, and those where it only moves the samples."""

    name: str
    verdicts: list[Verdict] = field(default_factory=list)

    def bugs(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.kind in BUGS]

    def kinds(self, *, meets: bool) -> Counter[str]:
        """How often each kind, of exact ones by what."""
        mine = [v for v in self.verdicts if (v.case.parameter is not None) == meets]
        return Counter(v.detail if v.kind == "exact" and meets else v.kind for v in mine)

    def reason(self, *, meets: bool) -> str:
        """The most frequent reason of refusals of what has an answer."""
        mine = [v.detail for v in self.verdicts if v.kind == "refused" and (v.case.parameter is not None) == meets]
        return Counter(mine).most_common(1)[0][0]


def tally(op: object, *, samples: int, per_sample: int) -> Tally:
    """Judge the cases of one op."""
    return Tally(name_of(op), [judge(case) for case in cases(op, samples, per_sample)])


# --- the report -----------------------------------------------------------------------------------------------------------------

HOW = ("rule", "rows", "fallback")
STATES = ("always exact", "exact or refused", "only refused", "no case with an answer")
HEAD = """# PyTorch's own operators

Written by `python -m tests.operator_database` (torch {version}); do not edit. For each of the {ops} differentiable ops in PyTorch's
operator database (`torch.testing._internal.common_methods_invocations.op_db`) it takes up to {samples} of the database's own calls,
makes one tensor the parameter, and lets the others carry samples in every way: stacked on a new axis 0, along each of their own axes,
two rows per sample, several at once; as function, method and in place. Where only one op moves the samples, the parameter is a factor on
its result. An answer exists where the results of the samples alone, put together, are the result of the batch. Then the library has to
give the gradients of the batch-of-one loop or to raise, and to refuse losses along another axis. Where none exists it has to raise, or
to give the gradients of losses that each depend on their own sample only.

{cases:,} cases: {exact:,} exact; {own:,} exact in the weaker sense (a parameter or constant with a row for each sample, or one loss for the
batch whose parts add up); {refused:,} refused although an answer exists; {rightly:,} rightly refused; {none:,} not applicable (the op takes
no such batch, is random, or no gradient reaches the parameter); {bugs:,} wrong or crashed.
"""


def report(tallies: list[Tally], samples: int) -> str:
    """The page, in Markdown."""
    every = Counter(verdict.kind for t in tallies for verdict in t.verdicts)
    counts = dict(zip(("exact", "own", "refused", "rightly", "none"), (every[kind] for kind in KINDS), strict=False))
    bugs = sum(every[kind] for kind in BUGS)
    head = HEAD.format(version=torch.__version__, ops=len(tallies), samples=samples, cases=every.total(), bugs=bugs, **counts)
    parts = [head, _summary(tallies), _only_refused(tallies, meets=True), _only_refused(tallies, meets=False), _every(tallies)]
    return "\n".join(parts)


def _summary(tallies: list[Tally]) -> str:
    lines = [
        "## Ops\n",
        "| | op between parameter and samples | op on samples only |",
        "|---|---|---|",
    ]
    states = [(_state(t, meets=True), _state(t, meets=False)) for t in tallies]
    lines += [f"| {s} | {sum(a == s for a, _ in states)} | {sum(b == s for _, b in states)} |" for s in STATES]
    by = {how: sum(how in str(list(t.kinds(meets=True))) for t in tallies) for how in HOW}
    lines.append(
        f"\nOf the ops between parameter and samples {by['rule']} are exact somewhere by a rule (contractions among them), {by['rows']}\n"
        f"by the parameter entering row by row, {by['fallback']} by the fallback, sample by sample. An op on one tensor has no such case.\n"
    )
    return "\n".join(lines)


def _state(tally: Tally, *, meets: bool) -> str:
    kinds = tally.kinds(meets=meets)
    exact = sum(count for kind, count in kinds.items() if kind not in KINDS or kind == "exact")
    if not exact:
        return "only refused" if kinds["refused"] else "no case with an answer"
    return "exact or refused" if kinds["refused"] else "always exact"


def _only_refused(tallies: list[Tally], *, meets: bool) -> str:
    title = "between parameter and samples" if meets else "on samples only (say where they are with `rec.batched(result, dim)`)"
    lines = [f"## Only ever refused: {title}\n", "| op | reason |", "|---|---|"]
    refused = [t for t in tallies if _state(t, meets=meets) == "only refused"]
    lines += [f"| {t.name} | {t.reason(meets=meets).partition(': ')[2].replace('|', chr(92) + '|')} |" for t in refused]
    return "\n".join([*lines, ""]) if refused else f"{lines[0]}\nNone.\n"


def _every(tallies: list[Tally]) -> str:
    lines = [
        "## Every op\n",
        "Cases with an answer: exact by a rule, by rows, by the fallback (or several of these), refused; on samples only, the same.\n",
        "| op | rule | rows | fallback | refused | on samples: exact | refused |",
        "|---|---|---|---|---|---|---|",
    ]
    for t in tallies:
        a, b = t.kinds(meets=True), t.kinds(meets=False)
        others = sum(count for kind, count in a.items() if kind not in KINDS and kind not in HOW)
        fallback = f"{a['fallback'] or ''}{f' ({others})' if others else ''}"
        cells = [a["rule"] or "", a["rows"] or "", fallback, a["refused"] or "", b["exact"] or "", b["refused"] or ""]
        lines.append(f"| {t.name} | {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Judge every case and write the page."""
    tallies = [tally(op, samples=12, per_sample=10**6) for op in operators()]
    Path(__file__).parents[1].joinpath("docs", "operators.md").write_text(report(tallies, samples=12))
    bugs = [f"{bug.kind}: {bug.detail}: {bug.case}" for t in tallies for bug in t.bugs()]
    sys.exit("\n".join(bugs) or None)


if __name__ == "__main__":
    main()
