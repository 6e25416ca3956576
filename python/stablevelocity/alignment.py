"""VA-REPA: representation alignment, weighted towards the times where the target's variance is low."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stablevelocity_kernels import clamp_time, va_repa_loss

from .interpolants import Interpolant, get_interpolant

WeightFunction = Callable[[Tensor, float, Interpolant], Tensor]  # (t (N,), split, interpolant) -> (N,), not negative


def hard_weight(t: Tensor, split: float, interpolant: Interpolant) -> Tensor:
    """1 below the split, 0 from it on."""
    return (t < split).to(t.dtype)


def hard_high_weight(t: Tensor, split: float, interpolant: Interpolant) -> Tensor:
    """0 below the split, 1 from it on: the opposite of "hard", for comparison."""
    return (t >= split).to(t.dtype)


def sigmoid_weight(t: Tensor, split: float, interpolant: Interpolant, sharpness: float = 20.0) -> Tensor:
    """sigmoid(sharpness (split - t))."""
    return torch.sigmoid(sharpness * (split - t))


def cosine_weight(t: Tensor, split: float, interpolant: Interpolant) -> Tensor:
    """(1 + cos(pi t / split)) / 2 below the split, 0 from it on."""
    return 0.5 * (1.0 + torch.cos(math.pi * (t / split).clamp_max(1.0)))


def snr_weight(t: Tensor, split: float, interpolant: Interpolant) -> Tensor:
    """SNR(t) / (SNR(t) + SNR(split)) with SNR = (alpha / sigma)^2, multiplied out: finite at t = 0."""
    at, there = interpolant.coefficients(clamp_time(t)), interpolant.coefficients(clamp_time(t.new_full((), split)))
    signal = (at.alpha * there.sigma) ** 2
    return signal / (signal + (there.alpha * at.sigma) ** 2)


WEIGHTS: dict[str, WeightFunction] = {
    "hard": hard_weight,
    "hard_high": hard_high_weight,
    "sigmoid": sigmoid_weight,
    "cosine": cosine_weight,
    "snr": snr_weight,
}


class VAREPALoss:
    """L = sum_i w(t_i) l_i / sum_i w(t_i), l_i the mean negative cosine similarity of sample i's tokens, averaged over
    teachers (paper, VA-REPA). Zero, with zero gradient, when the weights sum to less than 1e-8.

    The coefficient (the paper's is 0.5) is the caller's: total = objective loss + 0.5 * alignment.

    Args:
        interpolant: "linear", "cosine" or an `Interpolant`; only "snr" looks at it.
        schedule: a name in `WEIGHTS`, or a function (t, split, interpolant) -> weights (N,).
        split: the time in (0, 1] that separates low variance (below) from high.
    """

    def __init__(
        self,
        interpolant: str | Interpolant = "linear",
        schedule: str | WeightFunction = "sigmoid",
        split: float = 0.7,
    ):
        if not callable(schedule) and schedule not in WEIGHTS:
            raise ValueError(f"schedule: expected one of {tuple(WEIGHTS)} or a callable, got {schedule!r}")
        if not 0.0 < split <= 1.0:
            raise ValueError(f"split: expected a number in (0, 1], got {split}")
        self.interpolant, self.split = get_interpolant(interpolant), split
        self.weight_function = schedule if callable(schedule) else WEIGHTS[schedule]

    def weights(self, t: Tensor) -> Tensor:
        """(N,) float32 weights of the times t (N,)."""
        return self.weight_function(t.detach(), self.split, self.interpolant).float()

    def __call__(self, projected: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], t: Tensor) -> Tensor:
        """The loss (0-d float32), differentiable in `projected`.

        Args:
            projected: (N, T, C) projected hidden states, or one such tensor for each teacher.
            teacher: (N, T, C) teacher features, or a sequence of them; T and C may differ between teachers.
            t: (N,) times, 0 at the data.

        Raises:
            ValueError: when the numbers of tensors differ. RuntimeError: from the op, naming the argument.
        """
        projected = [projected] if isinstance(projected, Tensor) else list(projected)
        teacher = [teacher] if isinstance(teacher, Tensor) else list(teacher)
        if not teacher or len(projected) != len(teacher):
            raise ValueError(f"teacher: expected {len(projected)} tensors, as many as projected, got {len(teacher)}")
        weight = self.weights(t)
        losses = [va_repa_loss(p, z.detach(), weight) for p, z in zip(projected, teacher, strict=True)]
        return torch.stack(losses).mean()
