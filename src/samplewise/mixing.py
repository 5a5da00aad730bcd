"""Where a parameter meets the samples: by a rule, as a contraction, entering row by row, or by the fallback."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor

from .alignment import through_index, written
from .axes import Axis, Call, Lost, swapped, tensors_in, whole
from .collecting import Shared, Source, Use
from .contractions import CONTRACTIONS, Contraction, contract, rows_first
from .errors import MixedSamplesError, SampleAxisError, UnsupportedOpError
from .factors import Dense, Diagonal, Factor
from .registry import RULES, Operation, Rule, operation
from .sample_axis import ALIGNED, JOINS, follow
from .taps import Enter, Grads, Tap

if TYPE_CHECKING:
    from .recording import Recording

Function = Callable[..., Any]


def mix(recording: "Recording", func: Function, op: Operation, call: Call, shared: list[Tensor]) -> Any:
    """Run a call in which shared tensors meet batched ones, so that their per-sample gradients are collected."""
    if call.n <= 1:
        return _enter_whole(recording, func, op, call, shared)
    _refuse_lost(recording, call, shared)
    if op.inplace and any(call.args[0] is x for x in shared):
        _spread_target(recording, call)
        shared = [x for x in shared if x is not call.args[0]]
        if not shared:
            return func(*call.args, **call.kwargs)
    if call.kwargs.get("out") is not None:
        raise UnsupportedOpError(
            f"{call.name}: `out=` cannot be recorded with {_names(recording, shared)}. Use the result instead."
        )
    if op.name == "setitem":
        return _assign(recording, func, call, shared)
    if call.name in ALIGNED:
        return _enter_aligned(recording, func, call, shared)
    rule = RULES.get(op.name)
    if rule is not None:
        arguments = _bind(rule, call)
        if rule.covers({name for name, _, x in _slots(arguments) if any(x is s for s in shared)}):
            return _by_rule(recording, func, call, rule, arguments, shared)
    if op.name in CONTRACTIONS:
        return _contract(recording, func, call, shared)
    return _fall_back(recording, func, op, call, shared)


def _refuse_lost(recording: "Recording", call: Call, shared: list[Tensor]) -> None:
    for x in call.tensors:
        where = call.where(x)
        if isinstance(where, Lost):
            raise SampleAxisError(
                f"{call.name}: the sample axis of an operand of shape {tuple(x.shape)} was lost in {where.op}, so the gradient of "
                f"{_names(recording, shared)} cannot be split over samples. Keep the samples apart until after this op (concatenate "
                "features instead of samples, or run two views one after the other); if you know where the samples are, say so "
                "with `rec.batched(tensor, dim)`."
            )


def _names(recording: "Recording", shared: list[Tensor]) -> str:
    names = {name for x in shared if isinstance(kind := recording.kind(x), Shared) for name in kind.names}
    return " and ".join(f"'{name}'" for name in sorted(names)) or "a parameter"


def _replaced(call: Call, new: Mapping[int, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with some tensors, given by id, replaced."""
    args, kwargs = swapped((call.args, call.kwargs), new)
    return args, kwargs


def _source(recording: "Recording", tensor: Tensor) -> Source:
    kind = recording.kind(tensor)
    assert isinstance(kind, Shared)
    return Source.of(tensor, kind)


# --- entering: the shared tensor becomes a batched one, and the op runs as it is ----------------------------------------------


def _enter_whole(recording: "Recording", func: Function, op: Operation, call: Call, shared: list[Tensor]) -> Any:
    """One sample or none: the gradient of the batch is the sample's, whatever the op."""
    new = {id(x): _sole(recording, call, x) for x in shared}
    if op.inplace and id(call.args[0]) in new:
        _overwrite(recording, call, new.pop(id(call.args[0])))
    args, kwargs = _replaced(call, new)
    return func(*args, **kwargs)


