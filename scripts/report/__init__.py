"""What runs came to: tables, intervals over seeds, plots, one page."""

from scripts.report.figure import new_figure as new_figure
