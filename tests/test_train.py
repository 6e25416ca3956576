"""The training loop: it learns, resumes bit for bit, survives a kill, and runs on several processes."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")

from distributed import draw_as_processes
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
        ("accumulate=2", "mixed_precision=bf16"),
    ],
    ids=["stablevm", "loader", "cfm", "stf", "null-all-cosine", "accumulate"],
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


def launch(how, *overrides):
    """A command line of `svel train` for two processes, and its environment."""
    sets = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", *how, "-m", "stablevelocity", "train", "--debug", *sets]
    return command, {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_two_processes_train_as_one(tmp_path):
    """Two gloo processes, killed as they save, go on from what is whole; the run is that of one with the same draws."""
    psutil = pytest.importorskip("psutil")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "set.npz", x=rng.integers(0, 256, (20, 8, 8), dtype=np.uint8), y=np.arange(20) % 2)
    settings = [*SMALL, f"data.source={tmp_path / 'set.npz'}", "bank.prefill=false", "optim.schedule=constant"]
    settings += ["log_every=1", "objective.t_min=auto"]
    both = [*settings, f"output={tmp_path / 'both'}", "accumulate=2", "save_every=1"]
    root = tmp_path / "both" / "checkpoints"

    how = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command, env = launch(how, *both, "steps=100000")
    with open(tmp_path / "killed.txt", "w") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output)
    family, deadline = [psutil.Process(process.pid)], time.monotonic() + 100
    try:
        while len(checkpoint.complete(root)) < 3 or not list(root.glob(".writing-*/model.safetensors")):
            assert process.poll() is None, (tmp_path / "killed.txt").read_text()[-2000:]
            assert time.monotonic() < deadline
    finally:
        family += family[0].children(recursive=True)
        for member in family:
            member.kill()
        process.wait()
    psutil.wait_procs(family, timeout=10)
    killed, _ = checkpoint.load(checkpoint.latest(root))

    how = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command, env = launch(how, *both, "resume=latest", f"steps={killed + 3}")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    saved = checkpoint.latest(root)
    step, state = checkpoint.load(saved)
    assert step == killed + 3
    assert len(state["random"]) == 2
    assert not torch.equal(state["random"][0]["torch"], state["random"][1]["torch"])

    alone = Trainer(load_config(None, [*settings, f"output={tmp_path / 'one'}", f"steps={step}"]), progress=False)
    draw_as_processes(alone, 2)
    expected = alone.fit()
    for key in ("loss", "grad_norm"):
        curves = [torch.tensor([line[key] for line in lines]) for lines in (state["logs"], expected.losses)]
        torch.testing.assert_close(*curves, rtol=1e-4, atol=0)
    bank = checkpoint.load_module(saved, "bank")
    assert all(torch.equal(bank[name], held) for name, held in alone.bank.state_dict().items())
    variance = checkpoint.load_module(saved, "variance")
    assert variance["seen"] > 4 * step, "of both processes' rows"
    for name, held in alone.variance.state_dict().items():
        torch.testing.assert_close(variance[name], held, rtol=1e-2, atol=1e-6)  # which ages rows by the batch

    more = Trainer(load_config(None, [*both, "resume=latest", f"steps={step + 2}"]), progress=False)
    assert more.step == step
    more.fit()
    assert checkpoint.latest(root).name == f"step-{step + 2:08d}"


@pytest.mark.parametrize(
    "overrides",
    [(), ("objective.source=loader", "model.checkpointing=true"), ("objective.name=cfm",), ("objective.name=stf",)],
    ids=["stablevm", "loader", "cfm", "stf"],
)
def test_accumulated_gradients_are_those_of_the_batch(tmp_path, images, overrides):
    runs = []
    for parts in (1, 4):
        trainer = make(images, tmp_path / str(parts), *overrides, f"accumulate={parts}", "optim.clip=0", "steps=1")
        for parameter in trainer.parameters:  # at initialisation only the last layer has a gradient
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        trainer.optimizer.zero_grad = lambda: None
        runs.append((trainer.fit().losses[0], [p.grad for p in trainer.parameters], trainer.bank))
    (whole, gradients, bank), (line, summed, same) = runs
    assert line["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    for a, b in zip(summed, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert max(float(g.abs().max()) for g in gradients) > 1e-3
    assert bank is None or all(torch.equal(a, b) for a, b in zip(bank.buffers(), same.buffers(), strict=True))


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path, images):
    with pytest.raises(ValueError, match="accumulate: expected a divisor of a process's 8 samples, got 3"):
        make(images, tmp_path, "accumulate=3")


@pytest.mark.parametrize(("how", "precision", "tolerance"), [("model", "no", 1e-5), ("step", "bf16", 2e-2)])
def test_compiled_and_in_bfloat16(tmp_path, images, monkeypatch, how, precision, tolerance):
    """What the plain step does; bfloat16 is in the model's activations, not in its weights."""
    whole = make(images, tmp_path / "plain").fit()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    trainer = make(images, tmp_path / "fast", f"compile={how}", f"mixed_precision={precision}", "accumulate=2")
    outputs = []
    trainer.model.final_layer.register_forward_hook(lambda module, inputs, output: outputs.append(output.dtype))
    result = trainer.fit()
    assert set(outputs) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    for key in ("loss", "grad_norm"):
        curves = [torch.tensor([line[key] for line in run.losses]) for run in (result, whole)]
        torch.testing.assert_close(*curves, rtol=tolerance, atol=0)
    assert load_model(tmp_path / "fast", device="cpu")[2]["step"] == 6  # saved under the plain names


