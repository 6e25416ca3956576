"""One page per op: schema, fake, gradient, documentation. Importing this package declares torch.ops.svel."""

from . import peers
from .affine_step import affine_step
from .bank_draw import bank_draw
from .bank_push_ import bank_push_
from .conditional_target_ import conditional_target_
from .posterior_mean import posterior_mean
from .posterior_part import posterior_part
from .stable_target import stable_target
from .stablevs_step import stablevs_step
from .va_repa_loss import va_repa_loss

__all__ = [
    "affine_step",
    "bank_draw",
    "bank_push_",
    "conditional_target_",
    "peers",
    "posterior_mean",
    "posterior_part",
    "stable_target",
    "stablevs_step",
    "va_repa_loss",
]