def _sole(recording: "Recording", call: Call, tensor: Tensor) -> Tensor:
    source, n = _source(recording, tensor), call.n
    uses = recording.collector.expect(source, call.name, "rows")

    def factors(grads: Grads, _: Sequence[Tensor]) -> list[tuple[Source, list[Use], Factor]]:
        grad = grads[0]
        assert grad is not None
        # an embedding may have asked for a sparse one
        dense = grad.to_dense() if grad.is_sparse else grad
        return [(source, uses, Dense(dense[None][:n]))]

    entered = Enter.run(recording, factors, recording.anchor, tensor.detach())
    recording.declare(entered, whole(entered))
    return entered


def _overwrite(recording: "Recording", call: Call, entered: Tensor) -> None:
    """Let the shared target of an in-place op hold its values as a batched tensor."""
    target = call.args[0]
    if target.is_leaf or target._is_view():  # noqa: SLF001
        raise UnsupportedOpError(
            f"{call.name}: writes batched values in place into {_names(recording, [target])}, which all samples share. "
            "Expand and clone it over the samples and write there, or write out of place."
        )
    target.detach_()
    target.copy_(entered)
    where = recording.where(entered)
    assert where is not None
    recording.declare(target, where)


def _enter_aligned(recording: "Recording", func: Function, call: Call, shared: list[Tensor]) -> Any:
    """An op whose operands align from the right: its own broadcasting gives every sample its gradient."""
    x, axis = call.placed()[0]
    ndim = max(t.ndim for t in call.tensors)
    frame = axis.at(axis.dim + ndim - x.ndim)
    new = {id(s): enter(recording, call, s, frame, ndim, x.shape[axis.dim]) for s in shared}
    args, kwargs = _replaced(call, new)
    return func(*args, **kwargs)


def _assign(recording: "Recording", func: Function, call: Call, shared: list[Tensor]) -> Any:
    """`target[index] = value` with a shared value."""
    target, index, value = call.args
    part = target.detach()[index]
    where = through_index(call, target, index, part)
    if not isinstance(where, Axis) or not any(value is x for x in shared):
        raise SampleAxisError(
            f"setitem: {_names(recording, shared)} is written to places that do not follow the samples of a target of shape "
            f"{tuple(target.shape)}. Write to whole samples (`x[:, k] = p`), or use torch.where."
        )
    return func(target, index, enter(recording, call, value, where, part.ndim, part.shape[where.dim]))


def _spread_target(recording: "Recording", call: Call) -> None:
    """Make the shared target of an in-place op batched, as far as it has a place for every sample: its rows enter one by one."""
    target = call.args[0]
    axis = written(call) if call.name == "setitem" else _aligned_axis(call, target)
    if not isinstance(axis, Axis) or target.shape[axis.dim] != axis.size(call.n):
        raise UnsupportedOpError(
            f"{call.name}: writes batched values in place into {_names(recording, [target])}, of shape {tuple(target.shape)}, which "
            "all samples share. Expand and clone it over the samples and write there, or write out of place."
        )
    before = target.clone()
    recording.declare(before, recording.kind(target))
    _overwrite(recording, call, enter(recording, call, before, axis, target.ndim, target.shape[axis.dim]))


def _aligned_axis(call: Call, target: Tensor) -> Axis | None:
    x, axis = call.placed()[0]
    dim = axis.dim + target.ndim - x.ndim
    return axis.at(dim) if call.name in ALIGNED and dim >= 0 else None


