"""Progress bars with rate and time left, on standard error, gone when the work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

OnProgress = Callable[[int], None]


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{int(task.completed):,}/{int(task.total):,}")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None or task.total is None else f"{speed:,.1f} {task.fields['unit']}/s")


class Bars:
    """Adds bars to a live display; does nothing when there is none."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress

    def add(self, label: str, total: int, unit: str) -> OnProgress:
        """A new bar. Returns a function to be called with the units just done."""
        progress = self._progress
        if progress is None:
            return lambda done: None
        task = progress.add_task(label, total=total, unit=unit)
        return lambda done: progress.advance(task, done)

    @contextmanager
    def busy(self, label: str) -> Iterator[None]:
        """A bar without end for work that cannot be counted."""
        if self._progress is None:
            yield
            return
        task = self._progress.add_task(label, total=None)
        try:
            yield
        finally:
            self._progress.remove_task(task)


@contextmanager
def bars(show: bool) -> Iterator[Bars]:
    """A live display of bars, when wanted and standard error is a terminal."""
    console = Console(stderr=True)
    if not show or not console.is_terminal:
        yield Bars()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _Count(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bars(progress)
