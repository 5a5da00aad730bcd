"""The mode under which a model runs: it follows what depends on the samples and finds the ops where parameters meet them.

How the sample axis moves stands in `sample_axis`, what happens at a meeting in `mixing`, and what the gradients are in `rules`.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .attaching import (
    OF_CLASSES,
    Entrance,
    children_of,
    common_size,
    held_tensors,
    is_packed,
    reached,
    refuse_elsewhere,
    refuse_hooks,
    refuse_hooks_on_nodes,
    refuse_loss,
    refuse_new_parameters,
    refuse_unrecordable,
    refuse_unseen,
    trainable,
)
from .axes import Axis, Call, Lost, argument, tensors_in
from .buffers import keep_freed_memory
from .by_rule import as_before
from .collecting import Collector, Shared, of_parameter
from .entering import settle
from .errors import MixedSamplesError, SampleAxisError, SamplewiseError, UnsupportedOpError, of_type, one_of
from .factors import Factor
from .known import DECLARED_CONSTANT, Known
from .mixing import mix
from .ownership import written
from .registry import EXPANSIONS, Operation, operation
from .remembered import CONSTANT, key_of, recall, remember
from .running import accumulates, hide_from_compiler, in_backward, in_transform, modes, run_backward, unrecorded, unwrapped
from .sample_axis import EXPANDS, MOVES, TURNS, follow, refuse_mixing
from .strategy import Strategy, prepare, using
from .sums import Store
from .taps import Factors, Grads, unseen_leaves


class Recording(Known, TorchFunctionMode):
    """Records one batch of one model. The public face is `samplewise.record`."""

    # whether the mode is to see every backward that collects, and what it begins from
    sees_backwards = True

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_size: int | None = None,
        batch_dim: int = 0,
        loss_reduction: str = "sum",
        fallback: str = "allow",
        create_graph: bool = False,
        consume: Callable[[str, Factor], None] | None = None,
        strategy: Strategy | None = None,
        store: Store | None = None,
    ) -> None:
        TorchFunctionMode.__init__(self)
        if torch.is_inference_mode_enabled():
            raise SamplewiseError(
                "record: inference mode is on, and what is computed in it has no gradients. Leave `torch.inference_mode()` first."
            )
        one_of("fallback", fallback, "allow", "error")
        one_of("loss_reduction", loss_reduction, "sum", "mean")
        Known.__init__(self, batch_size, batch_dim)
        self.model, self.loss_reduction, self.fallback, self.create_graph = model, loss_reduction, fallback, create_graph
        of_type("record", model, "a model", nn.Module)
        # by name, and which are parts of which
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._children = children_of(self._modules.values())
        self.parameters = trainable(model, self._modules)
        self.strategy = strategy or Strategy()
        self.collector = Collector(self.parameters, consume, create_graph=create_graph, store=store)
        self._anchor_node = get_gradient_edge(self.anchor).node
        self._handles: list[Any] = []
        # with the backward they run in: a checkpoint starts one inside another
        self._sources: list[tuple[Callable[..., Any], int]] = []
        self._open = False
        # what ran before the batch size was known
        self._earlier: list[tuple[Operation, tuple[Any, ...], dict[str, Any], Any]] = []
        # a derivative with a graph was taken through a use of a parameter, other than by `backward(losses)`
        self._differentiated = False
        # a backward has begun from losses that depend on the samples (it may reach no parameter); one has ended with an error
        self.begun = self.failed = False
        # inside `backward(losses)`, where no reduction has to be undone
        self._from_losses = False

    # --- life ---------------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Attach to the model: a pre-hook that finds the samples."""
        if any(isinstance(mode, Recording) for mode in modes()):
            raise SamplewiseError(
                "record: another recording is active here, and recordings do not nest. Close the outer one first."
            )
        hide_from_compiler()
        refuse_unrecordable(self._modules, self.parameters)
        self._names_of = {id(p): name for name, p in self.parameters.items()}
        for parameter in itertools.islice(self.parameters.values(), 1):
            keep_freed_memory(parameter.device.type)
            prepare(parameter)
        for tensor in held_tensors(self._modules.values()):
            self.declare(tensor, CONSTANT)
        for name, parameter in self.parameters.items():
            refuse_hooks(name, parameter)
            kind, self.sources[id(parameter)] = of_parameter(name, parameter)
            self.declare(parameter, kind)
        self._watch()
        self._handles.append(self.model.register_forward_pre_hook(Entrance(self._enter_model), with_kwargs=True, prepend=True))
        self._open = True

    def close(self) -> None:
        """Detach from the model; nothing stays on its tensors or modules."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._earlier.clear()
        self._open = False

    def _enter_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The samples enter: the tensors passed to the model's forward."""
        if self not in modes():
            # the model runs in another thread
            return
        if not self.collector.empty and not in_backward():
            raise MixedSamplesError(
                f"{type(self.model).__name__}: this recording already holds the gradients of a batch, and rows of two batches "
                "are never added. Open a new recording for each batch, or run all forwards before the backward."
            )
        with unrecorded():
            self._take_samples(args, kwargs)

    def _take_samples(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note where the samples are in the arguments of the model's forward, and in what was made before it."""
        tensors_alone = not kwargs and all(type(x) is Tensor for x in args)
        given = args if tensors_alone else tree_leaves((args, kwargs), is_leaf=is_packed)
        inputs, packed = [x for x in given if isinstance(x, Tensor)], [x for x in given if is_packed(x)]
        earlier, self._earlier = self._earlier, []
        if self.n is None:
            self.n = common_size(self.model, inputs, packed, self.batch_dim)
        for sequence in packed:
            self._enter_packed(sequence)
        for x in inputs:
            place = self.by_shape(x)
            if place is not None and (self._kinds.get(x) or CONSTANT) == CONSTANT:
                self.declare(x, place)
        for before in earlier:
            self._follow_later(*before)

    def _follow_later(self, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Mark the results of an op that ran when the batch size was not known yet."""
        call = Call(op.name, args, kwargs, self.n or 0, self.where)
        call.known = {id(x): self.where(x) for x in call.tensors}
        try:
            self._mark(op, call, out, [], op.target(args))
        except SampleAxisError:
            for x in tensors_in(out):
                self.declare(x, Lost(op.name))

    def _watch(self) -> None:
        """Look out for uses of parameters that the recording does not see: here, in the graph of every loss."""

    # --- forward ------------------------------------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one call: composites through their source, everything else with its sample axis followed."""
        kwargs, op = kwargs or {}, operation(func)
        if op.plain_property:
            return self._gradient_of(args[0], func(*args, **kwargs)) if op.name == "grad" else func(*args, **kwargs)
        if kwargs and not args:
            args, kwargs = op.in_order(args, kwargs)
        if in_transform():
            self._refuse_transform(op, args, kwargs)
            return func(*args, **kwargs)
        out = as_before(self, func, op, args, kwargs)
        if out is not NotImplemented:
            return out
        inner = EXPANSIONS.get(op.name, op.source)
        # a function that comes back to itself checks for overrides in a way of its own: it runs as one op
        if inner is not None and not op.inplace and (func, torch._C._current_graph_task_id()) not in self._sources:  # noqa: SLF001
            if func in _DERIVATIVES:
                self._check_derivative(func, args, kwargs)
            with self:
                out = self._through(func, inner, args, kwargs)
            if func is torch.autograd.backward and self.collector.empty and not in_backward():
                # of another model it is no backward of this one
                self.begun = self.begun and not self.leaves_elsewhere(argument(args, kwargs, 0, "tensors"))
            if func is torch.autograd.grad:
                ys, xs, vs = (argument(args, kwargs, k, name, None) for k, name in enumerate(_OF_GRAD))
                self.note_gradients(ys, xs, vs, out)
            if out is not NotImplemented:
                return out
        return self._run(func, op, args, kwargs)

    def _check_derivative(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse derivatives that would not be what they are without a recording, before they are taken."""
        if func is torch.autograd.grad:
            self._refuse_ordinary(argument(args, kwargs, 0, "outputs"), argument(args, kwargs, 1, "inputs"))
            return
        losses = argument(args, kwargs, 0, "tensors")
        if not in_backward():
            self._check_losses(losses)
        self._look_for_unseen(losses)
        self._refuse_ordinary(losses, kwargs.get("inputs"))
        if not in_backward():
            self.begun = self.begun or any(self.where(x) is not None for x in tensors_in((losses,)))

    def _refuse_transform(self, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        touched = [
            kind for x in tensors_in((args, kwargs)) if (kind := self.kind(unwrapped(x))) not in {CONSTANT, DECLARED_CONSTANT}
        ]
        if touched and (self.n or 0) > 1:
            raise UnsupportedOpError(
                f"{op.name}: runs inside a transform of torch.func (vmap, grad, ...) on samples or parameters, where the recording cannot "
                "follow the samples. Write the function for the whole batch."
            )

    def _through(
        self, func: Callable[..., Any], inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a function through its source, with the mode on."""
        self._sources += [(source, torch._C._current_graph_task_id()) for source in (func, inner)]  # noqa: SLF001
        try:
            return inner(*args, **kwargs)
        except BaseException:
            if func is (torch.autograd.grad if self.create_graph and self._from_losses else torch.autograd.backward):
                # what has arrived is a part; if nothing has, another backward may begin
                self.failed, self.begun = self.failed or not self.collector.empty, not self.collector.empty
            raise
        finally:
            del self._sources[-2:]

    def _run(self, func: Callable[..., Any], op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One op that reaches C++."""
        if op.name in OF_CLASSES:
            self.assume_constant(argument(args, kwargs, *OF_CLASSES[op.name], None))
        key = None if self.n is None else key_of(op, self.n, args, kwargs, self.kind)
        out = self._like_before(func, args, kwargs, key)
        if out is not NotImplemented:
            return out
        written_to = op.target(args)
        target = written_to if isinstance(written_to, Tensor) else None
        call, kinds = self.before(op, args, kwargs, target)
        refuse_mixing(call)
        shared = [x for x, kind in zip(call.tensors, kinds, strict=True) if isinstance(kind, Shared)]
        meeting = bool(shared) and any(isinstance(kind, Axis | Lost) for kind in kinds)
        outside = self.n is None and any(self._kinds.get(x) is None and not isinstance(x, nn.Parameter) for x in call.tensors)
        if outside and shared:
            raise SampleAxisError(
                f"{op.name}: a part of the model with {' and '.join(sorted(self._names(shared)))} runs before the model itself, so the "
                "number of samples is not known yet. Give `batch_size` to `record`."
            )
        if meeting and torch.is_grad_enabled():
            out = mix(self, func, op, call, shared)
        else:
            out = func(*args, **kwargs)
            if shared and not torch.is_grad_enabled():
                self.collector.expect_hidden(self._names(shared))
                settle(call, shared)
        if outside and op.name not in TURNS:
            self._earlier.append((op, args, kwargs, out))
        if not outside and not call.settled:
            self._mark(op, call, out, shared, target)
            if (
                key is not None
                and "out" not in kwargs
                and not op.others_written(args, kwargs)
                # of a target that is what it was nothing has to be said
                and (not op.inplace or (target is not None and call.known[id(target)] == self.where(target)))
            ):
                remember(key, [self.kind(x) for x in call.results])
        return out

    def _like_before(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], key: Hashable | None
    ) -> Any:
        """Run a call that is like an earlier one, of which everything is known; NotImplemented for any other."""
        known = recall(key)
        if known is None:
            return NotImplemented
        out = func(*args, **kwargs)
        for x, kind in zip([out] if isinstance(out, Tensor) else tensors_in(out), known, strict=True):
            # an operand given back as it is keeps what was said of it
            if self._kinds.get(x) is None:
                self.declare(x, kind)  # type: ignore[arg-type]
        return out

    def _mark(self, op: Operation, call: Call, out: Any, shared: list[Tensor], target: Tensor | None) -> None:
        """Note what the results, or the targets of an in-place op, are now."""
        others = op.others_written(call.args, call.kwargs)
        written_to = op.inplace or bool(others) or call.kwargs.get("out") is not None
        call.results = tensors_in(out)
        if target is not None:
            results = [target, *tensors_in(others)]
        elif written_to:
            results = tensors_in((call.args[:1] if op.inplace else (), others, out))
        else:
            # what is known already: an operand given back as it is, or a tapped result
            results = [x for x in call.results if self._kinds.get(x) is None]
        for tensor in results:
            if op.name == "set" and self._is_set(call, tensor):
                continue
            where = written(call) if op.name == "setitem" else follow(call, tensor)
            kind = where or (self._derived(op, shared, tensor) if tensor.requires_grad and shared else CONSTANT)
            if written_to and op.name not in TURNS:
                self.overwrite(tensor, kind, mixed=isinstance(kind, Lost) and len(call.tensors) > 1, base=call.base)
            else:
                self.declare(tensor, kind)

    def _is_set(self, call: Call, tensor: Tensor) -> bool:
        """Note what a tensor is that was given other memory, if that is known of the memory."""
        source = call.args[1] if len(call.args) > 1 else None
        if id(tensor) in self.sources or tensor.grad_fn is not None:
            return False
        if isinstance(source, Tensor):
            kind: object = call.known.get(id(source))
        else:
            kind = self.of_memory(tensor) or self.by_shape(tensor)
        if isinstance(kind, Axis | Lost):
            self.declare(tensor, kind)
        return isinstance(kind, Axis | Lost)

    def _derived(self, op: Operation, shared: list[Tensor], tensor: Tensor) -> Shared:
        """The kind of a tensor computed from shared and constant ones."""
        (first, *others), names = [self.kind(x) for x in shared], self._names(shared)
        assert isinstance(first, Shared)
        alone, origin = not others and not op.inplace, shared[0]
        unexpanded = (origin, origin._version) if alone and op.name in EXPANDS else None  # noqa: SLF001
        # of a complex gradient a real parameter takes a part
        moved = op.name in MOVES and tensor.is_complex() == origin.is_complex()
        for x in shared:
            self.collector.note_hooks(x)
        return Shared(names, alone and first.isometric and moved, unexpanded, tensor._version)  # noqa: SLF001

    # --- backward -----------------------------------------------------------------------------------------------------------

    def belongs(self) -> bool:
        """Whether the backward now running is one that would fill the parameters' gradients."""
        return self._from_losses if self.create_graph else accumulates(self._anchor_node)

    def backward(self, losses: Tensor, *, retain_graph: bool = False) -> None:
        """Run the backward pass from a vector of losses, one per sample."""
        self._from_losses = True
        try:
            # in another thread than the forward's, the mode is not on
            with nullcontext() if self in modes() else self:
                if self.create_graph:
                    self._refuse_unseen(losses)
                    self.begun = True
                    torch.autograd.grad(losses, self.anchor, torch.ones_like(losses), create_graph=True, allow_unused=True)
                else:
                    with unrecorded():
                        self._check_derivative(torch.autograd.backward, (losses,), {})
                        ones = torch.ones_like(losses)
                    self.begun = True
                    self._through(torch.autograd.backward, run_backward, (losses, ones), {"retain_graph": retain_graph})
                with unrecorded():
                    others = self.leaves_elsewhere(losses) if self.collector.empty else []
                if others:
                    self.begun = False
                    refuse_elsewhere(others)
        finally:
            self._from_losses = False

    def _refuse_ordinary(self, outputs: Any, inputs: Any) -> None:
        """Refuse a derivative of samples by parameters: the ops in between ran on detached parameters, so it would be zero."""
        wanted = [x for x in tensors_in((inputs,)) if isinstance(self.kind(x), Shared)]
        of_samples = any(self.where(x) for x in tensors_in((outputs,)))
        if wanted and of_samples and not (self.create_graph and not self.collector.empty):
            raise UnsupportedOpError(
                f"autograd.grad: a derivative by {' and '.join(map(repr, sorted(self._names(wanted))))} is taken inside the recording, of "
                "something that depends on the samples. A recording has no ordinary gradients: take it outside, or ask for it after "
                "`rec.backward` of a recording with create_graph=True."
            )

    def _look_for_unseen(self, losses: Tensor | Sequence[Tensor]) -> None:
        """Before every backward seen, also of a recomputation; a derivative of what was collected may go anywhere."""
        if not self.create_graph:
            self._refuse_unseen(losses)

    def _refuse_unseen(self, losses: Tensor | Sequence[Tensor]) -> None:
        """Refuse a graph in which an ordinary gradient would reach a parameter."""
        if self._differentiated:
            raise UnsupportedOpError(
                "backward: a derivative with create_graph=True was taken inside the recording, and how it depends on the parameters was "
                "not seen: under autocast, through a rule without `back`, or after a `rec.backward`. Take it without autocast before the "
                "first `rec.backward`, or use a loop over samples."
            )
        alike = self._children == children_of(self._modules.values())
        if alike and not in_backward() and not reached(self.parameters.values()):
            return
        for loss in [losses] if isinstance(losses, Tensor) else losses:
            leaves = unseen_leaves(loss)
            refuse_unseen(leaves, self._names_of)
            if any(isinstance(leaf, nn.Parameter) for leaf in leaves):
                # of a module that was added in the meantime, perhaps
                refuse_new_parameters(self.model, self.model.modules(), self._names_of)

    def aside(self) -> AbstractContextManager[None]:
        """Our own arithmetic by this recording's strategy, with a graph if its results are to be differentiated again."""
        return using(self.strategy, graph=self.create_graph)

    def collected(self) -> dict[str, Factor]:
        """One factor per parameter that the loss reached."""
        with self.aside():
            return self.collector.factors()

    def awaits(self, grads: Grads) -> bool:
        """Whether gradients that reach a tap are to be collected."""
        if (grads[0] is None and all(grad is None for grad in grads)) or not self.belongs():
            return False
        if not self._open:
            raise SamplewiseError(
                "backward: it runs through a recording that is closed, so its per-sample gradients would be lost. Call "
                "`rec.backward(losses)` inside the `with record(...)` block."
            )
        if self.sees_backwards and not any(func in _DERIVATIVES for func, _ in self._sources):
            raise SamplewiseError(
                "backward: it was begun where the recording does not see it, in another thread perhaps, so nothing is known of its loss. "
                "Call `rec.backward(losses)`, which may be called in any thread."
            )
        return True

    def follows(self, *, possible: bool) -> bool:
        """Whether an op's own backward is to run as recorded ops now: a derivative is taken that may enter the losses.

        Where that is not possible, or what is differentiated may be made of gradients, its result must not enter them.
        """
        if self.belongs() or not torch.is_grad_enabled():
            return False
        followed = possible and self in modes() and self.collector.empty
        self._differentiated = self._differentiated or not followed
        return followed

    def collect(self, factors: Factors, grads: Grads, saved: Sequence[Tensor]) -> None:
        """Take the factors that a tap makes of gradients that are awaited; inside `aside`."""
        if self.loss_reduction == "mean" and not self._from_losses:
            grads = [None if grad is None else grad * (self.n or 0) for grad in grads]
        # detached: factors that are kept must not keep the graph, which holds the recording
        for source, uses, factor in factors(grads, saved if self.create_graph else [x.detach() for x in saved]):
            self.collector.add(source, factor, uses)

    def _check_create_graph(self) -> None:
        """Only `rec.backward` collects; afterwards, what was made of the gradients may be differentiated as ever."""
        if self.collector.empty:
            raise UnsupportedOpError(
                "backward: a recording with create_graph=True collects per-sample gradients by `rec.backward(losses)` only."
            )

    def refuse_new_parameters(self) -> None:
        """Refuse what became trainable after the recording began, whose gradient would be missing."""
        refuse_new_parameters(self.model, self._modules.values(), self._names_of)
        refuse_hooks_on_nodes(self.parameters)
        for name, parameter in self.parameters.items():
            refuse_hooks(name, parameter)

    def _check_losses(self, tensors: Tensor | Sequence[Tensor]) -> None:
        if self.create_graph:
            self._check_create_graph()
            return
        self.refuse_new_parameters()
        for loss in [tensors] if isinstance(tensors, Tensor) else tensors:
            refuse_loss(self.kind(loss), self.loss_reduction)


_DERIVATIVES = (torch.autograd.backward, torch.autograd.grad)
# the arguments of the latter that say what it is of
_OF_GRAD = ("outputs", "inputs", "grad_outputs")
