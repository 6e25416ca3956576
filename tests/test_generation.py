"""`svel sample`: samples depend on the seed and their place alone, whatever the batches and processes; its files."""

import numpy as np
import pytest
import torch
from distributed import run_svel
from stablevelocity import cli
from stablevelocity.config import SamplingConfig
from stablevelocity.generation import Processes, evaluations, generate, grid_image, sample_seed

pytest.importorskip("accelerate")
Image = pytest.importorskip("PIL.Image")

SMALL = ["patch_size=4", "hidden_size=16", "depth=1", "num_heads=2"]
SOLVERS = ["euler", "heun", "euler_maruyama", "dpmpp_2m", "unipc"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    rng = np.random.default_rng(0)
    np.savez(folder / "set.npz", x=rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), y=np.arange(12) % 3)
    options = ["--steps=2", "--batch-size=4", "--device=cpu", "--mixed-precision=no", "--set=bank.capacity=4"]
    options += [f"--set=model.{item}" for item in SMALL]
    assert cli.main(["train", f"--data={folder / 'set.npz'}", f"--output={folder / 'run'}", *options]) == 0
    return folder / "run"


def svel_sample(trained, output, *options):
    return ["sample", str(trained), f"--output={output}", "--device=cpu", "--mixed-precision=no", "--seed=5", *options]


def arrays(folder):
    with np.load(folder / "samples.npz") as file:
        return dict(file)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", ["uniform", "shifted", "edm"])
def test_every_solver_on_every_schedule(trained, tmp_path, solver, schedule):
    options = [f"--solver={solver}", f"--schedule={schedule}", "--steps=6", "--low-steps=3", "--guidance=2"]
    assert cli.main(svel_sample(trained, tmp_path, "--per-class=2", "--noise-factor=0.1", *options)) == 0
    found = arrays(tmp_path)
    assert sorted(found) == ["arr_0", "arr_1"]
    assert found["arr_0"].shape == (6, 8, 8, 3)  # NHWC: what the evaluation suite of ADM reads
    assert found["arr_0"].dtype == np.uint8
    assert found["arr_1"].dtype == np.int64
    assert found["arr_1"].tolist() == [0, 0, 1, 1, 2, 2]
    with Image.open(tmp_path / "samples.png") as file:
        pixels = np.asarray(file)
    grid = grid_image(torch.from_numpy(found["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1.0, 2).numpy()  # a class a row
    factor = len(pixels) // len(grid)
    assert np.array_equal(pixels, grid.repeat(factor, 0).repeat(factor, 1))
    assert np.array_equal(grid[:8, :8], found["arr_0"][0])
    assert np.array_equal(grid[20:28, 10:18], found["arr_0"][5])


@pytest.mark.parametrize("solver", ["unipc", "euler_maruyama"])
def test_the_number_of_processes_changes_nothing(trained, tmp_path, solver):
    options = ["--per-class=3", "--batch-size=2", f"--solver={solver}", "--steps=5", "--noise-factor=0.3"]
    for name, world in (("one", 1), ("two", 2)):
        said = run_svel(svel_sample(trained, tmp_path / name, *options), world, tmp_path / f"{name}-log")
    assert "".join(said).count("9 samples of step 2") == 1  # one process speaks
    one, two = arrays(tmp_path / "one"), arrays(tmp_path / "two")
    assert np.array_equal(one["arr_0"], two["arr_0"])
    assert np.array_equal(one["arr_1"], two["arr_1"])
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["samples.npz", "samples.png"]
    assert (tmp_path / "one" / "samples.png").read_bytes() == (tmp_path / "two" / "samples.png").read_bytes()


class Linear(torch.nn.Module):
    """A velocity whose rows do not depend on one another, down to the last bit."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, y=None):
        return self.scale * x + t[:, None, None, None]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_batch_size_changes_nothing(solver):
    config = SamplingConfig(solver=solver, steps=12, noise_factor=0.2)
    run = {"config": config, "shape": (1, 4, 4), "n": 7, "seed": 3}
    whole = generate(Linear(), batch_size=7, **run)
    for batch_size in (1, 3, 100):
        assert torch.equal(generate(Linear(), batch_size=batch_size, **run), whole)
    assert torch.equal(generate(Linear(), **{**run, "n": 3}), whole[:3])
    assert not torch.equal(generate(Linear(), **{**run, "seed": 4}), whole)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 7


@pytest.mark.parametrize(("n", "batch_size", "world"), [(7, 2, 3), (1, 4, 2), (0, 4, 2), (8, 4, 2), (9, 1, 4)])
def test_processes_share_all_batches(n, batch_size, world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    rows = [[i for batch in Processes(r, world).rows(n, batch_size) for i in batch] for r in range(world)]
    assert sorted(i for own in rows for i in own) == list(range(n))
    for rank in reversed(range(world)):
        part = np.array(rows[rank], dtype=np.int64)[:, None]
        whole = Processes(rank, world).gather(part, n, batch_size, tmp_path)
        assert (whole is None) == (rank > 0)
    assert whole[:, 0].tolist() == list(range(n))
    assert not list(tmp_path.iterdir())


def test_seeds_of_samples_differ():
    assert len({sample_seed(seed, i) for seed in (0, 1, 2, 10) for i in range(5000)}) == 20_000
    assert sample_seed(0, 3) == 3


def test_evaluations_follow_the_schedule():
    config = SamplingConfig(steps=10, low_steps=0, guidance=2.0, guidance_low=0.5)
    assert evaluations(config) == 16  # 1.0 ... 0.5 are six of ten times
    config.schedule = "shifted"
    assert evaluations(config) == 18  # 3 t / (1 + 2 t) is below a half at t = 0.1 and 0.2


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_the_device_changes_little(solver):
    config = SamplingConfig(solver=solver, steps=12, noise_factor=0.2)
    run = {"config": config, "shape": (1, 4, 4), "n": 7, "seed": 3}
    cpu, gpu = generate(Linear(), **run), generate(Linear().cuda(), **run)
    assert float((gpu - cpu).norm() / cpu.norm()) < 1e-5  # errors of twelve steps add up
