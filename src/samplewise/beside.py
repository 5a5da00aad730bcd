"""What stands beside the rows of a tensor in an op: where its other operands have one entry for each row.

Rows whose number or order the data decided are asked: a constant with rows of its own would meet them by their place.
"""

from collections.abc import Callable

from torch import Tensor

from .axes import Axis, Call, is_parameter, meets_by_place, tensors_in
from .contractions import CONTRACTIONS
from .movement import dim_of

# `(call, tensor, its axis)` gives the operands and their dims; None: what there is beside the rows is not known
Beside = Callable[[Call, Tensor, Axis], list[tuple[Tensor, int]] | None]


def from_the_right(call: Call, x: Tensor, axis: Axis) -> list[tuple[Tensor, int]]:
    """Broadcasting."""
    return [(y, y.ndim + axis.dim - x.ndim) for y in call.tensors if y.ndim + axis.dim >= x.ndim]


def nothing(_: Call, __: Tensor, ___: Axis) -> list[tuple[Tensor, int]]:
    """Rows that meet no other operand by row, or an op that looks itself."""
    return []


def everywhere_first(call: Call, _: Tensor, axis: Axis) -> list[tuple[Tensor, int]] | None:
    """All operands have their samples first."""
    return [(y, 0) for y in call.tensors if y.ndim] if axis.dim == 0 else None


def joined(call: Call, x: Tensor, axis: Axis) -> list[tuple[Tensor, int]]:
    """Tensors of equal dims, joined along one."""
    along = axis.dim == dim_of(x, call.get(1, "dim", 0))
    return [] if along else from_the_right(call, x, axis)


def by_letter(call: Call, x: Tensor, axis: Axis) -> list[tuple[Tensor, int]]:
    """Products."""
    product = CONTRACTIONS[call.name](call.args, call.kwargs)
    named = list(zip(product.operands, product.letters, strict=True))
    if product.addend is not None and product.addend.ndim <= len(product.result):
        named.append((product.addend, product.result[len(product.result) - product.addend.ndim :]))
    letter = next(names[axis.dim] for y, names in named if y is x)
    return [(y, names.index(letter)) for y, names in named if letter in names]


def in_groups(call: Call, _: Tensor, axis: Axis) -> list[tuple[Tensor, int]] | None:
    """A convolution: weights are the same for all rows, unless the rows are groups of channels."""
    return [] if axis.dim == 0 and all(own.dim == 0 for _, own in call.placed()) and len(call.placed()) == 1 else None


def by_class(call: Call, x: Tensor, axis: Axis) -> list[tuple[Tensor, int]]:
    """Logits `(n, c, ...)` and targets `(n, ...)`."""
    logits, target = call.args[0], call.get(1, "target")
    if logits.ndim == target.ndim or logits.ndim < 2:
        return [(y, axis.dim) for y in (logits, target) if y.ndim > axis.dim]
    row = axis.dim - (axis.dim > 1) if x is logits else axis.dim
    return [(logits, row + (row > 0)), (target, row)]


def of_pairs(call: Call, _: Tensor, axis: Axis) -> list[tuple[Tensor, int]]:
    """Two rows of features and a target for the pair."""
    return [(y, axis.dim) for y in call.tensors if y.ndim > axis.dim]


def of_margins(call: Call, _: Tensor, __: Axis) -> list[tuple[Tensor, int]]:
    """Scores and targets; a weight is of the classes."""
    return [(y, 0) for y in call.tensors[:2] if y.ndim]


def by_spelled_letter(call: Call, x: Tensor, axis: Axis) -> list[tuple[Tensor, int]]:
    """Our own product: letters of each operand, then the operands."""
    named = list(zip(call.args[1], call.args[0], strict=False))
    letter = next(names[axis.dim] for y, names in named if y is x)
    return [(y, names.index(letter)) for y, names in named if letter in names]


def of_a_rule(call: Call, x: Tensor, _: Axis) -> list[tuple[Tensor, int]]:
    """An op of a third party: what has as many rows, and is no weight."""
    return [(y, 0) for y in call.tensors if y.ndim and y.shape[0] == x.shape[0] and not is_parameter(y)]


def of_sequences(call: Call, _: Tensor, __: Axis) -> list[tuple[Tensor, int]] | None:
    """`ctc_loss`: log probabilities `(t, n, c)`, and what there is for each sequence."""
    lengths = [x for k, name in ((2, "input_lengths"), (3, "target_lengths")) for x in [call.get(k, name)]]
    listed = any(not isinstance(x, Tensor) and len(set(x)) > 1 for x in lengths)
    return None if listed else [(y, 1 if y is call.args[0] else 0) for y in call.tensors if y.ndim]


def of_systems(call: Call, x: Tensor, axis: Axis) -> list[tuple[Tensor, int]]:
    """`linalg.solve`: right sides may be vectors."""
    a, b = call.args[0], call.get(1, "B")
    vector = b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])
    row = axis.dim - x.ndim - (vector and x is b)
    return [(y, dim) for y in (a, b) if 0 <= (dim := y.ndim + (vector and y is b) + row) < y.ndim]


def of_points(call: Call, x: Tensor, axis: Axis) -> list[tuple[Tensor, int]]:
    """`cdist`: the points of one side are not beside those of the other."""
    return [] if axis.dim == x.ndim - 2 else from_the_right(call, x, axis)


def in_steps(call: Call, _: Tensor, __: Axis) -> list[tuple[Tensor, int]]:
    """The scan of a recurrent layer: weights have no rows."""
    weights = {"steps": (3, 4), "scan": (4,), "state_products": (1, 2)}[call.name.rpartition(".")[2]]
    rows = tensors_in([x for k, x in enumerate(call.args) if k not in weights])
    return [(y, y.ndim - 2) for y in rows if y.ndim > 1]


def mixed_by_place(call: Call, beside: Beside) -> bool:
    """Whether rows that the data chose are treated by their place."""
    for x, axis in call.placed():
        met = beside(call, x, axis) if axis.chosen is not None and axis.size(call.n) > 1 else []
        if met is None or meets_by_place(call, axis, met):
            return True
    return False
