"""Every matrix product, bilinear form and einsum, from the letters of its operands."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from samplewise.contractions import Letters, contract
from samplewise.factors import Dense, Factor
from samplewise.outer import Outer
from samplewise.registry import rule


def _contraction_back(
    grad: Tensor, operands: Sequence[Tensor], given: Sequence[Letters], to: int, alpha: complex = 1
) -> Tensor:
    """The contraction of the gradient with the other operands, by the letters of the call."""
    *letters, result = given
    own, shape = letters[to], operands[to].shape
    others = [(x.conj(), names) for k, (x, names) in enumerate(zip(operands, letters, strict=True)) if k != to]
    present = tuple(a for a in own if any(a in names for _, names in [*others, (grad, result)]))
    product = contract((result, *(names for _, names in others), present), [grad, *(x for x, _ in others)], alpha.conjugate())
    for d in (d for d, a in enumerate(own) if a not in present):
        product = product.unsqueeze(d)
    # what it broadcasts over is summed
    alone = [d for d, size in enumerate(shape) if size == 1 != product.shape[d]]
    return (product.sum(alone, keepdim=True) if alone else product).expand(shape)


@rule(contract, saves={"operands": ["operands"]}, back=_contraction_back, samples="operands")
def contraction(
    grad: Tensor,
    out: None,
    equation: Sequence[Letters],
    operands: Sequence[Tensor],
    given: Sequence[Letters],
    to: int,
    alpha: complex = 1,
) -> dict[str, list[Callable[[], Factor]]]:
    # out[n,...] = alpha sum operands[0][...] operands[1][...] ...: the gradient of one is the contraction of grad with the others
    *letters, result = equation
    scaled = grad if alpha == 1 else grad * alpha.conjugate()
    return {"operands": [partial(_operand, scaled, result, k, letters, operands) for k in range(len(operands))]}


def _operand(grad: Tensor, result: Letters, k: int, letters: Sequence[Letters], operands: Sequence[Tensor]) -> Factor:
    """The factor of operand `k`: its letters found in the result and the other operands, n (the first of the result) aside."""
    sample, sizes = result[0], _sizes(grad, result, letters, operands)
    own = tuple(a for a, size in zip(letters[k], operands[k].shape, strict=True) if size == sizes[a] and a != sample)
    others = [_without_ones(x, names, sizes) for j, (x, names) in enumerate(zip(operands, letters, strict=True)) if j != k]
    g, i = _groups(own, set(result), {a for _, names in others for a in names})
    o = tuple(a for a in own if a not in {*g, *i})
    t = tuple(a for a in result[1:] if a not in own and any(a in names for _, names in others))
    left = _arranged([(grad, result)], (sample, *g, *t, *o), sizes)
    right = _arranged(others, (sample, *g, *t, *i), sizes)
    blocks = [_size(sizes, group) for group in (g, t, o, i)]
    left = left.reshape(grad.shape[0], blocks[0], blocks[1], blocks[2])
    right = right.reshape(grad.shape[0], blocks[0], blocks[1], blocks[3])
    if own == (*g, *o, *i):
        return Outer(left, right, operands[k].shape)
    if own == (*g, *i, *o):
        return Outer(right, left, operands[k].shape)
    dense = (left.mT @ right).reshape(grad.shape[0], *(sizes[a] for a in (*g, *o, *i)))
    order = [0, *(1 + (*g, *o, *i).index(a) for a in own)]
    return Dense(dense.permute(order).reshape(grad.shape[0], *operands[k].shape))


def _groups(own: Letters, result: set[str], others: set[str]) -> tuple[Letters, Letters]:
    """The operand's letters that both the result and the others have, and those that the result does not have."""
    return tuple(a for a in own if a in result and a in others), tuple(a for a in own if a not in result)


def _sizes(grad: Tensor, result: Letters, letters: Sequence[Letters], operands: Sequence[Tensor]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for x, names in [*zip(operands, letters, strict=True), (grad, result)]:
        for a, size in zip(names, x.shape, strict=True):
            sizes[a] = size if sizes.get(a, 1) == 1 else sizes[a]
    return sizes


def _size(sizes: dict[str, int], group: Letters) -> int:
    return torch.Size([sizes[a] for a in group]).numel()


def _without_ones(x: Tensor, names: Letters, sizes: dict[str, int]) -> tuple[Tensor, Letters]:
    """`x` without the dims that broadcast."""
    gone = [d for d, a in enumerate(names) if x.shape[d] == 1 != sizes[a]]
    return x.squeeze(gone) if gone else x, tuple(a for d, a in enumerate(names) if d not in gone)


def _arranged(factors: Sequence[tuple[Tensor, Letters]], wanted: Letters, sizes: dict[str, int]) -> Tensor:
    """The product of tensors with the wanted letters: others summed, missing ones expanded."""
    every = {a for _, names in factors for a in names}
    present = tuple(a for a in wanted if a in every)
    product = contract((*(names for _, names in factors), present), [x for x, _ in factors])
    shape = [sizes[a] if a in every else 1 for a in wanted]
    return product.reshape(shape).expand([sizes[a] for a in wanted])
