"""How cost grows: time and peak memory of a small GPT's step against n, T, d and depth, one of them doubled at a time, with fitted slopes.

    python benchmarks/growth.py                       # a few minutes; docs/growth.json, .md and .png

A slope is the exponent of the least-squares line through the points in logarithms: 1 is linear, 2 quadratic.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from cells import Place, Question, memories, seconds
from peers import CLIPPED, GRADS, NORMS, OURS, PLAIN, SYSTEMS

Sizes = dict[str, int]

BASE: Sizes = {"n": 8, "length": 64, "width": 128, "layers": 2, "vocabulary": 512}
SWEEPS: dict[str, list[int]] = {
    "n": [2, 4, 8, 16, 32, 64],
    "length": [16, 32, 64, 128, 256, 512],
    "width": [32, 64, 128, 256, 512],
    "layers": [1, 2, 4, 8, 16],
}
LETTERS = {"n": "n", "length": "T", "width": "d", "layers": "depth"}
METHODS = {PLAIN: (PLAIN, PLAIN), **{quantity: (OURS, quantity) for quantity in (NORMS, CLIPPED, GRADS)}}
MEASURES = {"seconds": "time", "mib": "memory"}


def points(base: Sizes, sweeps: dict[str, list[int]]) -> list[Sizes]:
    """All sizes to measure, each once: the base belongs to every sweep."""
    found = [{**base, name: value} for name, values in sweeps.items() for value in values]
    return [sizes for i, sizes in enumerate(found) if sizes not in found[:i]]


def times(sizes: Sizes, place: Place, repeats: int) -> dict[str, float]:
    """Median seconds of each method, in interleaved rounds after one that is not counted."""
    problem = place.problem("gpt", sizes)
    ready = {name: SYSTEMS[system].prepare(problem, quantity) for name, (system, quantity) in METHODS.items()}
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(1 + repeats):
        for name, (system, quantity) in METHODS.items():
            found[name].append(seconds(lambda s=system, q=quantity, p=ready[name]: SYSTEMS[s].methods[q](p), place.device))
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def measured(base: Sizes, sweeps: dict[str, list[int]], place: Place, repeats: int) -> list[dict[str, Any]]:
    """`{sizes, seconds: {method: ...}, mib: {method: ...}}` of every point."""
    every = points(base, sweeps)
    questions = [Question(*method, "gpt", sizes) for sizes in every for method in METHODS.values()]
    peaks = iter(memories(questions, place))
    return [
        {
            "sizes": sizes,
            "seconds": times(sizes, place, repeats),
            "mib": {name: next(peaks).get("mib") for name in METHODS},
        }
        for sizes in every
    ]


def slope(x: list[float], y: list[float]) -> float:
    """The exponent of the power law nearest to the points; not a number for fewer than two."""
    if len(x) < 2:
        return math.nan
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def curve(results: list[dict[str, Any]], base: Sizes, sweep: str, measure: str, method: str) -> tuple[list[float], list[float]]:
    """The points of one line of a plot."""
    others = {name: value for name, value in base.items() if name != sweep}
    on = [r for r in results if others.items() <= r["sizes"].items() and r[measure][method]]
    on.sort(key=lambda r: r["sizes"][sweep])
    return [r["sizes"][sweep] for r in on], [r[measure][method] for r in on]


def slopes(results: list[dict[str, Any]], base: Sizes) -> dict[str, dict[str, dict[str, float]]]:
    """`{measure: {method: {sweep: slope}}}`."""
    return {
        measure: {
            method: {sweep: slope(*curve(results, base, sweep, measure, method)) for sweep in SWEEPS} for method in METHODS
        }
        for measure in MEASURES
    }


def markdown(fitted: dict[str, dict[str, dict[str, float]]], conditions: str, chart: str) -> str:
    head = [f"{measure}, {letter}" for measure in MEASURES.values() for letter in LETTERS.values()]
    lines = [f"| exponent of | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for method in METHODS:
        entries = [f"{fitted[measure][method][sweep]:.2f}" for measure in MEASURES for sweep in LETTERS]
        lines.append(f"| {method} | {' | '.join(entries)} |")
    base = ", ".join(f"{LETTERS.get(name, name)} {value}" for name, value in BASE.items())
    table = "\n".join(lines)
    return f"# Growth\n\n{__doc__}\n![Time and memory]({chart})\n\n{table}\n\nAround a GPT of {base}. {conditions}.\n"


def plots(results: list[dict[str, Any]], base: Sizes, fitted: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    from matplotlib import pyplot as plt  # noqa: PLC0415  (the measurements do without)
    from matplotlib import ticker  # noqa: PLC0415

    figure, panels = plt.subplots(len(MEASURES), len(SWEEPS), figsize=(16, 7.5), layout="constrained", squeeze=False)
    for row, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        for panel, sweep in zip(row, SWEEPS, strict=True):
            for method in METHODS:
                x, y = curve(results, base, sweep, measure, method)
                panel.plot(x, y, "o-", markersize=4, label=f"{method}: {fitted[measure][method][sweep]:.2f}")
            panel.set_xscale("log", base=2)
            panel.set(
                yscale="log",
                xlabel=LETTERS[sweep],
                ylabel=measure.replace("mib", "MiB"),
                title=f"{title} against {LETTERS[sweep]}",
            )
            panel.xaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(ticker.NullFormatter())
            panel.legend(title="slope", fontsize="x-small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/growth"), help="of the files .json, .md and .png")
    given = parser.parse_args()
    place = Place(threads=given.threads)
    place.enter()
    results = measured(BASE, SWEEPS, place, given.repeats)
    fitted = slopes(results, BASE)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    conditions = f"{place.described()}, medians of {given.repeats} rounds"
    figures = {"conditions": conditions, "base": BASE, "slopes": fitted, "points": results}
    given.out.with_name(given.out.name + ".json").write_text(json.dumps(figures, indent=1) + "\n")
    given.out.with_name(given.out.name + ".md").write_text(markdown(fitted, conditions, f"{given.out.name}.png"))
    plots(results, BASE, fitted, given.out.with_name(given.out.name + ".png"))
    print(given.out.with_name(given.out.name + ".md").read_text())


if __name__ == "__main__":
    main()
