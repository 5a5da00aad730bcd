"""How far a loop is, on stderr: a bar in a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int], None]


@contextmanager
def progress(what: str, total: int, *, done: int = 0) -> Iterator[Advance]:
    """Show progress over `total` samples, `done` of them before this start.

    Yields:
        A function to call with the number of samples just finished.
    """
    console = Console(stderr=True)
    with _bar(what, total, done, console) if console.is_terminal else _lines(what, total, done) as advance:
        yield advance


@contextmanager
def _bar(what: str, total: int, done: int, console: Console) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


@contextmanager
def _lines(what: str, total: int, done: int) -> Iterator[Advance]:
    started = last = time.monotonic()
    finished = done

    def advance(count: int) -> None:
        nonlocal finished, last
        finished += count
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or finished == total:
            last = now
            rate = (finished - done) / max(now - started, 1e-9)
            left = timedelta(seconds=round((total - finished) / rate))
            print(f"{what}: {finished:,} of {total:,}, {rate:,.0f}/s, {left} left", file=sys.stderr, flush=True)

    yield advance
