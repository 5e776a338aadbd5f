"""What stands between the mixers: norms and MLPs.

Dimensions: B batch, T time, C n_embd.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.cpu.matmul import Linear

NormName = Literal["rmsnorm", "rmsnorm+1", "layernorm"]
MLPName = Literal["swiglu", "geglu", "gelu", "gelu-tanh", "relu2"]
GATED = {"swiglu": F.silu, "geglu": lambda x: F.gelu(x, approximate="tanh")}
PLAIN = {"gelu": F.gelu, "gelu-tanh": GATED["geglu"], "relu2": lambda x: F.relu(x).square()}


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight on a CPU, where torch has a chain of operators for it and one kernel for layer norms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """A layer norm's of a mean of 0, without what that gradient has for the mean."""
        x, weight, scale = ctx.saved_tensors
        grad, mean = grad.contiguous(), torch.zeros_like(scale)
        inputs = (grad, x, weight.shape, mean, scale, weight, None, [True, True, False])
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(*inputs)
        grad_x.addcmul_(scale, (grad @ weight).div_(x.shape[-1])[..., None])
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 at least; autocast leaves it there."""
    wide = torch.promote_types(x.dtype, torch.float32)
    keep = torch.is_autocast_enabled(x.device.type)
    if x.is_cpu and not torch.compiler.is_compiling():
        y = _RMSNorm.apply(x.to(wide), weight.to(wide), eps)
    else:
        y = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
    return y if keep else y.to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class RMSNormPlusOne(RMSNorm):
    """The same times 1 + weight (Gemma): weights of 0, which may decay, change nothing."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1 + self.weight.to(torch.promote_types(x.dtype, torch.float32)), self.eps)


NORMS = {"rmsnorm": RMSNorm, "rmsnorm+1": RMSNormPlusOne}


def make_norm(name: NormName, width: int, *, eps: float, bias: bool) -> nn.Module:
    """A norm over the last dimension; only layernorm may have biases."""
    return nn.LayerNorm(width, eps=eps, bias=bias) if name == "layernorm" else NORMS[name](width, eps)


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C) through a hidden layer: gelu, squared relu (2109.08668), or gated ones (2002.05202)."""

    def __init__(self, kind: MLPName, width: int, hidden: int, bias: bool):
        super().__init__()
        self.kind = kind
        self.c_gate = Linear(width, hidden, bias=bias) if kind in GATED else None
        self.c_fc = Linear(width, hidden, bias=bias)
        self.c_proj = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.c_gate is None:
            return self.c_proj(PLAIN[self.kind](self.c_fc(x)))
        return self.c_proj(GATED[self.kind](self.c_gate(x)) * self.c_fc(x))
