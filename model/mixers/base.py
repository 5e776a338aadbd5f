"""What the network asks of every mixer's record of numbers."""

from typing import Protocol

import torch

from model.context import Step


class MixerSpec(Protocol):
    """One layer's numbers, frozen and hashable: equal layers have equal records."""

    @property
    def kind(self) -> str:
        """Its word in the table of mixers."""

    @property
    def n_params(self) -> int: ...

    def forward_flops(self, T: int) -> int:
        """Of one sequence of T tokens, a multiply-add counted as two."""

    def cache_bytes(self, max_length: int, element_size: int) -> int:
        """Of one sequence: all that new_cache allocates."""

    def read_bytes(self, start: int, stop: int, element_size: int, *, rolling: bool = True) -> int:
        """Of one sequence: what decoding its tokens start to stop - 1 reads of the past."""

    def kernel_name(self, T: int, device: torch.device, dtype: torch.dtype) -> str:
        """What training on T tokens runs on. UserError where the kernel asked for cannot serve."""

    def prepare(self, step: Step, device: torch.device, dtype: torch.dtype) -> None:
        """Leave in step.shared what the layer needs and compiled code cannot make."""
