"""Where commands write their results, and what they ask of texts."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "check_folder",
    "check_prompt",
    "check_text",
    "check_writable",
    "command_line",
    "count_bar",
    "is_terminal",
    "made_with",
    "more_bar",
    "new_console",
    "print_folded",
    "print_whole",
]

_NO_END = 10_000
"""Characters in a line that no table fills."""
_PIPED_WIDTH = 160
"""Characters in a line of a folded table where nobody watches."""
_LEAST_CELL = 9
"""Characters of a line that every column of a folded table has, borders and blanks included."""


def made_with() -> dict[str, Any]:
    """The hardware and versions that a result was made with."""
    from engram.evaluation.versions import made_with as made_with_device

    found = made_with_device()
    return {"hardware": found["device"], "versions": found["versions"]}


def command_line(*words: str, options: Iterable[tuple[str, Any]]) -> str:
    """What to type for the same: ``words`` after the program's name, then the options that have a value; ``True`` is a flag that is set."""
    given = [
        part
        for name, value in options
        if value is not None and value is not False
        for part in ((f"--{name}",) if value is True else (f"--{name}", str(value)))
    ]
    return shlex.join(["engram", *words, *given])


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody may be watching; a stream that was closed before the start is None."""
    return stream is not None and stream.isatty()


def check_text(text: str, hint: str) -> None:
    """Refuse what the shell handed over as bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("got bytes that are not UTF-8, expected text", param_hint=hint) from None


def check_prompt(prompt: str, hint: str) -> None:
    """Refuse what cannot be asked."""
    if not prompt.strip():
        raise typer.BadParameter("got an empty text, expected a question", param_hint=hint)
    check_text(prompt, hint)


def new_console(stderr: bool = False, width: int | None = None) -> Console:
    """Where a command shows what it found, and its bars. Text is shown as it is: answers may hold brackets, which are no markup here, or
    ``:cat:``, which is no picture.

    Args:
        stderr: on standard error instead of standard output.
        width: characters in a line; those of the terminal if not given.
    """
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise  # what `engram` does then it does for all that is printed (``cli.main``)

    return Plain(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


@contextmanager
def count_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; called with how many are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=new_console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def more_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """The same; called with how many more are done."""
    done = 0
    with count_bar(what, total) as show:

        def add(more: int) -> None:
            nonlocal done
            done += more
            show(done)

        yield add


def check_writable(file: Path | None) -> None:
    """Find out before work of minutes that its result has no place."""
    if file is None:
        return
    if file.is_dir():
        raise typer.BadParameter(f"got {file}, which is a folder; expected a file to write")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = not file.exists()
        if not new and not file.is_file():  # opening a pipe would wait for its reader
            if not os.access(file, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        with open(file, "a", encoding="utf-8"):
            pass
        if new:  # an empty file is no result
            file.resolve().unlink()  # of a link that leads nowhere, what it made, not the link
    except OSError as error:
        raise typer.BadParameter(f"cannot write {file}: {error.strerror}; choose another place") from None


def check_folder(folder: Path | None) -> None:
    """The same for a folder of results."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"got {folder}, expected a folder that can be made: {error.strerror}") from None


def print_whole(table: Table) -> None:
    """A table in whole lines, however narrow the terminal: cells that were cut would be other numbers."""
    new_console(width=new_console(width=_NO_END).measure(table).maximum).print(table)


def print_folded(table: Table) -> None:
    """A table of texts as wide as the terminal: what is longer than its column goes on below, and nothing is cut. A terminal that has no room
    for so many columns wraps the lines itself.
    """
    for column in table.columns:
        column.overflow = "fold"
    width = new_console().width if is_terminal(sys.stdout) else _PIPED_WIDTH
    new_console(width=max(width, _LEAST_CELL * len(table.columns) + 1)).print(table)
