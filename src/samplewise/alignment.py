"""Where the sample axis goes in ops on several tensors: broadcasting, products, indexing, losses.

Each function is one family of ops: `(call, out)` are the call and a result.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from .axes import HOST, NOBODY, Axis, Call, Lost, Selection, Where, differs_by_row, in_step_now, same_order
from .contractions import CONTRACTIONS
from .errors import SampleAxisError
from .movement import dim_of, without
from .running import listed

# None: nobody's, as a constant is
Several = Callable[[Call, Tensor], Where | None]


def broadcast(call: Call, out: Tensor) -> Where:
    """Elementwise with broadcasting: dims align from the right, and all sample axes must fall on one place."""
    (first, axis), *others = call.placed()
    found = axis.at(axis.dim + out.ndim - first.ndim)
    for x, other in others:
        placed = other.at(other.dim + out.ndim - x.ndim)
        if placed != found:
            merged = _merged(found, placed, call.n)
            if merged is None and found.ragged is None and placed.ragged is None:
                raise SampleAxisError(_conflict(call, first, x))
            if merged is None:
                # losses of single samples that are added up
                plain = not any(own.chosen for _, own in call.placed())
                return Lost(call.name, linear=plain and call.name in {"add", "sub"}, uniform=False)
            found = merged
        if not axis.in_step(other):
            return Lost(call.name)
        found = found if found.chosen is not None else replace(found, chosen=placed.chosen)
    return found


def _merged(a: Axis, b: Axis, n: int) -> Axis | None:
    """One axis for two operands whose rows belong to the same samples, or to nobody yet; None where they differ."""
    if a.dim != b.dim or a.size(n) != b.size(n):
        return None
    first, second = a.owners(n), b.owners(n)
    if ((first != second) & (first != NOBODY) & (second != NOBODY)).any():
        return None
    return Axis.of_rows(a.dim, torch.maximum(first, second), n, a.chosen or b.chosen)


def _conflict(call: Call, a: Tensor, b: Tensor) -> str:
    def show(x: Tensor) -> str:
        axis = call.where(x)
        assert isinstance(axis, Axis)
        return f"{tuple(x.shape)} with {axis}"

    column = max(a.shape, b.shape, key=len)[1:] == (1,) and min(a.ndim, b.ndim) == 1
    missing = " Is a `squeeze(-1)` missing?" if column else ""
    return (
        f"{call.name}: the sample axes of two operands fall on different places after broadcasting: {show(a)} and {show(b)}. "
        "If one of them does not depend on the samples (a mask or table made outside the model), say so with "
        "`rec.constant(tensor)` (`rec` from `samplewise.record`), or let the model hold it (`register_buffer`); if its samples lie on "
        f"another axis, with `rec.batched(tensor, dim)`.{missing}"
    )


def broadcast_along(position: int, default: int | None = None) -> Several:
    """Several operands of equal dims, working along one: gather, scatter, cross."""

    def move(call: Call, out: Tensor) -> Where:
        where, dim = broadcast(call, out), call.get(position, "dim", default)
        lost = isinstance(where, Lost) or dim is None or dim_of(out, dim) == where.dim
        return Lost(call.name) if lost else where

    return move


def batch_dims(call: Call, out: Tensor) -> Where:
    """Attention: leading dims broadcast, the last two are its own."""
    where = broadcast(call, out)
    return where if isinstance(where, Axis) and where.dim < out.ndim - 2 else Lost(call.name)


def first_of_all(call: Call, _: Tensor) -> Where:
    """An op on several tensors whose samples lie on axis 0 by definition, all of them batched."""
    axes = {axis for _, axis in call.placed()}
    (axis, *others) = axes
    return axis if not others and axis.dim == 0 and len(call.placed()) == len(call.tensors) else Lost(call.name)


def contraction(call: Call, out: Tensor) -> Where:
    """Matrix products and einsum: the letter of the sample axis, looked up in the result."""
    product = CONTRACTIONS[call.name](call.args, call.kwargs)
    found: dict[str, set[Axis]] = {}
    for x, names in zip(product.operands, product.letters, strict=True):
        axis = call.where(x)
        if isinstance(axis, Axis):
            found[names[axis.dim]] = {*found.get(names[axis.dim], ()), axis.at(0)}
    addend = None if product.addend is None else call.where(product.addend)
    if isinstance(addend, Axis) and product.addend is not None:
        name = product.result[addend.dim + out.ndim - product.addend.ndim]
        found[name] = {*found.get(name, ()), addend.at(0)}
    if len(found) != 1 or any(len(axes) > 1 for axes in found.values()):
        return Lost(call.name)
    ((letter, axes),) = found.items()
    return axes.pop().at(product.result.index(letter)) if letter in product.result else Lost(call.name)


def convolved(dims: int, *, groups: int) -> Several:
    """A convolution of `(n, c, *space)`, or of one image whose groups of channels are the samples, each with its own kernel."""

    def move(call: Call, out: Tensor) -> Where:
        x, axis = call.args[0], call.where(call.args[0])
        others = [where for y, where in call.placed() if y is not x]
        if not isinstance(axis, Axis) or x.ndim != dims + 2:
            return Lost(call.name)
        if axis.dim == 0:
            return Lost(call.name) if others else axis
        apart = axis.dim == 1 and axis.outer == 1 and axis.ragged is None and call.get(groups, "groups", 1) % call.n == 0
        alike = all(where.dim == 0 and where.outer == 1 and where.ragged is None for where in others)
        return Axis(1, 1, out.shape[1] // call.n) if apart and alike else Lost(call.name)

    return move


def ctc(call: Call, out: Tensor) -> Where:
    """`ctc_loss(log_probs (t, n, c), targets, input_lengths, target_lengths)`."""
    log_probs, targets = call.args[0], call.get(1, "targets")
    axis, labels = call.where(log_probs), call.where(targets)
    if not isinstance(axis, Axis) or axis.dim != 1 or log_probs.ndim != 3:
        return Lost(call.name)
    if out.ndim == 0:
        # targets may come one after the other
        return Lost(call.name, linear=not isinstance(labels, Lost))
    return Axis(0) if labels is None or (targets.ndim == 2 and labels == axis.at(0)) else Lost(call.name)


def solved(call: Call, out: Tensor) -> Where:
    """`linalg.solve`: matrices `(..., m, m)` and right sides `(..., m, k)` or `(..., m)`."""
    a, b = call.args[0], call.get(1, "B")
    vector = b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])
    ndim = max(a.ndim, b.ndim + vector)
    wide = {id(a): a.ndim, id(b): b.ndim + vector}
    places = {axis.at(axis.dim + ndim - wide[id(x)]) for x, axis in call.placed()}
    axis = places.pop()
    return Lost(call.name) if places or axis.dim >= ndim - 2 else axis


def searched(call: Call, out: Tensor) -> Where:
    """Places in one sorted row that is the same for all samples, or in each one's own rows."""
    edges, axes = call.get(0, "sorted_sequence"), [call.where(x) for x in call.tensors]
    if edges.ndim == 1 and call.where(edges) is None:
        (_, where), *others = call.placed()
        return Lost(call.name) if others else where
    # without broadcasting: all operands have the leading dims of the result
    (first, *_), alike = axes, len(set(axes)) == 1
    return first if alike and isinstance(first, Axis) and first.dim < out.ndim - 1 else Lost(call.name)


