"""Bad input: every argument of every op, wrong in every way it can be, and one message from all implementations.

It names the op, the argument, what was expected and what came: `svel::<op>: <arg>: expected <what>, got <what>`.
"""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

N, M, K, D = 3, 4, 2, 5
F16, F32, F64 = torch.float16, torch.float32, torch.float64
I32, I64 = torch.int32, torch.int64
FLOATS = "float16 or bfloat16 or float32 or float64"


def zeros(*shape, dtype=F32):
    return torch.zeros(shape, dtype=dtype)


def good(op):
    """Valid arguments of an op, by name, all optional tensors given."""
    step = {"sample": zeros(N, D), "velocity": zeros(N, D), "velocity_uncond": zeros(N, D), "noise": zeros(N, D)}
    features = {"projected": zeros(N, 2, D), "teacher": zeros(N, 2, D), "weight": zeros(N)}
    sets = {
        "x": zeros(N, D),
        "refs": zeros(K, M, D),
        "labels": zeros(N, dtype=I64),
        "counts": zeros(K, dtype=I64),
        "source": zeros(N, D),
    }
    return {
        "posterior_mean": {**sets, "alpha": zeros(N), "sigma": zeros(N) + 0.5},
        "posterior_part": {k: v for k, v in sets.items() if k != "source"}
        | {"alpha": zeros(N), "sigma": zeros(N) + 0.5},
        "stable_target": {**sets, "t": zeros(N) + 0.5},
        "affine_step": {**step, "a": zeros(N), "b": zeros(), "c": zeros(N)},
        "stablevs_step": {**step, "t": zeros(N), "tau": zeros(), "noise_factor": 0.5},
        "va_repa_loss": features,
        "va_repa_loss_backward": {"grad": zeros(), **features},
        "bank_push_": {
            "refs": zeros(K, M, D),
            "counts": zeros(K, dtype=I32),
            "heads": zeros(K, dtype=I32),
            "values": zeros(N, D),
            "labels": zeros(N, dtype=I64),
        },
        "bank_draw": {
            "refs": zeros(K, M, D),
            "counts": zeros(K, dtype=I32),
            "u": zeros(N),
            "labels": zeros(N, dtype=I64),
            "fallback": zeros(N, D),
            "noise": zeros(N, D),
            "t": zeros(N),
        },
        "conditional_target_": {
            "target": zeros(N, D),
            "x0": zeros(N, D),
            "noise": zeros(N, D),
            "t": zeros(N),
            "t_set": zeros(N),
        },
    }[op]


# (argument, what to change, what the message says was expected, what it says came)
SET_CASES = [
    ("x", {"x": zeros()}, r"shape \(N, \*S\)", r"\(\)"),
    ("x", {"x": zeros(N, D, dtype=I64)}, FLOATS, "int64"),
    ("refs", {"refs": zeros(K, M, D, dtype=torch.int8)}, FLOATS, "int8"),
    ("refs", {"refs": zeros(K, M, D + 1)}, rf"shape \(K, M, \*S\) .*\({D},\)", rf"\({K}, {M}, {D + 1}\)"),
    ("refs", {"refs": zeros(M, D)}, r"shape \(K, M, \*S\)", rf"\({M}, {D}\)"),
    ("refs", {"labels": None, "counts": None}, r"shape \(M, \*S\)", rf"\({K}, {M}, {D}\)"),
    ("labels", {"labels": zeros(N, dtype=I32)}, "int64", "int32"),
    ("labels", {"labels": zeros(N + 1, dtype=I64)}, rf"shape \(N,\) = \({N},\)", rf"\({N + 1},\)"),
    ("labels", {"labels": zeros(N, 1, dtype=I64)}, rf"shape \(N,\) = \({N},\)", rf"\({N}, 1\)"),
    ("counts", {"counts": zeros(K)}, "int32 or int64", "float32"),
    ("counts", {"counts": zeros(K + 1, dtype=I64)}, rf"shape \(K,\) = \({K},\)", rf"\({K + 1},\)"),
    ("counts", {"labels": None, "refs": zeros(M, D)}, r"shape \(1,\) = \(1,\)", rf"\({K},\)"),
    ("source", {"source": zeros(N, D, dtype=F16)}, "float32", "float16"),
    ("source", {"source": zeros(N, D + 1)}, rf"shape .*= \({N}, {D}\)", rf"\({N}, {D + 1}\)"),
    ("precision", {"precision": "quick"}, "'exact' or 'fast'", "'quick'"),
]


