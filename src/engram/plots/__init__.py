"""Floor 6: pictures, from result files alone."""

from engram.plots.bench import plot_bench, plot_steps
from engram.plots.evaluation import plot_capacity, plot_evaluation, plot_gates, plot_shares
from engram.plots.look import plot_look
from engram.plots.look_page import render_look
from engram.plots.report import render_report

__all__ = [
    "plot_bench",
    "plot_capacity",
    "plot_evaluation",
    "plot_gates",
    "plot_look",
    "plot_shares",
    "plot_steps",
    "render_look",
    "render_report",
]
