"""What has to be the same for a run to go on: options, weights and data."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from hashlib import sha256
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
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


@runtime_checkable
class _Array(Protocol):
    def __array__(self) -> npt.NDArray[Any]: ...


@runtime_checkable
class _ArrayInterface(Protocol):
    @property
    def __array_interface__(self) -> dict[str, Any]: ...


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
        _add_tensor(digest, value.detach())
    elif isinstance(value, _Array | _ArrayInterface):
        _add_array(digest, np.asarray(value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _add(digest, key)
            _add(digest, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _add(digest, item)
    elif isinstance(value, AbstractSet):
        _add(digest, sorted(_digest(item) for item in value))
    elif is_dataclass(value) and not isinstance(value, type):
        _add(digest, [getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, str | bytes | int | float | complex | None):
        digest.update(repr(value).encode(errors="surrogatepass"))
    else:
        digest.update(type(value).__qualname__.encode())


def _add_tensor(digest: _Hash, value: Tensor) -> None:
    digest.update(f"{value.dtype} {value.layout}".encode())
    if value.is_nested:
        _add(digest, list(value.unbind()))
    elif value.layout != torch.strided:
        value = value.to_sparse().coalesce()
        _add(digest, [tuple(value.shape), value.indices(), value.values()])
    else:
        value = value.cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(f"{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())


def _add_array(digest: _Hash, value: npt.NDArray[Any]) -> None:
    digest.update(f"{value.dtype} {value.shape}".encode())
    if value.dtype.hasobject:  # its bytes are addresses
        _add(digest, value.ravel().tolist())
    else:
        digest.update(np.ascontiguousarray(value).tobytes())


def _digest(value: object) -> str:
    digest = sha256()
    _add(digest, value)
    return digest.hexdigest()
