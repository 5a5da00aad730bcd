"""What the scores say: who dominates the gradient, who looks mislabelled, and how well known errors are found."""

from collections.abc import Collection
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from .task import ScoringError, sample_indices

# Scores a sample can be ranked by, best at finding wrong labels first. Of the embedded example's 90, over seeds 0 to 4,
# the first 90 by EL2N hold 83.4 on average, by loss 82.8, by gradient norm 81.8.
RANKINGS = ("el2n", "loss", "grad_norm")


@dataclass(frozen=True)
class TopShare:
    """How much of the gradient the largest samples hold."""

    samples: int  # how many are in the top
    norm: float  # share of the summed gradient norms
    squared_norm: float  # share of the summed squared norms


@dataclass(frozen=True)
class Detection:
    """How well the top `k` of a ranking are the `k` samples known to be mislabelled.

    With as many suspects as known errors, precision and recall are the same number.
    """

    known: int
    found: int
    precision: float
    recall: float
    average_precision: float


def default_ranking(scores: dict[str, Tensor]) -> str:
    """EL2N for classifiers; otherwise the gradient norm, which needs no labels."""
    return "el2n" if "el2n" in scores else "grad_norm"


def rank(values: Tensor) -> Tensor:
    """Sample indices from the highest value down, `(n,)`; equal values keep data set order.

    Raises:
        ScoringError: if a value is not a number.

    Example:
        >>> rank(torch.tensor([1.0, 3.0, 2.0]))
        tensor([1, 2, 0])
    """
    if values.isnan().any():
        raise ScoringError(f"rank: the value of sample {int(values.isnan().nonzero()[0])} is not a number, it has no place")
    return values.argsort(descending=True, stable=True)


def top_share(norms: Tensor, fraction: float = 0.01) -> TopShare:
    """Share of the gradient held by the `fraction` of samples with the largest norms, at least one of them.

    Args:
        norms: per-sample gradient norms `(n,)`.
        fraction: between 0 and 1.

    Raises:
        ScoringError: if there are no norms, one of them is negative or not finite, or the fraction is none.

    Example:
        >>> top_share(torch.tensor([3.0, 1.0, 1.0, 1.0])).squared_norm
        0.75
    """
    if not len(norms) or not (norms.isfinite() & (norms >= 0)).all():
        raise ScoringError("top_share: expected the norms of one sample or more, finite and not negative")
    if not 0 <= fraction <= 1:
        raise ScoringError(f"top_share: fraction must lie between 0 and 1, got {fraction}")
    # Products such as 0.07 * 100 lie a little above the number they mean.
    count = max(1, ceil(round(fraction * len(norms), 6)))
    largest = norms.double().sort(descending=True).values
    return TopShare(count, _share(largest, count), _share(largest**2, count))


def detection(values: Tensor, mislabelled: Collection[int]) -> Detection:
    """Measure a ranking against the samples known to be mislabelled.

    Args:
        values: a score `(n,)`, higher is more suspect.
        mislabelled: indices of the samples whose label is known to be wrong, at least one.

    Raises:
        ScoringError: if there are none, or one is not an index of the values.

    Example:
        >>> detection(torch.tensor([0.1, 0.9, 0.8]), [1]).recall
        1.0
    """
    wrong = torch.zeros(len(values), dtype=torch.bool)
    wrong[sample_indices(mislabelled, len(values))] = True
    if not wrong.any():
        raise ScoringError("detection: no sample is known to be mislabelled, so there is nothing to find")
    known = int(wrong.sum())
    hits = wrong[rank(values)].double()
    found = int(hits[:known].sum())
    precisions = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return Detection(known, found, found / known, found / known, float((precisions * hits).sum() / known))


def _share(descending: Tensor, count: int) -> float:
    total = float(descending.sum())
    return float(descending[:count].sum()) / total if total > 0 else 0.0
