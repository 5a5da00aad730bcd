"""The summary as printed for people."""

from rich import box
from rich.console import Console
from rich.table import Table

from .summary import QUANTILES, TITLES, Summary, Suspect
from .table import ScoreTable

WIDTH = 110  # where stdout is no terminal


def show(summary: Summary, scores: ScoreTable) -> None:
    """Print the summary on stdout."""
    console = _console()
    if not console.is_terminal:
        console = _console(WIDTH)
    share = summary.top_share
    console.print(f"\n{summary.name}: {summary.samples:,} samples", style="bold")
    console.print(f"  parameters  {summary.coverage.describe()}")
    console.print(
        f"  top 1 %     {share.samples:,} of {summary.samples:,} samples hold {share.norm:.1%} of the summed gradient "
        f"norms, {share.squared_norm:.1%} of the summed squared norms\n"
    )
    console.print(_quantiles(summary))
    console.print(_suspects(summary, scores))
    if summary.detection:
        console.print(_detection(summary))
    for kind, path in summary.files.items():
        console.print(f"  {kind:<8}{path}")


def suspect_cells(suspect: Suspect, scores: ScoreTable) -> dict[str, str]:
    """A suspect's row, `{title: text}`, with the columns its task has."""
    cells = {"sample": str(suspect.index)}
    if suspect.target is not None and suspect.prediction is not None:
        cells |= {
            "label": scores.class_name(suspect.target),
            "prediction": scores.class_name(suspect.prediction),
            "probability": f"{suspect.probability:.3f}",
            "EL2N": f"{suspect.el2n:.3f}",
        }
    cells |= {"loss": f"{suspect.loss:.4g}", "gradient norm": f"{suspect.grad_norm:.4g}"}
    if suspect.known_mislabelled is not None:
        cells["known wrong"] = "yes" if suspect.known_mislabelled else "no"
    return cells


def _console(width: int | None = None) -> Console:
    # Names of classes and files are the user's: nothing in them is markup.
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False, width=width)


def _quantiles(summary: Summary) -> Table:
    table = _table("Quantiles over samples", "score", *QUANTILES)
    for score, values in summary.quantiles.items():
        table.add_row(TITLES[score], *(f"{value:.4g}" for value in values.values()))
    return table


def _suspects(summary: Summary, scores: ScoreTable) -> Table:
    rows = [suspect_cells(suspect, scores) for suspect in summary.suspects]
    table = _table(f"Suspects: the highest by {TITLES[summary.ranked_by]}", *rows[0])
    for row in rows:
        table.add_row(*row.values())
    return table


def _detection(summary: Summary) -> Table:
    known = next(iter(summary.detection.values())).known
    title = f"The {known} samples known to be mislabelled, among the first {known} by each score"
    table = _table(title, "ranked by", "found", "precision", "recall", "average precision")
    for score, found in summary.detection.items():
        figures = (found.precision, found.recall, found.average_precision)
        table.add_row(TITLES[score], f"{found.found} of {known}", *(f"{figure:.3f}" for figure in figures))
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
