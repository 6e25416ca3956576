"""What is particular to the Triton ops. The op tests hold them to the contracts like every other implementation."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from kernel_cases import direct_mean, make_sets

from stablevelocity_kernels import _checks
from stablevelocity_kernels.ops._register import op_names, triton_implementation
from stablevelocity_kernels.testing import assert_close

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = [pytest.mark.gpu] if DEVICE == "cuda" else []
pytestmark = ON_GPU


def call(op, *args, **kwargs):
    """The Triton op on CPU tensors or, where there is a GPU, on copies of them there."""
    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]
    with numpy.errstate(all="ignore"):
        out = triton_implementation(op)(*moved, **kwargs)
    return tuple(o.cpu() for o in out) if isinstance(out, tuple) else out


@pytest.fixture
def labels_unseen(monkeypatch):
    """On CPU the labels are checked on the host; without that, the kernels must cope as they do on a GPU."""
    monkeypatch.setattr(_checks, "check_labels_in_range", lambda *args: None)


def test_every_op_has_one():
    assert all(callable(triton_implementation(name)) for name in op_names())


@pytest.mark.parametrize("d", [5, 5000])
def test_a_label_out_of_range_is_nan(rng, labels_unseen, d):
    sets = make_sets("labels, int64 counts, source", 4, (d,), rng)
    x, sigma = torch.randn(4, d, generator=rng), torch.full((4,), 0.8)
    labels = torch.tensor([1, 3, -2, 2**40])
    mean, lse = call("posterior_mean", x, sets.refs, 1 - sigma, sigma, labels, sets.counts, sets.source)
    assert mean[1:].isnan().all()
    assert lse[1:].isnan().all()
    expected, _ = direct_mean(x[:1], sets.refs, 1 - sigma, sigma, labels, sets.counts, sets.source)
    assert_close(mean[:1], expected)


def test_a_label_out_of_range_is_not_pushed(labels_unseen):
    refs, counts, heads = torch.zeros(2, 3, 1), torch.zeros(2, dtype=torch.int64), torch.tensor([2, 0])
    bank = [b.to(DEVICE) for b in (refs, counts, heads)]
    values, labels = torch.arange(1.0, 6.0)[:, None], torch.tensor([0, -1, 2, 0, 2**40])
    call("bank_push_", *bank, values, labels)
    assert bank[0].flatten().tolist() == [4, 0, 1, 0, 0, 0]
    assert bank[1].tolist() == [2, 0]
    assert bank[2].tolist() == [1, 0]


def test_a_label_out_of_range_is_a_nan_draw(labels_unseen, rng):
    refs, counts, own = torch.randn(2, 3, 5), torch.tensor([3, 0]), torch.randn(5, 5)
    labels, u = torch.tensor([0, -2, 2, 2**40, 1]), torch.full((5,), 0.5, dtype=torch.float64)
    x0, slot, x_t, t_set = call("bank_draw", refs, counts, u, labels, own, own, u)
    assert slot.tolist() == [1, -1, -1, -1, -1]
    assert torch.equal(x0[[0, 4]], torch.stack([refs[0, 1], own[4]]))
    assert x0[1:4].isnan().all()
    assert x_t[1:4].isnan().all()
    assert t_set[1:].isnan().all()


@pytest.mark.parametrize("pattern", ["shared, source", "some null labels, counts, source"])
@pytest.mark.parametrize(
    "setting", [("SCORE_BYTES", 1), ("SLICE", 512), ("MAX_SPLITS", 1), ("MAX_RESIDENT", 0)], ids=str
)
def test_the_result_does_not_depend_on_how_work_is_cut(rng, monkeypatch, pattern, setting):
    """One row at a time, many slices of D, one split of the references, small D in slices."""
    from stablevelocity_kernels.triton import _posterior

    monkeypatch.setattr(_posterior, *setting)
    for d in (40, 4200):
        sets = make_sets(pattern, 5, (d,), rng, m=19)
        x, sigma = torch.randn(5, d, generator=rng), torch.linspace(0.3, 0.9, 5)
        mean, _ = call("posterior_mean", x, sets.refs, 1 - sigma, sigma, *sets.args())
        assert_close(mean, direct_mean(x, sets.refs, 1 - sigma, sigma, *sets.args())[0])


@pytest.mark.parametrize("d", [0, 1, 3, 16, 100, 1000, 4096])
@pytest.mark.parametrize("double", [False, True])
def test_resident_tiles_are_powers_of_two_that_hold_a_row(d, double):
    from stablevelocity_kernels.triton._posterior import resident_tiles

    tiles = resident_tiles(d, double)
    assert tiles.block_d >= d
    for size in (tiles.block_m, tiles.block_d, tiles.num_warps):
        assert size & (size - 1) == 0
    assert tiles.block_m * tiles.block_d * (8 if double else 4) <= 65536


def test_every_kernel_compiles_for_hopper():
    """Without a GPU, in a process that does not interpret; each specialisation prints a line."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    package = Path(_checks.__file__).parents[1]  # the one under test, installed or not
    environment["PYTHONPATH"] = os.pathsep.join([str(package), environment.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = {line.split()[0] for line in done.stdout.splitlines()}
    expected = (
        "prepare single_pass merge scores weights weighted_sum affine_step cosines weighted_mean gradient rank write "
        "draw fill"
    )
    assert kernels == {f"_{name}" for name in expected.split()}
