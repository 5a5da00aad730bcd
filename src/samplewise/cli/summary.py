"""The figures of a run, of which the tables, the report and the JSON are made."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import Tensor

from samplewise.attribution import Coverage, Detection, TopShare, default_ranking, detection, rank, top_share

from .failures import InputError
from .table import ScoreTable

QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p99": 0.99, "max": 1.0}
TITLES = {"el2n": "EL2N", "loss": "loss", "grad_norm": "gradient norm"}


@dataclass(frozen=True)
class Suspect:
    """A sample near the top of a ranking."""

    index: int
    loss: float
    grad_norm: float
    el2n: float | None = None
    target: int | None = None
    prediction: int | None = None
    probability: float | None = None
    known_mislabelled: bool | None = None


@dataclass(frozen=True)
class Summary:
    """The figures of a run; `--json` prints exactly these."""

    name: str
    samples: int
    coverage: Coverage
    quantiles: dict[str, dict[str, float]]  # score -> quantile -> value
    top_share: TopShare
    group_shares: dict[str, float]  # group -> share of the summed squared norms
    ranked_by: str
    suspects: list[Suspect]
    detection: dict[str, Detection]  # ranking -> how well it finds the known errors; empty if none are known
    files: dict[str, str]


def summarize(table: ScoreTable, *, name: str, ranked_by: str | None, top: int, files: dict[str, Path]) -> Summary:
    """Sum up a table of scores."""
    ranked_by = ranked_by or default_ranking(table.columns)
    if ranked_by not in table.scores:
        raise InputError(f"--rank-by {ranked_by}: the loss returned no logits, choose from {', '.join(table.scores)}")
    return Summary(
        name=name,
        samples=len(table),
        coverage=table.coverage,
        quantiles={score: quantiles(values) for score, values in table.scores.items()},
        top_share=top_share(table.columns["grad_norm"]),
        group_shares=group_shares(table.groups),
        ranked_by=ranked_by,
        suspects=suspects(table, ranked_by, top),
        detection=detections(table),
        files={kind: str(path) for kind, path in files.items()},
    )


def quantiles(values: Tensor) -> dict[str, float]:
    """Quantiles `QUANTILES` of `(n,)` values, each the value of a sample."""
    ordered = values.sort().values
    return {name: float(ordered[round(level * (len(ordered) - 1))]) for name, level in QUANTILES.items()}


def group_shares(groups: dict[str, Tensor]) -> dict[str, float]:
    """Share of each group in the squared norms summed over samples."""
    squares = {group: float((norms**2).sum()) for group, norms in groups.items()}
    total = sum(squares.values()) or 1.0
    return {group: square / total for group, square in squares.items()}


def detections(table: ScoreTable) -> dict[str, Detection]:
    """How well each score finds the known errors; empty if none are known."""
    known = table.mislabelled
    return {score: detection(values, known) for score, values in table.scores.items()} if known else {}


def suspects(table: ScoreTable, ranked_by: str, top: int) -> list[Suspect]:
    """The `top` samples by a score, highest first."""
    return [suspect(table, row) for row in rank(table.columns[ranked_by])[:top].tolist()]


def suspect(table: ScoreTable, row: int) -> Suspect:
    """The sample of a row."""
    names = [field.name for field in fields(Suspect) if field.name in table.columns]
    return Suspect(**{name: table.columns[name][row].item() for name in names})  # type: ignore[arg-type]


def as_json(summary: Summary) -> dict[str, object]:
    """The summary as plain values."""
    values = asdict(summary)
    return {**values, "coverage": {"share": summary.coverage.share, **values["coverage"]}}