def test_fp16_skips_steps_that_overflow_and_resumes(tmp_path, images, monkeypatch):
    """On a CPU, where accelerate leaves fp16 out, with the autocast and the scaler that it has on a GPU."""
    import accelerate

    class Half(accelerate.Accelerator):
        def __init__(self, **options):
            super().__init__(**{**options, "mixed_precision": "fp16"})
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**28)

    whole = make(images, tmp_path / "plain", "steps=4", "log_every=1").fit()
    monkeypatch.setattr(accelerate, "Accelerator", Half)
    more = ("steps=12", "log_every=1", "save_every=4", "accumulate=2")
    half = make(images, tmp_path / "half", *more).fit()
    skipped = [line["skipped"] for line in half.losses]
    assert skipped[0] == 1
    assert skipped[-1] == 0
    assert all(math.isfinite(line["grad_norm"]) for line in half.losses)
    scaler = checkpoint.load(half.checkpoint)[1]["scaler"]
    assert scaler["scale"] == 2.0 ** (28 - sum(skipped))
    assert half.losses[0]["loss"] == pytest.approx(whole.losses[0]["loss"], rel=1e-3)
    middle = half.checkpoint.with_name("step-00000004")
    shutil.copytree(middle, tmp_path / "again" / "checkpoints" / middle.name)
    again = make(images, tmp_path / "again", *more, "resume=latest").fit()
    assert_same_checkpoint(half.checkpoint, again.checkpoint)


def test_fp16_without_a_gpu_is_refused(tmp_path, images):
    with pytest.raises(ValueError, match="mixed_precision: expected 'bf16' or 'no' on a CPU, got 'fp16'"):
        make(images, tmp_path, "mixed_precision=fp16")


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "parts"), [("bf16", 1), ("bf16", 2), ("fp16", 2)])
def test_a_step_never_waits_for_the_device(tmp_path, images, precision, parts):
    trainer = make(images, tmp_path, "device=cuda", f"mixed_precision={precision}", f"accumulate={parts}")
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
@pytest.mark.parametrize(("how", "precision"), [("no", "auto"), ("no", "fp16"), ("model", "fp16"), ("step", "auto")])
def test_training_on_a_gpu(tmp_path, images, how, precision):
    options = ("device=cuda", f"mixed_precision={precision}", f"compile={how}", "accumulate=2")
    plain = make(images, tmp_path / "plain", "device=cuda", "steps=12").fit()
    result = make(images, tmp_path / "fast", *options, "steps=12").fit()
    curves = [torch.tensor([line["loss"] for line in run.losses]) for run in (result, plain)]
    if how != "step":  # where the inductor draws other numbers
        torch.testing.assert_close(*curves, rtol=5e-2, atol=0)
    assert curves[0].isfinite().all()
    assert result.losses[-1].get("skipped", 0) == 0
    assert make(images, tmp_path / "fast", *options, "resume=latest", "steps=14").fit().steps == 14
