"""The ops of one call, noted in their order, as a graph that runs them again: what a recording came to, without the recording."""

import itertools
import operator
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves

from .axes import swapped, tensors_in
from .errors import UnsupportedOpError
from .notes import Notes
from .running import Watching
from .straight import compiled
from .trace import Questions, Trace, layout, memory

# Of other arguments than tensors: what is the same in every process and at every time.
_PLAIN = (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_DENSE = frozenset({Tensor, nn.Parameter, nn.Buffer})
_MASKS = frozenset({torch.bool, torch.uint8})
_READ = torch.ops.aten._local_scalar_dense.default  # noqa: SLF001
_INDEX = torch.ops.aten.index.Tensor
# Their running statistics are written to in training, which their schema does not say.
_RUNNING = frozenset(
    getattr(torch.ops.aten, name).default for name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
)
_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class Tracer(Watching):
    """Notes every op that runs, and refuses what would make another call take other steps.

    It keeps no tensor alive but those that were there before. A value *varies* if another call may find another one: that of tensors from
    outside, and of what was made of them or at random. To read such a value is refused, but for a yes or no that is computed from the
    batch alone: that is asked of every batch.
    """

    def __init__(self, given: Sequence[Tensor], known: Sequence[Tensor] = ()) -> None:
        """`known`: tensors that are held elsewhere, so that others in their place would be noticed."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = known
        self._graph = fx.Graph()
        self._nodes: Notes[fx.Node] = Notes()
        # made of Python's numbers, and not used yet
        self._fresh: Notes[bool] = Notes()
        self._last_placeholder: fx.Node | None = None
        self._varying = set[int]()
        self._outside = set[int]()
        self._count = itertools.count()
        # by their placeholders
        self._held: dict[fx.Node, Tensor] = {}
        self._literals = set[fx.Node]()
        # leaves that a backward might give a gradient, with what they had
        self._leaves: list[tuple[Tensor, Tensor | None]] = []
        # the states in which the last random op left the generators of devices, and those of Python and numpy
        self._drawn = {device: _generator(device).get_state() for device in {torch.device("cpu"), *(x.device for x in given)}}
        self._elsewhere = _states_elsewhere()
        # those whose shape an op changed in place
        self._turned = set[fx.Node]()
        self._writes = set[int]()
        # where there are numbers that vary
        self._devices = set[torch.device]()
        self._asked: dict[fx.Node, bool] = {}
        # the memory of nodes, and what an op wrote to
        self._cells: dict[fx.Node, int] = {}
        self._written = set[int]()
        self._given = [self._from_outside(x) for x in given]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an op and note it."""
        # function modes, the recording among them, have seen the call that led here
        with torch._C.DisableTorchFunction():  # noqa: SLF001
            if func is torch.ops.aten.lift_fresh.default:
                self._fresh[args[0]] = True
                return args[0]
            if func.namespace == "profiler":
                return func(*args, **(kwargs or {}))
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if self._is_tensor(func, x)]
        nodes = {id(x): self._node(x) for x in tensors}
        random = torch.Tag.nondeterministic_seeded in func.tags
        varies = random or any(self.varies(x) for x in tensors)
        self._refuse_reading(func, args, tensors)
        if random:
            self._refuse_reset(func, tensors, kwargs)
        node = self._graph.call_function(func, *swapped((args, kwargs), nodes))
        out = func(*args, **kwargs)
        if random:
            self._note_draw(tensors, kwargs)
        self._note(node, out, varies=varies)
        if func._schema.is_mutable or func in _RUNNING:  # noqa: SLF001
            self._note_writes(func, args, kwargs, varies=varies)
        return out

    def result(self, out: Any) -> Trace:
        """What ran, with the tensors in `out` as its results."""
        leaves, spec = tree_flatten(out)
        for x in leaves:
            self._refuse_result(x)
        results = [self._node(x) for x in leaves if isinstance(x, Tensor)]
        self._refuse_gradients()
        self._refuse_moved_generators()
        questions = self._questions()
        self._graph.output(tuple(results))
        self._drop_detached()
        self._graph.eliminate_dead_code(_must_run)
        for node in [node for node in self._held if not node.users]:
            del self._held[node]
            self._graph.erase_node(node)
        literals = frozenset(k for k, node in enumerate(self._held) if node in self._literals)
        rest = {k: x for k, x in enumerate(leaves) if not isinstance(x, Tensor)}
        held, code = list(self._held.values()), _listing(self._graph)
        known = {id(x) for x in self._known}
        loose = [x for x in held if id(x) not in known]
        writes = frozenset(k for k, node in enumerate([*self._given, *self._held]) if self._cells[node] in self._writes)
        devices = frozenset(self._devices.union(x.device for k, x in enumerate(held) if k not in literals))
        layouts = list(map(layout, loose))
        return Trace(compiled(self._graph), code, held, literals, spec, rest, writes, devices, questions, loose, layouts)

    def varies(self, x: Tensor) -> bool:
        """Whether another call may find another value there."""
        if self._nodes.get(x) is None:
            return self._fresh.get(x) is None
        return memory(x) in self._varying

    def read(self, x: Tensor, how: str) -> None:
        """Refuse to read a value that varies."""
        if x.numel() and self.varies(x):
            raise UnsupportedOpError(
                f"traced: {how} reads a value that depends on the batch or the parameters, of shape {tuple(x.shape)}, and a trace would "
                "repeat for every batch what was done for this one. Call the function itself, which records each batch."
            )

    # --- tensors ------------------------------------------------------------------------------------------------------------

    def _is_tensor(self, func: Any, x: object) -> bool:
        if isinstance(x, Tensor):
            if type(x) not in _DENSE or (x.layout != torch.strided and self._nodes.get(x) is None):
                raise UnsupportedOpError(
                    f"traced: {func} takes a {type(x).__name__} of layout {x.layout}, and only plain, dense tensors are traced. Call the "
                    "function itself, which records each batch."
                )
            return True
        if not isinstance(x, _PLAIN):
            raise UnsupportedOpError(
                f"traced: {func} takes a {type(x).__name__}, whose state a trace cannot repeat. Call the function itself, which records "
                "each batch" + (", or draw by torch's default generator." if isinstance(x, torch.Generator) else ".")
            )
        return False

    def _node(self, x: Tensor) -> fx.Node:
        """The node of a tensor, which is from outside if it has none yet."""
        node = self._nodes.get(x)
        if node is None:
            node = self._literal(x) if self._fresh.get(x) else self._hold(x)
        return node

    def _hold(self, x: Tensor) -> fx.Node:
        node = self._from_outside(x)
        self._held[node] = x
        return node

    def _from_outside(self, x: Tensor) -> fx.Node:
        if x.grad_fn is not None:
            raise UnsupportedOpError(
                f"traced: a tensor of shape {tuple(x.shape)} was computed before the call from others that require grad, whose ordinary "
                "gradients a trace would leave out. Detach it, or compute it in the model."
            )
        last = self._last_placeholder
        with self._graph.inserting_after(last) if last is not None else self._graph.inserting_before():
            node = self._last_placeholder = self._graph.placeholder(f"given{next(self._count)}")
        self._nodes[x] = node
        cells = self._cells[node] = memory(x)
        self._varying.add(cells)
        self._outside.add(cells)
        if x.is_leaf and x.requires_grad:
            self._leaves.append((x, x.grad))
        return node

    def _note(self, node: fx.Node, out: Any, *, varies: bool) -> None:
        """Note the results of an op."""
        if isinstance(out, Tensor):
            self._made(node, out, varies=varies)
        elif isinstance(out, tuple | list):
            for k, x in enumerate(out):
                if isinstance(x, Tensor):
                    self._made(self._graph.call_function(operator.getitem, (node, k)), x, varies=varies)

    def _note_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, varies: bool) -> None:
        """Note what an op wrote to."""
        written = [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(func._schema.arguments)  # noqa: SLF001
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if func in _RUNNING and args[5]:
            written = list(args[3:5])
        targets = tensors_in(written)
        cells = set(map(memory, targets))
        self._writes |= cells & self._outside
        self._written |= cells
        if varies:
            self._varying |= cells
            self._devices.update(x.device for x in targets)
        if torch.Tag.inplace_view in func.tags:
            self._turned.update(map(self._node, targets))

    def _made(self, node: fx.Node, x: Tensor, *, varies: bool) -> None:
        if self._nodes.get(x) is None:
            self._nodes[x] = node
        cells = self._cells[node] = memory(x)
        if varies:
            self._varying.add(cells)
            self._devices.update(() if _is_seed(node, x) else (x.device,))
        else:
            # of memory that something else had before
            self._varying.discard(cells)

    def _literal(self, x: Tensor) -> fx.Node:
        """A tensor that was made of Python's numbers: a copy of it in every run. Until it is used, Python may write to it."""
        kept = self._hold(x.clone())
        self._literals.add(kept)
        node = self._graph.call_function(torch.ops.aten.clone.default, (kept,))
        self._made(node, x, varies=False)
        return node

    # --- what another call might do otherwise -------------------------------------------------------------------------------

    def _refuse_reading(self, func: Any, args: tuple[Any, ...], tensors: Sequence[Tensor]) -> None:
        """Refuse values that become Python's numbers, and shapes that depend on values."""
        if func is _READ and tensors[0].dtype is torch.bool and self._ask(tensors[0]):
            read: Sequence[Tensor] = []
        elif torch.Tag.data_dependent_output in func.tags or func is torch.ops.aten.is_nonzero.default:
            read = tensors
        elif func is _INDEX:
            read = [x for x in args[1] if x is not None and x.dtype in _MASKS]
        else:
            read = tensors if torch.Tag.dynamic_output_shape in func.tags else []
        for x in read:
            self.read(x, str(func))

    def _ask(self, x: Tensor) -> bool:
        """Whether a yes or no comes of the batch alone; it is to be asked again then."""
        node = self._node(x)
        made_of = _behind(node)
        known = {*self._given, *self._literals}
        alone = all(other in known if other.op == "placeholder" else not _must_run(other) for other in made_of)
        if not alone or not self._written.isdisjoint(self._cells[other] for other in made_of if other in self._cells):
            return False
        if self.varies(x):
            self._asked[node] = bool(x)
        return True

    def _questions(self) -> Questions:
        asked = [self._question(node) for node in self._asked]
        return Questions([ask for ask, _ in asked], [held for _, held in asked], tuple(self._asked.values()))

    def _question(self, asked: fx.Node) -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
        needed, graph, copies = _behind(asked), fx.Graph(), dict[fx.Node, fx.Node]()
        held = [node for node in self._held if node in needed]
        for node in [*self._given, *held, *(node for node in self._graph.nodes if node in needed)]:
            if node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[asked])
        return compiled(graph), [self._held[node] for node in held]

    def _refuse_reset(self, func: Any, tensors: Sequence[Tensor], kwargs: dict[str, Any]) -> None:
        """Refuse numbers that are drawn for a second time, as where a checkpoint draws its dropout again."""
        self._refuse_moved(_device_of(tensors, kwargs.get("device")), f"{func} draws random numbers after")

    def _refuse_moved(self, device: torch.device, what: str) -> None:
        before = self._drawn.get(device)
        if before is not None and not torch.equal(before, _generator(device).get_state()):
            raise UnsupportedOpError(
                f"traced: {what} the generator was set (by `manual_seed`, `fork_rng`, or a checkpoint that draws its dropout again), which "
                "a trace would leave out. Call the function itself, which records each batch."
            )

    def _refuse_moved_generators(self) -> None:
        """Refuse random numbers that no op drew."""
        for device in self._drawn:
            self._refuse_moved(device, "the call ended after")
        if _states_elsewhere() != self._elsewhere:
            raise UnsupportedOpError(
                "traced: random numbers of Python's or numpy's were drawn, which a trace would not draw again. Draw them by torch's "
                "default generator, or call the function itself, which records each batch."
            )

    def _refuse_result(self, x: object) -> None:
        """Refuse what a trace cannot give: a graph, or an object that it cannot see into."""
        if isinstance(x, Tensor) and x.grad_fn is not None:
            raise UnsupportedOpError(
                f"traced: a result of shape {tuple(x.shape)} has a graph, which a trace does not build. Detach it, or call the function "
                "itself, which records each batch."
            )
        if not isinstance(x, (Tensor, *_PLAIN)):
            raise UnsupportedOpError(
                f"traced: the results hold a {type(x).__name__}, which a trace cannot see into. Give tensors and numbers, in tuples, lists "
                "and dictionaries."
            )

    def _note_draw(self, tensors: Sequence[Tensor], kwargs: dict[str, Any]) -> None:
        device = _device_of(tensors, kwargs.get("device"))
        self._drawn[device] = _generator(device).get_state()

    def _refuse_gradients(self) -> None:
        """Refuse gradients that the backward accumulated beside the rows: the next one may be in other memory, or in none yet."""
        held = {id(x) for x in self._held.values()} - {id(x) for x in self._known}
        others = [(x, x.grad) for x in self._known if x.is_leaf]
        for x, grad in self._leaves + others:
            if x.grad is not grad or id(grad) in held:
                raise UnsupportedOpError(
                    f"traced: the call accumulates or reads the `.grad` of a tensor of shape {tuple(x.shape)}, which may be another one "
                    "at the next. If it is no parameter of the model, let it require no grad; or call the function itself, which records "
                    "each batch."
                )

    def _drop_detached(self) -> None:
        """Without autograd a detached tensor is the tensor."""
        for node in [node for node in self._graph.nodes if node.target in _SAME]:
            shown = any(user.op == "output" for user in node.users)
            if not shown and self._turned.isdisjoint((node, node.args[0])):
                node.replace_all_uses_with(node.args[0])
                self._graph.erase_node(node)