def distances(call: Call, out: Tensor) -> Where:
    """`cdist`: rows of the first, `(..., p, d)`, against rows of the second, `(..., r, d)`."""
    placed = call.placed()
    x, axis = placed[0]
    if len(placed) == 1 and axis.dim == x.ndim - 2:
        return axis.at(out.ndim - (2 if x is call.tensors[0] else 1))
    return batch_dims(call, out)


def concatenated(call: Call, out: Tensor) -> Where:
    dim = dim_of(out, call.get(1, "dim", 0))
    if any(axis.dim + out.ndim - x.ndim == dim or axis.ragged for x, axis in call.placed()):
        return Lost(call.name)
    return broadcast(call, out)


def stacked(call: Call, out: Tensor) -> Where:
    placed = {axis for _, axis in call.placed()}
    if out.ndim == 1 or (len(placed) > 1 and any(axis.ragged for axis in placed)):
        # numbers, or rows of several samples: told by example
        return Lost(call.name)
    if len(placed) > 1:
        raise SampleAxisError(
            _conflict(call, call.placed()[0][0], next(x for x, a in call.placed() if a != call.placed()[0][1]))
        )
    (axis,) = placed
    return axis.at(axis.dim + (axis.dim >= dim_of(out, call.get(1, "dim", 0))))