def enter(recording: "Recording", call: Call, tensor: Tensor, axis: Axis, ndim: int, rows: int) -> Tensor:
    """A shared tensor as a batched one, aligned from the right in `ndim` dims with `rows` rows on `axis.dim`."""
    value, dim = tensor.detach(), axis.dim - (ndim - tensor.ndim)
    if dim < 0:
        value, dim = value.reshape(*[1] * -dim, *value.shape), 0
    placed = axis.at(dim)
    origin, kind = tensor, recording.kind(tensor)
    assert isinstance(kind, Shared)
    own = value.shape[dim] == rows
    if call.name in JOINS and value.shape[dim] != rows:
        raise SampleAxisError(
            f"{call.name}: joins samples with {_names(recording, [tensor])} along the sample axis (axis {dim}, {rows} rows and "
            f"{value.shape[dim]}). Join along another axis, with the parameter expanded over the samples."
        )
    if own and kind.unexpanded is not None and _expands_along(kind.unexpanded, value, dim):
        origin = kind.unexpanded
    source = _source(recording, origin)
    uses = recording.collector.expect(source, call.name, "rows")
    diagonal = own and origin is tensor
    # the closure holds no tensor and no call
    n, shape, below = call.n, origin.shape, value.ndim - origin.ndim

    def factors(grads: Grads, _: Sequence[Tensor]) -> list[tuple[Source, list[Use], Factor]]:
        grad = grads[0]
        assert grad is not None
        if diagonal:
            owners = placed.owners(n).to(grad.device)
            return [(source, uses, Diagonal(grad.reshape(source.shape), owners, dim, n))]
        rest = [*[1] * below, *shape]
        del rest[dim]
        dense = _sum_to(placed.rows(grad, n), Size(rest))
        return [(source, uses, Dense(dense.reshape(len(dense), *source.shape)).regroup(n))]

    value = value if own else value.expand(*value.shape[:dim], rows, *value.shape[dim + 1 :])
    entered: Tensor = Enter.run(recording, factors, recording.anchor, value)
    recording.declare(entered, placed)
    return entered


def _expands_along(tensor: Tensor, value: Tensor, dim: int) -> bool:
    """Whether `value` is `tensor` expanded (not tiled), on `dim` among others."""
    padded = [*[1] * (value.ndim - tensor.ndim), *tensor.shape]
    return padded[dim] == 1 and all(own in {1, size} for own, size in zip(padded, value.shape, strict=True))


def _sum_to(grad: Tensor, shape: Size) -> Tensor:
    """Sum a gradient `(n, *larger)` over the dims that `shape`, of as many dims, has as 1."""
    dims = [k for k, (size, own) in enumerate(zip(grad.shape[1:], shape, strict=True), 1) if own == 1 and size != 1]
    return grad.sum(dims, keepdim=True) if dims else grad


# --- rules --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor argument of a rule until the backward: where it is kept, and which axis has the rows."""

    place: int | Tensor  # among the saved tensors, or a meta tensor for a value the rule does not need
    axis: Axis | None

    def filled(self, saved: Sequence[Tensor], n: int, dtype: torch.dtype) -> Tensor:
        """The tensor as the rule sees it."""
        tensor = (saved[self.place] if isinstance(self.place, int) else self.place).detach()
        if tensor.is_floating_point():
            # under autocast an op computes in another type than its arguments have
            tensor = tensor.to(dtype)
        if tensor.is_complex():
            # gradients are products with the conjugates of the other operands (the convention of torch.autograd)
            tensor = tensor.conj()
        return tensor if self.axis is None else self.axis.rows(tensor, n)


def _bind(rule: Rule, call: Call) -> dict[str, Any]:
    if len(call.args) > len(rule.arguments):
        raise UnsupportedOpError(
            f"{call.name}: called with {len(call.args)} arguments, its rule knows {', '.join(rule.arguments)}"
        )
    arguments = {**dict(zip(rule.arguments, call.args, strict=False)), **call.kwargs}
    unknown = set(arguments) - set(rule.arguments)
    if unknown:
        raise UnsupportedOpError(f"{call.name}: its rule does not know the argument {', '.join(sorted(unknown))}")
    return arguments


