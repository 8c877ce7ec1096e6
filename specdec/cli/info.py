"""What `specdec info` shows: versions, device, implementations of the ops, figures of the bundled pair."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import specdec.kernels
from specdec import zoo
from specdec.cli import measure
from specdec.kernels.cpu import compiler_error, compiler_name
from specdec.kernels.library import OPS


def ops() -> Iterator[tuple[str, str, str]]:
    """Name of every op, and what runs for tensors on a CPU and on a GPU."""
    for module in pkgutil.walk_packages(specdec.kernels.__path__, "specdec.kernels."):
        importlib.import_module(module.name)
    for name, op in sorted(OPS.items()):
        yield name, op.path("cpu"), op.path("cuda")


def compiler() -> str:
    """The C++ compiler that Inductor and the C++ kernels are built with."""
    if error := compiler_error():
        return f"none that works, steps run eagerly, slower, with the same tokens: {error}"
    done = subprocess.run([compiler_name(), "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [compiler_name()])[0]


def figures() -> Iterator[tuple[str, str]]:
    """Name and value of what training measured, one line a group."""
    for group, value in zoo.metrics().items():
        if isinstance(value, dict):
            yield group, ", ".join(f"{name.replace('_', ' ')} {_short(number)}" for name, number in value.items())
        else:
            yield group.replace("_", " "), _short(value)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def show(console: Console) -> None:
    """Print everything."""
    table = _table("versions and machine")
    for name, version in measure.versions().items():
        table.add_row(name, version)
    for name, value in measure.machine().items():
        table.add_row(name, str(value))
    table.add_row("device", "cuda" if torch.cuda.is_available() else "cpu")
    table.add_row("C++ compiler", compiler())
    console.print(table)

    table = Table(
        title="ops", title_justify="left", title_style="bold", box=None, header_style="dim", padding=(0, 2, 0, 0)
    )
    for column in ("op", "on a CPU", "on a GPU"):
        table.add_column(column)
    for row in ops():
        table.add_row(*row)
    console.print(table)

    table = _table("bundled pair")
    for name, text in figures():
        table.add_row(name, text)
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.header_style, table.show_header = "dim", bool(columns)
    for column in columns or ("", ""):
        table.add_column(column)
    table.columns[0].no_wrap = True
    return table
