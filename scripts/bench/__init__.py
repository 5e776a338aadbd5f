"""Benchmarks: ratios measured in one run, medians of interleaved rounds, never single numbers."""
