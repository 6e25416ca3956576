"""What the Triton ops share: rounding helpers and the device guard."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """Smallest integer that is not below a / b."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Smallest power of two that is not below max(n, 1): Triton's blocks have such sizes."""
    return 1 << max(n - 1, 0).bit_length()


def on_device_of(t: Tensor) -> torch.cuda.device_of:
    """Context in which Triton launches on the device of t; does nothing for CPU tensors (the interpreter)."""
    return torch.cuda.device_of(t)


@triton.jit
def rounded(value, ptr):
    """`value` in the dtype that ptr points to; float64 goes to 16 bits through float32, as torch does."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    if value.dtype == tl.float64 and dtype != tl.float64:
        value = value.to(tl.float32)
    return value.to(dtype)
