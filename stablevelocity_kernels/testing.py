"""What the tests and benchmarks share: one tolerance table, error measures, and problems that are hard on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

# ||out - ref|| / ||ref|| against float64 on the same stored inputs, by the dtype of the output and the precision asked.
TOLERANCE = {
    (torch.float32, "exact"): 2e-6,
    (torch.float32, "fast"): 1e-3,
    (torch.float64, "exact"): 1e-12,
    (torch.float64, "fast"): 1e-12,
    (torch.float16, "exact"): 6e-4,
    (torch.float16, "fast"): 1.2e-3,
    (torch.bfloat16, "exact"): 4e-3,
    (torch.bfloat16, "fast"): 5e-3,
}

GEOMETRIES = ("gaussian", "manifold", "shifted")


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref|| in float64; NaN when either holds a NaN."""
    out, ref = out.detach().double(), ref.detach().double()
    return float((out - ref).norm() / ref.norm().clamp_min(1e-300))


def assert_close(out: Tensor, ref: Tensor, precision: str = "exact") -> None:
    """Hold an output to the tolerance of its dtype."""
    limit, error = TOLERANCE[out.dtype, precision], relative_error(out, ref)
    assert error <= limit, f"relative error {error:.2e} is above {limit:.0e} for {out.dtype}, {precision}"


def make_references(count: int, d: int, geometry: str, generator: torch.Generator) -> Tensor:
    """(count, d) float32 on the CPU.

    "gaussian": independent standard normals. "manifold": near a four-dimensional set, with neighbours so close that the
    weights stay spread over many references. "shifted": the manifold moved by a common mean of ten per coordinate.
    """
    if geometry == "gaussian":
        return torch.randn(count, d, generator=generator)
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry: expected one of {GEOMETRIES}, got {geometry!r}")
    basis = torch.randn(4, d, generator=generator) / d**0.5
    points = 2.0 * torch.randn(count, 4, generator=generator) @ basis
    points = points + 0.02 / d**0.5 * torch.randn(count, d, generator=generator)
    return points + (10.0 * torch.randn(1, d, generator=generator) if geometry == "shifted" else 0.5)


def photograph_pieces(count: int, side: int, generator: torch.Generator) -> Tensor:
    """(count, 3 side side) float32 in [-1, 1]: squares of two photographs, at different places, half of them mirrored.

    What images have and the made-up references lack: smooth pieces by the hundred that are close to one another, and
    most of the variance in few directions. The photographs are scikit-learn's.
    """
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    pieces = []
    for i, photograph in enumerate(photographs):
        # A view, (down, across, 3, side, side).
        windows = torch.tensor(photograph).unfold(0, side, 1).unfold(1, side, 1)
        share = count * (i + 1) // len(photographs) - count * i // len(photographs)
        places = torch.randperm(windows.shape[0] * windows.shape[1], generator=generator)[:share]
        taken = windows[places // windows.shape[1], places % windows.shape[1]].float() / 127.5 - 1
        taken[::2] = taken[::2].flip(-1)
        pieces.append(taken.flatten(1))
    return torch.cat(pieces)[torch.randperm(count, generator=generator)]


def make_noisy(picked: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """x_t = (1 - t) x_0 + t eps for rows x_0 = picked (n, d) and t (n,), on the CPU."""
    return (1 - t[:, None]) * picked.float() + t[:, None] * torch.randn(picked.shape, generator=generator)
