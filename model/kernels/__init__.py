"""Kernels of contiguous self-attention, beside torch's own; `model.attend` chooses among them."""
