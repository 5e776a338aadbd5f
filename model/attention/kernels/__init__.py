"""Attention kernels; `model.attention.dispatch` chooses among them and torch's own."""
