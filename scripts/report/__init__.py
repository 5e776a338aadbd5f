"""Reports on finished runs: tables, confidence intervals over seeds, plots, and an HTML page."""

from scripts.report.figure import known as known
from scripts.report.figure import new_figure as new_figure
from scripts.report.figure import save_figure as save_figure
