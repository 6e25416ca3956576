"""svel encoder: a classifier that learns, comes back as it was saved, and is a teacher for a run on the same data."""

import pytest
import torch
from stablevelocity import cli
from stablevelocity.data import ArrayData
from stablevelocity.encoder import Encoder, about_encoder, load_encoder, save_encoder, train_encoder
from stablevelocity.features import load_teacher, patch_tokens, write_features
from stablevelocity.shards import Shards
from torch.testing import assert_close


def stripes(n=160):
    """Images (n, 1, 8, 8): class 0 has bright rows, class 1 bright columns, at random places."""
    generator = torch.Generator().manual_seed(0)
    y, at = (torch.randint(high, (n,), generator=generator) for high in (2, 8))
    line = torch.nn.functional.one_hot(at, 8)[:, None, :] * 200
    x = torch.where(y[:, None, None] == 1, line, line.transpose(1, 2)).expand(n, 8, 8)
    return ArrayData((x + torch.randint(20, (n, 8, 8), generator=generator)).to(torch.uint8), y)


@pytest.fixture(scope="module")
def trained():
    return train_encoder(stripes(), epochs=6, batch_size=16, patch_size=2, width=16, depth=1)


def test_it_learns_to_tell_the_classes(trained):
    assert trained[1] > 0.9


def test_tokens_are_the_grid_row_by_row(trained):
    x = stripes().__getitems__([0, 1])[0]
    tokens = trained[0].tokens(x)
    assert tokens.shape == (2, 16, 16)
    assert_close(tokens[:, 5], trained[0].forward_features(x)[:, :, 1, 1])
    assert_close(trained[0].head(trained[0].embed(x)), trained[0](x))


def test_the_same_seed_gives_the_same_encoder_and_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    one, two = (train_encoder(stripes(40), epochs=1, patch_size=2, width=8, depth=1)[0] for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_saved_and_loaded_it_is_the_same_teacher(trained, tmp_path):
    save_encoder(trained[0], tmp_path, data="stripes", accuracy=trained[1])
    data = stripes()
    x = data.__getitems__([3, 4, 5])[0]
    teacher = load_teacher(f"encoder:{tmp_path}")
    assert torch.equal(patch_tokens(teacher, x), trained[0].tokens(x))
    assert about_encoder(tmp_path) == {"data": "stripes", "accuracy": trained[1]}
    about = write_features(data, tmp_path / "features", teacher, flip=False, dtype="float32")
    assert (about.samples, about.flips, about.shape, about.made["grid"]) == (160, 1, (16, 16), 4)
    assert_close(Shards(tmp_path / "features").rows([3, 4, 5], [0, 0, 0]), trained[0].tokens(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Encoder((1, 8, 8), 2, patch_size=3), "patch_size: expected a divisor of 8 and 8, got 3"),
        (lambda: Encoder((1, 8, 8), 0), "num_classes: expected"),
        (lambda: Encoder((1, 8, 8), 2, width=12), "width: expected a multiple of 8, got 12"),
        (lambda: train_encoder(ArrayData(stripes().x)), "dataset: expected labels"),
        (lambda: train_encoder(stripes(), held_out=0.0), "held_out: expected"),
        (lambda: load_encoder("nowhere"), "encoder: expected a folder that svel encoder wrote"),
        (lambda: write_features(stripes(), "nowhere", Encoder((1, 4, 4), 2)), "--teacher: expected samples of"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_from_the_command_line_to_an_aligned_run(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    encoder, features, run = (str(tmp_path / name) for name in ("encoder", "features", "run"))
    small = ["--patch-size=2", "--width=16", "--epochs=1", "--device=cpu"]
    assert cli.main(["encoder", "digits", "--output", encoder, *small]) == 0
    teacher = ["--teacher", f"encoder:{encoder}", "--device=cpu"]
    assert cli.main(["features", "digits", "--output", features, *teacher]) == 0
    settings = [
        "data.source=digits",
        "model.patch_size=2",
        "model.hidden_size=32",
        "model.depth=2",
        "model.num_heads=2",
    ]
    settings += [f"align.features={features}", "align_at=blocks.0", "objective.source=loader", "bank.capacity=16"]
    settings += ["steps=3", "batch_size=8", "device=cpu"]
    options = [part for setting in settings for part in ("--set", setting)]
    assert cli.main(["train", "--output", run, *options]) == 0
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "projectors.safetensors").is_file()
