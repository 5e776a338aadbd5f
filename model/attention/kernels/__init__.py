"""Kernels of contiguous self-attention, beside torch's own; `model.attention.dispatch` chooses among them."""
