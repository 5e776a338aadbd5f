"""The evaluations of a trained run, called by scripts.evaluate."""