def looked_up(call: Call, _: Tensor) -> Where:
    """Embedding: the dims of the indices, then the embedding."""
    axis = call.where(call.get(1, "input"))
    return axis if isinstance(axis, Axis) and len(call.placed()) == 1 else Lost(call.name)


def stepwise(call: Call, out: Tensor) -> Where:
    """The scan of a recurrent layer: samples lie on the last axis but one of everything."""
    places = {axis.at(axis.dim - x.ndim) for x, axis in call.placed()}
    alike = len(places) == 1 and all(axis.dim == -2 for axis in places)
    return places.pop().at(out.ndim - 2) if alike else Lost(call.name)


def selected(call: Call, _: Tensor) -> Where:
    """`index_select`: rows picked by an index keep their samples."""
    x, index = call.args[0], call.get(2, "index")
    axis, dim = call.where(x), dim_of(x, call.get(1, "dim"))
    if not isinstance(axis, Axis):
        own = call.where(index)
        return own.at(dim) if axis is None and isinstance(own, Axis) else Lost(call.name)
    if dim != axis.dim:
        return axis if call.where(index) is None else Lost(call.name)
    own = call.where(index)
    chosen = _picked(axis, own, index, call.n)
    if chosen is False:
        return Lost(call.name)
    # an index without dims takes one row
    picked = Axis.of_rows(dim, axis.owners(call.n)[index.flatten().cpu()], call.n, chosen)
    return (_merged(picked, own.at(dim), call.n) if isinstance(own, Axis) else picked) or Lost(call.name)


def _picked(axis: Axis, own: Where | None, index: Tensor, n: int) -> Selection | Literal[False] | None:
    """Whether the data chose the rows that an index takes; False if it mixes samples in doing so."""
    rows = axis.size(n)
    if isinstance(own, Lost):
        return _reordered(axis, own, index, n) if _takes_all(index, rows) else False
    if own is not None:
        # its numbers must be of rows in the order that these are in
        known = same_order(axis.chosen, own.chosen and own.chosen.among)
        return (own.chosen and replace(own.chosen, among=axis.chosen and axis.chosen.among)) if known else False
    places = listed(index.flatten() % max(1, rows))
    if axis.chosen is not None and (len(set(places)) < len(places) or not axis.may_take(places, n)) and not in_step_now():
        return False
    if axis.chosen is None or _in_order(axis, axis.chosen, index.flatten().cpu(), n):
        return axis.chosen and axis.chosen.before()
    return axis.chosen if places == list(range(rows)) else axis.chosen.moved()


def _reordered(axis: Axis, own: Lost, index: Tensor, n: int) -> Selection | None:
    """The rows in an order that the batch decided; as they were before if that brings them back."""
    rows, before = index.flatten().cpu(), axis.chosen or Selection()
    picked = axis.chosen is not None and (before.picked or before.order is None)
    keys = own.keys if own.keys is not None and len(own.keys) == len(rows) else None
    if before.order is None:
        return Selection(keys, rows, own.order or object(), picked, before.among)
    if own.order is before.order:
        # the same sort again
        return Selection(keys, order=object(), picked=picked, among=before.among)
    if _in_order(axis, before, rows, n):
        return before.before()
    places = None if before.places is None else before.places[rows]
    return Selection(keys, places, own.order or object(), picked, before.among)


