"""svel::affine_step against its formula in float64."""

import math

import pytest
import torch
from kernel_cases import offset_by_one, with_gaps

from stablevelocity_kernels.testing import assert_close

SHAPES = [(1,), (5,), (3, 1), (4, 3, 7, 5), (2, 4099), (130, 3), (1025, 2)]


def inputs(shape, rng, dtype=torch.float32):
    return [torch.randn(shape, generator=rng).to(dtype) for _ in range(4)]


def rows(coefficient, like):
    return coefficient.double().reshape(-1, *[1] * (like.dim() - 1))


def formula(sample, velocity, a, b, c=None, uncond=None, noise=None, guidance_scale=1.0):
    v = velocity.double()
    if uncond is not None:
        v = uncond.double() + guidance_scale * (v - uncond.double())
    out = rows(a, sample) * sample.double() + rows(b, sample) * v
    return out if c is None else out + rows(c, sample) * noise.double()


def coefficient(kind, n, rng, dtype=torch.float32):
    return torch.randn((n,) if kind == "(N,)" else (), generator=rng, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kinds", [("(N,)", "(N,)", "(N,)"), ("0-d", "0-d", "0-d"), ("0-d", "(N,)", "0-d")], ids=str)
def test_formula(implementation, rng, shape, kinds):
    sample, velocity, uncond, noise = inputs(shape, rng)
    a, b, c = (coefficient(kind, shape[0], rng) for kind in kinds)
    op = implementation.op("affine_step")
    assert_close(op(sample, velocity, a, b), formula(sample, velocity, a, b))
    assert_close(op(sample, velocity, a, b, c, None, noise), formula(sample, velocity, a, b, c, None, noise))
    full = op(sample, velocity, a, b, c, uncond, noise, guidance_scale=3.5)
    assert_close(full, formula(sample, velocity, a, b, c, uncond, noise, 3.5))


@pytest.mark.parametrize("sample_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("other_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mixed_dtypes(implementation, rng, sample_dtype, other_dtype):
    if implementation.interpreted and sample_dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16; a GPU rounds")
    sample, velocity, uncond, noise = inputs((3, 37), rng, other_dtype)
    sample = sample.to(sample_dtype)
    coefficients = [
        coefficient(k, 3, rng, d) for k, d in (("(N,)", torch.float32), ("0-d", torch.float64), ("0-d", torch.float32))
    ]
    out = implementation.op("affine_step")(sample, velocity, *coefficients, uncond, noise, guidance_scale=2.0)
    assert out.dtype == sample_dtype
    assert_close(out, formula(sample, velocity, *coefficients, uncond, noise, 2.0))


@pytest.mark.parametrize("change", [offset_by_one, with_gaps])
def test_unaligned_and_strided(implementation, rng, change):
    sample, velocity, uncond, noise = inputs((3, 4, 9), rng)
    a, b, c = (coefficient("(N,)", 3, rng) for _ in range(3))
    args = sample, velocity, a, b, c, uncond, noise
    out = implementation.on_device("affine_step")(
        *(change(v.to(implementation.device)) for v in args), guidance_scale=1.5
    )
    assert_close(out.cpu(), formula(*args, 1.5))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)], ids=str)
def test_empty(implementation, shape):
    empty, one = torch.empty(shape), torch.ones(())
    out = implementation.op("affine_step")(empty, empty, one, one)
    assert out.shape == shape


def test_nan_stays_where_it_is(implementation, rng):
    sample, velocity, _, _ = inputs((3, 5), rng)
    sample[1, 2], velocity[2, 4] = math.nan, math.inf
    one = torch.ones(3)
    out = implementation.op("affine_step")(sample, velocity, one, one)
    expected = formula(sample, velocity, one, one)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert_close(out[0], expected[0])


def test_guidance_scale_without_the_unconditional_is_not_used(implementation, rng):
    sample, velocity, _, _ = inputs((2, 5), rng)
    one = torch.ones(())
    out = implementation.op("affine_step")(sample, velocity, one, one, guidance_scale=9.0)
    assert_close(out, sample.double() + velocity.double())


def test_inputs_are_not_changed_and_every_output_is_written(implementation, rng, poisoned_memory):
    sample, velocity, uncond, noise = inputs((2, 1030), rng)
    args = [sample, velocity, torch.ones(2), torch.ones(()), torch.ones(2), uncond, noise]
    args = [v.to(implementation.device) for v in args]
    before = [v.clone() for v in args]
    out = implementation.on_device("affine_step")(*args, guidance_scale=2.0)
    assert not out.isnan().any()
    assert all(torch.equal(v, b) for v, b in zip(args, before, strict=True))
