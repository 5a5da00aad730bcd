"""The user's file: found, imported, called."""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import torch

from samplewise.attribution import ScoreTask, ScoringError, as_score_task

from .failures import InputError, user_code


@dataclass(frozen=True)
class SetupFile:
    """`path/to/file.py:function`."""

    path: Path
    function: str

    def __str__(self) -> str:
        return f"{self.path}:{self.function}"

    @property
    def digest(self) -> str:
        """Hash of the source, so that a run does not go on with another loss."""
        return sha256(self.path.read_bytes()).hexdigest()

    def task(self, seed: int) -> ScoreTask:
        """Import the file, call the function, the generators seeded before both; check what it returned."""
        seed_everything(seed)
        function = self._function()
        seed_everything(seed)
        with user_code(f"{self.function}() failed"):
            returned = function()
        try:
            return as_score_task(returned)
        except ScoringError as error:
            raise InputError(f"{self}: {error}") from error

    def _function(self) -> Callable[[], object]:
        # What the file imports may lie beside it or where the command was started.
        sys.path[:0] = [str(self.path.parent.resolve()), str(Path.cwd())]
        name = self.path.stem if self.path.stem not in sys.modules else f"samplewise_setup_{self.path.stem}"
        spec = spec_from_file_location(name, self.path)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[name] = module
        with user_code(f"{self.path} cannot be imported"):
            spec.loader.exec_module(module)
        function = vars(module).get(self.function)
        if not callable(function):
            raise InputError(f"{self.path} has no function {self.function}(); name it as {self.path}:FUNCTION")
        return function  # type: ignore[no-any-return]


def find(target: str) -> SetupFile:
    """Split `file.py:function` and check that the file is there."""
    path, _, function = (target if ".py:" in target else f"{target}:setup").rpartition(":")
    if not path.endswith(".py") or not function.isidentifier():
        raise InputError(f"target {target!r}: expected FILE.py:FUNCTION, such as train.py:setup")
    if not Path(path).is_file():
        raise InputError(f"target {target!r}: there is no file {path}")
    return SetupFile(Path(path), function)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, so that an untrained or shuffled set-up is the same on resume."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (users' code may draw from the global generator)
    torch.manual_seed(seed)