def _in_order(axis: Axis, chosen: Selection, rows: Tensor, n: int) -> bool:
    """Whether taking rows undoes all sorts; where what these did was not followed, one row of each sample tells."""
    if chosen.order is None:
        return False
    if chosen.places is None:
        return not chosen.picked and len(rows) == n and axis.owners(n)[rows].equal(torch.arange(n, device=HOST))
    places = chosen.places[rows]
    return places.equal(places.sort()[0])


def _takes_all(index: Tensor, rows: int) -> bool:
    """Whether an index takes every row equally often: an order that the batch decides, but no choice."""
    counts = torch.bincount(index.flatten() % max(1, rows), minlength=rows)
    return bool((counts == counts[:1]).all())


def indexed(call: Call, out: Tensor) -> Where:
    """`x[index]` with integers, slices, None, Ellipsis and tensors."""
    if index_meets(call, *call.args[:2]) and not in_step_now():
        return Lost(call.name)
    return through_index(call, call.args[0], call.args[1], out)


@dataclass(frozen=True)
class Item:
    """One entry of an index: what it takes from axis `source` (None adds an axis), and where its own samples are."""

    source: int
    taken: Any
    where: Where | None = None


def through_index(call: Call, x: Tensor, index: object, out: Tensor) -> Where:
    """Where the sample axis of `x[index]` is."""
    # integers are selected first, whatever stands between them
    given = index_items(call, x, index)
    items = [item for item in given if not isinstance(item.taken, int)]
    axis, picked = call.where(x), {item.source for item in items if item.taken is not None}
    if isinstance(axis, Axis) and axis.dim not in picked:
        return _one_row(
            call,
            axis,
            items,
            next(item.taken for item in given if item.source == axis.dim and isinstance(item.taken, int)),
            out,
        )
    tensors = [k for k, item in enumerate(items) if isinstance(item.taken, Tensor)]
    width = max((items[k].taken.ndim for k in tensors), default=0)
    together = not tensors or tensors == list(range(tensors[0], tensors[-1] + 1))
    place, found = 0 if together else width, set[Axis | None]()
    for k, item in enumerate(items):
        mine = axis if isinstance(axis, Axis) and item.source == axis.dim and item.taken is not None else None
        if isinstance(item.taken, Tensor):
            found |= _axes_of_tensor(call, item, mine, (place if together else 0) + width - item.taken.ndim)
            place += width * (together and k == tensors[-1])
        else:
            found |= {_through_slice(call, item.taken, mine, place)} if mine else set()
            place += 1
    where = found.pop() if len(found) == 1 else None
    return where or Lost(call.name)


def _one_row(call: Call, axis: Axis, items: list[Item], row: int, out: Tensor) -> Where:
    """`x[3]` on the sample axis: all of the result is that row's."""
    owner = int(axis.owners(call.n)[row])
    if not axis.may_take([row % axis.size(call.n)], call.n):
        return Lost(call.name)
    apart = any(item.where and not (isinstance(item.where, Axis) and item.where.sample == owner) for item in items)
    return Lost(call.name) if apart or owner == NOBODY else Axis.of_sample(owner, out)


def _through_slice(call: Call, part: slice, axis: Axis, place: int) -> Axis | None:
    size = axis.size(call.n)
    whole = range(*part.indices(size)) == range(size)
    if whole:
        return axis.at(place)
    if not axis.may_take(range(*part.indices(size)), call.n):
        return None
    return Axis.of_rows(place, axis.owners(call.n)[part], call.n, axis.chosen and axis.chosen.part(part))


