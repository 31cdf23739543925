"""The reference policy of a KL penalty: a copy of the trained weights as they were when GRPO began.

Kept in host memory and exchanged with the current weights for a forward pass. It holds whatever is trained: all
weights, or the adapters with the projector. Switching the adapters off would not do: the projector is trained beside
them, and those of the warm start are part of it.

Invariant: outside `in_place` the module holds its current weights, bit for bit.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from rlsys.models.lora import Gather


class ReferencePolicy:
    """Weights to be put in the place of the current ones for a while.

    `gather` makes partitioned parameters whole and keeps what is written to them while whole: under ZeRO-3
    `lambda parameters: deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)`. All ranks call everything.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], gather: Gather) -> None:
        self._parameters = parameters
        self._gather = gather
        self._weights = [self._read(parameter) for parameter in parameters]

    @contextmanager
    def in_place(self) -> Generator[None]:
        """The module computes as the reference policy inside; call it without gradients."""
        current = [self._read(parameter) for parameter in self._parameters]
        self._write(self._weights)
        try:
            yield
        finally:
            self._write(current)

    def save(self, path: Path) -> None:
        """Write the weights for `load`."""
        torch.save(self._weights, path)

    def load(self, path: Path) -> None:
        """Take the weights that `save` wrote. Raises OSError, RuntimeError or EOFError when the file is damaged."""
        weights: list[Tensor] = torch.load(path, weights_only=True)
        if [one.shape for one in weights] != [one.shape for one in self._weights]:
            raise RuntimeError(f"{path}: the reference policy has other shapes than the policy")
        self._weights = weights

    def _read(self, parameter: nn.Parameter) -> Tensor:
        with self._gather([parameter]):
            return parameter.detach().cpu().clone()

    @torch.no_grad()
    def _write(self, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self._parameters, weights, strict=True):
            with self._gather([parameter]):
                parameter.copy_(weight)
