"""What this machine can do at most, measured in the same run as everything that is compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timing import time_call


@dataclass(frozen=True)
class Ceilings:
    """Bytes and operations per second: read-only reduction, copy (bytes read + written), matrix products."""

    read: float
    copy: float
    float32: float
    float16: float

    def floor(self, bytes_read: float, bytes_written: float, flops: float, rate: str) -> float:
        """Seconds below which nothing that moves these bytes and does these operations can finish."""
        bandwidth = self.read if bytes_written < 0.2 * bytes_read else self.copy
        return max((bytes_read + bytes_written) / bandwidth, flops / getattr(self, rate))


def measure_ceilings(device: torch.device) -> Ceilings:
    """Large tensors, so that caches do not count; random data, because zeros run faster than real ones."""
    cuda = device.type == "cuda"
    values = (1 << 30) if cuda else (1 << 26)
    source = torch.randn(values, device=device)
    target = torch.empty_like(source)
    read = 4 * values / time_call(lambda: source.sum(), device)
    copy = (
        8 * values / time_call(lambda: torch.neg(source, out=target), device)
    )  # a kernel: copy_ may be a slower memcpy

    def product_rate(dtype: torch.dtype) -> float:
        n = 8192 if cuda and dtype == torch.float16 else 4096 if cuda else 1024
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return 2 * n**3 / time_call(lambda: a @ b, device)

    return Ceilings(read, copy, product_rate(torch.float32), product_rate(torch.float16))
