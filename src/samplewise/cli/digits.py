"""The embedded example: scikit-learn's digits, some labels flipped, a small network trained on them."""

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samplewise.attribution import ScoreTask

from .failures import require
from .files import atomically
from .progress import Advance, progress

FLIPPED = 0.05
CLASSES = 10
# The same labels are flipped whatever --seed says.
FLIP_SEED = 0


def task(*, seed: int, epochs: int, weights: Path | None) -> ScoreTask:
    """The task, its network read from `weights`, where a run before kept them, or trained now."""
    require("sklearn")
    # The network is too small to gain from threads; on a busy machine they cost five times the time.
    torch.set_num_threads(1)
    images, labels = load()
    given, flipped = flip(labels)
    torch.manual_seed(seed)
    model = network()
    if weights is not None and weights.exists():
        _read_weights(model, weights)
    else:
        with progress("training", epochs * len(images)) as advance:
            train(model, images, given, epochs, advance)
    return ScoreTask(
        model,
        TensorDataset(images, given),
        per_sample_loss,
        class_names=[str(digit) for digit in range(CLASSES)],
        known_mislabelled=flipped.tolist(),
        name="Handwritten digits, 5 % of the labels flipped",
    )


def keep(model: nn.Module, weights: Path) -> None:
    """Keep the trained weights for a resumed run."""
    from safetensors.torch import save_file  # noqa: PLC0415

    with atomically(weights) as partial:
        save_file(model.state_dict(), partial)


def load() -> tuple[Tensor, Tensor]:
    """Images `(1797, 1, 8, 8)` from 0 to 1 and labels `(1797,)`."""
    from sklearn.datasets import load_digits  # noqa: PLC0415

    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)


def flip(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Give 5 % of the samples another label: `(labels (n,), indices of the flipped)`."""
    generator = torch.Generator().manual_seed(FLIP_SEED)
    count = round(FLIPPED * len(labels))
    flipped = torch.randperm(len(labels), generator=generator)[:count].sort().values
    given = labels.clone()
    given[flipped] = (labels[flipped] + torch.randint(1, CLASSES, (count,), generator=generator)) % CLASSES
    return given, flipped


def network() -> nn.Module:
    """Three convolutions and a linear layer: 15,434 parameters."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            norm1=nn.GroupNorm(4, 16),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 3, padding=1, stride=2),
            norm2=nn.GroupNorm(4, 32),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(32, 32, 3, padding=1, stride=2),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            head=nn.Linear(128, CLASSES),
        )
    )


def per_sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy `(n,)` and logits `(n, 10)`."""
    images, labels = batch
    logits = model(images)
    return F.cross_entropy(logits, labels, reduction="none"), logits


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, advance: Advance) -> None:
    """A few epochs: enough to learn the digits, too few to learn the wrong labels by heart."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for members in torch.split(torch.randperm(len(images)), 64):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(images[members]), labels[members]))
            optimizer.step()
            advance(len(members))


def _read_weights(model: nn.Module, weights: Path) -> None:
    from safetensors.torch import load_file  # noqa: PLC0415

    model.load_state_dict(load_file(weights))
