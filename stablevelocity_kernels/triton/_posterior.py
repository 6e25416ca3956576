"""Posterior mean over a reference set: the kernels behind posterior_mean and stable_target.

For a row x with centre c (the mean of the first few references of its set), y = x - alpha c and d_j = r_j - c:

    -|x - alpha r_j|^2 / (2 sigma^2) = s_j - |y|^2 / (2 sigma^2),   s_j = (alpha / sigma^2) d_j . (y - (alpha / 2) d_j)

so that s_j is small where the weights are spread, and m = c + sum_j softmax(s)_j d_j. `_prepare` writes c and y once
per row. Then, by the size D of a sample:
  * D <= MAX_RESIDENT: `_single_pass` holds a row in registers, reads each reference once (online softmax) and leaves
    one partial result for each split of the references; `_merge` combines the splits.
  * larger: `_scores`, `_weights` and `_weighted_sum` read the references twice, in slices of D.
Row tables: begin (N,) is the first reference of a row's set in the flattened (K M, D) references, total (N,) the length
of its range, or SKIPPED. Sums over D or over references are float32 in registers and float64 between blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, on_device_of, power_of_two, rounded

MAX_RESIDENT = 4096  # y, the centre, the sum and its error are 4 x 16 registers a thread at 256 threads
DOUBLE_BELOW = 256  # float32 logits miss 2e-6 at small D (8e-5 at D = 1), where their errors do not average out
PROGRAMS = 2048  # about four waves of four programs on each of 132 multiprocessors
MAX_SPLITS = 64  # bounds the partial results: N x splits x D
SCORE_BYTES = 1 << 28  # rows are taken in portions whose partial scores fit in this
SLICE = 65536  # D handled by one program of _scores: at most 128 float32 additions in a chain
CENTRE_OF = tl.constexpr(4)  # references averaged for the centre
SKIPPED = tl.constexpr(-1)  # total of a row that is not computed and becomes NaN


@dataclass(frozen=True)
class Tiles:
    """References x values of D that one program holds at a time."""

    block_m: int
    block_d: int
    num_warps: int


def resident_tiles(d: int, double: bool) -> Tiles:
    """Whole rows, as many as registers hold: 156 to 240 a thread on Hopper by ptxas, 255 for float64, none spilled."""
    block_d = max(16, power_of_two(d))
    block_m = max(1, min(64, (8192 if double else 16384) // block_d))
    return Tiles(block_m, block_d, 8 if block_m * block_d >= 8192 else 4)


# 16 references share each load of c and y; 113 to 236 registers a thread on Hopper by ptxas, at most one spilled.
SLICED = Tiles(16, 512, 4)
SLICED_DOUBLE = Tiles(8, 512, 4)
VECTOR = Tiles(1, 1024, 4)  # elementwise passes over rows: eight values a thread


@triton.jit
def _compensated(total, lost, value):
    """total + value with the rounding error carried in `lost` (Kahan): it does not grow with the number of terms."""
    value = value - lost
    new = total + value
    return new, (new - total) - value


@triton.jit
def _sum_of_terms(terms, ROWS: tl.constexpr, TERMS: tl.constexpr):
    """(ROWS, TERMS) -> (ROWS,) float64. Runs of a few terms are added in the dtype they have, which averages out."""
    RUN: tl.constexpr = 16 if TERMS > 16 else TERMS
    runs = tl.sum(tl.reshape(terms, (ROWS, TERMS // RUN, RUN)), axis=2)
    return tl.sum(runs.to(tl.float64), axis=1)


@triton.jit
def _valid(at, inside, counts_ptr, capacity, HAS_COUNTS: tl.constexpr):
    """Which flattened reference indices `at` lie in their group's count."""
    if HAS_COUNTS:
        inside = inside & (at % capacity < tl.load(counts_ptr + at // capacity, mask=inside, other=0))
    return inside


@triton.jit
def _prepare(
    x_ptr,  # (N, D)
    refs_ptr,  # (K M, D)
    labels_ptr,  # (N,)
    counts_ptr,  # (K,)
    first_ptr,  # (1,) first group that has references
    source_ptr,  # (N, D)
    alpha_ptr,  # (N,) float64
    sigma_ptr,  # (N,) float64
    centre_ptr,  # (N, D) out
    y_ptr,  # (N, D) out
    square_ptr,  # (N, blocks) float64 out: |y|^2 of each block, not finite where x or source is not
    begin_ptr,  # (N,) out
    total_ptr,  # (N,) out
    groups,
    capacity,
    references,
    d,
    blocks,
    HAS_LABELS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORK: tl.constexpr,
):
    """Grid N x blocks: the row tables, the centre, and x relative to it."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    alpha = tl.load(alpha_ptr + row)
    sigma = tl.load(sigma_ptr + row)
    label = tl.full((), 0, tl.int64)
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
    wanted = (label >= -1) & (label < groups)
    wanted = wanted & (alpha - alpha == 0.0) & (sigma - sigma == 0.0)  # false for NaN and Inf
    group = tl.where(label == -1, tl.load(first_ptr), label)
    begin = tl.maximum(label, 0) * capacity
    total = tl.where(label == -1, references, capacity)
    leading = tl.minimum(total, capacity)  # references that the centre may use
    if HAS_COUNTS:
        count = tl.load(counts_ptr + group, mask=wanted & (groups > 0), other=0).to(tl.int64)
        leading = tl.minimum(leading, tl.maximum(count, 0))
        total = tl.where(label == -1, total, leading)
    total = tl.where(wanted, total, SKIPPED)
    if block == 0:
        tl.store(begin_ptr + row, begin)
        tl.store(total_ptr + row, total)
    if wanted:
        cols = block.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_d = cols < d
        leading = tl.minimum(leading, CENTRE_OF)
        sum_of = tl.zeros((BLOCK_D,), WORK)
        for j in range(0, leading):
            at = group * capacity + j
            sum_of += tl.load(refs_ptr + at * d + cols, mask=in_d, other=0.0).to(WORK)
        centre = sum_of / tl.maximum(leading, 1).to(WORK)
        y = tl.load(x_ptr + row * d + cols, mask=in_d, other=0.0).to(tl.float64) - alpha * centre.to(tl.float64)
        tl.store(centre_ptr + row * d + cols, centre, mask=in_d)
        tl.store(y_ptr + row * d + cols, y.to(WORK), mask=in_d)
        square = tl.where(in_d, y * y, 0.0)
        if HAS_SOURCE:
            square += 0.0 * tl.load(source_ptr + row * d + cols, mask=in_d, other=0.0).to(tl.float64)
        tl.store(square_ptr + row * blocks + block, tl.sum(square, axis=0))


@triton.jit
def _single_pass(
    refs_ptr,  # (K M, D)
    counts_ptr,  # (K,)
    source_ptr,  # (N, D)
    alpha_ptr,  # (N,) float64
    sigma_ptr,  # (N,) float64
    centre_ptr,  # (N, D)
    y_ptr,  # (N, D)
    begin_ptr,  # (N,)
    total_ptr,  # (N,)
    part_ptr,  # (N, splits, D) out: sum_j exp(s_j - top) d_j
    top_ptr,  # (N, splits) float64 out: largest s_j
    mass_ptr,  # (N, splits) float64 out: sum_j exp(s_j - top)
    capacity,
    d,
    splits,
    HAS_COUNTS: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORK: tl.constexpr,
):
    """Grid N x splits: online softmax over one split of a row's references, D <= BLOCK_D."""
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    total = tl.load(total_ptr + row)
    if total == SKIPPED:
        return
    begin = tl.load(begin_ptr + row)
    alpha = tl.load(alpha_ptr + row)
    sigma = tl.load(sigma_ptr + row)
    to_logit = alpha / (sigma * sigma)
    half_alpha = (0.5 * alpha).to(WORK)
    cols = tl.arange(0, BLOCK_D)
    in_d = cols < d
    centre = tl.load(centre_ptr + row * d + cols, mask=in_d, other=0.0)
    y = tl.load(y_ptr + row * d + cols, mask=in_d, other=0.0)

    acc = tl.zeros((BLOCK_D,), WORK)
    lost = tl.zeros((BLOCK_D,), WORK)
    top = tl.full((), float("-inf"), tl.float64)
    mass = tl.full((), 0.0, tl.float64)
    if HAS_SOURCE:  # noqa: SIM102, the outer one is decided when the kernel is compiled
        if split == 0:
            acc = tl.where(in_d, tl.load(source_ptr + row * d + cols, mask=in_d, other=0.0).to(WORK) - centre, 0.0)
            top = to_logit * tl.sum(acc * (y - half_alpha * acc), axis=0).to(tl.float64)
            mass = tl.full((), 1.0, tl.float64)

    share = tl.cdiv(tl.cdiv(total, splits), BLOCK_M) * BLOCK_M
    low = split * share
    high = tl.minimum(low + share, total)
    for v in range(low, high, BLOCK_M):
        at = begin + v + tl.arange(0, BLOCK_M)
        live = _valid(at, at < begin + high, counts_ptr, capacity, HAS_COUNTS)
        seen = live[:, None] & in_d[None, :]
        r = tl.load(refs_ptr + at[:, None] * d + cols[None, :], mask=seen, other=0.0).to(WORK)
        diff = tl.where(seen, r - centre[None, :], 0.0)
        s = to_logit * _sum_of_terms(diff * (y[None, :] - half_alpha * diff), BLOCK_M, BLOCK_D)
        s = tl.where(live, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=0))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp(top - finite_top)
        weight = tl.exp((s - finite_top).to(WORK))
        top = new_top
        mass = mass * shrink + tl.sum(weight, axis=0).to(tl.float64)
        block_sum = tl.sum(weight[:, None] * diff, axis=0)
        acc, lost = _compensated(acc * shrink.to(WORK), lost * shrink.to(WORK), block_sum)

    slot = row * splits + split
    tl.store(part_ptr + slot * d + cols, acc, mask=in_d)
    tl.store(top_ptr + slot, top)
    tl.store(mass_ptr + slot, mass)


@triton.jit
def _merge(
    x_ptr,  # (N, D)
    a_ptr,  # (N,) float64
    b_ptr,  # (N,) float64
    sigma_ptr,  # (N,) float64
    centre_ptr,  # (N, D)
    square_ptr,  # (N, square_blocks) float64
    total_ptr,  # (N,)
    part_ptr,  # (N, splits, D)
    top_ptr,  # (N, splits) float64
    mass_ptr,  # (N, splits) float64
    out_ptr,  # (N, D) out: a x + b m
    lse_ptr,  # (N,) out
    d,
    splits,
    blocks,
    square_blocks,
    BLOCK_D: tl.constexpr,
):
    """Grid N x blocks: the splits of a row combined, in float64, and turned into its output."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    cols = block.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = cols < d
    square = tl.full((), float("nan"), tl.float64)
    mass = tl.full((), 0.0, tl.float64)
    top = tl.full((), float("-inf"), tl.float64)
    value = tl.full((BLOCK_D,), float("nan"), tl.float64)
    if tl.load(total_ptr + row) != SKIPPED:
        square = _sum_of(square_ptr + row * square_blocks, square_blocks)
        for i in range(0, splits):
            top = tl.maximum(top, tl.load(top_ptr + row * splits + i))
        finite_top = tl.where(top == float("-inf"), 0.0, top)
        acc = tl.zeros((BLOCK_D,), tl.float64)
        for i in range(0, splits):
            slot = row * splits + i
            scale = tl.exp(tl.load(top_ptr + slot) - finite_top)
            mass += scale * tl.load(mass_ptr + slot)
            acc += scale * tl.load(part_ptr + slot * d + cols, mask=in_d, other=0.0).to(tl.float64)
        value = _finish(x_ptr, a_ptr, b_ptr, centre_ptr, row, d, cols, in_d, acc, mass, square)
    tl.store(out_ptr + row * d + cols, rounded(value, out_ptr), mask=in_d)
    if block == 0:
        _store_lse(lse_ptr, sigma_ptr, row, d, top, mass, square)


@triton.jit
def _sum_of(ptr, n):
    """Sum of n float64 values, the same in every program that asks for it."""
    total = tl.full((), 0.0, tl.float64)
    for i in range(0, n, 64):
        at = i + tl.arange(0, 64)
        total += tl.sum(tl.load(ptr + at, mask=at < n, other=0.0), axis=0)
    return total


@triton.jit
def _finish(x_ptr, a_ptr, b_ptr, centre_ptr, row, d, cols, in_d, acc, mass, square):
    """a x + b (c + acc / mass) in float64; NaN where the set is empty or `square` says that the row is not finite."""
    x = tl.load(x_ptr + row * d + cols, mask=in_d, other=0.0).to(tl.float64)
    centre = tl.load(centre_ptr + row * d + cols, mask=in_d, other=0.0).to(tl.float64)
    value = tl.load(a_ptr + row) * x + tl.load(b_ptr + row) * (centre + acc / mass)
    return tl.where((mass > 0.0) & (square - square == 0.0), value, float("nan"))


@triton.jit
def _store_lse(lse_ptr, sigma_ptr, row, d, top, mass, square):
    """log sum_j exp(s_j) - |y|^2 / (2 sigma^2) + D / 2; NaN where the row is."""
    sigma = tl.load(sigma_ptr + row)
    positive = mass > 0.0
    lse = top + tl.log(tl.where(positive, mass, 1.0)) - square / (2.0 * sigma * sigma) + 0.5 * d
    lse = tl.where(positive & (lse - lse == 0.0), lse, float("nan"))
    tl.store(lse_ptr + row, rounded(lse, lse_ptr))


@triton.jit
def _scores(
    refs_ptr,  # (K M, D)
    counts_ptr,  # (K,)
    source_ptr,  # (N, D)
    alpha_ptr,  # (N,) float64
    sigma_ptr,  # (N,) float64
    centre_ptr,  # (N, D)
    y_ptr,  # (N, D)
    begin_ptr,  # (N,)
    total_ptr,  # (N,)
    score_ptr,  # (rows, slices, K M + 1) float64 out: the part of s_j from one slice of D; the last is the source's
    first_row,
    capacity,
    references,
    d,
    splits,
    slices,
    HAS_COUNTS: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORK: tl.constexpr,
):
    """Grid rows x splits x slices: logits of one split of a row's references over one slice of D."""
    pid = tl.program_id(0)
    slice_index = (pid % slices).to(tl.int64)
    split = (pid // slices) % splits
    local = (pid // (slices * splits)).to(tl.int64)
    row = first_row + local
    total = tl.load(total_ptr + row)
    if total == SKIPPED:
        return
    begin = tl.load(begin_ptr + row)
    alpha = tl.load(alpha_ptr + row)
    sigma = tl.load(sigma_ptr + row)
    to_logit = alpha / (sigma * sigma)
    half_alpha = (0.5 * alpha).to(WORK)
    share_d = tl.cdiv(tl.cdiv(d, slices), BLOCK_D) * BLOCK_D
    low_d = slice_index * share_d
    high_d = tl.minimum(low_d + share_d, d)
    score_ptr += (local * slices + slice_index) * (references + 1)

    share = tl.cdiv(tl.cdiv(total, splits), BLOCK_M) * BLOCK_M
    low = split * share
    high = tl.minimum(low + share, total)
    for v in range(low, high, BLOCK_M):
        at = begin + v + tl.arange(0, BLOCK_M)
        in_split = at < begin + high
        live = _valid(at, in_split, counts_ptr, capacity, HAS_COUNTS)
        acc = tl.zeros((BLOCK_M, BLOCK_D), WORK)
        for low_col in range(low_d, high_d, BLOCK_D):
            cols = low_col + tl.arange(0, BLOCK_D)
            in_d = cols < high_d
            centre = tl.load(centre_ptr + row * d + cols, mask=in_d, other=0.0)
            y = tl.load(y_ptr + row * d + cols, mask=in_d, other=0.0)
            seen = live[:, None] & in_d[None, :]
            r = tl.load(refs_ptr + at[:, None] * d + cols[None, :], mask=seen, other=0.0).to(WORK)
            diff = tl.where(seen, r - centre[None, :], 0.0)
            acc += diff * (y[None, :] - half_alpha * diff)
        s = tl.where(live, to_logit * _sum_of_terms(acc, BLOCK_M, BLOCK_D), float("-inf"))
        tl.store(score_ptr + v + tl.arange(0, BLOCK_M), s, mask=in_split)
    if HAS_SOURCE:  # noqa: SIM102, the outer one is decided when the kernel is compiled
        if split == 0:
            own = tl.zeros((BLOCK_D,), WORK)
            for low_col in range(low_d, high_d, BLOCK_D):
                cols = low_col + tl.arange(0, BLOCK_D)
                in_d = cols < high_d
                centre = tl.load(centre_ptr + row * d + cols, mask=in_d, other=0.0)
                y = tl.load(y_ptr + row * d + cols, mask=in_d, other=0.0)
                r = tl.load(source_ptr + row * d + cols, mask=in_d, other=0.0).to(WORK)
                diff = tl.where(in_d, r - centre, 0.0)
                own += diff * (y - half_alpha * diff)
            tl.store(score_ptr + references, to_logit * tl.sum(own, axis=0).to(tl.float64))


@triton.jit
def _slices_of(score_ptr, at, live, slices, references, BLOCK: tl.constexpr):
    """s_j of the references at positions `at` of a row: the sum over slices of D; -inf where not live."""
    s = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, slices):
        s += tl.load(score_ptr + i * (references + 1) + at, mask=live, other=float("-inf"))
    return tl.where(live, s, float("-inf"))


@triton.jit
def _weights(
    sigma_ptr,  # (N,) float64
    square_ptr,  # (N, square_blocks) float64
    total_ptr,  # (N,)
    score_ptr,  # (rows, slices, K M + 1) float64
    weight_ptr,  # (rows, K M + 1) out: exp(s_j - top)
    mass_ptr,  # (N,) float64 out: sum_j exp(s_j - top), NaN where the row is
    lse_ptr,  # (N,) out
    first_row,
    references,
    d,
    slices,
    square_blocks,
    HAS_SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid rows: softmax of the logits, left unnormalised. One position beyond `total` stands for the source."""
    local = tl.program_id(0).to(tl.int64)
    row = first_row + local
    total = tl.load(total_ptr + row)
    if total == SKIPPED:
        tl.store(mass_ptr + row, float("nan"))
        tl.store(lse_ptr + row, float("nan"))
        return
    score_ptr += local * slices * (references + 1)
    weight_ptr += local * (references + 1)
    square = _sum_of(square_ptr + row * square_blocks, square_blocks)
    end = total
    if HAS_SOURCE:
        end = total + 1
    best = tl.full((BLOCK,), float("-inf"), tl.float64)
    for v in range(0, end, BLOCK):
        at = v + tl.arange(0, BLOCK)
        place = tl.where(at < total, at, references)
        best = tl.maximum(best, _slices_of(score_ptr, place, at < end, slices, references, BLOCK))
    top = tl.max(best, axis=0)
    finite_top = tl.where(top == float("-inf"), 0.0, top)
    sums = tl.zeros((BLOCK,), tl.float64)
    for v in range(0, end, BLOCK):
        at = v + tl.arange(0, BLOCK)
        place = tl.where(at < total, at, references)
        weight = tl.exp(_slices_of(score_ptr, place, at < end, slices, references, BLOCK) - finite_top)
        tl.store(weight_ptr + place, weight.to(weight_ptr.dtype.element_ty), mask=at < end)
        sums += weight
    mass = tl.sum(sums, axis=0)
    tl.store(mass_ptr + row, tl.where(square - square == 0.0, mass, float("nan")))
    _store_lse(lse_ptr, sigma_ptr, row, d, top, mass, square)


@triton.jit
def _weighted_sum(
    x_ptr,  # (N, D)
    refs_ptr,  # (K M, D)
    counts_ptr,  # (K,)
    source_ptr,  # (N, D)
    a_ptr,  # (N,) float64
    b_ptr,  # (N,) float64
    centre_ptr,  # (N, D)
    begin_ptr,  # (N,)
    total_ptr,  # (N,)
    weight_ptr,  # (rows, K M + 1)
    mass_ptr,  # (N,) float64
    out_ptr,  # (N, D) out: a x + b m
    first_row,
    capacity,
    references,
    d,
    blocks,
    HAS_COUNTS: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORK: tl.constexpr,
):
    """Grid rows x blocks: sum_j w_j d_j over one block of D, and the output. Blocks of zero weight are not read."""
    local = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    row = first_row + local
    cols = block.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = cols < d
    total = tl.load(total_ptr + row)
    mass = tl.load(mass_ptr + row)
    value = tl.full((BLOCK_D,), float("nan"), tl.float64)
    if mass > 0.0:
        begin = tl.load(begin_ptr + row)
        centre = tl.load(centre_ptr + row * d + cols, mask=in_d, other=0.0)
        weight_ptr += local * (references + 1)
        acc = tl.zeros((BLOCK_D,), WORK)
        lost = tl.zeros((BLOCK_D,), WORK)
        if HAS_SOURCE:
            own = tl.load(source_ptr + row * d + cols, mask=in_d, other=0.0).to(WORK)
            acc = tl.load(weight_ptr + references) * tl.where(in_d, own - centre, 0.0)
        for v in range(0, total, BLOCK_M):
            at = begin + v + tl.arange(0, BLOCK_M)
            live = _valid(at, at < begin + total, counts_ptr, capacity, HAS_COUNTS)
            weight = tl.load(weight_ptr + v + tl.arange(0, BLOCK_M), mask=live, other=0.0)
            if tl.max(weight, axis=0) > 0.0:
                seen = live[:, None] & in_d[None, :]
                r = tl.load(refs_ptr + at[:, None] * d + cols[None, :], mask=seen, other=0.0).to(WORK)
                diff = tl.where(seen, r - centre[None, :], 0.0)
                acc, lost = _compensated(acc, lost, tl.sum(weight[:, None] * diff, axis=0))
        value = _finish(x_ptr, a_ptr, b_ptr, centre_ptr, row, d, cols, in_d, acc.to(tl.float64), mass, mass)
    tl.store(out_ptr + row * d + cols, rounded(value, out_ptr), mask=in_d)


def posterior(
    x: Tensor,
    refs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    a: Tensor,
    b: Tensor,
    labels: Tensor | None,
    counts: Tensor | None,
    source: Tensor | None,
    out_dtype: torch.dtype,
    lse_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """a x + b m, (N, *S), and lse (N,), of these dtypes; alpha, sigma, a, b (N,) float64; arguments already checked."""
    n, d = x.shape[0], math.prod(x.shape[1:])
    groups, capacity = (1, refs.shape[0]) if labels is None else (refs.shape[0], refs.shape[1])
    out, lse = x.new_empty(x.shape, dtype=out_dtype), x.new_empty(n, dtype=lse_dtype)
    if n == 0:
        return out, lse
    double = x.dtype == torch.float64 or d <= DOUBLE_BELOW
    work, work_tl = (torch.float64, tl.float64) if double else (torch.float32, tl.float32)
    x, refs = x.contiguous(), refs.contiguous()
    has = {"HAS_COUNTS": counts is not None, "HAS_SOURCE": source is not None}
    source = x if source is None else source.contiguous()
    if counts is not None and groups:
        first = (counts > 0).int().argmax().reshape(1)  # on the device: the host never learns it
    else:
        first = torch.zeros(1, dtype=torch.int64, device=x.device)
    counts = first if counts is None else counts.contiguous()

    centre, y = x.new_empty((n, d), dtype=work), x.new_empty((n, d), dtype=work)
    begin, total = (torch.empty(n, dtype=torch.int64, device=x.device) for _ in range(2))
    vector_blocks = max(1, cdiv(d, VECTOR.block_d))
    square = x.new_empty((n, vector_blocks), dtype=torch.float64)
    with on_device_of(x):
        _prepare[(n * vector_blocks,)](
            *(x, refs, first if labels is None else labels.contiguous(), counts, first, source, alpha, sigma),
            *(centre, y, square, begin, total, groups, capacity, groups * capacity, d, vector_blocks),
            HAS_LABELS=labels is not None,
            **has,
            BLOCK_D=VECTOR.block_d,
            WORK=work_tl,
            num_warps=VECTOR.num_warps,
        )
        tables = (centre, y, begin, total)
        if d <= MAX_RESIDENT:
            tiles = resident_tiles(d, double)
            wanted = cdiv(groups * capacity, tiles.block_m)
            splits = max(1, min(MAX_SPLITS, cdiv(PROGRAMS, n), wanted))
            part = x.new_empty((n, splits, d), dtype=work)
            top, mass = (x.new_empty((n, splits), dtype=torch.float64) for _ in range(2))
            _single_pass[(n * splits,)](
                *(refs, counts, source, alpha, sigma, *tables, part, top, mass, capacity, d, splits),
                **has,
                BLOCK_M=tiles.block_m,
                BLOCK_D=tiles.block_d,
                WORK=work_tl,
                num_warps=tiles.num_warps,
            )
            _merge[(n * vector_blocks,)](
                *(x, a, b, sigma, centre, square, total, part, top, mass, out, lse),
                *(d, splits, vector_blocks, vector_blocks),
                BLOCK_D=VECTOR.block_d,
                num_warps=VECTOR.num_warps,
            )
        else:
            _in_slices(x, refs, counts, source, alpha, sigma, a, b, tables, square, out, lse, capacity, groups, has)
    return out, lse


def _in_slices(x, refs, counts, source, alpha, sigma, a, b, tables, square, out, lse, capacity, groups, has) -> None:
    """D > MAX_RESIDENT: scores, weights and weighted sums, as many rows at a time as SCORE_BYTES allows."""
    centre, y, begin, total = tables
    n, d = centre.shape
    references = groups * capacity
    double = centre.dtype == torch.float64
    tiles = SLICED_DOUBLE if double else SLICED
    work_tl = tl.float64 if double else tl.float32
    splits = max(1, min(MAX_SPLITS, cdiv(references, tiles.block_m)))
    slices = max(cdiv(d, SLICE), min(cdiv(PROGRAMS, n * splits), cdiv(d, 8 * tiles.block_d)))
    rows = max(1, min(n, SCORE_BYTES // (8 * slices * (references + 1))))
    score = x.new_empty((rows, slices, references + 1), dtype=torch.float64)
    weight = x.new_empty((rows, references + 1), dtype=centre.dtype)
    mass = x.new_empty(n, dtype=torch.float64)
    blocks = cdiv(d, tiles.block_d)
    launch = {"BLOCK_M": tiles.block_m, "BLOCK_D": tiles.block_d, "WORK": work_tl, "num_warps": tiles.num_warps}
    for first_row in range(0, n, rows):
        portion = min(rows, n - first_row)
        _scores[(portion * splits * slices,)](
            *(refs, counts, source, alpha, sigma, centre, y, begin, total, score),
            *(first_row, capacity, references, d, splits, slices),
            **has,
            **launch,
        )
        _weights[(portion,)](
            *(sigma, square, total, score, weight, mass, lse),
            *(first_row, references, d, slices, square.shape[1]),
            HAS_SOURCE=has["HAS_SOURCE"],
            BLOCK=1024,
            num_warps=4,
        )
        _weighted_sum[(portion * blocks,)](
            *(x, refs, counts, source, a, b, centre, begin, total, weight, mass, out),
            *(first_row, capacity, references, d, blocks),
            **has,
            **launch,
        )
