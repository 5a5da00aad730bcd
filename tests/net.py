"""A model written as one function of itself and its input."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    """Runs a function of itself, its parts among its attributes, and its input."""

    def __init__(self, run: Callable[["Net", Any], Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))
