"""What only the CUDA kernels of the steps and of the alignment loss can get wrong: each of their paths at its edges.

The contract of each op is tested on every implementation in test_<op>.py; here shapes, dtypes and addresses
reach the kernels of aligned arrays of one dtype and those of any other arrays, at both ends of their tiles.
"""

import threading

import pytest
import torch
from kernel_cases import offset_by_one

import stablevelocity_kernels as svel
from stablevelocity_kernels import PATHS, reference
from stablevelocity_kernels.testing import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(svel.backends().get("CUDA") != "native", reason="the compiled CUDA kernels do not serve"),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Whole packs of 8, tiles of 512 (float64) and 1024 elements and one pack to either side of them; then anything else.
SIZES = [8, 504, 512, 520, 1016, 1024, 1032, 8200, 1, 7, 1023, 2047, 2049, 6145]
NAMES = ("sample", "velocity", "velocity_uncond", "noise")


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype)


def wide(args):
    """The same values in float64, for the reference."""
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in args.items()}


def check_step(op, args):
    """One op on the GPU against its reference in float64 on the same stored inputs."""
    out = getattr(svel, op)(**args)
    assert out.dtype == args["sample"].dtype
    assert out.is_contiguous()
    assert_close(out, getattr(reference, op)(**wide(args)))


def step_args(n, d, dtype, guided, noisy, per_row):
    """Arguments of stablevs_step whose rows differ in t and tau, or share them."""
    args = {name: randn(n, d, dtype=dtype) for name in NAMES}
    if not guided:
        del args["velocity_uncond"]
    t = 0.2 + 0.75 * torch.rand(n if per_row else (), device="cuda")
    args |= {"t": t, "tau": t.double() * torch.rand(n if per_row else (), device="cuda")}
    return args | {"guidance_scale": 4.5, "noise_factor": 0.3 if noisy else 0.0}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_row", [True, False], ids=["rows", "shared"])
def test_stablevs_step_at_every_size(dtype, per_row, poisoned_memory):
    for d in SIZES:
        for path in PATHS:
            for guided, noisy in ((False, False), (True, False), (False, True), (True, True)):
                check_step("stablevs_step", {**step_args(3, d, dtype, guided, noisy, per_row), "path": path})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1024, 1031])
def test_affine_step_with_rows_and_shared_coefficients(dtype, d):
    for pattern in range(8):  # which of a, b, c are (N,)
        sizes = [5 if pattern >> i & 1 else () for i in range(3)]
        a, b, c = (torch.randn(s, device="cuda", dtype=k) for s, k in zip(sizes, DTYPES[2:] + DTYPES[2:3], strict=True))
        x, v, u, noise = (randn(5, d, dtype=dtype) for _ in NAMES)
        check_step("affine_step", {"sample": x, "velocity": v, "a": a, "b": b})
        args = {"sample": x, "velocity": v, "a": a, "b": b, "c": c, "velocity_uncond": u, "noise": noise}
        check_step("affine_step", {**args, "guidance_scale": 2.5})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moved", NAMES)
def test_a_step_of_one_unaligned_input(dtype, moved):
    for d in (1024, 2056):
        args = step_args(3, d, dtype, True, True, True)
        check_step("stablevs_step", args | {moved: offset_by_one(args[moved])})


@pytest.mark.parametrize("start", range(1, 9))
def test_a_step_of_a_view_at_any_offset(start):
    """All inputs of one dtype from element `start` of their storage on, aligned again at the eighth."""
    args = step_args(2, 1040, torch.bfloat16, True, False, False)
    for name in NAMES[:3]:
        storage = torch.empty(2 * 1040 + start, dtype=torch.bfloat16, device="cuda")
        args[name] = storage[start:].copy_(args[name].reshape(-1)).view(2, 1040)
    check_step("stablevs_step", args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (1, 8), (1, 1023), (1, 1025), (1, 6145), (3, 1032), (3, 2056)], ids=str
)
def test_a_view_at_any_address_gives_what_its_copy_gives(shape, dtype):
    """To the last bit, and nothing of what lies around it in memory."""
    for starts in ((1, 1, 1, 1), (1, 2, 3, 4), (5, 0, 7, 6)):
        for path in PATHS:
            args = step_args(*shape, dtype, True, True, False) | {"path": path}
            views = dict(args)
            for name, first in zip(NAMES, starts, strict=True):
                around = torch.full((args[name].numel() + 16,), torch.nan, dtype=dtype, device="cuda")
                views[name] = around[first : first + args[name].numel()].copy_(args[name].reshape(-1)).view(shape)
            check_step("stablevs_step", views)
            assert torch.equal(svel.stablevs_step(**views), svel.stablevs_step(**args))