def row_scalar_cases(arg):
    return [
        (arg, {arg: zeros(N, dtype=F16)}, "float32", "float16"),
        (arg, {arg: zeros(N, dtype=F64)}, "float32", "float64"),
        (arg, {arg: zeros(N + 1)}, rf"shape \(N,\) = \({N},\)", rf"\({N + 1},\)"),
        (arg, {arg: zeros()}, rf"shape \(N,\) = \({N},\)", r"\(\)"),
    ]


def step_cases(scalars):
    yield ("sample", {"sample": zeros()}, r"shape \(N, \*S\)", r"\(\)")
    yield ("sample", {"sample": zeros(N, D, dtype=I64)}, FLOATS, "int64")
    for arg in ("velocity", "velocity_uncond", "noise"):
        yield (arg, {arg: zeros(N, D, dtype=I64)}, FLOATS, "int64")
        yield (arg, {arg: zeros(N, D + 1)}, rf"shape .*= \({N}, {D}\)", rf"\({N}, {D + 1}\)")
    for arg in scalars:
        yield (arg, {arg: zeros(N, dtype=F16)}, "float32 or float64", "float16")
        yield (arg, {arg: zeros(N + 1)}, rf"shape \(N,\) = \({N},\) or 0-d", rf"\({N + 1},\)")
        yield (arg, {arg: zeros(N, 1)}, rf"shape \(N,\) = \({N},\) or 0-d", rf"\({N}, 1\)")


FEATURE_CASES = [
    ("projected", {"projected": zeros(N, 2, D, dtype=I64)}, FLOATS, "int64"),
    ("projected", {"projected": zeros(N, D)}, r"shape \(B, T, C\)", rf"\({N}, {D}\)"),
    ("teacher", {"teacher": zeros(N, 2, D, dtype=I64)}, FLOATS, "int64"),
    ("teacher", {"teacher": zeros(N, 2, D + 1)}, rf"shape .*= \({N}, 2, {D}\)", rf"\({N}, 2, {D + 1}\)"),
    *row_scalar_cases("weight"),
]

PUSH_CASES = [
    ("refs", {"refs": zeros(K)}, r"shape \(K, M, \*S\)", rf"\({K},\)"),
    ("refs", {"refs": zeros(K, M, D, dtype=I32)}, f"{FLOATS} or int64", "int32"),
    ("refs", {"refs": zeros(K, D, M).transpose(1, 2)}, "a contiguous tensor", "strides"),
    ("counts", {"counts": zeros(2 * K, dtype=I32)[::2]}, "a contiguous tensor", "strides"),
    ("heads", {"heads": zeros(2 * K, dtype=I32)[::2]}, "a contiguous tensor", "strides"),
    ("counts", {"counts": zeros(K)}, "int32 or int64", "float32"),
    ("counts", {"counts": zeros(K + 1, dtype=I32)}, rf"shape \(K,\) = \({K},\)", rf"\({K + 1},\)"),
    ("heads", {"heads": zeros(K)}, "int32 or int64", "float32"),
    ("heads", {"heads": zeros(K + 1, dtype=I32)}, rf"shape \(K,\) = \({K},\)", rf"\({K + 1},\)"),
    ("heads", {"heads": zeros(K, dtype=I64)}, "the dtype of counts", "int64"),
    ("values", {"values": zeros(N, D, dtype=I64)}, FLOATS, "int64"),
    ("values", {"refs": zeros(K, M, D, dtype=I64)}, "int64", "float32"),
    ("values", {"values": zeros(N + 1, D)}, rf"shape \(N, \*S\) = \({N}, {D}\)", rf"\({N + 1}, {D}\)"),
    ("labels", {"labels": zeros(N, dtype=I32)}, "int64", "int32"),
    ("labels", {"labels": zeros(N, 1, dtype=I64)}, r"shape \(N,\)", rf"\({N}, 1\)"),
    (
        "all_to_last",
        {"refs": zeros(0, M, D), **dict.fromkeys(("counts", "heads"), zeros(0, dtype=I32)), "all_to_last": True},
        "False because refs has no group",
        "True",
    ),
]


