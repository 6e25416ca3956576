"""The moving average of a model's weights, which is what samples are drawn from."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """Exponential moving average with a decay that grows as (1 + n) / (10 + n) up to `decay`.

    torch's AveragedModel hands its count to the averaging function on the device, which makes every step wait; here the
    count stays on the host.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the weights of `model`; buffers are copied."""
        share = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), share)
        for own, current in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(current)
        self.updates += 1
