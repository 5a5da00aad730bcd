"""The report's charts, as SVG to be placed inside the page."""

from collections.abc import Collection
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .table import ScoreTable

INK, QUIET, BLUE, RED = "#1f2937", "#6b7280", "#2563eb", "#dc2626"
STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#d1d5db",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "legend.frameon": False,
    "svg.hashsalt": "samplewise",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
}
Values = npt.NDArray[np.float64]


def norm_histogram(table: ScoreTable, marked: Collection[int], name: str) -> str:
    """How gradient norms are spread, and where the marked samples lie."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes("gradient norm", "samples")
        norms = _positive(table.columns["grad_norm"])
        count = min(50, 4 + int(2 * len(norms) ** 0.5))
        bins = np.geomspace(norms.min(), norms.max() * 1.0001, count).tolist()
        axes.hist(norms, bins=bins, color=BLUE, label="all samples")
        axes.hist(norms[list(marked)], bins=bins, color=RED, label=name)
        axes.set_xscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        return _svg(figure)


def loss_against_norm(table: ScoreTable, marked: Collection[int], name: str) -> str:
    """Every sample by loss and gradient norm; the marked ones stand out."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes("loss", "gradient norm")
        losses, norms = table.columns["loss"], _positive(table.columns["grad_norm"])
        x = _positive(losses) if bool((losses >= 0).all()) else losses.numpy()
        axes.set_xscale("log" if bool((losses >= 0).all()) else "linear")
        axes.set_yscale("log")
        # Points are drawn as one picture, so that the report stays small however many samples there are.
        axes.scatter(x, norms, s=8, color=BLUE, alpha=0.35, linewidths=0, rasterized=True, label="all samples")
        chosen = list(marked)
        axes.scatter(x[chosen], norms[chosen], s=14, color=RED, alpha=0.8, linewidths=0, rasterized=True, label=name)
        axes.legend(loc="lower right")
        return _svg(figure)


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.2, 3.7), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    axes.grid(color="#eef0f3", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _positive(values: Tensor) -> Values:
    """Values for a logarithmic axis: zeros are drawn at the smallest value above zero."""
    array: Values = values.numpy()
    above = array[array > 0]
    return np.maximum(array, above.min() if above.size else 1e-12)


def _svg(figure: Figure) -> str:
    svg = BytesIO()
    figure.savefig(svg, format="svg", dpi=160, transparent=True, metadata={"Date": None})
    text = svg.getvalue().decode()
    return text[text.index("<svg") :]
