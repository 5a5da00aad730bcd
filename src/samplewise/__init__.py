"""Exact per-sample gradients for any PyTorch model, in one backward pass.

The names below are the public interface. They are imported on first use, so that `samplewise --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import testing as testing
    from .buffers import release_buffers as release_buffers
    from .errors import MixedSamplesError as MixedSamplesError
    from .errors import SampleAxisError as SampleAxisError
    from .errors import SamplewiseError as SamplewiseError
    from .errors import UnsupportedOpError as UnsupportedOpError
    from .errors import VerificationError as VerificationError
    from .projections import GaussianProjection as GaussianProjection
    from .quantities import Record as Record
    from .quantities import record as record
    from .registry import expand as expand
    from .registry import rule as rule
    from .strategy import calibrate as calibrate
    from .streaming import clipped_grads as clipped_grads
    from .streaming import per_sample_grads as per_sample_grads
    from .streaming import per_sample_norms as per_sample_norms
    from .tracing import traced as traced
    from .verification import verify as verify

_HOME = {
    "MixedSamplesError": "errors",
    "SampleAxisError": "errors",
    "SamplewiseError": "errors",
    "UnsupportedOpError": "errors",
    "VerificationError": "errors",
    "GaussianProjection": "projections",
    "release_buffers": "buffers",
    "Record": "quantities",
    "clipped_grads": "streaming",
    "per_sample_grads": "streaming",
    "per_sample_norms": "streaming",
    "record": "quantities",
    "expand": "registry",
    "rule": "registry",
    "calibrate": "strategy",
    "traced": "tracing",
    "verify": "verification",
}
__all__ = [*_HOME, "testing"]  # noqa: PLE0604  (a list of strings, built from the table above)
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "testing":
        return import_module(".testing", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'samplewise' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # the function, also where a submodule has the same name
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
