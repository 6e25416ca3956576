"""svel features: what teachers see and give, the shards, and training aligned to them."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distributed import draw_as_processes, run_svel
from stablevelocity import checkpoint, cli
from stablevelocity.config import load_config
from stablevelocity.data import ImageFolder, to_unit
from stablevelocity.features import AlignedData, load_teacher, patch_size, patch_tokens, teacher_pixels, write_features
from stablevelocity.latents import LatentData, write_latents
from stablevelocity.shards import Shards
from torch import nn
from torch.testing import assert_close

Image = pytest.importorskip("PIL.Image")


class Teacher(nn.Module):
    """Patches of 2 x 2 pixels as a linear map sees them, after a class token."""

    patch_size = 2

    def __init__(self, channels=6):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, channels, 2, stride=2)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)


class Halves(nn.Module):
    """An autoencoder that averages and leaves a deviation."""

    def encode(self, x):
        mean = nn.functional.avg_pool2d(x, 2)
        return mean, torch.full_like(mean, 0.1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(14):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return ImageFolder(folder, 16)


@pytest.fixture(scope="module")
def latents(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    write_latents(images, folder, Halves(), shard_size=5, batch_size=4)
    return folder


@pytest.fixture(scope="module")
def features(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    write_features(images, folder, Teacher(), grid=4, shard_size=4, batch_size=3)
    return folder


def test_pixels_are_what_dinov2_takes():
    images = torch.stack([torch.full((3, 32, 32), v) for v in (-1.0, 0.0, 1.0)])
    x = teacher_pixels(images, 28)
    assert x.shape == (3, 3, 28, 28)
    for image, grey in zip(x, (0.0, 0.5, 1.0), strict=True):
        expected = (grey - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        assert_close(image, torch.tensor(expected).float().view(3, 1, 1).expand_as(image), rtol=1e-5, atol=1e-5)


def small_dino():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    return transformers.Dinov2Model(config).eval()


def test_dinov2_of_transformers_gives_patch_tokens_without_the_class_token(tmp_path):
    model, images = small_dino(), torch.rand(2, 3, 32, 32) * 2 - 1
    got = patch_tokens(model, images, grid=4)  # 56 pixels: not the size it was made for
    with torch.no_grad():
        out = model(pixel_values=teacher_pixels(images, 56)).last_hidden_state
    assert out.shape == (2, 17, 16)
    assert_close(got, out[:, 1:])
    model.save_pretrained(tmp_path)
    assert_close(patch_tokens(load_teacher(f"transformers:{tmp_path}"), images, grid=4), got)


def test_dinov2_base_in_its_true_shape_on_a_photograph():
    transformers = pytest.importorskip("transformers")
    pixels = pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")[100:356, 200:456]
    images = to_unit(torch.tensor(pixels).permute(2, 0, 1)[None])
    seen = teacher_pixels(images, 224)
    small = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)) / 255
    expected = (small - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    apart = (seen[0] - torch.tensor(expected).permute(2, 0, 1)).abs()  # PIL rounds and clips between its two passes
    assert apart.mean() < 0.01
    assert apart.max() < 0.2
    model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=518)).eval()
    assert sum(p.numel() for p in model.parameters()) == 86_580_480  # DINOv2 ViT-B/14
    tokens = patch_tokens(model, images)
    assert tokens.shape == (1, 256, 768)
    with torch.no_grad():
        assert_close(tokens, model(pixel_values=seen).last_hidden_state[:, 1:])


def test_dinov2_with_registers_leaves_them_out():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, num_register_tokens=4
    )
    model, images = transformers.Dinov2WithRegistersModel(config).eval(), torch.rand(1, 3, 28, 28)
    with torch.no_grad():
        out = model(pixel_values=teacher_pixels(images, 28)).last_hidden_state
    assert out.shape[1] == 9
    assert_close(patch_tokens(model, images, grid=2), out[:, 5:])


def test_the_forms_of_torch_hub_and_timm():
    tokens = torch.arange(40.0).view(1, 10, 4)
    hub = SimpleNamespace(patch_size=2, forward_features=lambda x: {"x_norm_patchtokens": tokens[:, 1:]})
    timm = SimpleNamespace(patch_embed=SimpleNamespace(patch_size=(2, 2)), forward_features=lambda x: tokens)
    for teacher in (hub, timm):
        assert patch_size(teacher) == 2
        assert torch.equal(patch_tokens(teacher, torch.zeros(1, 3, 8, 8), grid=3), tokens[:, 1:])
    with pytest.raises(RuntimeError, match=r"expected tokens \(N, 16 or more, C\), got \(1, 10, 4\)"):
        patch_tokens(timm, torch.zeros(1, 3, 8, 8), grid=4)
    with pytest.raises(ValueError, match="teacher: expected a `patch_size`"):
        patch_size(nn.Identity())


def test_shards_follow_the_images_and_their_mirror_images(images, features):
    shards = Shards(features)
    assert (shards.about.samples, shards.about.flips, shards.about.shape) == (14, 2, (16, 6))
    x = images.__getitems__([9])[0]
    for flip, seen in enumerate((x, x.flip(3))):
        assert_close(shards.rows([9], [flip]).float(), patch_tokens(Teacher(), seen, grid=4), rtol=2e-3, atol=2e-3)


def test_features_lie_beside_the_latents(latents, features):
    data = AlignedData(LatentData(latents), [features, features])
    x, _, index, [z, again] = data.__getitems__([3, 17])  # 17 is the mirror image of 3
    assert x.shape == (2, 3, 8, 8)
    assert index.tolist() == [3, 17]
    assert torch.equal(z, again)
    assert torch.equal(z, Shards(features).rows([3, 3], [0, 1]))
    assert not torch.equal(z[0], z[1])


def test_features_of_other_images_are_refused(images, latents, features, tmp_path):
    with pytest.raises(ValueError, match=r"align.features: expected features, got latents"):
        AlignedData(LatentData(latents), [latents])
    write_features(images, tmp_path / "plain", Teacher(), grid=4, flip=False)
    with pytest.raises(ValueError, match=r"lacks mirror images: set data.flip=false"):
        AlignedData(LatentData(latents), [tmp_path / "plain"])
    assert len(AlignedData(LatentData(latents, flip=False), [tmp_path / "plain"])) == 14
    shutil.copytree(images.root, tmp_path / "images")
    (tmp_path / "images" / "a" / "0.png").rename(tmp_path / "images" / "a" / "zero.png")
    write_features(ImageFolder(tmp_path / "images", 16), tmp_path / "other", Teacher(), grid=4)
    with pytest.raises(ValueError, match="expected those of the 14 images of the data"):
        AlignedData(LatentData(latents), [tmp_path / "other"])


def test_the_command(images, tmp_path, capsys):
    small_dino().save_pretrained(tmp_path / "teacher")
    command = ["features", images.root, "--output", tmp_path / "z", "--teacher", f"transformers:{tmp_path / 'teacher'}"]
    assert cli.main([str(part) for part in (*command, "--size=16", "--grid=2", "--device=cpu")]) == 0
    assert "14 images, 2 x (4, 16), 1 shards" in capsys.readouterr().out
    assert cli.main([str(part) for part in (*command, "--teacher=dinov2")]) == 2
    assert "--teacher: expected torch.hub:, timm:, transformers: or encoder:" in capsys.readouterr().err


def settings(latents, features, output, *more):
    return [
        f"data.source={latents}", f"align.features={features}", f"output={output}", "align_at=blocks.0",
        "objective.source=loader", "steps=4", "batch_size=4", "save_every=2", "device=cpu", "mixed_precision=no",
        "model.hidden_size=16", "model.depth=2", "model.num_heads=2", "bank.capacity=4", "log_every=1",
        "align.width=8", "optim.lr=0.01", *more,
    ]  # fmt: skip


def train(*arguments):
    pytest.importorskip("accelerate")
    from stablevelocity.train import Trainer

    return Trainer(load_config(None, settings(*arguments)), progress=False)


@pytest.mark.parametrize("more", [(), ("align.projector=conv", "align.spatial_norm=true", "model.checkpointing=true")])
def test_aligned_training_learns_and_resumes_bit_for_bit(latents, features, tmp_path, more):
    trainer = train(latents, features, tmp_path / "a", *more)
    before = [p.detach().clone() for p in trainer.projectors.parameters()]
    whole = trainer.fit()
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.projectors.parameters(), strict=True))
    middle = whole.checkpoint.with_name("step-00000002")
    shutil.copytree(middle, tmp_path / "b" / "checkpoints" / middle.name)
    assert train(latents, features, tmp_path / "b", *more, "resume=latest").fit().losses == whole.losses


def test_alignment_reaches_the_teacher_and_leaves_the_rest_of_the_run_alone(latents, features, tmp_path):
    more = ("steps=60", "batch_size=14", "log_every=20", "save_every=0", "align.schedule=hard", "align.split=1.0")
    off, on = (
        train(latents, features, tmp_path / str(c), *more, f"align.coefficient={c}").fit().losses for c in (0, 1)
    )
    gained = [b["loss"] - a["loss"] for a, b in zip(off, on, strict=True)]  # about minus the cosine
    assert gained[-1] < gained[0] - 0.05
    assert gained[-1] > -1.1


def test_mistakes_are_named(latents, features, tmp_path):
    for more, message in (
        (("align.features=null",), "align.features: expected a folder that svel features wrote"),
        (("objective.source=bank",), "objective.source: expected 'loader' with align_at"),
        (("align_at=blocks.7",), "align_at: expected the name of a module, got 'blocks.7'; there are blocks"),
        (("model.patch_size=4",), "align.features: expected 2 x 2 tokens as in the model, got 16"),
    ):
        with pytest.raises(ValueError, match=message):
            train(latents, features, tmp_path, *more)


def assert_same_curves(lines, expected):
    for key in ("loss", "grad_norm"):
        curves = [torch.tensor([line[key] for line in run]) for run in (lines, expected)]
        assert_close(*curves, rtol=1e-4, atol=0)


def test_two_processes_align_as_one_does(latents, features, tmp_path):
    """Weights are summed over all rows of a batch, wherever they are."""
    quiet = "data.posterior_noise=0"  # noise is drawn for the batch of a process
    sets = [part for text in settings(latents, features, tmp_path, quiet) for part in ("--set", text)]
    run_svel(["train", "--debug", *sets], 2, tmp_path / "processes")
    saved = checkpoint.latest(tmp_path / "checkpoints")
    assert len(checkpoint.load_module(saved, "projectors")) == 6
    alone = train(latents, features, tmp_path / "one", quiet)
    draw_as_processes(alone, 2)
    assert_same_curves(checkpoint.load(saved)[1]["logs"], alone.fit().losses)
    assert train(latents, features, tmp_path, "resume=latest", "steps=5").fit().steps == 5  # by one process


def test_alignment_in_parts_is_that_of_the_batch(latents, features, tmp_path):
    whole, parts = (train(latents, features, tmp_path / str(n), f"accumulate={n}").fit().losses for n in (1, 4))
    assert_same_curves(parts, whole)


def test_the_commands_of_the_guide_are_those_of_the_code():
    """Every `stablevelocity` command line in docs/imagenet.md parses, and its configuration is valid."""
    import re
    import shlex
    from importlib.resources import files
    from pathlib import Path

    text = (Path(__file__).parents[1] / "docs" / "imagenet.md").read_text()
    packaged = str(files("stablevelocity") / "configs" / "imagenet_latents.yaml")
    lines = [line.replace("$C", packaged) for line in text.replace("\\\n", " ").splitlines()]
    found = [
        m[1] for line in lines if (m := re.match(r"(?:torchrun|accelerate launch) .* -m stablevelocity (.*)", line))
    ]
    assert [line.split()[0] for line in found] == ["latents", "features", "train", "train", "sample"]
    for line in found:
        args = cli.build_parser().parse_args(shlex.split(line))
        if args.command == "train":
            args.print_config = True
            args.run(args)
