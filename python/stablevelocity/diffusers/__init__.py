"""StableVS in diffusers' pipelines; needs the extra `diffusers`."""

from ..optional import require

require("diffusers.schedulers", "diffusers")

from .schedulers import (  # noqa: E402
    StableVSDPMSolverMultistepScheduler,
    StableVSFlowMatchEulerScheduler,
    StableVSUniPCMultistepScheduler,
)

__all__ = [
    "StableVSDPMSolverMultistepScheduler",
    "StableVSFlowMatchEulerScheduler",
    "StableVSUniPCMultistepScheduler",
]
