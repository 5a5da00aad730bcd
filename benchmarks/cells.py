"""One cell of a table: the time of a call in this process, or the peak memory of a method in a process of its own.

    python benchmarks/cells.py samplewise norms gpt --sizes '{"n": 2, "length": 32}'

Memory is what a step needs at its peak beyond the idle process (model, batch, the caller's buffers): resident memory on Linux, and what
torch holds of it; the allocator's count on CUDA.
"""

import argparse
import ctypes
import datetime as dt
import gc
import itertools
import json
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peers import GRAPH, SYSTEMS, Problem
from samplewise import release_buffers
from workloads import CUDA_WORKLOADS, WORKLOADS

MIB = 2**20


@dataclass(frozen=True)
class Place:
    """Where and how everything runs."""

    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2

    def enter(self) -> None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(self.threads)
        # or float32 is not float32 in cuDNN
        torch.backends.cudnn.allow_tf32 = False

    def problem(self, workload: str, sizes: dict[str, int]) -> Problem:
        """A workload by its name, the same numbers each time."""
        torch.manual_seed(0)
        made = {**WORKLOADS, **CUDA_WORKLOADS}[workload](**sizes)
        return Problem.of(made.to(self.device, getattr(torch, self.dtype)))

    def named(self) -> str:
        """The processor, as torch and Python know it."""
        if self.device != "cpu":
            return torch.cuda.get_device_name()
        return f"CPU {platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"

    def described(self) -> str:
        today = dt.datetime.now(dt.UTC).date()
        return f"{today}, torch {torch.__version__}, {self.named()}, {self.threads} threads, {self.dtype}"


def first_line(error: object, length: int = 160) -> str:
    """What an error says, without paths of this machine."""
    line = (str(error).strip().splitlines() or [""])[0]
    line = re.sub(r"(?<![\w:/.])/(?:[\w.+-]+/)+[\w.+-]*", "...", line)
    return line if len(line) <= length else line[: length - 3] + "..."


# --- time -----------------------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object], device: str, in_a_row: int = 1) -> float:
    """The time of a call; its result is dropped after the clock has stopped. The garbage collector waits, as in `timeit`.

    On CUDA of one of several in a row, as in training: the host may run ahead of the device.
    """
    gc.disable()
    if device == "cpu":
        start = time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - start
        del result
    else:
        elapsed = cuda_seconds(run, in_a_row)
    gc.enable()
    return elapsed


def cuda_seconds(run: Callable[[], object], calls: int, asleep: int = 0) -> float:
    """By the device's clock; the device may sleep for some cycles first, until the host has launched all calls."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if asleep:
        torch.cuda._sleep(asleep)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """A call as a CUDA graph: its replay costs the host one launch. The results stay where they are and are overwritten."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> object:
        graph.replay()
        # the graph reads the model's memory, which `run` keeps
        return result, run

    return replay


# --- memory ---------------------------------------------------------------------------------------------------------------------


def status(field: str) -> int:
    """A line of the process's status, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def idle(device: str) -> int:
    """Bytes in use now; the count of the peak starts anew."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # what was freed goes back to the system, or a step could use it unseen
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(device: str) -> int:
    return status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def memory(system: str, quantity: str, problem: Problem, device: str) -> dict[str, float]:
    """Peak MiB of three steps of a method beyond the idle process: what is freed is not all found again at once; and of live tensors.

    On CUDA both are the most that the allocator gave out, which is the same in every process.
    """
    run = SYSTEMS[system].methods[quantity]
    ready = SYSTEMS[system].prepare(problem, quantity)
    # Two samples bring in the code that is loaded on first use.
    run(ready.head(2))
    ahead, kept = SYSTEMS[system].before, system == GRAPH
    # the memory of a graph is what was given out when it was made
    for _ in range(0 if kept else ahead):
        run(ready)
    before, result = idle(device), None
    for _ in range(3 + (ahead if kept else 0)):
        # the result of the step before is dropped first
        result = None
        result = run(ready)
    found = (peak(device) - before) / MIB
    del result
    return {"mib": found, "live": live(lambda: run(ready)) if device == "cpu" else found}


def live(run: Callable[[], object]) -> float:
    """The most MiB that torch holds at once in a call, of what it asked for in it: no gaps between blocks, and the same in every run."""
    # what is kept from step to step is asked for anew, and so counts
    release_buffers()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0)) / MIB


def memory_here(system: str, quantity: str, problem: Problem, device: str) -> dict[str, float | str]:
    """`memory` in this process, which does where the allocator counts."""
    try:
        return dict(memory(system, quantity, problem, device))
    except RuntimeError as error:
        return {"trouble": f"raises {type(error).__name__}: {first_line(error)}"}


@dataclass(frozen=True)
class Question:
    """Whose memory is asked for."""

    system: str
    quantity: str
    workload: str
    sizes: dict[str, int] = field(default_factory=dict)


def memory_in_a_fresh_process(question: Question, place: Place) -> dict[str, float | str]:
    """`{"mib": ..., "live": ...}`, or `{"trouble": ...}`."""
    options = ["--sizes", json.dumps(question.sizes), "--device", place.device, "--dtype", place.dtype]
    command = [sys.executable, __file__, question.system, question.quantity, question.workload, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        return {"trouble": first_line(last) or f"ended with {done.returncode}"}
    return json.loads(done.stdout.strip().rpartition("\n")[2])


def memories(questions: Sequence[Question], place: Place, processes: int = 1) -> list[dict[str, float | str]]:
    """Peaks from fresh processes of one thread, medians of several: two at once on a CPU, which does not change what each needs."""
    asked = [question for question in questions for _ in range(processes)]
    with ThreadPoolExecutor(2 if place.device == "cpu" and place.threads > 1 else 1) as pool:
        answers = list(pool.map(lambda question: memory_in_a_fresh_process(question, place), asked))
    return [_middle(answers[k : k + processes]) for k in range(0, len(answers), processes)]


def _middle(answers: Sequence[dict[str, float | str]]) -> dict[str, float | str]:
    troubles = [answer for answer in answers if "trouble" in answer]
    if troubles:
        return troubles[0]
    return {key: statistics.median(float(answer[key]) for answer in answers) for key in ("mib", "live")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("quantity")
    parser.add_argument("workload", choices=[*WORKLOADS, *CUDA_WORKLOADS])
    parser.add_argument("--sizes", type=json.loads, default={})
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    place = Place(given.device, given.dtype, threads=1)
    place.enter()
    problem = place.problem(given.workload, given.sizes)
    print(json.dumps(memory(given.system, given.quantity, problem, given.device)))


if __name__ == "__main__":
    main()
