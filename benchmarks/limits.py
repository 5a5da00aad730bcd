"""Where the time of norms, clipped sums and gradients goes: what could not be saved by a faster recording, as ratios to the plain step.

    python benchmarks/limits.py [--workloads cnn,resnet] [--repeats 15]

Each round runs the plain step; the forward and the backward to the activations alone, with frozen parameters; the norms, the clipped
sum, and the gradients written into buffers, of the factors of one recorded step, without recording it again; and the whole of each. "limit"
is the activations plus one of these: the kernels without the recording. It is a limit of these algorithms and kernels, not of the problem.
"by hand" is a step written for the network, with bare autograd functions around the same kernels (by_hand.py), where there is one: what
lies between the limit and it is Python of any kind, and caches that are cold in a step. "traced" is a step by `samplewise.traced`, whose
activations are without torch's own Python too. The last column is the time to write as many
numbers into the same buffers.

A second table has the memory that clipped sums need beside the plain step's, in any single backward: until all norms are known, the
factor or the gradients of every parameter are kept. "leaner of both" takes whichever is smaller, parameter by parameter.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from by_hand import ByHand
from cells import MIB, Place, live, seconds
from peers import CLIPPED, FLOOR, INTO, NORMS, OURS, PLAIN, SYSTEMS, TRACED, Problem
from samplewise.factors import Factor
from samplewise.quantities import Record
from samplewise.recording import Recording
from samplewise.running import unrecorded
from samplewise.streaming import _run
from samplewise.sums import Store, tensors_of
from workloads import WORKLOADS

ACTIVATIONS = "activations alone"
# each quantity, and what it is called where it is asked for without a recording
ALONE = {quantity: f"{quantity} alone" for quantity in (NORMS, CLIPPED, INTO)}
IN_A_TRACE = {quantity: f"{quantity}, traced" for quantity in ALONE}
BY_HAND = {NORMS: f"{NORMS} by hand", CLIPPED: f"{CLIPPED} by hand"}
MEMORY = ("plain step, at its peak", "clipped sum, at its peak", "kept for the sum", "leaner of both")
COLUMNS = (
    ACTIVATIONS,
    *(column for q in ALONE for column in (ALONE[q], "limit", *([BY_HAND[q]] if q in BY_HAND else []), q, IN_A_TRACE[q])),
    FLOOR,
)


def frozen(problem: Problem) -> Problem:
    """The step without weight gradients: parameters are frozen, and the first layer's result asks for a gradient."""
    model = copy.deepcopy(problem.model).requires_grad_(requires_grad=False)
    # not the model itself, which may have parameters of its own beside layers
    first = next(module for module in list(model.modules())[1:] if list(module.parameters(recurse=False)))

    def ask(_: nn.Module, __: object, out: Tensor) -> None:
        out.requires_grad_()

    first.register_forward_hook(ask)
    return replace(problem, model=model)


def factors_of(problem: Problem) -> dict[str, Factor]:
    """The factors of all parameters, kept side by side."""
    kept: dict[str, Factor] = {}
    _run(Record(Recording(problem.model, consume=kept.__setitem__)), problem.loss_fn, problem.batch)
    return kept


def by_hand(problem: Problem) -> dict[str, Callable[[], object]]:
    """Norms and clipped sums by hand, for the networks that have them."""
    if not ByHand.covers(problem):
        return {}
    hand = ByHand(problem)
    return {BY_HAND[NORMS]: hand.norms, BY_HAND[CLIPPED]: hand.clipped}


def norms_alone(factors: dict[str, Factor]) -> None:
    with unrecorded():
        for factor in factors.values():
            factor.sq_norms()


def clipped_alone(factors: dict[str, Factor], weights: Tensor) -> None:
    """Norms first and then sums, of gradients that are stored where `clipped_grads` stores them."""
    store, kept = Store(), dict(factors)
    with unrecorded():
        for name, factor in factors.items():
            if store.worth(factor):
                kept[name] = store.kept(factor)
            kept[name].sq_norms()
        for factor in kept.values():
            factor.weighted_sum(weights)


def written_alone(factors: dict[str, Factor], buffers: dict[str, Tensor]) -> None:
    with unrecorded():
        for name, factor in factors.items():
            factor.write(buffers[name])


