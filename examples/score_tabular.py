"""Score the training data of your own classifier.

    samplewise score examples/score_tabular.py:setup --out runs/tabular

`setup` may do anything: read files, build the model, load weights. A checkpoint can also be given on the command line
(`--checkpoint weights.safetensors`), and then `setup` only has to build the model.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samplewise.attribution import ScoreTask

DATA = load_breast_cancer()


def per_sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One loss per sample `(n,)`, and the logits `(n, 2)` for EL2N, prediction and probability."""
    inputs, targets = batch
    logits = model(inputs)
    return F.cross_entropy(logits, targets, reduction="none"), logits


def setup() -> ScoreTask:
    """Called once; random generators are seeded before (`--seed`)."""
    inputs = torch.tensor(DATA.data, dtype=torch.float32)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    targets = torch.tensor(DATA.target)
    model = nn.Sequential(nn.Linear(30, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 2))
    train(model, inputs, targets)
    return ScoreTask(
        model,
        TensorDataset(inputs, targets),
        per_sample_loss,
        class_names=list(DATA.target_names),
        preview=most_unusual_features,
        name="Breast cancer, tabular",
    )


def train(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Thirty epochs of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(30):
        for members in torch.randperm(len(inputs)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[members]), targets[members]).backward()
            optimizer.step()


def most_unusual_features(item: tuple[Tensor, Tensor]) -> str:
    """What the report shows of a sample: the three features furthest from their mean."""
    inputs, _ = item
    furthest = inputs.abs().topk(3).indices.tolist()
    return ", ".join(f"{DATA.feature_names[k]} {inputs[k]:+.1f} sd" for k in furthest)
