"""What the user asked for."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ScoreOptions:
    """Options of `samplewise score`; `main.parser` describes them."""

    target: str | None
    out: Path | None
    checkpoint: Path | None
    batch_size: int
    device: str
    num_workers: int
    limit: int | None
    groups: str | None
    rank_by: str | None
    top: int
    seed: int
    epochs: int
    resume: bool
    overwrite: bool
    save_every: float
    json: bool
    debug: bool
