"""svel::bank_push_: one training batch into the per-class rings."""

from __future__ import annotations

import peers
import torch

import stablevelocity_kernels as svel
from stablevelocity_kernels import reference


def test_bank_push(measure, device):
    n, k, m, d = (256, 1001, 256, 4096) if device.type == "cuda" else (64, 50, 256, 4096)
    values = torch.randn(n, d, device=device)
    labels = torch.randint(k, (n,), device=device)

    def fresh(where: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rings = torch.zeros(k, m, d, dtype=torch.float16, device=where)
        return rings, *(torch.zeros(k, dtype=torch.int32, device=where) for _ in range(2))

    ours, theirs, expected = fresh(device), fresh(device), fresh(torch.device("cpu"))
    reference.bank_push_(*expected, values.cpu(), labels.cpu())

    def pushed() -> torch.Tensor:
        state = fresh(device)
        svel.bank_push_(*state, values, labels)
        assert torch.equal(state[1].cpu(), expected[1])
        assert torch.equal(state[2].cpu(), expected[2])
        return state[0]

    measure(
        f"bank_push_ {n} rows into {k}×{m}×{d} float16",
        lambda: svel.bank_push_(*ours, values, labels),
        check=(pushed, expected[0], 0.0),
        peers={"scatter": lambda: peers.bank_push_scatter(*theirs, values, labels)},
        bytes_read=values.numel() * 4,
        bytes_written=values.numel() * 2,
    )
