"""What the demo tells while it runs: a heading per step, a line per fact, progress bars on a terminal, a summary at the end."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table


class StepFailedError(Exception):
    """A step did not do what it is there to show."""


@dataclass
class StepResult:
    """How one step went."""

    number: int
    title: str
    seconds: float
    ok: bool


@dataclass
class Story:
    """Prints, and remembers for the summary."""

    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))
    results: list[StepResult] = field(default_factory=list)
    facts: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def step(self, number: int, title: str) -> Iterator[None]:
        """One step; an exception in it marks it failed and ends the demo."""
        began = time.monotonic()
        self.console.print(f"\n[bold cyan]{number}. {title}[/]")
        ok = False
        try:
            yield
            ok = True
        finally:
            seconds = time.monotonic() - began
            self.results.append(StepResult(number, title, seconds, ok))
            mark = "[green]done[/]" if ok else "[bold red]failed[/]"
            self.console.print(f"   {mark} in {seconds:.1f} s")

    def say(self, what: str, why: str = "") -> None:
        """One line: what happened, and why."""
        self.console.print(f"   {what}{f'  [dim]{why}[/]' if why else ''}")

    def keep(self, section: str, name: str, value: str) -> None:
        """Remember a figure for the summary."""
        self.facts.setdefault(section, []).append((name, value))

    def expect(self, holds: bool, what: str) -> None:
        """Fail the step unless `holds`.

        Raises:
            StepFailedError: `what` did not hold.
        """
        if not holds:
            raise StepFailedError(f"expected: {what}")

    @contextmanager
    def progress(self, what: str, total: float | None) -> Iterator["Bar"]:
        """A progress bar; only on a terminal."""
        columns = (TextColumn("   {task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, disable=not sys.stdout.isatty(), transient=True) as progress:
            yield Bar(progress, progress.add_task(what, total=total))

    def summary(self) -> None:
        """Print the steps and every figure that was kept."""
        self.console.rule("[bold]summary")
        steps = Table("step", "seconds", "result", box=None, pad_edge=False)
        for result in self.results:
            word = "[green]ok[/]" if result.ok else "[bold red]failed[/]"
            steps.add_row(f"{result.number}. {result.title}", f"{result.seconds:.1f}", word)
        self.console.print(steps)
        for section, facts in self.facts.items():
            self.console.print(f"\n[bold]{section}[/]")
            width = max(len(name) for name, _ in facts)
            for name, value in facts:
                self.console.print(f"  {name:<{width}}  {value}")
        self.console.print(f"\nthe loop took {time.monotonic() - self.started:.0f} s")


@dataclass
class Bar:
    """A running progress bar."""

    progress: Progress
    task: TaskID

    def advance(self, amount: float = 1) -> None:
        """Move on by `amount`."""
        self.progress.advance(self.task, amount)

    def show(self, what: str) -> None:
        """Change the text."""
        self.progress.update(self.task, description=f"{what}")
