"""svel::va_repa_loss: value and gradient against float64 autograd."""

import pytest
import torch
from kernel_cases import offset_by_one, with_gaps

from stablevelocity_kernels import reference, va_repa_loss
from stablevelocity_kernels.testing import assert_close

SHAPES = [(1, 1, 1), (3, 5, 7), (2, 9, 768), (4, 3, 1030), (2, 2, 2050)]


def inputs(shape, rng, dtype=torch.float32):
    """Features that are alike, as after some training, so that the loss is far from zero."""
    teacher = torch.randn(shape, generator=rng)
    projected = teacher + torch.randn(shape, generator=rng)
    return projected.to(dtype), teacher.to(dtype), 0.1 + torch.rand(shape[0], generator=rng)


def formula(projected, teacher, weight):
    p, z, w = projected.double(), teacher.double(), weight.double()
    cosine = (p * z).sum(-1) / (p.norm(dim=-1) * z.norm(dim=-1))
    return -(w * cosine.mean(1)).sum() / w.sum()


def formula_gradient(projected, teacher, weight):
    p = projected.double().requires_grad_()
    formula(p, teacher, weight).backward()
    return p.grad


def grad_of(implementation, grad, *args):
    return implementation.op("va_repa_loss_backward")(grad, *args)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(implementation, rng, shape):
    args = inputs(shape, rng)
    loss = implementation.op("va_repa_loss")(*args)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert_close(loss, formula(*args))
    if shape[-1] > 1:  # with one channel the cosine is constant
        gradient = grad_of(implementation, torch.tensor(2.5), *args)
        assert_close(gradient, 2.5 * formula_gradient(*args))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.float32])
def test_dtypes(implementation, rng, dtype, teacher_dtype):
    projected, teacher, weight = inputs((3, 4, 96), rng)
    # A power-of-two scale keeps float16 gradients clear of its subnormal numbers, as loss scaling does.
    args, scale = (projected.to(dtype), teacher.to(teacher_dtype), weight), torch.tensor(1024.0)
    loss = implementation.op("va_repa_loss")(*args)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(loss, formula(*args))
    if implementation.interpreted and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16; a GPU rounds")
    gradient = grad_of(implementation, scale, *args)
    assert gradient.dtype == dtype
    assert_close(gradient, 1024.0 * formula_gradient(*args))


@pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0], [1e-9, 1e-9, 1e-9]])
def test_no_weight_is_no_loss(implementation, rng, weights):
    projected, teacher, _ = inputs((3, 4, 5), rng)
    args = projected, teacher, torch.tensor(weights)
    assert implementation.op("va_repa_loss")(*args) == 0
    assert (grad_of(implementation, torch.ones(()), *args) == 0).all()


def test_a_sample_of_weight_zero_does_not_count(implementation, rng):
    projected, teacher, weight = inputs((3, 4, 5), rng)
    weight[1] = 0
    rest = projected[::2], teacher[::2], weight[::2]
    assert_close(implementation.op("va_repa_loss")(projected, teacher, weight), formula(*rest))
    gradient = grad_of(implementation, torch.ones(()), projected, teacher, weight)
    assert (gradient[1] == 0).all()
    assert_close(gradient[::2], formula_gradient(*rest))


@pytest.mark.parametrize("zero", ["projected", "teacher"])
def test_zero_features_have_cosine_zero(implementation, rng, zero):
    projected, teacher, weight = inputs((2, 3, 8), rng)
    (projected if zero == "projected" else teacher)[0, 1] = 0
    args = projected, teacher, weight
    p = projected.double().requires_grad_()
    expected = reference.va_repa_loss(p, teacher.double(), weight.double())
    expected.backward()
    assert_close(implementation.op("va_repa_loss")(*args), expected)
    gradient = grad_of(implementation, torch.ones(()), *args)
    assert gradient.isfinite().all()
    assert_close(gradient, p.grad)


@pytest.mark.parametrize("change", [offset_by_one, with_gaps])
def test_unaligned_and_strided(implementation, rng, change):
    args = inputs((3, 4, 33), rng)
    changed = [change(a.to(implementation.device)) for a in args]
    assert_close(implementation.on_device("va_repa_loss")(*changed).cpu(), formula(*args))
    grad = torch.ones((), device=implementation.device)
    gradient = implementation.on_device("va_repa_loss_backward")(grad, *changed)
    assert_close(gradient.cpu(), formula_gradient(*args))


def test_empty_batch(implementation):
    args = torch.empty(0, 4, 5), torch.empty(0, 4, 5), torch.empty(0)
    assert implementation.op("va_repa_loss")(*args) == 0
    assert grad_of(implementation, torch.ones(()), *args).shape == (0, 4, 5)


def test_the_same_result_every_time(implementation, rng):
    args = inputs((4, 7, 100), rng)
    first = implementation.op("va_repa_loss")(*args)
    assert all(torch.equal(first, implementation.op("va_repa_loss")(*args)) for _ in range(3))


def test_inputs_are_not_changed_and_every_output_is_written(implementation, rng, poisoned_memory):
    args = [a.to(implementation.device) for a in inputs((2, 3, 1031), rng)]
    before = [a.clone() for a in args]
    assert not implementation.on_device("va_repa_loss")(*args).isnan()
    grad = torch.ones((), device=implementation.device)
    assert not implementation.on_device("va_repa_loss_backward")(grad, *args).isnan().any()
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


def test_reference_passes_gradcheck(rng):
    projected, teacher, weight = inputs((2, 3, 4), rng, torch.float64)
    projected.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: reference.va_repa_loss(p, teacher, weight.double()), projected)


def test_op_passes_gradcheck(rng):
    projected, teacher, weight = inputs((2, 3, 4), rng, torch.float64)
    projected.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: va_repa_loss(p, teacher, weight.double()), projected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autograd_is_that_of_the_reference(rng, device):
    projected, teacher, weight = (a.to(device) for a in inputs((3, 5, 40), rng))
    ours, theirs = projected.clone().requires_grad_(), projected.double().requires_grad_()
    (3 * va_repa_loss(ours, teacher, weight)).backward()
    (3 * reference.va_repa_loss(theirs, teacher, weight)).backward()
    assert_close(ours.grad, theirs.grad)


def test_double_backward_is_refused(rng):
    projected, teacher, weight = inputs((2, 3, 4), rng)
    projected.requires_grad_()
    (gradient,) = torch.autograd.grad(va_repa_loss(projected, teacher, weight), projected, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("argument", [1, 2], ids=["teacher", "weight"])
def test_other_gradients_are_refused(rng, argument):
    args = list(inputs((2, 3, 4), rng))
    args[0].requires_grad_()
    args[argument].requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable in projected only"):
        va_repa_loss(*args).backward()
