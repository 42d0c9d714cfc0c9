"""What a run shows while it runs: one bar and one line of figures in a terminal, a line per log entry elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

__all__ = ["LiveProgress"]

_FIGURES = {
    "loss": ("loss", "{:.4f}"),
    "bits_per_byte": ("held-out bits/byte", "{:.4f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "grad_norm": ("grad norm", "{:.3g}"),
    "learning_rate": ("lr", "{:.2e}"),
    "gate_mean": ("gate", "{:.3f}"),
}
"""Log keys that are shown: their label and format, in the order of the line. Held-out losses come after the loss."""
_HELD_OUT = re.compile(r"^eval_(?:(.+)_)?loss$")


class LiveProgress(TrainerCallback):
    """Loss, held-out loss, tokens per second, gradient norm, learning rate and, with a memory, the mean gate, with the time that is left.

    Pass it in ``callbacks`` of a ``SafeTrainer`` (``EngramTrainer`` is one), which then leaves out the bars of transformers and closes the
    display however training ends.

    Args:
        console: where to; the standard error stream if not given. What is no terminal gets plain lines.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
        self._display: _Display | None = None
        self._figures: dict[str, float] = {}
        self._absorbed = self._first_step = 0
        self._started = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the bar, at the step where a resumed run goes on."""
        self.close()
        self._figures, self._absorbed = {}, len(state.log_history)
        self._first_step, self._started = state.global_step, time.monotonic()
        if self.console.is_terminal:
            self._display = _Display(state.global_step, state.max_steps, self.console)
            self._display.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar on."""
        if self._display is not None:
            self._display.advance_to(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Show the newest figures."""
        for entry in state.log_history[self._absorbed :]:
            self._figures.update({key: value for key, value in entry.items() if key in _FIGURES or _HELD_OUT.match(key)})
        self._absorbed = len(state.log_history)
        line = "  ".join(_labelled(self._figures))
        if self._display is not None:
            self._display.say(line)
        elif any(key in _FIGURES or _HELD_OUT.match(key) for key in logs or ()):
            left = self._seconds_left(state)
            rest = "" if left is None else f"  {_clock(left)} left"
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  {line}{rest}", soft_wrap=True, markup=False, emoji=False
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the last figures on the screen."""
        self.close()

    def close(self) -> None:
        """Give the terminal back; harmless if there is nothing to give."""
        if self._display is not None:
            self._display.stop()
            self._display = None

    def _seconds_left(self, state: Any) -> float | None:
        done = state.global_step - self._first_step
        return (time.monotonic() - self._started) / done * (state.max_steps - state.global_step) if done > 0 else None


class _Display(Progress):
    """A bar over the steps, and the figures below it."""

    line = Text()

    def __init__(self, step: int, steps: int, console: Console) -> None:
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        super().__init__(*columns, console=console, refresh_per_second=4, speed_estimate_period=120)
        self._steps = self.add_task("", total=steps, completed=step)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, then the figures."""
        yield from super().get_renderables()
        yield self.line

    def advance_to(self, step: int) -> None:
        self.update(self._steps, completed=step)

    def say(self, line: str) -> None:
        self.line = Text(line)
        self.refresh()


def _labelled(figures: dict[str, float]) -> list[str]:
    held_out = {key: ("held-out " + (match[1] or "loss"), "{:.4f}") for key in figures if (match := _HELD_OUT.match(key))}
    shown = {"loss": _FIGURES["loss"], **held_out, **_FIGURES}
    return [f"{label} {form.format(figures[key])}" for key, (label, form) in shown.items() if key in figures]


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
