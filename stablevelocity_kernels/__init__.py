"""Kernels of Stable Velocity flow matching behind torch.ops.svel.

Importing this package declares the ops and loads the fastest implementation each device has: compiled C++ for CPU,
compiled CUDA or Triton for NVIDIA GPUs, plain torch otherwise. `backends()` says which one serves which device.
"""

from ._backend import backends, load_backends
from .info import build_info, plan
from .ops import (
    affine_step,
    bank_draw,
    bank_push_,
    conditional_target_,
    peers,
    posterior_mean,
    posterior_part,
    stable_target,
    stablevs_step,
    va_repa_loss,
)
from .paths import (
    PATHS,
    PREDICTIONS,
    T_EPS,
    PathCoefficients,
    clamp_time,
    path_coefficients,
    prediction_coefficients,
    stablevs_coefficients,
)

__version__ = "0.1.0"
__all__ = [
    "PATHS",
    "PREDICTIONS",
    "T_EPS",
    "PathCoefficients",
    "affine_step",
    "backends",
    "bank_draw",
    "bank_push_",
    "build_info",
    "clamp_time",
    "conditional_target_",
    "path_coefficients",
    "peers",
    "plan",
    "posterior_mean",
    "posterior_part",
    "prediction_coefficients",
    "stable_target",
    "stablevs_coefficients",
    "stablevs_step",
    "va_repa_loss",
]

load_backends()
