"""Floor 6: pictures, from result files alone."""

from engram.plots.report import render_report

__all__ = ["render_report"]
