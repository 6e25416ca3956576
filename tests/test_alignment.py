"""VA-REPA: the weights and the loss against their closed forms, and where the gradient goes."""

import math

import pytest
import stablevelocity as sv
import torch
from stablevelocity.alignment import WEIGHTS, sigmoid_weight

from stablevelocity_kernels import PathCoefficients
from stablevelocity_kernels.testing import TOLERANCE, assert_close

F32 = TOLERANCE[torch.float32, "exact"]
SPLIT = 0.7
T = [0.0, 1e-5, 0.2, 0.35, 0.6999, 0.7, 0.9, 1.0]

CLOSED_FORMS = {
    "hard": lambda t: 1.0 if t < SPLIT else 0.0,
    "hard_high": lambda t: 0.0 if t < SPLIT else 1.0,
    "sigmoid": lambda t: 1 / (1 + math.exp(-20 * (SPLIT - t))),
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t / SPLIT)) if t < SPLIT else 0.0,
}


class Quadratic(sv.Interpolant):
    """A user's own path: alpha = 1 - t^2, sigma = t^2."""

    def coefficients(self, t):
        return PathCoefficients(1 - t * t, t * t, -2 * t, 2 * t)


def loss_by_hand(projected, teacher, weight):
    """The definition in float64, one sample at a time."""
    total, weights = 0.0, 0.0
    for p, z, w in zip(projected.double(), teacher.double(), weight.double(), strict=True):
        cosine = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(p, z, strict=True)]
        total -= float(w) * sum(cosine) / len(cosine)
        weights += float(w)
    return torch.tensor(total / weights)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_weights_match_their_closed_forms(name):
    weight = sv.VAREPALoss(schedule=name, split=SPLIT).weights(torch.tensor(T))
    expected = torch.tensor([CLOSED_FORMS[name](t) for t in T])
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("interpolant", ["linear", "cosine", Quadratic()], ids=str)
def test_snr_weight_follows_the_interpolant(interpolant):
    path = sv.get_interpolant(interpolant)

    def snr(t):
        at = path.coefficients(torch.tensor(t).double())
        return float((at.alpha / at.sigma) ** 2)

    times = [0.05, 0.3, 0.7, 0.95]
    weight = sv.VAREPALoss(interpolant, "snr", SPLIT).weights(torch.tensor(times))
    expected = torch.tensor([snr(t) / (snr(t) + snr(SPLIT)) for t in times])
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)
    ends = sv.VAREPALoss(interpolant, "snr", SPLIT).weights(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight_is_finite_monotone_and_not_negative(name):
    t = torch.linspace(0, 1, 101)
    for split in (0.1, 0.7, 1.0):
        w = sv.VAREPALoss(schedule=name, split=split).weights(t)
        assert w.isfinite().all()
        assert (w >= 0).all()
        assert (w <= 1).all()
        assert ((w.diff() if name == "hard_high" else -w.diff()) >= -1e-6).all()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_matches_the_definition(name, dtype, rng):
    p, z = (torch.randn(6, 5, 7, generator=rng).to(dtype) for _ in range(2))
    t, loss = torch.rand(6, generator=rng) * 0.5 + 0.4, sv.VAREPALoss(schedule=name)
    out = loss(p, z, t)
    assert out.dtype == torch.float32
    assert_close(out, loss_by_hand(p, z, loss.weights(t)))


def test_equal_features_give_minus_one_and_opposite_plus_one(rng):
    z, t = torch.randn(4, 5, 7, generator=rng), torch.rand(4, generator=rng)
    loss = sv.VAREPALoss()
    for scale in (3.0, -0.5):
        torch.testing.assert_close(loss(scale * z, z, t), torch.tensor(-math.copysign(1.0, scale)), rtol=F32, atol=F32)


def test_several_teachers_are_averaged(rng):
    p = [torch.randn(4, 5, 7, generator=rng), torch.randn(4, 3, 11, generator=rng)]
    z = [torch.randn(4, 5, 7, generator=rng), torch.randn(4, 3, 11, generator=rng)]
    t, loss = torch.rand(4, generator=rng), sv.VAREPALoss()
    assert_close(loss(p, z, t), (loss(p[0], z[0], t).double() + loss(p[1], z[1], t).double()) / 2)
    assert_close(loss(p[:1], z[0], t), loss(p[0], z[0], t))


def test_parts_of_a_batch_make_the_loss_of_the_whole(rng):
    p, z, t = torch.randn(6, 5, 7, generator=rng), torch.randn(6, 5, 7, generator=rng), torch.rand(6, generator=rng)
    t[4:] = 0.9  # the last part has no weight at all
    loss = sv.VAREPALoss(schedule="hard")
    rows = list(zip(p.chunk(3), z.chunk(3), t.chunk(3), strict=True))
    total = loss.weights(t).sum() / 3
    assert_close(torch.stack([loss(*part, total) for part in rows]).mean(), loss(p, z, t).double())
    assert loss(*rows[2], torch.zeros(())) == 0


def test_gradient_reaches_the_projections_only(rng):
    p = torch.randn(4, 5, 7, generator=rng, dtype=torch.float64, requires_grad=True)
    z = torch.randn(4, 5, 7, generator=rng, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.1, 0.5, 0.8, 0.95], requires_grad=True)
    loss = sv.VAREPALoss(schedule="hard")
    loss(p, z, t).backward()
    assert z.grad is None
    assert t.grad is None
    assert p.grad[:2].abs().sum(dim=(1, 2)).min() > 0
    assert (p.grad[2:] == 0).all(), "times above the split pull on nothing"
    assert torch.autograd.gradcheck(lambda q: loss(q, z, t), (p,))


