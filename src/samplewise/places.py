"""Where in the user's model a call was made, for messages."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

_OURS = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


def place(model: nn.Module) -> str:
    """The line that made the call now running, and the module it was made in: `in 'encoder.0' (model.py, line 12)`."""
    frame: Any = sys._getframe(1)  # noqa: SLF001
    names = {module: name for name, module in model.named_modules()}
    line = module = None
    while frame is not None and (line is None or module is None):
        if line is None and not frame.f_code.co_filename.startswith(_OURS):
            line = f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
        owner = frame.f_locals.get("self")
        if module is None and isinstance(owner, nn.Module) and owner in names:
            module = names[owner] or type(owner).__name__
        frame = frame.f_back
    return f"in '{module}' ({line})" if module else f"at {line}"
