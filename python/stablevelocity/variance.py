"""Variance of the training target as a function of time: where one sample explains x_t, and where many do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablevelocity_kernels import clamp_time, posterior_mean

from .interpolants import Interpolant, get_interpolant

_GATHERED_ELEMENTS = 1 << 23  # the reference subsets are gathered once, up to about this many values


@dataclass(frozen=True)
class VarianceCurve:
    """Variance of the velocity target at times t; float64 tensors on the CPU, K times.

    The values are expected squared norms over all `dim` coordinates of a sample; `per_dimension()` divides them.
    """

    t: Tensor  # (K,) 0 at the data, 1 at the noise
    cfm: Tensor  # (K,) V_CFM: E |v(x_t | x_0) - v(x_t)|^2 of conditional flow matching
    cfm_error: Tensor  # (K,) its standard error
    cfm_quantiles: Tensor  # (K, 2) 15 % and 85 % quantiles of |v(x_t | x_0) - v(x_t)|^2
    stablevm: Tensor | None  # (K,) V_StableVM: E |target over M references - v(x_t)|^2; None without `references`
    stablevm_error: Tensor | None  # (K,) its standard error
    dim: int  # coordinates of a sample
    references: int | None  # M

    def per_dimension(self) -> VarianceCurve:
        """The same curve for the mean over coordinates in place of their sum."""
        names = ("cfm", "cfm_error", "cfm_quantiles", "stablevm", "stablevm_error")
        values = {name: getattr(self, name) for name in names}
        return dataclasses.replace(self, **{k: v / self.dim for k, v in values.items() if v is not None})


def variance_curve(
    data: Tensor,
    times: Sequence[float] | Tensor,
    *,
    interpolant: str | Interpolant = "linear",
    references: int | None = None,
    labels: Tensor | None = None,
    samples: int = 256,
    precision: str = "exact",
    generator: torch.Generator | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> VarianceCurve:
    """Measure V_CFM(t), and V_StableVM(t) for M references, on a finite data set (paper, variance regimes).

    The truth is the marginal velocity of the data set itself, exact through `posterior_mean` over all of it:
    V_CFM(t) = (alpha' - sigma' alpha / sigma)^2 E |x_0 - m|^2. The samples come in independent groups, each with its
    own random subset of M references; the x_0 of a group are drawn from its subset, over which its StableVM targets are
    formed, as in training from a bank. The standard errors are those of the groups' means. The same samples and noise
    serve every time, so that the curve is smooth and its errors are correlated.

    Args:
        data: (n, *S), any floating dtype, on the device to compute on.
        times: K times, 0 at the data; clamped to [1e-5, 1 - 1e-5].
        interpolant: "linear", "cosine" or an `Interpolant`.
        references: M, at most n (with labels: at most the size of each class); None leaves V_StableVM out.
        labels: (n,) int64: the variances given the class, averaged over the data. None: one class.
        samples: how many (x_0, noise) are drawn; the cost is K * samples passes over the data.
        precision: "exact" or "fast", of the posterior means.
        generator: on the CPU; None for the default one.
        callback: called as callback(done, total) after each step of the work.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    interpolant = get_interpolant(interpolant)
    times = torch.as_tensor(times, dtype=torch.float64).reshape(-1).cpu()
    pools = _pools(data, references, labels)
    if samples < 2:
        raise ValueError(f"samples: expected at least 2, got {samples}")
    size, dim = references or 1, math.prod(data.shape[1:])
    groups = samples if references is None else min(samples, max(32, _GATHERED_ELEMENTS // max(1, size * dim)))
    rows = -(-samples // groups)  # of each group

    share = torch.tensor([float(len(pool)) for pool in pools])
    pool_of = torch.multinomial(share, groups, replacement=True, generator=generator)
    subset = torch.stack([_subset(pools[p], size, generator) for p in pool_of.tolist()])  # (groups, M) of data indices
    slot = torch.randint(size, (groups, rows), generator=generator)
    x0 = data[subset.gather(1, slot).flatten().to(data.device)].to(torch.promote_types(data.dtype, torch.float32))
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(data.device)
    refs = data[subset.to(data.device)] if references is not None else None  # (groups, M, *S)
    group_of = torch.arange(groups).repeat_interleave(rows)
    used = pool_of.unique().tolist()
    work = [(p, (pool_of[group_of] == p).nonzero()[:, 0].to(data.device)) for p in used]
    members = [data if labels is None else data[pools[p].to(data.device)] for p in used]
    group_of = group_of.to(data.device)

    cfm = torch.zeros(len(times), groups, rows, dtype=torch.float64)
    stable = torch.zeros_like(cfm)
    for k, time in enumerate(times):
        t = clamp_time(torch.full((x0.shape[0],), float(time), dtype=torch.float64, device=data.device))
        at = interpolant.coefficients(t)
        x_t, factor = interpolant.interpolate(x0, noise, t), at.x0_factor[0] ** 2
        alpha, sigma = at.alpha.to(x0.dtype), at.sigma.to(x0.dtype)
        mean = torch.empty_like(x0)
        for (_, mine), pool in zip(work, members, strict=True):
            mean[mine] = posterior_mean(x_t[mine], pool, alpha[mine], sigma[mine], precision=precision)[0].to(x0.dtype)
        cfm[k] = (factor * _squared_norm(x0 - mean)).reshape(groups, rows).cpu()
        if refs is not None:
            own, _ = posterior_mean(x_t, refs, alpha, sigma, group_of, precision=precision)
            stable[k] = (factor * _squared_norm(own - mean)).reshape(groups, rows).cpu()
        if callback is not None:
            callback(k + 1, len(times))

    quantiles = torch.quantile(cfm.flatten(1), torch.tensor([0.15, 0.85], dtype=torch.float64), dim=1).T
    cfm_value, cfm_error = _mean_and_error(cfm)
    stable_value, stable_error = _mean_and_error(stable) if references is not None else (None, None)
    return VarianceCurve(times, cfm_value, cfm_error, quantiles, stable_value, stable_error, dim, references)


def _pools(data: Tensor, references: int | None, labels: Tensor | None) -> list[Tensor]:
    """The data indices of each class, on the CPU; the arguments checked."""
    if not data.is_floating_point() or data.dim() < 1 or not len(data):
        raise ValueError(f"data: expected floating point samples (n, *S), got {data.dtype} {tuple(data.shape)}")
    pools = [torch.arange(len(data))]
    if labels is not None:
        if labels.shape != data.shape[:1]:
            raise ValueError(f"labels: expected shape {tuple(data.shape[:1])}, got {tuple(labels.shape)}")
        pools = [(labels.cpu() == y).nonzero()[:, 0] for y in labels.unique().tolist()]
    smallest = min(len(pool) for pool in pools)
    if references is not None and not 1 <= references <= smallest:
        raise ValueError(f"references: expected a number in [1, {smallest}], got {references}")
    return pools


def _subset(pool: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """`size` different members of the pool, uniformly."""
    if size == 1:
        return pool[torch.randint(len(pool), (1,), generator=generator)]
    return pool[torch.randperm(len(pool), generator=generator)[:size]]


def _squared_norm(x: Tensor) -> Tensor:
    return x.flatten(1).double().square().sum(1)


def _mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (K,) of values (K, groups, rows) and its standard error, for rows that depend on each other in a group."""
    means = values.mean(2)
    return means.mean(1), means.std(1) / means.shape[1] ** 0.5