@pytest.mark.parametrize("d", [1024, 1032, 1027])
def test_a_step_of_mixed_dtypes(d):
    for sample in DTYPES:
        for other in DTYPES:
            args = step_args(3, d, sample, True, True, True)
            args |= {name: randn(3, d, dtype=other) for name in ("velocity", "noise")}
            check_step("stablevs_step", args)


@pytest.mark.parametrize("d", [8, 5])
def test_a_step_of_more_rows_than_a_grid_is_high(d):
    n = 2 * 65_535 + 3
    check_step("stablevs_step", step_args(n, d, torch.bfloat16, True, False, True))
    a, b = torch.randn(n, device="cuda"), torch.randn(n, device="cuda")
    check_step("affine_step", {"sample": randn(n, d), "velocity": randn(n, d), "a": a, "b": b})


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("tail", [8, 3])
def test_a_step_of_more_than_two_to_the_31_elements(rows, tail):
    """Rows that begin or go on beyond 2^31 elements; only the parts around and beyond it are compared."""
    d = (2**31 + 4096) // rows // 8 * 8 + tail
    if torch.cuda.mem_get_info()[0] < 7 * rows * d:
        pytest.skip("needs 15 GB of GPU memory")
    x = torch.randn(rows, d, dtype=torch.float16, device="cuda")
    t = torch.linspace(0.9, 0.6, rows, device="cuda")
    out = svel.stablevs_step(x, x, t, t * 0.5)
    for columns in (slice(0, 10_000), slice(d - 10_000, d)):
        part, last = x[-1:, columns].double(), t[-1:].double()
        assert_close(out[-1:, columns], reference.stablevs_step(part, part, last, last * 0.5))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 8)], ids=str)
def test_a_step_of_nothing(shape):
    x, half = torch.empty(shape, device="cuda"), torch.tensor(0.5, device="cuda")
    for out in (svel.stablevs_step(x, x, half, half), svel.affine_step(x, x, half, half)):
        assert out.shape == shape
    assert svel.stablevs_step(x, x, torch.full(shape[:1], 0.5, device="cuda"), half).shape == shape


@pytest.mark.parametrize("d", [1024, 1031])
@pytest.mark.parametrize("path", PATHS)
def test_nan_in_a_row_stays_there(d, path):
    args = step_args(4, d, torch.float32, False, False, True)
    args["t"][1], args["sample"][2, 5] = torch.nan, torch.nan
    out = svel.stablevs_step(**args, path=path)
    assert out[1].isnan().all()
    assert out[2].isnan().sum() == 1
    assert not out[::3].isnan().any()


def test_a_step_from_a_thread_that_has_not_used_the_device():
    args, outs = step_args(2, 1024, torch.bfloat16, True, True, True), []
    thread = threading.Thread(target=lambda: outs.append(svel.stablevs_step(**args)))
    thread.start()
    thread.join()
    assert torch.equal(outs[0], svel.stablevs_step(**args))


def test_many_dimensions():
    """More than the strides that packed_like keeps at hand."""
    x, half = randn(*[2] * 4, *[1] * 14), torch.tensor(0.5, device="cuda")
    check_step("stablevs_step", {"sample": x, "velocity": x, "t": half, "tau": half * 0.5})


# Held tokens: 1 to 4 packs of 256 channels, whole and not; then more channels, and what is no whole pack of 8.
CHANNELS = [8, 16, 248, 256, 264, 512, 520, 768, 776, 1024, 1032, 2048, 5, 33, 771, 1025]


