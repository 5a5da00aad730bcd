"""What a recording collects: factors by the shared tensor that was used, put together per parameter when asked for."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .errors import SamplewiseError, UnsupportedOpError
from .factors import Dense, Diagonal, Factor, Pulled
from .outer import Rows
from .sums import Store, add, tensors_of


@dataclass(frozen=True)
class Shared:
    """A tensor with one value for all samples: a tracked parameter, or computed from shared and constant tensors only."""

    names: frozenset[str]
    # every entry is another entry of one parameter: transposes, reshapes, slices, casts
    isometric: bool = True
    # the tensor this one is an expansion of, and the version it had
    unexpanded: tuple[Tensor, int] | None = field(default=None, compare=False)
    # of a derived tensor; in another one it was written to, perhaps through a view
    version: int | None = field(default=None, compare=False)

    def now(self, tensor: Tensor) -> "Shared":
        """What is left of it: entries that were written to are no longer others of a parameter, nor of what was expanded."""
        origin = self.unexpanded
        if self.version is not None and tensor._version != self.version:  # noqa: SLF001
            return Shared(self.names, isometric=False, version=tensor._version)  # noqa: SLF001
        if origin is not None and origin[0]._version != origin[1]:  # noqa: SLF001
            return replace(self, unexpanded=None)
        return self


class Source(NamedTuple):
    """One use of a shared tensor, at the point of its history where it was used."""

    names: frozenset[str]
    isometric: bool
    shape: torch.Size
    dtype: torch.dtype
    # None for the parameter itself
    edge: GradientEdge | None
    # where the tensor begins, and how many elements it reaches over, in the memory it is a view of
    region: range | None = None

    @staticmethod
    def of(tensor: Tensor, kind: Shared) -> "Source":
        """The source of a use of `tensor` now; later in-place changes of it do not matter."""
        edge = None if tensor.is_leaf else get_gradient_edge(tensor)
        return Source(kind.names, kind.isometric, tensor.shape, tensor.dtype, edge, _region(tensor))

    @property
    def key(self) -> object:
        """Uses with the same key have gradients that add up."""
        return self.names if self.edge is None else (self.edge.node, self.edge.output_nr)


def of_parameter(name: str, parameter: Tensor) -> tuple[Shared, Source]:
    """What is said of a parameter, and of its uses."""
    kind, source = _in_every_recording(name, parameter.shape, parameter.dtype)
    alone = parameter.is_leaf and parameter._base is None  # noqa: SLF001
    return kind, source if alone else Source.of(parameter, kind)


@functools.lru_cache(maxsize=2**16)
def _in_every_recording(name: str, shape: torch.Size, dtype: torch.dtype) -> tuple[Shared, Source]:
    kind = Shared(frozenset({name}))
    return kind, Source(kind.names, kind.isometric, shape, dtype, None)


def hooks_by(register: Callable[[Callable[..., None]], Any]) -> Mapping[int, Any] | None:
    """The dict that hooks are put into, also those that come later: what a hook that does nothing is put into."""
    handle = register(lambda *_: None)
    hooks: Mapping[int, Any] | None = handle.hooks_dict_ref()
    handle.remove()
    return hooks


def _hook_lists(tensor: Tensor) -> Iterator[Mapping[int, Any]]:
    """The dicts that hold the hooks of a tensor and of its node."""
    node: Any = tensor.grad_fn
    for register in (tensor.register_hook, node.register_hook, node.register_prehook):
        hooks = hooks_by(register)
        if hooks is not None:
            yield hooks


def _behind(edge: GradientEdge | None) -> set[Any]:
    """All nodes of the history of a derived tensor."""
    seen: set[Any] = set()
    ahead: list[Any] = [] if edge is None else [edge.node]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [following[0] for following in node.next_functions]
    return seen


def leaves_of(tensor: Tensor, until: tuple[type, ...] = ()) -> list[Tensor]:
    """The leaves of a tensor's history, which is followed up to nodes of some types."""
    leaves: list[Tensor] = []
    seen: set[Any] = {None}
    ahead: list[Any] = [tensor.grad_fn]
    while ahead:
        node = ahead.pop()
        if node in seen or isinstance(node, until):
            continue
        seen.add(node)
        following = node.next_functions
        if following:
            ahead += [before for before, _ in following]
        elif hasattr(node, "variable"):
            # where a leaf's gradient would be accumulated
            leaves.append(node.variable)
    return leaves