def _slots(arguments: Mapping[str, Any]) -> Iterator[tuple[str, int | None, Tensor]]:
    """(argument, place in its list, tensor) for every tensor among the arguments."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, None, value
        elif isinstance(value, list | tuple):
            yield from ((name, k, x) for k, x in enumerate(value) if isinstance(x, Tensor))


def _by_rule(
    recording: "Recording", func: Function, call: Call, rule: Rule, arguments: dict[str, Any], shared: list[Tensor]
) -> Any:
    """Run the op on detached parameters and tap its results."""
    args, kwargs = _replaced(call, {id(x): x.detach() for x in shared})
    out = func(*args, **kwargs)
    axes = {id(x): axis for x, axis in call.placed()}
    return _tap(recording, call, rule, arguments, axes, shared, out)


def _tap(
    recording: "Recording",
    call: Call,
    rule: Rule,
    arguments: dict[str, Any],
    axes: Mapping[int, Axis],
    shared: list[Tensor],
    out: Any,
) -> Any:
    out = swapped(out, {id(x): _no_view(x) for x in tensors_in(out)})
    outs = [x for x in tensors_in(out) if x.is_floating_point() or x.is_complex()]
    places = [_placed(recording, call, x, shared) for x in outs]
    wanted = [(name, k, x) for name, k, x in _slots(arguments) if any(x is s for s in shared)]
    needed = rule.saved_for({name for name, _, _ in wanted})
    held, saved = _held(arguments, needed, axes)
    sources = [(name, k, _source(recording, x)) for name, k, x in wanted]
    uses = [recording.collector.expect(source, call.name, "rule") for *_, source in sources]
    keeps_out = "out" in needed
    # the closure must not hold the call or its results: their tensors would outlive the graph, past every saved-tensor hook
    n, op, count = call.n, call.name, len(outs)

    def factors(grads: Grads, saved: Sequence[Tensor]) -> list[tuple[Source, list[Use], Factor]]:
        rows = [None if g is None else axis.rows(g, n) for g, axis in zip(grads, places, strict=True)]
        results = [axis.rows(x, n) for x, axis in zip(saved[-count:], places, strict=True)] if keeps_out else [None] * count
        dtype = next(g.dtype for g in grads if g is not None)
        filled = {name: _filled(value, saved, n, dtype) for name, value in held.items()}
        single = count == 1
        try:
            found = rule.function(rows[0] if single else rows, results[0] if single else results, **filled)
        except NotImplementedError as error:
            names = ", ".join(use.parameter for group in uses for use in group)
            raise UnsupportedOpError(f"{error} (parameter {names})") from error
        return [
            (source, use, _checked(op, found, name, k, source).regroup(n))
            for (name, k, source), use in zip(sources, uses, strict=True)
        ]

    tapped = Tap.run(recording, factors, recording.anchor, outs, [*saved, *(outs if keeps_out else [])])
    for x, axis in zip(tapped, places, strict=True):
        recording.declare(x, axis)
    return swapped(out, dict(zip(map(id, outs), tapped, strict=True)))


def _held(arguments: Mapping[str, Any], needed: set[str], axes: Mapping[int, Axis]) -> tuple[dict[str, Any], list[Tensor]]:
    """A rule's arguments with slots for the tensors, and those that have to be saved; parameters are saved detached."""
    saved: list[Tensor] = []
    slots: dict[int, Slot] = {}
    for name, _, x in _slots(arguments):
        axis = axes.get(id(x))
        if name in needed:
            slots[id(x)] = Slot(len(saved), axis)
            saved.append(x if axis is not None else x.detach())
        elif id(x) not in slots:
            slots[id(x)] = Slot(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), axis)
    return {name: swapped(value, slots) for name, value in arguments.items()}, saved


def _filled(value: Any, saved: Sequence[Tensor], n: int, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_filled(item, saved, n, dtype) for item in value)
    return value.filled(saved, n, dtype) if isinstance(value, Slot) else value


def _no_view(out: Tensor) -> Tensor:
    """The same memory, known to autograd as a tensor of its own: in-place ops may follow a tap, but not on a view."""
    # a 3-D F.linear with bias returns a view of its 2-D product
    own: Tensor = torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out  # noqa: SLF001
    return own


def _placed(recording: "Recording", call: Call, out: Tensor, shared: list[Tensor]) -> Axis:
    where = follow(call, out)
    if not isinstance(where, Axis):
        raise SampleAxisError(
            f"{call.name}: brings the samples together, so the gradient of {_names(recording, shared)} cannot be split over them: "
            f"operands of shapes {', '.join(str(tuple(x.shape)) for x in call.tensors)}, samples on axis "
            f"{', '.join(str(axis.dim) for _, axis in call.placed())}. Move the sample axis to a place that the op keeps, "
            "or check `batch_dim`."
        )
    return where