def _axes_of_tensor(call: Call, item: Item, axis: Axis | None, place: int) -> set[Axis | None]:
    """The axes that an index tensor, whose first dim is at `place` of the result, brings there; None: it scatters the samples."""
    index, own = item.taken, item.where
    if axis is None:
        return {own.at(own.dim + place)} if isinstance(own, Axis) else {None} if own else set()
    chosen = _picked(axis, own, index, call.n)
    if chosen is False:
        return {None}
    # x[rows, ...]: each row taken keeps its sample
    lines = [dim for dim in range(index.ndim) if index.shape[dim] == index.numel()]
    owners = axis.owners(call.n)[index.flatten().cpu()]
    rows = Axis.of_rows(lines[0] + place, owners, call.n, chosen) if lines else None
    return {_merged(rows, own.at(own.dim + place), call.n) if rows and isinstance(own, Axis) else rows}


def index_items(call: Call, x: Tensor, index: object) -> list[Item]:
    """Every entry of an index, with the ellipsis and the missing dims written out, and masks as the positions they take."""
    given = index if isinstance(index, tuple) else (index,)
    items = [_as_item(item) for item in given]
    if not any(isinstance(item, Tensor) and item.ndim for item in items):
        items = [_as_number(call, item) for item in items]
    own = {id(item) for item in given if isinstance(item, Tensor)}
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)
    hidden = x.ndim - sum(_consumed(item) for item in items)
    full: list[Item] = []
    source = 0
    for item in items:
        if item is Ellipsis:
            full += [Item(source + k, slice(None)) for k in range(hidden)]
            source += hidden
        elif _is_mask(item):
            full += _mask_items(call, item, source)
        else:
            full.append(Item(source, item, call.where(item) if id(item) in own else None))
        source += _consumed(item)
    return full


def index_meets(call: Call, x: Tensor, index: object) -> bool:
    """Whether rows that the data chose are beside constants of their own, or rows in another order, among the parts of an index."""
    axis, items = call.where(x), [item for item in index_items(call, x, index) if isinstance(item.taken, Tensor)]
    return any(
        _beside([other for other in items if other is not item], axis, dim, chosen)
        for item in items
        for dim, chosen in _rows_of_item(axis, item)
        if chosen is not None and len(items) > 1
    )


def _rows_of_item(axis: Where | None, item: Item) -> list[tuple[int, Selection | None]]:
    """The dim, from the right, on which a part of an index has rows, and what is known of them."""
    index = item.taken
    if isinstance(item.where, Axis):
        return [(item.where.dim - index.ndim, item.where.chosen)]
    lines = [dim - index.ndim for dim in range(index.ndim) if index.shape[dim] == index.numel()]
    if not lines or not isinstance(axis, Axis) or item.source != axis.dim or axis.chosen is None:
        return []
    same = listed(index.flatten()) == list(range(index.numel()))
    return [(lines[0], axis.chosen if same else axis.chosen.moved())]


def _beside(others: list[Item], axis: Where | None, dim: int, chosen: Selection) -> bool:
    plain = [item for item in others if item.where is None and not _rows_of_item(axis, item)]
    if any(item.taken.ndim + dim >= 0 and differs_by_row(item.taken, item.taken.ndim + dim) for item in plain):
        return True
    rows = [known for item in others for _, known in _rows_of_item(axis, item)]
    return not all(same_order(chosen, known) for known in rows)


def _mask_items(call: Call, mask: Tensor, source: int) -> list[Item]:
    own, parts = call.where(mask), mask.nonzero(as_tuple=True)
    if isinstance(own, Axis):
        rows = Axis.of_rows(0, own.owners(call.n)[parts[own.dim].cpu()], call.n, Selection.of_those(own.chosen))
        return [Item(source + k, part, rows) for k, part in enumerate(parts)]
    return [Item(source + k, part, own) for k, part in enumerate(parts)]


def _as_item(item: object) -> Any:
    simple = item is None or item is Ellipsis or isinstance(item, slice | Tensor)
    if simple or (isinstance(item, int) and not isinstance(item, bool)):
        return item
    return torch.as_tensor(item, dtype=torch.long if isinstance(item, list) and not item else None)


