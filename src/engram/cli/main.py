"""The command line: `engram --help`. Commands import what they need when they run, so that help is instant."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from engram._version import __version__
from engram.cli.ask import ask_command
from engram.cli.bench import bench_command
from engram.cli.budget import budget_command
from engram.cli.convert import convert_command
from engram.cli.corpus import corpus_command
from engram.cli.demo import demo_command
from engram.cli.evaluate import eval_command
from engram.cli.generate import generate_command
from engram.cli.knowledge import diff_command, facts_command, forget_command, merge_command, why_command
from engram.cli.look import look_command
from engram.cli.place import place_command
from engram.cli.plot import plot_command
from engram.cli.pretrain import pretrain_command
from engram.cli.recall import recall_command
from engram.cli.recipe import recipe_command
from engram.cli.route import route_command
from engram.cli.sweep import sweep_command
from engram.cli.teach import teach_command
from engram.cli.trace import trace_command
from engram.cli.train import train_command
from engram.errors import ConfigError, DataError, EngramError, reason_of

__all__ = ["app", "main"]

_SUMMARY = 60
"""Most characters of a command's line in the help: what a terminal of 80 has beside the names."""


_GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "Facts (taught memories)": {
        "teach": teach_command,
        "ask": ask_command,
        "why": why_command,
        "facts": facts_command,
        "forget": forget_command,
        "diff": diff_command,
        "merge": merge_command,
        "eval": eval_command,
        "generate": generate_command,
        "demo": demo_command,
    },
    "Any memory": {
        "trace": trace_command,
        "look": look_command,
        "route": route_command,
        "recall": recall_command,
        "place": place_command,
        "convert": convert_command,
    },
    "Training": {
        "recipe": recipe_command,
        "corpus": corpus_command,
        "train": train_command,
        "pretrain": pretrain_command,
    },
    "Experiments": {
        "budget": budget_command,
        "sweep": sweep_command,
        "plot": plot_command,
        "bench": bench_command,
    },
}
"""Commands as the help shows them."""


class _Commands(TyperGroup):
    """Says how a command was interrupted; typer alone ends without a word. Where nobody reads on, typer would end as after an error."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:  # which prints the help
        with _quiet_when_nobody_reads():
            return super().make_context(*args, **kwargs)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, names in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, str(self.commands[name].get_short_help_str(_SUMMARY))) for name in names])

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            with _quiet_when_nobody_reads():
                return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            _fail(stopped if str(stopped) else "interrupted; what was saved by then is whole", 130)


@contextmanager
def _quiet_when_nobody_reads() -> Iterator[None]:
    """End without a word where the reader of a pipe has left (``engram facts ... | head``), with the code that shells know this by. The signal
    itself stays ignored: it would also end commands whose network fails, before they could clean up.
    """
    try:
        yield
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        # What they hold back has no reader either, and Python would complain at its end.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                os.dup2(nowhere, stream.fileno())
        sys.exit(141)


app = typer.Typer(
    cls=_Commands,
    help="A conditional memory for PyTorch language models: hashed n-gram tables to train, teach, inspect and switch off.",
    epilog="'engram COMMAND --help' has the options. Exit codes: 0 done, 1 refused or not exact, 2 wrong options or files, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
for _commands in _GROUPS.values():
    for _name, _command in _commands.items():
        app.command(_name)(_command)


def _show_version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
) -> None:
    _refuse_several(str(context.invoked_subcommand))


def _refuse_several(command: str) -> None:
    """A launcher starts a command several times over; one alone divides its work then, the others would do theirs so many times."""
    count = os.environ.get("WORLD_SIZE", "1")
    if command != "train" and "LOCAL_RANK" in os.environ and count != "1":
        raise ConfigError(
            f"engram {command}: got {count} processes, expected one: start it without torchrun or accelerate launch (several divide the "
            "work of `engram train` alone)."
        )


def main() -> None:
    """Entry point: one line on standard error for every mistake of the user's, and an exit code other than 0."""
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it speaks of packages that it could use, and of every layer's types
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character shows its number instead
            stream.reconfigure(errors="backslashreplace")
    try:
        with _quiet_when_nobody_reads():
            _run()
    except (ConfigError, DataError) as error:
        _fail(error, 2)
    except (EngramError, OSError) as error:
        _fail(error, 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        _fail(f"this needs more memory than there is: {reason_of(error)}. Free some, or lift the process's limit.", 1)


def _is_of_memory(error: BaseException) -> bool:
    """Whether it says that memory could not be had; PyTorch and safetensors say so by a plain RuntimeError."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error).lower()


def _run() -> None:
    """The command, and what it has printed out of the buffer, where an error can still be caught."""
    try:
        _built()()
    except SystemExit:
        if sys.stdout is not None:
            sys.stdout.flush()
        raise


@cache
def _built() -> Callable[[], None]:
    """All commands with their options, read once: it takes a twentieth of a second."""
    return typer.main.get_command(app)


def _fail(reason: object, code: int) -> NoReturn:
    print(f"engram: {reason}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
