"""Whether a loss is its sample's own: at the sample's place, and the same among other samples."""

import torch
from torch import Tensor, nn

from .task import ScoringError

PROBES = 8  # samples tried, at most
# Of the largest loss: far above rounding between batches of different size, far below a mean over another number.
TOLERANCE = 0.02
# Losses near zero are rounding alone: in units of the last place of one, in the model's coarsest type.
LAST_PLACES = 8


def probes(samples: range, batch_size: int) -> list[int]:
    """A few samples spread over all, `PROBES` or what a batch holds."""
    count = min(PROBES, batch_size, len(samples))
    return [samples[k * (len(samples) - 1) // max(1, count - 1)] for k in range(count)]


def rounding(model: nn.Module) -> float:
    """Differences of losses that mean nothing, however small the losses are."""
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return LAST_PLACES * max((torch.finfo(kind).eps for kind in types), default=0.0)


def require_own(once: Tensor, again: Tensor, backwards: Tensor, half: Tensor, rounding: float) -> None:
    """Raise when losses do not follow their samples into other batches. Random losses, which differ anyway, tell nothing.

    Args:
        once: losses `(n,)` of n samples.
        again: the same, computed again.
        backwards: losses of the same samples in the opposite order.
        half: losses of the first of them alone.
        rounding: differences that mean nothing.
    """
    allowed = max(TOLERANCE * float(once.abs().max()), rounding)
    if _apart(once, again) > allowed:
        return
    if _apart(once, backwards.flip(0)) > allowed:
        raise ScoringError(
            "per_sample_loss: losses do not stay at their samples' places, so scores would go to the wrong samples: in the "
            "opposite order, samples have other losses. Does collate_fn or the loss sort or mix the batch? --batch-size 1 or "
            "batch_size=1 does without."
        )
    if _apart(once[: len(half)], half) > allowed:
        raise ScoringError(
            f"per_sample_loss: a sample's loss depends on its batch: it is {float(once[0]):.4g} among {len(once)} samples and "
            f"{float(half[0]):.4g} among {len(half)} for the first of them. Divide by what the sample has, not by the size or "
            "the padded length of the batch. batch_size=1 or --batch-size 1 does without."
        )


def alike(once: Tensor, again: Tensor, rounding: float) -> bool:
    """Whether two scorings of the same samples agree but for rounding; integers have none."""
    if not once.is_floating_point():
        return torch.equal(once, again)
    return _apart(once, again) <= max(TOLERANCE * float(once.abs().max()), rounding)


def _apart(first: Tensor, second: Tensor) -> float:
    return float(torch.linalg.vector_norm(first - second, ord=torch.inf))
