"""The interpolant paths that the ops know by name: the one place for their formulas in Python.

A path is x_t = alpha(t) x_0 + sigma(t) eps with t = 0 at the data and t = 1 at the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

PATHS = ("linear", "cosine")
PREDICTIONS = ("velocity", "x0", "noise", "score")
T_EPS = 1e-5  # t is clamped to [T_EPS, 1 - T_EPS]


class PathCoefficients(NamedTuple):
    """alpha, sigma and their derivatives with respect to t, each of the shape and dtype of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def x0_factor(self) -> Tensor:
        """alpha' - sigma' alpha / sigma: what multiplies x_0 in v(x_t | x_0) = (sigma'/sigma) x_t + factor x_0."""
        return self.d_alpha - self.d_sigma * self.alpha / self.sigma

    @property
    def x_factor(self) -> Tensor:
        """sigma' / sigma: what multiplies x_t in the conditional velocity."""
        return self.d_sigma / self.sigma


def clamp_time(t: Tensor) -> Tensor:
    """t clamped to [1e-5, 1 - 1e-5]; NaN stays NaN."""
    return t.clamp(T_EPS, 1.0 - T_EPS)


def path_coefficients(path: str, t: Tensor) -> PathCoefficients:
    """Coefficients of a named path at time t.

    Args:
        path: "linear" (alpha = 1 - t, sigma = t) or "cosine" (alpha = cos(pi t / 2), sigma = sin(pi t / 2)).
        t: any shape, floating point, 0 at the data and 1 at the noise. Not clamped here.

    Raises:
        RuntimeError: for a path that is not one of the two.
    """
    if path == "linear":
        one = torch.ones_like(t)
        return PathCoefficients(1.0 - t, t, -one, one)
    if path == "cosine":
        angle = 0.5 * math.pi * t
        cos, sin = torch.cos(angle), torch.sin(angle)
        return PathCoefficients(cos, sin, -0.5 * math.pi * sin, 0.5 * math.pi * cos)
    raise RuntimeError(f"path: expected one of {PATHS}, got {path!r}")


def prediction_coefficients(prediction: str, c: PathCoefficients) -> tuple[Tensor, Tensor]:
    """(a, b) with prediction = a x + b m, m the posterior mean of x_0 (paper: the marginal velocity).

    Raises:
        RuntimeError: for a prediction other than "velocity", "x0", "noise", "score".
    """
    if prediction == "velocity":
        return c.x_factor, c.x0_factor
    if prediction == "x0":
        return torch.zeros_like(c.alpha), torch.ones_like(c.alpha)
    if prediction == "noise":
        return 1.0 / c.sigma, -c.alpha / c.sigma
    if prediction == "score":
        return -1.0 / c.sigma**2, c.alpha / c.sigma**2
    raise RuntimeError(f"prediction: expected one of {PREDICTIONS}, got {prediction!r}")


def conditional_coefficients(prediction: str, c: PathCoefficients) -> tuple[Tensor, Tensor]:
    """(a, b) with prediction = a x_0 + b noise for the one x_0 and noise that x_t was made of.

    Unlike `prediction_coefficients` with m = x_0 there is no cancellation as t goes to 0.

    Raises:
        RuntimeError: for a prediction other than "velocity", "x0", "noise", "score".
    """
    zero, one = torch.zeros_like(c.alpha), torch.ones_like(c.alpha)
    if prediction == "velocity":
        return c.d_alpha, c.d_sigma
    if prediction == "x0":
        return one, zero
    if prediction == "noise":
        return zero, one
    if prediction == "score":
        return zero, -1.0 / c.sigma
    raise RuntimeError(f"prediction: expected one of {PREDICTIONS}, got {prediction!r}")


def stablevs_coefficients(
    coefficients: Callable[[Tensor], PathCoefficients], t: Tensor, tau: Tensor, noise_factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, c) of the closed-form step a x + b v + c noise from time t to tau < t (paper, StableVS), in float64.

    The step draws from N(s x + (alpha_tau - s alpha_t) x0_hat, beta^2 I) with beta = noise_factor * sigma_tau,
    s = sqrt(sigma_tau^2 - beta^2) / sigma_t and x0_hat = (v - (sigma'/sigma) x) / (alpha' - sigma' alpha / sigma).

    Args:
        coefficients: the path, as a function of time.
        t, tau: shapes that broadcast; t is clamped to [1e-5, 1 - 1e-5], tau to [0, 1].
    """
    now, after = coefficients(clamp_time(t.double())), coefficients(tau.double().clamp(0.0, 1.0))
    s = after.sigma * math.sqrt(1.0 - noise_factor * noise_factor) / now.sigma
    b = (after.alpha - s * now.alpha) / now.x0_factor
    return s - b * now.x_factor, b, noise_factor * after.sigma
