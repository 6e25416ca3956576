"""The training loop: it learns, resumes bit for bit, survives a kill, and runs on several processes."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")

from stablevelocity import checkpoint
from stablevelocity.config import load_config
from stablevelocity.data import ArrayData
from stablevelocity.ema import EMA
from stablevelocity.generation import evaluations, generate, grid_image, load_model
from stablevelocity.train import Trainer, learning_rate

SMALL = [
    "steps=6",
    "batch_size=8",
    "log_every=2",
    "mixed_precision=no",
    "device=cpu",
    "model.patch_size=4",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "bank.capacity=4",
    "optim.lr=0.01",
    "optim.warmup=2",
    "optim.schedule=cosine",
    "optim.ema=0.9",
    "sampling.steps=3",
    "sampling.low_steps=2",
]


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 8, 8), dtype=torch.uint8, generator=generator)
    return ArrayData(pixels, torch.arange(20) % 2)


def make(images, folder, *overrides):
    return Trainer(load_config(None, [*SMALL, f"output={folder}", *overrides]), dataset=images, progress=False)


def assert_same_checkpoint(a: Path, b: Path):
    names = sorted(path.name for path in a.glob("*.safetensors"))
    assert names == sorted(path.name for path in b.glob("*.safetensors"))
    for name in names:
        left, right = (checkpoint.load_module(folder, name.removesuffix(".safetensors")) for folder in (a, b))
        assert left.keys() == right.keys()
        different = [key for key in left if not torch.equal(left[key], right[key])]
        assert not different, f"{name}: {different}"
    left, right = (json.loads((folder / "state.json").read_text())["state"] for folder in (a, b))
    for key in left.keys() - {"config"}:
        assert left[key] == right[key], key


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("objective.source=loader", "bank.prefill=false", "log_every=4"),
        ("objective.name=cfm", "objective.times=lognormal"),
        ("objective.name=stf", "optim.clip=0"),
        ("bank.null_label=all", "objective.interpolant=cosine", "data.workers=1"),
    ],
    ids=["stablevm", "loader", "cfm", "stf", "null-all-cosine"],
)
def test_resume_is_bit_for_bit(tmp_path, images, overrides):
    whole = make(images, tmp_path / "a", *overrides, "save_every=3").fit()
    done = whole.checkpoint.with_name("step-00000003")
    shutil.copytree(done, tmp_path / "b" / "checkpoints" / done.name)
    torch.manual_seed(99)
    again = make(images, tmp_path / "b", *overrides, "resume=latest")
    seen, step = [], again._train_step
    again._train_step = lambda batch: (seen.append(batch[2].tolist()), step(batch))
    resumed = again.fit()
    assert_same_checkpoint(whole.checkpoint, resumed.checkpoint)
    assert resumed.losses == whole.losses
    assert (tmp_path / "a/log.jsonl").read_text() == (tmp_path / "b/log.jsonl").read_text()
    flat = [index for batch in seen for index in batch]
    assert len(flat) == 24
    assert len(set(flat[-16:])) > 8


def test_data_order_and_draws_depend_on_the_seed_alone(tmp_path, images):
    a, b, c = (make(images, tmp_path / str(i), f"seed={s}").fit().losses for i, s in enumerate((1, 1, 2)))
    assert a == b != c


def test_it_learns(tmp_path):
    """Two constant images: the target is a function of (x_t, t, y), which a model can reach."""
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1).expand(2, 8, 8).repeat(8, 1, 1)
    data = ArrayData(x, torch.arange(16) % 2)
    trainer = make(data, tmp_path, "steps=150", "batch_size=32", "log_every=25", "objective.cfg_prob=0")
    losses = [line["loss"] for line in trainer.fit().losses]
    assert losses[-1] < 0.5 * losses[0]
    config, labels = trainer.config.sampling, torch.tensor([0, 1])
    dark, light = generate(trainer.ema.module, config, data.shape, labels, num_classes=2)
    assert dark.mean() < -0.4
    assert light.mean() > 0.4


def test_a_run_leaves_what_it_says(tmp_path, images):
    pytest.importorskip("PIL")
    make(images, tmp_path, "save_every=2", "keep=2", "sample_every=3").fit()
    steps = [path.name for path in checkpoint.complete(tmp_path / "checkpoints")]
    assert steps == ["step-00000004", "step-00000006"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert load_config(tmp_path / "config.yaml").optim.lr == 0.01


def test_sample_grids_do_not_disturb_training(tmp_path, images):
    a = make(images, tmp_path / "a").fit()
    b = make(images, tmp_path / "b", "sample_every=2").fit()
    assert a.losses == b.losses


def test_tensorboard(tmp_path, images):
    pytest.importorskip("tensorboard")
    make(images, tmp_path, "tracker=tensorboard").fit()
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_a_tracker_that_is_not_installed_is_named(tmp_path, images, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="wandb is not installed"):
        make(images, tmp_path, "tracker=wandb")


def test_a_half_written_checkpoint_is_passed_over(tmp_path, images):
    result = make(images, tmp_path, "save_every=3").fit()
    (result.checkpoint / "model.safetensors").write_bytes(b"half")
    shutil.copytree(result.checkpoint, result.checkpoint.with_name(".writing-00000007-1"))
    resumed = make(images, tmp_path, "resume=latest")
    assert resumed.step == 3
    resumed.fit()
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000006"


def test_a_folder_with_a_run_is_not_overwritten_unasked(tmp_path, images):
    make(images, tmp_path).fit()
    with pytest.raises(ValueError, match=r"holds a run .* --resume latest"):
        make(images, tmp_path)
    assert make(images, tmp_path, "overwrite=true").step == 0
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_resuming_latest_with_nothing_there_starts_afresh(tmp_path, images):
    assert make(images, tmp_path, "resume=latest").step == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch_size=4"], "batch_size: expected 8 as in the checkpoint"),
        (["model.hidden_size=32"], "model: expected the model of the checkpoint"),
        (["bank.capacity=5"], "build the bank as it was saved"),
        (["objective.name=cfm"], "objective.name: expected stablevm"),
    ],
)
def test_resuming_another_run_is_refused(tmp_path, images, overrides, message):
    make(images, tmp_path).fit()
    with pytest.raises(ValueError, match=message):
        make(images, tmp_path, "resume=latest", *overrides)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    data = ArrayData(torch.full((8, 1, 8, 8), math.nan))
    with pytest.raises(RuntimeError, match="the loss is nan at step 2"):
        make(data, tmp_path).fit()


def test_unconditional_latents_train_and_sample(tmp_path):
    data = ArrayData(torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    make(data, tmp_path).fit()
    model, config, about = load_model(tmp_path, device="cpu")
    assert about["kind"] == "latent"
    assert about["num_classes"] == 0
    a, b = (generate(model, config.sampling, about["shape"], n=5, batch_size=size) for size in (5, 2))
    assert a.shape == (5, 4, 8, 8)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # batches do not matter
    assert grid_image(a, 3).shape == (18, 28, 3)


def test_generate_names_what_is_wrong(tmp_path, images):
    trainer = make(images, tmp_path)
    sampling = trainer.config.sampling
    with pytest.raises(ValueError, match="labels: expected class labels"):
        generate(trainer.model, sampling, images.shape, n=2, num_classes=2)
    with pytest.raises(ValueError, match=r"labels: expected 0 to 2 .* got \[3\]"):
        generate(trainer.model, sampling, images.shape, torch.tensor([3]), num_classes=2)
    assert evaluations(sampling) == 3


def test_learning_rate():
    config = load_config(None, ["optim.warmup=4", "optim.schedule=cosine", "optim.final_lr=0.1"]).optim
    share = learning_rate(config, 24)
    assert [round(share(step), 6) for step in (0, 3, 4, 14, 24)] == [0.2, 0.8, 1.0, 0.55, 0.1]


def test_moving_average_starts_fast_and_slows_to_its_decay():
    model = torch.nn.BatchNorm1d(1)
    average = EMA(model, 0.99)
    model.weight.data.fill_(2.0)
    model.running_mean.fill_(5.0)
    average.update(model)
    assert average.module.weight.item() == pytest.approx(0.1 * 1 + 0.9 * 2)
    assert average.module.running_mean.item() == 5.0
    average.updates = 10_000
    average.update(model)
    assert average.module.weight.item() == pytest.approx(0.99 * 1.9 + 0.01 * 2)
    assert not average.module.weight.requires_grad


def test_two_processes_share_the_batch_and_the_bank(tmp_path):
    """Two gloo processes, saved, then resumed by one."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "set.npz", x=rng.integers(0, 256, (20, 8, 8), dtype=np.uint8), y=np.arange(20) % 2)
    overrides = [*SMALL, f"data.source={tmp_path / 'set.npz'}", f"output={tmp_path / 'run'}", "bank.prefill=false"]
    overrides.append("objective.t_min=auto")
    sets = [part for override in overrides for part in ("--set", override)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    train = [sys.executable, "-m", "stablevelocity", "train", "--debug", *sets]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *train], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    step, state = checkpoint.load(saved)
    assert step == 6
    assert len(state["random"]) == 2
    assert not torch.equal(state["random"][0]["torch"], state["random"][1]["torch"])
    bank = checkpoint.load_module(saved, "bank")
    assert bank["counts"].tolist() == [4, 4, 4]
    variance = checkpoint.load_module(saved, "variance")
    assert variance["moments"] == 48, "the online variance is of both processes' rows"
    assert 24 < variance["seen"] <= 48
    assert int(bank["heads"].sum()) % 4 == (48 + 48) % 4  # each of 48 samples went into its class and the null ring
    more = subprocess.run(
        [*train, "--set", "resume=latest", "--set", "steps=8"], env=env, capture_output=True, text=True
    )
    assert more.returncode == 0, more.stderr[-2000:]
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-00000008"


@pytest.mark.gpu
def test_a_step_never_waits_for_the_device(tmp_path, images):
    trainer = make(images, tmp_path, "device=cuda", "mixed_precision=bf16")
    x, y, index = images.__getitems__(range(8))
    batch = x.cuda(), y.cuda(), index
    for _ in range(3):
        trainer._train_step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["no", "model", "step"])
def test_training_on_a_gpu(tmp_path, images, how):
    result = make(images, tmp_path, "device=cuda", "mixed_precision=auto", f"compile={how}").fit()
    assert all(math.isfinite(line["loss"]) for line in result.losses)
    assert make(images, tmp_path, "device=cuda", "mixed_precision=auto", "resume=latest", "steps=8").fit().steps == 8
