"""One clear line for everything that goes wrong outside our own code."""

import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from samplewise.errors import SamplewiseError

EXTRAS = ("jinja2", "matplotlib", "numpy", "pyarrow", "rich", "safetensors", "yaml")

_NOT_USERS = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_OURS = str(Path(__file__).parents[1])


class InputError(SamplewiseError):
    """Something the user gave cannot be used."""


def require(*packages: str) -> None:
    """Raise `InputError` when a package of the `cli` extra is not installed."""
    missing = [package for package in packages if not _importable(package)]
    if missing:
        raise InputError(f"missing package {', '.join(missing)}: pip install 'samplewise[cli]'")


def explain(error: BaseException) -> str:
    """The error as one line."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Turn an exception out of the user's code into one line that names the place in it."""
    try:
        yield
    except SamplewiseError as error:
        if _from_worker(error):
            raise InputError(f"{what}: {_place(error)}{_message(error)}") from error
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{what}: {_place(error)}{_message(error)} (--debug shows the traceback)") from error


def _importable(package: str) -> bool:
    try:
        import_module(package)
    except ImportError:
        return False
    return True


def _place(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: "
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if _from_worker(error):
        frames += [(file, int(line)) for file, line in re.findall(r'File "(.+)", line (\d+)', str(error))]
    users = [f"{file}:{line}: " for file, line in frames if _is_users(file)]
    return users[-1] if users else ""


def _message(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if _from_worker(error):
        return lines[-1]
    return ": ".join([type(error).__name__, *lines[:1]])


def _from_worker(error: BaseException) -> bool:
    # PyTorch's data workers send their traceback as the text of the error.
    return "Original Traceback (most recent call last)" in str(error)


def _is_users(file: str) -> bool:
    return not file.startswith((*_NOT_USERS, _OURS, "<"))
