"""Matrix products and their kin as one thing: letters per operand, letters of the result.

`matmul` of `(b, p, i)` and `(i, o)` is `b p i, i o -> b p o`. From the letters follow where the sample axis goes and, for every
operand, the outer products that make its gradient.
"""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Letters = tuple[str, ...]


@dataclass(frozen=True)
class Contraction:
    """`result = alpha * einsum(letters, operands) + beta * addend`."""

    operands: tuple[Tensor, ...]
    letters: tuple[Letters, ...]
    result: Letters
    alpha: complex = 1
    addend: Tensor | None = None


def contract(equation: Sequence[Letters], operands: Sequence[Tensor], alpha: complex = 1) -> Tensor:
    """The canonical op that every product is recorded as: letters of each operand, then those of the result."""
    names = sorted({name for letters in equation for name in letters})
    spelled = ["".join(string.ascii_letters[names.index(name)] for name in letters) for letters in equation]
    product = torch.einsum(f"{','.join(spelled[:-1])}->{spelled[-1]}", list(operands))
    return product if alpha == 1 else alpha * product


def rows_first(names: Letters, sample: str) -> Letters:
    """The letters of a tensor once its axis `sample` is moved to the front."""
    return (sample, *(name for name in names if name != sample)) if sample in names else names


def _matmul(a: Tensor, b: Tensor) -> Contraction:
    rows, columns = ("p",) * (a.ndim > 1), ("o",) * (b.ndim > 1)
    batch = tuple(f"b{k}" for k in reversed(range(max(a.ndim, b.ndim, 2) - 2)))
    left, right = batch[len(batch) - max(0, a.ndim - 2) :], batch[len(batch) - max(0, b.ndim - 2) :]
    return Contraction((a, b), ((*left, *rows, "i"), (*right, "i", *columns)), (*batch, *rows, *columns))


def matmul(input: Tensor, other: Tensor) -> Contraction:
    return _matmul(input, other)


def mm(input: Tensor, mat2: Tensor) -> Contraction:
    return _matmul(input, mat2)


def mv(input: Tensor, vec: Tensor) -> Contraction:
    return _matmul(input, vec)


def dot(input: Tensor, tensor: Tensor) -> Contraction:
    return _matmul(input, tensor)


def reflected_matmul(input: Tensor, other: Tensor) -> Contraction:
    return _matmul(other, input)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Contraction:
    leading = tuple(f"b{k}" for k in range(input.ndim - 1))
    if weight.ndim == 1:
        return Contraction((input, weight), ((*leading, "i"), ("i",)), leading, addend=bias)
    return Contraction((input, weight), ((*leading, "i"), ("o", "i")), (*leading, "o"), addend=bias)


def outer(input: Tensor, vec2: Tensor) -> Contraction:
    return Contraction((input, vec2), (("p",), ("o",)), ("p", "o"))


def inner(input: Tensor, other: Tensor) -> Contraction:
    left, right = tuple(f"a{k}" for k in range(input.ndim - 1)), tuple(f"b{k}" for k in range(other.ndim - 1))
    if not input.ndim or not other.ndim:
        # a number times a tensor
        every = tuple(f"a{k}" for k in range(max(input.ndim, other.ndim)))
        return Contraction((input, other), (every[: input.ndim], every[: other.ndim]), every)
    return Contraction((input, other), ((*left, "i"), (*right, "i")), (*left, *right))


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: complex = 1, alpha: complex = 1) -> Contraction:
    return replace(_matmul(mat1, mat2), alpha=alpha, addend=input)


def addmv(input: Tensor, mat: Tensor, vec: Tensor, *, beta: complex = 1, alpha: complex = 1) -> Contraction:
    return replace(_matmul(mat, vec), alpha=alpha, addend=input)


def addr(input: Tensor, vec1: Tensor, vec2: Tensor, *, beta: complex = 1, alpha: complex = 1) -> Contraction:
    return replace(outer(vec1, vec2), alpha=alpha, addend=input)


def baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: complex = 1, alpha: complex = 1) -> Contraction:
    return replace(_matmul(batch1, batch2), alpha=alpha, addend=input)


def addbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: complex = 1, alpha: complex = 1) -> Contraction:
    letters = (("b", "p", "i"), ("b", "i", "o"))
    return Contraction((batch1, batch2), letters, ("p", "o"), alpha, input)


def tensordot(a: Tensor, b: Tensor, dims_self: Sequence[int], dims_other: Sequence[int]) -> Contraction:
    left, right = [f"a{k}" for k in range(a.ndim)], [f"b{k}" for k in range(b.ndim)]
    summed = set()
    for da, db in zip(dims_self, dims_other, strict=True):
        right[db] = left[da]
        summed.add(left[da])
    kept = tuple(name for name in (*left, *right) if name not in summed)
    return Contraction((a, b), (tuple(left), tuple(right)), kept)


def einsum(equation: str, *operands: Tensor | Sequence[Tensor], path: object = None) -> Contraction:
    tensors = [x for item in operands for x in ([item] if isinstance(item, Tensor) else item)]
    return _einsum(equation, tensors)


def _einsum(equation: str, operands: Sequence[Tensor]) -> Contraction:
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    dots = max((x.ndim - len(t.replace("...", "")) for t, x in zip(terms, operands, strict=True) if "..." in t), default=0)
    letters = tuple(_spelled(t, x.ndim, dots) for t, x in zip(terms, operands, strict=True))
    if arrow:
        return Contraction(tuple(operands), letters, _spelled(right, len(right.replace("...", "")) + dots, dots))
    once = sorted({c for c in left if c in string.ascii_letters and left.count(c) == 1})
    return Contraction(tuple(operands), letters, (*(f".{k}" for k in range(dots)), *once))


def _spelled(term: str, ndim: int, dots: int) -> Letters:
    """One operand's letters; the dims of an ellipsis align from the right."""
    before, ellipsis, after = term.partition("...")
    hidden = ndim - len(before) - len(after) if ellipsis else 0
    return (*before, *(f".{k}" for k in range(dots - hidden, dots)), *after)


def _bound(function: Callable[..., Contraction]) -> Callable[[Sequence[Any], dict[str, Any]], Contraction]:
    return lambda args, kwargs: function(*args, **{key: value for key, value in kwargs.items() if key != "out"})


def _with_numbers(function: Callable[..., Contraction]) -> Callable[[Sequence[Any], dict[str, Any]], Contraction]:
    """An op that once took its factors between the tensors: `torch.addmm(beta, input, alpha, mat1, mat2)`."""

    def bound(args: Sequence[Any], kwargs: dict[str, Any]) -> Contraction:
        tensors, numbers = [x for x in args if isinstance(x, Tensor)], [x for x in args if not isinstance(x, Tensor)]
        return _bound(function)(tensors, {**dict(zip(("beta", "alpha"), numbers, strict=False)), **kwargs})

    return bound


CONTRACTIONS: dict[str, Callable[[Sequence[Any], dict[str, Any]], Contraction]] = {
    **dict.fromkeys(["matmul", "vdot", "linalg_matmul"], _bound(matmul)),
    **dict.fromkeys(["mm", "bmm"], _bound(mm)),
    "rmatmul": _bound(reflected_matmul),
    **dict.fromkeys(["outer", "ger"], _bound(outer)),
    **{f.__name__: _bound(f) for f in (linear, mv, dot, inner, tensordot, einsum)},
    **{f.__name__: _with_numbers(f) for f in (addmm, addmv, addr, baddbmm, addbmm)},
}
