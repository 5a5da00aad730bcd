"""A trace as a CUDA graph, which the host launches as a whole."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .errors import UnsupportedOpError
from .running import unrecorded
from .trace import Trace, memory

_DEVICE = "cuda"
_INSTEAD = "Leave out capture=True, and the same ops are launched one by one."
# A tensor of the batch is copied with what lies between its numbers, if that is no more than so many times its size, or than so many bytes.
_SPREAD, _SMALL = 4, 2**24
# The process captures one graph at a time.
_LOCK = threading.Lock()
_WAITS = "called a synchronizing CUDA operation"


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
    if any(k < len(given) for k in trace.writes):
        return "the model or the losses write to the batch, and would write to a copy of it"
    for x in given:
        if x.is_conj() or x.is_neg():
            return "a tensor of the batch is a view that conjugates or negates, which its copy would not be"
        if _reach(x) > max(_SPREAD * x.numel(), _SMALL // x.element_size()):
            return f"a tensor of the batch, {tuple(x.shape)}, lies scattered in memory of {_reach(x)} numbers: give its `.contiguous()`"
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
    """A trace that is launched as a whole, from the second call on for which all that it holds is where it was before."""

    def __init__(self, trace: Trace, pool: Pool) -> None:
        self.trace, self._pool = trace, pool
        self._places = _places(trace)
        self._replay: _Replay | None = None
        # why there will be none
        self._refused: str | None = None
        self._no_room = False

    def fits(self, given: Sequence[Tensor]) -> bool:
        """Whether the trace holds for a batch."""
        return self.trace.fits(given)

    def __call__(self, given: Sequence[Tensor]) -> Any:
        """Run it with other values of the tensors that it was given.

        Raises:
            UnsupportedOpError: Before anything runs, if it could not be captured in an earlier call.
        """
        if self._refused is not None:
            raise UnsupportedOpError(f"traced: with capture=True {self._refused}. {_INSTEAD}")
        if torch.cuda.is_current_stream_capturing() or self._writes_to(given):
            # as a part of somebody's own graph; to a batch, which a copy would not hear of
            return self.trace(given)
        before, self._places = self._places, _places(self.trace)
        if before != self._places:
            self._replay = None
        elif self._replay is not None:
            return self._replay(given)
        elif not self._no_room:
            return self._launched_and_captured(given)
        return self.trace(given)

    def _writes_to(self, given: Sequence[Tensor]) -> bool:
        held, before = self.trace.held, len(given)
        return not {memory(held[k - before]) for k in self.trace.writes if k >= before}.isdisjoint(map(memory, given))

    def _launched_and_captured(self, given: Sequence[Tensor]) -> Any:
        """The results, launched; what goes wrong with the graph is for the next call to say."""
        with _waits() as found:
            result = self.trace(given)
        if found:
            self._refused = (
                "the step may not wait for the device, and it does (it copies from the CPU, or an op looks at its results)"
            )
            return result
        try:
            self._replay = _Replay(self.trace, given, self._pool)
        except torch.OutOfMemoryError:
            self._no_room = True
            warnings.warn(
                "traced: there is no memory for a graph, so ops are launched one by one in spite of capture=True.", stacklevel=5
            )
        except RuntimeError as error:
            self._refused = f"CUDA refuses ({next(iter(str(error).splitlines()), '')})"
        return result


def _places(trace: Trace) -> list[object]:
    """Where all that a trace holds is, and the switches that choose among the kernels of an op."""
    products, cudnn = torch.backends.cuda.matmul, cast("Any", torch.backends.cudnn)
    precision = products.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, products.allow_fp16_accumulation
    reduced = products.allow_fp16_reduced_precision_reduction, products.allow_bf16_reduced_precision_reduction
    others = cudnn.enabled, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    return [*(x.data_ptr() for x in trace.held), *precision, *reduced, *others]


@contextlib.contextmanager
def _waits() -> Iterator[list[str]]:
    """Notes whether the host waits for the device, and passes other warnings on."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(max(before, 1))
        del caught[:]
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if _WAITS in str(warning.message):
            found.append(_WAITS)
        elif "Synchronization debug mode" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class _Replay:
    """The ops of a trace in a CUDA graph, of a batch in memory of its own.

    All that the trace holds is read, and written to, at the addresses that it has now.
    """

    def __init__(self, trace: Trace, given: Sequence[Tensor], pool: Pool) -> None:
        """Capture it, for batches like this one; nothing runs."""
        self._trace, self._pool = trace, pool
        (self._device,) = _devices(trace, given)
        self._written = [trace.held[k - len(given)] for k in trace.writes]
        with torch.cuda.device(self._device):
            self._fed = list(map(_own, given))
            self._graph, found = _captured(lambda: trace.ran(self._fed), pool, self._device)
        self._results = _Results(found, trace.held)

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
            torch.autograd.graph.increment_version(self._written)
            try:
                results = self._results.copied()
            finally:
                self._pool.done = stream.record_event()
        return self._trace.with_results(results)


