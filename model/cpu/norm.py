"""RMSNorm on a CPU, by way of torch's fused layer norm backward, as torch has no fused CPU kernel for RMSNorm."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension (1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """The backward of a layer norm with mean 0, without the gradient term of the mean, which is added back."""
        x, weight, scale = ctx.saved_tensors
        grad, mean = grad.contiguous(), torch.zeros_like(scale)
        inputs = (grad, x, weight.shape, mean, scale, weight, None, [True, True, False])
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(*inputs)
        grad_x.addcmul_(scale, (grad @ weight).div_(x.shape[-1])[..., None])
        return grad_x, grad_weight, None