def _checked(op: str, found: Mapping[str, Any], name: str, place: int | None, source: Source) -> Factor:
    factor = found.get(name)
    factor = factor[place] if isinstance(factor, list) and place is not None else factor
    factor = factor() if callable(factor) else factor
    if not isinstance(factor, Factor):
        raise UnsupportedOpError(
            f"{op}: its rule gives no factor for '{name}' ({', '.join(sorted(source.names))}), got {type(factor).__name__}. "
            "Return {'" + name + "': Factor} from the rule, or freeze the parameter."
        )
    if factor.shape != source.shape:
        raise UnsupportedOpError(
            f"{op}: its rule gives '{name}' a gradient of shape {tuple(factor.shape)}, expected {tuple(source.shape)}"
        )
    return factor


# --- contractions -------------------------------------------------------------------------------------------------------------


def _contract(recording: "Recording", func: Function, call: Call, shared: list[Tensor]) -> Any:
    """A matrix product, einsum and the like: outer products of the result's gradient with the other operands."""
    product = CONTRACTIONS[call.name](call.args, call.kwargs)
    if any(len(set(names)) < len(names) for names in product.letters):
        return _fall_back(recording, func, Operation(call.name, inplace=False, source=None, plain_property=False), call, shared)
    letter, axis, rows = _sample_letter(recording, call, product, shared)
    new: dict[int, Tensor] = {}
    if product.addend is not None and any(product.addend is x for x in shared):
        frame = axis.at(product.result.index(letter))
        new[id(product.addend)] = enter(recording, call, product.addend, frame, len(product.result), rows)
    for x, names in zip(product.operands, product.letters, strict=True):
        if any(x is s for s in shared) and letter in names and x.shape[names.index(letter)] == rows:
            own = axis.at(names.index(letter))
            new[id(x)] = enter(recording, call, x, own, x.ndim, rows)
    rest = [x for x in shared if id(x) not in new]
    args, kwargs = _replaced(call, {**new, **{id(x): x.detach() for x in rest}})
    out = func(*args, **kwargs)
    if not rest:
        return out
    operands = [new.get(id(x), x) for x in product.operands]
    axes = {
        id(x): axis.at(names.index(letter))
        for x, names in zip(operands, product.letters, strict=True)
        if letter in names and x.shape[names.index(letter)] == rows and not any(x is r for r in rest)
    }
    # parameters, and what broadcasts over the samples, stay as they are
    letters = [
        rows_first(names, letter) if id(x) in axes else names for x, names in zip(operands, product.letters, strict=True)
    ]
    arguments = {"equation": (*letters, rows_first(product.result, letter)), "operands": operands, "alpha": product.alpha}
    return _tap(recording, call, RULES[operation(contract).name], arguments, axes, rest, out)


def _sample_letter(recording: "Recording", call: Call, product: Contraction, shared: list[Tensor]) -> tuple[str, Axis, int]:
    """The letter of the sample axis, how samples lie on it, and its size."""
    for x, names in zip(product.operands, product.letters, strict=True):
        axis = call.where(x)
        if isinstance(axis, Axis):
            letter, size = names[axis.dim], x.shape[axis.dim]
            break
    else:
        assert product.addend is not None
        axis = call.where(product.addend)
        assert isinstance(axis, Axis)
        letter = product.result[axis.dim + len(product.result) - product.addend.ndim]
        size = product.addend.shape[axis.dim]
    if letter not in product.result:
        shape = [1] * len(product.result)
        _placed(recording, call, call.tensors[0].new_empty(shape), shared)
    return letter, axis, size


# --- fallback -----------------------------------------------------------------------------------------------------------------


