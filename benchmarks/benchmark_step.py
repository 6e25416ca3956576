"""The draw of a StableVM training step, end to end: push the batch, draw x_t from the mixture, and its target.

Everything of a step but the model: labels dropped, references, times and noise drawn, on the GPU in one CUDA graph.
"""

from __future__ import annotations

import peers
import pytest
import torch
from stablevelocity import ReferenceBank, StableVMObjective

from stablevelocity_kernels import reference
from stablevelocity_kernels.testing import TOLERANCE

# (rows, classes, references per class, D); the null ring is one class more
SIZES = {"cuda": (256, 1000, 256, 4096), "cpu": (64, 49, 256, 4096)}
CFG_PROB = 0.1
CHECKED_ROWS = 8


@pytest.mark.parametrize(
    ("t_low", "online"),
    [(0.5, False), (0.0, False), (0.5, True)],
    ids=["every row over its set", "rows below t_min left out", "every row, the online variance kept"],
)
def test_training_step(measure, device, t_low, online):
    n, classes, m, d = SIZES[device.type]
    torch.manual_seed(0)
    bank = ReferenceBank((d,), classes, m, device=device)
    for ring in bank.refs:
        ring.normal_()
    bank.counts.fill_(m)
    values, labels = torch.randn(n, d, device=device), torch.randint(classes, (n,), device=device)

    def times(rows: int, device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
        return t_low + (1 - t_low) * torch.rand(rows, device=device, generator=generator)

    objective = StableVMObjective(bank, times=times, cfg_prob=CFG_PROB, t_min=0.5, online=online)
    drawn = objective.sample(values, labels)
    few = (drawn.t >= 0.5).nonzero()[:CHECKED_ROWS, 0]
    used, index = drawn.labels[few].unique(return_inverse=True)
    expected = reference.stable_target(
        drawn.x_t[few].cpu().double(), bank.refs[used].cpu(), drawn.t[few].cpu().double(), index.cpu()
    )

    over_set = (1 - max(t_low, 0.5)) / (1 - t_low)  # share of the rows, of which CFG_PROB are on the null ring
    rows_of_class = labels.bincount().double()
    classes_read = 1 + float((1 - (1 - over_set * (1 - CFG_PROB)) ** rows_of_class).sum())
    targets = {"gather + bmm": peers.target_bmm, "gather + broadcast": peers.target_broadcast}
    if device.type == "cpu":
        targets["loop over labels"] = peers.target_per_label

    def peer(name: str):
        counts, heads = bank.counts.clone(), bank.heads.clone()
        return lambda: peers.training_step(bank.refs, counts, heads, values, labels, t_low, CFG_PROB, targets[name])

    measure(
        f"step: push + draw + target {n}×{classes + 1}×{m}×{d} float16, t in [{t_low}, 1]"
        + ", online variance" * online,
        lambda: objective.sample(values, labels),
        check=(lambda: drawn.target[few], expected, TOLERANCE[torch.float32, "exact"]),
        peers={name: peer(name) for name in targets},
        bytes_read=classes_read * m * d * 2 + n * d * 4,
        bytes_written=2 * n * d * 2 + 4 * n * d * 4,  # two rings; noise, x0, x_t and the target
        flops=4.0 * over_set * n * m * d,
    )
