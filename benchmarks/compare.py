"""What per-sample quantities cost beside a plain training step, ours and others': numbers checked first, then time, then memory.

    python benchmarks/compare.py                                        # the table of the docs, about half an hour on two cores
    python benchmarks/compare.py --workloads mlp,cnn --repeats 3
    python benchmarks/compare.py --device cuda --dtype bfloat16         # the workloads for a GPU

Time: one process; a round runs the plain step and every method once, in the same order, and a method's ratio is to the plain step of its
round; the check and one round are not counted. Memory: a fresh process for each cell. `peers.py` says how each system is used.
"""

import argparse
import functools
import gc
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cells import Place, Question, captured, first_line, memories, memory_here, seconds
from peers import (
    CLIPPED,
    FLOOR,
    GRADS,
    GRAPH,
    INTO,
    LOOP,
    OURS,
    PLAIN,
    QUANTITIES,
    SYSTEMS,
    TRACED,
    MissingGradientError,
    Problem,
    Result,
    loop_norms,
)
from workloads import CUDA_WORKLOADS, WORKLOADS

# The largest error of a parameter's gradients, as the norm of the difference over that of the loop's, that still counts as the loop's
# numbers. Rounding alone turns single units of a ReLU network on or off, so single entries may differ by any amount; in bfloat16 the
# loop itself is 0.23 from a loop in float64 (ResNet-18).
TOLERANCE = {"float32": 5e-3, "bfloat16": 0.25}
# Methods that take over so many plain steps are measured in this many rounds only; on CUDA, where rounds differ less, in one.
SLOW, SLOW_ROUNDS = 25.0, {"cpu": 3, "cuda": 1}
# Steps in a row of the others.
IN_A_ROW = 3

Method = tuple[str, str]
# A workload's part of the JSON file.
Figures = dict[str, Any]
Shown = Callable[[dict[str, Any] | None, Figures], str]


@dataclass
class Cell:
    """What came of one method on one workload."""

    system: str
    quantity: str
    # why there is no time: the numbers are wrong, or it raises
    trouble: str = ""
    error: float | None = None
    ms: float | None = None
    # median and quartiles
    ratio: tuple[float, float, float] | None = None
    rounds: int = 0
    mib: float | None = None
    live: float | None = None
    # of a replayed CUDA graph, over that of the plain step; why there is none
    captured_ms: float | None = None
    captured: tuple[float, float, float] | None = None
    uncaptured: str = ""


# --- right or wrong -------------------------------------------------------------------------------------------------------------