def features(shape, dtype, teacher_dtype=None):
    """Alike, as after some training, so that the loss is far from zero; weights differ."""
    teacher = randn(*shape)
    projected = (teacher + randn(*shape)).to(dtype)
    return projected, teacher.to(teacher_dtype or dtype), 0.1 + torch.rand(shape[0], device="cuda")


def check_loss(projected, teacher, weight):
    """Value and gradient on the GPU against the reference in float64; the gradient scaled as loss scaling does."""
    grad = torch.tensor(64.0 * projected.shape[0] * projected.shape[1], device="cuda")
    args = projected.double(), teacher.double(), weight.double()
    assert_close(svel.va_repa_loss(projected, teacher, weight), reference.va_repa_loss(*args))
    gradient = torch.ops.svel.va_repa_loss_backward(grad, projected, teacher, weight)
    assert gradient.dtype == projected.dtype
    assert_close(gradient, reference.va_repa_loss_backward(grad.double(), *args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(1, 1), (3, 5), (2, 8), (5, 67)], ids=str)
def test_loss_at_every_width(dtype, tokens, poisoned_memory):
    for channels in CHANNELS:
        check_loss(*features((*tokens, channels), dtype))


@pytest.mark.parametrize("channels", [768, 1031])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_of_mixed_dtypes(dtype, channels):
    for teacher_dtype in DTYPES:
        check_loss(*features((3, 5, channels), dtype, teacher_dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moved", [0, 1])
def test_loss_of_one_unaligned_input(dtype, moved):
    args = list(features((3, 7, 768), dtype))
    args[moved] = offset_by_one(args[moved])
    check_loss(*args)


@pytest.mark.parametrize("channels", [8, 3])
def test_loss_of_more_tokens_than_blocks_hold(channels):
    check_loss(*features((1031, 517, channels), torch.float32))
    assert 1031 * 517 > 8 * 2**16


@pytest.mark.parametrize("channels", [768, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_without_weight_is_zero(dtype, channels):
    projected, teacher, weight = features((3, 5, channels), dtype)
    one = torch.ones((), device="cuda")
    assert svel.va_repa_loss(projected, teacher, weight * 0) == 0
    assert not torch.ops.svel.va_repa_loss_backward(one, projected, teacher, weight * 0).any()
    weight[1] = 0
    check_loss(projected, teacher, weight)
    assert not torch.ops.svel.va_repa_loss_backward(one, projected, teacher, weight)[1].any()


@pytest.mark.parametrize("channels", [768, 33])
@pytest.mark.parametrize("zero", [0, 1], ids=["projected", "teacher"])
def test_loss_of_zero_features(channels, zero):
    args = features((2, 3, channels), torch.float32)
    args[zero][0, 1] = 0
    check_loss(*args)


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 0), (0, 4, 5)], ids=str)
def test_loss_of_nothing(shape):
    p, w = torch.empty(shape, device="cuda"), torch.ones(shape[0], device="cuda")
    assert svel.va_repa_loss(p, p, w).shape == ()
    assert torch.ops.svel.va_repa_loss_backward(torch.ones((), device="cuda"), p, p, w).shape == shape


@pytest.mark.parametrize("channels", [768, 33])
def test_loss_is_the_same_every_time(channels):
    projected, teacher, weight = features((64, 33, channels), torch.bfloat16)
    projected.requires_grad_()
    first = svel.va_repa_loss(projected, teacher, weight)
    (gradient,) = torch.autograd.grad(first, projected)
    for _ in range(3):
        loss = svel.va_repa_loss(projected, teacher, weight)
        assert torch.equal(loss, first)
        assert torch.equal(torch.autograd.grad(loss, projected)[0], gradient)


def test_second_derivative_is_refused():
    projected, teacher, weight = features((2, 3, 768), torch.bfloat16)
    projected.requires_grad_()
    loss = svel.va_repa_loss(projected, teacher, weight)
    (gradient,) = torch.autograd.grad(loss, projected, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
