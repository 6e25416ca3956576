"""What the op tests share: how to call each implementation, and every formula once more, directly and in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import pytest
import torch
from torch import Tensor

from stablevelocity_kernels import reference
from stablevelocity_kernels.ops._register import triton_implementation
from stablevelocity_kernels.testing import make_noisy, make_references, photograph_pieces, relative_error

ALL_T = (0.05, 0.2, 0.5, 0.8, 0.95, 0.999)


@dataclass(frozen=True)
class Implementation:
    """One implementation of every op: "served" (torch.ops.svel), "reference" or "triton", on "cpu" or "cuda"."""

    name: str
    device: str

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter: thousands of times slower, and it truncates to bfloat16 where hardware rounds."""
        return self.name == "triton" and self.device == "cpu"

    def op(self, name: str) -> Callable:
        """The op as a function of tensors on any device: moved to this implementation's device, and results to CPU.

        Arguments that the op changes in place are not supported here; use `on_device`.
        """

        def call(*args, **kwargs):
            moved = [a.to(self.device) if isinstance(a, Tensor) else a for a in args]
            kwargs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            with numpy.errstate(all="ignore"):  # the interpreter is numpy, and NaN in a row is meant to spread there
                out = self.on_device(name)(*moved, **kwargs)
            return tuple(o.cpu() for o in out) if isinstance(out, tuple) else out.cpu()

        return call

    def on_device(self, name: str) -> Callable:
        """The op as it is, for tensors on this implementation's device."""
        if self.name == "reference":
            return getattr(reference, name)
        if self.name == "triton":
            return triton_implementation(name)
        return getattr(torch.ops.svel, name)


def schedule(path: str, t: float) -> tuple[float, float, float, float]:
    """alpha, sigma, alpha', sigma' of a path at time t."""
    if path == "linear":
        return 1 - t, t, -1.0, 1.0
    angle = math.pi * t / 2
    return math.cos(angle), math.sin(angle), -math.pi / 2 * math.sin(angle), math.pi / 2 * math.cos(angle)


def set_of_row(refs: Tensor, row: int, labels=None, counts=None, source=None) -> Tensor:
    """The references of one row as a float64 matrix (m, D)."""
    groups = refs[None] if labels is None else refs
    label = 0 if labels is None else int(labels[row])
    members = []
    for g in range(groups.shape[0]):
        if label in (-1, g):
            count = groups.shape[1] if counts is None else max(0, min(groups.shape[1], int(counts[g])))
            members.append(groups[g, :count])
    if source is not None:
        members.append(
            source[row : row + 1].to(groups.dtype) if source.dtype == groups.dtype else source[row : row + 1]
        )
    return torch.cat(
        [m.reshape(m.shape[0], math.prod(refs.shape[1 if labels is None else 2 :])).double() for m in members]
    )


def direct_mean(x: Tensor, refs: Tensor, alpha, sigma, labels=None, counts=None, source=None) -> tuple[Tensor, Tensor]:
    """Posterior mean and lse by the direct formula in float64, one row after another; NaN for an empty set."""
    means, lses = [], []
    for row in range(x.shape[0]):
        r = set_of_row(refs, row, labels, counts, source)
        a, s = float(alpha[row]), float(sigma[row])
        point = x[row].reshape(-1).double()
        if len(r) == 0 or math.isnan(a) or math.isnan(s):
            means.append(torch.full_like(point, math.nan))
            lses.append(torch.tensor(math.nan, dtype=torch.float64))
            continue
        logits = -((point - a * r) ** 2).sum(1) / (2 * s * s)
        means.append(torch.softmax(logits, 0) @ r)
        lses.append(torch.logsumexp(logits, 0) + point.numel() / 2)
    shape = x.shape
    return torch.stack(means).reshape(shape), torch.stack(lses)