def test_weights_that_sum_to_nothing_give_zero(rng):
    p = torch.randn(3, 5, 7, generator=rng, requires_grad=True)
    out = sv.VAREPALoss(schedule="hard")(p, torch.randn(3, 5, 7, generator=rng), torch.tensor([0.8, 0.9, 1.0]))
    out.backward()
    assert out == 0
    assert (p.grad == 0).all()


def test_a_schedule_of_ones_own(rng):
    p, z, t = torch.randn(4, 5, 7, generator=rng), torch.randn(4, 5, 7, generator=rng), torch.rand(4, generator=rng)
    sharp = sv.VAREPALoss(schedule=lambda t, split, interpolant: sigmoid_weight(t, split, interpolant, sharpness=50.0))
    assert_close(sharp(p, z, t), loss_by_hand(p, z, torch.sigmoid(50 * (0.7 - t.double()))))


def test_compiles_without_a_graph_break(rng):
    loss = sv.VAREPALoss("cosine", "snr")
    p = torch.randn(4, 5, 7, generator=rng, requires_grad=True)
    z, t = torch.randn(4, 5, 7, generator=rng), torch.rand(4, generator=rng)
    fast = torch.compile(lambda q, r, s: loss(q, r, s), backend="aot_eager", fullgraph=True)
    (grad,) = torch.autograd.grad(loss(p, z, t), p)
    out = fast(p, z, t)
    (compiled,) = torch.autograd.grad(out, p)
    assert_close(out, loss(p, z, t))
    assert_close(compiled, grad)


def test_errors_name_the_argument(rng):
    with pytest.raises(ValueError, match=r"schedule: expected one of .*'snr'.*, got 'linear'"):
        sv.VAREPALoss(schedule="linear")
    for split in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"split: expected a number in \(0, 1\], got {split}"):
            sv.VAREPALoss(split=split)
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="teacher: expected 1 tensors, as many as projected, got 2"):
        sv.VAREPALoss()(x, [x, x], torch.zeros(2))
    with pytest.raises(RuntimeError, match="teacher: expected shape"):
        sv.VAREPALoss()(x, torch.zeros(2, 3, 5), torch.zeros(2))
