"""Gaussian mixtures, for which everything that is measured elsewhere is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from stablevelocity_kernels import clamp_time

from .interpolants import Interpolant, get_interpolant

_CHUNK_ELEMENTS = 1 << 23  # rows x components x dimensions at a time


class GaussianMixture:
    """sum_k w_k N(mu_k, diag(var_k)) in D dimensions, and what x_t = alpha x_0 + sigma noise tells about x_0.

    Given x_t, component k has weight softmax_k(log w_k + log N(x_t; alpha mu_k, alpha^2 var_k + sigma^2)), mean
    mu_k + g_k (x_t - alpha mu_k) with gain g_k = alpha var_k / (alpha^2 var_k + sigma^2), and variance
    var_k sigma^2 / (alpha^2 var_k + sigma^2). No weight is dropped; all is float64 from differences, on any device.

    Args:
        weights: (K,) positive, scaled to sum to 1.
        means: (K, D).
        variances: (K, D), the diagonals, at least 0: 0 makes a component a point.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, weights: Tensor, means: Tensor, variances: Tensor):
        if means.dim() != 2 or not len(means):
            raise ValueError(f"means: expected shape (K, D), got {tuple(means.shape)}")
        if variances.shape != means.shape or not (variances >= 0).all():
            raise ValueError(
                f"variances: expected values of at least 0, shape {tuple(means.shape)}; got {tuple(variances.shape)}"
            )
        if weights.shape != means.shape[:1] or not (weights > 0).all():
            raise ValueError(f"weights: expected {len(means)} positive numbers, got {weights.tolist()}")
        self.weights = weights.double() / weights.double().sum()
        self.means, self.variances = means.double(), variances.double()

    @classmethod
    def random(cls, dim: int, components: int = 100, *, generator: torch.Generator | None = None) -> GaussianMixture:
        """The paper's: means uniform in [-1, 1], variances in [0.01, 0.1], weights in [0.1, 1] before scaling."""
        means = 2 * torch.rand(components, dim, generator=generator, dtype=torch.float64) - 1
        variances = 0.01 + 0.09 * torch.rand(components, dim, generator=generator, dtype=torch.float64)
        weights = 0.1 + 0.9 * torch.rand(components, generator=generator, dtype=torch.float64)
        return cls(weights, means, variances)

    def to(self, device: torch.device | str) -> GaussianMixture:
        """The same mixture on another device."""
        return GaussianMixture(self.weights.to(device), self.means.to(device), self.variances.to(device))

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """(n, D) float64 draws; the generator is on the mixture's device."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64, device=self.means.device)
        return self.means[k] + self.variances[k].sqrt() * noise

    def variance(self) -> float:
        """E |x_0 - E x_0|^2."""
        mean = self.weights @ self.means
        return float(self.weights @ ((self.means - mean).square() + self.variances).sum(1))

    def posterior(self, x_t: Tensor, t: Tensor, interpolant: str | Interpolant = "linear") -> tuple[Tensor, Tensor]:
        """Mean (N, D) and total variance E|x_0 - mean|^2 (N,) of x_0 given x_t (N, D) at times t (N,); float64."""
        at = get_interpolant(interpolant).coefficients(clamp_time(t.double()))
        parts = [self._posterior(x_t[rows].double(), at.alpha[rows], at.sigma[rows]) for rows in self._rows(len(x_t))]
        means, variances = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(variances)

    def posterior_mean(self, x_t: Tensor, t: Tensor, interpolant: str | Interpolant = "linear") -> Tensor:
        """E[x_0 | x_t] (N, D) float64, for x_t (N, D) and t (N,)."""
        return self.posterior(x_t, t, interpolant)[0]

    def velocity(self, x_t: Tensor, t: Tensor, interpolant: str | Interpolant = "linear") -> Tensor:
        """The marginal velocity E[v | x_t] (N, D) float64, for x_t (N, D) and t (N,)."""
        path = get_interpolant(interpolant)
        return path.velocity_from_x0(x_t.double(), self.posterior_mean(x_t, t, path), t)

    def _rows(self, n: int) -> Iterator[slice]:
        most = max(1, _CHUNK_ELEMENTS // max(1, self.means.numel()))
        return (slice(i, i + most) for i in range(0, max(n, 1), most))

    def _posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = alpha[:, None, None], sigma[:, None, None]
        spread = alpha**2 * self.variances + sigma**2  # (n, K, D)
        off = x[:, None] - alpha * self.means
        density = -0.5 * (off.square() / spread + torch.log(2 * math.pi * spread)).sum(2)
        weight = torch.softmax(self.weights.log() + density, 1)  # (n, K)
        means = self.means + alpha * self.variances / spread * off
        mean = torch.einsum("nk,nkd->nd", weight, means)
        within = (self.variances * sigma**2 / spread + (means - mean[:, None]).square()).sum(2)
        return mean, (weight * within).sum(1)
