"""svel::affine_step — a step for any interpolant: guidance, a x + b v + c noise and the cast, in one launch."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import _checks, reference
from ._register import define, eager

SCHEMA = (
    "affine_step(Tensor sample, Tensor velocity, Tensor a, Tensor b, Tensor? c=None, Tensor? velocity_uncond=None, "
    "Tensor? noise=None, *, float guidance_scale=1.0) -> Tensor"
)


def _fake(sample, velocity, a, b, c=None, velocity_uncond=None, noise=None, *, guidance_scale=1.0):
    _checks.check_affine_step(sample, velocity, a, b, c, velocity_uncond, noise)
    return sample.new_empty(sample.shape)


_OP = define(SCHEMA, fake=_fake, reference=reference.affine_step)
_EAGER = eager(_OP)


def affine_step(
    sample: Tensor,
    velocity: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    velocity_uncond: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
) -> Tensor:
    """a * sample + b * v + c * noise, where v is the guided velocity.

    v = velocity_uncond + guidance_scale (velocity - velocity_uncond), or `velocity` itself without `velocity_uncond`
    (guidance_scale is then not used).

    Args:
        sample: (N, *S); float16, bfloat16, float32 or float64.
        velocity, velocity_uncond, noise: (N, *S), any of the same dtypes; `noise` and `c` come together.
        a, b, c: (N,) or 0-d, float32 or float64, on the device of sample.
        guidance_scale: classifier-free guidance scale; 1 is no guidance.

    Returns:
        (N, *S) of sample's dtype; arithmetic is in float32 (float64 for a float64 sample).

    Not differentiable: backward through it warns and stops there. (A backward that raises, as the targets have, costs
    more host time than the rest of a small call.)

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    op = _OP if is_dynamo_compiling() else _EAGER
    if velocity_uncond is None:  # the scale is not used, and a keyword handed on is looked up
        return op(sample, velocity, a, b, c, None, noise)
    return op(sample, velocity, a, b, c, velocity_uncond, noise, guidance_scale=guidance_scale)