def kept_for_sums(factors: dict[str, Factor]) -> tuple[float, float]:
    """MiB that clipped sums keep until the norms are known, and of the leaner of factor and gradients for each parameter."""
    store, kept, leaner = Store(), dict[int, int](), dict[int, int]()
    with unrecorded():
        for factor in factors.values():
            # by place: a bias may share its tensor with the weight
            own = {x.data_ptr(): x.nbytes for x in tensors_of(factor)}
            gradients = {id(factor): factor.n * factor.shape.numel() * next(iter(tensors_of(factor))).element_size()}
            kept |= gradients if store.worth(factor) else own
            leaner |= min(own, gradients, key=lambda sizes: sum(sizes.values()))
    return sum(kept.values()) / MIB, sum(leaner.values()) / MIB


def memory_line(workload: str, place: Place) -> str:
    """A row of the second table."""
    problem = place.problem(workload, {})
    ours = SYSTEMS[OURS]
    problem = replace(problem, limit=ours.methods[NORMS](problem).median().item())
    peaks = []
    for system, quantity in ((SYSTEMS[PLAIN], PLAIN), (ours, CLIPPED)):
        ready = system.prepare(problem, quantity)
        peaks.append(live(lambda run=system.methods[quantity], ready=ready: run(ready)))
    shown = [*peaks, *kept_for_sums(factors_of(ours.prepare(problem, NORMS)))]
    return f"| {problem.name} | {' | '.join(f'{value:.1f}' for value in shown)} |"


def measured(workload: str, place: Place, repeats: int) -> tuple[str, float, dict[str, float]]:
    """The workload's name, the plain step in ms, and the ratio to it of each part: medians of interleaved rounds."""
    problem = place.problem(workload, {})
    ours, weights = SYSTEMS[OURS], SYSTEMS[OURS].methods[NORMS](problem).reciprocal()
    problem = replace(problem, limit=1 / weights.median().item())
    factors = factors_of(ours.prepare(problem, NORMS))
    parts = {
        PLAIN: (SYSTEMS[PLAIN], PLAIN),
        **{quantity: (ours, quantity) for quantity in ALONE},
        **{name: (SYSTEMS[TRACED], quantity) for quantity, name in IN_A_TRACE.items()},
        FLOOR: (SYSTEMS[FLOOR], INTO),
    }
    ready = {name: system.prepare(problem, quantity) for name, (system, quantity) in parts.items()}
    # the same buffers
    ready[FLOOR] = ready[INTO]
    runs: dict[str, Callable[[], object]] = {
        name: lambda s=system, q=quantity, p=ready[name]: s.methods[q](p) for name, (system, quantity) in parts.items()
    }
    without = frozen(problem)
    runs[ACTIVATIONS] = lambda: without.total().backward()
    runs[ALONE[NORMS]], runs[ALONE[CLIPPED]] = lambda: norms_alone(factors), lambda: clipped_alone(factors, weights)
    runs[ALONE[INTO]] = lambda: written_alone(factors, ready[INTO].buffers)
    runs |= by_hand(problem)
    for name, (system, _) in parts.items():
        for _ in range(system.before):
            runs[name]()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2 + repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, place.device))
    ratios = {
        name: statistics.median(a / b for a, b in zip(found[2:], times[PLAIN][2:], strict=True))
        for name, found in times.items()
    }
    return problem.name, 1e3 * statistics.median(times[PLAIN][2:]), ratios


def line(name: str, ms: float, ratios: dict[str, float]) -> str:
    start, quantities = ratios[ACTIVATIONS], iter(ALONE.values())
    cells = []
    for column in COLUMNS:
        value = start + ratios[next(quantities)] if column == "limit" else ratios.get(column)
        cells.append("" if value is None else f"{value:.2f}")
    return f"| {name} ({ms:.0f} ms) | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default="mlp,cnn,resnet,gpt,vit,lstm")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    unknown = set(options.workloads.split(",")) - set(WORKLOADS)
    if unknown:
        parser.error(f"--workloads: no {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    place = Place(threads=options.threads)
    place.enter()
    print(f"{place.described()}\n\n| workload (plain step) | {' | '.join(COLUMNS)} |\n{'|---' * (1 + len(COLUMNS))}|")
    for workload in options.workloads.split(","):
        print(line(*measured(workload, place, options.repeats)), flush=True)
    print(f"\n| workload, MiB of live tensors | {' | '.join(MEMORY)} |\n{'|---' * (1 + len(MEMORY))}|")
    for workload in options.workloads.split(","):
        print(memory_line(workload, place), flush=True)


if __name__ == "__main__":
    main()
