"""What a recording looks at in a model: what it holds, what forbids to record it, where the samples enter, and what comes out as a loss."""

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils.rnn import PackedSequence

from .axes import HOST, Lost, tensors_in
from .collecting import Shared, hooks_by
from .errors import MixedSamplesError, SampleAxisError, SamplewiseError, UnsupportedOpError
from .running import listed

UNSEEN = (
    "an ordinary gradient reached this parameter, from a use that the recording did not see: a torch.autograd.Function, a scripted or "
    "compiled module, a derivative taken through a checkpoint or saved-tensor hooks, or a tensor computed before the recording began. "
    "Compute it inside the recording from ordinary ops, or give the op a rule with `samplewise.rule`."
)


def trainable(model: nn.Module, modules: Mapping[str, nn.Module] | None = None) -> dict[str, nn.Parameter]:
    """The parameters that a recording is about, by name; `modules` are those of the model, if they are known."""
    if modules is None or type(model).named_parameters is not nn.Module.named_parameters:
        return {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, p in _parameters_of(modules):
        # one that several modules have goes by its first name
        found.setdefault(id(p), (name, p))
    return dict(found.values())


def held_tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Buffers, and other tensors that modules hold: masks, tables, position ids."""
    for module in modules:
        yield from (x for x in module._buffers.values() if x is not None)  # noqa: SLF001
        own = vars(module)
        for key in own.keys() - _OF_EVERY_MODULE:
            value = own[key]
            # most are numbers, or tuples of numbers such as a kernel's size
            if type(value) in _PLAIN or not isinstance(value, _HOLDERS):
                continue
            if not isinstance(value, tuple) or not _PLAIN.issuperset(map(type, value)):
                yield from tensors_in(value)


_HOLDERS = (Tensor, tuple, list, dict)
_PLAIN = frozenset({int, float, bool, str, type(None)})
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def refuse_unrecordable(modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]) -> None:
    """Modules that the recording cannot see into, and trainable parameters that do not exist yet or not here."""
    special = {
        name or "the model": module
        for name, module in modules.items()
        if _has_class(module, *_SPECIAL) or getattr(module, "_compiled_call_impl", None) is not None
    }
    if special:
        _refuse_opaque(special)
    parts = [name for name, p in parameters.items() if _has_class(p, "DTensor") or getattr(p, "_fsdp_flattened", False)]
    _refuse_sharded(parts or [name for name, module in special.items() if _has_class(module, *_SHARDED)])
    empty = [name for name, p in parameters.items() if p.is_meta]
    if empty:
        raise UnsupportedOpError(
            f"record: {', '.join(empty)} is on the meta device and has no numbers. Give the model memory first, "
            "`model.to_empty(device=...)`, and load its weights or initialize them."
        )


_COMPILED, _SHARDED = ("OptimizedModule",), ("FSDPModule", "FullyShardedDataParallel")
_SPECIAL = (*_COMPILED, *_SHARDED, "LazyModuleMixin", "ScriptModule")


def _refuse_opaque(modules: Mapping[str, nn.Module]) -> None:
    """Those that are compiled, scripted, or without shapes yet."""
    compiled = [
        name
        for name, module in modules.items()
        if _has_class(module, *_COMPILED) or getattr(module, "_compiled_call_impl", None) is not None
    ]
    if compiled:
        raise UnsupportedOpError(
            f"record: {', '.join(compiled)} is compiled by torch.compile, and the recording cannot see into it. Record the module that "
            "was compiled (its `_orig_mod`), which shares its parameters; after `module.compile()`, a copy made before it."
        )
    lazy = [name for name, module in modules.items() if isinstance(module, nn.modules.lazy.LazyModuleMixin)]
    if any(nn.parameter.is_lazy(p) for name in lazy for p in modules[name].parameters()):
        raise UnsupportedOpError(
            f"record: {', '.join(lazy)} is lazy, and its parameters have no shape yet. Run the model once before the recording."
        )
    if isinstance(modules.get("the model"), torch.jit.ScriptModule):
        raise UnsupportedOpError(
            "record: the model is a scripted module, and the recording cannot see into it. Record the module that was scripted."
        )


def _refuse_sharded(names: Sequence[str]) -> None:
    """Parameters that are put together from the parts of several processes, and swapped for others while the model runs."""
    if names:
        raise UnsupportedOpError(
            f"record: {', '.join(names)} is sharded or distributed over processes (FSDP or a DTensor), and the forward runs on "
            "tensors that are put together from it. Record the model as it is before that, whole in each process; under "
            "DistributedDataParallel it may stay."
        )


def _parameters_of(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in modules.items():
        for key, p in module._parameters.items():  # noqa: SLF001
            if p is not None and p.requires_grad:
                yield f"{name}.{key}" if name else key, p


def _has_class(value: object, *names: str) -> bool:
    """Whether it is of a class that goes by one of these names, whose module is not imported for that."""
    kind: Any = type(value)
    return _comes_from(kind, names)


@functools.lru_cache(maxsize=1024)
def _comes_from(kind: type, names: tuple[str, ...]) -> bool:
    return any(base.__name__ in names for base in kind.__mro__)


def refuse_hooks(name: str, parameter: nn.Parameter) -> None:
    """A hook would change or take an ordinary gradient, which does not exist here."""
    if parameter._post_accumulate_grad_hooks:  # noqa: SLF001
        raise UnsupportedOpError(
            f"{name}: has a hook that runs when its gradient is accumulated (of an optimizer that steps in the backward, perhaps), and no "
            "gradient is accumulated here. Remove it for the recording, and do with the results what it does."
        )
    hooks = parameter._backward_hooks  # noqa: SLF001
    if hooks and any(not (getattr(hook, "__module__", None) or "").startswith(f"{__package__}.") for hook in hooks.values()):
        raise UnsupportedOpError(
            f"{name}: has a hook on its gradient, which per-sample gradients would not pass through. Remove it for the recording, and "
            "apply to the results what it does."
        )


def refuse_hooks_on_nodes(parameters: Mapping[str, nn.Parameter]) -> None:
    """The same on the nodes where gradients of parameters are accumulated."""
    found = [name for name, p in parameters.items() if p.is_leaf and p.requires_grad and any(_hooks_where_accumulated(p))]
    if found:
        raise UnsupportedOpError(
            f"{', '.join(found)}: has a hook on the node that accumulates its gradient, which no gradient reaches here. Remove it for the "
            "recording, and do with the results what it does."
        )


def _hooks_where_accumulated(parameter: nn.Parameter) -> Iterator[Mapping[int, Any] | None]:
    """The hooks on the node that accumulates a parameter's gradient."""
    if parameter._use_count() == 1:  # type: ignore[attr-defined]  # noqa: SLF001
        # the node would hold the parameter too, so there is none
        return iter(())
    node = get_gradient_edge(parameter).node
    return (hooks_by(register) for register in (node.register_hook, node.register_prehook))


def refuse_new_parameters(model: nn.Module, modules: Iterable[nn.Module], known: Container[int]) -> None:
    """Refuse what became trainable after the recording began, whose gradient would be missing; `known` are ids."""
    held = [p for module in modules for p in module._parameters.values()]  # noqa: SLF001
    if any(p is not None and id(p) not in known and p.requires_grad for p in held):
        new = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
        raise UnsupportedOpError(
            f"backward: {', '.join(new)} was unfrozen, added or replaced inside the recording, which did not see its uses before. Do "
            "so before `record`."
        )


def children_of(modules: Iterable[nn.Module]) -> list[int]:
    """The modules that some have as their parts, by id."""
    return [id(child) for module in modules for child in module._modules.values()]  # noqa: SLF001


def reached(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a graph may lead to one of these: the node that accumulates its gradient would hold it too."""
    return any(p._use_count() > 1 or not p.is_leaf for p in parameters)  # type: ignore[attr-defined]  # noqa: SLF001


def refuse_unseen(leaves: Iterable[Tensor], names: Mapping[int, str]) -> None:
    """Refuse a graph in which an ordinary gradient would reach a parameter; `names` are by id."""
    found = sorted(names[id(leaf)] for leaf in leaves if id(leaf) in names)
    if found:
        raise UnsupportedOpError(f"{', '.join(found)}: {UNSEEN}")


def refuse_elsewhere(leaves: Iterable[Tensor]) -> None:
    """Refuse losses that reached these leaves and no parameter of the model: such are of another model."""
    shapes = sorted({tuple(leaf.shape) for leaf in leaves})
    raise SamplewiseError(
        "backward: the losses reach no trainable parameter of the recorded model, but tensors that require grad and are no part of "
        f"it, of shapes {', '.join(map(str, shapes))}. All gradients would be zero. Compute the losses by the recorded model, not by a "
        "copy of it, and with its own parameters (`functional_call` takes others). A batch in which nothing of it is used has zeros."
    )


# Losses whose weights are one for each class, whether or not there are as many samples, and which argument these are.
OF_CLASSES = {
    **dict.fromkeys(["cross_entropy_loss", "nll_loss_nd", "nll_loss", "nll_loss2d"], (2, "weight")),
    "multi_margin_loss": (4, "weight"),
    "binary_cross_entropy_with_logits": (3, "pos_weight"),
}


def refuse_loss(kind: object, reduction: str) -> None:
    """Refuse a loss that is no plain sum or mean over the samples, as the reduction says."""
    if isinstance(kind, Lost) and kind.refused:
        raise SampleAxisError(kind.refused)
    if isinstance(kind, Lost) and not kind.linear:
        raise MixedSamplesError(
            f"backward: {kind.op} brought the samples together, and the loss is no plain sum or mean over them, so it has no "
            "per-sample gradients. Keep one loss per sample and call `rec.backward(losses)`."
        )
    if isinstance(kind, Lost) and reduction == "mean" and not kind.uniform:
        raise MixedSamplesError(
            f"backward: {kind.op} took a weighted mean (class weights, or targets at ignore_index), so loss_reduction="
            "'mean' would scale the samples wrongly. Use reduction='none' and `rec.backward(losses)`."
        )
    if isinstance(kind, Shared):
        raise SampleAxisError(
            "backward: the loss does not depend on the samples that the model was given. Check that it is computed from "
            "the model's output inside the recording, and that `batch_size` and `batch_dim` are right."
        )


def packed_owners(sequence: PackedSequence, n: int) -> Tensor:
    """The sample of each row of a packed sequence."""
    order = torch.arange(n, device=HOST) if sequence.sorted_indices is None else sequence.sorted_indices.cpu()
    return torch.cat([order[:size] for size in listed(sequence.batch_sizes)])


def is_packed(value: object) -> TypeGuard[PackedSequence]:
    """Whether it is a packed sequence, as far as the type checker is concerned too."""
    return isinstance(value, PackedSequence)


def place_of(x: Tensor, dim: int) -> int | None:
    """The axis of a tensor that a number means, which counts from the end if it is negative; None where there is none."""
    return dim % x.ndim if -x.ndim <= dim < x.ndim else None


def common_size(model: nn.Module, inputs: list[Tensor], packed: list[PackedSequence], dim: int) -> int:
    """The batch size, if the inputs of a model agree on it."""
    sizes = sorted(
        {x.shape[place] for x in inputs if (place := place_of(x, dim)) is not None} | {int(x.batch_sizes[0]) for x in packed}
    )
    if len(sizes) != 1:
        found = f"sizes {', '.join(map(str, sizes))}" if sizes else "no tensor with such an axis"
        raise ValueError(
            f"{type(model).__name__}: the batch size is not clear from the inputs: {found} on axis {dim}. Give `batch_size`."
        )
    return sizes[0]


class Entrance:
    """The hook that a recording leaves on a model while it is open; a copy of the model gets one that does nothing."""

    def __init__(self, enter: Callable[..., None]) -> None:
        self._enter = enter

    def __call__(self, *args: Any) -> None:
        """Hand the arguments of the model's forward on."""
        self._enter(*args)

    def __deepcopy__(self, _: object) -> Callable[..., None]:
        return _pass

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _passing, ()


def _pass(*_: object) -> None:
    """What is left of the hook in a copy."""


def _passing() -> Callable[..., None]:
    return _pass
