"""What is known of the tensors of a recording: which carry the samples, which are shared by them, and what in-place ops changed."""

import itertools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .attaching import packed_owners, place_of
from .axes import Axis, Call, Lost, Where, tensors_in
from .collecting import Shared, Source, leaves_of
from .notes import Notes
from .ownership import of_base
from .registry import Operation
from .remembered import CONSTANT
from .running import unrecorded
from .sample_axis import TURNS

# said by the user: stays constant even as an argument of the model
DECLARED_CONSTANT = "declared constant"
Kind = Axis | Lost | Shared | str


class Change(NamedTuple):
    """That an in-place op changed what the tensors in some memory are."""

    storage: torch.UntypedStorage
    clock: int
    # whether nothing that depends on the samples was ever written there
    plain: bool


class Known:
    """Notes on tensors, and what to think of those that are seen for the first time."""

    # whether a tensor with a history from outside is batched where its shape says so
    trusts_shapes = False

    def __init__(self, batch_size: int | None, batch_dim: int) -> None:
        self.n, self.batch_dim = batch_size, batch_dim
        # what every tapped result has in its history
        self.anchor = torch.zeros((), device="cpu", requires_grad=True)
        # parameters by id, and their uses
        self._names_of: dict[int, str] = {}
        self.sources = dict[int, Source]()
        # what a tensor is, and when that was noted, if in-place ops had changed anything by then
        self._kinds: Notes[Kind] = Notes()
        self._noted: Notes[int] = Notes()
        # memory in which an in-place op changed what a tensor is, and when: other tensors noted before are stale
        self._changed: dict[int, Change] = {}
        self._clock = 0
        self._lost: list[weakref.ref[Tensor]] = []
        # what the shapes of tensors from outside suggested, and the versions that they had
        self._guesses: Notes[tuple[Kind, int]] = Notes()

    def declare(self, tensor: Tensor, kind: Kind) -> None:
        """Say what a tensor is, whatever its shape suggests."""
        self._kinds[tensor] = kind
        if self._clock:
            self._noted[tensor] = self._clock
        if isinstance(kind, Lost) and tensor.layout == torch.strided:
            self._lost.append(weakref.ref(tensor))

    def overwrite(self, tensor: Tensor, kind: Kind, *, mixed: bool = False, base: tuple[Tensor, object] | None = None) -> None:
        """Say what a tensor is after an in-place op; if that is new, whatever else shares its memory is no longer known.

        `mixed`: samples were brought together in it, whatever it was before; `base`: what it is a view of, and was before.
        """
        before = self._kinds.get(tensor) or CONSTANT
        if isinstance(kind, Axis) and isinstance(before, Axis) and kind.means(before, self.n or 0):
            kind = before
        new = mixed or kind != before
        if new and tensor.layout == torch.strided:
            self._clock += 1
            storage = tensor.untyped_storage()
            earlier = self._changed.get(storage._cdata)  # noqa: SLF001
            plain = isinstance(kind, Shared | str) and (earlier is None or earlier.plain)
            self._changed[storage._cdata] = Change(storage, self._clock, plain)  # noqa: SLF001
            whole, held = base or (tensor, None)
            if isinstance(kind, Axis) and (isinstance(held, Axis) or held == CONSTANT):
                self.declare(whole, of_base(whole, held if isinstance(held, Axis) else None, tensor, kind, self.n or 0))
        self.declare(tensor, kind)

    def _stale(self, tensor: Tensor) -> Change | None:
        strided = tensor.layout == torch.strided
        changed = self._changed.get(tensor.untyped_storage()._cdata) if strided else None  # noqa: SLF001
        return changed if changed is not None and changed.clock > (self._noted.get(tensor) or 0) else None

    def where(self, tensor: Tensor) -> Where | None:
        """Where the sample axis of a tensor is; None for what does not depend on the samples."""
        kind = self.kind(tensor)
        return kind if isinstance(kind, Axis | Lost) else None

    def kind(self, tensor: Tensor) -> Kind:
        """What a tensor is: placed, lost, shared or constant."""
        kind = self._kinds.get(tensor) or self._first_seen(tensor)
        if self._changed and (change := self._stale(tensor)) is not None:
            return self._rewritten(tensor, kind, change)
        if type(kind) is Axis:
            return kind
        if type(kind) is Shared:
            return (kind if kind.version is None else kind.now(tensor)) if tensor.requires_grad else CONSTANT
        # the kinds that are words are the two of constants
        if isinstance(kind, str) and tensor.requires_grad and tensor.grad_fn is not None:
            return self._of_history(tensor)
        return kind

    def before(
        self, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], target: Tensor | None
    ) -> tuple[Call, list[Kind]]:
        """A call with what is known of its tensors before the op runs, which may write to the target."""
        viewed = None if target is None else target._base  # noqa: SLF001
        base = None if viewed is None else (viewed, self.kind(viewed))
        if target is not None and op.name in TURNS:
            # what the op does is told from the shape before
            turned = target.detach()
            self.declare(turned, self.kind(target))
            args = (turned, *args[1:])
        call = Call(op.name, args, kwargs, self.n or 0, self.where, base)
        kinds = [self.kind(x) for x in call.tensors]
        call.known = {
            id(x): kind if isinstance(kind, Axis | Lost) else None for x, kind in zip(call.tensors, kinds, strict=True)
        }
        return call, kinds

    def _names(self, shared: list[Tensor]) -> frozenset[str]:
        kinds = [self.kind(x) for x in shared]
        return frozenset().union(*(kind.names for kind in kinds if isinstance(kind, Shared)))

    def mixes(self, outputs: Any, directions: Any) -> bool:
        """Whether a derivative of outputs, in directions, is more than one of each sample's output in a direction of its own."""
        ys, vs = ([x] if isinstance(x, Tensor) or x is None else list(x) for x in (outputs, directions))
        places = [(self.where(y), None if v is None else self.where(v)) for y, v in itertools.zip_longest(ys, vs)]
        return any(
            (isinstance(y, Lost) and not y.linear)
            or (v is not None and not (isinstance(v, Axis) and isinstance(y, Axis) and v.means(y, self.n or 0)))
            for y, v in places
        )

    def _gradient_of(self, x: Tensor, grad: Tensor | None) -> Tensor | None:
        """A gradient, noted to have its samples where its tensor has them, as far as nothing else is known of it."""
        if grad is not None and self._kinds.get(grad) is None and isinstance(where := self.where(x), Axis | Lost):
            self.declare(grad, where)
        return grad

    def leaves_elsewhere(self, losses: Any) -> list[Tensor]:
        """The leaves that losses reach in place of parameters of the model, if it has any: of another one, perhaps."""
        if not self.sources:
            return []
        leaves = [leaf for loss in tensors_in((losses,)) for leaf in leaves_of(loss)]
        return [] if any(leaf is self.anchor for leaf in leaves) else [leaf for leaf in leaves if self.where(leaf) is None]

    def _enter_packed(self, sequence: PackedSequence) -> None:
        """The rows of a packed sequence, and the orders that lead to it and back."""
        n = self.n or 0
        self.declare(sequence.data, Axis.of_rows(0, packed_owners(sequence, n), n))
        for x in (sequence.batch_sizes, sequence.sorted_indices, sequence.unsorted_indices):
            if x is not None:
                self.declare(x, CONSTANT)

    def note_gradients(self, outputs: Any, inputs: Any, directions: Any, grads: Any) -> None:
        """Note what the results of `torch.autograd.grad` are: their samples are where those of the inputs are."""
        mixed = self.mixes(outputs, directions)
        for x, grad in zip(tensors_in((inputs,)), grads, strict=True):
            where = self.where(x)
            if grad is not None and where is not None and (mixed or grad.shape != x.shape):
                self.declare(grad, Lost("autograd.grad"))
            else:
                self._gradient_of(x, grad)

    def gradient_on(self, axis: Axis, grad: Tensor) -> Tensor:
        """A gradient on its way back, known to have its samples where the result has them that it is of."""
        with unrecorded(graph=torch.is_grad_enabled()):
            own = grad.view_as(grad)
        self.declare(own, axis)
        return own

    def _rewritten(self, tensor: Tensor, kind: Kind, change: Change) -> Kind:
        """What a tensor is whose memory was written to through another one."""
        if id(tensor) in self.sources:
            # a parameter that was set, without a graph
            return kind
        if not change.plain or isinstance(kind, Axis | Lost):
            return Lost("an in-place op on a tensor that shares its memory")
        # nothing of the samples came: its history has all there is to say
        self.declare(tensor, CONSTANT)
        return self._of_history(tensor)

    def _of_history(self, tensor: Tensor) -> Kind:
        """What a tensor is that depends on no sample but has a history: a function of parameters with a backward of its own."""
        leaves = leaves_of(tensor)
        if any(leaf is self.anchor for leaf in leaves):
            return Lost("a function that the recording could not see into")
        names = frozenset(self._names_of[id(leaf)] for leaf in leaves if id(leaf) in self._names_of)
        kind: Kind = Shared(names, isometric=False, version=tensor._version) if names else CONSTANT  # noqa: SLF001
        self.declare(tensor, kind)
        return kind

    def assume_constant(self, value: object) -> None:
        """Take a tensor for a constant of which nothing is known but a shape that suggested something else."""
        if not isinstance(value, Tensor) or not isinstance(kind := self.kind(value), Axis):
            return
        guess = self._guesses.get(value)
        if guess is not None and guess[0] is kind and guess[1] == value._version:  # noqa: SLF001
            self.declare(value, CONSTANT)

    def by_shape(self, tensor: Tensor) -> Axis | None:
        """The declared axis, where it has the batch size."""
        place = place_of(tensor, self.batch_dim)
        return Axis(place) if place is not None and tensor.shape[place] == self.n else None

    def of_memory(self, tensor: Tensor) -> Kind | None:
        """What a tensor is that came to the memory of another one in a way that was not followed; None if nothing is known of that."""
        if tensor.layout != torch.strided:
            return None
        cells, layout = tensor.untyped_storage()._cdata, (tensor.shape, tensor.stride(), tensor.storage_offset())  # noqa: SLF001
        found: Kind | None = None
        for other, kind in self._kinds.items():
            shares = other is not tensor and other.layout == torch.strided and other.untyped_storage()._cdata == cells  # noqa: SLF001
            if not shares or not isinstance(kind, Axis | Lost):
                continue
            if isinstance(kind, Axis) and (other.shape, other.stride(), other.storage_offset()) == layout:
                return kind
            found = Lost("a tensor made of the memory of another one")
        return found

    def _first_seen(self, tensor: Tensor) -> Kind:
        """A tensor made outside: batched if its declared axis has the batch size, else constant."""
        if isinstance(tensor, nn.Parameter) and self.n is not None:
            # it may have been made of samples
            return self.of_memory(tensor) or CONSTANT
        if self.n is None:
            return CONSTANT
        kind: Kind = self.by_shape(tensor) or CONSTANT
        fits = kind != CONSTANT
        if tensor.grad_fn is not None and self.n > 1 and not (fits and self.trusts_shapes):
            # it has a history, of which nothing is known
            kind = Lost("a function that the recording could not see into")
        if isinstance(kind, Axis) and tensor.layout == torch.strided:
            # an opaque function gave back what it was given
            cells = tensor.untyped_storage()._cdata  # noqa: SLF001
            shared = (other for ref in self._lost if (other := ref()) is not None and other.untyped_storage()._cdata == cells)  # noqa: SLF001
            kind = next((where for other in shared if isinstance(where := self.where(other), Lost)), kind)
        self.declare(tensor, kind)
        if isinstance(kind, Axis) and not tensor.is_inference():
            self._guesses[tensor] = kind, tensor._version  # noqa: SLF001
        # it may be older than any change
        self._noted[tensor] = 0
        return kind
