"""svel::stablevs_step and svel::affine_step on the latents of the models they are for."""

from __future__ import annotations

import math

import peers
import pytest
import torch
from timing import host_time

import stablevelocity_kernels as svel
from stablevelocity_kernels import reference
from stablevelocity_kernels.testing import TOLERANCE

LATENTS = {
    "sd3.5 1024": (1, 16, 128, 128),
    "flux 1024": (1, 4096, 64),
    "wan2.2 720p": (1, 16, 21, 90, 160),
    "wan2.2 720p x64": (64, 16, 21, 90, 160),
    "wan2.2 720p, odd address": (1, 16, 21, 90, 160),
}
SCALE, FACTOR = 4.5, 0.2


@pytest.mark.parametrize("noisy", [False, True], ids=["ode", "noise"])
@pytest.mark.parametrize("latent", LATENTS)
def test_stablevs_step(measure, device, latent, noisy):
    if device.type == "cpu" and latent.endswith("x64"):
        pytest.skip("too large for a CPU table")
    shape, offset = LATENTS[latent], int(latent.endswith("odd address"))
    sample, cond, uncond, noise = (
        torch.randn(math.prod(shape) + offset, device=device, dtype=torch.bfloat16)[offset:].view(shape)
        for _ in range(4)
    )
    t, tau = torch.tensor(0.8, device=device), torch.tensor(0.7, device=device)
    extra = noise if noisy else None
    factor = FACTOR if noisy else 0.0

    def ours() -> torch.Tensor:
        return svel.stablevs_step(sample, cond, t, tau, uncond, extra, guidance_scale=SCALE, noise_factor=factor)

    first = slice(0, 1)
    expected = reference.stablevs_step(
        *(v[first].cpu().double() for v in (sample, cond)),
        t.cpu(),
        tau.cpu(),
        uncond[first].cpu().double(),
        None if extra is None else extra[first].cpu().double(),
        guidance_scale=SCALE,
        noise_factor=factor,
    )
    size = 2 * sample.numel()
    measure(
        f"stablevs_step {latent} bfloat16 {'noise' if noisy else 'ode'}",
        ours,
        check=(lambda: ours()[first], expected, TOLERANCE[torch.bfloat16, "exact"]),
        peers={"eager": lambda: peers.stablevs(sample, cond, uncond, t, tau, SCALE, factor, extra)},
        bytes_read=(4 if noisy else 3) * size,
        bytes_written=size,
    )


def test_empty_kernel(measure, device):
    """What a kernel that does nothing takes in this way of timing, beside a copy of the smallest latent."""
    if device.type == "cpu":
        pytest.skip("there is nothing to launch")
    latent = torch.randn(LATENTS["sd3.5 1024"], device=device, dtype=torch.bfloat16)
    out = torch.empty_like(latent)
    measure(
        "an empty kernel; peer: a copy of the sd3.5 latent",
        lambda: torch.cuda._sleep(0),
        check=None,
        peers={"copy": lambda: out.copy_(latent)},
        bytes_read=0,
    )


def test_affine_step(measure, device):
    shape = (64, 4, 32, 32)
    sample, velocity = (torch.randn(shape, device=device) for _ in range(2))
    a, b = (torch.rand(64, device=device) for _ in range(2))
    expected = reference.affine_step(sample.cpu().double(), velocity.cpu().double(), a.cpu(), b.cpu())
    measure(
        "affine_step 64×4×32×32 float32",
        lambda: svel.affine_step(sample, velocity, a, b),
        check=(lambda: svel.affine_step(sample, velocity, a, b), expected, TOLERANCE[torch.float32, "exact"]),
        peers={"eager": lambda: peers.affine(sample, velocity, a, b)},
        bytes_read=8 * sample.numel(),
        bytes_written=4 * sample.numel(),
    )


def test_host_time(benchmark, device, capsys):
    """What calling the op costs the calling thread, beside torch.add, which also allocates and launches once."""
    sample, cond, uncond = (torch.randn(1, 16, 128, 128, device=device, dtype=torch.bfloat16) for _ in range(3))
    if device.type == "cpu":
        sample, cond, uncond = (v[:, :, :1, :8] for v in (sample, cond, uncond))
    t, tau = torch.tensor(0.8, device=device), torch.tensor(0.7, device=device)
    calls = {
        "stablevelocity_kernels.stablevs_step": lambda: svel.stablevs_step(
            sample, cond, t, tau, uncond, guidance_scale=SCALE
        ),
        "torch.ops.svel.stablevs_step": lambda: torch.ops.svel.stablevs_step(
            sample, cond, t, tau, uncond, guidance_scale=SCALE
        ),
        "torch.add": lambda: torch.add(sample, cond),
    }
    seconds = {name: host_time(call, device) for name, call in calls.items()}
    benchmark.pedantic(calls["stablevelocity_kernels.stablevs_step"], rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(seconds)
    with capsys.disabled():
        print("\nhost time of a call:", ", ".join(f"{name} {1e6 * value:.1f} µs" for name, value in seconds.items()))
