"""Variance of the training target as a function of time, and the split: up to where one sample explains x_t."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from stablevelocity_kernels import T_EPS, clamp_time, posterior_mean

from .bank import ReferenceBank
from .interpolants import Interpolant, get_interpolant
from .sharded_bank import ShardedReferenceBank

_GATHERED_ELEMENTS = 1 << 23  # the reference subsets are gathered once, up to about this many values
_ROW_ELEMENTS = 1 << 25  # rows are taken to x_t and compared this many values at a time
_POOLS = 32  # independent pools when the truth is sub-sampled: their spread is the error
_MOST_ROUNDING = 0.15  # nats, about, of a score in float32 before float64 is taken
_SMALLEST_SHARE = 1e-6  # below it a variance over the prior's is rounding
LEVELS = {"variance": 0.05, "own_mass": 0.05}  # criteria of `split_point` and their default levels


@dataclass(frozen=True)
class VarianceCurve:
    """Variance of the velocity target at times t; float64 tensors on the CPU, K times.

    The values are expected squared norms over all `dim` coordinates of a sample; `per_dimension()` divides them. An
    error is a standard error over independent groups of rows.
    """

    t: Tensor  # (K,) 0 at the data, 1 at the noise
    cfm: Tensor  # (K,) V_CFM: E |v(x_t | x_0) - v(x_t)|^2 of conditional flow matching
    cfm_error: Tensor  # (K,) its standard error
    cfm_quantiles: Tensor  # (K, 2) 15 % and 85 % quantiles of |v(x_t | x_0) - v(x_t)|^2
    stablevm: Tensor | None  # (K,) V_StableVM: E |target over M references - v(x_t)|^2; None without `references`
    stablevm_error: Tensor | None  # (K,) its standard error
    dim: int  # coordinates of a sample
    references: int | None  # M
    prior: float  # V_CFM(1), at the noise: the variance of the data times (alpha' - sigma' alpha / sigma)^2
    samples: int  # rows, in groups that depend on each other where G < samples
    cfm_groups: Tensor  # (K, G) V_CFM of each group of rows
    cfm_missing: Tensor  # (K,) at most this much more would V_CFM (and V_StableVM) be with all data as the pool
    own_mass: Tensor | None  # (K,) E p_own, the posterior's weight of the x_0 that x_t was made of; None with `truth`
    own_mass_error: Tensor | None  # (K,)
    own_mass_groups: Tensor | None  # (K, G)
    own_mass_missing: Tensor | None  # (K,) at most this much less would the own mass be with all data as the pool
    entropy: Tensor | None  # (K,) E -sum_j p_j log p_j of the posterior over the data, in nats
    entropy_error: Tensor | None  # (K,)
    effective: Tensor | None  # (K,) E 1 / sum_j p_j^2, the effective number of references; None unless asked for
    effective_error: Tensor | None  # (K,)

    def per_dimension(self) -> VarianceCurve:
        """The same curve for the mean over coordinates in place of their sum."""
        names = ("cfm", "cfm_error", "cfm_quantiles", "stablevm", "stablevm_error", "prior", "cfm_groups")
        values = {name: getattr(self, name) for name in (*names, "cfm_missing")}
        return dataclasses.replace(self, **{k: v / self.dim for k, v in values.items() if v is not None})


@dataclass(frozen=True)
class Split:
    """A split point with its confidence interval. 0 stands for: above the level from the first time on."""

    split: float
    low: float
    high: float
    criterion: str
    level: float


def variance_curve(
    data: Tensor | Dataset | ReferenceBank,
    times: Sequence[float] | Tensor,
    *,
    interpolant: str | Interpolant = "linear",
    references: int | None = None,
    labels: Tensor | bool | None = None,
    samples: int = 256,
    pool: int | None = None,
    effective: bool = False,
    truth: Callable[[Tensor, Tensor], Tensor] | None = None,
    precision: str = "exact",
    generator: torch.Generator | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> VarianceCurve:
    """Measure V_CFM(t), V_StableVM(t) for M references, and the posterior's spread (paper, variance regimes).

    The truth is the marginal velocity of the data set itself, exact through `posterior_mean` over all of it:
    V_CFM(t) = (alpha' - sigma' alpha / sigma)^2 E |x_0 - m|^2. The samples come in independent groups, each with its
    own random subset of M references; the x_0 of a group are drawn from its subset, over which its StableVM targets are
    formed, as in training from a bank. The standard errors are those of the groups' means. The same samples and noise
    serve every time, so that the curve is smooth and its errors are correlated.

    The own mass is exp(logit_own - lse). As x_0 given x_t is itself a draw from the posterior, the mean of p_own is the
    mean of sum_j p_j^2, and the mean of -log p_own the mean entropy: neither takes another pass over the data.

    With `pool`, the truth is over random pools of that many samples, the x_0 among them. V_CFM over a pool is short of
    V_CFM by what the pool's own StableVM variance is. The growth from half of a pool to the whole of it, which costs
    nothing more as the halves merge by their lse, continued along a straight line to all data is `cfm_missing`: a bound
    as long as every further sample adds less than the one before; two standard errors of its own are in it.

    Args:
        data: (n, *S), any floating dtype, on the device to compute on; or a map-style dataset of such samples, or of
            (sample, label); or a bank, whose valid references (without the null label's) are the data.
        times: K times, 0 at the data; clamped to [1e-5, 1 - 1e-5].
        interpolant: "linear", "cosine" or an `Interpolant`.
        references: M, at most n (with labels: at most the size of each class); None leaves V_StableVM out.
        labels: (n,) int64, or True for those that the data hold: the variances given the class, averaged over the
            data. None: one class.
        samples: how many (x_0, noise) are drawn; the cost is K * samples passes over the data.
        pool: over how many samples of a class the truth is formed; None for all, which is exact.
        effective: also measure the effective number of references, from a second pass with sigma / sqrt(2): its lse
            holds log sum_j p_j^2, to about D * 1e-7 (float32).
        truth: truth(x_t, t) -> E[x_0 | x_t] where it is known, e.g. of a `GaussianMixture` that the data are drawn
            from; in place of the pass over the data. x_t (N, *S), t (N,) float64.
        precision: "exact" or "fast", of the posterior means.
        generator: on the CPU; None for the default one.
        callback: called as callback(done, total) after each step of the work.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    interpolant = get_interpolant(interpolant)
    times = torch.as_tensor(times, dtype=torch.float64).reshape(-1).cpu()
    data, labels = _tensors(data, labels)
    classes = _classes(data, references, labels, pool)
    if samples < 2:
        raise ValueError(f"samples: expected at least 2, got {samples}")
    if truth is not None and (pool is not None or effective):
        raise ValueError("truth: expected None, because pool or effective is given; got a function")
    draw = _draw(classes, samples, references or 1, math.prod(data.shape[1:]), pool, generator)
    names = [] if truth is not None else ["own", "entropy"]
    names += ["stable"] * (references is not None) + ["effective"] * effective
    names += ["cfm_missing", "own_missing"] * (pool is not None)
    shape = (len(times), draw.index.numel())
    values = {name: torch.zeros(shape, dtype=torch.float64, device=data.device) for name in ["cfm", *names]}

    spread = _data_variance(data, classes)
    chunks = list(_chunks(draw, data))
    for i, (number, first, last) in enumerate(chunks):
        if i == 0 or number != chunks[i - 1][0]:
            members = draw.sets[number]
            refs = data if len(members) == len(data) else data[members.to(data.device)]
        chunk = _Chunk(data, refs, members, draw, number, first, last, references is not None, spread, generator)
        for k, time in enumerate(times):
            t = clamp_time(torch.full((last - first,), float(time), dtype=torch.float64, device=data.device))
            measured = chunk.measure(t, interpolant, pool is not None, effective, truth, precision)
            for name, value in measured.items():
                values[name][k, first:last] = value
            if callback is not None:
                callback(i * len(times) + k + 1, len(chunks) * len(times))

    quantiles = torch.stack([torch.quantile(row, row.new_tensor([0.15, 0.85])) for row in values["cfm"]]).cpu()
    means = {name: value.reshape(len(times), draw.independent, -1).mean(2) for name, value in values.items()}
    means = {name: value.cpu() for name, value in means.items()}
    result = {name: (value.mean(1), value.std(1) / value.shape[1] ** 0.5) for name, value in means.items()}
    if "own" in result:  # rounded a little beyond what they can be
        result["own"][0].clamp_(max=1.0)
        result["entropy"][0].clamp_(min=0.0)
    absent, zero = (None, None), (torch.zeros_like(times), torch.zeros_like(times))
    missing = {name: result.get(name, zero) for name in ("cfm_missing", "own_missing")}
    missing = {name: value + 2 * error for name, (value, error) in missing.items()}
    at_noise = interpolant.coefficients(torch.tensor([1.0 - T_EPS], dtype=torch.float64))
    return VarianceCurve(
        t=times,
        cfm=result["cfm"][0],
        cfm_error=result["cfm"][1],
        cfm_quantiles=quantiles,
        stablevm=result.get("stable", absent)[0],
        stablevm_error=result.get("stable", absent)[1],
        dim=math.prod(data.shape[1:]),
        references=references,
        prior=float(at_noise.x0_factor) ** 2 * spread,
        samples=draw.index.numel(),
        cfm_groups=means["cfm"],
        cfm_missing=missing["cfm_missing"],
        own_mass=result.get("own", absent)[0],
        own_mass_error=result.get("own", absent)[1],
        own_mass_groups=means.get("own"),
        own_mass_missing=missing["own_missing"] if truth is None else None,
        entropy=result.get("entropy", absent)[0],
        entropy_error=result.get("entropy", absent)[1],
        effective=result.get("effective", absent)[0],
        effective_error=result.get("effective", absent)[1],
    )


def split_point(
    curve: VarianceCurve,
    criterion: str = "variance",
    *,
    level: float | None = None,
    confidence: float = 0.95,
) -> Split:
    """The time up to which one sample explains x_t: where the curve first rises to a level.

    * "variance": V_CFM(t) over the prior's variance V_CFM(1), by default up to 0.05;
    * "own_mass": the posterior's weight on other samples than the one that x_t was made of, by default up to 0.05.

    Between the curve's times its logarithm is taken as straight, so the times should be near the split. The interval is
    from where the curve plus its error (delta method for the logarithm) rises to the level to where the curve less its
    error does. Near the split few rows carry most of the variance, so plus its error means with one row more, at the
    prior's variance (or without own mass), that happened not to be drawn; and with all that a sub-sampled pool misses.
    On Gaussian data in 8 and 64 dimensions, 95 % intervals held the split in 91 % of 150 runs with 256 rows and 93 % to
    95 % with 1,024 by "variance", in 95 % to 99 % by "own_mass".

    A path whose velocity is unbounded at the noise (d alpha/dt is infinite there) has no finite prior: take "own_mass".

    Args:
        curve: of `variance_curve`, with increasing times.
        level: in (0, 1); None for the criterion's default.
        confidence: of the interval, in (0, 1).

    Returns:
        0 when the curve is above the level at its first time, its last time when it never rises to the level.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if criterion not in LEVELS:
        raise ValueError(f"criterion: expected one of {tuple(LEVELS)}, got {criterion!r}")
    level = LEVELS[criterion] if level is None else level
    for name, value in (("level", level), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name}: expected a number in (0, 1), got {value}")
    if len(curve.t) < 2 or not (curve.t.diff() > 0).all():
        raise ValueError(f"curve: expected at least two increasing times, got {curve.t.tolist()}")
    if criterion == "variance":
        share, missing = curve.cfm_groups / curve.prior, curve.cfm_missing / curve.prior
    elif curve.own_mass_groups is None:
        raise ValueError("curve: expected one with the own mass, got one measured against `truth`")
    else:
        share, missing = 1 - curve.own_mass_groups, curve.own_mass_missing
    if not share.isfinite().all():
        raise ValueError("curve: expected finite values over a positive prior's variance, got NaN or Inf")
    z, groups = NormalDist().inv_cdf((1 + confidence) / 2), share.shape[1]
    mean, error = share.mean(1), share.std(1) / groups**0.5
    unseen = torch.cat([share, (mean + (1 - mean) * groups / curve.samples)[:, None]], 1)  # a group with one row at 1
    risen, unsure = unseen.mean(1), unseen.std(1) / groups**0.5
    # Of shares none of which is below 0 the error is at most the mean; more is rounding, which adds.
    ratio = unsure / risen.clamp_min(1e-300)
    above = torch.where(ratio <= 1, risen * torch.exp(z * ratio.clamp_max(1)), risen + math.expm1(z) * unsure) + missing
    below = mean * torch.exp(-z * error / mean.clamp_min(1e-300))
    low, split, high = (float(crossing(curve.t, value, level)) for value in (above, mean, below))
    return Split(split, low, high, criterion, level)


def crossing(t: Tensor, share: Tensor, level: float) -> Tensor:
    """Where `share` (K,) first rises to `level`, between two of the times t (K,) on a straight line of its logarithm.

    0-d, on the device of t and without waiting for it: 0 when the first is above the level, t[-1] when none is.
    """
    over = share >= level
    k = over.int().argmax(0, keepdim=True)  # the first of them
    before = (k - 1).clamp_min(0)
    log = share.clamp_min(_SMALLEST_SHARE).log()
    rise = log[k] - log[before]
    at = torch.where(rise > 0, (math.log(level) - log[before]) / rise, 1.0).clamp(0.0, 1.0)
    found = torch.where(k > 0, t[before] + at * (t[k] - t[before]), 0.0)[0]
    return torch.where(over.any(), found, t[-1])


def load_split(path: str | os.PathLike) -> Split:
    """The split that `svel variance` wrote into a variance.json, given by its path or its folder's.

    Raises:
        ValueError: when there is none.
    """
    path = Path(path)
    file = path / "variance.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text())
        return Split(record["split"], *record["interval"], record["criterion"], record["level"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"split: expected a variance.json that svel variance wrote, got {str(path)!r}") from None


def fixed_split(value: float | str | os.PathLike | Split, argument: str) -> float:
    """A split as a number, from one, a `Split`, or the path of a variance.json.

    Raises:
        ValueError: naming the argument.
    """
    try:
        if isinstance(value, (str, os.PathLike)):
            value = load_split(value)
        return float(value.split if isinstance(value, Split) else value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{argument}: expected a number, a Split, the path of a variance.json, or 'auto' where training measures "
            f"it; got {value!r}"
        ) from None


# -- the data, and what is drawn from them


def _tensors(data: Tensor | Dataset | ReferenceBank, labels: Tensor | bool | None) -> tuple[Tensor, Tensor | None]:
    """Every kind of data that `variance_curve` takes, as samples and the labels to use."""
    own = None
    if isinstance(data, ShardedReferenceBank) and data.parts > 1:
        raise ValueError(
            f"data: expected a bank that this process holds whole, got part {data.part} of {data.parts} (svel variance "
            "reads the bank of a checkpoint whole)"
        )
    if isinstance(data, ReferenceBank):
        data, own = bank_samples(data.refs, data.counts, data.num_classes)
    elif isinstance(data, Dataset):
        if isinstance(data, TensorDataset):
            parts = data.tensors
        elif hasattr(data, "__getitems__"):
            parts = data.__getitems__(range(len(data)))
        else:
            rows = [data[i] for i in range(len(data))]
            rows = [(row,) if isinstance(row, Tensor) else row for row in rows]
            parts = [torch.stack([torch.as_tensor(row[i]) for row in rows]) for i in range(min(2, len(rows[0])))]
        data, own = (*parts, None)[:2]
    if labels is True and own is None:
        raise ValueError("labels: expected a tensor, because the data hold no labels; got True")
    return data, own if labels is True else None if labels is False else labels


def bank_samples(refs: Tensor, counts: Tensor, num_classes: int) -> tuple[Tensor, Tensor | None]:
    """The valid references of a bank's class rings, (n, *S), and their classes (n,), None without classes.

    refs (G, M, *S) and counts (G,) are the buffers of a `ReferenceBank`. Waits for the device.
    """
    filled = [min(count, refs.shape[1]) for count in counts[: max(1, num_classes)].tolist()]
    if not sum(filled):
        raise ValueError("data: expected a bank with references, got an empty one")
    values = torch.cat([refs[y, :count] for y, count in enumerate(filled)])
    labels = torch.repeat_interleave(torch.arange(len(filled)), torch.tensor(filled))
    return values, labels if num_classes else None


def _classes(data: Tensor, references: int | None, labels: Tensor | None, pool: int | None) -> list[Tensor]:
    """The data indices of each class, on the CPU; the arguments checked."""
    if not isinstance(data, Tensor) or not data.is_floating_point() or data.dim() < 1 or not len(data):
        got = f"{data.dtype} {tuple(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
        raise ValueError(f"data: expected floating point samples (n, *S), got {got}")
    classes = [torch.arange(len(data))]
    if labels is not None:
        if labels.shape != data.shape[:1]:
            raise ValueError(f"labels: expected shape {tuple(data.shape[:1])}, got {tuple(labels.shape)}")
        labels = labels.cpu()
        classes = [(labels == y).nonzero()[:, 0] for y in labels.unique().tolist()]
    smallest = min(len(members) for members in classes)
    if pool is not None:
        if pool < 2:
            raise ValueError(f"pool: expected at least 2 or None, got {pool}")
        smallest = min(smallest, pool)
    if references is not None and not 1 <= references <= smallest:
        raise ValueError(f"references: expected a number in [1, {smallest}], got {references}")
    return classes


@dataclass(frozen=True)
class _Draw:
    """Groups of rows, each with a subset of references, in the order of the sets that their truth is over."""

    sets: list[Tensor]  # data indices of a class, or of a pool of it
    sizes: list[int]  # of the class of each set
    set_of: Tensor  # (groups,) ascending
    subset: Tensor  # (groups, M) data indices
    index: Tensor  # (groups, rows) of x_0, from the group's subset
    independent: int  # groups, or groups of groups, that are independent of each other


def _draw(
    classes: list[Tensor], samples: int, size: int, dim: int, pool: int | None, generator: torch.Generator | None
) -> _Draw:
    share = torch.tensor([float(len(members)) for members in classes])
    groups = samples if size == 1 else min(samples, max(32, _GATHERED_ELEMENTS // max(1, size * dim)))
    sets, sizes = classes, [len(members) for members in classes]
    if pool is None:
        counts = torch.multinomial(share, groups, replacement=True, generator=generator).bincount(minlength=len(sets))
        set_of, independent = torch.arange(len(sets)).repeat_interleave(counts), groups
    else:
        independent = min(_POOLS, samples)
        of = torch.multinomial(share, independent, replacement=True, generator=generator).tolist()
        sets, sizes = [_subset(classes[y], pool, generator) for y in of], [sizes[y] for y in of]
        groups = -(-groups // independent) * independent
        set_of = torch.arange(independent).repeat_interleave(groups // independent)
    rows = -(-samples // groups)  # of each group
    if size == 1:  # as many groups as samples: drawn together
        counts = set_of.bincount(minlength=len(sets)).tolist()
        drawn = [s[torch.randint(len(s), (count,), generator=generator)] for s, count in zip(sets, counts, strict=True)]
        subset = torch.cat(drawn)[:, None]
    else:
        subset = torch.stack([_subset(sets[s], size, generator) for s in set_of.tolist()])
    slot = torch.randint(size, (groups, rows), generator=generator)
    return _Draw(sets, sizes, set_of, subset, subset.gather(1, slot), independent)


def _subset(pool: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """`size` different members of the pool, uniformly; all of a smaller pool."""
    return pool[torch.randperm(len(pool), generator=generator)[:size]]


def _chunks(draw: _Draw, data: Tensor) -> Iterator[tuple[int, int, int]]:
    """(set, first row, last row + 1): all rows in order, as many at a time as memory allows, each of one set."""
    rows, most = draw.index.shape[1], max(1, _ROW_ELEMENTS // max(1, math.prod(data.shape[1:])))
    numbers, counts = draw.set_of.unique_consecutive(return_counts=True)
    start = 0
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        end = start + count * rows
        for first in range(start, end, most):
            yield number, first, min(first + most, end)
        start = end


def _data_variance(data: Tensor, classes: list[Tensor]) -> float:
    """E |x_0 - its class's mean|^2."""
    total, most = 0.0, max(1, _ROW_ELEMENTS // max(1, math.prod(data.shape[1:])))
    for members in classes:
        parts = [part.to(data.device) for part in members.split(most)]
        mean = sum(data[part].sum(0, dtype=torch.float64) for part in parts) / len(members)
        total += sum(float((data[part].double() - mean).square().sum()) for part in parts)
    return total / len(data)


# -- measuring some rows


class _Chunk:
    """Rows first..last of the draw, with their noise: made once, measured at every time."""

    def __init__(self, data, refs, members, draw, number, first, last, with_subsets, spread, generator):
        index = draw.index.flatten()[first:last]
        self.refs, self.dim, self.spread = refs, math.prod(data.shape[1:]), spread
        self.x0 = data[index.to(data.device)].to(torch.promote_types(data.dtype, torch.float32))
        self.noise = _noise_like(self.x0, generator)
        group = torch.arange(first, last) // draw.index.shape[1]
        self.subsets = None
        if with_subsets:
            self.subsets = data[draw.subset[group[0] : group[-1] + 1].to(data.device)]  # (groups here, M, *S)
            self.group = (group - group[0]).to(data.device)
        self.left_out = (draw.sizes[number] - len(members)) / (len(members) / 2)  # in halves of the pool
        self.half = len(members) // 2
        place = torch.zeros(len(data), dtype=torch.bool)
        place[members[: self.half]] = True
        self.in_first = place[index].to(data.device)

    def measure(
        self,
        t: Tensor,
        interpolant: Interpolant,
        halves: bool,
        effective: bool,
        truth: Callable[[Tensor, Tensor], Tensor] | None,
        precision: str,
    ) -> dict[str, Tensor]:
        """What the curve averages, each (rows,) float64."""
        at = interpolant.coefficients(t)
        x_t = interpolant.interpolate(self.x0, self.noise, t)
        alpha, sigma = at.alpha.to(x_t.dtype), at.sigma.to(x_t.dtype)
        x0_factor, ratio = torch.stack([at.x0_factor[0], at.alpha[0] / at.sigma[0]]).tolist()  # one wait for both
        factor, rounding = x0_factor**2, torch.finfo(x_t.dtype).eps * self.spread * ratio**2
        wide, out = rounding > _MOST_ROUNDING, {}
        if truth is not None:
            mean = truth(x_t, t).to(x_t.dtype)
        else:
            means, lses = self._posterior(x_t, alpha, sigma, halves, precision, wide)
            mean, lse = _merge(means, lses)
            own = self._own_logit(x_t, alpha, sigma, wide)
            out["own"], out["entropy"] = (own - lse).exp(), lse - own
            if halves:
                nearest = torch.where(_like(self.in_first, means[0]), *means)  # the mean over its own half
                out["cfm_missing"] = self.left_out * factor * _squared_norm(mean - nearest)
                lost = (own - torch.where(self.in_first, *lses)).exp() - out["own"]
                out["own_missing"] = self.left_out * lost
            if effective:
                out["effective"] = self._effective(x_t, alpha, sigma, lse, halves, precision, wide)
        out["cfm"] = factor * _squared_norm(self.x0 - mean)
        if self.subsets is not None:
            own_mean, _ = posterior_mean(x_t, self.subsets, alpha, sigma, self.group, precision=precision)
            out["stable"] = factor * _squared_norm(own_mean - mean)
        return out

    def _posterior(self, x_t, alpha, sigma, halves, precision, wide) -> tuple[list[Tensor], list[Tensor]]:
        """Means and lses (float64) over the whole set, or over its two halves."""
        parts = [self.refs[: self.half], self.refs[self.half :]] if halves else [self.refs]
        means, lses = zip(
            *(posterior_mean(x_t, part, alpha, sigma, precision=precision) for part in parts), strict=True
        )
        if wide:
            return list(means), [_wide_lse(x_t, part, alpha, sigma) for part in parts]
        return list(means), [lse.double() for lse in lses]

    def _own_logit(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, wide: bool) -> Tensor:
        """The logit of x_0, as `posterior_mean` defines it for its lse."""
        x0 = self.x0.double() if wide else self.x0
        distance = _squared_norm(x_t - _like(alpha.to(x0.dtype), x0) * x0)
        return self.dim / 2 - distance / (2 * sigma.double() ** 2)

    def _effective(self, x_t, alpha, sigma, lse, halves, precision, wide) -> Tensor:
        """1 / sum_j p_j^2. With logit_j = D/2 - d_j and sigma / sqrt(2), lse' = D/2 + log sum_j exp(-2 d_j), so
        log sum_j p_j^2 = (lse' - D/2) - 2 (lse - D/2); the 2 as the rounded sigmas have it, which matters for large D.
        """
        narrow = sigma / math.sqrt(2)
        _, doubled = _merge(*self._posterior(x_t, alpha, narrow, halves, precision, wide))
        power = (sigma.double() / narrow.double()) ** 2
        squares = (doubled - self.dim / 2) - power * (lse - self.dim / 2)
        return (-squares).exp().clamp(1.0, float(len(self.refs)))


def _wide_lse(x: Tensor, refs: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The lse of `posterior_mean`, from scores in float64. (N,) float64.

    Scores grow as 1 / sigma^2, and what float32 rounds of them with them: a mean over one reference does not mind, but
    the lse does, by some nats where sigma is 0.01 and D a few thousand.
    """
    alpha, sigma, most = alpha.double()[:, None], sigma.double()[:, None], _ROW_ELEMENTS
    centre = refs.flatten(1).mean(0, dtype=torch.float64)
    y = x.flatten(1).double() - alpha * centre
    lse = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    for part in refs.flatten(1).split(max(1, most // centre.numel())):
        d = part.double() - centre
        half_norm = d.square().sum(1) / 2
        rows = max(1, most // len(part))
        for here, a, s, total in zip(*(v.split(rows) for v in (y, alpha, sigma, lse)), strict=True):
            scores = (here @ d.T - a * half_norm) * (a / s**2)
            total.copy_(torch.logaddexp(total, scores.logsumexp(1)))
    return lse + centre.numel() / 2 - y.square().sum(1) / (2 * sigma[:, 0] ** 2)


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Normal numbers made where x is: on a GPU from a seed that the generator, on the CPU, draws."""
    if x.device.type != "cpu":
        seed = torch.randint(2**62, (), generator=generator)
        generator = torch.Generator(x.device).manual_seed(int(seed))
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _merge(means: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Results over disjoint references as one."""
    if len(means) == 1:
        return means[0], lses[0]
    lse = torch.logaddexp(*lses)
    share = _like((lses[1] - lse).exp().to(means[0].dtype), means[0])
    return means[0] + share * (means[1] - means[0]), lse


def _like(per_row: Tensor, x: Tensor) -> Tensor:
    return per_row.reshape(-1, *[1] * (x.dim() - 1))


def _squared_norm(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1).double()
