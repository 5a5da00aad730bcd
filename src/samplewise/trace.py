"""A call whose ops were noted, and which can run again on other batches."""

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from .running import unrecorded

_PLAINLY = torch._C._AutoDispatchBelowADInplaceOrView  # noqa: SLF001


class Questions(NamedTuple):
    """What the call asked of its batch alone, such as `if mask.all()`, and the answers that it got."""

    # one after another: after another answer the next may make no sense
    asked: Sequence[Callable[..., Tensor]]
    # tensors made of numbers of Python's, for each
    held: Sequence[Sequence[Tensor]]
    answers: tuple[bool, ...]

    def fit(self, given: Sequence[Tensor]) -> bool:
        """Whether another batch gives the same answers."""
        if not self.answers:
            return True
        with unrecorded():
            asked = zip(self.asked, self.held, self.answers, strict=True)
            return all(bool(ask(*given, *held)) is answer for ask, held, answer in asked)


class Trace(NamedTuple):
    """A call that can run again."""

    run: Callable[..., Sequence[Tensor]]
    # the same for calls that take the same steps
    code: str
    # what the call used beside the tensors that it was given: parameters, buffers, and others made before it
    held: Sequence[Tensor]
    # which of them it made itself, of Python's numbers
    literals: frozenset[int]
    # how the results are put together, of tensors and of what is no tensor
    spec: TreeSpec
    rest: Mapping[int, Any]
    # what it writes to, by places among what it is given and what it holds
    writes: frozenset[int]
    # where there are numbers that another call may find others
    devices: frozenset[torch.device]
    questions: Questions
    # what it holds that nobody else looks after, and its layouts
    loose: Sequence[Tensor]
    layouts: Sequence[Hashable]

    def fits(self, given: Sequence[Tensor]) -> bool:
        """Whether it holds for a batch: what it holds is as it was, and the batch answers as the one that was traced."""
        return list(map(layout, self.loose)) == self.layouts and self.questions.fit(given)

    def __call__(self, given: Sequence[Tensor]) -> Any:
        """Run it with other values of the tensors that it was given."""
        return self.with_results(self.ran(given))

    def ran(self, given: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors among the results."""
        with unrecorded(), contextlib.nullcontext() if self.writes else _PLAINLY():
            return self.run(*given, *self.held)

    def with_results(self, found: Sequence[Tensor]) -> Any:
        """The results with other tensors among them."""
        tensors = iter(found)
        leaves = [self.rest[k] if k in self.rest else next(tensors) for k in range(self.spec.num_leaves)]
        return tree_unflatten(leaves, self.spec)

    def differs(self, other: "Trace") -> str | None:
        """A step in which another trace is not this one; None where there is none."""
        pairs = zip(self.code.splitlines(), other.code.splitlines(), strict=False)
        step = next((f"`{a.strip()}` and `{b.strip()}`" for a, b in pairs if a != b), None)
        if step or self.code != other.code:
            return step or "one of them has more steps"
        for k, (a, b) in enumerate(zip(self.held, other.held, strict=True)):
            if k not in self.literals and a is not b:
                return f"a tensor of shape {tuple(b.shape)} made outside was another one"
            if k in self.literals and not _same(a, b):
                return f"a tensor of shape {tuple(b.shape)} made of numbers had other values"
        alike = self.spec == other.spec and self.rest == other.rest
        return None if alike else "the results were others beside their tensors"


def layout(x: Tensor) -> Hashable:
    """All of a tensor but its values that the steps may depend on."""
    hooked, attributes = bool(x._backward_hooks), len(x.__dict__)  # noqa: SLF001
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_conj(), x.is_neg(), hooked, attributes


def memory(x: Tensor) -> int:
    """Which memory a tensor is in, as far as that can be said."""
    return x.untyped_storage()._cdata if x.layout == torch.strided else id(x)  # noqa: SLF001


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124  (not a number)
