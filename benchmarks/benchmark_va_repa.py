"""svel::va_repa_loss, forward and backward together."""

from __future__ import annotations

import peers
import pytest
import torch

import stablevelocity_kernels as svel
from stablevelocity_kernels import reference
from stablevelocity_kernels.testing import TOLERANCE

SHAPES = {
    "cuda": [(256, 256, 768, torch.bfloat16), (256, 256, 1024, torch.bfloat16), (256, 256, 768, torch.float32)],
    "cpu": [(16, 256, 768, torch.bfloat16), (16, 256, 768, torch.float32)],
}


@pytest.mark.parametrize("case", range(3))
def test_va_repa(measure, device, case):
    if case >= len(SHAPES[device.type]):
        pytest.skip(f"no such {device.type} case")
    b, t, c, dtype = SHAPES[device.type][case]
    projected, teacher = (torch.randn(b, t, c, device=device, dtype=dtype) for _ in range(2))
    projected.requires_grad_(True)
    weight = torch.rand(b, device=device)

    def both(loss_of) -> torch.Tensor:
        loss = loss_of(projected, teacher, weight)
        return torch.autograd.grad(loss, projected)[0]

    expected = reference.va_repa_loss_backward(
        torch.ones((), dtype=torch.float64), *(v.detach().cpu().double() for v in (projected, teacher, weight))
    )
    size = projected.numel() * projected.element_size()
    measure(
        f"va_repa_loss forward + backward {b}×{t}×{c} {str(dtype).removeprefix('torch.')}",
        lambda: both(svel.va_repa_loss),
        check=(lambda: both(svel.va_repa_loss), expected, TOLERANCE[dtype, "exact"]),
        peers={"eager": lambda: both(peers.va_repa)},
        bytes_read=4 * size,  # two passes: each reads both tensors
        bytes_written=size,
    )
