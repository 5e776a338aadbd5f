"""Reports on finished runs: tables, confidence intervals over seeds, plots, and an HTML page."""