def any_row_scalar_cases(arg):
    yield (arg, {arg: zeros(N, dtype=F16)}, "float32 or float64", "float16")
    yield (arg, {arg: zeros(N + 1)}, rf"shape \(N,\) = \({N},\)", rf"\({N + 1},\)")
    yield (arg, {arg: zeros(N, 1)}, rf"shape \(N,\) = \({N},\)", rf"\({N}, 1\)")


DRAW_CASES = [
    ("refs", {"refs": zeros(K)}, r"shape \(K, M, \*S\)", rf"\({K},\)"),
    ("refs", {"refs": zeros(K, M, D, dtype=I64)}, FLOATS, "int64"),
    ("counts", {"counts": zeros(K)}, "int32 or int64", "float32"),
    ("counts", {"counts": zeros(K + 1, dtype=I32)}, rf"shape \(K,\) = \({K},\)", rf"\({K + 1},\)"),
    ("u", {"u": zeros(N, dtype=F16)}, "float32 or float64", "float16"),
    ("u", {"u": zeros(N, 1)}, r"shape \(N,\)", rf"\({N}, 1\)"),
    ("labels", {"labels": None}, f"a tensor because refs has {K} groups", "None"),
    ("labels", {"labels": zeros(N, dtype=I32)}, "int64", "int32"),
    ("labels", {"labels": zeros(N + 1, dtype=I64)}, rf"shape \(N,\) = \({N},\)", rf"\({N + 1},\)"),
    ("noise", {"noise": None}, "noise and t to be given together", "noise=None"),
    ("t", {"t": None}, "noise and t to be given together", "t=None"),
    *(
        case
        for arg in ("fallback", "noise")
        for case in (
            (arg, {arg: zeros(N, D, dtype=I64)}, FLOATS, "int64"),
            (arg, {arg: zeros(N, D + 1)}, rf"shape \(N, \*S\) = \({N}, {D}\)", rf"\({N}, {D + 1}\)"),
        )
    ),
    *any_row_scalar_cases("t"),
    ("path", {"path": "straight"}, "one of 'linear', 'cosine'", "'straight'"),
]

CONDITIONAL_CASES = [
    ("target", {"target": zeros()}, r"shape \(N, \*S\)", r"\(\)"),
    ("target", {"target": zeros(N, D, dtype=I64)}, FLOATS, "int64"),
    ("target", {"target": zeros(D, N).t()}, "a contiguous tensor", "strides"),
    *(
        case
        for arg in ("x0", "noise")
        for case in (
            (arg, {arg: zeros(N, D, dtype=I64)}, FLOATS, "int64"),
            (arg, {arg: zeros(N, D + 1)}, rf"shape .*= \({N}, {D}\)", rf"\({N}, {D + 1}\)"),
        )
    ),
    *any_row_scalar_cases("t"),
    *any_row_scalar_cases("t_set"),
    ("path", {"path": "straight"}, "one of 'linear', 'cosine'", "'straight'"),
    ("prediction", {"prediction": "v"}, "one of 'velocity', 'x0', 'noise', 'score'", "'v'"),
]

