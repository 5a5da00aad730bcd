"""Weights from a file that holds tensors and nothing else: no code is ever unpickled."""

from collections.abc import Mapping
from hashlib import file_digest
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from .failures import InputError

# Where training scripts put the weights when they save more than those.
NESTED_KEYS = ("state_dict", "model_state_dict", "model")


def digest(path: Path) -> str:
    """Hash of the file."""
    if not path.is_file():
        raise InputError(f"checkpoint {path}: there is no such file")
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def load(model: nn.Module, path: Path) -> None:
    """Load every weight of the model from the file, or raise `InputError` naming those that do not fit."""
    found = _read(path)
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    differing = [name for name in own if name in found and own[name].shape != found[name].shape]
    wrong = [f"{name} has shape {tuple(found[name].shape)}, expected {tuple(own[name].shape)}" for name in differing]
    given = {own[name].data_ptr() for name in own if name in found}
    # Tied weights are often saved under one of their names only.
    missing = [name for name in own if name not in found and own[name].data_ptr() not in given]
    unexpected = [name for name in found if name not in own]
    problems = [*wrong[:3], *_listed("missing", missing), *_listed("unexpected", unexpected)]
    if problems:
        raise InputError(f"checkpoint {path} does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(found, strict=False)
    # Tied weights have one value; a file that holds two of them is of another model.
    other = [name for name in found if not _same(own[name], found[name])]
    if other:
        raise InputError(f"checkpoint {path} does not fit the model: {'; '.join(_listed('it cannot take', other))}")


def _same(own: Tensor, found: Tensor) -> bool:
    return torch.allclose(own, found.to(own.device, own.dtype), rtol=0, atol=0, equal_nan=True)


def _read(path: Path) -> dict[str, Tensor]:
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_tensors_only(path)
    if isinstance(loaded, Mapping):
        loaded = next((loaded[key] for key in NESTED_KEYS if isinstance(loaded.get(key), Mapping)), loaded)
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"checkpoint {path}: expected a state dict of tensors, such as model.state_dict()")
    return dict(loaded)


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415

    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"checkpoint {path} is not a readable safetensors file: {error}") from error


def _read_tensors_only(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"checkpoint {path} cannot be read, or holds more than tensors. Pickled code is never run: "
            "save model.state_dict() alone"
        ) from error


def _listed(kind: str, names: list[str], most: int = 3) -> list[str]:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{kind} {', '.join(names[:most])}{more}"] if names else []