def _region(tensor: Tensor) -> range | None:
    base = tensor._base  # noqa: SLF001
    if base is None or not base.is_leaf or not tensor.numel():
        return None
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return range(tensor.storage_offset(), tensor.storage_offset() + span)


@dataclass
class Use:
    """One use of a parameter, for the coverage report."""

    parameter: str
    op: str
    how: str
    structure: str = "unused"
    algorithm: str = "unused"


Uses = Sequence[Use]


class Held:
    """What factors that are kept are made of, and the versions it had when they came."""

    def __init__(self) -> None:
        self._versions: list[tuple[Tensor, int]] = []

    def hold(self, factor: Factor) -> None:
        """Remember a factor's tensors, which live on until they are released."""
        self._versions += [(x, x._version) for x in tensors_of(factor)]  # noqa: SLF001

    def refuse_changed(self) -> None:
        """Raise if something that the factors are made of was changed in place."""
        if any(x._version != version for x, version in self._versions):  # noqa: SLF001
            raise SamplewiseError(
                "record: a tensor that the gradients are made of (an input of the model, perhaps) was changed in place after the "
                "backward had used it. Ask for the quantities first, or give the recording a copy."
            )

    def release(self) -> None:
        """Let the tensors go."""
        self._versions.clear()


@dataclass
class Arrived:
    """The factors of the uses of one shared tensor."""

    source: Source
    factors: list[Factor] = field(default_factory=list)
    held: Held = field(default_factory=Held)

    def together(self) -> Factor:
        """One factor for all uses.

        Raises:
            SamplewiseError: If what they are made of was changed in place since they came.
        """
        self.held.refuse_changed()
        return add(self.factors)