CASES = {
    "posterior_mean": [*SET_CASES, *row_scalar_cases("alpha"), *row_scalar_cases("sigma")],
    "posterior_part": [
        *(case for case in SET_CASES if case[0] != "source"),
        *any_row_scalar_cases("alpha"),
        *any_row_scalar_cases("sigma"),
    ],
    "stable_target": [
        *SET_CASES,
        *row_scalar_cases("t"),
        ("path", {"path": "straight"}, "one of 'linear', 'cosine'", "'straight'"),
        ("prediction", {"prediction": "v"}, "one of 'velocity', 'x0', 'noise', 'score'", "'v'"),
    ],
    "affine_step": [
        *step_cases(["a", "b", "c"]),
        ("c", {"c": None}, "c and noise to be given together", "c=None"),
        ("noise", {"noise": None}, "c and noise to be given together", "noise=None"),
    ],
    "stablevs_step": [
        *step_cases(["t", "tau"]),
        ("noise_factor", {"noise_factor": 1.5}, r"a number in \[0, 1\]", "1.5"),
        ("noise_factor", {"noise_factor": -0.5}, r"a number in \[0, 1\]", "-0.5"),
        ("noise_factor", {"noise_factor": float("nan")}, r"a number in \[0, 1\]", "nan"),
        ("noise", {"noise": None}, "a tensor because noise_factor = 0.5", "None"),
        ("path", {"path": ""}, "one of 'linear', 'cosine'", "''"),
    ],
    "va_repa_loss": FEATURE_CASES,
    "va_repa_loss_backward": FEATURE_CASES,
    "bank_push_": PUSH_CASES,
    "bank_draw": DRAW_CASES,
    "conditional_target_": CONDITIONAL_CASES,
}
FLAT = [
    pytest.param(op, *case, id=f"{op}-{case[0]}-{i}") for op, cases in CASES.items() for i, case in enumerate(cases)
]


def arguments(op, changed, device="cpu"):
    given = {k: v for k, v in {**good(op), **changed}.items() if v is not None}
    return {k: v.to(device) if isinstance(v, torch.Tensor) and v.is_contiguous() else v for k, v in given.items()}


def message(op, arg, expected, got):
    return re.compile(rf"svel::{op}: {arg}: expected .*{expected}.*, got .*{got}", re.DOTALL)


def test_every_argument_has_a_case():
    # Any number and either bool is good; the gradient of a 0-d loss is autograd's.
    options = {"guidance_scale", "t_min", "null_rows", "grad"}
    for op, cases in CASES.items():
        schema = getattr(torch.ops.svel, op).default._schema
        assert {a.name for a in schema.arguments} - options == {case[0] for case in cases}, op


@pytest.mark.parametrize("op", CASES)
def test_good_arguments_are_taken(implementation, op):
    implementation.on_device(op)(**arguments(op, {}, implementation.device))


@pytest.mark.parametrize(("op", "arg", "changed", "expected", "got"), FLAT)
def test_bad_arguments(implementation, op, arg, changed, expected, got):
    given = arguments(op, changed, implementation.device)
    if any(isinstance(v, torch.Tensor) and v.device.type != implementation.device for v in given.values()):
        given = {k: _strided_like(v, implementation.device) for k, v in given.items()}
    with pytest.raises(RuntimeError, match=message(op, arg, expected, got)):
        implementation.on_device(op)(**given)


def _strided_like(value, device):
    if not isinstance(value, torch.Tensor) or value.device.type == device:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).zero_()


@pytest.mark.parametrize(("op", "arg", "changed", "expected", "got"), FLAT)
def test_bad_arguments_of_the_fake(op, arg, changed, expected, got):
    with FakeTensorMode() as mode:
        given = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments(op, changed).items()
        }
        with pytest.raises(RuntimeError, match=message(op, arg, expected, got)):
            getattr(torch.ops.svel, op)(**given)


@pytest.mark.parametrize(
    ("op", "arg"),
    [(op, arg) for op in CASES for arg, v in good(op).items() if isinstance(v, torch.Tensor) and arg != "grad"],
)
def test_another_device(op, arg):
    """Tensors on two devices, told by the fake. The first tensor sets the device that the others must share."""
    given = good(op)
    if arg == next(k for k in given if k != "grad"):
        pytest.skip("the first tensor")
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = {
            k: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta" if k == arg else "cpu")
            if isinstance(v, torch.Tensor)
            else v
            for k, v in given.items()
        }
        with pytest.raises(RuntimeError, match=message(op, arg, "a tensor on", "")):
            getattr(torch.ops.svel, op)(**moved)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "arg"),
    [(op, arg) for op in CASES for arg, v in good(op).items() if isinstance(v, torch.Tensor) and arg != "grad"],
)
def test_one_argument_left_on_the_cpu(op, arg):
    given = {k: v.cuda() if isinstance(v, torch.Tensor) and k != arg else v for k, v in good(op).items()}
    with pytest.raises(RuntimeError, match=r"expected a tensor on|on the same device|Expected all tensors"):
        getattr(torch.ops.svel, op)(**given)
