"""Which algorithm a quantity takes: costs in seconds, from shapes and from rates that are measured once for each device and dtype."""

import json
import os
import platform
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import one_of
from .products import bmm, has_onednn, onednn_linear, operands
from .running import unrecorded

STRATEGIES = ("auto", "gram", "tile", "store")
# Gradients that stay below it in all are stored whenever that saves time; larger ones only where it saves memory too.
MEMORY_BUDGET = 32 * 2**20


@dataclass(frozen=True)
class Strategy:
    """How norms and weighted sums of outer products are found.

    "gram": from inner products of positions; "tile": from gradients formed a few samples at a time and dropped; "store": from
    gradients formed once and kept; "auto": by cost.
    """

    name: str = "auto"
    # bytes of gradients that may be stored beyond what their factors would take
    memory_budget: int = MEMORY_BUDGET

    def __post_init__(self) -> None:
        one_of("strategy", self.name, *STRATEGIES)
        if self.memory_budget < 0:
            raise ValueError(f"record: memory_budget is a number of bytes, got {self.memory_budget}")

    @staticmethod
    def of(name: str, memory_budget: int | None) -> "Strategy":
        """From the arguments of the public functions."""
        return Strategy(name, MEMORY_BUDGET if memory_budget is None else memory_budget)


_CURRENT: ContextVar[Strategy] = ContextVar("strategy", default=Strategy())  # noqa: B039  (frozen)


def current() -> Strategy:
    """The strategy of the recording whose quantities are being computed."""
    return _CURRENT.get()