@dataclass
class Collector:
    """The factors of one recording."""

    parameters: dict[str, nn.Parameter]
    # called with (name, factor) as soon as a parameter's last use has arrived; the factor is dropped then
    consume: Callable[[str, Factor], None] | None = None
    uses: list[Use] = field(default_factory=list)
    # whether pull-backs are to be differentiated again
    create_graph: bool = False
    # where gradients are kept in place of factors; None where nothing is kept
    store: Store | None = None

    def __post_init__(self) -> None:
        self._arrived: dict[object, Arrived] = {}
        self._expected: dict[str, float] = {}
        self._consumed: set[str] = set()
        # the graph nodes of tensors that parameters were derived through, and what lists the hooks there
        self._hooks: dict[Any, list[Mapping[int, Any]]] = {}
        # the same of expansions that entered as what they expand, past their own nodes
        self._bypassed: dict[Any, tuple[frozenset[str], list[Mapping[int, Any]]]] = {}
        self.empty = True

    def clear(self) -> None:
        """Forget what arrived, for another backward of the same forward: what that showed of hooks and uses stays."""
        self._arrived.clear()
        self._expected.clear()
        self.empty = True

    def expect(self, sources: Sequence[Source], op: str, how: str) -> Sequence[Uses]:
        """Note the uses that an op makes in the forward; `add` with the same uses brings the factor of each."""
        expected = self._expected
        for source in sources:
            for name in source.names:
                # a derived tensor's pull-back waits for the end
                expected[name] = expected.get(name, 0) + (1 if source.edge is None else math.inf)
        if self.consume is not None:
            # nobody asks for the coverage of what is consumed
            return ((),) * len(sources)
        new = [[Use(name, op, how) for name in sorted(source.names)] for source in sources]
        self.uses.extend(use for uses in new for use in uses)
        return new

    def note_hooks(self, tensor: Tensor) -> None:
        """A tensor computed from parameters is used: hooks on it or its node will see the gradients that are pulled back through it."""
        # without grad mode a view that is written to has no history, and torch refuses to look for it
        if torch.is_grad_enabled() and not tensor.is_leaf and tensor.grad_fn not in self._hooks:
            self._hooks[tensor.grad_fn] = list(_hook_lists(tensor))

    def bypass(self, tensor: Tensor, names: frozenset[str]) -> bool:
        """Whether no hook is on an expansion of parameters that enters as what it expands; such as come later are refused in the end."""
        hooks = list(_hook_lists(tensor))
        if not any(hooks):
            self._bypassed[tensor.grad_fn] = names, hooks
        return not any(hooks)

    def refuse_bypassed_hooks(self) -> None:
        """Refuse hooks that came after the use of an expansion, and did not see its gradient."""
        for names, hooks in self._bypassed.values():
            if any(hooks):
                raise UnsupportedOpError(
                    f"record: {', '.join(sorted(names))} was expanded over the samples, and a hook put on the expansion after its "
                    "use, which its gradient does not pass. Register the hook before the use."
                )

    def expect_hidden(self, names: frozenset[str]) -> None:
        """Note a use without gradient, such as the first pass of a checkpoint: its parameter cannot finish early."""
        for name in names:
            self._expected[name] = math.inf

    def add(self, source: Source, factor: Factor, uses: Uses) -> None:
        """Take the factor of one use."""
        self.empty = False
        name = next(iter(source.names))
        if not self._consumed.isdisjoint(source.names):
            self._refuse_late(source.names & self._consumed)
        if self.parameters[name].is_complex():
            # the structured quantities are real
            factor = Dense(factor.to_dense())
        if self.consume is None:
            for use in uses:
                use.structure, use.algorithm = factor.structure, factor.algorithm
        expected = self._expected.get(name) if source.edge is None else None
        if self.consume is not None and expected == 1:
            # the only use of a parameter: nothing is kept here
            self._consume(self.consume, name, factor)
            return
        arrived = self._arrived.setdefault(source.key, Arrived(source))
        arrived.factors.append(factor)
        arrived.held.hold(factor)
        if len(arrived.factors) == expected and self.consume is not None:
            del self._arrived[source.key]
            self._consume(self.consume, name, arrived.together())
        elif len(arrived.factors) == expected:
            self._keep(name, arrived)

    def _consume(self, consume: Callable[[str, Factor], None], name: str, factor: Factor) -> None:
        """Hand on the gradient of a parameter whose last use has arrived."""
        self._consumed.add(name)
        consume(name, self._stored(factor))

    def _keep(self, name: str, arrived: Arrived) -> None:
        """Keep the gradient of a parameter whose last use has arrived."""
        factor = arrived.together()
        stored = self._stored(factor)
        if stored is not factor:
            arrived.factors, arrived.held = [stored], Held()
            arrived.held.hold(stored)
            for use in self.uses:
                if use.parameter == name:
                    use.algorithm = "store"

    def _stored(self, factor: Factor) -> Factor:
        """A factor, or the gradients themselves in its place where that is leaner."""
        if self.store is None or self.create_graph or not self.store.worth(factor):
            return factor
        return self.store.kept(factor)

    def _refuse_late(self, late: frozenset[str]) -> None:
        raise SamplewiseError(
            f"{', '.join(sorted(late))}: a gradient arrived after the parameter's last known use was done with, from a use that the "
            "forward pass did not show. Use `samplewise.record`, which keeps all uses to the end."
        )

    def finish(self) -> None:
        """Hand what has not been consumed yet to `consume`."""
        self.refuse_bypassed_hooks()
        if self.consume is not None and self._arrived:
            for name, factor in self.factors().items():
                self.consume(name, factor)
            self._arrived.clear()

    def factors(self) -> dict[str, Factor]:
        """One factor per parameter that the loss reached.

        Raises:
            SamplewiseError: If a tensor that the gradients are made of was changed in place since the backward.
        """
        self.refuse_bypassed_hooks()
        opaque = self._opaque()
        terms: dict[str, list[Factor]] = {}
        for arrived in self._arrived.values():
            source = arrived.source
            one = arrived.together()
            for name in source.names:
                terms.setdefault(name, []).append(
                    one if source.edge is None else self._pulled(source, one, name, linear=source.key not in opaque)
                )
        return {name: add(terms[name]) for name in self.parameters if name in terms}

    def _opaque(self) -> set[object]:
        """The sources behind which a hook, or a function with a backward of its own, may make something else of a sum than a sum.

        Raises:
            UnsupportedOpError: If two sources lie before the same: it would see their gradients one by one.
        """
        before: dict[Any, Source] = {}
        found: set[object] = set()
        for source in [arrived.source for arrived in self._arrived.values()]:
            for node in _behind(source.edge):
                if isinstance(node, BackwardCFunction) or any(self._hooks.get(node, ())):
                    if node in before:
                        names = ", ".join(sorted(source.names & before[node].names))
                        raise UnsupportedOpError(
                            f"record: {names} reaches several uses through a hook or a torch.autograd.Function with its own backward, "
                            "which would see their gradients one by one and not their sum. Use its result once, or compute it with "
                            "ordinary ops."
                        )
                    before[node] = source
                    found.add(source.key)
        return found

    def _pulled(self, source: Source, factor: Factor, name: str, *, linear: bool) -> Factor:
        parameter = self.parameters[name]
        rows = _rows_looked_up(source, factor, parameter) if linear else None
        if rows is not None:
            return rows
        return Pulled(
            factor,
            lambda rows: self._pull(source, rows, parameter),
            source.isometric and linear,
            parameter.shape,
            source.region,
            linear,
        )

    def _pull(self, source: Source, rows: Tensor, parameter: nn.Parameter) -> Tensor:
        """Batched vector-Jacobian product of the derivation, `(m, *source.shape) -> (m, *parameter.shape)`."""
        assert source.edge is not None
        try:
            # under autocast the tensor has another type than the op it was used in
            return _vector_jacobian(source.edge, rows.to(source.dtype), parameter, create_graph=self.create_graph)
        except RuntimeError as error:
            raise UnsupportedOpError(
                f"record: the gradient of a tensor computed from {' and '.join(map(repr, sorted(source.names)))} cannot be taken back to "
                f"them ({error}). Compute it with ordinary ops, and without reentrant checkpointing."
            ) from error


