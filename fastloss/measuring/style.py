"""The style of tables and progress bars, with rich, and of pictures, with matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


PYTORCH = "#f2a65a"
FASTLOSS = "#1d4ed8"
INK = "#1f2937"
FAINT = "#6b7280"
GRID = "#e5e7eb"

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 26,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "ytick.left": False,
    "xtick.bottom": False,
    "legend.frameon": False,
}


def title(axes: Axes, text: str, detail: str) -> None:
    """Write the title of a panel and, in grey under it, how its numbers were measured."""
    axes.set_title(text)
    axes.annotate(
        detail, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", fontsize=10, color=FAINT
    )