class using(unrecorded):  # noqa: N801  (used as torch.no_grad is)
    """Our own arithmetic by one strategy."""

    def __init__(self, strategy: Strategy, *, graph: bool = False) -> None:
        self._strategy, self._graph = strategy, graph

    def __enter__(self) -> None:
        """Choose it."""
        super().__enter__()
        self._token = _CURRENT.set(self._strategy)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Choose the one before."""
        _CURRENT.reset(self._token)
        super().__exit__(kind, error, trace)


class Rates(NamedTuple):
    """What a device does in a second."""

    # flop/s of batched matrix products
    product: float
    # flop/s of the weight gradients of a convolution with the samples as groups; on a CPU those of its ordinary weight gradient
    convolution: float
    # flop/s of a weight gradient by oneDNN's linear layer, which takes one side transposed: on some CPUs twice those of the BLAS
    onednn: float
    # bytes/s at which a matrix is transposed; this and the ones beside it are zero where there is no such layer
    turning: float
    # how many times as fast as torch's own the linear layer itself is by oneDNN
    layer: float
    # bytes/s into memory in use
    memory: float
    # the type of device
    device: str = "cpu"


# Of a server CPU with two threads, and of an H100; `calibrate` measures.
_UNMEASURED = {"cpu": Rates(180e9, 300e9, 0.0, 0.0, 0.0, 40e9), "cuda": Rates(40e12, 4e12, 0.0, 0.0, 0.0, 2.5e12, "cuda")}
_HALF_SPEEDUP = 10
Key = tuple[torch.device, torch.dtype, int]
_MEASURED: dict[Key, Rates] = {}


def rates(like: Tensor) -> Rates:
    """The rates for tensors of this device and dtype, measured or typical."""
    found = _MEASURED.get((like.device, like.dtype, torch.get_num_threads()))
    if found is not None:
        return found
    typical = _UNMEASURED.get(like.device.type, _UNMEASURED["cpu"])
    if like.device.type == "cuda" and like.dtype in {torch.float16, torch.bfloat16}:
        return typical._replace(product=_HALF_SPEEDUP * typical.product)
    return typical


def calibrate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, again: bool = False) -> Rates:
    """Measure the rates of a device, unless that was done before; the first recording on a device does so.

    They are kept in `$SAMPLEWISE_CACHE/rates.json` (by default in the user's cache directory). Set `SAMPLEWISE_CALIBRATE=0` to go by
    typical rates, for choices that do not depend on the machine.

    Args:
        device: To measure on.
        dtype: A floating-point type.
        again: Measure even if it was done before.

    Returns:
        The rates, in flop/s and bytes/s.

    Example:
        >>> calibrate("cpu", torch.float32).product > 0
        True
    """
    device = torch.empty(0, device=device).device
    key = (device, dtype, torch.get_num_threads())
    found = None if again else _MEASURED.get(key) or _read().get(_name(device, dtype))
    if found is None:
        found = _measure(device, dtype)
        _write(_name(device, dtype), found)
    _MEASURED[key] = found
    return found


def prepare(like: Tensor) -> None:
    """Before a recording: know the rates of its device."""
    if (
        (like.device, like.dtype, torch.get_num_threads()) not in _MEASURED
        and like.device.type in _UNMEASURED
        and like.dtype in {torch.float32, torch.float64, torch.float16, torch.bfloat16}
        and os.environ.get("SAMPLEWISE_CALIBRATE", "1") != "0"
        and not torch._C._len_torch_dispatch_stack()  # noqa: SLF001
        and not torch.compiler.is_compiling()
    ):
        calibrate(like.device, like.dtype)


# --- measuring --------------------------------------------------------------------------------------------------------------


def _measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """A few small probes, about a tenth of a second in all."""
    drawing = [device] if device.type == "cuda" else []
    # the user's own random numbers are those of a step without a recording
    with torch._C.DisableTorchFunction(), torch.inference_mode(), torch.random.fork_rng(drawing):  # noqa: SLF001
        # what fills the device
        n, t, c, size = (8, 128, 256, 2**23) if device.type == "cpu" else (8, 1024, 1024, 2**25)
        a = torch.rand(n, t, c, device=device, dtype=dtype)
        far, near = torch.rand(2, size, device=device, dtype=dtype)
        (rows,) = operands(a)
        onednn, turning, layer = _measure_onednn(a.flatten(0, 1), device) if has_onednn(a) else (0.0, 0.0, 0.0)
        return Rates(
            onednn=onednn,
            turning=turning,
            layer=layer,
            product=2 * n * t * c * c / _seconds(lambda: bmm(rows.mT, rows, "tile"), device),
            convolution=_measure_convolution(device, dtype),
            memory=2 * far.nbytes / _seconds(lambda: torch.neg(far, out=near), device),
            device=device.type,
        )


def _measure_convolution(device: torch.device, dtype: torch.dtype) -> float:
    """`Rates.convolution`: samples as groups cost a CPU no more than a batch does, and other devices much more."""
    n, groups, c = (16, 1, 64) if device.type == "cpu" else (1, 64, 64)
    image = torch.rand(n, groups * c, 16, 16, device=device, dtype=dtype)
    weight = torch.rand(groups * c, c, 3, 3, device=device, dtype=dtype)
    settings = ([1, 1], [1, 1], [1, 1], False, [0, 0], groups, [False, True, False])
    seconds = _seconds(lambda: torch.ops.aten.convolution_backward(image, image, weight, None, *settings), device)
    return 2 * n * 16 * 16 * weight.numel() / seconds


def _measure_onednn(rows: Tensor, device: torch.device) -> tuple[float, float, float]:
    """`Rates.onednn`, `Rates.turning` and `Rates.layer`."""
    turned, flops = rows.mT.contiguous(), 2 * rows.numel() * rows.shape[1]
    by_torch = _seconds(lambda: torch.nn.functional.linear(rows, rows), device)
    return (
        flops / _seconds(lambda: onednn_linear(turned, rows.mT), device),
        rows.nbytes / _seconds(lambda: turned.copy_(rows.mT), device),
        by_torch / _seconds(lambda: onednn_linear(rows, rows), device),
    )


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 9) -> float:
    """The shortest of several: what else the machine does must not count."""
    if device.type == "cuda":
        return min(_cuda_seconds(run, device) for _ in range(repeats))
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[2:])


def _cuda_seconds(run: Callable[[], object], device: torch.device, calls: int = 10) -> float:
    """Of one of several calls in a row, which the device has before it starts, but for the first."""
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        run()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


# --- keeping ----------------------------------------------------------------------------------------------------------------


def _name(device: torch.device, dtype: torch.dtype) -> str:
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.node()}, {torch.get_num_threads()} threads"
    )
    return f"torch {torch.__version__}, {device.type} {name}, {dtype}"


def _file() -> Path:
    cache = os.environ.get("SAMPLEWISE_CACHE")
    return Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samplewise") / "rates.json"


def _read() -> dict[str, Rates]:
    try:
        return {key: Rates(**value) for key, value in json.loads(_file().read_text()).items()}
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError):
        # none yet, no home, or not ours
        return {}


def _write(name: str, found: Rates) -> None:
    """Keep the rates for the next process, where there is a place to."""
    try:
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_text(json.dumps({key: value._asdict() for key, value in {**_read(), name: found}.items()}, indent=1))
        part.replace(file)
    except (OSError, RuntimeError):
        return