class Reading(TorchFunctionMode):
    """Tells a tracer of values that leave torch without an op."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a call."""
        name = getattr(func, "__name__", "")
        for x in _read_by(name, args):
            self._tracer.read(x, name)
        if name in _ASIDE or (name == "__set__" and func.__self__.__name__ in _NOT_SET):
            what = f".{func.__self__.__name__} = ..." if name == "__set__" else name
            raise UnsupportedOpError(
                f"traced: `{what}` takes a tensor of shape {tuple(args[0].shape)} where no op is, and a trace would leave out what comes "
                "of it. Use torch's ops (`copy_`), or call the function itself, which records each batch."
            )
        return func(*args, **(kwargs or {}))


def _read_by(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    """Tensors whose values a call reads where no op runs."""
    if name in _NUMBERS:
        return tensors_in(args[:1])
    if name in _FROM_NUMBERS:
        return tensors_in([x for x in args if not isinstance(x, Tensor)])
    if name in {"__getitem__", "__setitem__"} and isinstance(args[1], list | tuple):
        inner = args[1] if isinstance(args[1], tuple) else [args[1]]
        return tensors_in([x for x in inner if isinstance(x, list | tuple)])
    return tensors_in(args[1:2]) if name == "tensor_split" else []


# Functions that make numbers of Python's of a tensor; that make a tensor of numbers; that hand its memory on.
_NUMBERS = frozenset({"tolist", "__index__", "__int__", "__float__", "__complex__"})
_FROM_NUMBERS = frozenset({"tensor", "as_tensor", "asarray", "new_tensor", "new"})
_ASIDE = frozenset({"numpy", "__array__", "__dlpack__", "apply_", "map_", "map2_"})
_NOT_SET = frozenset({"data", "grad"})


def _listing(graph: fx.Graph) -> str:
    """The steps of a graph, the same for graphs that are the same."""
    numbers = {node: k for k, node in enumerate(graph.nodes)}

    def named(value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: f"%{numbers[node]}")

    return "\n".join(f"%{k} = {node.target}({named(node.args)}, {named(node.kwargs)})" for node, k in numbers.items())


def _states_elsewhere() -> list[object]:
    """The states of Python's generator, and of numpy's where it is loaded."""
    numpy = sys.modules.get("numpy")
    kind, keys, *rest = numpy.random.get_state() if numpy is not None else (None, b"")
    return [random.getstate(), kind, bytes(keys), rest]


def _is_seed(node: fx.Node, x: Tensor) -> bool:
    """Whether an attention says how its dropout was drawn: on the CPU if it is launched, on the device in a graph."""
    source = node.args[0] if node.target is operator.getitem else node
    return x.ndim == 0 and "attention" in str(getattr(source, "target", ""))


def _behind(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is made of."""
    found, ahead = set[fx.Node](), [node]
    while ahead:
        if (one := ahead.pop()) not in found:
            found.add(one)
            ahead += one.all_input_nodes
    return found


def _must_run(node: fx.Node) -> bool:
    """Whether an op does more than give its result."""
    if node.op != "call_function":
        return True
    tags = getattr(node.target, "tags", ())
    schema = getattr(node.target, "_schema", None)
    checks = schema is not None and (schema.is_mutable or not schema.returns)
    return checks or torch.Tag.nondeterministic_seeded in tags or node.target in _RUNNING


def _device_of(tensors: Sequence[Tensor], given: Any) -> torch.device:
    return tensors[0].device if tensors else torch.device(given or torch.get_default_device())


def _generator(device: torch.device) -> torch.Generator:
    """The default generator of a device."""
    if device.type == "cpu":
        return torch.default_generator
    generator: torch.Generator = torch.get_device_module(device).default_generators[device.index or 0]
    return generator
