"""A trace as a CUDA graph, which the host launches as a whole."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedOpError
from .running import unrecorded
from .trace import Trace, memory

_DEVICE = "cuda"
_INSTEAD = "Leave out capture=True, and the same ops are launched one by one."


def refuse_uncaptured(trace: Trace, given: Sequence[Tensor]) -> None:
    """Refuse to capture what a graph would not repeat."""
    obstacle = _obstacle(trace, given)
    if obstacle is not None:
        raise UnsupportedOpError(f"traced: with capture=True {obstacle}. {_INSTEAD}")


def _obstacle(trace: Trace, given: Sequence[Tensor]) -> str | None:
    devices = _devices(trace, given)
    if {device.type for device in devices} != {_DEVICE} or len(devices) > 1:
        found = " and ".join(sorted(map(str, devices))) or "none"
        return f"the model, the batch and all that is computed of them must be on one CUDA device, found {found}"
    if any(memory(x) in trace.writes for x in given):
        return "the model or the losses write to the batch, and would write to a copy of it"
    if any(x.is_conj() or x.is_neg() for x in given):
        return "a tensor of the batch is a view that conjugates or negates, which its copy would not be"
    return None


def _devices(trace: Trace, given: Sequence[Tensor]) -> set[torch.device]:
    """Those of numbers that vary; meta tensors have none."""
    return {device for device in trace.devices.union(x.device for x in given) if device.type != "meta"}


class Pool:
    """Memory that the graphs of one function share, since no two of them run at once."""

    def __init__(self) -> None:
        # after the last call of any of them, in whatever stream that was
        self.done: torch.cuda.Event | None = None

    @functools.cached_property
    def handle(self) -> Any:
        """What CUDA knows it by."""
        return torch.cuda.graph_pool_handle()


class Captured:
    """A trace that is launched as a whole, from the second call on for which all that it holds is at the same addresses."""

    def __init__(self, trace: Trace, pool: Pool) -> None:
        self.trace, self._pool = trace, pool
        self._addresses = _addresses(trace)
        self._replay: _Replay | None = None

    def fits(self, given: Sequence[Tensor]) -> bool:
        """Whether the trace holds for a batch."""
        return self.trace.fits(given)

    def __call__(self, given: Sequence[Tensor]) -> Any:
        """Run it with other values of the tensors that it was given."""
        if torch.cuda.is_current_stream_capturing():
            # as a part of somebody's own graph
            return self.trace(given)
        before, self._addresses = self._addresses, _addresses(self.trace)
        if before != self._addresses:
            self._replay = None
        elif self._replay is not None:
            return self._replay(given)
        result = self.trace(given)
        if before == self._addresses:
            self._replay = _Replay(self.trace, given, self._pool)
        return result


def _addresses(trace: Trace) -> list[int]:
    return [x.data_ptr() for x in trace.held]


class _Replay:
    """The ops of a trace in a CUDA graph, of a batch in memory of its own.

    All that the trace holds is read, and written to, at the addresses that it has now.
    """

    def __init__(self, trace: Trace, given: Sequence[Tensor], pool: Pool) -> None:
        """Capture it, for batches like this one; nothing runs."""
        self._trace, self._pool = trace, pool
        (self._device,) = _devices(trace, given)
        self._outside = set(map(memory, trace.held))
        self._written = [x for x in trace.held if memory(x) in trace.writes]
        with torch.cuda.device(self._device):
            self._fed = list(map(_own, given))
            self._graph, self._found = _captured(lambda: trace.ran(self._fed), pool)

    def __call__(self, given: Sequence[Tensor]) -> Any:
        """The results for another batch, in memory of their own."""
        with unrecorded(), torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._pool.done is not None:
                stream.wait_event(self._pool.done)
            for own, x in zip(self._fed, given, strict=True):
                _extent(own).copy_(_extent(x))
                # or its memory could be another's before this stream has read it
                own.record_stream(stream)
            self._graph.replay()
            copies = {id(x): x.clone() for x in self._found if memory(x) not in self._outside}
            self._pool.done = stream.record_event()
            torch.autograd.graph.increment_version(self._written)
        return self._trace.with_results([copies.get(id(x), x) for x in self._found])


def _captured(run: Callable[[], Sequence[Tensor]], pool: Pool) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """A graph of what a call launches, and where its results will be."""
    graph = torch.cuda.CUDAGraph()
    try:
        # the current stream is the same again afterwards, after an error too
        with torch.cuda.stream(torch.cuda.current_stream()), _thread(graph, pool):
            return graph, run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UnsupportedOpError(f"traced: CUDA refuses to capture the step ({reason}). {_INSTEAD}") from error


def _thread(graph: torch.cuda.CUDAGraph, pool: Pool) -> torch.cuda.graph:
    """Capture what this thread launches; others, those of a data loader, may do what they like."""
    return torch.cuda.graph(graph, pool=pool.handle, capture_error_mode="thread_local")


def _own(x: Tensor) -> Tensor:
    """A tensor of the same strides in memory of its own."""
    return torch.empty_like(_extent(x)).as_strided(x.shape, x.stride())


def _extent(x: Tensor) -> Tensor:
    """All memory from a tensor's first number to its last."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((reach if x.numel() else 0,), (1,))
