"""stablevelocity.variance: the curve of a whole data set, its posterior means over all of it, at twenty times."""

from __future__ import annotations

import peers
import pytest
import torch
from stablevelocity.variance import variance_curve

from stablevelocity_kernels import reference

# samples, which are drawn as often as there are references, and elements of each: CIFAR-10 in pixels, and a CPU's size
SETS = {"cuda": (50_000, 3072), "cpu": (2_000, 784)}
TIMES = torch.linspace(0.05, 0.999, 20)
CHECKED = (0.8, 0.9, 0.95, 0.999)  # where the variance is more than rounding
CHUNK = 4096  # rows of a peer's scores at a time


def _float64_mean(data: torch.Tensor):
    def truth(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.to(x_t.device)
        return reference.posterior_mean(x_t.double(), data, 1 - t, t)[0]

    return truth


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_variance_curve(measure, device, precision):
    if precision == "fast" and device.type == "cpu":
        pytest.skip("fast is exact on the CPU")
    n, d = SETS[device.type]
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    data = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def curve(times, samples, **options):
        seeded = torch.Generator().manual_seed(1)
        return variance_curve(data, times, samples=samples, precision=precision, generator=seeded, **options).cfm

    def plain():  # the target of every row stands for its posterior mean
        product = peers.target_matmul_half if dtype == torch.float16 else peers.target_matmul
        for time in TIMES.tolist():
            for x in data.split(CHUNK):
                product(x.float(), data, torch.full((len(x),), time, device=device))

    measure(
        f"variance curve {n}×{n}×{d} at {len(TIMES)} times {precision}",
        lambda: curve(TIMES, n),
        check=(
            lambda: curve(CHECKED, 64),
            curve(CHECKED, 64, truth=_float64_mean(data)),
            1e-5 if precision == "exact" else 1e-3,
        ),
        peers={"two products by chunks": plain},
        bytes_read=float(n * d * data.element_size()),
        flops=4.0 * n * n * d * len(TIMES),
        rate="float16" if dtype == torch.float16 else "float32",
    )
