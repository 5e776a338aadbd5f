"""Benchmarks: candidates are compared within one run, by the median ratio over interleaved rounds."""
