"""svel latents: shards that survive a kill, and the data set that reads them."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distributed import run_svel
from stablevelocity import cli
from stablevelocity.config import DataConfig
from stablevelocity.data import ImageFolder, ShuffledOrder, load_data, loader
from stablevelocity.latents import LatentData, decode, load_autoencoder, posterior, write_latents
from stablevelocity.shards import Shards
from torch.testing import assert_close

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes started here: with other numbers of threads convolutions differ in the last digit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


N = 300


def save_images(folder):
    """Pieces of two photographs, as JPEG files of several sizes in three classes."""
    photographs = pytest.importorskip("sklearn.datasets").load_sample_images().images
    rng = np.random.default_rng(0)
    for i in range(N):
        path = folder / "abc"[i % 3] / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels, high = photographs[i % 2], 18 + i % 5
        top, left = rng.integers(0, pixels.shape[0] - high), rng.integers(0, pixels.shape[1] - 20)
        Image.fromarray(pixels[top : top + high, left : left + 20]).save(path)
    return folder


def tiny_autoencoder():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 8],
        norm_num_groups=2,
        scaling_factor=0.3,
        shift_factor=0.1,
    ).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    tiny_autoencoder().save_pretrained(folder)
    return folder


def arguments(images, vae, output, *more):
    values = ["latents", images, "--vae", vae, "--output", output, "--size=16", "--device=cpu", "--shard-size=80"]
    return [str(value) for value in (*values, "--batch-size=30", *more)]


@pytest.fixture(scope="module")
def written(images, vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    assert cli.main(arguments(images, vae, folder)) == 0
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_shards_hold_the_posterior_of_images_and_mirror_images(images, vae, written):
    folder, autoencoder = ImageFolder(images, 16), load_autoencoder(str(vae))
    about = json.loads((written / "about.json").read_text())
    assert (about["samples"], about["flips"], about["shape"]) == (N, 2, [2, 4, 8, 8])
    assert sorted(contents(written)) == ["about.json", "labels.npy", *(f"shard-0000{i}.npy" for i in range(4))]
    shards = Shards(written)
    assert shards.labels.tolist() == [y for _, y in folder.files]
    x = folder.__getitems__([5, 299])[0]
    for flip, seen in enumerate((x, x.flip(3))):
        with torch.no_grad():
            expected = autoencoder.encode(seen).latent_dist
        mean, std = shards.rows([5, 299], [flip, flip]).unbind(1)
        assert_close(mean.float(), expected.mean, rtol=2e-3, atol=2e-3)  # stored in float16
        assert_close(std.float(), expected.std, rtol=2e-3, atol=2e-3)


def test_data_set_scales_draws_and_flips(written):
    data = load_data(DataConfig(source=str(written), scale=2.0))
    assert (len(data), data.shape, data.num_classes, data.kind) == (2 * N, (4, 8, 8), 3, "latent")
    mean, std = data.shards.rows([7, 7], [0, 1]).float().unbind(1)
    quiet = load_data(DataConfig(source=str(written), posterior_noise=0.0))
    x, y, index = quiet.__getitems__([7, 307])
    assert_close(x, (mean - 0.1) * 0.3)
    assert y.tolist() == [data.y[7].item()] * 2
    assert index.tolist() == [7, 307]
    first = torch.stack([(data.__getitems__([7, 307, i])[0][:2] / 0.6 + 0.1 - mean) / std for i in range(50)])
    assert abs(first.mean()) < 5 / first.numel() ** 0.5
    assert abs(first.std() - 1) < 5 / first.numel() ** 0.5
    a, b, c = (data.__getitems__(list(batch))[0] for batch in ((7, 307), (7, 307), (307, 7)))
    assert torch.equal(a, b)
    assert not torch.equal(a, c.flip(0))
    plain = load_data(DataConfig(source=str(written), labels=False, flip=False))
    assert (len(plain), plain.num_classes, plain.__getitems__([3])[1]) == (N, 0, None)


def test_workers_see_what_one_process_does(written):
    data = LatentData(written)
    seen = [
        [x for (x, _, _), _ in zip(loader(data, ShuffledOrder(2 * N, 8, 0), workers=w), range(4), strict=False)]
        for w in (0, 2)
    ]
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)


def test_the_data_set_holds_no_more_than_a_batch(written):
    import pickle

    data = LatentData(written)
    data.__getitems__([0, 2 * N - 1])
    assert len(pickle.dumps(data)) < 10_000


def test_killed_and_resumed_gives_the_same_shards(images, vae, written, tmp_path):
    command = [sys.executable, "-c", SLOW, *arguments(images, vae, tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / ".writing-shard-00001.npy").exists():  # in the middle of the second of four
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    left = contents(tmp_path)
    assert "shard-00000.npy" in left
    assert "shard-00003.npy" not in left
    when = (tmp_path / "shard-00000.npy").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"of 4 shards are missing .*: run svel latents again"):
        LatentData(tmp_path)
    assert cli.main(arguments(images, vae, tmp_path)) == 0
    assert contents(tmp_path) == contents(written)
    assert (tmp_path / "shard-00000.npy").stat().st_mtime_ns == when  # not done again
    assert not list(tmp_path.glob(".writing-*"))


SLOW = """
import sys, time
from stablevelocity import cli, latents
quick = latents.posterior
latents.posterior = lambda *a: (time.sleep(0.1), quick(*a))[1]
sys.exit(cli.main(sys.argv[1:]))
"""


def test_two_processes_write_what_one_does(images, vae, written, tmp_path):
    run_svel(arguments(images, vae, tmp_path / "latents"), 2, tmp_path)
    assert contents(tmp_path / "latents") == contents(written)


def test_another_run_in_the_same_folder_is_refused(images, vae, written, capsys):
    before = contents(written)
    for more, message in (("--size=8", "shape ="), ("--no-flip", "flips = 2, got 1"), ("--dtype=float32", "dtype =")):
        assert cli.main(arguments(images, vae, written, more)) == 2
        assert message in capsys.readouterr().err
    assert contents(written) == before


@pytest.mark.parametrize("form", ["distribution", "pair", "tensor"])
def test_any_module_with_encode(images, tmp_path, form):
    class Halves(torch.nn.Module):
        def encode(self, x):
            mean, std = x[:, :, ::2, ::2], x[:, :, 1::2, 1::2].abs()
            if form == "tensor":
                return mean
            return (mean, std) if form == "pair" else SimpleNamespace(mean=mean, std=std)

    folder = ImageFolder(images, 8)
    write_latents(folder, tmp_path, Halves(), flip=False, dtype="float32", shard_size=100, batch_size=4)
    data = LatentData(tmp_path, noise=0.0)
    assert len(data) == N
    assert_close(data.__getitems__([11])[0], folder.__getitems__([11])[0][:, :, ::2, ::2])
    assert (data.shards.rows([0], [0])[:, 1] == 0).all() == (form == "tensor")


def test_decode_undoes_the_scaling():
    vae = tiny_autoencoder()
    mean = posterior(vae, torch.randn(3, 3, 16, 16))[:, 0]
    with torch.no_grad():
        expected = vae.decode(mean).sample
    assert_close(decode(vae, (mean - 0.1) * 0.3, batch_size=2), expected, rtol=1e-4, atol=1e-5)


def test_an_autoencoder_of_ones_own_by_name(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text("import torch\ndef make():\n    return torch.nn.Identity()\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(load_autoencoder("mine:make"), torch.nn.Identity)
    with pytest.raises(ValueError, match="expected module:function, got 'mine:fake'"):
        load_autoencoder("mine:fake")


def test_training_on_latents_resumes_bit_for_bit(written, tmp_path):
    pytest.importorskip("accelerate")
    import shutil

    from stablevelocity.config import load_config
    from stablevelocity.train import Trainer

    small = [f"data.source={written}", "steps=4", "batch_size=4", "save_every=2", "device=cpu", "mixed_precision=no"]
    small += ["model.hidden_size=16", "model.depth=1", "model.num_heads=2", "bank.capacity=4", "log_every=1"]
    whole = Trainer(load_config(None, [*small, f"output={tmp_path / 'a'}"]), progress=False).fit()
    middle = whole.checkpoint.with_name("step-00000002")
    shutil.copytree(middle, tmp_path / "b" / "checkpoints" / middle.name)
    more = [f"output={tmp_path / 'b'}", "resume=latest", "data.workers=1"]
    assert Trainer(load_config(None, [*small, *more]), progress=False).fit().losses == whole.losses
