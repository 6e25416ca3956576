"""Interpolants: paths x_t = alpha(t) x_0 + sigma(t) noise, with t = 0 at the data and t = 1 at the noise."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from stablevelocity_kernels import (
    PREDICTIONS,
    PathCoefficients,
    affine_step,
    clamp_time,
    path_coefficients,
    posterior_mean,
    prediction_coefficients,
    stable_target,
    stablevs_coefficients,
    stablevs_step,
)


def expand_rows(per_row: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, ..., 1), to broadcast against `like` (N, *S)."""
    return per_row.reshape(-1, *[1] * (like.dim() - 1))


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(scalar: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, ..., 1) in the dtype that arithmetic with `like` (N, *S) is done in."""
    return expand_rows(scalar.to(_work_dtype(like)), like)


class Interpolant(ABC):
    """A path from data to noise. One's own is a subclass with one method, `coefficients`.

        class VariancePreserving(Interpolant):
            def coefficients(self, t):
                alpha, sigma = torch.sqrt(1 - t * t), t
                return PathCoefficients(alpha, sigma, -t / alpha, torch.ones_like(t))

    Everything else follows, on the same kernels as the named paths. Throughout, x_t, x0, noise and v are (N, *S) of any
    floating dtype and t is (N,), float32 or float64; arithmetic is float32 (float64 for float64 samples), coefficients
    are float64, results have the dtype of the first sample given. Where a formula divides by sigma or by what vanishes
    at an end, t is clamped to [1e-5, 1 - 1e-5], as in the ops.
    """

    name: str | None = None  # the ops' `path`, for the paths that the kernels know themselves

    @abstractmethod
    def coefficients(self, t: Tensor) -> PathCoefficients:
        """alpha, sigma, d alpha/dt, d sigma/dt at t, each of t's shape and dtype, computed with torch operations."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def _inside(self, t: Tensor) -> PathCoefficients:
        return self.coefficients(clamp_time(t.double()))

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma noise; t is not clamped, so t = 0 gives x0."""
        at = self.coefficients(t.double())
        return (_rows(at.alpha, x0) * x0 + _rows(at.sigma, x0) * noise).to(x0.dtype)

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Conditional velocity v(x_t | x0) = alpha' x0 + sigma' noise."""
        at = self._inside(t)
        return (_rows(at.d_alpha, x0) * x0 + _rows(at.d_sigma, x0) * noise).to(x0.dtype)

    def x0_from_velocity(self, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """The x0 whose conditional velocity v is: (v - (sigma'/sigma) x_t) / (alpha' - sigma' alpha/sigma)."""
        at = self._inside(t)
        return ((v - _rows(at.x_factor, x_t) * x_t) / _rows(at.x0_factor, x_t)).to(x_t.dtype)

    def velocity_from_x0(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """(sigma'/sigma) x_t + (alpha' - sigma' alpha/sigma) x0."""
        return self.prediction(x_t, x0, t, "velocity")

    def prediction(self, x_t: Tensor, x0_mean: Tensor, t: Tensor, prediction: str = "velocity") -> Tensor:
        """What a model of kind `prediction` should answer at x_t when the mean of x_0 there is `x0_mean`.

        velocity: (sigma'/sigma) x_t + (alpha' - sigma' alpha/sigma) x0_mean; x0: x0_mean;
        noise: (x_t - alpha x0_mean)/sigma; score: -(x_t - alpha x0_mean)/sigma^2.
        """
        check_prediction(prediction)
        a, b = prediction_coefficients(prediction, self._inside(t))
        return (_rows(a, x_t) * x_t + _rows(b, x_t) * x0_mean).to(x_t.dtype)

    def conditional(self, x0: Tensor, noise: Tensor, t: Tensor, prediction: str = "velocity") -> Tensor:
        """The same for the one x0 and noise that x_t was made of: the target of conditional flow matching.

        Formed from x0 and noise, which unlike `prediction(x_t, x0, t)` has no cancellation as t goes to 0.
        """
        check_prediction(prediction)
        if prediction == "velocity":
            return self.velocity(x0, noise, t)
        if prediction == "score":
            return (-noise / _rows(self._inside(t).sigma, x0)).to(x0.dtype)
        return x0 if prediction == "x0" else noise.to(x0.dtype)

    def target(
        self,
        x_t: Tensor,
        refs: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        counts: Tensor | None = None,
        source: Tensor | None = None,
        *,
        prediction: str = "velocity",
        precision: str = "exact",
        null_rows: bool = False,
    ) -> Tensor:
        """StableVM target over a reference set; arguments and result as in `stablevelocity_kernels.stable_target`.

        A path with a name takes the fused op; any other takes `posterior_mean`, the same kernels, and `prediction`.
        """
        check_prediction(prediction)
        if self.name is not None:
            options = {"path": self.name, "prediction": prediction, "precision": precision, "null_rows": null_rows}
            return stable_target(x_t, refs, t, labels, counts, source, **options)
        at, work = self._inside(t), _work_dtype(x_t)
        alpha, sigma, options = at.alpha.to(work), at.sigma.to(work), {"precision": precision, "null_rows": null_rows}
        mean, _ = posterior_mean(x_t, refs, alpha, sigma, labels, counts, source, **options)
        return self.prediction(x_t, mean, t, prediction)

    def step(
        self,
        sample: Tensor,
        velocity: Tensor,
        t: Tensor,
        tau: Tensor,
        velocity_uncond: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        guidance_scale: float = 1.0,
        noise_factor: float = 0.0,
    ) -> Tensor:
        """StableVS step from t to tau < t; arguments and result as in `stablevelocity_kernels.stablevs_step`."""
        if self.name is not None:
            return stablevs_step(
                sample,
                velocity,
                t,
                tau,
                velocity_uncond,
                noise,
                guidance_scale=guidance_scale,
                noise_factor=noise_factor,
                path=self.name,
            )
        if not 0.0 <= noise_factor <= 1.0:
            raise ValueError(f"noise_factor: expected a number in [0, 1], got {noise_factor}")
        if noise_factor > 0.0 and noise is None:
            raise ValueError(f"noise: expected a tensor because noise_factor = {noise_factor}, got None")
        a, b, c = stablevs_coefficients(self.coefficients, t, tau, noise_factor)
        if noise_factor == 0.0:
            c = noise = None
        return affine_step(sample, velocity, a, b, c, velocity_uncond, noise, guidance_scale=guidance_scale)


class Linear(Interpolant):
    """alpha = 1 - t, sigma = t: rectified flow."""

    name = "linear"

    def coefficients(self, t: Tensor) -> PathCoefficients:
        return path_coefficients(self.name, t)


class Cosine(Interpolant):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the generalised variance-preserving path of SiT."""

    name = "cosine"

    def coefficients(self, t: Tensor) -> PathCoefficients:
        return path_coefficients(self.name, t)


INTERPOLANTS: dict[str, type[Interpolant]] = {"linear": Linear, "cosine": Cosine}


def get_interpolant(interpolant: str | Interpolant) -> Interpolant:
    """An `Interpolant` from its name ("linear" or "cosine"), or the interpolant itself.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(interpolant, Interpolant):
        return interpolant
    if interpolant not in INTERPOLANTS:
        raise ValueError(
            f"interpolant: expected one of {tuple(INTERPOLANTS)} or an Interpolant instance, got {interpolant!r}"
        )
    return INTERPOLANTS[interpolant]()


def check_prediction(prediction: str) -> None:
    """Raises ValueError for a prediction that the table of the method does not have."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: expected one of {PREDICTIONS}, got {prediction!r}")