def _as_number(call: Call, item: Any) -> Any:
    """A constant without dims as the integer it is."""
    number = isinstance(item, Tensor) and not _is_mask(item) and call.where(item) is None
    return int(item) if number else item


def _is_mask(item: object) -> TypeGuard[Tensor]:
    return isinstance(item, Tensor) and item.dtype in {torch.bool, torch.uint8}


def _consumed(item: object) -> int:
    return item.ndim if _is_mask(item) else int(item is not None and item is not Ellipsis)


def elementwise_loss(reduction: int, *, gone: int | None = None) -> Several:
    """A loss per element; `reduction` is the position of its reduction code (0 none, 1 mean, 2 sum)."""

    def each(call: Call, out: Tensor) -> Where:
        x = call.placed()[0][0]
        if gone is not None and max(y.ndim for y in call.tensors) < 2:
            # the features of one loss
            return Lost(call.name)
        if gone is None or x.ndim < 2:
            return broadcast(call, out)
        # the target has the dim that goes no longer
        axes = {axis.at(axis.dim - (y.ndim == x.ndim and axis.dim > gone % x.ndim)) for y, axis in call.placed()}
        kept = all(y.ndim < x.ndim or axis.dim != gone % x.ndim for y, axis in call.placed())
        return axes.pop() if len(axes) == 1 and kept else Lost(call.name)

    def move(call: Call, out: Tensor) -> Where:
        if call.get(reduction, "reduction", 1) == 0:
            return each(call, out)
        return _total(call, each(call, out.new_empty([1] * max(x.ndim for x in call.tensors))))

    return move


def margin_loss(call: Call, out: Tensor) -> Where:
    """A loss per row of `(n, c)`."""
    (axis, *others) = {axis for _, axis in call.placed()}
    each = axis if not others and axis.dim == 0 and call.args[0].ndim == 2 else Lost(call.name)
    return each if out.ndim == 1 else _total(call, each)


def _total(call: Call, each: Where) -> Lost:
    """A sum or mean of losses, whose samples still come apart if those of the losses do."""
    return Lost(call.name, linear=isinstance(each, Axis))


def class_loss(call: Call, _: Tensor) -> Where:
    """Cross entropy and negative log likelihood: input (n, c, ...), target (n, ...)."""
    logits, target, weight = call.args[0], call.get(1, "target"), call.get(2, "weight")
    axis = call.where(logits)
    if isinstance(weight, Tensor) and isinstance(axis, Axis) and isinstance(call.where(weight), Axis):
        # there is one for each class, whatever its size suggests
        raise SampleAxisError(_conflict(call, logits, weight))
    classes = 1 if logits.ndim > 1 else 0
    if isinstance(axis, Axis) and axis.dim == classes:
        return Lost(call.name)
    where, labels = without(axis, [classes]) if isinstance(axis, Axis) else call.placed()[0][1], call.where(target)
    if isinstance(axis, Axis) and isinstance(labels, Axis) and labels != (axis if target.is_floating_point() else where):
        raise SampleAxisError(_conflict(call, logits, target))
    if call.get(3, "reduction", 1) == 0:
        return where
    ignored = not target.is_floating_point() and bool((target == call.get(4, "ignore_index", -100)).any())
    mean = call.get(3, "reduction", 1) == 1
    return Lost(call.name, linear=True, uniform=not (mean and (weight is not None or ignored)))


def similarity(call: Call, out: Tensor) -> Where:
    dim = call.get(2, "dim", 1) if call.name == "cosine_similarity" else -1
    ndim = max(x.ndim for x in call.tensors)
    wide = out.new_empty([1] * ndim)
    where = broadcast(call, wide)
    if isinstance(where, Lost) or out.ndim == ndim:
        return where
    return Lost(call.name) if where.dim == dim % ndim else without(where, [dim % ndim])
