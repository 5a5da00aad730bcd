"""Memory for intermediate results, kept from step to step: fresh memory costs page faults (2 GB/s on a CPU instead of 10-30).

Large blocks are kept here, smaller ones by the C library, where what a step frees serves all that comes next.
"""

import ctypes
import itertools
import math
import os
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# What one thread keeps at most, in bytes; beyond it memory is fresh.
LIMIT = 512 * 2**20
# In bytes: blocks below it come from the heap of the C library,
_FROM_HEAP = 2**25
# and are not kept here.
SMALLEST = _FROM_HEAP
# What glibc keeps at most, in bytes; its names for that, and the user's.
_KEPT = 256 * 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Recordings before that is said: what the first ones leave behind for good then lies below what is freed, and not in between.
_BEFORE = 3
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@dataclass(eq=False)
class _Slots:
    """The memory of one thread, by what it is for."""

    held: dict[tuple[object, ...], Tensor] = field(default_factory=dict)


_OWN = threading.local()
_ALL: weakref.WeakSet[_Slots] = weakref.WeakSet()
_RECORDINGS = itertools.count()


def scratch(slot: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialised memory, `(*shape)`, that lasts until the same slot is asked for again in this thread.

    Fresh memory for blocks that come from the heap; where a graph is built or traced, since both outlast the moment; where the thread's
    limit is reached; and on devices whose allocators keep memory themselves, and know the streams that use it.
    """
    size = math.prod(shape)
    traced = torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack()  # noqa: SLF001
    if size * like.element_size() < SMALLEST or traced or like.device.type != "cpu":
        return like.new_empty(shape)
    held, key = _slots().held, (slot, like.device, like.dtype)
    if key not in held or held[key].numel() < size:
        others = sum(x.nbytes for name, x in held.items() if name != key)
        if others + size * like.element_size() > LIMIT:
            return like.new_empty(shape)
        # what is replaced goes first
        held.pop(key, None)
        with torch.inference_mode(mode=False):
            held[key] = torch.empty(size, dtype=like.dtype, device=like.device)
    with torch.inference_mode(mode=False):
        return held[key][:size].view(shape)


def keep_freed_memory(device: str) -> None:
    """Let glibc keep up to 256 MiB of what a step on the CPU frees for the next one, instead of giving it back to the system.

    Said once, at the fourth recording. Left alone where the user's environment has settings for it, where the C library is another, and
    for other types of devices.
    """
    if device == "cpu" and next(_RECORDINGS) == _BEFORE:
        libc = _glibc()
        if libc is not None and not any(name in os.environ for name in _SETTINGS):
            # smaller blocks come from the heap, whose end is given back where more than that is free
            libc.mallopt(_MMAP_THRESHOLD, _FROM_HEAP)
            libc.mallopt(_TRIM_THRESHOLD, _KEPT)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def release_buffers() -> None:
    """Give the memory back that is kept between steps on the CPU: large blocks, at most 512 MiB for each thread that asked for quantities.

    On Linux with glibc also what the C library keeps since the fourth recording, at most 256 MiB.

    Example:
        >>> release_buffers()
    """
    for slots in list(_ALL):
        slots.held.clear()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _slots() -> _Slots:
    slots: _Slots | None = getattr(_OWN, "slots", None)
    if slots is None:
        slots = _OWN.slots = _Slots()
        _ALL.add(slots)
    return slots