def relative_error(found: Result, expected: Result) -> float:
    """The largest, over parameters, of the norm of the difference over the norm of what is expected."""
    if isinstance(expected, dict):
        if not isinstance(found, dict) or found.keys() != expected.keys():
            return float("inf")
        return max(relative_error(found[name], expected[name]) for name in expected)
    if found.shape != expected.shape:
        return float("inf")
    size = torch.linalg.vector_norm(expected, dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    error = torch.linalg.vector_norm(found - expected, dtype=torch.float32) / size
    return error.nan_to_num(float("inf")).item()


def judged(method: Method, problem: Problem, expected: Result, tolerance: float) -> Cell:
    """The method, as it is timed, beside the loop."""
    system, quantity = method
    cell = Cell(system, quantity)
    if not SYSTEMS[system].installed:
        return replace(cell, trouble="not installed")
    try:
        found = expected if system == LOOP else prepared(method, problem)()
        cell.error = None if system == FLOOR else relative_error(found, expected)
    except MissingGradientError as error:
        return replace(cell, trouble=str(error))
    except Exception as error:  # noqa: BLE001  (whatever a peer raises is its result)
        return replace(cell, trouble=f"raises {type(error).__name__}: {first_line(error)}")
    if cell.error is not None and not cell.error <= tolerance:
        cell.trouble = f"wrong numbers (relative error {cell.error:.1g})"
    return cell


def all_judged(problem: Problem, tolerance: float, norms: Result) -> list[Cell]:
    """Every method beside the loop, whose norms are known."""
    cells, expected = [], norms
    for quantity in QUANTITIES:
        if quantity in {CLIPPED, GRADS}:
            expected = SYSTEMS[LOOP].methods[quantity](problem)
        systems = [name for name, system in SYSTEMS.items() if quantity in system.methods]
        cells += [judged((name, quantity), problem, expected, tolerance) for name in systems]
        tidy()
    return cells


def tidy() -> None:
    """Drop what an error or the last method left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- time -----------------------------------------------------------------------------------------------------------------------


def rounds(
    runs: dict[Method, Callable[[], object]], repeats: int, budget: float, device: str
) -> dict[Method, list[tuple[float, float]]]:
    """(seconds, ratio to the plain step of its round) of every round but the first, which tells the slow methods."""
    plain = (PLAIN, PLAIN)

    def one_round(methods: Iterable[Method]) -> dict[Method, float]:
        return {method: seconds(runs[method], device, IN_A_ROW if method in quick else 1) for method in methods}

    quick: list[Method] = []
    # the very first call is slower than any other
    runs[plain]()
    first = one_round(runs)
    quick = [method for method, taken in first.items() if taken <= SLOW * first[plain]]
    times: dict[Method, list[tuple[float, float]]] = {method: [] for method in runs}
    start = time.perf_counter()
    for count in range(repeats):
        if count >= SLOW_ROUNDS["cpu"] and time.perf_counter() - start > budget:
            break
        found = one_round(runs if count < SLOW_ROUNDS[device] else quick)
        for method, taken in found.items():
            times[method].append((taken, taken / found[plain]))
    return times


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def timed(cells: list[Cell], problem: Problem, repeats: int, budget: float, device: str) -> list[Cell]:
    """The cells that have no trouble, with their times."""
    good = {(c.system, c.quantity): c for c in [Cell(PLAIN, PLAIN), *cells] if not c.trouble}
    runs = {method: prepared(method, problem) for method in good if method[0] != GRAPH}
    for method, pairs in rounds(runs, repeats, budget, device).items():
        note(good[method], pairs)
    del runs
    for method in [method for method in good if method[0] == GRAPH]:
        # a graph keeps the memory of a step: one at a time
        tidy()
        run, plain = prepared(method, problem), prepared((PLAIN, PLAIN), problem)
        each = [(seconds(run, device, IN_A_ROW), seconds(plain, device, IN_A_ROW)) for _ in range(repeats)]
        note(good[method], [(taken, taken / base) for taken, base in each])
        del run
    return list(good.values())


def note(cell: Cell, pairs: list[tuple[float, float]]) -> None:
    """The times of a cell, of (seconds, ratio to the plain step of the round)."""
    cell.ms = 1e3 * statistics.median(taken for taken, _ in pairs)
    cell.ratio = spread([ratio for _, ratio in pairs])
    cell.rounds = len(pairs)


def capture_timed(cells: list[Cell], problem: Problem, repeats: int) -> None:
    """The same methods replayed from CUDA graphs, each beside the plain step's."""
    plain = captured(prepared((PLAIN, PLAIN), problem))
    for cell in cells:
        if cell.system in {TRACED, GRAPH}:
            # the same kernels as ours, which are measured
            continue
        if cell.ratio is not None and cell.ratio[0] > SLOW:
            cell.uncaptured = "too slow"
            continue
        try:
            replay = captured(prepared((cell.system, cell.quantity), problem))
        except Exception as error:  # noqa: BLE001  (whatever a peer raises is its result)
            cell.uncaptured = f"raises {type(error).__name__}: {first_line(error)}"
            torch.cuda.synchronize()
            continue
        pairs = [(seconds(replay, "cuda", IN_A_ROW), seconds(plain, "cuda", IN_A_ROW)) for _ in range(repeats)]
        cell.captured_ms = 1e3 * statistics.median(taken for taken, _ in pairs)
        cell.captured = spread([taken / base for taken, base in pairs])
        del replay
        tidy()


def prepared(method: Method, problem: Problem) -> Callable[[], object]:
    system, quantity = method
    run, ready = SYSTEMS[system].methods[quantity], SYSTEMS[system].prepare(problem, quantity)
    for _ in range(SYSTEMS[system].before):
        run(ready)
    return lambda: run(ready)


# --- a workload -----------------------------------------------------------------------------------------------------------------


def measured(workload: str, place: Place, repeats: int, budget: float) -> Iterator[Figures]:
    """Everything about one workload, as far as it is known: without memory first, then with that of the plain step and ours."""
    problem = place.problem(workload, {})
    # some samples are clipped, some are not
    norms = loop_norms(problem)
    problem = replace(problem, limit=norms.median().item())
    say(f"{workload}: checking")
    cells = all_judged(problem, TOLERANCE[place.dtype], norms)
    say(f"{workload}: timing")
    good = timed(cells, problem, repeats, budget, place.device)
    tidy()
    if place.device == "cuda":
        say(f"{workload}: timing captured steps")
        capture_timed(good, problem, repeats)

    def known() -> Figures:
        return {"key": workload, "name": problem.name, "plain": asdict(good[0]), "cells": [asdict(cell) for cell in cells]}

    yield known()
    say(f"{workload}: memory of {len(good)} methods")
    own = [cell for cell in good if cell.system in {PLAIN, OURS, TRACED, GRAPH}]
    others = [cell for cell in good if cell not in own]
    for some, processes in ((own, 3), (others, 1)):
        if place.device == "cpu":
            found = memories([Question(c.system, c.quantity, workload) for c in some], place, processes)
        else:
            found = [memory_here(c.system, c.quantity, problem, place.device) for c in some]
        for cell, answer in zip(some, found, strict=True):
            cell.mib, cell.live = answer.get("mib"), answer.get("live")
            cell.trouble = f"memory not measured: {answer['trouble']}" if "trouble" in answer else ""
        yield known()


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


# --- the tables -----------------------------------------------------------------------------------------------------------------

PEERS = [name for name in SYSTEMS if name != PLAIN]


def cell_of(figures: Figures, system: str, quantity: str) -> dict[str, Any] | None:
    return next((c for c in figures["cells"] if c["system"] == system and c["quantity"] == quantity), None)


def time_shown(cell: dict[str, Any] | None, _: Figures) -> str:
    if cell is None:
        return ""
    if cell["ratio"] is None:
        return in_a_word(cell["trouble"])
    middle, low, high = (f"{value:.2f}" if value < 10 else f"{value:.1f}" for value in cell["ratio"])
    return f"{middle} ({low}-{high})"


def captured_shown(cell: dict[str, Any] | None, _: Figures) -> str:
    if cell is None or not cell.get("captured"):
        return "" if cell is None else in_a_word(cell.get("uncaptured") or cell["trouble"])
    middle, low, high = cell["captured"]
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def in_a_word(trouble: str) -> str:
    for start, word in {"raises": "raises", "wrong": "wrong numbers", "leaves": "incomplete"}.items():
        if trouble.startswith(start):
            return word
    return trouble


def memory_shown(cell: dict[str, Any] | None, figures: Figures, of: str = "mib") -> str:
    base = figures["plain"][of]
    return "" if cell is None or cell[of] is None or not base else f"{cell[of] / base:.2f}"


def table(results: list[Figures], head: Callable[[Figures], str], shown: Shown) -> str:
    lines = [f"| workload (plain step) | quantity | {' | '.join(PEERS)} |", "|---" * (2 + len(PEERS)) + "|"]
    for figures in results:
        for quantity in QUANTITIES:
            first = head(figures) if quantity == QUANTITIES[0] else ""
            entries = [shown(cell_of(figures, system, quantity), figures) for system in PEERS]
            lines.append(f"| {first} | {quantity} | {' | '.join(entries)} |")
    return "\n".join(lines)


def troubles(results: list[Figures]) -> str:
    """Refusals and wrong numbers, a line for each system and reason."""
    lines = ["| workload | system | quantities | what happens |", "|---|---|---|---|"]
    for figures in results:
        reasons: dict[tuple[str, str], list[str]] = {}
        for cell in figures["cells"]:
            if cell["trouble"]:
                reasons.setdefault((cell["system"], cell["trouble"]), []).append(cell["quantity"])
        for (system, reason), quantities in reasons.items():
            shown = reason.replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| {figures['key']} | {system} | {', '.join(quantities)} | {shown} |")
    return "\n".join(lines) if len(lines) > 2 else "None."


def fewer_rounds(results: list[Figures], repeats: int) -> str:
    few = [(f["key"], c) for f in results for c in [f["plain"], *f["cells"]] if c["ratio"] and c["rounds"] < repeats]
    counts = sorted({(key, c["rounds"]) for key, c in few})
    if not counts:
        return ""
    listed = "; ".join(
        f"{key}, {count}: {', '.join(sorted({c['system'] for k, c in few if k == key and c['rounds'] == count}))}"
        for key, count in counts
    )
    return (
        f" Fewer rounds where a method takes over {SLOW:.0f} plain steps, or all rounds of a workload too long"
        f" (workload, rounds: systems with such a method): {listed}."
    )


PAGE = """# Performance

`{command}`

![Time over that of the plain step]({chart})

## Time

Time over that of the plain step (forward, and backward with ordinary gradients) of the same round: median, quartiles in brackets.
Below 1 is faster than a plain step. "{into}" means the caller's own `(n, *shape)` buffers, filled again in each step;
"{floor}" is the time to fill them with a constant: nothing that materialises gradients can be faster. "{traced}" is
`samplewise.traced` after the calls in which it makes its trace{graph}. Empty cells do not apply.

{times}

{captured}## Memory

{memory}

## Refused or wrong

Every result was first compared with a batch-of-one loop in the same dtype. Wrong is an error over {tolerance:g}, the norm of
the difference over the norm, for any parameter (rounding turns single units of a ReLU network on or off). Models are unmodified,
but for the layers that Opacus itself replaces.

{troubles}

{place}, {peers}; at most {repeats} rounds, after two runs of every method that are not counted.{fewer}
"""


RESIDENT = """Peak memory of three steps beyond the idle process (model, batch, and the caller's buffers where there are any), over
that of the plain step; each in a fresh process, the plain step and ours in three of them (median: single ones differ by up to a third).

{memory}

Live tensors: the most that torch held at once of what a step asked for, over that of the plain step; memory kept between steps counts.
The heap's gaps between blocks do not, nor what the kernels' own libraries take. It is the same in every run.

{live}"""

ALLOCATED = """The most that torch's allocator gave out during three steps beyond the model, the batch, and the caller's buffers where
there are any, over that of the plain step.

{memory}"""

CAPTURED = """## Captured

The same steps as CUDA graphs, the plain step too: launched by the host as a whole, they take what the device takes.

{table}

"""


def markdown(results: list[Figures], conditions: dict[str, Any], chart: str) -> str:
    return PAGE.format(
        **conditions,
        chart=chart,
        into=INTO,
        floor=FLOOR,
        traced=TRACED,
        graph=f', "{GRAPH}" the same with a CUDA graph, beside the plain step as Python launches it'
        if GRAPH in SYSTEMS
        else "",
        times=table(results, lambda f: f"{f['name']} ({f['plain']['ms']:.1f} ms)", time_shown),
        captured=captured_section(results) if conditions["device"] == "cuda" else "",
        memory=(ALLOCATED if conditions["device"] == "cuda" else RESIDENT).format(
            memory=table(results, lambda f: f"{f['name']} ({f['plain']['mib'] or 0:.0f} MiB)", memory_shown),
            live=table(
                results,
                lambda f: f"{f['name']} ({f['plain']['live'] or 0:.0f} MiB)",
                functools.partial(memory_shown, of="live"),
            ),
        ),
        troubles=troubles(results),
        fewer=fewer_rounds(results, conditions["repeats"]),
    )


def captured_section(results: list[Figures]) -> str:
    return CAPTURED.format(
        table=table(results, lambda f: f"{f['name']} ({f['plain']['captured_ms'] or 0:.1f} ms)", captured_shown)
    )


def bars(results: list[Figures], path: Path) -> None:
    """A panel for each quantity: the workloads, and a bar for each system from the line of the plain step."""
    from matplotlib import pyplot as plt  # noqa: PLC0415  (the measurements do without)
    from matplotlib import ticker  # noqa: PLC0415

    size = (1.6 * len(results) + 4, 11)
    figure, panels = plt.subplots(len(QUANTITIES), 1, figsize=size, sharex=True, layout="constrained")
    colours = dict(zip(PEERS, plt.get_cmap("tab10").colors, strict=False))
    for panel, quantity in zip(panels, QUANTITIES, strict=True):
        systems = [system for system in PEERS if quantity in SYSTEMS[system].methods]
        for i, system in enumerate(systems):
            left = (i - (len(systems) - 1) / 2) * 0.8 / len(systems)
            draw(panel, left, [cell_of(f, system, quantity) for f in results], 0.75 / len(systems), colours[system])
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(yscale="log", title=quantity, ylabel="time over plain step")
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(ticker.NullFormatter())
        low, high = panel.get_ylim()
        panel.set_ylim(min(low, 0.7), max(high, 1.4))
    panels[-1].set_xticks(range(len(results)), [f["key"] for f in results])
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[system]) for system in PEERS]
    figure.legend(handles, PEERS, loc="outside right upper", title="x: refused or wrong")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw(panel: Any, left: float, cells: list[dict[str, Any] | None], width: float, colour: Any) -> None:
    """The bars of one system, one for each workload."""
    for i, cell in enumerate(cells):
        if cell and cell["ratio"]:
            panel.bar(i + left, cell["ratio"][0] - 1, width, bottom=1, color=colour)
        else:
            panel.plot(i + left, 1, "x", color=colour, markersize=5)