def _rows_looked_up(source: Source, factor: Factor, table: nn.Parameter) -> Factor | None:
    """The gradient of a table whose rows were looked up at places that are the same for all samples, as rows; None for anything else."""
    node: Any = source.edge and source.edge.node
    if type(node).__name__ != "EmbeddingBackward0" or getattr(node.next_functions[0][0], "variable", None) is not table:
        return None
    # no padding is a number beyond all rows
    if node._saved_padding_idx < len(table) or node._saved_scale_grad_by_freq:  # noqa: SLF001
        return None
    try:
        places: Tensor = node._saved_indices  # noqa: SLF001
    except RuntimeError:
        # changed in place since: the pull-back will say so
        return None
    if isinstance(factor, Dense):
        n = factor.n
        index, value = places.flatten().expand(n, places.numel()), factor.grad
    elif isinstance(factor, Diagonal) and factor.in_order and factor.dim < places.ndim:
        n = factor.samples
        index, value = places.movedim(factor.dim, 0).reshape(n, places.numel() // max(1, n)), factor.grad.movedim(factor.dim, 0)
    else:
        return None
    return Rows(index, value.reshape(*index.shape, table.shape[1]), table.shape)


def _vector_jacobian(edge: GradientEdge, rows: Tensor, parameter: nn.Parameter, *, create_graph: bool) -> Tensor:
    if not len(rows):
        return parameter.new_zeros(0, *parameter.shape)

    def pull(grad: Tensor, *, batched: bool) -> Tensor:
        found = torch.autograd.grad(
            [edge],
            [parameter],
            [grad],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            is_grads_batched=batched,
        )[0]
        return parameter.new_zeros(*grad.shape[:batched], *parameter.shape) if found is None else found

    try:
        return pull(rows, batched=True)
    except RuntimeError:
        # an op of the derivation that vmap does not know
        return torch.stack([pull(row, batched=False) for row in rows])
