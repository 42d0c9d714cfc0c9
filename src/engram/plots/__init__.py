"""Floor 7: pictures and the report, from result files alone."""

from engram.plots.bench import plot_bench, plot_steps
from engram.plots.draw import draw_result
from engram.plots.evaluation import plot_capacity, plot_evaluation, plot_gates, plot_shares
from engram.plots.look import plot_look
from engram.plots.look_page import render_look
from engram.plots.paper_page import render_page
from engram.plots.report import render_report
from engram.plots.report_text import Report
from engram.plots.results import ResultFile, group_results, read_result
from engram.plots.sweep import plot_sweep

__all__ = [
    "Report",
    "ResultFile",
    "draw_result",
    "group_results",
    "plot_bench",
    "plot_capacity",
    "plot_evaluation",
    "plot_gates",
    "plot_look",
    "plot_shares",
    "plot_steps",
    "plot_sweep",
    "read_result",
    "render_look",
    "render_page",
    "render_report",
]
