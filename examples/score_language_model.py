"""Score the training texts of a language model: which one pulls hardest on the weights?

    samplewise score examples/score_language_model.py:setup --out runs/language-model

The loss returns one number per text and no logits, so texts are ranked by gradient norm. Items are mappings, as in
Hugging Face data sets, and the batch is padded by `collate`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samplewise.attribution import ScoreTask

PADDING = 0
ORDINARY = [
    f"the {animal} {verb} in the {place}"
    for animal in ("cat", "dog", "owl")
    for verb in ("sleeps", "waits", "hides")
    for place in ("house", "garden")
]
ODD = ["qzx! 9%% jvk ~~ 0x7f", "the the the the the the the the"]


class LanguageModel(nn.Module):
    """Characters in, logits of the next character out; embedding and head share their weight."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, width, padding_idx=PADDING)
        self.layers = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 128, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.layers(self.embedding(ids))
        return self.head(states)


def collate(items: list[dict[str, object]]) -> dict[str, Tensor]:
    """Pad to the longest text of the batch."""
    ids = [torch.tensor(list(str(item["text"]).encode())) for item in items]
    return {"ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PADDING)}


def per_sample_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss per character of each text: `(n,)`."""
    inputs, targets = batch["ids"][:, :-1], batch["ids"][:, 1:]
    losses = F.cross_entropy(model(inputs).transpose(1, 2), targets, ignore_index=PADDING, reduction="none")
    return losses.sum(1) / (targets != PADDING).sum(1)


def setup() -> ScoreTask:
    """Train for a moment, then describe the task."""
    dataset = [{"text": text} for text in ORDINARY + ODD]
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        per_sample_loss(model, collate(dataset)).mean().backward()
        optimizer.step()
    return ScoreTask(model, dataset, per_sample_loss, collate_fn=collate, name="Characters of short texts")
