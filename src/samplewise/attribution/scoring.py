"""Loss, gradient norm and, for classifiers, EL2N of every sample, in one pass over the data."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Subset, default_collate

import samplewise as sw

from .coverage import Coverage, coverage_of
from .groups import Groups, group_parameters, require_partition
from .neighbours import probes, require_own, rounding
from .task import ScoreTask, ScoringError, labels_of


@dataclass(frozen=True)
class ClassScores:
    """What logits add: the error of the prediction (EL2N, Paul et al. 2021), the label and the prediction."""

    el2n: Tensor  # (n,) ‖softmax(logits) - onehot(target)‖
    target: Tensor  # (n,)
    prediction: Tensor  # (n,)
    probability: Tensor  # (n,) of the prediction


@dataclass(frozen=True)
class BatchScores:
    """Scores of the samples `start ... start + n - 1`, on the CPU in float64."""

    start: int
    loss: Tensor  # (n,)
    group_norms: dict[str, Tensor]  # {group: (n,)}
    classes: ClassScores | None
    coverage: Coverage

    @property
    def stop(self) -> int:
        """One past the last sample."""
        return self.start + len(self.loss)

    @property
    def grad_norm(self) -> Tensor:
        """L2 norm over all parameters, `(n,)`: GraNd of Paul et al. 2021 for this one model."""
        return joint_norm(list(self.group_norms.values()))

    def columns(self) -> dict[str, Tensor]:
        """Every score by its column name, `{name: (n,)}`."""
        columns = {"index": torch.arange(self.start, self.stop), "loss": self.loss, "grad_norm": self.grad_norm}
        if self.classes is not None:
            columns |= vars(self.classes)
        return columns | {f"grad_norm.{group}": norms for group, norms in self.group_norms.items()}


def score(
    task: ScoreTask,
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    groups: Groups | None = None,
) -> dict[str, Tensor]:
    """Score every sample of the task's data set.

    Args:
        task: the model, data set and per-sample loss.
        batch_size: samples per backward pass; scores do not depend on it.
        device: where the model runs. The model stays there.
        groups: `{group: parameter names}`, every trainable parameter in exactly one, see `group_parameters`.

    Returns:
        `{column: (samples,)}` on the CPU: `index`, `loss`, `grad_norm`, `grad_norm.<group>` and, when the loss returns
        logits, `el2n`, `target`, `prediction`, `probability`.

    Raises:
        ScoringError: if losses are not per sample or not finite, naming the samples; if those of a few samples change with
            their order or their neighbours.
        SamplewiseError: if the model's gradients cannot be given to samples exactly.

    Example:
        >>> scores = score(task, batch_size=4)
        >>> scores["grad_norm"].shape
        torch.Size([8])
    """
    batches = score_batches(task, batch_size=batch_size, device=device, groups=groups)
    columns = [batch.columns() for batch in batches]
    return {name: torch.cat([column[name] for column in columns]) for name in columns[0]}


def score_batches(
    task: ScoreTask,
    *,
    start: int = 0,
    stop: int | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    groups: Groups | None = None,
    num_workers: int = 0,
) -> Iterator[BatchScores]:
    """Score the samples `start ... stop - 1` batch by batch, in data set order.

    The model is in evaluation mode while the iterator is alive and gets its training flags back afterwards.

    Args:
        task: the model, data set and per-sample loss.
        start: first sample.
        stop: one past the last sample; default: all.
        batch_size: samples per backward pass; scores do not depend on it.
        device: where the model runs. The model stays there.
        groups: `{group: parameter names}`, every trainable parameter in exactly one, see `group_parameters`.
        num_workers: processes that read the data.

    Yields:
        `BatchScores` of consecutive samples.

    Raises:
        ScoringError: if losses are not per sample or not finite, naming the samples; if those of a few samples change with
            their order or their neighbours.

    Example:
        >>> [batch.stop for batch in score_batches(task, batch_size=4)]
        [4, 8]
    """
    indices = range(len(task.dataset))[start:stop]
    model = task.model.to(device)
    groups = groups or group_parameters(trainable(model))
    require_partition(groups, trainable(model))
    loader: DataLoader[object] = DataLoader(
        Subset(task.dataset, indices),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=task.collate_fn or collate,
    )
    classifier: bool | None = None
    with evaluation(model):
        for number, batch in enumerate(loader):
            members = indices[number * batch_size : (number + 1) * batch_size]
            scores = score_batch(task, move(batch, device), members, groups)
            if classifier not in (None, scores.classes is not None):
                raise ScoringError("per_sample_loss must return logits for every batch or for none")
            classifier = scores.classes is not None
            if members.start == 0:
                _require_own_losses(task, indices, batch_size, device)
            yield scores


def score_batch(task: ScoreTask, batch: object, indices: range, groups: Groups) -> BatchScores:
    """Score one batch: one forward, one backward, no gradient kept. `indices` are its samples in the data set."""
    with sw.record(task.model, batch_size=len(indices)) as rec:
        losses, logits = _losses_and_logits(_evaluated(task, batch), indices)
        rec.backward(losses)
    coverage = coverage_of(rec, task.model)
    if not coverage.share:
        raise ScoringError(
            "per_sample_loss: the losses reach no trainable parameter of ScoreTask.model, whose gradients are all zero. "
            "Does the loss use another model than the one it is given?"
        )
    norms = {name: norm.detach().cpu().double() for name, norm in rec.norms(by="parameter").items()}
    group_norms = {group: joint_norm([norms[name] for name in names]) for group, names in groups.items()}
    for group, values in group_norms.items():
        _require_finite(f"gradient norms of '{group}'", values, indices)
    classes = None if logits is None else _class_scores(logits, labels_of(task, batch), indices)
    return BatchScores(indices.start, losses.detach().cpu().double(), group_norms, classes, coverage)


def _require_own_losses(task: ScoreTask, indices: range, batch_size: int, device: str | torch.device) -> None:
    """Raise when the losses of a few samples change with their places or with the batch they are in."""
    chosen = probes(indices, batch_size)
    if len(chosen) < 2:
        return
    items = {index: task.dataset[index] for index in chosen}

    def losses(members: list[int]) -> Tensor:
        batch = (task.collate_fn or collate)([items[index] for index in members])
        return _losses_and_logits(_evaluated(task, move(batch, device)), members)[0].detach().cpu().double()

    half = chosen[: max(2, len(chosen) // 2)]
    require_own(losses(chosen), losses(chosen), losses(chosen[::-1]), losses(half), rounding(task.model))


def joint_norm(norms: list[Tensor]) -> Tensor:
    """The norm over all of the parts whose norms, each `(n,)`, are given."""
    joined: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return joined


def trainable(model: nn.Module) -> list[str]:
    """Names of the parameters that get a gradient."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration, every module's training flag as before afterwards."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


