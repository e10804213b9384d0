"""The look of the command line's tables."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

MARKS = {  # of what `report.evaluate.verdict` says
    "met": "[green]✓[/]",
    "missed": "[red]✗[/]",
    "missed within the interval": "[yellow]~[/]",
    "maximised": " ",
}
MARKS_EXPLAINED = "✓ threshold met  ~ missed, but inside the interval  ✗ missed beyond the interval"


def new_table(title: str, first: str, *others: str, numbers: bool = True) -> Table:
    """A table that fits 80 columns: a name first, never cut, then columns of numbers (right-aligned) or of text."""
    table = Table(
        title=title,
        min_width=len(title),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right" if numbers else "left")
    return table
