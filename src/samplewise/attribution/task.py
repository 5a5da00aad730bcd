"""What a user hands over to have training samples scored: the model, the data set and the loss of each sample."""

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from samplewise import SamplewiseError

# Where a batch keeps its class labels when `ScoreTask.labels` does not say.
LABEL_KEYS = ("label", "labels", "target", "targets", "y")

PerSampleLoss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]


class ScoringError(SamplewiseError):
    """The task, its data or its losses cannot be scored."""


@runtime_checkable
class MapDataset(Protocol):
    """A data set with a length and items by index, such as any map-style `torch.utils.data.Dataset`, or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> object: ...


@dataclass(frozen=True)
class ScoreTask:
    """A model, its training data and its per-sample loss.

    Attributes:
        model: any module with trainable parameters. It is scored in evaluation mode: no sample influences another.
        dataset: map-style; items are `(input, target, ...)`, mappings, or whatever `collate_fn` takes.
        per_sample_loss: `loss(model, batch) -> (n,)`, one loss per sample and no reduction. A classifier returns
            `(losses, logits)`, logits of shape `(n, classes)`, and gets EL2N, prediction and probability without a
            second forward. (For a single logit `z` of shape `(n,)`: `torch.stack([torch.zeros_like(z), z], 1)`.)
        labels: `labels(batch) -> (n,)` integers. Default: `batch[1]`, or the first of `LABEL_KEYS` in a mapping.
        class_names: shown instead of class numbers in tables.
        collate_fn: makes a batch of a list of items. Default: that of `torch.utils.data.DataLoader`.
        preview: `preview(item)` gives an image tensor `(h, w)` or `(c, h, w)`, or a text, for the report. Default: the
            item's first entry or one under "image", "pixel_values" or "text", where it looks like an image or a text.
        known_mislabelled: indices known to carry a wrong label, to measure how well the scores find them.
        name: the title of the report. Default: where the task comes from.

    Raises:
        ScoringError: if an attribute is of the wrong kind, the data set is empty, no parameter is trainable or a sample
            known to be mislabelled is not in the data set.

    Example:
        >>> def per_sample_loss(model, batch):
        ...     inputs, targets = batch
        ...     logits = model(inputs)
        ...     return F.cross_entropy(logits, targets, reduction="none"), logits
        >>> task = ScoreTask(nn.Linear(4, 3), TensorDataset(torch.randn(8, 4), torch.arange(8) % 3), per_sample_loss)
    """

    model: nn.Module
    dataset: MapDataset
    per_sample_loss: PerSampleLoss
    _: KW_ONLY
    labels: Callable[[Any], Tensor] | None = None
    class_names: Sequence[str] = ()
    collate_fn: Callable[[list[Any]], Any] | None = None
    preview: Callable[[Any], object] | None = None
    known_mislabelled: Collection[int] = ()
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ScoringError(f"ScoreTask: model must be a torch.nn.Module, got {_kind(self.model)}")
        if not isinstance(self.dataset, MapDataset) or isinstance(self.dataset, IterableDataset):
            raise ScoringError(
                f"ScoreTask: dataset must be map-style (have __len__ and __getitem__), got {_kind(self.dataset)}. "
                "Read an iterable data set into a list first."
            )
        if not callable(self.per_sample_loss):
            raise ScoringError(
                f"ScoreTask: per_sample_loss must be a function (model, batch) -> (n,), got {_kind(self.per_sample_loss)}"
            )
        for name in ("labels", "collate_fn", "preview"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ScoringError(f"ScoreTask: {name} must be a function, got {_kind(getattr(self, name))}")
        if isinstance(self.class_names, Mapping | AbstractSet):
            raise ScoringError(
                f"ScoreTask: class_names must be a sequence, the name of class k at place k, got {_kind(self.class_names)}"
            )
        if len(self.dataset) == 0:
            raise ScoringError("ScoreTask: the data set is empty, there is nothing to score")
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ScoringError("ScoreTask: no parameter of the model has requires_grad=True, so there is no gradient to score")
        sample_indices(self.known_mislabelled, len(self.dataset))


def as_score_task(value: object) -> ScoreTask:
    """Take what a user's `setup()` returned: a `ScoreTask`, or any object with its attributes.

    Raises:
        ScoringError: if a required attribute is missing, naming it.

    Example:
        >>> as_score_task(SimpleNamespace(model=model, dataset=dataset, per_sample_loss=loss)).class_names
        ()
    """
    if isinstance(value, ScoreTask):
        return value
    absent = object()
    found = {field.name: getattr(value, field.name, absent) for field in fields(ScoreTask)}
    missing = [name for name in ("model", "dataset", "per_sample_loss") if found[name] is absent]
    if missing:
        raise ScoringError(
            "expected a samplewise.attribution.ScoreTask (or an object with the attributes model, dataset and "
            f"per_sample_loss); got {_kind(value)} without {', '.join(missing)}"
        )
    return ScoreTask(**{name: item for name, item in found.items() if item is not absent})  # type: ignore[arg-type]


def sample_indices(known: Collection[int], samples: int) -> Tensor:
    """Indices of samples, checked: `(k,)`."""
    indices = torch.tensor([operator.index(index) for index in known if not _is_bool(index)], dtype=torch.long)
    if len(indices) < len(known):
        raise ScoringError("known_mislabelled must be indices of samples, got truth values: give mask.nonzero() instead")
    outside = indices[(indices < 0) | (indices >= samples)]
    if len(outside):
        raise ScoringError(f"known_mislabelled must lie in 0 ... {samples - 1}, not so for {int(outside[0])}")
    return indices


def labels_of(task: ScoreTask, batch: object) -> Tensor:
    """Class labels of a batch, as the task or the usual places give them: `(n,)`, unchecked."""
    if task.labels is not None:
        labels = task.labels(batch)
        if not isinstance(labels, Tensor):
            raise ScoringError(f"ScoreTask(labels=...) must return a tensor of integers (n,), got {_kind(labels)}")
        return labels
    found: object = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, Sequence) and len(batch) > 1:
        found = batch[1]
    if not isinstance(found, Tensor):
        raise ScoringError(
            "the loss returned logits, but the batch has no labels where they are usually found "
            f"(batch[1], or one of the keys {', '.join(LABEL_KEYS)}). Give ScoreTask(labels=lambda batch: ...)."
        )
    return found


def _is_bool(value: object) -> bool:
    return getattr(value, "dtype", type(value)) in (bool, torch.bool)  # of Python, NumPy or PyTorch


def _kind(value: object) -> str:
    return "None (is a return statement missing?)" if value is None else type(value).__name__
