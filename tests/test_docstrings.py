"""Every example in a public docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import samplewise
from samplewise.attribution import ScoreTask

README = Path(__file__).parents[1] / "README.md"
# kernels need Triton, and nothing in them is public
MODULES = [
    m.name for m in pkgutil.walk_packages(samplewise.__path__, "samplewise.") if not m.name.endswith(("__main__", ".kernels"))
]
MODEL, DATASET = nn.Linear(4, 3), TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


# what an example may take for granted
NAMES = {
    "torch": torch,
    "nn": nn,
    "F": F,
    "sw": samplewise,
    "TensorDataset": TensorDataset,
    "SimpleNamespace": SimpleNamespace,
    "model": MODEL,
    "dataset": DATASET,
    "loss": loss,
    "task": ScoreTask(MODEL, DATASET, loss),
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    torch.manual_seed(0)
    found = doctest.testmod(importlib.import_module(name), extraglobs=NAMES, optionflags=doctest.ELLIPSIS)
    assert not found.failed


def test_there_are_examples() -> None:
    assert sum(doctest.testmod(importlib.import_module(name), extraglobs=NAMES).attempted for name in MODULES) > 20


def test_the_readme_s_first_examples_run() -> None:
    """Ten lines, a private step that changes the model of theirs, and the like traced."""
    ten_lines, step, traced = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[:3]
    names: dict[str, Any] = {}
    exec(ten_lines, names)
    before = [p.detach().clone() for p in names["model"].parameters()]
    exec(step, names)
    torch.testing.assert_close(names["norms"], names["rec"].norms())
    assert all((p - old).abs().max() > 0 for p, old in zip(names["model"].parameters(), before, strict=True))
    exec(traced, names)
    assert names["norms"].shape == (5,)
