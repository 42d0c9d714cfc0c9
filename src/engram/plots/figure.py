"""What all pictures share: colours, an empty figure, and saving it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram.errors import ConfigError

__all__ = ["COLOURS", "Picture", "new_figure", "save_figure"]

COLOURS = ["#8c8c8c", "#c62f2d", "#2f6db5", "#e0a030", "#4f9d69", "#7b5ea7", "#333333"]


@dataclass(frozen=True)
class Picture:
    """A picture and what stands below it."""

    path: Path
    caption: str


def new_figure(count: int, width: float | None = None, height: float = 3.6, stacked: bool = False) -> tuple[Any, Any]:
    """A figure with ``count`` axes side by side, or one below the other if ``stacked``; width and height in inches.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("pictures need matplotlib; install it with: pip install 'engram-memory[plots]'") from None
    from matplotlib.figure import Figure

    del matplotlib
    figure = Figure(figsize=(width or 5.0 * count, height), layout="constrained")
    axes = figure.subplots(*((count, 1) if stacked else (1, count)), squeeze=False).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: Path) -> Path:
    """Write a PNG; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