# --- the command ----------------------------------------------------------------------------------------------------------------


def options_given(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", help="names with commas between; by default all of the device")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of time")
    parser.add_argument("--seconds", type=float, default=150, help="of a workload's rounds, if that is over three")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--out", type=Path, default=Path("docs/performance"), help="of the files .json, .md and .png")
    given = parser.parse_args(arguments)
    names = list(WORKLOADS if given.device == "cpu" else CUDA_WORKLOADS)
    given.workloads = given.workloads.split(",") if given.workloads else names
    unknown = set(given.workloads) - {*WORKLOADS, *CUDA_WORKLOADS}
    if unknown:
        parser.error(f"--workloads: no {', '.join(sorted(unknown))}; there are {', '.join([*WORKLOADS, *CUDA_WORKLOADS])}")
    return given


def conditions_of(given: argparse.Namespace, place: Place) -> dict[str, Any]:
    out = given.out.name if given.out.is_absolute() else given.out
    command = (
        f"python benchmarks/compare.py --workloads {','.join(given.workloads)} --repeats {given.repeats} --seconds {given.seconds:g} "
        f"--threads {given.threads} --device {given.device} --dtype {given.dtype} --out {out}"
    )
    versions = [f"{name} {version(name)}" for name in ("opacus", "backpack-for-pytorch")]
    return {
        "command": command,
        "place": place.described(),
        "peers": ", ".join(versions),
        "repeats": given.repeats,
        "tolerance": TOLERANCE[given.dtype],
        **asdict(place),
    }


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def beside(out: Path, suffix: str) -> Path:
    return out.with_name(out.name + suffix)


def write(results: list[Figures], conditions: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figures = json.dumps({"conditions": conditions, "workloads": results}, indent=1)
    beside(out, ".json").write_text(figures + "\n")
    beside(out, ".md").write_text(markdown(results, conditions, f"{out.name}.png"))


def main() -> None:
    given = options_given()
    place = Place(given.device, given.dtype, given.threads)
    place.enter()
    conditions, results = conditions_of(given, place), dict[str, Figures]()
    for workload in given.workloads:
        for figures in measured(workload, place, given.repeats, given.seconds):
            results[workload] = figures
            # what is done is kept, if the rest is interrupted
            write(list(results.values()), conditions, given.out)
    bars(list(results.values()), beside(given.out, ".png"))
    print(beside(given.out, ".md").read_text())


if __name__ == "__main__":
    main()
