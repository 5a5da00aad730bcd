"""The systems compared: how each is set up, and how each gives norms, clipped sums and gradients the way its own documentation says."""

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import samplewise as sw
from workloads import Workload

Grads = dict[str, Tensor]
Result = Tensor | Grads

PLAIN, NORMS, CLIPPED, GRADS, INTO = "plain step", "norms", "clipped sum", "gradients", "gradients into buffers"
QUANTITIES = (NORMS, CLIPPED, GRADS, INTO)


@dataclass(frozen=True)
class Problem(Workload):
    """A workload, the norm to clip at, and buffers `(n, *shape)` of the caller for all gradients."""

    limit: float = 1.0
    buffers: Grads = field(default_factory=dict)
    # by quantity, for what is traced once and run again
    traces: dict[str, Callable[..., object]] = field(default_factory=dict)

    @classmethod
    def of(cls, workload: Workload) -> Self:
        return cls(**vars(workload))

    def head(self, n: int) -> Self:
        """Its first samples."""
        buffers = {name: buffer[:n] for name, buffer in self.buffers.items()}
        return replace(self, input=self.input[:n], target=self.target[:n], buffers=buffers, traces={})

    def total(self) -> Tensor:
        """The sum of the batch's losses."""
        return self.loss_fn(self.model, self.batch).sum()


@dataclass(frozen=True)
class System:
    """A way to get per-sample quantities."""

    methods: dict[str, Callable[[Problem], Result]]
    # The model with whatever the system needs on it; not timed. It is given a copy of its own.
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    # The distribution that must be installed, by the name it is imported by.
    needs: str = "torch"
    # Calls before the first that is like all later ones.
    before: int = 0

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None

    def prepare(self, problem: Problem, quantity: str) -> Problem:
        """The problem on a wrapped copy of the model, with buffers if the quantity is one that fills them."""
        ready = replace(problem, model=self.wrap(copy.deepcopy(problem.model)), traces={})
        if quantity != INTO:
            return ready
        parameters = problem.model.named_parameters()
        return replace(ready, buffers={name: p.new_zeros(problem.n, *p.shape) for name, p in parameters})


class MissingGradientError(Exception):
    """A system left a parameter out without raising: its norms and sums would be wrong."""


def norms_of(grads: Grads) -> Tensor:
    # The norms of rows first, and then of those: in one go, float32 loses the fourth digit in torch's norm of many numbers on the CPU.
    rows = [g.flatten(2) if g.ndim > 2 else g.view(len(g), -1, 1) for g in grads.values()]
    norms = [torch.linalg.vector_norm(g, dim=2, dtype=torch.float32) for g in rows]
    return torch.linalg.vector_norm(torch.cat(norms, 1), dim=1)


def clip(grads: Grads, limit: float) -> Grads:
    weights = (limit / norms_of(grads)).clamp(max=1)
    return {name: torch.einsum("n,n...->...", weights.to(g.dtype), g) for name, g in grads.items()}


def all_from(gradients: Callable[[Problem], Grads]) -> dict[str, Callable[[Problem], Result]]:
    """The methods of a system that knows gradients only."""
    return {NORMS: lambda p: norms_of(gradients(p)), CLIPPED: lambda p: clip(gradients(p), p.limit), GRADS: gradients}


def collected(model: nn.Module, attribute: str) -> Grads:
    """What a system left on the parameters, which are left clean for the next step."""
    found = {}
    for name, parameter in model.named_parameters():
        value = getattr(parameter, attribute, None)
        if value is None:
            raise MissingGradientError(f"leaves no {attribute} on {name}")
        found[name] = value
        setattr(parameter, attribute, None)
        if parameter.grad is not value:
            parameter.grad = None
    return found


# --- the plain step, and ours -------------------------------------------------------------------------------------------------


def plain(p: Problem) -> Grads:
    """Forward, and backward with ordinary gradients."""
    p.total().backward()
    return collected(p.model, "grad")


def our_norms(p: Problem) -> Tensor:
    return sw.per_sample_norms(p.model, p.loss_fn, p.batch)


def our_clipped(p: Problem) -> Grads:
    return sw.clipped_grads(p.model, p.loss_fn, p.batch, max_grad_norm=p.limit)[0]


def our_gradients(p: Problem) -> Grads:
    return sw.per_sample_grads(p.model, p.loss_fn, p.batch)


def our_gradients_into(p: Problem) -> Grads:
    return sw.per_sample_grads(p.model, p.loss_fn, p.batch, out=p.buffers)


def traced(
    quantity: str, function: Callable[..., object], options: Callable[[Problem], dict[str, object]], *, capture: bool
) -> Callable[[Problem], Result]:
    """A quantity that is traced once for a problem."""

    def method(p: Problem) -> Result:
        if quantity not in p.traces:
            p.traces[quantity] = sw.traced(function, p.model, p.loss_fn, capture=capture, **options(p))
        found = p.traces[quantity](p.batch)
        return found[0] if isinstance(found, tuple) else found

    return method


def our_traces(*, capture: bool) -> dict[str, Callable[[Problem], Result]]:
    return {
        NORMS: traced(NORMS, sw.per_sample_norms, lambda _: {}, capture=capture),
        CLIPPED: traced(CLIPPED, sw.clipped_grads, lambda p: {"max_grad_norm": p.limit}, capture=capture),
        GRADS: traced(GRADS, sw.per_sample_grads, lambda _: {}, capture=capture),
        INTO: traced(INTO, sw.per_sample_grads, lambda p: {"out": p.buffers}, capture=capture),
    }


def write(p: Problem) -> Grads:
    """The n P numbers of all gradients written once: nothing that materialises them can be faster."""
    for buffer in p.buffers.values():
        buffer.fill_(1.0)
    return p.buffers


