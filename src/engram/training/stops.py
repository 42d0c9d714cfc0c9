"""Signals that ask a run to stop, and the terminal that may be gone with one of them."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["STOPS", "give_back", "listen", "say", "signals_given_back"]

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Ctrl-C, the end that a scheduler sends, and the terminal that is closed (which Windows does not tell)."""


def listen(handler: Callable[[int, Any], None], numbers: Sequence[signal.Signals] = STOPS) -> dict[signal.Signals, Any]:
    """Have ``handler`` called at signals; what they meant before comes back, for ``give_back``. For the main thread alone.

    A SIGHUP that is ignored stays so: ``nohup`` asks for a run that outlives its terminal. And only the first counts: the system and the shell
    both send it, and a second Ctrl-C is somebody's wish to stop at once.
    """

    def heard(number: int, frame: Any) -> None:
        if _is_hangup(number):
            signal.signal(number, signal.SIG_IGN)
        handler(number, frame)

    ignored = {number for number in numbers if _is_hangup(number) and signal.getsignal(number) is signal.SIG_IGN}
    return {number: signal.signal(number, heard) for number in numbers if number not in ignored}


def _is_hangup(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None)


def give_back(handlers: Mapping[signal.Signals, Any]) -> None:
    """Let signals mean what they meant. What something other than Python had set (None) cannot be set from here: such a signal ends the process
    again, which is better than a handler of a run that is over.
    """
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def signals_given_back(
    handler: Callable[[int, Any], None] | None = None, numbers: Sequence[signal.Signals] = STOPS
) -> Iterator[None]:
    """Whatever happens inside, signals mean afterwards what they meant before; a run that fails would leave them caught.

    Args:
        handler: called at the signals inside, if given; the code inside may set others too.
        numbers: which signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        if handler is not None:
            listen(handler, numbers)
        yield
    finally:
        give_back(before)


def say(line: str) -> None:
    """A line on standard error for whoever is still there. If the terminal was closed, what is written there later goes nowhere: it would
    be an error in the midst of what a stop has yet to save.
    """
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _write_nowhere()


def _write_nowhere() -> None:
    """Have standard output and error lead nowhere; one that leads to a file or a pipe is left alone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        if stat.S_ISCHR(os.fstat(number).st_mode):
            os.dup2(nowhere, number)
    os.close(nowhere)
