"""What has to be the same for a run to go on: options, weights and data."""

from collections.abc import Mapping
from hashlib import sha256
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from samplewise import __version__
from samplewise.attribution import ScoreTask

from . import checkpoint, setup_file
from .options import ScoreOptions
from .run_directory import Facts

SHOWN = 12  # hexadecimal digits


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def settings(options: ScoreOptions) -> Facts:
    """What the command line says; known before the model is built."""
    target = None if options.target is None else setup_file.find(options.target)
    return {
        "samplewise_version": __version__,
        "target": str(target or "embedded example: digits"),
        "source": target and target.digest[:SHOWN],
        "checkpoint": options.checkpoint and checkpoint.digest(options.checkpoint)[:SHOWN],
        "epochs": options.epochs if target is None else None,
        "seed": options.seed,
        "limit": options.limit,
        "groups": options.groups,
    }


def contents(task: ScoreTask, samples: int) -> Facts:
    """What the model and the data hold: every weight, and the first, middle and last item."""
    places = sorted({0, samples // 2, samples - 1})
    return {"samples": samples, "model": model_digest(task.model), "data": data_digest(task, places)}


def model_digest(model: nn.Module) -> str:
    """Hash of every parameter and buffer, and of which parameters are trained."""
    digest = sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            _add(digest, name)
            _add(digest, tensor)
    _add(digest, [name for name, parameter in model.named_parameters() if parameter.requires_grad])
    return digest.hexdigest()[:SHOWN]


def data_digest(task: ScoreTask, places: list[int]) -> str:
    """Hash of the items at `places`; "random" when reading an item twice gives two values."""
    first, second = (_items_digest(task, places) for _ in range(2))
    return first if first == second else "random"


def _items_digest(task: ScoreTask, places: list[int]) -> str:
    digest = sha256()
    for place in places:
        _add(digest, task.dataset[place])
    return digest.hexdigest()[:SHOWN]


def _add(digest: _Hash, value: object) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _add(digest, key)
            _add(digest, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _add(digest, item)
    elif isinstance(value, str | bytes | int | float | None):
        digest.update(repr(value).encode())
    else:
        digest.update(type(value).__qualname__.encode())