# --- a loop over batches of one: the judge of all others ------------------------------------------------------------------------


def one_by_one(p: Problem) -> Iterator[Grads]:
    """The samples' gradients, one alive at a time."""
    parameters = dict(p.model.named_parameters())
    for x, y in zip(p.input.split(1), p.target.split(1), strict=True):
        found = torch.autograd.grad(p.loss_fn(p.model, (x, y)).sum(), list(parameters.values()))
        yield dict(zip(parameters, found, strict=True))


def norm_of(grads: Grads) -> Tensor:
    return norms_of({name: g[None] for name, g in grads.items()})[0]


def loop_norms(p: Problem) -> Tensor:
    return torch.stack([norm_of(grads) for grads in one_by_one(p)])


def loop_clipped(p: Problem) -> Grads:
    sums = {name: torch.zeros_like(q, dtype=torch.float32) for name, q in p.model.named_parameters()}
    for grads in one_by_one(p):
        weight = (p.limit / norm_of(grads)).clamp(max=1)
        for name, g in grads.items():
            sums[name] += weight * g
    return sums


def loop_gradients(p: Problem) -> Grads:
    rows = list(one_by_one(p))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


# --- torch ----------------------------------------------------------------------------------------------------------------------


def expanded_weights(p: Problem) -> Grads:
    outputs = call_for_per_sample_grads(p.model, batch_size=p.n, loss_reduction="sum")(p.input)
    p.losses(outputs, p.target).sum().backward()
    return collected(p.model, "grad_sample")


def by_vmap(p: Problem) -> Grads:
    parameters = {name: q.detach() for name, q in p.model.named_parameters()}

    def loss(parameters: Grads, x: Tensor, y: Tensor) -> Tensor:
        return p.losses(functional_call(p.model, parameters, (x[None],)), y[None]).sum()

    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, p.input, p.target)


# --- Opacus ---------------------------------------------------------------------------------------------------------------------


def opacus_valid(model: nn.Module) -> nn.Module:
    """The model with the layers replaced that Opacus says to replace (`nn.LSTM` by `DPLSTM`)."""
    from opacus.validators import ModuleValidator  # noqa: PLC0415  (optional)

    return ModuleValidator.fix_and_validate(model).to(next(model.parameters()).dtype)


def opacus_hooks(model: nn.Module) -> nn.Module:
    from opacus.grad_sample import GradSampleModule  # noqa: PLC0415

    return GradSampleModule(opacus_valid(model), loss_reduction="sum")


def opacus_ghost(model: nn.Module) -> nn.Module:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping  # noqa: PLC0415

    return GradSampleModuleFastGradientClipping(opacus_valid(model), loss_reduction="sum", use_ghost_clipping=True)


def unwrapped(model: nn.Module) -> nn.Module:
    """What an Opacus wrapper wraps: its parameters have the user's names."""
    return model._module


def opacus_gradients(p: Problem) -> Grads:
    p.total().backward()
    return collected(unwrapped(p.model), "grad_sample")


def ghost_norms(p: Problem) -> Tensor:
    p.total().backward()
    norms = p.model.get_norm_sample()
    p.model.zero_grad(set_to_none=True)
    return norms


def ghost_clipped(p: Problem) -> Grads:
    """Two backward passes, by Opacus's own loss; of the optimizer it uses `zero_grad` only."""
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping  # noqa: PLC0415

    p.model.max_grad_norm = p.limit
    optimizer = torch.optim.SGD(p.model.parameters())
    DPTensorFastGradientClipping(p.model, optimizer, p.loss_fn(p.model, p.batch), "sum").backward()
    return collected(unwrapped(p.model), "grad")


# --- BackPACK -------------------------------------------------------------------------------------------------------------------


def backpack_extended(model: nn.Module) -> nn.Module:
    from backpack import extend  # noqa: PLC0415

    return extend(model)


def backpack_gradients(p: Problem) -> Grads:
    # A first-order extension works on the layers with parameters only: the loss need not be extended.
    from backpack import backpack, extensions  # noqa: PLC0415

    with backpack(extensions.BatchGrad()):
        p.total().backward()
    return collected(p.model, "grad_batch")


def backpack_norms(p: Problem) -> Tensor:
    from backpack import backpack, extensions  # noqa: PLC0415

    with backpack(extensions.BatchL2Grad()):
        p.total().backward()
    return torch.stack(list(collected(p.model, "batch_l2").values())).sum(0).sqrt()


OURS, TRACED, LOOP, FLOOR = "samplewise", "samplewise, traced", "loop", "write n P floats"
# where there is CUDA
GRAPH = "samplewise, capture=True"
SYSTEMS: dict[str, System] = {
    PLAIN: System({PLAIN: plain}),
    OURS: System({NORMS: our_norms, CLIPPED: our_clipped, GRADS: our_gradients, INTO: our_gradients_into}),
    TRACED: System(our_traces(capture=False), before=3),
    **({GRAPH: System(our_traces(capture=True), before=4)} if torch.cuda.is_available() else {}),
    LOOP: System({NORMS: loop_norms, CLIPPED: loop_clipped, GRADS: loop_gradients}),
    "Expanded Weights": System(all_from(expanded_weights)),
    "vmap(grad)": System(all_from(by_vmap)),
    "Opacus hooks": System(all_from(opacus_gradients), opacus_hooks, "opacus"),
    "Opacus ghost": System({NORMS: ghost_norms, CLIPPED: ghost_clipped}, opacus_ghost, "opacus"),
    "BackPACK": System({**all_from(backpack_gradients), NORMS: backpack_norms}, backpack_extended, "backpack"),
    FLOOR: System({INTO: write}),
}
