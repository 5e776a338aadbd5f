"""8-bit weights: int8 with one scale per row of a matrix; activations keep their dtype.

Dimensions: C inputs, N outputs, V vocab_size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.gpt import GPT
from model.int8 import to_int8

FEW = 16  # on a CPU, up to this many rows torch's int8 kernel is faster than dequantizing for a matmul


class Int8Linear(nn.Module):
    """nn.Linear with (N, C) int8 weights and (N,) scales."""

    int8: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("int8", weight)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """(N, C) dequantized."""
        return self.int8.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if x.device.type == "cpu" and len(rows) <= FEW and x.dtype != torch.float64:
            y = torch._weight_int8pack_mm(rows.contiguous(), self.int8, self.scale).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.int8.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """nn.Embedding tied to an Int8Linear head."""

    def __init__(self, head: Int8Linear):
        super().__init__()
        self.head = head

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    def forward(self, idx: Tensor) -> Tensor:
        return self.head.int8[idx].to(self.head.scale.dtype) * self.head.scale[idx][..., None]


@torch.no_grad()
def quantize(model: GPT) -> GPT:
    """Quantize the weight matrices of a model in place, including embeddings that are tied to the head."""
    tied = model.lm_head.weight is model.wte.weight
    for module in list(model.modules()):
        for name, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                weight, scale = to_int8(linear.weight, linear.weight.dtype)
                setattr(module, name, Int8Linear(weight, scale[:, 0], linear.bias))
    if tied:
        model.wte = Int8Embedding(model.lm_head)  # type: ignore[assignment, arg-type]
    return model
