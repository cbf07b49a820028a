"""The style of tables and progress bars, with rich."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

TIMES = "\N{MULTIPLICATION SIGN}"
NOTABLE_SHARE = 0.1  # of the CPUs: where other programs took less, they are not mentioned


def plain_table(title: str, *columns: str) -> Table:
    """Return a plain table: the first column and those without a heading hold words, the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        words = i == 0 or not column
        style = "cyan" if column.startswith("fastloss") else ""
        table.add_column(column, justify="left" if words else "right", style=style, no_wrap=True)
    return table


def notes(text: str, *, above: int = 0) -> RenderableType:
    """Return the grey text below a table."""
    return Padding(Text(text, style="dim"), (above, 0, 1, 0))


def progress_bar(console: Console) -> Progress:
    """Return a progress bar; the caller adds its tasks."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


def task(bar: Progress, description: str) -> Callable[[float], None]:
    """Add a task to a progress bar; return the function that takes the share of it that is done."""
    number = bar.add_task(description, total=1.0)
    return lambda share: bar.update(number, completed=share)
