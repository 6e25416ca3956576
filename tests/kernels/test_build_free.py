"""Without compiled code every op still runs: SVEL_BACKEND=reference in a fresh process."""

import os
import subprocess
import sys

EVERY_OP = """
import torch
import stablevelocity_kernels as svk
from stablevelocity_kernels.ops._register import op_names

assert svk.backends()["CPU"] == "reference", svk.backends()
x, refs, t = torch.randn(2, 5), torch.randn(3, 5), torch.full((2,), 0.5)
tokens, weight = torch.randn(2, 4, 6, requires_grad=True), torch.ones(2)
counts, heads = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
bank = torch.zeros(3, 2, 5)
target = torch.full((2, 5), float("nan"))
calls = {
    "posterior_mean": lambda: svk.posterior_mean(x, refs, 1 - t, t)[0],
    "posterior_part": lambda: svk.posterior_part(x, refs, 1 - t, t)[0],
    "stable_target": lambda: svk.stable_target(x, refs, t),
    "affine_step": lambda: svk.affine_step(x, x, t, t),
    "stablevs_step": lambda: svk.stablevs_step(x, x, t, t / 2),
    "va_repa_loss": lambda: svk.va_repa_loss(tokens, torch.randn(2, 4, 6), weight),
    "va_repa_loss_backward": lambda: torch.autograd.grad(calls["va_repa_loss"](), tokens)[0],
    "bank_push_": lambda: (svk.bank_push_(bank, counts, heads, x, torch.tensor([0, 2])), bank)[1],
    "bank_draw": lambda: svk.bank_draw(bank, counts, t, torch.tensor([0, -1]), x)[0],
    "conditional_target_": lambda: (svk.conditional_target_(target, x, x, t, t * float("nan")), target)[1],
}
assert set(calls) == set(op_names()), set(calls) ^ set(op_names())
for name, call in calls.items():
    assert torch.isfinite(call()).all(), name
assert counts.tolist() == [1, 0, 1]
print("all served")
"""


def test_references_serve_every_op():
    done = subprocess.run(
        [sys.executable, "-c", EVERY_OP],
        capture_output=True,
        text=True,
        env={**os.environ, "SVEL_BACKEND": "reference"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "all served" in done.stdout


def test_unknown_backend_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "import stablevelocity_kernels"],
        capture_output=True,
        text=True,
        env={**os.environ, "SVEL_BACKEND": "abacus"},
        check=False,
    )
    assert done.returncode != 0
    assert "SVEL_BACKEND: expected one of" in done.stderr
