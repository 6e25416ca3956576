"""Plain-torch expressions of every op's formula: what a careful user would write, and what we are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# StableVM target, velocity on the linear path: (x - m) / t with m = softmax_j(-|x - (1-t) r_j|^2 / (2 t^2)) @ r.
# x (N, D) float32, refs (M, D) or (K, M, D), t (N,), labels (N,) >= 0.


def _column(t: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - t[:, None], t[:, None]


def target_broadcast(x: Tensor, refs: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Gather each row's set and take the distances directly."""
    alpha, sigma = _column(t)
    own = refs[labels].float()  # (N, M, D)
    logits = (x[:, None] - alpha[:, :, None] * own).square().sum(2) / (-2 * sigma**2)
    return (x - (torch.softmax(logits, 1)[:, :, None] * own).sum(1)) / sigma


def target_bmm(x: Tensor, refs: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Gather, then the expanded product centred on the set's mean, as two batched matrix products."""
    alpha, sigma = _column(t)
    own = refs[labels].float()
    centre = own.mean(1)
    own = own - centre[:, None]
    y = x - alpha * centre
    logits = (alpha / sigma**2) * (torch.bmm(own, y[:, :, None])[:, :, 0] - 0.5 * alpha * own.square().sum(2))
    mean = centre + torch.bmm(torch.softmax(logits, 1)[:, None], own)[:, 0]
    return (x - mean) / sigma


def target_per_label(x: Tensor, refs: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """A Python loop over the labels present, a matrix product for each. Synchronises; the quickest way on a CPU."""
    out = torch.empty_like(x)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        out[rows] = target_matmul(x[rows], refs[label], t[rows])
    return out


def target_matmul(x: Tensor, refs: Tensor, t: Tensor) -> Tensor:
    """One shared pool: the centred product in float32, as two matrix products."""
    alpha, sigma = _column(t)
    pool = refs.float()
    centre = pool.mean(0)
    pool = pool - centre
    y = x - alpha * centre
    logits = (alpha / sigma**2) * (y @ pool.T - 0.5 * alpha * pool.square().sum(1))
    return (x - centre - torch.softmax(logits, 1) @ pool) / sigma


def target_matmul_chunks(x: Tensor, refs: Tensor, t: Tensor, chunk: int = 1 << 16) -> Tensor:
    """The same for a pool whose float32 copy would not fit: a chunk of references at a time, softmax as it goes."""
    alpha, sigma = _column(t)
    centre = refs[:chunk].float().mean(0)
    y = x - alpha * centre
    best, total, mean = torch.full_like(alpha, -torch.inf), torch.zeros_like(alpha), torch.zeros_like(x)
    for part in refs.split(chunk):
        pool = part.float() - centre
        logits = (alpha / sigma**2) * (y @ pool.T - 0.5 * alpha * torch.linalg.vector_norm(pool, dim=1).square())
        top = torch.maximum(best, logits.amax(1, keepdim=True))
        weights, keep = torch.exp(logits - top), torch.exp(best - top)
        total, mean, best = total * keep + weights.sum(1, keepdim=True), mean * keep + weights @ pool, top
    return (x - centre - mean / total) / sigma


def target_with_null(x: Tensor, refs: Tensor, t: Tensor, labels: Tensor, nulls: int) -> Tensor:
    """A class bank whose first `nulls` rows take all references: a pool for these, a gather for the others."""
    over_all = target_matmul_chunks(x[:nulls], refs.flatten(0, 1), t[:nulls])
    return torch.cat([over_all, target_bmm(x[nulls:], refs, t[nulls:], labels[nulls:])])


def target_matmul_half(x: Tensor, refs: Tensor, t: Tensor) -> Tensor:
    """One shared pool with half-precision products: the matrix units' speed, not the contract's accuracy."""
    alpha, sigma = _column(t)
    norms = torch.linalg.vector_norm(refs, dim=1, dtype=torch.float32).square()
    logits = (alpha / sigma**2) * ((x.to(refs.dtype) @ refs.T).float() - 0.5 * alpha * norms)
    return (x - (torch.softmax(logits, 1).to(refs.dtype) @ refs).float()) / sigma


def target_sdpa(x: Tensor, refs: Tensor, t: Tensor) -> Tensor:
    """One shared pool through scaled_dot_product_attention, |r|^2 as one more column of the keys."""
    alpha, sigma = _column(t)
    keys = torch.cat([refs, refs.square().sum(1, keepdim=True)], 1)
    queries = torch.cat([x * (alpha / sigma**2), -0.5 * (alpha / sigma) ** 2], 1)
    mean = torch.nn.functional.scaled_dot_product_attention(queries[None], keys[None], refs[None], scale=1.0)
    return (x - mean[0]) / sigma


def stablevs(
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor,
    t: Tensor,
    tau: Tensor,
    scale: float,
    factor: float,
    noise: Tensor | None,
) -> Tensor:
    """Guidance and the StableVS step on the linear path, in float32, as the pipelines spell it."""
    v = uncond.float() + scale * (cond.float() - uncond.float())
    if noise is None:
        return (sample.float() + (tau - t) * v).to(sample.dtype)
    x0 = sample.float() - t * v
    beta = factor * tau
    s = torch.sqrt(tau**2 - beta**2) / t
    return (s * sample.float() + (1 - tau - s * (1 - t)) * x0 + beta * noise.float()).to(sample.dtype)


def affine(sample: Tensor, velocity: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a * sample + b * velocity with coefficients (N,)."""
    shape = (-1, *[1] * (sample.dim() - 1))
    return (a.view(shape) * sample.float() + b.view(shape) * velocity.float()).to(sample.dtype)


def va_repa(projected: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Weighted negative cosine similarity, through normalised vectors as the official code does."""
    p = torch.nn.functional.normalize(projected.float(), dim=-1)
    z = torch.nn.functional.normalize(teacher.float(), dim=-1)
    return -(weight * (p * z).sum(-1).mean(1)).sum() / weight.sum()


def bank_push_scatter(refs: Tensor, counts: Tensor, heads: Tensor, values: Tensor, labels: Tensor) -> None:
    """Rank among equal labels by a comparison matrix, then one indexed store. Right while no label exceeds M rows."""
    n, capacity = labels.shape[0], refs.shape[1]
    same = labels[:, None] == labels[None]
    before = torch.ones(n, n, dtype=torch.bool, device=labels.device).tril(-1)
    rank = (same & before).sum(1)
    slots = (heads[labels] + rank) % capacity
    refs[labels, slots] = values.to(refs.dtype)
    pushed = torch.zeros_like(counts).index_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))
    heads.add_(pushed).remainder_(capacity)
    counts.add_(pushed).clamp_(max=capacity)


def training_step(
    refs: Tensor,
    counts: Tensor,
    heads: Tensor,
    values: Tensor,
    labels: Tensor,
    t_low: float,
    cfg_prob: float,
    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """A StableVM step: push, drop labels, draw a reference and a time for each row, x_t and its `target`.

    refs (K, M, D), the last of the K groups a ring of every row; times uniform in [t_low, 1).
    """
    n, null = labels.shape[0], refs.shape[0] - 1
    bank_push_scatter(refs, counts, heads, values, labels)
    bank_push_scatter(refs, counts, heads, values, torch.full_like(labels, null))
    labels = labels.masked_fill(torch.rand(n, device=labels.device) < cfg_prob, null)
    x0 = refs[labels, (torch.rand(n, dtype=torch.float64, device=refs.device) * counts[labels]).long()].float()
    t, noise = t_low + (1 - t_low) * torch.rand(n, device=refs.device), torch.randn_like(x0)
    x_t = (1 - t[:, None]) * x0 + t[:, None] * noise
    return x_t, target(x_t, refs, t, labels)