def _fall_back(recording: "Recording", func: Function, op: Operation, call: Call, shared: list[Tensor]) -> Any:
    """An op without a rule: run it sample by sample, each on its own copy of the parameter, vectorised where possible."""
    if recording.fallback == "error":
        raise UnsupportedOpError(
            f"{call.name}: no rule gives the gradient of {_names(recording, shared)}, and fallback='error' forbids the slow way. "
            "Register one with `samplewise.rule`, or allow the fallback."
        )
    if op.inplace:
        raise UnsupportedOpError(
            f"{call.name}: has no rule, and an in-place op cannot be run sample by sample. Use it out of place."
        )
    copies = [_copies(recording, call, x) for x in shared]
    batched = [(x, axis) for x, axis in call.placed()]
    stacks = [_per_sample(x, axis, call.n) for x, axis in batched]

    def one(*pieces: Tensor) -> Any:
        new = dict(zip([id(x) for x in [*shared, *(x for x, _ in batched)]], pieces, strict=True))
        args, kwargs = _replaced(call, new)
        return func(*args, **kwargs)

    with torch.no_grad():
        plain = func(*call.args, **call.kwargs)
    if not isinstance(plain, Tensor):
        raise UnsupportedOpError(f"{call.name}: has no rule, and the fallback knows ops with one tensor as result only.")
    try:
        each = torch.func.vmap(one, randomness="different")(*copies, *stacks)
    except (RuntimeError, ValueError, NotImplementedError):
        each = _looped(recording, call, one, [*copies, *stacks], shared)
    return _joined(recording, call, plain, each, shared)


def _looped(
    recording: "Recording", call: Call, one: Callable[..., Tensor], stacks: list[Tensor], shared: list[Tensor]
) -> Tensor:
    try:
        return torch.stack([one(*pieces) for pieces in zip(*stacks, strict=True)])
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise MixedSamplesError(
            f"{call.name}: cannot be run sample by sample ({error}), so the gradient of {_names(recording, shared)} cannot be split "
            "over samples. Move the sample axis to a place that the op keeps, or register a rule with `samplewise.rule`."
        ) from error


def _copies(recording: "Recording", call: Call, tensor: Tensor) -> Tensor:
    """One copy of a shared tensor per sample, `(n, *shape)`, without memory of its own."""
    source = _source(recording, tensor)
    uses = recording.collector.expect(source, call.name, "fallback")

    def factors(grads: Grads, _: Sequence[Tensor]) -> list[tuple[Source, list[Use], Factor]]:
        grad = grads[0]
        assert grad is not None
        return [(source, uses, Dense(grad))]

    copies = tensor.detach().expand(call.n, *tensor.shape)
    return Enter.run(recording, factors, recording.anchor, copies)


def _per_sample(x: Tensor, axis: Axis, n: int) -> Tensor:
    """`(n, *shape)`: what each sample has of `x`, its axis kept with `outer * inner` entries."""
    if axis.ragged is not None:
        raise UnsupportedOpError("the fallback cannot run packed rows sample by sample; pad the sequence, or register a rule")
    grouped: Tensor = axis.rows(x, n).unflatten(0, (n, axis.outer * axis.inner))
    return grouped.movedim(1, axis.dim + 1)


def _joined(recording: "Recording", call: Call, plain: Tensor, each: Tensor, shared: list[Tensor]) -> Tensor:
    """The samples' results put together as the op itself would; refused where they are not the op's."""
    differ = [d for d in range(plain.ndim) if plain.shape[d] != each.shape[d + 1]] if plain.ndim == each.ndim - 1 else []
    if len(differ) == 1:
        (dim,) = differ
        out = each.movedim(0, dim).flatten(dim, dim + 1)
        if out.shape == plain.shape and torch.allclose(out.detach(), plain, rtol=1e-3, atol=1e-4, equal_nan=True):
            recording.declare(out, Axis(dim, 1, each.shape[dim + 1]))
            return out
    raise MixedSamplesError(
        f"{call.name}: run sample by sample it gives something else than on the batch (shapes {tuple(each.shape)} and "
        f"{tuple(plain.shape)}), so the gradient of {_names(recording, shared)} cannot be split over samples. Use an op that "
        "treats samples alike, or register a rule with `samplewise.rule`."
    )
