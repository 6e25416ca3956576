"""svel::posterior_part: it is posterior_mean with more digits in lse, enough for parts to merge within the contract."""

import math

import pytest
import torch
from kernel_cases import SET_PATTERNS, direct_mean, make_problem, make_sets

from stablevelocity_kernels.testing import GEOMETRIES, TOLERANCE, assert_close, make_noisy, make_references

EXACT = TOLERANCE[torch.float32, "exact"]


@pytest.mark.parametrize("pattern", [p for p in SET_PATTERNS if "source" not in p])
def test_is_posterior_mean_with_a_float64_lse(implementation, rng, pattern):
    sets, n = make_sets(pattern, 6, (3, 5), rng), 6
    x, sigma = 0.5 + torch.randn(n, 3, 5, generator=rng), torch.linspace(0.4, 0.9, n)
    labels, counts, _ = sets.args()
    mean, lse = implementation.op("posterior_part")(x, sets.refs, 1 - sigma, sigma, labels, counts)
    same, rounded = implementation.op("posterior_mean")(x, sets.refs, 1 - sigma, sigma, labels, counts)
    assert torch.equal(mean.nan_to_num(), same.nan_to_num())
    assert torch.equal(mean.isnan(), same.isnan())
    assert lse.dtype == torch.float64
    assert torch.equal(lse.float().nan_to_num(), rounded.nan_to_num())
    _, expected = direct_mean(x, sets.refs, 1 - sigma, sigma, labels, counts)
    assert torch.equal(lse.isnan(), expected.isnan())


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("d", [12, 5000, 65_536])
def test_two_parts_merge_within_the_contract(implementation, rng, geometry, d):
    if implementation.interpreted and d > 5000:
        pytest.skip("too large to interpret")
    d = d // 4 if implementation.interpreted else d
    problem = make_problem(d, 20, geometry, rng, times=(0.5, 0.9, 0.999), each=2)
    op, args = implementation.op("posterior_part"), (1 - problem.t.double(), problem.t.double())
    first, second = op(problem.x, problem.refs[:7], *args), op(problem.x, problem.refs[7:], *args)
    share = torch.softmax(torch.stack([first[1], second[1]]), 0)[:, :, None]
    expected, _ = direct_mean(problem.x, problem.refs, *args)
    assert problem.worst((share[0] * first[0] + share[1] * second[0]).float(), expected) <= EXACT


@pytest.mark.parametrize("d", [4096, 65_536])
def test_parts_of_one_reference_each_merge_within_the_contract(implementation, rng, d):
    """The hardest parts: centres and means that differ as much as samples do, and equal weights."""
    if implementation.interpreted:
        d //= 16
    refs = make_references(2, d, "gaussian", rng)
    sigma = torch.full((8,), 0.998, dtype=torch.float64)
    x = make_noisy(refs[torch.arange(8) % 2], sigma.float(), rng)
    parts = [implementation.op("posterior_part")(x, ref[None], 1 - sigma, sigma) for ref in refs]
    share = torch.softmax(torch.stack([lse for _, lse in parts]), 0)[:, :, None]
    assert share.min() > 0.01  # both count, or this would test nothing
    merged = (share[0] * parts[0][0] + share[1] * parts[1][0]).float()
    assert_close(merged, direct_mean(x, refs, 1 - sigma, sigma)[0])


def test_float64_all_the_way(implementation, rng):
    refs, x = torch.randn(9, 30, generator=rng).double(), torch.randn(4, 30, generator=rng).double()
    sigma = torch.full((4,), 0.8, dtype=torch.float64)
    parts = [implementation.op("posterior_part")(x, part, 1 - sigma, sigma) for part in (refs[:2], refs[2:])]
    share = torch.softmax(torch.stack([lse for _, lse in parts]), 0)[:, :, None]
    assert_close(share[0] * parts[0][0] + share[1] * parts[1][0], direct_mean(x, refs, 1 - sigma, sigma)[0])


def test_a_row_without_references_or_time_is_nan(implementation, rng):
    refs, x = torch.randn(2, 3, 5, generator=rng), torch.randn(3, 5, generator=rng)
    sigma, labels = torch.tensor([0.5, 0.5, math.nan]), torch.tensor([0, 1, 0])
    counts = torch.tensor([3, 0])
    mean, lse = implementation.op("posterior_part")(x, refs, 1 - sigma, sigma, labels, counts)
    assert lse.isnan().tolist() == [False, True, True]
    assert torch.equal(mean.isnan().all(1), lse.isnan())
