"""svel::va_repa_loss — representation alignment weighted towards low-variance times (paper, VA-REPA)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from ._register import LIBRARY, define

SCHEMA = "va_repa_loss(Tensor projected, Tensor teacher, Tensor weight) -> Tensor"
BACKWARD_SCHEMA = "va_repa_loss_backward(Tensor grad, Tensor projected, Tensor teacher, Tensor weight) -> Tensor"


def _fake(projected, teacher, weight):
    _checks.check_va_repa("va_repa_loss", projected, teacher, weight)
    return projected.new_empty((), dtype=torch.float64 if projected.dtype == torch.float64 else torch.float32)


def _fake_backward(grad, projected, teacher, weight):
    _checks.check_va_repa("va_repa_loss_backward", projected, teacher, weight)
    return projected.new_empty(projected.shape)


_OP = define(SCHEMA, fake=_fake, reference=reference.va_repa_loss)
_BACKWARD = define(
    BACKWARD_SCHEMA, fake=_fake_backward, reference=reference.va_repa_loss_backward, module="va_repa_loss"
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    projected, teacher, weight = ctx.saved_tensors
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise RuntimeError(
            "svel::va_repa_loss is differentiable in projected only: detach teacher and weight, which are constants of "
            "the training step"
        )
    return _BACKWARD(grad, projected, teacher, weight), None, None


def _backward_of_backward(ctx, grad):
    raise RuntimeError("svel::va_repa_loss has no second derivative: compute its gradient without create_graph=True")


torch.library.register_autograd("svel::va_repa_loss", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("svel::va_repa_loss_backward", _backward_of_backward, lib=LIBRARY)


def va_repa_loss(projected: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Weighted negative cosine similarity between projected hidden states and teacher features (paper, VA-REPA).

    l_i = -(1/T) sum_t cos(teacher_it, projected_it); the loss is sum_i weight_i l_i / sum_i weight_i, and zero with
    zero gradient when the weights sum to less than 1e-8. cos divides by max(norm, 1e-8) of each vector.

    Args:
        projected: (B, T, C), float16, bfloat16, float32 or float64. The loss is differentiable in this argument only.
        teacher: (B, T, C), any of the same dtypes.
        weight: (B,) float32 (float64 allowed beside float64), from the time of each sample; not negative.

    Returns:
        0-d float32 (float64 for float64 projected); sums are in float32 or wider.

    Raises:
        RuntimeError: naming the argument, what was expected and what came; and on double backward.
    """
    return _OP(projected, teacher, weight)
