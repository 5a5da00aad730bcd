"""The report: one HTML file that needs no network."""

from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from samplewise.attribution import ScoreTask

from . import charts
from .previews import Preview, preview
from .printed import suspect_cells
from .run_directory import Facts
from .summary import QUANTILES, TITLES, Summary, suspects
from .table import ScoreTable

# The report has room for more suspects than a terminal.
MORE_SUSPECTS = 4
MOST_GROUPS = 12


@dataclass(frozen=True)
class Card:
    """A suspect as shown."""

    cells: dict[str, str]
    preview: Preview
    wrong: bool


@dataclass(frozen=True)
class Section:
    """The highest samples by one score."""

    title: str
    explanation: str
    cards: list[Card]


EXPLANATIONS = {
    "el2n": "Far from their label: wrong labels, ambiguous or rare samples. Look at the label before anything else.",
    "loss": "Hard for the model: wrong labels, ambiguous or rare samples. Look at the label before anything else.",
    "grad_norm": "Pull hardest on the weights: they dominate a training step, whether their label is right or wrong.",
}


def render(table: ScoreTable, task: ScoreTask, summary: Summary, facts: Facts, top: int) -> str:
    """The whole page."""
    ranked = list(dict.fromkeys([summary.ranked_by, "grad_norm"]))
    sections = [_section(table, task, score, top * MORE_SUSPECTS) for score in ranked]
    marked, marked_name = _marked(table, summary, top)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        summary=summary,
        sections=sections,
        histogram=Markup(charts.norm_histogram(table, marked, marked_name)),  # noqa: S704  (our own drawing)
        scatter=Markup(charts.loss_against_norm(table, marked, marked_name)),  # noqa: S704
        facts=_flat(facts),
        titles=TITLES,
        quantile_names=list(QUANTILES),
        group_shares=_largest(summary.group_shares),
        known=len(table.mislabelled),
    )


def _marked(table: ScoreTable, summary: Summary, top: int) -> tuple[list[int], str]:
    """What the charts point out: the truth where it is known, else the suspects."""
    if table.mislabelled:
        return table.mislabelled, "labels known to be wrong"
    return [row.index for row in suspects(table, summary.ranked_by, top * MORE_SUSPECTS)], "suspects"


def _largest(shares: dict[str, float]) -> dict[str, float]:
    """The largest groups in the model's order, the others as one."""
    kept = sorted(shares, key=lambda group: -shares[group])[:MOST_GROUPS]
    others = len(shares) - len(kept)
    rest = {f"{others} others": sum(shares.values()) - sum(shares[group] for group in kept)} if others else {}
    return {group: share for group, share in shares.items() if group in kept} | rest


def _section(table: ScoreTable, task: ScoreTask, score: str, count: int) -> Section:
    cards = [
        Card(suspect_cells(suspect, table), preview(task, suspect.index), bool(suspect.known_mislabelled))
        for suspect in suspects(table, score, count)
    ]
    return Section(f"Highest {TITLES[score]}", EXPLANATIONS[score], cards)


def _flat(facts: Facts, prefix: str = "") -> dict[str, str]:
    rows: dict[str, str] = {}
    for name, value in facts.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            rows |= _flat(value, f"{label}: ")
        elif value is not None:
            rows[label] = str(value)
    return rows
