"""What runs came to: tables, intervals over seeds, plots, one page."""