def largest_logit(x: Tensor, refs: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """max_j |x - alpha r_j|^2 / (2 sigma^2) of each row, or 1 if that is less: what an error of lse is relative to."""
    distance = torch.stack(
        [((p - a * refs.double()) ** 2).sum(1).max() for p, a in zip(x.double(), alpha, strict=True)]
    )
    return (distance / (2 * sigma.double() ** 2)).clamp_min(1.0)


def predict(x: Tensor, mean: Tensor, t: Tensor, path: str, prediction: str) -> Tensor:
    """The table of predictions in float64, one row after another, with t clamped as documented."""
    rows = []
    for row, point, m in zip(t.tolist(), x.double(), mean.double(), strict=True):
        time = row if math.isnan(row) else min(max(row, 1e-5), 1 - 1e-5)
        alpha, sigma, d_alpha, d_sigma = schedule(path, time)
        rows.append(
            {
                "velocity": d_sigma / sigma * point + (d_alpha - d_sigma * alpha / sigma) * m,
                "x0": m,
                "noise": (point - alpha * m) / sigma,
                "score": -(point - alpha * m) / sigma**2,
            }[prediction]
        )
    return torch.stack(rows)


def direct_target(x, refs, t, labels=None, counts=None, source=None, *, path="linear", prediction="velocity") -> Tensor:
    """stable_target by the direct formula in float64."""
    times = [v if math.isnan(v) else min(max(v, 1e-5), 1 - 1e-5) for v in t.tolist()]
    alpha, sigma, _, _ = zip(*(schedule(path, v) for v in times), strict=True)
    return predict(x, direct_mean(x, refs, alpha, sigma, labels, counts, source)[0], t, path, prediction)


@dataclass
class Problem:
    """Rows at every time of ALL_T, `each` of them per time, drawn from the references themselves."""

    x: Tensor
    refs: Tensor
    t: Tensor
    each: int

    def worst(self, out: Tensor, expected: Tensor) -> float:
        """Largest relative error over the times: rows of one time are compared together, since scales differ."""
        pairs = zip(out.split(self.each), expected.split(self.each), strict=True)
        return max(relative_error(o, e) for o, e in pairs)


def make_problem(
    d: int, m: int, geometry: str, rng: torch.Generator, *, times=ALL_T, each=4, dtype=torch.float32
) -> Problem:
    """x (len(times) each, d) float32, refs (m, d) of dtype, t."""
    return problem_over(make_references(m, d, geometry, rng).to(dtype), rng, times=times, each=each)


def problem_over(refs: Tensor, rng: torch.Generator, *, times=ALL_T, each=4) -> Problem:
    """Rows drawn from these references."""
    m = len(refs)
    t = torch.tensor(times).repeat_interleave(each)
    picked = refs[torch.randint(m, (len(t),), generator=rng)]
    return Problem(make_noisy(picked, t, rng), refs, t, each)


def photographs(count: int, side: int, rng: torch.Generator) -> Tensor:
    """`photograph_pieces`, or the test is skipped where scikit-learn is missing."""
    pytest.importorskip("sklearn", exc_type=ImportError)
    return photograph_pieces(count, side, rng)


@dataclass
class Sets:
    """One pattern of the arguments that say which references a row has."""

    refs: Tensor
    labels: Tensor | None
    counts: Tensor | None
    source: Tensor | None

    def args(self) -> tuple:
        return self.labels, self.counts, self.source


SET_PATTERNS = (
    "shared",
    "shared, counts",
    "shared, source",
    "shared, one reference",
    "labels",
    "labels, int32 counts",
    "labels, int64 counts, source",
    "one label for all",
    "all references",
    "all references, counts",
    "some null labels, counts, source",
    "empty groups",
    "only the source",
)


def make_sets(pattern: str, n: int, sample: tuple[int, ...], rng: torch.Generator, groups=3, m=7) -> Sets:
    """References near each other (so that weights stay spread), and NaN in every slot beyond its count."""

    def values(*lead: int) -> Tensor:
        return 1.0 + 0.5 * torch.randn(*lead, *sample, generator=rng)

    source = values(n) if "source" in pattern else None
    if pattern.startswith("shared") or pattern == "only the source":
        refs = values(1 if pattern == "shared, one reference" else m)
        counts = None
        if "counts" in pattern:
            counts = torch.tensor([m - 3])
        if pattern == "only the source":
            counts = torch.tensor([0])
        if counts is not None:
            refs[int(counts) :] = math.nan
        return Sets(refs, None, counts, source)
    refs = values(groups, m)
    labels = torch.randint(groups, (n,), generator=rng)
    if pattern == "one label for all":
        labels.fill_(groups - 1)
    elif pattern.startswith("all"):
        labels.fill_(-1)
    elif pattern.startswith("some null"):
        labels[::2] = -1
    counts = None
    if "counts" in pattern or pattern == "empty groups":
        counts = torch.tensor([m - 2, 1, m])
        if pattern == "empty groups":
            counts[0] = counts[2] = 0
            labels[:3] = torch.tensor([0, 1, -1])
        for g, count in enumerate(counts.tolist()):
            refs[g, count:] = math.nan
        counts = counts.to(torch.int32 if "int32" in pattern else torch.int64)
    return Sets(refs, labels, counts, source)


def offset_by_one(t: Tensor) -> Tensor:
    """The same values at an address that is one element off any alignment; contiguous."""
    storage = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return storage[1:].copy_(t.reshape(-1)).view(t.shape)


def with_gaps(t: Tensor) -> Tensor:
    """The same values, not contiguous: every second element, in every dimension, of a larger tensor."""
    wide = torch.zeros([2 * s for s in t.shape], dtype=t.dtype, device=t.device)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


def between(a: Tensor, b: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Noisy rows whose logits of the references a and b differ by about one; alpha and sigma (n, 1), float64."""
    gap = (a - b).double()
    noise = torch.randn(gap.shape, dtype=torch.float64, device=gap.device)
    length = gap.norm(dim=1, keepdim=True)
    unit = gap / length
    noise -= (noise * unit).sum(1, keepdim=True) * unit
    tilt = torch.randn(len(gap), 1, dtype=torch.float64, device=gap.device) * sigma**2 / alpha / length
    return (alpha * (a.double() + b.double()) / 2 + sigma * noise + tilt * unit).float()
