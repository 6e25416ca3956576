"""Training over a bank in parts: with svel's trainer under DDP, and under FSDP2, with the losses of one process."""

import json
import os

import pytest
import stablevelocity as sv
import torch
import torch.distributed as dist
from distributed import run_processes
from stablevelocity import checkpoint
from stablevelocity.models.sit import SiT
from torch.nn.parallel import DistributedDataParallel


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the processes: a model so small gains nothing from more, and on a busy machine they only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- FSDP2

ROWS, STEPS, CLASSES, SHAPE = 8, 12, 3, (4, 8, 8)


def tiny_model():
    torch.manual_seed(0)
    model = SiT(input_size=8, in_channels=4, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=CLASSES)
    for parameter in model.parameters():  # the output layer starts at zero, where every loss is the same
        if not parameter.abs().sum():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def losses(model, objective, push, ranks, world, average):
    """The loss curve; `ranks` are the shares of each global batch that this process trains on."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng, curve = torch.Generator().manual_seed(1), []
    for step in range(STEPS):
        labels = torch.randint(CLASSES, (ROWS,), generator=rng)
        x0 = labels[:, None, None, None] - 1 + 0.1 * torch.randn(ROWS, *SHAPE, generator=rng)
        push(x0, labels)
        share = ROWS // world
        total = torch.zeros(())
        for rank in ranks:
            rows = slice(rank * share, (rank + 1) * share)
            draw = objective.sample(x0[rows], labels[rows], generator=torch.Generator().manual_seed(99 * step + rank))
            loss = objective.loss(model(draw.x_t, draw.t, draw.labels), draw) / len(ranks)
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(average(total)))
    return curve


def objective_over(bank):
    return sv.StableVMObjective(bank, t_min=0.2, cfg_prob=0.3, update_bank=False)


def train_under_fsdp2(rank, world, folder):
    from torch.distributed.fsdp import fully_shard

    model, bank = tiny_model(), sv.ShardedReferenceBank(SHAPE, CLASSES, 5)
    mesh = dist.init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    assert held < 0.6 * sum(parameter.numel() for parameter in model.parameters())

    def push(x0, labels):
        share = ROWS // world
        bank.push(x0[rank * share : (rank + 1) * share], labels[rank * share : (rank + 1) * share])

    def average(loss):
        dist.all_reduce(loss)
        return loss / world

    curve = losses(model, objective_over(bank), push, [rank], world, average)
    if rank == 0:
        with open(f"{folder}/curve.json", "w") as file:
            json.dump(curve, file)


def test_fsdp2_gives_the_loss_curve_of_one_process(tmp_path):
    run_processes(train_under_fsdp2, 2, tmp_path)
    curve = json.loads((tmp_path / "curve.json").read_text())
    bank = sv.ReferenceBank(SHAPE, CLASSES, 5)
    expected = losses(tiny_model(), objective_over(bank), bank.push, [0, 1], 2, lambda loss: loss)
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=1e-4, atol=0)
    assert curve[-1] < 0.9 * curve[0], "nothing was learnt, so nothing was compared"


# --- svel train

SETTINGS = [
    "steps=6",
    "batch_size=8",
    "log_every=1",
    "save_every=3",
    "mixed_precision=no",
    "device=cpu",
    "model.patch_size=4",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "bank.capacity=5",
    "optim.lr=0.01",
]


def trainer(folder, *overrides):
    from stablevelocity.config import load_config
    from stablevelocity.data import ArrayData
    from stablevelocity.train import Trainer

    pixels = torch.randint(0, 256, (20, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = load_config(None, [*SETTINGS, f"output={folder}", *overrides])
    return Trainer(config, dataset=ArrayData(pixels, torch.arange(20) % 2), progress=False)


def curve_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def train_over(place, *overrides):
    """Processes for accelerate to find itself in."""

    def train(rank, world, folder):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        trainer(f"{folder}/{place}", f"bank.storage={place}", "bank.null_label=all", *overrides).fit()

    return train


def train_device(rank, world, folder):
    """Each batch in two parts, of which the first does not exchange gradients."""
    quiet, no_sync = [], DistributedDataParallel.no_sync
    DistributedDataParallel.no_sync = lambda model: (quiet.append(model), no_sync(model))[1]
    train_over("device", "accumulate=2")(rank, world, folder)
    assert len(quiet) == 6


def train_sharded(rank, world, folder):
    train_over("sharded")(rank, world, folder)


def resume_sharded(rank, world, folder):
    train_over("sharded", "resume=latest", "steps=8")(rank, world, folder)


def grow_sharded(rank, world, folder):
    train_over("sharded", "resume=latest", "steps=12")(rank, world, folder)


def test_svel_train_is_the_same_over_a_bank_in_parts(tmp_path):
    """Two processes under DDP; saved in parts, resumed by two, by one and by two again, in parts and whole."""
    pytest.importorskip("accelerate")
    for work in (train_device, train_sharded, resume_sharded):
        run_processes(work, 2, tmp_path)
    device, sharded = curve_of(tmp_path / "device"), curve_of(tmp_path / "sharded")
    assert len(sharded) == 8
    torch.testing.assert_close(torch.tensor(sharded[:6]), torch.tensor(device), rtol=1e-5, atol=0)
    banks = [checkpoint.load_bank(tmp_path / name / "checkpoints/step-00000006") for name in ("device", "sharded")]
    assert all(torch.equal(banks[0][name], banks[1][name]) for name in ("refs", "counts", "heads"))
    for place in ("sharded", "device"):
        resumed = trainer(
            tmp_path / "sharded", f"bank.storage={place}", "bank.null_label=all", "resume=latest", "steps=10"
        )
        assert resumed.step >= 8
        resumed.fit()
    run_processes(grow_sharded, 2, tmp_path)
    assert len(curve_of(tmp_path / "sharded")) == 12
    from_whole = trainer(tmp_path / "device", "bank.storage=sharded", "bank.null_label=all", "resume=latest", "steps=7")
    assert torch.equal(from_whole.bank.refs, banks[0]["refs"])
    from_whole.fit()