class _Results:
    """Tensors in the memory of a graph, of which there are copies: those that shared memory share it there, and strides are the same."""

    def __init__(self, found: Sequence[Tensor], held: Sequence[Tensor]) -> None:
        own, outside = {id(x) for x in held}, set(map(memory, held))
        self._found = found
        self._held = {id(x): x for x in found if id(x) in own}
        self._views = {id(x): x for x in found if id(x) not in own and memory(x) in outside}
        self._together = _together([x for x in found if memory(x) not in outside])

    def copied(self) -> list[Tensor]:
        """Copies of all that is in the graph's memory; of what others hold, a view as it was when the trace was made."""
        new = self._held | {key: x.detach() for key, x in self._views.items()}
        for start, source, parts in self._together:
            base = source.clone()
            for x in parts:
                new[id(x)] = base.as_strided(x.shape, x.stride(), x.storage_offset() - start)
        return [new[id(x)] for x in self._found]


def _together(found: Sequence[Tensor]) -> list[tuple[int, Tensor, list[Tensor]]]:
    """Tensors by their memory: where that begins, as one tensor, and those in it."""
    groups: dict[object, dict[int, Tensor]] = {}
    for x in found:
        groups.setdefault((memory(x), x.dtype, x.is_conj(), x.is_neg()), {})[id(x)] = x
    made = []
    for parts in (list(group.values()) for group in groups.values()):
        start = min(int(x.storage_offset()) for x in parts)
        end = max(int(x.storage_offset()) + _reach(x) for x in parts)
        made.append((start, parts[0].as_strided((end - start,), (1,), start), parts))
    return made


def _captured(run: Callable[[], Sequence[Tensor]], pool: Pool, device: torch.device) -> tuple[Any, Sequence[Tensor]]:
    """A graph of what a call launches, and where its results will be."""
    graph = torch.cuda.CUDAGraph()
    with _LOCK, _own_workspaces():
        try:
            with _capture(graph, device, pool.handle):
                return graph, run()
        except RuntimeError:
            _mend(device, pool)
            raise


@contextlib.contextmanager
def _capture(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None) -> Iterator[None]:
    """What this thread launches goes into the graph; others, a data loader's perhaps, may do what they like."""
    how = torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream(device), capture_error_mode="thread_local")
    # the current stream is the same again afterwards, after an error too
    with torch.cuda.stream(torch.cuda.current_stream()), how:
        yield


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """Let cuBLAS take memory of the graph's pool: that of a stream would be used by others at the same time."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)  # noqa: SLF001
    clear()
    try:
        yield
    finally:
        clear()


def _mend(device: torch.device, pool: Pool) -> None:
    """After a capture that CUDA broke off, torch's allocator and generator would think that it still goes on."""
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool.handle)  # noqa: SLF001
    with contextlib.suppress(RuntimeError), _capture(torch.cuda.CUDAGraph(), device):
        torch.ones((), device=device)


def _own(x: Tensor) -> Tensor:
    """A tensor of the same strides in memory of its own."""
    return torch.empty_like(_extent(x)).as_strided(x.shape, x.stride())


def _extent(x: Tensor) -> Tensor:
    """All memory from a tensor's first number to its last."""
    return x.as_strided((_reach(x),), (1,))


def _reach(x: Tensor) -> int:
    """How many numbers those are."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