def move(batch: object, device: str | torch.device) -> object:
    """The same batch with its tensors on `device`; mappings become plain dicts."""
    if isinstance(batch, Tensor | PackedSequence):
        return batch.to(device)  # type: ignore[arg-type]  # its stub knows dtypes only
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [move(value, device) for value in batch]
        kind: Any = type(batch)
        return kind(moved) if kind in (list, tuple) else kind(*moved)  # a named tuple takes its fields one by one
    return batch


def collate(items: list[Any]) -> object:
    """PyTorch's default collate, with an error that says what to do when it cannot stack the items."""
    try:
        return default_collate(items)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ScoringError(
            f"the default collate cannot make a batch of these items ({reason}). "
            "Give ScoreTask(collate_fn=...), for example one that pads."
        ) from error


def _evaluated(task: ScoreTask, batch: object) -> object:
    """What the loss returns, or an error when it calls a module of the model in training mode."""
    names = {module: name for name, module in task.model.named_modules()}

    def refuse_training(module: nn.Module, _: object) -> None:
        if module in names and module.training:
            what = f"its module '{names[module]}'" if names[module] else "the model"
            raise ScoringError(
                f"per_sample_loss: samples are scored in evaluation mode, but {what} is called in training mode. "
                "Does the loss call train()? Leave it out."
            )

    # For all modules, so that nothing is hung on those of the user.
    handle = register_module_forward_pre_hook(refuse_training)
    try:
        return task.per_sample_loss(task.model, batch)
    finally:
        handle.remove()


def _losses_and_logits(returned: object, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    losses, logits = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    n = len(indices)
    if not isinstance(losses, Tensor):
        raise ScoringError(f"per_sample_loss must return losses (n,), or (losses, logits); got {type(losses).__name__}")
    if losses.ndim == 0:
        raise ScoringError(
            f"per_sample_loss returned a scalar for {n} samples, expected shape ({n},): one loss per sample. "
            'PyTorch\'s losses give it with reduction="none".'
        )
    if losses.shape != (n,):
        raise ScoringError(
            f"per_sample_loss returned shape {tuple(losses.shape)} for {n} samples, expected ({n},): "
            "one loss per sample. Sum or average over what a sample has several of."
        )
    _require_finite("losses", losses, indices)
    if not losses.requires_grad:
        raise ScoringError(
            "per_sample_loss: the losses depend on no trainable parameter. Is the model called under torch.no_grad()?"
        )
    return losses, _checked_logits(logits, n)


def _checked_logits(logits: object, n: int) -> Tensor | None:
    if logits is None:
        return None
    if not isinstance(logits, Tensor):
        raise ScoringError(f"per_sample_loss must return (losses, logits), got {type(logits).__name__} for the logits")
    if logits.ndim != 2 or len(logits) != n or logits.shape[1] < 2:
        raise ScoringError(
            f"per_sample_loss returned logits of shape {tuple(logits.shape)}, expected ({n}, classes). "
            "Return the losses alone when the model is not a classifier."
        )
    return logits.detach().cpu().double()


def _class_scores(logits: Tensor, labels: Tensor, indices: range) -> ClassScores:
    n, classes = logits.shape
    if labels.shape != (n,) or labels.is_floating_point() or labels.is_complex():
        raise ScoringError(
            f"labels must be integers of shape ({n},), got {labels.dtype} {tuple(labels.shape)}. Give ScoreTask(labels=...)."
        )
    labels = labels.cpu().long()
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        raise ScoringError(f"labels must lie in 0 ... {classes - 1}; not so for {_listed(outside, indices)}")
    probabilities = logits.softmax(1)
    probability, prediction = probabilities.max(1)
    el2n = (probabilities - F.one_hot(labels, classes)).norm(dim=1)
    _require_finite("probabilities, softmax(logits),", el2n, indices)
    return ClassScores(el2n, labels, prediction, probability)


def _require_finite(what: str, values: Tensor, indices: Sequence[int]) -> None:
    finite = values.detach().isfinite()
    if not finite.all():
        raise ScoringError(f"{what} must be finite, not so for {_listed(~finite, indices)}")


def _listed(chosen: Tensor, indices: Sequence[int], most: int = 10) -> str:
    members = [str(indices[position]) for position in chosen.nonzero()[:, 0].tolist()]
    more = f" and {len(members) - most} more" if len(members) > most else ""
    return f"sample{'s' if len(members) > 1 else ''} {', '.join(members[:most])}{more}"
